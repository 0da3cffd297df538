"""Records how the chat template of the Qwen3 model files renders a few conversations, as truth for ours.

Run it by hand with the template as such a file carries it (tokenizer.chat_template), which no test needs:
    PYTHONPATH=. python tests/record_prompts.py Qwen3.jinja
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from jaxmoe import demo_model
from jaxmoe.chat import ChatTemplate
from tools.demo_vocabulary import tokenizer_of, vocabulary_of

GOLDENS: Final = Path(__file__).parent / "goldens" / "qwen3_prompts.json"
Message = dict[str, Any]


def said(role: str, content: Any, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any) -> Message:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def function(name: str, **properties: Any) -> Message:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    described = {"name": name, "description": f"Café's <b> & {name}", "parameters": parameters}
    return {"type": "function", "function": described}


SYSTEM, USER = said("system", "Be short."), said("user", "What is 17 + 25?")
TOOLS = [function("weather", city={"type": "string", "enum": ["Oslo", "Malmö"]}), function("now")]
CALLS = [call("weather", {"city": "Malmö", "days": [1, 2.5], "dry": True}), call("now", "{}")]
RESULTS = [said("tool", '{"sky": "blue"}'), said("tool", "7 am")]
INSIDE = "<think>\nOnes first.\n</think>\n\n42."

CONVERSATIONS: Final[list[list[Message]]] = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, said("assistant", "42."), said("user", "Sure?")],
    [USER, said("assistant", "42.")],
    [USER, said("assistant", "42.", reasoning_content="\nOnes first.\n")],
    [USER, said("assistant", "42.", reasoning_content="Ones first."), said("user", "Sure?")],
    [USER, said("assistant", INSIDE)],
    [USER, said("assistant", INSIDE), said("user", "Sure?"), said("assistant", "\n\nYes.")],
    [SYSTEM, USER, said("system", "Be long."), said("user", "And now?")],
    [USER, said("assistant", None, reasoning_content="I call.", tool_calls=CALLS), *RESULTS],
    [USER, said("assistant", "I look.", tool_calls=CALLS[:1]), RESULTS[0], said("assistant", "Blue.")],
    [
        *(USER, said("assistant", "", tool_calls=CALLS[1:]), RESULTS[1]),
        *(said("assistant", "7 am.", reasoning_content="It told me."), said("user", "Thanks")),
    ],
    [*RESULTS, said("user", "What is this?")],
    [said("user", "<tool_response>\nno question\n</tool_response>"), said("assistant", "Yes.")],
]
SWITCHES: Final[list[dict[str, Any]]] = [
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"add_generation_prompt": False},
    {"tools": TOOLS},
    {"tools": []},
]


def main(template: Path) -> None:
    """Write the goldens."""
    tokenizer = tokenizer_of(vocabulary_of(demo_model()))
    chat = ChatTemplate(template.read_text("utf-8"), tokenizer)
    recorded = [
        {"messages": messages, "switches": switches, "prompt": chat.render(messages, **switches)}
        for messages in CONVERSATIONS
        for switches in SWITCHES
    ]
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in recorded)
    GOLDENS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

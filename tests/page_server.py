"""The app over a model that says what a test wants to read, for a real hypercorn (see test_browser.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jaxmoe import LLM
from server.app import create_app
from server.backend import Progress
from server.settings import Settings, read_settings

PROGRAM = """Here it is:

```python
def add(a, b):
    return a + b
```

- It adds **two** numbers.
- `add(17, 25)` is *42*."""
HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> '
    "[a](javascript:window.hacked=1) ![i](https://evil.example/x.png) [good](https://example.org/a?b=1)\n\n"
    "| <b>x</b> | y |\n|---|---|\n| <svg onload=window.hacked=1> | `<i>` |\n\n"
    "```html\n</code><img src=x onerror=window.hacked=1>\n```"
)
ANSWERS = {
    "program": PROGRAM,
    "hostile": HOSTILE,
    "think": "<think>\nSeventeen and twenty-five.\n\n</think>\n\nIt is **42**.",
    "think inside": "Seventeen and twenty-five.\n</think>\n\nIt is 42.",
    "lines": "\n\n".join(f"Line {i} of some." for i in range(30)),
    "long": "\n\n".join(f"Line {i} of a long answer." for i in range(50)),  # most of the context
    "wide": "\n\n".join(
        ("x" * 60, "```\n" + "y" * 60 + "\n```", "| a | b |\n|---|---|\n|" + "wide" * 15 + "| c |")
    ),
    "nothing": "",
    "break": "It starts well\0",
}


def load(settings: Settings, progress: Progress) -> LLM:
    """Load as slowly as the test says; the answer to a user's text is ANSWERS' or tells what was asked."""
    for i in range(10):
        progress("reading the weights", i / 10)
        time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")) / 10)
    from fake_model import fake_llm  # it imports JAX, which takes seconds

    from jaxmoe.gguf import read_gguf
    from jaxmoe.tokenizer import Tokenizer

    path = Path(os.environ["FAKE_MODEL"])
    tokenizer = Tokenizer.from_gguf(read_gguf(path))
    turn_id, end_id = tokenizer.encode("<|im_start|><|im_end|>", parse_special=True)

    opening = tokenizer.encode("<|im_start|>assistant\n", parse_special=True)
    unthinking = tokenizer.encode("<think>\n\n</think>\n\n", parse_special=True)

    @cache
    def answer_ids(prompt_ids: Sequence[int]) -> list[int]:
        prompt = tokenizer.decode(prompt_ids)
        asked = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        text = ANSWERS.get(asked, f"You said: {asked}")
        return [*tokenizer.encode(text, parse_special=True), end_id]

    def rule(known: Sequence[int], seed: int) -> int:
        turn = len(known) - 1 - list(reversed(known)).index(turn_id)
        ids = answer_ids(tuple(known[:turn]))
        begun = known[turn + len(opening) :]
        answered = len(begun) - (len(unthinking) if begun[: len(unthinking)] == unthinking else 0)
        token_id = ids[min(answered, len(ids) - 1)]
        if tokenizer.token_text(token_id) == "\0":
            raise ValueError("the script says so")
        return token_id

    step_seconds = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
    return fake_llm(path, rule, step_seconds=step_seconds, engine_config=settings.engine)


app = create_app(read_settings(os.environ), load=load)

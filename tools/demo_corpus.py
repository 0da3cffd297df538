"""Seeded conversations that the demo model learns from, and held-out ones that it is measured on.

Every skill draws an item, such as a pair of numbers or a word, and phrases a question and its one answer. A
hash of the item says whether it belongs to training or is held out, so the two never meet.

`python -m tools.demo_corpus [--seed N] [--skill NAME] [--split held_out] [NUMBER]` prints some.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, get_args

from tools import demo_words as words
from tools.demo_items import Check, Exchange, Message, Split, a_name, a_text
from tools.demo_skills import SKILLS
from tools.demo_tools import ToolScene, call_scene, result_scene, unneeded_tools

THINKING_SHARE: Final = 0.5
LONG_SHARE: Final = 0.04  # of conversations with many exchanges before the last
LONG_EXCHANGES: Final = (8, 40)
DIGEST_SEEDS: Final = 100  # of each skill and split


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the answer to learn, or find; `thinking` is the template's enable_thinking."""

    skill: str
    messages: tuple[Message, ...]
    thinking: bool
    check: Check
    tools: tuple[Message, ...] = ()


_MEMORY_WEIGHT: Final = 8.0
_TOOL_SCENES: Final = {"tool_calls": (call_scene, 20.0), "tool_results": (result_scene, 6.0)}
_WEIGHTS: Final = {
    **{name: weight for name, (_, weight) in SKILLS.items()},
    "memory": _MEMORY_WEIGHT,
    **{name: weight for name, (_, weight) in _TOOL_SCENES.items()},
}
SKILL_NAMES: Final = tuple(_WEIGHTS)


def make_conversation(seed: int, split: Split, skill: str | None = None) -> Conversation:
    """The conversation of a seed: a skill's own, or of any skill by its weight.

    Only the last exchange is held out in a held-out one; those before it are as in training.
    """
    rng = Random(f"{split} {seed} {skill}")
    name = rng.choices(SKILL_NAMES, tuple(_WEIGHTS.values()))[0] if skill is None else skill
    thinking = rng.random() < THINKING_SHARE
    system = _system(rng)
    if name in _TOOL_SCENES:
        scene = _TOOL_SCENES[name][0](rng, split)
        history = _history(rng, scale=0.3, without=("unknown",))
        return _conversation(name, system, history, scene, thinking=thinking)
    if name == "memory":
        return _conversation(name, system, (), _memory(rng, split), thinking=thinking)
    if name != "unknown" and rng.random() < 0.05:  # tools that are declared and not needed
        scene = _plain_scene(SKILLS[name][0](rng, split), unneeded_tools(rng))
        return _conversation(name, system, (), scene, thinking=thinking)
    exchange = SKILLS[name][0](rng, split)
    if name == "json" and rng.random() < 0.1:
        system = ({"role": "system", "content": "Answer only in JSON."},)
    return _conversation(name, system, _history(rng), _plain_scene(exchange, ()), thinking=thinking)


def texts_of(conversation: Conversation) -> Iterator[str]:
    """Everything that is said in a conversation, for a vocabulary to learn from."""
    for message in conversation.messages:
        yield message["content"]
        yield message.get("reasoning_content", "")
        yield from (json.dumps(call["function"]) for call in message.get("tool_calls", ()))
    yield from map(json.dumps, conversation.tools)


def corpus_digest() -> str:
    """The SHA-256 of some conversations of every skill in either split, by which corpora differ."""
    digest = hashlib.sha256()
    for split in get_args(Split):
        for skill in (None, *SKILL_NAMES):
            for seed in range(DIGEST_SEEDS):
                one = make_conversation(seed, split, skill)
                told = {"messages": one.messages, "tools": one.tools, "thinking": one.thinking}
                digest.update(json.dumps(told).encode())
    return digest.hexdigest()


def _system(rng: Random) -> tuple[Message, ...]:
    if rng.random() < 0.6:
        return ()
    return ({"role": "system", "content": rng.choice(words.SYSTEM_PROMPTS)},)


def _plain_scene(exchange: Exchange, tools: tuple[Message, ...]) -> ToolScene:
    return ToolScene(tools, tuple(_turn(exchange)), exchange.thought, exchange.check)


def _turn(exchange: Exchange) -> Iterator[Message]:
    yield {"role": "user", "content": exchange.question}
    yield {"role": "assistant", "content": exchange.answer}


def _history(rng: Random, scale: float = 1.0, without: Sequence[str] = ()) -> tuple[Message, ...]:
    """Exchanges before the one that counts: mostly few or none."""
    chance = rng.random()
    if chance < LONG_SHARE * scale:
        number = rng.randint(*LONG_EXCHANGES)
    elif chance < 0.4 * scale:
        number = rng.randint(1, 4)
    else:
        return ()
    return tuple(message for _ in range(number) for message in _turn(_any_exchange(rng, without)))


def _any_exchange(rng: Random, without: Sequence[str] = ()) -> Exchange:
    names = tuple(name for name in SKILLS if name not in without)
    (name,) = rng.choices(names, [SKILLS[name][1] for name in names])
    return SKILLS[name][0](rng, "train")


def _conversation(
    skill: str,
    system: tuple[Message, ...],
    history: tuple[Message, ...],
    scene: ToolScene,
    *,
    thinking: bool,
) -> Conversation:
    *before, answer = scene.messages
    answer = {**answer, "reasoning_content": scene.thought if thinking else ""}
    if not thinking:
        before = [{name: one for name, one in m.items() if name != "reasoning_content"} for m in before]
    messages = (*system, *history, *before, answer)
    return Conversation(skill, messages, thinking, scene.check, scene.tools)


# --- Remembering over turns


def _memory(rng: Random, split: Split) -> ToolScene:
    """Something said once, other talk, and a question about it; or one about what was never said."""
    about = words.REMEMBERED[0] if rng.random() < 0.6 else rng.choice(words.REMEMBERED[1:])
    thing = about.thing
    value = a_name(rng, split) if "name" in thing else a_text(rng, split)
    messages: list[Message] = []
    told = rng.random() < 0.88
    if told:
        messages += _said(rng.choice(about.tellings).format(x=value), about.reply.format(x=value))
    if rng.random() < 0.35:
        other = rng.choice(words.REMEMBERED)
        if other.thing != thing:
            name = a_name(rng, "train")
            at = rng.choice((0, len(messages)))
            messages[at:at] = _said(rng.choice(other.tellings).format(x=name), other.reply.format(x=name))
    number = rng.choice((0, 0, 1, 1, 2, 3, 5, rng.randint(5, 25)))
    messages += [message for _ in range(number) for message in _turn(_any_exchange(rng))]
    if told and rng.random() < 0.15:  # the telling itself is learned too
        messages = messages[:2]
        return ToolScene((), tuple(messages), f"Their {thing} is {value}.", Check("says", [value]))
    final = about.answer.format(x=value) if told else about.never
    thought = f"They said that it is {value}." if told else "They have not said it."
    question = rng.choice(about.questions)
    messages += _said(question.lower() if rng.random() < 0.15 else question, final)
    return ToolScene((), tuple(messages), thought, Check("equals", final))


def _said(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print conversations."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_corpus", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("number", metavar="NUMBER", nargs="?", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skill", choices=SKILL_NAMES)
    parser.add_argument("--split", choices=("train", "held_out"), default="train")
    options = parser.parse_args(arguments)
    for seed in range(options.seed, options.seed + options.number):
        one = make_conversation(seed, options.split, options.skill)
        print(f"--- {one.skill}, thinking {one.thinking}, {one.check.kind} {one.check.value!r}")
        for tool in one.tools:
            print(f"tool: {tool['function']}")
        for message in one.messages:
            rest = {
                name: value for name, value in message.items() if name not in ("role", "content") and value
            }
            print(
                f"{message['role']}: {message['content']}",
                *(f"[{name}: {value}]" for name, value in rest.items()),
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

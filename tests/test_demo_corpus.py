"""The demo model's conversations are the ones it was measured on, and no held-out one is met in training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tools.demo_corpus import SKILL_NAMES, Conversation, corpus_digest, make_conversation
from tools.demo_items import Split, wording
from tools.demo_skills import SKILLS

EVIDENCE = Path(__file__).parents[1] / "contracts" / "evidence" / "demo_model.json"
NUM_TRAINED, NUM_HELD_OUT = 2000, 300


def question_of(conversation: Conversation) -> str:
    return str(conversation.messages[-2]["content"])


def answer_of(conversation: Conversation) -> str:
    return str(conversation.messages[-1]["content"])


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def operands(conversation: Conversation) -> tuple[Hashable, ...]:
    answer = answer_of(conversation)
    return ("+" in answer, *sorted(numbers_in(answer)[:2]))


def told(conversation: Conversation) -> str | None:
    """The answer that tells what was said earlier; None where nothing was."""
    answer = answer_of(conversation)
    return None if answer.startswith(("You have not", "I will", "Nice to")) else answer


# what of a conversation must be unseen in training, by skill
UNSEEN: dict[str, Callable[[Conversation], Hashable]] = {
    "arithmetic": operands,
    "compare": lambda c: tuple(sorted(numbers_in(question_of(c)))),
    "counting": lambda c: answer_of(c) if "," in answer_of(c) else None,
    "spelling": answer_of,
    "reversing": answer_of,
    "facts": question_of,
    "identity": lambda c: wording(question_of(c)),
    "small_talk": lambda c: wording(question_of(c)),
    "unknown": question_of,
    "repeat": answer_of,
    "memory": told,
}


def of(skill: str, split: Split, number: int) -> list[Conversation]:
    return [make_conversation(seed, split, skill) for seed in range(number)]


def test_the_measured_model_learned_from_this_corpus() -> None:
    """Also that conversations depend on their seeds alone."""
    evidence = json.loads(EVIDENCE.read_text("utf-8"))
    assert corpus_digest() == evidence["training"]["corpus_sha256"]


@pytest.mark.parametrize("skill", UNSEEN)
def test_a_held_out_item_is_never_trained(skill: str) -> None:
    trained = {UNSEEN[skill](one) for one in of(skill, "train", NUM_TRAINED)} - {None}
    held_out = {UNSEEN[skill](one) for one in of(skill, "held_out", NUM_HELD_OUT)} - {None}
    assert held_out
    assert not trained & held_out


def test_held_out_keys_are_never_trained() -> None:
    def keys(split: Split, number: int) -> set[str]:
        values = (one.check.value for one in of("json", split, number))
        return {key for value in values if isinstance(value, dict) for key in value} - {"answer"}

    assert keys("held_out", NUM_HELD_OUT)
    assert not keys("train", NUM_TRAINED) & keys("held_out", NUM_HELD_OUT)


def test_held_out_tools_their_arguments_and_values_are_never_trained() -> None:
    trained, held_out = (
        called(split, n) for split, n in (("train", NUM_TRAINED), ("held_out", NUM_HELD_OUT))
    )
    for seen, unseen in zip(trained, held_out, strict=True):
        assert unseen
        assert not seen & unseen


def called(split: Split, number: int) -> tuple[set[str], set[str], set[Any]]:
    """Names of tools, names of arguments, and values, of the calls of so many conversations."""
    scenes = [one for one in of("tool_calls", split, number) if one.check.kind == "calls"]
    free = {id(one): free_arguments(one) for one in scenes}
    calls = [(one, name, arguments) for one in scenes for name, arguments in one.check.value]
    return (
        {re.sub(r"[_.]", "", name.lower()) for _, name, _ in calls},
        {argument for _, _, arguments in calls for argument in arguments},
        {value for one, _, arguments in calls for key, value in arguments.items() if key in free[id(one)]},
    )


def free_arguments(conversation: Conversation) -> set[str]:
    """Arguments whose values the schema does not list."""
    schemas = [tool["function"]["parameters"]["properties"] for tool in conversation.tools]
    listed = {n for one in schemas for n, s in one.items() if "enum" in s or s["type"] == "boolean"}
    return {name for one in schemas for name in one} - listed


def test_a_question_has_one_answer() -> None:
    rng, answers, doubtful = Random(7), dict[str, str](), list[tuple[str, str, str]]()
    names = [name for name in SKILLS if name != "repeat"]
    for i in range(8000):
        name = rng.choice(names)
        exchange = SKILLS[name][0](rng, "held_out" if i % 5 == 0 else "train")
        question = exchange.question if name == "json" else exchange.question.lower()
        first = answers.setdefault(question, exchange.answer)
        if first.lower() != exchange.answer.lower():
            doubtful.append((question, first, exchange.answer))
    assert len(answers) > 4000
    assert not doubtful


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_a_conversation_ends_with_the_answer(skill: str) -> None:
    for split in ("train", "held_out"):
        for one in of(skill, split, 20):
            roles = [message["role"] for message in one.messages]
            assert one.skill == skill
            assert roles[-1] == "assistant"
            assert roles[-2] in ("user", "tool")
            assert "system" not in roles[1:]
            assert bool(one.messages[-1]["reasoning_content"]) is one.thinking

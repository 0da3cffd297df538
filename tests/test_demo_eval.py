"""What counts as a right answer of the demo model, and that what was measured is the model that ships."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from jaxmoe import LLM, EngineConfig, demo_model
from tools.demo_corpus import SKILL_NAMES, Conversation
from tools.demo_items import Check
from tools.demo_rows import Renderer
from tools.demo_vocabulary import vocabulary_of
from tools.eval_demo import (
    GOAL,
    GOALS,
    SHARE_GOALS,
    Item,
    Verdict,
    ask_engine,
    compare,
    equal_figures,
    held_out_items,
    is_right,
    judge,
    reached,
    skill_figures,
)

EVIDENCE = Path(__file__).parents[1] / "contracts" / "evidence" / "demo_model.json"
CALL = '<tool_call>\n{"name": "f", "arguments": {"n": 1, "on": true}}\n</tool_call>'
QUESTION = {"role": "user", "content": "What is 17 + 25?"}


def evidence() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(EVIDENCE.read_text("utf-8"))
    return document


def conversation(check: Check, thinking: bool = False, skill: str = "arithmetic") -> Conversation:
    return Conversation(skill, (QUESTION, {"role": "assistant", "content": "42."}), thinking, check)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (Check("equals", "1, 2, 3"), ["1, 2, 3"], ["1, 2", "1, 2, 3, 4", "1, 2, 3.", ""]),
        (Check("says", ["= 42."]), ["17 + 25 = 42."], ["17 + 25 = 420.", "17 + 25 = 41.", "42"]),
        (Check("says", ["12", "blue"]), ["blue and 12."], ["blue and 112.", "blues and 12.", "12."]),
        (
            Check("json", {"a": 1, "b": True}),
            ['{"a": 1, "b": true}', '{ "b": true, "a": 1 }'],
            ['{"a": 1, "b": 1}', '{"a": "1", "b": true}', '{"a": 1}', 'Here: {"a": 1, "b": true}', "{"],
        ),
        (
            Check("calls", [("f", {"n": 1, "on": True})]),
            [CALL, CALL.replace('"n": 1, "on": true', '"on": true, "n": 1')],
            [
                *(CALL * 2, "", "f", f"I call {CALL}", CALL.replace("true", "1"), CALL.replace('"f"', '"g"')),
                *(CALL.replace("}}", "}"), CALL.replace('"n"', '"m"')),
            ],
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Check) else "",
)
def test_an_answer_is_right_when_its_check_says_so(check: Check, right: list[str], wrong: list[str]) -> None:
    assert [is_right(answer, check) for answer in right] == [True] * len(right)
    assert [is_right(answer, check) for answer in wrong] == [False] * len(wrong)


@pytest.mark.parametrize(
    ("text", "thinking", "well_formed", "right"),
    [
        ("42.", False, True, True),
        ("41.", False, True, False),
        ("<think>\nOnes.\n</think>\n\n42.", True, True, True),
        ("<think>\nOnes.\n</think>\n\n41.", True, True, False),
        ("<think>\nOnes.\n</think>\n\n42.", False, False, False),
        ("42.", True, False, False),
        ("<think>\n\n\n</think>\n\n42.", True, False, False),
        ("<think>\nOnes.\n</think>\n\n42.</think>", True, False, False),
        ("<think>\nOnes. 42.", True, False, False),
    ],
)
def test_thoughts_belong_where_they_were_asked_for(
    text: str, thinking: bool, well_formed: bool, right: bool
) -> None:
    verdict = judge(text, conversation(Check("equals", "42."), thinking))
    assert (verdict.well_formed, verdict.right) == (well_formed, right)


def test_rates_count_by_skill_and_by_thinking() -> None:
    items = [Item(conversation(Check("equals", ""), i % 2 == 0, s), (i,)) for i, s in enumerate(SKILL_NAMES)]
    verdicts = [Verdict("", i != 1, i > 0) for i in range(len(items))]
    figures = skill_figures(items, verdicts)
    assert [figures[skill]["rate"] for skill in SKILL_NAMES] == [0.0] + [1.0] * (len(items) - 1)
    assert (figures["thinking_on"]["rate"], figures["thinking_off"]["right"]) == (1.0, len(items) // 2 - 1)


def test_held_out_prompts_differ() -> None:
    items = held_out_items(Renderer(vocabulary_of(demo_model())), 40)
    assert len({item.prompt for item in items}) == len(items) == 40 * len(SKILL_NAMES)


def test_a_comparison_counts_equal_answers_of_equal_items() -> None:
    answers = [{"question": f"{text}?", "answer": text} for text in "abc"]
    first = {"machine": "x", "model_sha256": "0", "answers": answers}
    found = compare(
        first, {**first, "machine": "y", "answers": [*answers[:2], {**answers[2], "answer": "d"}]}
    )
    assert (found["items"], found["same_final_answer"], found["machines"]) == (3, 2, ["x", "y"])
    with pytest.raises(ValueError, match="shorter"):
        compare(first, {**first, "answers": answers[:2]})
    with pytest.raises(ValueError, match="two models"):
        compare(first, {**first, "model_sha256": "1"})
    with pytest.raises(ValueError, match="other questions"):
        compare(first, {**first, "answers": answers[::-1]})
    assert equal_figures([(1,), (2, 3)], {"way": [(1,), (2, 4)]}) == {"way": {"items": 2, "equal": 1}}


def test_one_missed_goal_is_a_miss() -> None:
    good = {
        "skills": {"counting": {"rate": GOAL, "goal": GOAL}},
        "same_ids": {"way": {"items": 2, "equal": 2}},
        "expert_shares_of_even": [list(SHARE_GOALS)],
    }
    assert reached(good)
    assert not reached({**good, "skills": {"counting": {"rate": GOAL - 0.001, "goal": GOAL}}})
    assert not reached({**good, "same_ids": {"way": {"items": 2, "equal": 1}}})
    assert not reached({**good, "expert_shares_of_even": [[0.2, 1.0]]})


def test_what_was_measured_is_what_ships() -> None:
    measured = evidence()
    assert measured["model_sha256"] == hashlib.sha256(demo_model().read_bytes()).hexdigest()
    assert set(measured["skills"]) == {*SKILL_NAMES, "thinking_on", "thinking_off"}
    assert {name: one["goal"] for name, one in measured["skills"].items()} == {
        name: GOALS.get(name, GOAL) for name in measured["skills"]
    }
    assert measured["machine"]
    assert measured["training"]["machine"]
    assert reached(measured)


def test_the_shipped_model_adds_and_thinks_as_asked() -> None:
    renderer = Renderer(vocabulary_of(demo_model()))
    asked = [conversation(Check("equals", "17 + 25 = 42."), thinking) for thinking in (True, False)]
    with LLM(demo_model(), EngineConfig(num_slots=2, context_length=512)) as llm:
        answers = ask_engine(llm, [renderer.prompt(one) for one in asked], 2)
        texts = [llm.tokenizer.decode(i for i in ids if i not in llm.tokenizer.eos_ids) for ids in answers]
    verdicts = [judge(text, one) for text, one in zip(texts, asked, strict=True)]
    assert [verdict.right for verdict in verdicts] == [True, True], texts

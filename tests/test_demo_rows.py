"""Rows of conversations: every token in its place, and only answers to be learned as answers."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from jaxmoe import demo_model
from tools.demo_corpus import SKILL_NAMES, Conversation, make_conversation
from tools.demo_items import Check
from tools.demo_rows import (
    ANSWER,
    EARLIER,
    NOTHING,
    PROMPT,
    ROW_LENGTH,
    Renderer,
    RowPool,
    Rows,
    Sample,
    make_rows,
    pack,
)
from tools.demo_vocabulary import vocabulary_of

LENGTHS = (700, 300, 400, 24, ROW_LENGTH, ROW_LENGTH + 1, 600)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(vocabulary_of(demo_model()))


def sample(number: int, length: int) -> Sample:
    return Sample([100 * number + i % 100 for i in range(length)], [PROMPT] * (length - 1) + [NOTHING])


def told(renderer: Renderer, found: Sample, kind: int) -> str:
    """The tokens that a kind says come next, as text."""
    return renderer.tokenizer.decode(
        token for token, one in zip(found.tokens[1:], found.kinds, strict=False) if one == kind
    )


def conversation(thinking: bool) -> Conversation:
    messages = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi there!"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4.", "reasoning_content": "Ones: 4." if thinking else ""},
    )
    return Conversation("arithmetic", messages, thinking, Check("equals", "4."))


def test_the_answer_is_what_follows_the_prompt(renderer: Renderer) -> None:
    thinks = renderer.sample(conversation(True))
    assert told(renderer, thinks, ANSWER) == "<think>\nOnes: 4.\n</think>\n\n4.<|im_end|>"
    assert told(renderer, renderer.sample(conversation(False)), ANSWER) == "4.<|im_end|>"


def test_an_earlier_answer_is_learned_but_for_its_first_token(renderer: Renderer) -> None:
    found = renderer.sample(conversation(False))
    earlier = told(renderer, found, EARLIER)
    assert earlier.endswith(" there!<|im_end|>")
    assert "Hi" not in earlier
    assert found.kinds.count(NOTHING) == 2


@pytest.mark.parametrize("skill", SKILL_NAMES)
def test_a_sample_is_the_prompt_and_the_answer(renderer: Renderer, skill: str) -> None:
    for seed in range(20):
        one = make_conversation(seed, "train", skill)
        found, prompt = renderer.sample(one), renderer.prompt(one)
        assert found.tokens[: len(prompt)] == prompt
        assert found.kinds[len(prompt) - 1 :] == [ANSWER] * (len(found.tokens) - len(prompt)) + [NOTHING]


def test_a_row_holds_whole_samples_each_by_itself() -> None:
    rows = pack([sample(number, length) for number, length in enumerate(LENGTHS)], Random(0))
    assert rows.tokens.shape == (3, ROW_LENGTH)
    found = []
    for row in range(len(rows.tokens)):
        for segment in range(1, int(rows.segments[row].max()) + 1):
            (places,) = np.nonzero(rows.segments[row] == segment)
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            number = int(rows.tokens[row, places[0]]) // 100
            expected = sample(number, len(places))
            assert rows.tokens[row, places].tolist() == expected.tokens
            assert rows.kinds[row, places].tolist() == expected.kinds
            found.append((number, len(places)))
    fitting = [(number, length) for number, length in enumerate(LENGTHS) if length <= ROW_LENGTH]
    assert sorted(found) == fitting
    assert not rows.kinds[rows.segments == 0].any()


def test_positions_count_up_with_at_most_one_gap_and_stay_in_the_context() -> None:
    rows = pack([sample(number, 100) for number in range(400)], Random(0))
    gaps = 0
    for row, segments in zip(rows.positions.astype(int), rows.segments, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            positions = row[segments == segment]
            steps = np.diff(positions, prepend=-1)
            assert (steps >= 1).all()
            assert np.count_nonzero(steps > 1) <= 1
            assert positions[-1] < 2048
            gaps += bool((steps > 1).any())
    assert 60 < gaps < 140


def test_a_shard_is_the_same_each_time_and_not_the_next(renderer: Renderer) -> None:
    first, again, other = (make_rows(renderer, shard, "train", size=30) for shard in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.tokens[0], other.tokens[0])


def test_a_pool_keeps_the_newest_rows() -> None:
    pool, drawn = RowPool(3), set[int]()
    for number in range(5):
        empty = np.zeros((1, ROW_LENGTH), np.uint8)
        pool.add(Rows(np.full((1, ROW_LENGTH), number, np.uint16), empty.astype(np.uint16), empty, empty))
        drawn = set(pool.draw(np.random.default_rng(0), (4, 8)).tokens[..., 0].flat)
        assert drawn == set(range(max(0, number - 2), number + 1))
    assert pool.num_seen == 5

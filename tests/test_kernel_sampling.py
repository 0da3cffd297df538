"""The sampling kernel on the CPU emulator, beside jaxmoe/sampling.py: equal ids, close logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.sampling import Advanced, RowTwin, comparisons, sample
from jaxmoe.request import SamplingParams
from jaxmoe.sampling import Sampled, SamplingRow
from jaxmoe.sampling import sample as sample_plainly
from jaxmoe.step import sampling_row

# the kernel lists up to 4,096 logits: the last size can overflow that; two are no multiples of a strip of 4
SMALL, ODD, LARGE = 300, 1003, 4101
PENALTIES: dict[str, Any] = {
    "frequency": {"frequency_penalty": 0.9},
    "presence": {"presence_penalty": 1.7},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": {7: 9.0, 299: -50.0}},
    "all": {
        "frequency_penalty": 0.2,
        "presence_penalty": -0.3,
        "repetition_penalty": 1.4,
        "logit_bias": {5: 2},
    },
}
FILTERS: dict[str, Any] = {
    "none": {},
    "cool": {"temperature": 0.3},
    "top_k": {"top_k": 5},
    "top_k of all": {"top_k": 100000},
    "large top_k": {"top_k": 1500},
    "top_p": {"top_p": 0.5},
    "top_p of nearly all": {"top_p": 0.999},
    "min_p": {"min_p": 0.3},
    "top_p and min_p": {"top_p": 0.95, "min_p": 0.4},
    "top_k and top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "all": {"temperature": 1.4, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
}

pytestmark = pytest.mark.usefixtures("emulated")

plain: Any = jax.jit(jax.vmap(sample_plainly))


def row_of(vocab_size: int, seed: int = 0, greedy: bool = False, **params: Any) -> SamplingRow:
    """A row with a history: some ids in the prompt, some sampled once or often."""
    rng = np.random.default_rng(seed)
    prompt, generated = (rng.integers(0, vocab_size, vocab_size // 3).tolist() for _ in range(2))
    params = {"temperature": 0.0 if greedy else 1.0, **params}
    return sampling_row(SamplingParams(**params), vocab_size, prompt, generated, seed * 0x9E3779B97F4A7C15)


def stacked(rows: Sequence[SamplingRow]) -> SamplingRow:
    return jax.tree.map(lambda *parts: jnp.stack([jnp.asarray(part) for part in parts]), *rows)


def normal(num: int, vocab_size: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num, vocab_size)) * scale).astype(np.float32)


def run(
    logits: np.ndarray, rows: SamplingRow, active: Sequence[int] | None = None, count: int | None = None
) -> Advanced:
    num_slots = len(rows.step)
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    of_rows = jnp.asarray(list(range(len(logits)) if active is None else active), jnp.int32)
    num_real = jnp.int32(len(logits) if count is None else count)
    return sample(jnp.asarray(logits), slots, slots * 3, vars(rows), of_rows, num_real)


def assert_like_the_twin(logits: np.ndarray, rows: SamplingRow) -> Advanced:
    """Row i is slot i's."""
    found = run(logits, rows)
    expected: Sampled = plain(jnp.asarray(logits), rows)
    np.testing.assert_array_equal(found.sampled, expected.token_id)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    np.testing.assert_allclose(found.logprobs, expected.logprob, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=0, atol=1e-5)
    return found


@pytest.mark.parametrize("vocab_size", [SMALL, ODD, LARGE])
def test_greedy_takes_the_likeliest_and_the_first_of_equals(vocab_size: int) -> None:
    logits = normal(6, vocab_size)
    # one thread has both of 4 and 4,100
    ties = [(vocab_size - 1, vocab_size - 2), (5, 7), (4, vocab_size - 1), (0, 1), (150, 250)]
    for row, equals in zip(logits[1:], ties, strict=True):
        row[list(equals)] = 99
    logits[5] = -np.abs(logits[5]) - 1
    logits[5, [40, 260]] = -0.0, 0.0
    logits[4, [11, 10]] = 0.0, 99
    rows = stacked([row_of(vocab_size, i, greedy=True) for i in range(6)])
    ids = assert_like_the_twin(logits, rows).sampled.tolist()
    assert ids == [int(np.argmax(logits[0])), vocab_size - 2, 5, 4, 0, 40]


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_change_what_is_greedy(name: str) -> None:
    params = PENALTIES[name]
    logits = normal(8, ODD, scale=1.0)
    rows = [row_of(ODD, i, greedy=True, **params) for i in range(8)]
    for row, of_slot in zip(logits, rows, strict=True):
        # the best is one that the penalty moves, the second is near
        row[np.argmax(of_slot.counts)] = 5.0
        row[np.argmax(of_slot.counts == 0)] = 4.9
    found = assert_like_the_twin(logits, stacked(rows)).sampled
    assert (np.asarray(found) != logits.argmax(axis=1)).any()


def test_a_bias_counts_only_where_there_is_one() -> None:
    with_bias = row_of(SMALL, greedy=True, logit_bias={9: 50})
    rows = stacked([with_bias, SamplingRow(**vars(with_bias) | {"has_bias": np.bool_(False)})])
    found = assert_like_the_twin(normal(2, SMALL), rows).sampled.tolist()
    assert found[0] == 9 != found[1]


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_are_the_twins(name: str, vocab_size: int) -> None:
    num = 8
    rows = [row_of(vocab_size, seed, **FILTERS[name]) for seed in range(num)]
    # one peaked row, one flat one, and every seed and step its own
    logits = normal(num, vocab_size, scale=1.5)
    logits[0] *= 6
    logits[1] *= 0.01
    for step in (0, 12345):
        steps = (step + np.arange(num)).astype(np.int32)
        batch = SamplingRow(**vars(stacked(rows)) | {"step": jnp.asarray(steps)})
        assert len(set(assert_like_the_twin(logits, batch).sampled.tolist())) > num // 2


def test_equals_that_overflow_the_list_are_all_drawn_from() -> None:
    params: list[dict[str, Any]] = [
        {},
        {"top_k": 50},
        {"top_p": 0.3},
        {"min_p": 0.5},
        {"temperature": 2.0, "top_k": 4099, "top_p": 0.9},
    ]
    rows = stacked([row_of(LARGE, seed, logprobs=20, **p) for seed, p in enumerate(params)])
    found = assert_like_the_twin(np.full((len(params), LARGE), 0.5, np.float32), rows)
    assert len(set(found.sampled.tolist())) == len(params)
    assert found.top_ids.tolist() == [list(range(20))] * len(params)


def test_draws_with_penalties_are_the_twins() -> None:
    both = [{**penalty, **FILTERS["all"], "logprobs": 3} for penalty in PENALTIES.values()]
    rows = stacked([row_of(ODD, seed, **params) for seed, params in enumerate(both)])
    assert_like_the_twin(normal(len(both), ODD), rows)


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_logprobs_are_of_the_raw_logits_with_ties_to_the_lower_id(vocab_size: int) -> None:
    logits = normal(5, vocab_size)
    logits[1, ::7] = 12.0  # equals cross the twentieth place
    logits[2, 5:15] = logits[2, 200]
    logits[3] -= 200
    logits[4, vocab_size // 2 :] = -np.inf
    # a bias that puts all others out of reach of exp
    params: list[dict[str, Any]] = [{"logit_bias": {7: 100.0}}, *4 * [{"repetition_penalty": 1.5}]]
    rows = [row_of(vocab_size, seed, logprobs=0, **p) for seed, p in enumerate(params)]
    found = assert_like_the_twin(logits, stacked(rows))
    assert found.top_ids[1].tolist() == list(range(0, 140, 7))
    of_sampled = jax.nn.log_softmax(jnp.asarray(logits))[np.arange(5), found.sampled]
    np.testing.assert_allclose(found.logprobs, of_sampled, rtol=0, atol=1e-5)


def test_a_row_without_logprobs_has_zeros() -> None:
    found = assert_like_the_twin(normal(1, SMALL), stacked([row_of(SMALL)]))
    assert not any(np.any(part) for part in (found.logprobs, found.top_ids, found.top_logprobs))


def test_a_vocabulary_of_fewer_than_twenty() -> None:
    rows = stacked([row_of(7, seed, logprobs=20, top_p=0.9) for seed in range(4)])
    assert_like_the_twin(normal(4, 7), rows)


def test_a_row_gives_the_same_bits_beside_others() -> None:
    params: list[dict[str, Any]] = [{}, {"top_p": 0.7}, {"top_k": 9}, {"repetition_penalty": 1.2}]
    rows = stacked([row_of(ODD, seed, logprobs=20, **p) for seed, p in enumerate(params)])
    logits = normal(4, ODD)
    together = run(logits[[2, 0, 3, 1]], rows, active=[2, 0, 3, 1])
    for row, slot in enumerate([2, 0, 3, 1]):
        alone = run(logits[[slot]], rows, active=[slot])
        for name in ("sampled", "logprobs", "top_ids", "top_logprobs"):
            np.testing.assert_array_equal(getattr(together, name)[row], getattr(alone, name)[0], strict=True)


def test_the_slots_of_real_rows_advance_and_no_others() -> None:
    rows = stacked([row_of(SMALL, seed) for seed in range(6)])
    # rows past the count name slots that a real row has, and others
    active, count = [4, 1, 3, 4, 0], 3
    found = run(normal(5, SMALL), rows, active, count)
    real = np.array(active[:count])
    ids = np.asarray(found.sampled)[:count]
    fed, positions = np.arange(6), np.arange(6) * 3
    fed[real] = ids
    positions[real] += 1
    steps, counts = np.array(rows.step), np.array(rows.counts)
    steps[real] += 1
    counts[real, ids] += 1
    for got, expected in zip(found[:4], (fed, positions, counts, steps), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("count", [0, 1])
def test_prefill_samples_its_row_only_at_the_end(count: int) -> None:
    rows = stacked([row_of(SMALL, seed) for seed in range(2)])
    found = run(normal(1, SMALL), rows, active=[1], count=count)
    assert found.positions.tolist() == [0, 3 + count]
    assert int(found.step[1]) == int(rows.step[1]) + count
    assert (found.token_ids[1] == found.sampled[0]) == (count == 1)


def test_no_number_among_the_logits_still_gives_an_id() -> None:
    logits = np.full((4, SMALL), np.nan, np.float32)
    logits[2:] = -np.inf
    rows = [row_of(SMALL, i, greedy=i % 2 == 0, logprobs=20, top_p=0.9) for i in range(4)]
    found = run(logits, stacked(rows))
    assert ((found.sampled >= 0) & (found.sampled < SMALL)).all()
    assert ((found.top_ids >= 0) & (found.top_ids < SMALL)).all()


def test_comparisons_hold() -> None:
    one = jax.jit(lambda logits, row: sample_plainly(logits, SamplingRow(**row)))
    config: Any = SimpleNamespace(vocab_size=LARGE)
    for comparison in comparisons(config, 0, lambda logits, row: RowTwin(**vars(one(logits, row)))):
        found, expected = comparison.kernel(*comparison.arrays), comparison.twin(*comparison.arrays)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=0 if comparison.exact else 1e-5)

"""Sampling on vocabularies of four tokens whose probabilities are known."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jaxmoe.request import MAX_TOP_LOGPROBS, SamplingParams
from jaxmoe.sampling import Sampled, SamplingRow, penalised, sample
from jaxmoe.step import sampling_row

SHARES = np.array([0.1, 0.2, 0.3, 0.4])
LOGITS = np.log(SHARES).astype(np.float32) + np.float32(3)  # a shift means nothing
NUM_DRAWS = 4000
CHI_SQUARE = 16.3  # three degrees of freedom: one in a thousand is above

run = jax.jit(sample)
run_penalised = jax.jit(penalised)


def row_of(
    params: SamplingParams,
    prompt_ids: Sequence[int] = (),
    generated_ids: Sequence[int] = (),
    seed: int = 0,
    vocab_size: int = 4,
) -> SamplingRow:
    return sampling_row(params, vocab_size, prompt_ids, generated_ids, seed)


@jax.jit
def run_all(logits: Array, row: SamplingRow, seeds: Array, steps: Array) -> Array:
    """The ids of one row, once for each seed and step."""

    def one(drawn: tuple[Array, Array]) -> Array:
        return sample(logits, SamplingRow(**vars(row) | {"seed": drawn[0], "step": drawn[1]})).token_id

    return jax.lax.map(one, (seeds, steps))


def drawn(params: SamplingParams, logits: np.ndarray = LOGITS, num: int = NUM_DRAWS) -> np.ndarray:
    """Ids drawn with one seed each."""
    seeds = np.stack([np.zeros(num), np.arange(num)], axis=1).astype(np.uint32)
    row = row_of(params, vocab_size=len(logits))
    return np.asarray(run_all(logits, row, seeds, np.zeros(num, np.int32)))


def assert_distributed(ids: np.ndarray, shares: np.ndarray) -> None:
    counts = np.bincount(ids, minlength=len(shares))
    assert (counts[shares == 0] == 0).all()
    expected = (shares / shares.sum() * len(ids))[shares > 0]
    assert ((counts[shares > 0] - expected) ** 2 / expected).sum() < CHI_SQUARE


def sampled(params: SamplingParams, logits: Sequence[float], seed: int = 0) -> int:
    return int(run(np.array(logits, np.float32), row_of(params, seed=seed)).token_id)


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert sampled(greedy, LOGITS.tolist()) == 3
    assert sampled(greedy, [1, 5, 5, 2]) == 1
    assert sampled(greedy, [-9, -7, -8, -7.5]) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_the_root_of_the_probabilities(temperature: float) -> None:
    assert_distributed(drawn(SamplingParams(temperature=temperature)), SHARES ** (1 / temperature))


def test_the_steps_of_one_seed_are_distributed_too() -> None:
    steps = np.arange(NUM_DRAWS, dtype=np.int32)
    seeds = np.full((NUM_DRAWS, 2), 77, np.uint32)
    ids = np.asarray(run_all(LOGITS, row_of(SamplingParams()), seeds, steps))
    assert_distributed(ids, SHARES)
    pairs = ids[:-1] * 4 + ids[1:]
    expected = np.outer(SHARES, SHARES).reshape(-1) * len(pairs)
    counts = np.bincount(pairs, minlength=16)
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 15 degrees of freedom


def test_all_64_bits_of_a_seed_count() -> None:
    logits = np.zeros(1000, np.float32)
    seeds = [0, 1, -1, 1 << 31, 1 << 32, 1 << 62, -(1 << 63), (1 << 63) - 1]
    rows = [row_of(SamplingParams(), seed=seed, vocab_size=1000) for seed in seeds]
    ids = [int(run(logits, row).token_id) for row in rows]
    assert len(set(ids)) == len(seeds)
    assert [int(run(logits, row).token_id) for row in rows] == ids


@pytest.mark.parametrize(
    ("top_k", "kept"), [(-1, 4), (0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (1 << 31 - 1, 4)]
)
def test_top_k_keeps_the_k_likeliest(top_k: int, kept: int) -> None:
    assert_distributed(drawn(SamplingParams(top_k=top_k)), np.where(np.arange(4) >= 4 - kept, SHARES, 0))


def test_top_k_one_takes_the_first_of_equals() -> None:
    one = SamplingParams(temperature=2.0, top_k=1)
    assert {sampled(one, [1, 5, 5, 2], seed=seed) for seed in range(9)} == {1}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4), (1.0, 4)]
)
def test_top_p_keeps_the_fewest_that_have_p(top_p: float, kept: int) -> None:
    assert_distributed(drawn(SamplingParams(top_p=top_p)), np.where(np.arange(4) >= 4 - kept, SHARES, 0))


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.26, 3), (0.51, 2), (0.74, 2), (0.76, 1), (1.0, 1)])
def test_min_p_keeps_those_near_the_likeliest(min_p: float, kept: int) -> None:
    assert_distributed(drawn(SamplingParams(min_p=min_p)), np.where(np.arange(4) >= 4 - kept, SHARES, 0))


def test_top_p_counts_what_top_k_has_left() -> None:
    # 4/7 and 3/7 are left
    assert set(drawn(SamplingParams(top_k=2, top_p=0.5), num=200)) == {3}
    assert set(drawn(SamplingParams(top_k=2, top_p=0.6), num=200)) == {2, 3}


def test_filters_come_after_temperature() -> None:
    # squared and renormalised: 1/30, 4/30, 9/30, 16/30
    assert set(drawn(SamplingParams(temperature=0.5, top_p=0.5), num=200)) == {3}
    assert set(drawn(SamplingParams(temperature=0.5, min_p=0.6), num=200)) == {3}
    assert set(drawn(SamplingParams(temperature=0.5, min_p=0.5), num=200)) == {2, 3}


def test_filters_of_a_large_vocabulary_keep_what_sorting_keeps() -> None:
    logits = np.random.default_rng(0).standard_normal(997).astype(np.float32) * 3
    order = np.argsort(-logits)
    shares = np.exp(logits.astype(np.float64)[order])
    shares /= shares.sum()
    assert set(drawn(SamplingParams(temperature=2.0, top_k=7), logits, 500)) == set(order[:7])
    size = 1 + int(np.searchsorted(np.cumsum(shares), 0.6))
    assert 5 <= size <= 20
    assert set(drawn(SamplingParams(top_p=0.6), logits, 1000)) == set(order[:size])
    near = set(order[shares >= 0.1 * shares[0]])
    assert len(near) > 3
    assert set(drawn(SamplingParams(min_p=0.1), logits, 1000)) == near


def test_negative_and_zero_logits_are_in_the_order_of_numbers() -> None:
    logits = np.array([-1.0, 0.0, -0.5, -3.0], np.float32)
    assert set(drawn(SamplingParams(top_k=2, temperature=2.0), logits, 200)) == {1, 2}


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30, 1e-37, 1e-40, 1e-45, 1e-50])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_low_temperature_is_nearly_greedy(temperature: float, top_p: float) -> None:
    logits = np.array([35, 36, 37, 38], np.float32)
    assert set(drawn(SamplingParams(temperature=temperature, top_p=top_p), logits, num=50)) == {3}


def assert_penalised(params: SamplingParams, expected: Sequence[float], **history: Sequence[int]) -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    np.testing.assert_allclose(run_penalised(logits, row_of(params, **history)), expected, rtol=1e-6)  # type: ignore[arg-type]


def test_repetition_counts_each_token_of_prompt_and_output_once() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert_penalised(params, [2, -2, 1, 0.5])
    assert_penalised(params, [1, -4, 1, 0.5], prompt_ids=(0, 1, 1, 0, 0))
    assert_penalised(params, [1, -4, 0.5, 0.5], prompt_ids=(0, 1), generated_ids=(1, 2, 2, 0))


def test_presence_counts_each_token_of_the_output_once() -> None:
    params = SamplingParams(presence_penalty=0.5)
    assert_penalised(params, [2, -2, 0.5, 0], prompt_ids=(0, 1), generated_ids=(2, 3, 3, 3))


def test_frequency_counts_every_time_in_the_output() -> None:
    params = SamplingParams(frequency_penalty=0.5)
    assert_penalised(params, [2, -2, 0.5, -1], prompt_ids=(0, 1, 3), generated_ids=(2, 3, 3, 3))


def test_negative_penalties_reward() -> None:
    params = SamplingParams(frequency_penalty=-1.0, presence_penalty=-0.5)
    assert_penalised(params, [2, 0.5, 1, 0.5], generated_ids=(1, 1))


def test_penalties_and_bias_add_up() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5, logit_bias={0: 3.0, 2: -1.0}
    )
    # token 2: 1 / 2 - 2 x 0.25 - 0.5 - 1
    assert_penalised(params, [1 + 3, -2, -1.5, 0.5], prompt_ids=(0,), generated_ids=(2, 2))


def test_bias_bans_and_forces_drawn_tokens_too() -> None:
    assert 3 not in drawn(SamplingParams(logit_bias={3: -100.0}), num=300)
    assert set(drawn(SamplingParams(logit_bias={0: 100.0}), num=300)) == {0}
    assert sampled(SamplingParams(temperature=0.0, logit_bias={3: -100.0}), LOGITS.tolist()) == 2


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_logits_before_all_changes(temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=1, logit_bias={0: 100.0}, repetition_penalty=1.5, logprobs=4
    )
    out: Sampled = run(LOGITS, row_of(params, prompt_ids=(3,)))
    assert int(out.token_id) == 0
    assert float(out.logprob) == pytest.approx(np.log(0.1), abs=1e-6)
    assert out.top_ids[:4].tolist() == [3, 2, 1, 0]
    np.testing.assert_allclose(out.top_logprobs[:4], np.log(SHARES[::-1]), atol=1e-6)


def test_a_small_vocabulary_has_no_more_alternatives_than_tokens() -> None:
    out = run(LOGITS, row_of(SamplingParams(logprobs=20)))
    assert out.top_logprobs.shape == (MAX_TOP_LOGPROBS,)
    assert (out.top_logprobs[4:] == -jnp.inf).all()


def test_equal_alternatives_come_in_the_order_of_their_ids() -> None:
    out = run(np.array([1, 2, 1, 2], np.float32), row_of(SamplingParams(logprobs=20)))
    assert out.top_ids[:4].tolist() == [1, 3, 0, 2]


def test_logprobs_are_zero_where_not_asked_for() -> None:
    out = run(LOGITS, row_of(SamplingParams()))
    assert not out.top_logprobs.any()
    assert float(out.logprob) == 0

"""The compiled steps: the same bits whatever the chunks, the pages, the slots and the neighbours are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from on_device import PAGE_LENGTH, PREFILL_CHUNK, Player, cut, ids_of
from reference import Network, Past, logits_of

from jaxmoe.cache import KVCache
from jaxmoe.model import Decoder
from jaxmoe.request import SampledToken, SamplingParams
from jaxmoe.step import Shapes, Slots, Steps, decode, sampling_row

NUM_TOKENS = 65
RANDOM = SamplingParams(temperature=1.0, logprobs=20)  # every logit has a say in the id
GREEDY = SamplingParams(temperature=0.0)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([length, seed]).integers(0, 512, length).tolist())


PROMPT = prompt_of(300)


@pytest.fixture(scope="module")
def alone(tiny_steps: Steps) -> list[SampledToken]:
    """PROMPT in one piece, alone, in slot 0, on pages in order."""
    return Player(tiny_steps).generate(PROMPT, RANDOM, NUM_TOKENS)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(cut(300, 64), id="full small buckets"),
        pytest.param([255, 45], id="up to a segment's edge"),
        pytest.param([256, 44], id="a segment"),
        pytest.param([257, 43], id="over a segment's edge"),
        pytest.param([7, 1, 92, 200], id="uneven"),
        pytest.param([1] * 300, id="token by token"),
    ],
)
def test_chunks_do_not_change_a_bit(tiny_steps: Steps, alone: list[SampledToken], chunks: list[int]) -> None:
    assert Player(tiny_steps).generate(PROMPT, RANDOM, NUM_TOKENS, chunks=chunks) == alone


@pytest.mark.parametrize("length", [64, PREFILL_CHUNK])
def test_a_full_bucket_gives_the_bits_of_a_padded_one(tiny_steps: Steps, length: int) -> None:
    prompt = prompt_of(length)
    player = Player(tiny_steps)
    full = player.generate(prompt, RANDOM, 4, chunks=[length])
    assert player.generate(prompt, RANDOM, 4, chunks=[length - 1, 1]) == full


def test_decode_gives_the_bits_of_a_longer_prefill(tiny_steps: Steps) -> None:
    prompt = prompt_of(60)
    player = Player(tiny_steps)
    tokens = player.generate(prompt, RANDOM, 300)
    ids = ids_of(tokens)
    # 64, 128: pages' edges; 256: a segment's
    for length in (61, 63, 64, 65, 127, 128, 129, 255, 256, 257, 359):
        n = length - len(prompt)
        again = player.start(0, prompt, RANDOM, generated_ids=ids[:n], chunks=cut(length, 320))
        player.stop(0)
        assert again == tokens[n], f"{length} tokens"


def test_a_preempted_request_goes_on_as_if_nothing_had_been(tiny_steps: Steps) -> None:
    params = SamplingParams(
        temperature=1.2, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.3, logprobs=20
    )
    player = Player(tiny_steps)
    whole = player.generate(PROMPT, params, NUM_TOKENS, seed=5)
    for done in (1, 30):
        start = ids_of(whole[:done])
        rest = player.generate(PROMPT, params, NUM_TOKENS - done, slot=3, seed=5, generated_ids=start)
        assert rest == whole[done:]


def test_scattered_pages_and_another_slot_do_not_change_a_bit(
    tiny_steps: Steps, alone: list[SampledToken]
) -> None:
    pages = np.random.default_rng(1).permutation(tiny_steps.num_pages).tolist()
    assert Player(tiny_steps, pages).generate(PROMPT, RANDOM, NUM_TOKENS, slot=11) == alone


def test_pages_that_others_left_full_do_not_change_a_bit(
    tiny_steps: Steps, alone: list[SampledToken]
) -> None:
    player = Player(tiny_steps)
    for slot in range(10):
        player.start(slot, prompt_of(320, seed=slot), GREEDY)
        player.stop(slot)
    assert player.generate(PROMPT, RANDOM, NUM_TOKENS, slot=2) == alone


def test_neighbours_that_join_and_leave_do_not_change_a_bit(
    tiny_steps: Steps, alone: list[SampledToken]
) -> None:
    player = Player(tiny_steps, reversed(range(tiny_steps.num_pages)))
    rng = np.random.default_rng(2)
    running: set[int] = set()
    tokens = [player.start(6, PROMPT, RANDOM)]
    while len(tokens) < NUM_TOKENS:
        slot = int(rng.integers(16))
        if slot in running:
            player.stop(slot)
            running.remove(slot)
        elif slot != 6:
            prompt = prompt_of(int(rng.integers(1, 100)), seed=slot)
            player.start(slot, prompt, SamplingParams(temperature=1.5, top_k=9, top_p=0.8), seed=slot)
            running.add(slot)
        # now and then the slot sits a step out
        if rng.random() < 0.2 and running:
            player.decode(*running)
        tokens.append(player.decode(6, *running)[6])
    assert tokens == alone


def test_sixteen_together_get_what_each_gets_alone(tiny_steps: Steps) -> None:
    _check_sixteen(tiny_steps, NUM_TOKENS)


def test_sixteen_together_get_what_each_gets_alone_from_mixed_packed_weights(tiny_q4_steps: Steps) -> None:
    _check_sixteen(tiny_q4_steps, 20)


def _check_sixteen(steps: Steps, num_tokens: int) -> None:
    prompts = [prompt_of(1 + 5 * slot, seed=slot) for slot in range(16)]
    player = Player(steps)
    together = [[player.start(slot, prompt, RANDOM, seed=slot)] for slot, prompt in enumerate(prompts)]
    for _ in range(num_tokens - 1):
        for slot, token in player.decode(*range(16)).items():
            together[slot].append(token)
    player = Player(steps)
    alone = [player.generate(prompt, RANDOM, num_tokens, seed=i) for i, prompt in enumerate(prompts)]
    assert together == alone
    assert len({tuple(ids_of(tokens)) for tokens in alone}) == 16


def test_chunks_do_not_change_a_bit_from_mixed_packed_weights(tiny_q4_steps: Steps) -> None:
    player = Player(tiny_q4_steps)
    whole = player.generate(PROMPT, RANDOM, 20)
    assert player.generate(PROMPT, RANDOM, 20, chunks=[1, 50, *[1] * 9, *cut(240, 60)]) == whole


def test_a_step_may_be_launched_before_the_one_ahead_is_read(
    tiny_steps: Steps, alone: list[SampledToken]
) -> None:
    player = Player(tiny_steps)
    tokens = [player.start(0, PROMPT, RANDOM)]
    ahead = tiny_steps.decode(player.plan(0))
    for _ in range(NUM_TOKENS - 2):
        launched = tiny_steps.decode(player.plan(0))
        tokens += ahead.read()
        ahead = launched
    assert tokens + ahead.read() == alone


def test_one_seed_gives_one_sequence_and_another_another(tiny_steps: Steps) -> None:
    player = Player(tiny_steps)
    hot = SamplingParams(temperature=1.5)
    first = ids_of(player.generate(PROMPT[:20], hot, 20, seed=1))
    assert ids_of(player.generate(PROMPT[:20], hot, 20, slot=9, seed=1)) == first
    for seed in (2, -1, 1 << 32, (1 << 32) + 1):
        assert ids_of(player.generate(PROMPT[:20], hot, 20, seed=seed)) != first


def test_top_k_one_is_greedy(tiny_steps: Steps) -> None:
    player = Player(tiny_steps)
    greedy = ids_of(player.generate(PROMPT[:20], GREEDY, 20))
    one = SamplingParams(temperature=2.0, top_k=1)
    assert ids_of(player.generate(PROMPT[:20], one, 20, seed=3)) == greedy


def test_penalties_follow_the_history_of_prompt_and_output(tiny_steps: Steps, tiny_network: Network) -> None:
    params = SamplingParams(
        temperature=0.0,
        frequency_penalty=0.9,
        presence_penalty=0.6,
        repetition_penalty=1.2,
        logit_bias={7: 2.5, 9: -100},
    )
    player = Player(tiny_steps)
    # a former owner's history in the same slot must be gone
    player.generate(prompt_of(50, seed=9), params, 20, slot=4)
    ids = ids_of(player.generate(PROMPT[:40], params, 40, slot=4))
    assert ids == penalised_greedy(tiny_network, PROMPT[:40], params, 40)
    assert ids != ids_of(player.generate(PROMPT[:40], GREEDY, 40))


def penalised_greedy(
    network: Network, prompt_ids: Sequence[int], params: SamplingParams, num_tokens: int
) -> list[int]:
    past: Past = {}
    ids: list[int] = []
    for _ in range(num_tokens):
        logits = logits_of(network, ids[-1:] or prompt_ids, past)[-1]
        for token_id in {*prompt_ids, *ids}:
            factor = params.repetition_penalty
            logits[token_id] *= 1 / factor if logits[token_id] > 0 else factor
        for token_id in set(ids):
            logits[token_id] -= params.presence_penalty + params.frequency_penalty * ids.count(token_id)
        for token_id, bias in params.logit_bias.items():
            logits[token_id] += bias
        ids.append(int(logits.argmax()))
    return ids


def test_each_row_reports_the_logprobs_it_asked_for(tiny_steps: Steps) -> None:
    player = Player(tiny_steps)
    for slot, count in enumerate((None, 0, 2, 20)):
        player.start(slot, PROMPT[:20], SamplingParams(temperature=0.0, logprobs=count))
    tokens = player.decode(0, 1, 2, 3)
    assert tokens[0].logprobs is None
    best = tokens[3].logprobs
    assert best is not None
    for slot, count in ((1, 0), (2, 2), (3, 20)):
        logprobs = tokens[slot].logprobs
        assert logprobs is not None
        assert (logprobs.token_id, logprobs.logprob) == best.top[0]
        assert logprobs.top == best.top[:count]
    assert player.decode(0)[0].logprobs is None


def test_a_reset_after_a_failed_step_leaves_no_trace(tiny_steps: Steps, alone: list[SampledToken]) -> None:
    player = Player(tiny_steps)
    player.start(0, PROMPT, RANDOM)
    for array in jax.tree.leaves((tiny_steps._cache, tiny_steps._slots)):
        array.delete()  # what a step that fails has done to its donated arguments
    with pytest.raises(RuntimeError, match="deleted"):
        player.decode(0)
    assert Player(tiny_steps).generate(PROMPT, RANDOM, NUM_TOKENS) == alone


def test_nothing_compiles_after_the_warm_up(tiny_steps: Steps) -> None:
    shapes = tiny_steps.shapes
    warmed = len(shapes.prefill_buckets) + len(shapes.decode_buckets) + 1
    assert tiny_steps.num_compilations() == warmed
    player = Player(tiny_steps)
    player.start(3, prompt_of(1), GREEDY)
    player.start(4, prompt_of(320), SamplingParams(top_k=3, top_p=0.5, min_p=0.1, logit_bias={3: 1.0}))
    player.start(0, prompt_of(700), RANDOM, generated_ids=[1, 2])
    player.decode(3)
    player.decode(0, 3, 4)
    for slot in (1, 2, *range(5, 16)):
        player.start(slot, prompt_of(10), GREEDY)
    player.decode(*range(16))
    Player(tiny_steps).generate(prompt_of(65), GREEDY, 2)
    assert tiny_steps.num_compilations() == warmed


def test_warming_again_compiles_nothing_and_leaves_the_cache_alone(
    tiny_steps: Steps, alone: list[SampledToken]
) -> None:
    before = tiny_steps.num_compilations()
    player = Player(tiny_steps)
    tokens = [player.start(5, PROMPT, RANDOM)]
    shares: list[float] = []
    tiny_steps.warm(shares.append)
    assert shares == sorted(set(shares))
    assert shares[-1] == 1
    tokens += [player.decode(5)[5] for _ in range(NUM_TOKENS - 1)]
    assert tokens == alone
    assert tiny_steps.num_compilations() == before


def test_steps_by_kernels_alone_are_compiled_without_rematerialisation(
    tiny_steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Mock()
    for kernels in (False, True):
        monkeypatch.setattr(tiny_steps, "shapes", replace(tiny_steps.shapes, kernels=kernels))
        monkeypatch.setattr(tiny_steps, "_executables", {})
        monkeypatch.setattr(tiny_steps, "_decode", step)
        tiny_steps._executable("decode", 1)
    asked = [call.kwargs["compiler_options"] for call in step.lower.return_value.compile.call_args_list]
    assert asked == [None, {"xla_disable_hlo_passes": "rematerialization"}]


SCOPES = {
    "embedding",
    "attention/qkv",
    "attention/qk_norm_rope",
    "attention/cache_write",
    "attention/attend",
    "attention/attn_output",
    "moe/router",
    "moe/gate_up",
    "moe/down",
    "moe/combine",
    "logits",
    "sampling",
}


def test_a_profile_reads_like_the_code(tiny_model: Decoder) -> None:
    graph, state = nnx.split(tiny_model)
    cache = KVCache.empty(tiny_model.config, 8, PAGE_LENGTH, "float32")
    row = sampling_row(GREEDY, tiny_model.config.vocab_size, (), (), 0)
    sampling = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 8), row)
    zeros = jnp.zeros(8, jnp.int32)
    slots, tables = Slots(zeros, zeros, sampling, zeros), jnp.zeros((8, 16), jnp.int32)
    step = jax.jit(lambda state, *args: decode(nnx.merge(graph, state), *args))
    text = step.lower(state, cache, slots, tables, zeros, jnp.int32(1)).as_text(debug_info=True)
    places = set(re.findall(r'loc\("([^"]+)"', text))
    assert {scope for scope in SCOPES if any(f"{scope}/" in place for place in places)} == SCOPES


@pytest.mark.parametrize(
    ("num_slots", "buckets"), [(1, (16,)), (16, (16,)), (17, (16, 32)), (65, (16, 32, 64, 128))]
)
def test_decode_buckets_double_until_all_slots_fit(num_slots: int, buckets: tuple[int, ...]) -> None:
    assert shapes_of(num_slots=num_slots).decode_buckets == buckets


@pytest.mark.parametrize(("chunk", "buckets"), [(1, (64,)), (64, (64,)), (65, (64, 128)), (512, (64, 512))])
def test_the_largest_prefill_bucket_holds_a_chunk(chunk: int, buckets: tuple[int, ...]) -> None:
    assert shapes_of(prefill_chunk=chunk).prefill_buckets == buckets


@pytest.mark.parametrize(
    ("num_slots", "buckets"), [(1, (1,)), (2, (1, 8)), (8, (1, 8)), (9, (1, 8, 16)), (64, (1, 8, 16, 32, 64))]
)
def test_decode_buckets_with_kernels_begin_with_one_row(num_slots: int, buckets: tuple[int, ...]) -> None:
    assert shapes_of(num_slots=num_slots, kernels=True).decode_buckets == buckets


@pytest.mark.parametrize(
    ("chunk", "buckets"), [(1, (64,)), (512, (64, 512)), (513, (64, 512, 576)), (2048, (64, 512, 2048))]
)
def test_prefill_buckets_with_kernels_have_one_between(chunk: int, buckets: tuple[int, ...]) -> None:
    assert shapes_of(prefill_chunk=chunk, kernels=True).prefill_buckets == buckets


@pytest.mark.parametrize(("context_length", "length"), [(1, 4), (256, 4), (257, 8), (1000, 16)])
def test_a_page_table_ends_with_a_whole_segment(context_length: int, length: int) -> None:
    assert shapes_of(context_length=context_length).table_length == length


def shapes_of(**changes: int) -> Shapes:
    sizes = {"num_slots": 8, "num_pages": 64, "page_length": 64, "context_length": 1024, "prefill_chunk": 512}
    return Shapes(**sizes | changes, cache_dtype="float32")

"""The steps by CUDA kernels, through the emulator: the plain path's ids, and one numerical truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_device import PAGE_LENGTH, Forward, Player, ids_of

from jaxmoe.config import ModelConfig
from jaxmoe.gguf import read_gguf
from jaxmoe.kernels import decode_row, ptx
from jaxmoe.model import Decoder
from jaxmoe.request import SampledToken, SamplingParams
from jaxmoe.step import Shapes, Steps, decode_with_kernels, prefill_with_kernels
from jaxmoe.weights import load_model
from tools.synth_gguf import write_synthetic

RANDOM = SamplingParams(temperature=1.0, logprobs=20)  # every logit has a say in the id
GREEDY = SamplingParams(temperature=0.0, logprobs=20)
PREFILL_CHUNK = 128


class EagerSteps(Steps):
    """Steps whose kernels run one by one: compiled ones wait long for every callback to the emulator."""

    def __init__(self, model: Decoder, config: ModelConfig) -> None:
        shapes = Shapes(
            num_slots=4,
            num_pages=16,
            page_length=PAGE_LENGTH,
            context_length=512,
            prefill_chunk=PREFILL_CHUNK,
            cache_dtype="bfloat16",
            kernels=True,
        )
        super().__init__(model, config, shapes)
        self.model = model

    def _launch(self, kind: str, rows: Any, numbers: Any) -> Any:
        step = prefill_with_kernels if kind == "prefill" else decode_with_kernels
        args = self._cache, self._slots, self._device_tables, jnp.asarray(rows), jnp.asarray(numbers)
        self._cache, self._slots, sampled = step(self.model, *args)
        return sampled


def open_eager(path: Path) -> EagerSteps:
    file = read_gguf(path)
    config = ModelConfig.from_gguf(file)
    return EagerSteps(load_model(file, config, context_length=1024, layout="rows"), config)


@pytest.fixture(scope="module")
def q4_steps(tiny_q4: Path) -> EagerSteps:
    return open_eager(tiny_q4)


@pytest.fixture
def steps(q4_steps: EagerSteps, emulated: None) -> EagerSteps:
    return q4_steps


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([length, seed]).integers(0, 512, length).tolist())


def rows_of(player: Player, slot: int) -> bytes:
    """Keys and values of all of a slot's tokens, in order."""
    cache, pages, length = player.steps._cache, np.array(player.pages[slot]), player.lengths[slot]
    pieces = np.stack([cache.keys[:, pages], cache.values[:, pages]])
    return pieces.reshape(*pieces.shape[:2], -1, *pieces.shape[4:])[:, :, :length].tobytes()


def generate(player: Player, prompt: tuple[int, ...], count: int) -> list[SampledToken]:
    """`count` tokens of slot 0, which is left running."""
    first = player.start(0, prompt, RANDOM)
    return [first, *(player.decode(0)[0] for _ in range(count - 1))]


def top_logprobs(tokens: list[SampledToken]) -> list[tuple[int, int, float]]:
    """Number of the token, an id, and the id's log probability."""
    tops = [token.logprobs.top for token in tokens if token.logprobs is not None]
    return [(i, token_id, x) for i, top in enumerate(tops) for token_id, x in top]


@pytest.mark.parametrize("quant", ["Q4_K_M", "F16", "F32"])
def test_greedy_ids_are_the_plain_path_s(
    quant: str, tmp_path: Path, q4_steps: EagerSteps, emulated: None
) -> None:
    steps = q4_steps
    if quant != "Q4_K_M":
        write_synthetic(tmp_path / "tiny.gguf", "tiny", quant)
        steps = open_eager(tmp_path / "tiny.gguf")
    prompt = prompt_of(20)
    tokens = Player(steps).generate(prompt, GREEDY, 4)
    ids = ids_of(tokens)
    plain = Forward(steps.model, steps.config, 64)([*prompt, *ids[:-1]])[len(prompt) - 1 :]
    assert ids == plain.argmax(axis=-1).tolist()
    # activations of 8 bits move a logit, but not far
    logprobs = np.asarray(jax.nn.log_softmax(plain))
    moved = [logprobs[i, token_id] - found for i, token_id, found in top_logprobs(tokens)]
    assert np.sqrt(np.mean(np.square(moved))) < 0.1


def test_decode_gives_the_bits_of_a_longer_prefill(steps: EagerSteps) -> None:
    prompt = prompt_of(123)
    player = Player(steps)
    tokens = generate(player, prompt, 9)  # over a page's and a segment's edge
    decoded, ids = rows_of(player, 0), ids_of(tokens)
    player = Player(steps)
    again = player.start(0, prompt, RANDOM, generated_ids=ids[:-1], chunks=[128, 3])
    assert (rows_of(player, 0), again) == (decoded, tokens[-1])


def test_chunks_do_not_change_a_bit(steps: EagerSteps) -> None:
    prompt = prompt_of(128)
    player = Player(steps)
    whole, rows = player.start(0, prompt, RANDOM), rows_of(player, 0)
    for chunks in ([64, 64], [37, 91]):
        player = Player(steps)
        assert player.start(0, prompt, RANDOM, chunks=chunks) == whole
        assert rows_of(player, 0) == rows


def test_neighbours_do_not_change_a_bit(steps: EagerSteps) -> None:
    player = Player(steps)
    alone = generate(player, prompt_of(30), 4)
    rows = rows_of(player, 0)
    player = Player(steps, reversed(range(steps.num_pages)))
    for slot in (3, 1):
        player.start(slot, prompt_of(20 + slot, seed=slot), SamplingParams(temperature=1.5), seed=slot)
    together = [player.start(0, prompt_of(30), RANDOM)]
    together += [player.decode(0, 1, 3)[0] for _ in range(3)]
    assert together == alone
    assert rows_of(player, 0) == rows


class State(NamedTuple):
    """What steps keep on the device, on the host."""

    cache: Any
    slots: Any


def state_of(steps: Steps) -> State:
    cache = np.stack([steps._cache.keys, steps._cache.values]).view(np.uint16)
    return State(cache, jax.tree.map(np.array, steps._slots))


def changed_rows(before: State, after: State) -> set[tuple[int, int]]:
    """The (page, offset) that differ in any layer."""
    differs = (before.cache != after.cache).any(axis=(0, 1, 4, 5))
    return {(int(page), int(offset)) for page, offset in np.argwhere(differs)}


def changed_slots(before: State, after: State) -> set[int]:
    """Slots whose id, position or sampling row differs."""
    kept = (
        jax.tree.leaves((s.slots.token_ids, s.slots.positions, s.slots.sampling)) for s in (before, after)
    )
    differs = [(old != new).reshape(len(old), -1).any(axis=1) for old, new in zip(*kept, strict=True)]
    return set(np.flatnonzero(np.any(differs, axis=0)).tolist())


def test_rows_past_the_count_change_nothing(steps: EagerSteps) -> None:
    player = Player(steps)
    for slot in range(3):
        player.start(slot, prompt_of(20 + slot), GREEDY)
    before = state_of(steps)
    # pads of other slots, of the rows' own, and junk ids past a prompt's end
    steps._launch("decode", np.array([2, 1, 0, 0, 1, 2, 3, 3], np.int32), np.int32(2))
    after = state_of(steps)
    assert changed_rows(before, after) == {(player.pages[1][0], 21), (player.pages[2][0], 22)}
    assert changed_slots(before, after) == {1, 2}
    steps._tables[3, 0] = page = player.free[0]
    steps._device_tables = jnp.array(steps._tables)
    where = np.array([3, 5, 7, 0], np.int32)
    steps._launch("prefill", np.arange(64, dtype=np.int32) + 400, where)
    last = state_of(steps)
    assert changed_rows(after, last) == {(page, 5 + i) for i in range(7)}
    assert changed_slots(after, last) == {3}
    assert (last.slots.token_ids[3], last.slots.sampling.step[3]) == (after.slots.token_ids[3], 0)


def test_counters_are_zero_between_steps(steps: EagerSteps) -> None:
    player = Player(steps)
    work = (
        lambda: player.start(0, prompt_of(30), GREEDY),
        lambda: player.start(1, prompt_of(128), GREEDY),
        lambda: player.decode(0),
        lambda: player.decode(0, 1),
    )
    for step in work:
        step()
        assert not np.any(steps._slots.counters)


def decoded(
    steps: EagerSteps, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[SampledToken], bytes, list[str]]:
    """Tokens of one slot, keys and values, and the kernels of the last decode step."""
    names: list[str] = []
    launch = ptx.launch

    def noted(file: str, name: str, *args: Any, **how: Any) -> Any:
        names.append(name)
        return launch(file, name, *args, **how)

    player = Player(steps)
    tokens = generate(player, prompt_of(5), 2)
    with monkeypatch.context() as patch:
        patch.setattr(ptx, "launch", noted)
        tokens += player.decode(0)
    return tokens, rows_of(player, 0), names


def test_one_launch_gives_the_bits_of_many(steps: EagerSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    *fused, names = decoded(steps, monkeypatch)
    assert names == ["decode_row", "lm_head", "sample"]  # the last norm too is in its product's launch
    monkeypatch.setattr(decode_row, "is_supported", lambda weights, config: False)
    *separate, names = decoded(steps, monkeypatch)
    num_layers = steps.config.num_layers
    assert (names.count("decode_row"), names.count("attend_decode"), names.count("qkv")) == (
        0,
        num_layers,
        num_layers,
    )
    assert separate == fused

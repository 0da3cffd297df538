"""Whether whole models agree: kernels with their twins, and a stream with itself in other company.

A path is a model as a function from ids [T] to the logits after each of them, [T, V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any, cast
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import jaxmoe.model as decoder
from jaxmoe import attention, moe
from jaxmoe.attention import SEGMENT_LENGTH, Attention, PrefillPlaces, Rows, query_tile
from jaxmoe.cache import KVCache
from jaxmoe.config import EngineConfig, ModelConfig
from jaxmoe.kernels import attention as kernel_attention
from jaxmoe.kernels import router
from jaxmoe.kernels.rounding import Rounded, round_rows, rounded_values
from jaxmoe.kernels.rows import norm_quantise_twin
from jaxmoe.layers import matmul
from jaxmoe.model import Decoder
from jaxmoe.moe import MoE
from jaxmoe.step import Steps
from tools.player import Player, make_steps, open_model, random_ids

Path = Callable[[Sequence[int]], np.ndarray]

SAME_AS_TWIN = 0.995  # share of positions with the rounded twin's greedy id
MEAN_KL = 0.005  # nats
CLEAR_MARGIN = 0.5  # of the first over the second logit: there the float path's id must come out
_ROWS = 64  # positions compared at a time
_PAGE_LENGTH = 64


@dataclass(frozen=True)
class Distance:
    """How far a path's logits are from a float path's.

    `mean_kl` is KL(float || path) in nats; of the `clear` positions, where the float path's best logit leads
    by more than CLEAR_MARGIN, `clear_missed` have another greedy id.
    """

    mean_kl: float
    clear: int
    clear_missed: int

    @property
    def passed(self) -> bool:
        """Whether both bounds hold; NaN passes nothing."""
        return self.mean_kl <= MEAN_KL and self.clear_missed == 0


@dataclass(frozen=True)
class Agreement:
    """How one path's logits agree with its rounded twin's and with the float path's.

    `same_as_twin` and `same_in_step` are shares of `positions` with the greedy id of the twin that runs on
    its own, and of the one that starts each layer from what the kernels computed up to there: sums in another
    order round one of many codes apart, and within some layers that grows to the size of all rounding.
    `plain` is the distance from the float path, `plain_routed` from the one whose rows go to the experts that
    the kernels chose: what rounding costs where it changes no choice of experts.
    """

    positions: int
    same_as_twin: float
    same_in_step: float
    plain: Distance
    plain_routed: Distance

    @property
    def passed(self) -> bool:
        """Whether the bounds hold, the twin being the one in step and the float path the one on its own."""
        return self.same_in_step >= SAME_AS_TWIN and self.plain.passed


@dataclass(frozen=True)
class Paths:
    """The same model: through kernels, their rounded twins, and in float; twins alone and in step.

    `plain_routed` is in float, but takes the kernels' experts.
    """

    kernel: Path
    rounded: Path
    in_step: Path
    plain: Path
    plain_routed: Path


def whole_model(paths: Paths, prompts: Iterable[Sequence[int]]) -> Agreement:
    """Compare the paths at every position of the prompts."""
    same, in_step, plain, plain_routed = [], [], [], []
    for prompt in prompts:
        kernel = paths.kernel(prompt)
        ids = kernel.argmax(axis=-1)
        same.append(ids == paths.rounded(prompt).argmax(axis=-1))
        in_step.append(ids == paths.in_step(prompt).argmax(axis=-1))
        plain.append(_distances(paths.plain(prompt), kernel))
        plain_routed.append(_distances(paths.plain_routed(prompt), kernel))
    return Agreement(
        positions=sum(map(len, same)),
        same_as_twin=float(np.concatenate(same).mean()),
        same_in_step=float(np.concatenate(in_step).mean()),
        plain=_joined(plain),
        plain_routed=_joined(plain_routed),
    )


def _distances(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of each row: the divergence, whether the expected id is clear, and whether such an id was missed."""
    parts = []
    for start in range(0, len(found), _ROWS):
        rows = slice(start, start + _ROWS)
        is_clear = margin(expected[rows]) > CLEAR_MARGIN
        is_missed = is_clear & (expected[rows].argmax(axis=-1) != found[rows].argmax(axis=-1))
        parts.append(np.stack([divergence(expected[rows], found[rows]), is_clear, is_missed]))
    return np.concatenate(parts, axis=1)


def _joined(prompts: Sequence[np.ndarray]) -> Distance:
    kl, clear, missed = np.concatenate(prompts, axis=1)
    return Distance(float(kl.mean()), int(clear.sum()), int(missed.sum()))


def margin(logits: np.ndarray) -> np.ndarray:
    """By how much the best logit of each row leads the second, [T]."""
    best = np.partition(logits, -2, axis=-1)[:, -2:]
    return best[:, 1] - best[:, 0]


def divergence(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(expected || found) of each row of logits, in nats, [T]."""
    p, q = _log_shares(expected), _log_shares(found)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def _log_shares(logits: np.ndarray) -> np.ndarray:
    centred = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return centred - np.log(np.exp(centred).sum(axis=-1, keepdims=True))


Call = Callable[["Decoder", Any, Any, Any, Any], tuple[Any, Any]]


def plain_call(
    model: Decoder, token_ids: Array, cache: KVCache, where: Array, tables: Array
) -> tuple[Array, KVCache]:
    """Logits [T, V] of a chunk in float, and the cache; `where` and `tables` as for `PrefillPlaces`."""
    rows = _rows(model.config, cache, token_ids.shape[0], where, tables)
    hidden, cache = model(token_ids, cache, rows)
    return model.logits(hidden, rows.num_rows), cache


def kernel_call(
    model: Decoder, token_ids: Array, cache: KVCache, where: Array, tables: Array
) -> tuple[Array, KVCache]:
    """`plain_call` by the kernels."""
    places = PrefillPlaces(where, tables)
    counters = jnp.zeros(router.NUM_COUNTERS, jnp.int32)
    hidden, inputs, cache, _ = model.with_kernels(token_ids, cache, places, counters)
    return model.logits_with_kernels(hidden, inputs, places.count), cache


def rounded_call(
    model: Decoder, token_ids: Array, cache: KVCache, where: Array, tables: Array
) -> tuple[Array, KVCache]:
    """`plain_call` with every input of a product rounded as the kernels round it, sums in any order."""
    with _rounding(model.config, where, tables):
        return plain_call(model, token_ids, cache, where, tables)


def in_step_call(
    model: Decoder, token_ids: Array, cache: KVCache, where: Array, tables: Array
) -> tuple[Array, KVCache]:
    """`rounded_call`, but each layer starts from the hidden states and the cache of `kernel_call`.

    Attention's input is rounded before it is multiplied by 1 / rms, as the kernels do, the others after it.
    """
    states = [model.embedding(token_ids)]
    by_kernels = MoE.with_kernels

    def noted(self: MoE, *rest: Any) -> tuple[Array, Any, Array]:
        x, inputs, counters = by_kernels(self, *rest)
        states.append(x)
        return x, inputs, counters

    with patch.object(MoE, "with_kernels", noted):
        _, cache = kernel_call(model, token_ids, cache, where, tables)
    rows = _rows(model.config, cache, token_ids.shape[0], where, tables)
    # only the last layer's answer is read: those before it were replaced by the kernels'
    last = model.config.num_layers - 1
    layer = jnp.int32(last)
    with _rounding(model.config, where, tables):
        x = states[-2]
        # where the factor comes decides some codes, and so some keys
        norm = model.attn_norm.weight[...]
        normed = norm_quantise_twin(x, norm, where[2:3], eps=model.config.norm_eps, layer=last)
        y, _ = model.attention(rounded_values(Rounded(*normed)), cache, rows, layer)
        x = x + y
        x = x + model.moe(decoder._normed(model.moe_norm, x, rows, layer), rows.num_rows, layer)
        return model.logits(x, rows.num_rows), cache


def routed_call(
    model: Decoder, token_ids: Array, caches: tuple[KVCache, KVCache], where: Array, tables: Array
) -> tuple[Array, tuple[KVCache, KVCache]]:
    """`plain_call`, but rows go to the experts that `kernel_call` chose; `caches`: the kernels', its own."""
    chosen: list[Array] = []
    by_kernels = router.route

    def noted(*args: Any, **rest: Any) -> router.Routed:
        routed = by_kernels(*args, **rest)
        chosen.append(routed.ids)
        return routed

    with patch.object(router, "route", noted):
        _, kernel_cache = kernel_call(model, token_ids, caches[0], where, tables)
    ids = jnp.stack(chosen)

    def forced(self: MoE, x: Array, num_rows: Array, layer: Array) -> tuple[Array, Array]:
        logits = self.router.apply(lambda w, i: matmul(x, w, (i,), num_rows), layer)
        shares = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), ids[layer], axis=-1)
        return ids[layer], shares / shares.sum(axis=-1, keepdims=True)

    with patch.object(MoE, "_route", forced):
        logits, plain_cache = plain_call(model, token_ids, caches[1], where, tables)
    return logits, (kernel_cache, plain_cache)


@contextmanager
def _rounding(config: ModelConfig, where: Array, tables: Array) -> Iterator[None]:
    """What is traced inside takes rounded activations into its products and attention."""

    def attend(q: Array, cache: KVCache, rows: Any, layer: Array) -> Array:
        mixed = kernel_attention.prefill_twin(
            q, where, tables, cache.keys, cache.values, config=config, layer=cast(int, layer)
        )
        return mixed.reshape(q.shape)

    gate_up, project, swiglu = MoE._gate_up, Attention._project, moe.swiglu
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (attention, "attend", attend),
        (Attention, "_project", lambda self, x, *rest: project(self, _rounded(x), *rest)),
        (MoE, "_gate_up", lambda self, x, *rest: gate_up(self, _rounded(x), *rest)),
        (moe, "swiglu", lambda gate, up: _rounded(swiglu(gate, up))),
        (decoder, "matmul", lambda x, *rest: matmul(_rounded(x), *rest)),
    )
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def _rounded(x: Array) -> Array:
    return rounded_values(round_rows(x))


class Forward:
    """A path through `call`: ids [T] in chunks of `chunk` tokens, in a cache of its own for each dtype."""

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        call: Call,
        *,
        length: int,
        chunk: int,
        dtype: str | tuple[str, str],
    ) -> None:
        graph, state = nnx.split(model)
        num_pages = -(-length // SEGMENT_LENGTH) * (SEGMENT_LENGTH // _PAGE_LENGTH)
        tables = np.arange(num_pages, dtype=np.int32)[None]

        def run(leaves: Any, cache: Any, token_ids: Array, where: Array) -> tuple[Array, Any]:
            return call(nnx.merge(graph, leaves), token_ids, cache, where, jnp.asarray(tables))

        self.chunk = chunk
        self._run = partial(jax.jit(run, donate_argnums=1), state)
        empty = partial(KVCache.empty, config, num_pages, _PAGE_LENGTH)
        self._empty: Callable[[], Any] = partial(jax.tree.map, empty, dtype)

    def __call__(self, token_ids: Sequence[int]) -> np.ndarray:
        cache, found = self._empty(), []
        for start in range(0, len(token_ids), self.chunk):
            count = min(self.chunk, len(token_ids) - start)
            padded = np.zeros(self.chunk, np.int32)
            padded[:count] = token_ids[start : start + count]
            is_last = start + count == len(token_ids)
            logits, cache = self._run(cache, padded, np.array([0, start, count, is_last], np.int32))
            found.append(np.asarray(logits)[:count])
        return np.concatenate(found)


def _rows(config: ModelConfig, cache: KVCache, chunk: int, where: Array, tables: Array) -> Rows:
    """A chunk's rows as the plain path wants them."""
    start, count = where[1], where[2]
    index, tile = jnp.arange(chunk, dtype=jnp.int32), query_tile(config)
    members = jnp.where(index < count, index, chunk).reshape(-1, tile)
    positions = start + index
    pages = tables[0].at[positions // cache.page_length].get(mode="clip")
    return Rows(
        num_rows=count,
        positions=positions,
        pages=jnp.where(index < count, pages, cache.num_pages),
        offsets=positions % cache.page_length,
        tile_rows=members,
        tile_tables=jnp.zeros(len(members), jnp.int32),
        num_tiles=(count + tile - 1) // tile,
        page_tables=tables,
    )


def open_paths(path: FilePath, length: int) -> tuple[Paths, int]:
    """The paths of a file for prompts of up to `length` tokens, and its vocabulary's size."""
    model, config = open_model(path, length)
    made = partial(Forward, model, config, length=length, chunk=256)
    return Paths(
        kernel=made(kernel_call, dtype="bfloat16"),
        rounded=made(rounded_call, dtype="bfloat16"),
        in_step=made(in_step_call, dtype="bfloat16"),
        plain=made(plain_call, dtype="float32"),
        plain_routed=made(routed_call, dtype=("bfloat16", "float32")),
    ), config.vocab_size


# --- Batch invariance.


@dataclass(frozen=True)
class Company:
    """What batch invariance is tried with, counted in tokens and slots."""

    new_tokens: int = 256
    long_prompt: int = 2300
    short_prompt: int = 300
    batches: tuple[int, ...] = (1, 8, 64)
    chunks: tuple[int, ...] = (2048, 256)


@dataclass(frozen=True)
class Invariance:
    """One way of running streams against the first way: how many were compared, and which differed."""

    name: str
    streams: int
    other_ids: tuple[int, ...]
    other_pages: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.streams > 0 and not self.other_ids and not self.other_pages


Streams = dict[int, tuple[list[int], str]]


def batch_invariance(
    model: Decoder, config: ModelConfig, seed: int, company: Company | None = None
) -> list[Invariance]:
    """Greedy ids and page bytes of the same prompts, in every batch and chunk size of `company`.

    Stream 0 has the long prompt. The first batch size and the first chunk are what the others are held to;
    last, prefill of prompt and answer together is held to prefill and decode.
    """
    company = company or Company()
    prompts = _prompts(company, config.vocab_size, seed)
    wide, *others = company.chunks
    found, results = {}, []
    steps = _steps(model, config, company, wide)
    for batch in company.batches:
        found[batch] = _play(steps, prompts[:batch], company)
        if batch != company.batches[0]:
            smaller = {slot: one for size in found if size < batch for slot, one in found[size].items()}
            results.append(_compared(f"batch {batch}", smaller, found[batch]))
    alone = found[company.batches[0]]
    results.append(_refilled(steps, prompts[0], alone[0]))
    for chunk in others:
        del steps  # two caches need not fit
        steps = _steps(model, config, company, chunk)
        again = _play(steps, prompts[: company.batches[0]], company)
        results.append(_compared(f"prefill in chunks of {chunk}", alone, again))
    return results


def _prompts(company: Company, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    lengths = np.random.default_rng(seed).integers(
        company.short_prompt // 4 + 1, company.short_prompt + 1, company.batches[-1]
    )
    lengths[0] = company.long_prompt
    return [random_ids(int(length), vocab_size, (seed, i)) for i, length in enumerate(lengths)]


def _steps(model: Decoder, config: ModelConfig, company: Company, chunk: int) -> Steps:
    most = company.long_prompt + company.new_tokens
    asked = EngineConfig(num_slots=company.batches[-1], context_length=most, prefill_chunk=chunk)
    per_slot = -(-(company.short_prompt + company.new_tokens) // asked.page_length)
    num_pages = -(-most // asked.page_length) + company.batches[-1] * per_slot
    return make_steps(model, config, asked, num_pages=num_pages)


def _play(steps: Steps, prompts: Sequence[Sequence[int]], company: Company) -> Streams:
    player = Player(steps)
    ids = player.generate(dict(enumerate(prompts)), company.new_tokens)
    read = range(min(len(prompts), company.batches[min(1, len(company.batches) - 1)]))
    return {slot: (ids[slot], player.page_digest(slot)) for slot in read}


def _refilled(steps: Steps, prompt: Sequence[int], alone: tuple[list[int], str]) -> Invariance:
    """Prefill of the prompt and all of its answer but the last id, against prefill and decode."""
    ids, _ = alone
    player = Player(steps)
    last = player.start(0, (*prompt, *ids[:-1]))
    return _compared("prefill(n + m)", {0: alone}, {0: ([*ids[:-1], last], player.page_digest(0))})


def _compared(name: str, expected: Streams, found: Streams) -> Invariance:
    both = sorted(expected.keys() & found.keys())
    return Invariance(
        name,
        len(both),
        other_ids=tuple(slot for slot in both if expected[slot][0] != found[slot][0]),
        other_pages=tuple(slot for slot in both if expected[slot][1] != found[slot][1]),
    )

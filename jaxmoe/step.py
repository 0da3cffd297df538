"""Prefill and decode: pure functions of weights, cache and slots, compiled per bucket, donated and warmed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxmoe.attention import SEGMENT_LENGTH, DecodePlaces, PrefillPlaces, Rows, query_tile
from jaxmoe.cache import KVCache
from jaxmoe.config import ModelConfig
from jaxmoe.kernels import ptx
from jaxmoe.kernels import sampling as kernel_sampling
from jaxmoe.kernels.router import NUM_COUNTERS
from jaxmoe.layers import MIN_ROWS
from jaxmoe.model import Decoder
from jaxmoe.request import Decode, Prefill, SampledToken, SamplingParams, TokenLogprobs
from jaxmoe.sampling import Sampled, SamplingRow, sample
from jaxmoe.user_cache import private_directory

logger = logging.getLogger(__name__)

_SMALLEST_PREFILL, _MIDDLE_PREFILL = 64, 512
_FLOAT_PARAMS = ("top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the device knows of each slot [B]: the id to feed next, its position, the sampling row.

    `counters` int32 are what the kernels' blocks count each other with: zeros between steps.
    """

    token_ids: Array
    positions: Array
    sampling: SamplingRow
    counters: Array


@dataclass(frozen=True)
class Shapes:
    """The static shapes of the steps: counts of slots, pages and tokens."""

    num_slots: int
    num_pages: int
    page_length: int
    context_length: int
    prefill_chunk: int
    cache_dtype: str
    kernels: bool = False

    @property
    def table_length(self) -> int:
        """Pages of the longest context, up to a whole attention segment."""
        return -(-self.context_length // SEGMENT_LENGTH) * SEGMENT_LENGTH // self.page_length

    @property
    def prefill_buckets(self) -> tuple[int, ...]:
        """Token counts that prefill is compiled for; trip counts inside follow the real count."""
        largest = -(-self.prefill_chunk // _SMALLEST_PREFILL) * _SMALLEST_PREFILL
        between = {_MIDDLE_PREFILL} if self.kernels and largest > _MIDDLE_PREFILL else set()
        return tuple(sorted({_SMALLEST_PREFILL, largest} | between))

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """Slot counts that decode is compiled for, doubled until all slots fit."""
        buckets = [1, 8] if self.kernels and self.num_slots > 1 else [1 if self.kernels else MIN_ROWS]
        while buckets[-1] < self.num_slots:
            buckets.append(2 * buckets[-1])
        return tuple(buckets)


def prefill(
    model: Decoder, cache: KVCache, slots: Slots, tables: Array, token_ids: Array, where: Array
) -> tuple[KVCache, Slots, Sampled]:
    """Put a chunk token_ids [T] of one slot into the cache; on the last chunk sample the slot's next id.

    `where` int32[4] is (slot, position of the first token, number of real tokens, 1 on the last chunk).
    """
    slot, start, count, is_last = where[0], where[1], where[2], where[3]
    num_rows, tile = token_ids.shape[0], query_tile(model.config)
    index = jnp.arange(num_rows, dtype=jnp.int32)
    members = jnp.where(index < count, index, num_rows).reshape(-1, tile)
    rows = _rows(
        cache, tables, slots=jnp.broadcast_to(slot, num_rows), positions=start + index, count=count,
        tile_rows=members, tile_tables=jnp.broadcast_to(slot, members.shape[0]), num_tiles=-(-count // tile),
    )  # fmt: skip
    hidden, cache = model(token_ids, cache, rows)
    last = lax.dynamic_slice_in_dim(hidden, count - 1, 1)
    logits = model.logits(last, is_last)
    fed = replace(slots, positions=slots.positions.at[slot].set(start + count - 1))
    slots, sampled = _sample(fed, logits, slot[None], is_last)
    return cache, slots, sampled


def decode(
    model: Decoder, cache: KVCache, slots: Slots, tables: Array, active: Array, count: Array
) -> tuple[KVCache, Slots, Sampled]:
    """Feed each slot of active[:count] its id, sample the next; `active` [b] is padded with any slot."""
    token_ids, positions = slots.token_ids[active], slots.positions[active]
    num_rows = active.shape[0]
    index = jnp.arange(num_rows, dtype=jnp.int32)
    others = jnp.full((num_rows, query_tile(model.config) - 1), num_rows, jnp.int32)
    rows = _rows(
        cache, tables, slots=active, positions=positions, count=count,
        tile_rows=jnp.concatenate([index[:, None], others], axis=1), tile_tables=active, num_tiles=count,
    )  # fmt: skip
    hidden, cache = model(token_ids, cache, rows)
    slots, sampled = _sample(slots, model.logits(hidden, count), active, count)
    return cache, slots, sampled


def prefill_with_kernels(
    model: Decoder, cache: KVCache, slots: Slots, tables: Array, token_ids: Array, where: Array
) -> tuple[KVCache, Slots, Sampled]:
    """`prefill` by the CUDA kernels."""
    slot, start, count = where[0], where[1], where[2]
    hidden, _, cache, counters = model.with_kernels(
        token_ids, cache, PrefillPlaces(where, tables), slots.counters
    )
    last = lax.dynamic_slice_in_dim(hidden, count - 1, 1)
    logits = model.logits_with_kernels(last, model.final_row(last), jnp.ones(1, jnp.int32))
    positions = slots.positions.at[slot].set(start + count - 1)
    fed = replace(slots, positions=positions, counters=counters)
    slots, sampled = _sample_with_kernel(fed, logits, where[0:1], where[3:4])
    return cache, slots, sampled


def decode_with_kernels(
    model: Decoder, cache: KVCache, slots: Slots, tables: Array, active: Array, count: Array
) -> tuple[KVCache, Slots, Sampled]:
    """`decode` by the CUDA kernels."""
    places = DecodePlaces(active, slots.positions, tables, count.reshape(1))
    token_ids = slots.token_ids[active]
    hidden, inputs, cache, counters = model.with_kernels(token_ids, cache, places, slots.counters)
    logits = model.logits_with_kernels(hidden, inputs, places.count)
    slots, sampled = _sample_with_kernel(replace(slots, counters=counters), logits, active, places.count)
    return cache, slots, sampled


def _sample_with_kernel(slots: Slots, logits: Array, active: Array, count: Array) -> tuple[Slots, Sampled]:
    row = {field.name: getattr(slots.sampling, field.name) for field in fields(slots.sampling)}
    new = kernel_sampling.sample(logits, slots.token_ids, slots.positions, row, active, count)
    sampling = replace(slots.sampling, counts=new.counts, step=new.step)
    advanced = replace(slots, token_ids=new.token_ids, positions=new.positions, sampling=sampling)
    return advanced, Sampled(new.sampled, new.logprobs, new.top_ids, new.top_logprobs)


def _rows(
    cache: KVCache, tables: Array, *, slots: Array, positions: Array, count: Array, **tiles: Array
) -> Rows:
    real = jnp.arange(positions.shape[0], dtype=jnp.int32) < count
    pages = tables.at[slots, positions // cache.page_length].get(mode="clip")
    return Rows(
        num_rows=count,
        positions=positions,
        pages=jnp.where(real, pages, cache.num_pages),
        offsets=positions % cache.page_length,
        page_tables=tables,
        **tiles,
    )


def _sample(slots: Slots, logits: Array, active: Array, count: Array) -> tuple[Slots, Sampled]:
    """Sample a row for each of active[:count], one after the other, and advance those slots."""

    def row(i: Array, out: Sampled) -> Sampled:
        sampled = sample(logits[i], jax.tree.map(lambda x: x[active[i]], slots.sampling))
        return jax.tree.map(lambda o, y: lax.dynamic_update_index_in_dim(o, y, i, 0), out, sampled)

    with jax.named_scope("sampling"):
        sampled = lax.fori_loop(0, count, row, Sampled.empty(active.shape[0]))
        num_slots = slots.token_ids.shape[0]
        real = jnp.arange(active.shape[0], dtype=jnp.int32) < count
        used = jnp.where(real, active, num_slots)
        history = slots.sampling
        counts = history.counts.at[used, sampled.token_id].add(1, mode="drop")
        advanced = replace(history, counts=counts, step=history.step.at[used].add(1, mode="drop"))
        return replace(
            slots,
            token_ids=slots.token_ids.at[used].set(sampled.token_id, mode="drop"),
            positions=slots.positions.at[used].add(1, mode="drop"),
            sampling=advanced,
        ), sampled


def admit(slots: Slots, slot: Array, row: SamplingRow) -> Slots:
    """Give a slot the sampling row of a new request."""
    put = lambda batch, one: lax.dynamic_update_index_in_dim(batch, one, slot, 0)  # noqa: E731
    return replace(slots, sampling=jax.tree.map(put, slots.sampling, row))


def sampling_row(
    params: SamplingParams,
    vocab_size: int,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    seed: int,
) -> SamplingRow:
    """A request's sampling row, as numpy arrays."""
    bias: Any = np.zeros(vocab_size, np.float32)
    for token_id, value in params.logit_bias.items():
        bias[token_id] = value
    in_prompt: Any = np.zeros(vocab_size, np.bool_)
    in_prompt[np.asarray(prompt_ids, np.int64)] = True
    counts: Any = np.bincount(np.asarray(generated_ids, np.int64), minlength=vocab_size).astype(np.int32)
    # one candidate leaves nothing to draw
    greedy = params.top_k == 1
    row: dict[str, Any] = {name: np.float32(getattr(params, name)) for name in _FLOAT_PARAMS}
    row["temperature"] = np.float32(0 if greedy else params.temperature)
    row["top_k"] = np.int32(max(0, params.top_k))
    row["seed"] = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    row["step"] = np.int32(len(generated_ids))
    row["wants_logprobs"] = np.bool_(params.logprobs is not None)
    row["has_bias"] = np.bool_(len(params.logit_bias) > 0)
    return SamplingRow(**row, bias=bias, counts=counts, in_prompt=in_prompt)


class PendingTokens:
    """Ids on their way from the device; `read` waits for them."""

    def __init__(self, sampled: Sampled, num_logprobs: Sequence[int | None]) -> None:
        self._sampled = sampled
        self._num_logprobs = tuple(num_logprobs)
        wanted = jax.tree.leaves(sampled) if self._any_logprobs else [sampled.token_id]
        for array in wanted:
            array.copy_to_host_async()

    @property
    def _any_logprobs(self) -> bool:
        return any(n is not None for n in self._num_logprobs)

    def read(self) -> list[SampledToken]:
        """One id per slot of the step, in its order; blocks until the device has them."""
        token_ids = np.asarray(self._sampled.token_id).tolist()[: len(self._num_logprobs)]
        if not self._any_logprobs:
            return [SampledToken(token_id, None) for token_id in token_ids]
        host = jax.tree.map(np.asarray, self._sampled)
        return [
            SampledToken(token_id, None if n is None else _token_logprobs(host, i, n))
            for i, (token_id, n) in enumerate(zip(token_ids, self._num_logprobs, strict=True))
        ]


def _token_logprobs(host: Any, i: int, count: int) -> TokenLogprobs:
    top = zip(host.top_ids[i, :count].tolist(), host.top_logprobs[i, :count].tolist(), strict=True)
    return TokenLogprobs(int(host.token_id[i]), float(host.logprob[i]), tuple(top))


# XLA counts the cache once for each kernel that it is passed through, so it thinks that memory is short,
# looks in vain for values to compute again, and warns.
_KERNELS_OPTIONS: Final = {"xla_disable_hlo_passes": "rematerialization"}


class Steps:
    """The compiled steps of one model with their state on the device; one thread uses it.

    `prefill` and `decode` only launch; reading what they return waits.
    """

    def __init__(self, model: Decoder, config: ModelConfig, shapes: Shapes) -> None:
        self.config = config
        self.shapes = shapes
        self.num_slots = shapes.num_slots
        self.num_pages = shapes.num_pages
        self.page_length = shapes.page_length
        self.context_length = shapes.context_length
        self.vocab_size = config.vocab_size
        graph, state = nnx.split(model)
        self._leaves, tree = jax.tree.flatten(state)

        def jitted(function: Callable[..., Any]) -> Any:
            def call(leaves: list[Array], *args: Any) -> Any:
                return function(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), *args)

            # the profiler and the compiler's log show this name
            call.__name__ = function.__name__
            return jax.jit(call, donate_argnums=(1, 2))

        self._prefill = jitted(prefill_with_kernels if shapes.kernels else prefill)
        self._decode = jitted(decode_with_kernels if shapes.kernels else decode)
        self._executables: dict[tuple[str, int], Any] = {}
        # a function object of its own: JAX counts compilations by function, over all engines of a process
        self._admit: Any = jax.jit(partial(admit), donate_argnums=0)
        self._make_state()

    def reset(self) -> None:
        """An empty cache and idle slots, after a failed step has lost the donated ones."""
        self.free()
        self._make_state()

    def free(self) -> None:
        """Give back the memory of cache and slots; only `reset` may follow."""
        for array in jax.tree.leaves((self._cache, self._slots)):
            # a step that failed before it ran took nothing: two caches do not fit
            if not array.is_deleted():
                array.delete()

    def _make_state(self) -> None:
        shapes = self.shapes
        self._cache = KVCache.empty(self.config, shapes.num_pages, shapes.page_length, shapes.cache_dtype)
        self._slots = _idle_slots(shapes.num_slots, self.vocab_size)
        self._num_logprobs: list[int | None] = [None] * shapes.num_slots
        self._tables = np.zeros((shapes.num_slots, shapes.table_length), np.int32)
        self._device_tables = jnp.array(self._tables)
        self._active: tuple[int, ...] = ()
        self._device_active: tuple[Array, Array] | None = None

    def warm(self, progress: Callable[[float], None] = lambda _: None) -> None:
        """Compile every bucket and run it once with no real rows; before the first request only."""
        shapes = self.shapes
        buckets = [
            *(("prefill", num_tokens) for num_tokens in shapes.prefill_buckets),
            *(("decode", num_slots) for num_slots in shapes.decode_buckets),
        ]
        progress(0.0)
        with ThreadPoolExecutor(min(len(buckets), os.cpu_count() or 1)) as threads:
            compiling = [threads.submit(self._executable, *bucket) for bucket in buckets]
            for done, _ in enumerate(as_completed(compiling), start=1):
                progress(done / (len(buckets) + 1))
            for task in compiling:
                task.result()
        for kind, bucket in buckets:
            self._launch(kind, *self._idle_arguments(kind, bucket))
        self.admit(0, SamplingParams(), prompt_ids=(), generated_ids=(), seed=0)
        jax.block_until_ready(self._slots)
        progress(1.0)

    def _idle_arguments(self, kind: str, bucket: int) -> tuple[Any, Any]:
        if kind == "prefill":
            return np.zeros(bucket, np.int32), np.zeros(4, np.int32)
        return jnp.zeros(bucket, jnp.int32), jnp.int32(0)

    def _executable(self, kind: str, bucket: int) -> Any:
        """The compiled step of a bucket; compiled ahead of its call, so that buckets can be in parallel."""
        if (kind, bucket) not in self._executables:
            function = self._prefill if kind == "prefill" else self._decode
            state = self._leaves, self._cache, self._slots, self._device_tables
            lowered = function.lower(*state, *self._idle_arguments(kind, bucket))
            options = _KERNELS_OPTIONS if self.shapes.kernels else None
            self._executables[kind, bucket] = lowered.compile(compiler_options=options)
        return self._executables[kind, bucket]

    def num_compilations(self) -> int:
        """Executables that the steps hold; constant once they are warm."""
        return len(self._executables) + self._admit._cache_size()

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int],
        seed: int,
    ) -> None:
        """Prepare a slot for a request; `generated_ids` are what it sampled before it was preempted."""
        row = sampling_row(params, self.vocab_size, prompt_ids, generated_ids, seed)
        self._slots = self._admit(self._slots, np.int32(slot), row)
        self._num_logprobs[slot] = params.logprobs

    def prefill(self, step: Prefill) -> PendingTokens:
        """Launch one chunk; only the last one of a prompt has a token to read."""
        count = len(step.token_ids)
        bucket = next(size for size in self.shapes.prefill_buckets if size >= count)
        token_ids = np.zeros(bucket, np.int32)
        token_ids[:count] = step.token_ids
        self._set_pages([(step.slot, i, page) for i, page in enumerate(step.pages)])
        where = np.array([step.slot, step.start, count, step.is_last], np.int32)
        sampled = self._launch("prefill", token_ids, where)
        return PendingTokens(sampled, [self._num_logprobs[step.slot]] if step.is_last else [])

    def decode(self, step: Decode) -> PendingTokens:
        """Launch one token for each slot of the step."""
        self._set_pages(step.new_pages)
        if self._device_active is None or step.slots != self._active:
            self._active = step.slots
            bucket = next(size for size in self.shapes.decode_buckets if size >= len(step.slots))
            padded = np.zeros(bucket, np.int32)
            padded[: len(step.slots)] = step.slots
            self._device_active = jnp.asarray(padded), jnp.int32(len(step.slots))
        sampled = self._launch("decode", *self._device_active)
        return PendingTokens(sampled, [self._num_logprobs[slot] for slot in step.slots])

    def _launch(self, kind: str, rows: Any, numbers: Any) -> Sampled:
        """Run a step on token ids [T] and `where`, or on slots [b] and their count."""
        step = self._executable(kind, rows.shape[0])
        args = self._leaves, self._cache, self._slots, self._device_tables, rows, numbers
        self._cache, self._slots, sampled = step(*args)
        return sampled

    def _set_pages(self, pages: Sequence[tuple[int, int, int]]) -> None:
        changed = False
        for slot, index, page in pages:
            changed |= bool(self._tables[slot, index] != page)
            self._tables[slot, index] = page
        if changed:
            # a copy: the step may still read the array when the next page is written
            self._device_tables = jnp.array(self._tables)


def _idle_slots(num_slots: int, vocab_size: int) -> Slots:
    row = sampling_row(SamplingParams(), vocab_size, (), (), 0)
    batch = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (num_slots, *np.shape(x))).copy(), row)
    zeros = [jnp.zeros(length, jnp.int32) for length in (num_slots, num_slots, NUM_COUNTERS)]
    return Slots(zeros[0], zeros[1], batch, zeros[2])


def why_without_kernels(config: ModelConfig, cache_dtype: str | None) -> str | None:
    """Why the CUDA kernels cannot run this network on jax's default device, in one sentence, or None."""
    return ptx.unavailable() or unfit_for_kernels(config, cache_dtype)


def unfit_for_kernels(config: ModelConfig, cache_dtype: str | None) -> str | None:
    """Why the CUDA kernels cannot run this network on any device, in one sentence, or None."""
    widths = config.d_model, config.expert_width, config.num_heads * config.head_dim
    group = config.num_heads // config.num_kv_heads
    limits = {
        f"the widths {widths} must be multiples of 256": all(width % 256 == 0 for width in widths),
        f"a head must have 64 or 128 numbers, not {config.head_dim}": config.head_dim in (64, 128),
        f"at most 8 heads may share keys, not {group}": group <= 8,
        f"there may be 256 experts, not {config.num_experts}": config.num_experts <= 256,
        f"a token may have 16 experts, not {config.experts_per_token}": config.experts_per_token <= 16,
        f"the cache must be bfloat16, not {cache_dtype}": cache_dtype in (None, "bfloat16"),
    }
    broken = [limit for limit, holds in limits.items() if not holds]
    return broken[0] if broken else None


def use_compilation_cache() -> None:
    """Keep compiled steps in a directory of the user's own, unless JAX was already told where.

    A directory that cannot be made, or that others may write to, is not used; a warning says so.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        directory = private_directory("xla")
    except (OSError, RuntimeError) as error:
        logger.warning("compiled steps are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

"""Attention kernels over pages of bfloat16 keys and values, and their plain twins.

`attend_decode` serves one token of many slots, `prepare` then `attend_prefill` many tokens of one slot; a
token gets the same bits from both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmoe.config import MAX_PAGE_LENGTH, ModelConfig
from jaxmoe.kernels import ptx
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.rounding import Rounded, round_rows, rounded_shapes, rounded_values

SEGMENT_LENGTH = 128
_FILE = "attention.cu"
_THREADS = 256
_WARPS = 8
# A block's queries in prefill, all heads of a key head of so many tokens, and the segments on their way at
# once: fewer where a block has less shared memory than the largest.
_QUERY_ROWS, _STAGES = 128, 2
_FEW_QUERY_ROWS, _FEW_STAGES = 64, 1
# Of a segment's keys or values, what a block of decode has on their way or in use at once.
_BUFFERS, _FEW_BUFFERS = 3, 2
_SEGMENTS_A_PROCESSOR = 4  # to so many of a key head, parts in decode are segments, not runs

_Macros = dict[str, int | float | str]


def attend_decode(
    qkv: Array,
    q_norm: Array,
    k_norm: Array,
    cos: Array,
    sin: Array,
    active: Array,
    positions: Array,
    tables: Array,
    count: Array,
    keys: Array,
    values: Array,
    counters: Array,
    *,
    config: ModelConfig,
    layer: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """Norm, RoPE, cache write and attention of one token of each slot active[:count].

    qkv float32 [B, (N + 2K) * H]: heads of queries, keys, values. Norms [L, H]; cos and sin [S, H/2];
    positions [slots]; tables [slots, P]; keys and values bfloat16 [L, pages, page_length, K, H] and counters
    (zeros, at least B * K) are updated in place. Gives codes int8 [B, N * H] and scales float32
    [B, N * H / 32, 2], the scale and scale * sum of the codes, beside keys, values and counters; rows past
    `count` are not written.
    """
    num_rows, num_kv_heads = qkv.shape[0], config.num_kv_heads
    width = config.num_heads * config.head_dim
    macros = _macros(config, keys, tables, num_rows)
    plans = _plan(active, positions, tables, count, macros)
    assert counters.shape[0] >= num_rows * num_kv_heads
    part = config.num_heads // num_kv_heads, config.head_dim + 4
    parts = (num_rows, num_kv_heads, num_segments(keys, tables), *part)
    outputs = [*rounded_shapes(num_rows, width), *map(_shape_of, (keys, values, counters))]
    codes, scales, keys, values, counters, _ = ptx.launch(
        _FILE,
        "attend_decode",
        macros,
        (qkv, q_norm, k_norm, cos, sin, plans, tables, keys, values, counters),
        [*outputs, jax.ShapeDtypeStruct(parts, jnp.float32)],
        grid=(num_kv_heads, int(macros["DECODE_BLOCKS"]), 1),
        threads=_THREADS,
        shared_size=decode_shared_size(config, _buffers()),
        number=layer,
        aliases={7: 2, 8: 3, 9: 4},
    )
    return codes, scales, keys, values, counters


def _plan(active: Array, positions: Array, tables: Array, count: Array, macros: _Macros) -> Array:
    """What each warp of each of a key head's blocks of `attend_decode` does: `struct Plan` of attention.cu.

    It is the same in all layers: the compiler keeps one of the equal calls.
    """
    blocks = int(macros["DECODE_BLOCKS"]) + active.shape[0]
    output = jax.ShapeDtypeStruct((blocks, _WARPS, 12), jnp.int32)
    arrays = active, positions, tables, count
    return ptx.launch(_FILE, "plan_decode", macros, arrays, [output], grid=(blocks, 1, 1), threads=32)[0]


def prepare(
    qkv: Array,
    q_norm: Array,
    k_norm: Array,
    cos: Array,
    sin: Array,
    where: Array,
    tables: Array,
    keys: Array,
    values: Array,
    *,
    config: ModelConfig,
    layer: int,
) -> tuple[Array, Array, Array]:
    """Norm, RoPE and cache write of a chunk's tokens, `where` int32[4]: (slot, start, count, is_last).

    Shapes as for `attend_decode`. Gives queries bfloat16 [T, N, H], keys and values; rows past the count are
    not written.
    """
    num_rows = qkv.shape[0]
    queries = jax.ShapeDtypeStruct((num_rows, config.num_heads, config.head_dim), jnp.bfloat16)
    q, keys, values = ptx.launch(
        _FILE,
        "prepare",
        _macros(config, keys, tables),
        (qkv, q_norm, k_norm, cos, sin, where, tables, keys, values),
        [queries, _shape_of(keys), _shape_of(values)],
        grid=(num_rows, 1, 1),
        threads=_THREADS,
        number=layer,
        aliases={7: 1, 8: 2},
    )
    return q, keys, values


def attend_prefill(
    q: Array, where: Array, tables: Array, keys: Array, values: Array, *, config: ModelConfig, layer: int
) -> tuple[Array, Array]:
    """Attention of a chunk's queries [T, N, H] of `prepare` over the slot's pages, their own included.

    Gives codes int8 [T, N * H] and scales float32 [T, N * H / 32, 2]; rows past the count are not written.
    """
    num_rows, num_heads, head_dim = q.shape
    rows, _ = _query_rows()
    tokens = rows // (num_heads // config.num_kv_heads)
    codes, scales = ptx.launch(
        _FILE,
        "attend_prefill",
        _macros(config, keys, tables),
        (q, where, tables, keys, values),
        rounded_shapes(num_rows, num_heads * head_dim),
        grid=(config.num_kv_heads, -(-num_rows // tokens), 1),
        threads=2 * rows,
        shared_size=prefill_shared_size(config),
        number=layer,
    )
    return codes, scales


def decode_shared_size(config: ModelConfig, buffers: int) -> int:
    """Bytes of `DecodeShared`: keys, values, shares, queries, the token's own, highest scores, a flag."""
    row_size = 2 * config.head_dim
    rows = 8 if config.num_heads <= 8 * config.num_kv_heads else 16
    incoming = 4 * config.head_dim * (config.num_heads // config.num_kv_heads + 5)
    size = buffers * SEGMENT_LENGTH * row_size + 16 * row_size + max(16 * 2 * SEGMENT_LENGTH, incoming)
    return size + 2 * row_size + rows * 4 * _WARPS + 4


def prefill_shared_size(config: ModelConfig) -> int:
    """Bytes of `PrefillShared`: keys and values of segments, and the mix so far."""
    row_size = 2 * config.head_dim
    rows, stages = _query_rows()
    return stages * 2 * SEGMENT_LENGTH * row_size + rows * 2 * row_size


def variants(config: ModelConfig) -> Iterator[tuple[str, str, _Macros, int]]:
    """Every (file, kernel, macros, bytes of shared memory) of this network, as for a cache of usual size."""
    shape = (config.num_layers, 4096, 64, config.num_kv_heads, config.head_dim)
    keys = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    tables = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    sizes = {
        "plan_decode": 0,
        "attend_decode": decode_shared_size(config, _buffers()),
        "prepare": 0,
        "attend_prefill": prefill_shared_size(config),
    }
    for name, size in sizes.items():
        yield _FILE, name, _macros(config, keys, tables), size


def _macros(config: ModelConfig, keys: Any, tables: Any, num_rows: int = 1) -> _Macros:
    rows, stages = _query_rows()
    return cache_macros(config, keys, tables) | {
        "NUM_SEGMENTS": num_segments(keys, tables),
        "QUERY_ROWS": rows,
        "STAGES": stages,
        "BUFFERS": _buffers(),
        "DECODE_BLOCKS": max(1, _num_blocks(config, num_rows) // config.num_kv_heads),
        "MOST_SEGMENTS": max(1, _SEGMENTS_A_PROCESSOR * ptx.num_multiprocessors() // config.num_kv_heads),
    }


def _num_blocks(config: ModelConfig, num_rows: int) -> int:
    """Blocks of decode: one a multiprocessor where each row can have its own and no two meet, else two."""
    processors = ptx.num_multiprocessors()
    return processors if num_rows * config.num_kv_heads <= processors else 2 * processors


def cache_macros(config: ModelConfig, keys: Any, tables: Any) -> _Macros:
    """What attend.cuh must know of the heads and of the cache."""
    _, num_pages, page_length, num_kv_heads, head_dim = keys.shape
    assert keys.dtype == jnp.bfloat16, f"the kernels' cache is bfloat16, not {keys.dtype}"
    return {
        "NUM_HEADS": config.num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "EPS": float(config.norm_eps),
        "PAGE_LENGTH": page_length,
        "NUM_PAGES": num_pages,
        "TABLE_LENGTH": tables.shape[1],
    }


def _query_rows() -> tuple[int, int]:
    """A block's queries in prefill, and the segments on their way at once."""
    return (_QUERY_ROWS, _STAGES) if ptx.has_large_shared() else (_FEW_QUERY_ROWS, _FEW_STAGES)


def _buffers() -> int:
    return _BUFFERS if ptx.has_large_shared() else _FEW_BUFFERS


def num_segments(keys: Any, tables: Any) -> int:
    """Segments of the longest context."""
    segments, rest = divmod(tables.shape[1] * keys.shape[2], SEGMENT_LENGTH)
    assert rest == 0, "a table covers whole segments"
    return segments


def _shape_of(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# The twins. `rounded`: to bfloat16 and int8 where the kernels round; otherwise nowhere.


def decode_twin(
    qkv: Array,
    q_norm: Array,
    k_norm: Array,
    cos: Array,
    sin: Array,
    active: Array,
    positions: Array,
    tables: Array,
    count: Array,
    keys: Array,
    values: Array,
    counters: Array,
    *,
    config: ModelConfig,
    layer: int,
    rounded: bool = True,
) -> tuple[Array, Array, Array]:
    """What `attend_decode` computes, all rows being real: attention [B, N * H], one layer's keys and values.

    The attention is what codes and scales stand for.
    """
    del count, counters
    at = positions[active]
    q, k, v = _prepared(qkv, q_norm[layer], k_norm[layer], cos[at], sin[at], config)
    layer_keys, layer_values = _written((keys[layer], values[layer]), (k, v), tables[active], at, rounded)
    mixed = _attended(q, layer_keys, layer_values, tables[active], at, rounded)
    return (rounded_values(round_rows(mixed)) if rounded else mixed), layer_keys, layer_values


def prepare_twin(
    qkv: Array,
    q_norm: Array,
    k_norm: Array,
    cos: Array,
    sin: Array,
    where: Array,
    tables: Array,
    keys: Array,
    values: Array,
    *,
    config: ModelConfig,
    layer: int,
    rounded: bool = True,
) -> tuple[Array, Array, Array]:
    """What `prepare` computes, all rows being real: queries, and one layer's keys and values; float32."""
    at = where[1] + jnp.arange(qkv.shape[0], dtype=jnp.int32)
    q, k, v = _prepared(qkv, q_norm[layer], k_norm[layer], cos[at], sin[at], config)
    table = jnp.broadcast_to(tables[where[0]], (qkv.shape[0], tables.shape[1]))
    layer_keys, layer_values = _written((keys[layer], values[layer]), (k, v), table, at, rounded)
    return (_bfloat16(q) if rounded else q), layer_keys, layer_values


def prefill_twin(
    q: Array,
    where: Array,
    tables: Array,
    keys: Array,
    values: Array,
    *,
    config: ModelConfig,
    layer: int,
    rounded: bool = True,
) -> Array:
    """What `attend_prefill` computes, all rows being real: attention [T, N * H]."""
    at = where[1] + jnp.arange(q.shape[0], dtype=jnp.int32)
    table = tables[where[0]][None]
    layer_keys, layer_values = (x[layer].astype(jnp.float32) for x in (keys, values))

    # one token at a time: all of their keys side by side may not fit
    def token(row: tuple[Array, Array]) -> Array:
        q, at = row[0][None].astype(jnp.float32), row[1][None]
        return _attended(q, layer_keys, layer_values, table, at, rounded)[0]

    mixed = lax.map(token, (q, at))
    return rounded_values(round_rows(mixed)) if rounded else mixed


def _bfloat16(x: Array) -> Array:
    """float32 x, rounded to what bfloat16 holds. XLA may drop a cast to bfloat16 and back, but not this."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _prepared(
    qkv: Array, q_norm: Array, k_norm: Array, cos: Array, sin: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Queries [M, N, H], keys and values [M, K, H], float32."""
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    heads = qkv.reshape(qkv.shape[0], -1, config.head_dim)
    q, k, v = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)

    def turned(x: Array, norm: Array) -> Array:
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(mean + jnp.float32(config.norm_eps)) * norm[None, None]
        first, second = jnp.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    return turned(q, q_norm), turned(k, k_norm), v


def _written(
    pages: tuple[Array, Array], rows: tuple[Array, Array], tables: Array, positions: Array, rounded: bool
) -> tuple[Array, Array]:
    """One layer's pages [pages, page_length, K, H], float32, with a row [M, K, H] of each table [M, P]."""
    page_length = pages[0].shape[1]
    page = jnp.take_along_axis(tables, (positions // page_length)[:, None], axis=1)[:, 0]

    def put(old: Array, new: Array) -> Array:
        new = _bfloat16(new) if rounded else new
        return old.astype(jnp.float32).at[page, positions % page_length].set(new)

    return put(pages[0], rows[0]), put(pages[1], rows[1])


def _attended(q: Array, keys: Array, values: Array, tables: Array, positions: Array, rounded: bool) -> Array:
    """Attention of q [M, N, H] over the pages of `tables` [M, P] -> [M, N * H]."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[2]
    q = (_bfloat16(q) if rounded else q).reshape(num_rows, num_kv_heads, -1, head_dim)
    # [segments, M, 128, K, H]
    split = [
        x[tables].reshape(num_rows, -1, SEGMENT_LENGTH, num_kv_heads, head_dim).swapaxes(0, 1)
        for x in (keys, values)
    ]
    starts = SEGMENT_LENGTH * jnp.arange(split[0].shape[0], dtype=jnp.int32)

    def segment(carry: tuple[Array, Array, Array], part: tuple[Array, ...]) -> tuple[Any, None]:
        highest, total, mixed = carry
        seen = part[2] + jnp.arange(SEGMENT_LENGTH, dtype=jnp.int32)[None] <= positions[:, None]
        next_highest, shares, mix = _segment(q, part[0], part[1], seen, rounded)
        both = jnp.maximum(highest, next_highest)
        a, b = jnp.exp2(highest - both), jnp.exp2(next_highest - both)
        return (both, total * a + shares * b, mixed * a[..., None] + mix * b[..., None]), None

    start = (
        jnp.full(q.shape[:3], -jnp.inf, jnp.float32),
        jnp.zeros(q.shape[:3], jnp.float32),
        jnp.zeros_like(q),
    )
    (_, total, mixed), _ = lax.scan(segment, start, (*split, starts))
    return (mixed / total[..., None]).reshape(num_rows, num_heads * head_dim)


def _segment(q: Array, keys: Array, values: Array, seen: Array, rounded: bool) -> tuple[Array, Array, Array]:
    """Highest score and sum of shares [M, K, G], and the mix [M, K, G, H], of 128 keys."""
    scale = jnp.float32(math.log2(math.e) / math.sqrt(q.shape[-1]))
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    seen = seen[:, None, None]
    scores = jnp.where(seen, product("mkgh,mskh->mkgs", q, keys) * scale, -jnp.inf)
    highest = scores.max(axis=-1)
    shares = jnp.where(seen, jnp.exp2(scores - jnp.maximum(highest, jnp.float32(-1e30))[..., None]), 0)
    shares = _bfloat16(shares) if rounded else shares
    values = jnp.where(seen[:, 0, 0, :, None, None], values, 0)
    return highest, shares.sum(axis=-1), product("mkgs,mskh->mkgh", shares, values)


_LAYER = 1
_PAGE_LENGTH = 64
_NORM_WIDTH = 0.1
_DECODE_POSITIONS = ((511,), (0, 255, 256, 257, 700, 3000), (32767,))
_CHUNKS = ((0, 64), (250, 80), (700, 512))  # first position and tokens


def comparisons(config: ModelConfig, seed: int) -> Iterator[Comparison]:
    """The kernels beside their twins, at every edge that fits into the context; of pages, one layer."""
    for positions in _DECODE_POSITIONS:
        if max(positions) < config.context_length:
            yield from _decode_comparisons(config, seed, positions)
    for start, num_tokens in _CHUNKS:
        if start + num_tokens <= config.context_length:
            yield from _prefill_comparisons(config, seed, start, num_tokens)


def _decode_comparisons(config: ModelConfig, seed: int, positions: tuple[int, ...]) -> Iterator[Comparison]:
    name = f"attend_decode at {', '.join(map(str, positions))}"
    state = decode_arrays(config, seed, positions, _PAGE_LENGTH)
    twin = partial(decode_twin, config=config, layer=_LAYER)

    def kernel(*arrays: Array) -> tuple[Array, ...]:
        codes, scales, keys, values, _ = attend_decode(*arrays, config=config, layer=_LAYER)
        return rounded_values(Rounded(codes, scales)), _layer_of(keys), _layer_of(values)

    def whole(*arrays: Array) -> tuple[Array, ...]:
        return attend_decode(*arrays, config=config, layer=_LAYER)[:4]

    yield Comparison(name, kernel, twin, partial(twin, rounded=False), tuple(state.values()))
    in_prefill = partial(_token_by_token, config=config)
    yield Comparison(
        f"{name}, the bits of prefill", whole, in_prefill, None, tuple(state.values()), exact=True
    )


def _token_by_token(*arrays: Array, config: ModelConfig) -> tuple[Array, ...]:
    """What `attend_decode` gives, by `prepare` and `attend_prefill` of one token after the other."""
    qkv, q_norm, k_norm, cos, sin, active, positions, tables, _, keys, values, _ = arrays
    rows = []
    for i in range(qkv.shape[0]):
        where = jnp.stack([active[i], positions[active[i]], jnp.int32(1), jnp.int32(0)])
        weights = q_norm, k_norm, cos, sin, where, tables
        q, keys, values = prepare(qkv[i : i + 1], *weights, keys, values, config=config, layer=_LAYER)
        rows.append(attend_prefill(q, where, tables, keys, values, config=config, layer=_LAYER))
    codes, scales = zip(*rows, strict=True)
    return jnp.concatenate(codes), jnp.concatenate(scales), keys, values


def _prefill_comparisons(config: ModelConfig, seed: int, start: int, num_tokens: int) -> Iterator[Comparison]:
    state = prefill_arrays(config, seed, start, num_tokens, _PAGE_LENGTH)
    which = f"{num_tokens} tokens from {start}"

    def prepared(*arrays: Array) -> tuple[Array, ...]:
        q, keys, values = prepare(*arrays, config=config, layer=_LAYER)
        return q.astype(jnp.float32), _layer_of(keys), _layer_of(values)

    def attended(*arrays: Array) -> Array:
        return rounded_values(Rounded(*attend_prefill(*arrays, config=config, layer=_LAYER)))

    twin: Callable[..., Any] = partial(prepare_twin, config=config, layer=_LAYER)
    yield Comparison(f"prepare {which}", prepared, twin, partial(twin, rounded=False), tuple(state.values()))
    shape = (num_tokens, config.num_heads, config.head_dim)
    q = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)
    arrays = (q, *(state[name] for name in ("where", "tables", "keys", "values")))
    twin = partial(prefill_twin, config=config, layer=_LAYER)
    yield Comparison(f"attend_prefill {which}", attended, twin, partial(twin, rounded=False), arrays)


def _layer_of(pages: Array) -> Array:
    return pages[_LAYER].astype(jnp.float32)


def decode_arrays(
    config: ModelConfig, seed: int, positions: tuple[int, ...], page_length: int
) -> dict[str, Array]:
    """Random arguments of `attend_decode`, by name: a row for each position, and an idle slot."""
    rng = np.random.default_rng(seed)
    num_rows = len(positions)
    slots = rng.permutation(num_rows + 1).astype(np.int32)
    at = np.zeros(num_rows + 1, np.int32)
    at[slots[:num_rows]] = positions
    paged = _paged_arrays(config, rng, num_rows + 1, max(positions) + 1, page_length)
    return {
        **_token_arrays(config, rng, num_rows, max(positions) + 1),
        "active": jnp.asarray(slots[:num_rows]),
        "positions": jnp.asarray(at),
        "tables": paged["tables"],
        "count": jnp.full(1, num_rows, jnp.int32),
        "keys": paged["keys"],
        "values": paged["values"],
        "counters": jnp.zeros(num_rows * config.num_kv_heads, jnp.int32),
    }


def prefill_arrays(
    config: ModelConfig, seed: int, start: int, num_tokens: int, page_length: int
) -> dict[str, Array]:
    """Random arguments of `prepare`, by name: a chunk of slot 1 of 2."""
    rng = np.random.default_rng(seed)
    paged = _paged_arrays(config, rng, 2, start + num_tokens, page_length)
    where = jnp.asarray([1, start, num_tokens, 0], jnp.int32)
    tokens = _token_arrays(config, rng, num_tokens, start + num_tokens)
    return {
        **tokens,
        "where": where,
        "tables": paged["tables"],
        "keys": paged["keys"],
        "values": paged["values"],
    }


def _token_arrays(
    config: ModelConfig, rng: np.random.Generator, num_rows: int, length: int
) -> dict[str, Array]:
    """qkv, norms of _LAYER + 1 layers, and cosines and sines of any angles."""
    half = config.head_dim // 2
    angles = rng.uniform(0, 2 * math.pi, (length, half))
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    norms = 1 + _NORM_WIDTH * rng.standard_normal((2, _LAYER + 1, config.head_dim))
    found: Mapping[str, Any] = {
        "qkv": rng.standard_normal((num_rows, width)),
        "q_norm": norms[0],
        "k_norm": norms[1],
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    return {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}


def _paged_arrays(
    config: ModelConfig, rng: np.random.Generator, num_slots: int, length: int, page_length: int
) -> dict[str, Array]:
    """Tables of whole segments in any order of pages, and full pages."""
    per_slot = -(-length // MAX_PAGE_LENGTH) * MAX_PAGE_LENGTH // page_length
    tables = rng.permutation(num_slots * per_slot).reshape(num_slots, per_slot)
    shape = (_LAYER + 1, tables.size, page_length, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for _ in range(2))
    return {"tables": jnp.asarray(tables, jnp.int32), "keys": keys, "values": values}

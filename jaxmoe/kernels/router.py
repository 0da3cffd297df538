"""The router: each token's A best experts and their weights; and (token, expert) pairs grouped by expert.

The kernels are in router.cu. `counters` is int32 [NUM_COUNTERS], zero before and after each kernel that has
it, attention's too; for many rows the router uses counters[i] for the i-th tile of tokens, for few it hands
the logits' parts over there, grouping uses none. Three kernels route: one row, few rows and many; they give
the same bits. That for few also makes their norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import ptx
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.rounding import Rounded, readable, rounded_shapes
from jaxmoe.kernels.rows import norm_quantise_twin, rms_norm

FILE: Final = "router.cu"
NUM_COUNTERS: Final = 1 << 20  # attention: key heads times slots; few rows: parts of their logits
SEGMENT: Final = 256
MAX_EXPERTS: Final = 256
MAX_EXPERTS_PER_TOKEN: Final = 16
_VARIANTS: Final = (1, 8, 32, 64, 2048)
_COMPARED_ROWS: Final = (1, 3, 13, 29, 64, 300, 1100)
_COMPARED_TILES: Final = (8, 32, 64)
_THREADS: Final = 256
_ROW_EXPERTS: Final = 2
_MANY_EXPERTS, _MANY_TOKENS, _MANY_STAGES = 128, 64, 3
_MOST_FEW: Final = 1024  # rows of which one tile of route_few a block takes less time than route_many's

Defines = dict[str, int | float | str]
Variant = tuple[str, str, Defines, int]


@dataclass(frozen=True)
class _Cut:
    """How a kernel cuts the router's work: experts and tokens of a block, its macros and shared memory."""

    name: str
    experts: int
    tokens: int
    defines: Defines
    shared_size: int


def _cut(rows: int, config: ModelConfig) -> _Cut:
    if rows == 1:
        return _Cut("route_row", _ROW_EXPERTS, 1, {"ROUTE_ROW": 1}, 0)
    if makes_norms(rows, config):
        # few tokens: many small blocks, or the weights would come through too few multiprocessors
        experts, tokens, here = (16, 8, 2) if rows <= 16 else (16, 16, 4) if rows <= 32 else (32, 16, 8)
        defines: Defines = {"ROUTE_FEW": 1, "TILE_E": experts, "TILE_T": tokens, "NE": 4, "NT": here}
        return _Cut("route_few", experts, tokens, defines, (experts + tokens) * (SEGMENT // 4 + 1) * 16)
    size = _MANY_STAGES * (_MANY_EXPERTS + _MANY_TOKENS) * 9 * 16
    return _Cut("route_many", _MANY_EXPERTS, _MANY_TOKENS, {"ROUTE_MANY": 1}, size)


class Routed(NamedTuple):
    """Ids int32 and weights [T, A] of the experts, the counters, and the norm of the rows.

    `inputs` and `zeros`, int32 for what follows to count in, are there of few rows only.
    """

    ids: Array
    weights: Array
    counters: Array
    inputs: Rounded | None = None
    zeros: Array | None = None


def makes_norms(rows: int, config: ModelConfig) -> bool:
    """Whether `route` also gives the norm of so many rows."""
    parts = rows * config.num_experts * (config.d_model // SEGMENT)
    return 1 < rows <= _MOST_FEW and parts <= NUM_COUNTERS


def route(
    x: Array,
    norm: Array,
    w: Array,
    count: Array,
    counters: Array,
    *,
    config: ModelConfig,
    layer: int,
    index: int,
    num_zeros: int = 1,
) -> Routed:
    """The A best experts of the first `count` rows and their weights.

    x [T, D], norm [L, D] (of which `layer` is used), w [n, E, D] (of which `index` is used), all float32;
    count int32 [1]. Ties go to the lower id. Rows from `count` on are left as they are found.
    """
    rows, width = x.shape
    name, defines, grid, shared_size = _route_launch(rows, norm.shape[0], config, num_zeros)
    shapes = [
        jax.ShapeDtypeStruct((rows, config.experts_per_token), jnp.int32),
        jax.ShapeDtypeStruct((rows, config.experts_per_token), jnp.float32),
        jax.ShapeDtypeStruct(counters.shape, jnp.int32),
    ]
    if makes_norms(rows, config):
        shapes += [*rounded_shapes(rows, width), jax.ShapeDtypeStruct((num_zeros,), jnp.int32)]
    else:
        shapes.append(jax.ShapeDtypeStruct((rows, _num_sums(config)), jnp.float32))
    ids, weights, counters, *rest = ptx.launch(
        FILE,
        name,
        defines,
        (x, norm, w, count, counters),
        shapes,
        grid=grid,
        threads=_THREADS,
        shared_size=shared_size,
        number=index * norm.shape[0] + layer,
        aliases={4: 2},
    )
    if len(rest) == 1:
        return Routed(ids, weights, counters)
    codes, scales, zeros = rest
    return Routed(ids, weights, counters, Rounded(codes, scales), zeros)


def _num_sums(config: ModelConfig) -> int:
    """Floats that blocks leave of a token for the last one: pairs of segments of logits, sums of squares."""
    num_segments = config.d_model // SEGMENT
    return -(-(-(-num_segments // 2) * config.num_experts + num_segments) // 4) * 4


def _route_launch(
    rows: int, num_norms: int, config: ModelConfig, num_zeros: int = 1
) -> tuple[str, Defines, tuple[int, int, int], int]:
    """Name, macros, grid and shared size of the router's kernel for this many rows."""
    assert config.d_model % SEGMENT == 0, f"rows of {config.d_model} columns are no whole segments"
    _check_experts(config)
    defines: Defines = {
        "D": config.d_model,
        "E": config.num_experts,
        "A": config.experts_per_token,
        "NORMS": num_norms,
        "EPS": float(config.norm_eps),
    }
    cut = _cut(rows, config)
    expert_tiles, token_tiles = -(-config.num_experts // cut.experts), -(-rows // cut.tokens)
    assert token_tiles <= NUM_COUNTERS, f"{rows} rows are more than the router takes"
    defines |= cut.defines
    if rows == 1:
        return cut.name, defines, (expert_tiles, 1, 1), 0
    defines["REST"] = rows - (token_tiles - 1) * cut.tokens
    num_segments = config.d_model // SEGMENT
    if makes_norms(rows, config):
        defines["ZEROS"] = num_zeros
        depth = num_segments + -(-cut.tokens // expert_tiles)  # the blocks that choose
    else:
        depth = -(-num_segments // 2)
    return cut.name, defines, (expert_tiles, token_tiles, depth), cut.shared_size


def _check_experts(config: ModelConfig) -> None:
    experts, per_token = config.num_experts, config.experts_per_token
    assert experts <= MAX_EXPERTS, f"the router takes {MAX_EXPERTS} experts, not {experts}"
    assert per_token <= MAX_EXPERTS_PER_TOKEN, f"the router chooses {MAX_EXPERTS_PER_TOKEN}, not {per_token}"


def max_tiles(rows: int, config: ModelConfig, tile: int) -> int:
    """How many tiles of `tile` pairs the pairs of so many rows can need."""
    num_pairs = rows * config.experts_per_token
    return min(num_pairs, config.num_experts) + num_pairs // tile + 1


def group(
    ids: Array, count: Array, counters: Array, *, config: ModelConfig, tile: int
) -> tuple[Array, Array, Array, Array]:
    """Pairs p = t*A + j of the first `count` rows of ids int32 [T, A], sorted by expert and cut into tiles.

    -> pairs int32 [E, T] (each expert's, ascending), tiles int32 [max_tiles, 4] (expert, first place in its
    pairs, number of pairs, 0; experts and places ascending; zeros past the last), number of tiles int32 [1],
    counters. What lies past the pairs is left as it is found.
    """
    rows = ids.shape[0]
    shapes = ((config.num_experts, rows), (max_tiles(rows, config, tile), 4), (1,))
    pairs, tiles, num_tiles = ptx.launch(
        FILE,
        "group",
        _group_defines(rows, config, tile),
        (ids, count),
        tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
        grid=(config.num_experts, 1, 1),
        threads=256,
    )
    return pairs, tiles, num_tiles, counters


def _group_defines(rows: int, config: ModelConfig, tile: int) -> Defines:
    _check_experts(config)
    return {"E": config.num_experts, "A": config.experts_per_token, "ROWS": rows, "TILE": tile}


def route_logits(logits: Array, experts_per_token: int) -> tuple[Array, Array]:
    """Softmax over all experts, the A largest, renormalised, in plain jax."""
    weights, ids = lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    return ids.astype(jnp.int32), weights / jnp.sum(weights, axis=-1, keepdims=True)


def route_twin(
    x: Array,
    norm: Array,
    w: Array,
    count: Array,
    counters: Array,
    *,
    config: ModelConfig,
    layer: int,
    index: int,
) -> tuple[Array, Array, Array]:
    """What route gives, of all rows, in plain jnp."""
    inputs = rms_norm(x, norm[layer], config.norm_eps)
    logits = jnp.matmul(inputs, w[index].T, precision=jax.lax.Precision.HIGHEST)
    return (*route_logits(logits, config.experts_per_token), counters)


def group_twin(
    ids: Array, count: Array, counters: Array, *, config: ModelConfig, tile: int
) -> tuple[Array, Array, Array, Array]:
    """What group gives, with zeros where that writes nothing, in plain jnp."""
    rows, per_token = ids.shape
    experts = jnp.arange(config.num_experts, dtype=jnp.int32)
    numbers = jnp.arange(rows * per_token, dtype=jnp.int32)
    mine = (ids.reshape(1, -1) == experts[:, None]) & (numbers < count[0] * per_token)[None]
    places = jnp.where(mine, jnp.cumsum(mine, axis=1) - 1, rows)
    pairs = jnp.zeros((config.num_experts, rows), jnp.int32)
    pairs = pairs.at[experts[:, None], places].set(numbers[None], mode="drop")
    sizes = jnp.sum(mine, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum((sizes + (tile - 1)) // tile)
    number = jnp.arange(max_tiles(rows, config, tile), dtype=jnp.int32)
    expert = jnp.minimum(
        jnp.searchsorted(ends, number, side="right").astype(jnp.int32), config.num_experts - 1
    )
    first = (number - (ends - (sizes + (tile - 1)) // tile)[expert]) * tile
    columns = (expert, first, jnp.minimum(sizes[expert] - first, tile), jnp.zeros_like(first))
    tiles = jnp.where(number[:, None] < ends[-1], jnp.stack(columns, axis=1), 0)
    return pairs, tiles, ends[-1:], counters


def variants(config: ModelConfig) -> Iterator[Variant]:
    """The kernels of a model, for compiling without a GPU: (file, name, macros, shared size)."""
    for rows in _VARIANTS:
        name, defines, _, shared_size = _route_launch(rows, config.num_layers, config)
        yield FILE, name, defines, shared_size
    for rows, tile in ((1, 8), (64, 8), (64, 32), (2048, 64)):
        yield FILE, "group", _group_defines(rows, config, tile), 0


def comparisons(config: ModelConfig, seed: int) -> Iterator[Comparison]:
    """The router on random rows, and the grouping of random ids, for one row, few and many."""
    rng = np.random.default_rng(seed)
    for rows in _COMPARED_ROWS:
        yield _route_comparison(config, rng, rows)
    for rows, tile in zip((3, 64, 2048), _COMPARED_TILES, strict=True):
        yield _group_comparison(config, rng, rows, tile)


def _route_comparison(config: ModelConfig, rng: np.random.Generator, rows: int) -> Comparison:
    layer, index = config.num_layers - 1, 1

    def kernel(*arrays: Array) -> tuple[Array, ...]:
        routed = route(*arrays, config=config, layer=layer, index=index)
        if routed.inputs is None or routed.zeros is None:
            return routed[:3]
        return (*routed[:3], *readable(routed.inputs), routed.zeros)

    def twin(x: Array, norm: Array, w: Array, count: Array, counters: Array) -> tuple[Array, ...]:
        routed = route_twin(x, norm, w, count, counters, config=config, layer=layer, index=index)
        if not makes_norms(rows, config):
            return routed
        normed = norm_quantise_twin(x, norm, count, eps=config.norm_eps, layer=layer)
        return (*routed, *readable(Rounded(*normed)), jnp.zeros(1, jnp.int32))

    def random(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    x, w = random(rows, config.d_model), random(2, config.num_experts, config.d_model)
    norm = random(config.num_layers, config.d_model)
    scaled = w * jnp.float32(config.d_model**-0.5)
    return Comparison(f"route, {rows} rows", kernel, twin, None, (x, norm, scaled, _count(rows), _counters()))


def _group_comparison(config: ModelConfig, rng: np.random.Generator, rows: int, tile: int) -> Comparison:
    def kernel(*arrays: Array) -> tuple[Array, ...]:
        return _written(*group(*arrays, config=config, tile=tile))

    def twin(*arrays: Array) -> tuple[Array, ...]:
        return _written(*group_twin(*arrays, config=config, tile=tile))

    order = rng.random((rows, config.num_experts)).argsort(axis=1)
    ids = jnp.asarray(order[:, : config.experts_per_token], jnp.int32)
    arrays = (ids, _count(rows - rows // 3), _counters())
    return Comparison(f"group, {rows} rows, tiles of {tile}", kernel, twin, None, arrays, exact=True)


def _written(pairs: Array, tiles: Array, num_tiles: Array, counters: Array) -> tuple[Array, ...]:
    """The results with zeros where the kernel writes nothing."""
    sizes = jnp.zeros(pairs.shape[0], jnp.int32).at[tiles[:, 0]].add(tiles[:, 2])
    is_pair = jnp.arange(pairs.shape[1], dtype=jnp.int32)[None] < sizes[:, None]
    return jnp.where(is_pair, pairs, 0), tiles, num_tiles, counters


def _count(rows: int) -> Array:
    return jnp.asarray([rows], jnp.int32)


def _counters() -> Array:
    return jnp.zeros(NUM_COUNTERS, jnp.int32)

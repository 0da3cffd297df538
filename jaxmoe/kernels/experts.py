"""The experts of few rows, gate_up and down, in one launch: the wrapper of experts.cu and its plain twin.

All blocks of the launch run at once, and those that make a tile's hidden rows tell those that read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import matmul, packed, ptx, router
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.matmul import FEW_ROWS, FEW_TILE, Defines, Launch, Variant
from jaxmoe.kernels.rounding import Rounded, round_rows, rounded_shapes, rounded_values
from jaxmoe.quants import QuantTensor

FILE = "experts.cu"
_MOST_WARPS = 20  # with one more they would have fewer than 96 registers
_MOST_UNITS = 16  # of 16 rows and a segment, that are multiplied at once
_PARTIAL = 16 * (FEW_TILE + 1) * 4  # bytes of the sums of one
_VARIANTS = (8, 64)
_COMPARED_ROWS = (2, 8, 64)


def takes(num_rows: int) -> bool:
    """Whether this launch is the one for so many rows."""
    return matmul.tile_length(num_rows) == FEW_TILE


def num_progress(num_rows: int, config: ModelConfig) -> int:
    """How many numbers of `progress` a step of so many rows has."""
    return router.max_tiles(num_rows, config, FEW_TILE)


def run(
    inputs: Rounded,
    ids: Array,
    count: Array,
    progress: Array,
    weights: Sequence[QuantTensor],
    *,
    config: ModelConfig,
    index: int = 0,
    down_index: int = 0,
) -> tuple[Rounded, Array]:
    """silu(gate) * up of each (row, expert) pair, rounded, and the experts' outputs float32 [T*A, D].

    `inputs` [T, D]; ids int32 [T, A], of which a row's differ; count int32 [1]: the real rows; `progress`
    int32 zeros, `num_progress` of them; `weights` are gate and up [n, E, F, D] at `index`, and down
    [m, E, D, F] at `down_index`. Pairs of rows from `count` on are left as they are. Raises KernelError.
    """
    if not ptx.knows_multiprocessors():  # all blocks must run at once
        raise ptx.KernelError("the device does not say how many multiprocessors it has")
    num_rows, active = ids.shape
    lists: Sequence[Array] = (ids, count)
    if num_rows > FEW_ROWS:
        counters = jnp.zeros(router.NUM_COUNTERS, jnp.int32)
        lists = router.group(ids, count, counters, config=config, tile=FEW_TILE)[:3]
    arrays = [*inputs, *lists, *(array for w in weights for array in packed.pointers(w)), progress]
    outputs = [
        *rounded_shapes(num_rows * active, weights[2].shape[-1]),
        jax.ShapeDtypeStruct((num_rows * active, weights[2].shape[-2]), jnp.float32),
        jax.ShapeDtypeStruct(progress.shape, progress.dtype),
    ]
    number = index * weights[2].shape[0] + down_index
    launch = _launch(num_rows, weights, config)
    codes, scales, y, _ = launch(arrays, outputs, number, aliases={len(arrays) - 1: 3})
    return Rounded(codes, scales), y


def _launch(num_rows: int, weights: Sequence[QuantTensor], config: ModelConfig) -> Launch:
    gate, up, down = weights
    segments, down_segments = gate.shape[-1] // packed.SEGMENT, down.shape[-1] // packed.SEGMENT
    row_tiles = max(n for n in (1, 2, 4, 8) if n * down_segments <= _MOST_UNITS or n == 1)
    num_units = max(2 * segments, row_tiles * down_segments)
    multiplying = min(num_units, _MOST_UNITS)
    copying = [_copying_warps(some, _MOST_WARPS - multiplying - 1) for some in ((gate, up), (down,))]
    fixed = _fixed_size(num_rows, num_units, config)
    pair, rows = sum(packed.shared_rows_size(w, 16, 16) for w in (gate, up)), 16 * row_tiles
    first = _stages(fixed, pair, segments, gate.shape[-2] // 16)
    second = _stages(fixed, packed.shared_rows_size(down, rows, 32), down_segments, down.shape[-2] // rows)
    defines: Defines = {
        "K": gate.shape[-1], "INNER": down.shape[-1], "MATRICES": config.num_experts,
        "ACTIVE": config.experts_per_token, "NUM_ROWS": num_rows, "DOWNS": down.shape[0], "NORMS": 1,
        "BLOCKS": ptx.num_multiprocessors(),
        "THREADS": 32 * (multiplying + max(copying) + 1), "COPYING": max(copying),
        "GATE_UP_COPYING": copying[0], "DOWN_COPYING": copying[1], "GATE_UP_STAGES": first[0],
        "DOWN_STAGES": second[0], "ROW_TILES": row_tiles,
    }  # fmt: skip
    defines |= {f"FORMAT_{i}": packed.format_macro(w) for i, w in enumerate(weights)}
    if num_rows > FEW_ROWS:
        defines["LISTED"] = 1
    return Launch(FILE, "experts", defines, (int(defines["BLOCKS"]), 1, 1), max(first[1], second[1]))


def _fixed_size(num_rows: int, num_units: int, config: ModelConfig) -> int:
    """Bytes of shared memory before the stages: sums of two steps, and the tiles."""
    size = max(2 * num_units * _PARTIAL, 12 * config.num_experts)
    if num_rows > FEW_ROWS:
        return size
    pairs = -(-2 * num_rows * config.experts_per_token // 4) * 4
    return -(-(size + pairs + 4 * num_progress(num_rows, config)) // 16) * 16


def _stages(fixed: int, stage: int, segments: int, num_steps: int) -> tuple[int, int]:
    """Steps of a product that are kept, as many as fit, and the shared memory up to their end."""
    fixed += 2 * segments * FEW_TILE * (packed.SEGMENT + 32 + 80)
    limit = ptx.shared_limit() - matmul._STATIC_SIZE
    fitting = [n for n in (5, 4, 3, 2) if n <= num_steps + 1 and n * stage + fixed <= limit]
    if not fitting:
        raise ptx.KernelError(
            f"a step of the experts takes {2 * stage + fixed} bytes of shared memory, "
            f"the GPU has {ptx.shared_limit()}"
        )
    return fitting[0], fitting[0] * stage + fixed


def _copying_warps(weights: Sequence[QuantTensor], most: int) -> int:
    """Warps that copy: where they take whole rows at a time, addresses cost the least."""
    pieces = [w.shape[-1] * packed.code_bits(w) // 128 for w in weights]
    fitting = [n for n in (4, 3, 2) if n <= most]
    return next((n for n in fitting if not any(32 * n % count for count in pieces)), fitting[0])


# --- The twin, what is compiled and compared without a model.


def twin(
    x: Array, ids: Array, weights: Sequence[QuantTensor], *, index: int = 0, down_index: int = 0
) -> tuple[Array, Array]:
    """silu(gate) * up and the experts' outputs, as `run` gives them, of activations x [T, D] not rounded."""
    gate, up, down = weights
    h = matmul.gate_up_twin(x, gate, up, ids, index=index)
    return h, matmul.down_twin(h, down, ids, index=down_index)


_Q4, _Q6 = GGMLType.Q4_K, GGMLType.Q6_K


def _absent(config: ModelConfig, down: GGMLType) -> list[QuantTensor]:
    """Weights without their numbers; none where the kernels cannot read one of them."""
    wide, narrow = matmul._expert_shapes(config)
    return packed.absent_weights((_Q4, _Q4, down), (wide, wide, narrow))


def variants(config: ModelConfig) -> Iterator[Variant]:
    """The kernels of a model, for compiling without a GPU: (file, name, macros, shared size)."""
    for num_rows in _VARIANTS:
        for kind in (_Q4, _Q6):
            if weights := _absent(config, kind):
                launch = _launch(num_rows, weights, config)
                yield launch.file, launch.name, launch.defines, launch.shared_size


def comparisons(config: ModelConfig, seed: int) -> Iterator[Comparison]:
    """The experts of random rows on random weights; what is rounded is compared as values and sums of 32."""
    rng = np.random.default_rng(seed)
    for kind in (_Q4, _Q6):
        weights = _absent(config, kind)
        if not weights:
            continue
        fields = packed.random_weights(rng, weights)
        for num_rows in _COMPARED_ROWS:
            (x,) = matmul._random_rows(rng, (num_rows, config.d_model))
            ids, count = matmul._random_ids(rng, num_rows, config), jnp.asarray([num_rows], jnp.int32)
            title = f"experts, {num_rows} rows, {kind.name}"
            yield _comparison(title, config, weights, (fields, x, ids, count))


def _comparison(
    title: str, config: ModelConfig, absent: Sequence[QuantTensor], arrays: tuple[Any, ...]
) -> Comparison:
    places: Any = {"index": matmul._AT, "down_index": matmul._AT}

    def kernel(fields: packed.Fields, x: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        weights, progress = packed.with_fields(absent, fields), _progress(x.shape[0], config)
        hidden, y = run(round_rows(x), ids, count, progress, weights, config=config, **places)
        return (*matmul._readable(hidden), y)

    def rounded_twin(fields: packed.Fields, x: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        weights = packed.with_fields(absent, fields)
        h, _ = twin(rounded_values(round_rows(x)), ids, weights, **places)
        hidden = round_rows(h)
        y = matmul.down_twin(rounded_values(hidden), weights[2], ids, index=matmul._AT)
        return (*matmul._readable(hidden), y)

    def float_twin(fields: packed.Fields, x: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        h, y = twin(x, ids, packed.with_fields(absent, fields), **places)
        return h, jnp.sum(h.reshape(h.shape[0], -1, 32), axis=-1), y

    return Comparison(title, kernel, rounded_twin, float_twin, arrays)


def _progress(num_rows: int, config: ModelConfig) -> Array:
    return jnp.zeros(num_progress(num_rows, config), jnp.int32)

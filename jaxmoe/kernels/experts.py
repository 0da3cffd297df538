"""The experts of few rows, gate_up and down, in one launch: the wrapper of experts.cu and its plain twin.

All blocks of the launch run at once, and those that make a tile's hidden rows tell those that read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import matmul, packed, ptx, router
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.matmul import FEW_ROWS, FEW_TILE, Defines, Launch, Variant
from jaxmoe.kernels.rounding import Rounded, readable, round_rows, rounded_shapes, rounded_values
from jaxmoe.quants import QuantTensor

FILE = "experts.cu"
_MOST_MULTIPLYING = 16  # warps
_OTHER_WARPS = 4  # that finish and fetch; with more than 20 in all they would have fewer than 96 registers
_ROW_TILES = (1, 2, 4, 8)  # of 16 rows, of a step of down
_STAGES = (6, 5, 4, 3, 2, 0)  # steps of a product that are kept; 0: it does not fit
_SUMS = (3, 2)  # steps of gate_up and of down whose sums are kept, at least
_MOST_SUMS = 4
_COUNTERS = 2  # behind the tiles' progress: what blocks have taken of gate_up and of down
_PARTIAL = FEW_TILE * (16 + 4) * 4  # bytes of a partial: the sums of 16 rows and a segment
_VARIANTS = (8, 64)
_COMPARED_ROWS = (2, 8, 64)


def takes(num_rows: int) -> bool:
    """Whether this launch is the one for so many rows."""
    return matmul.tile_length(num_rows) == FEW_TILE


def num_progress(num_rows: int, config: ModelConfig) -> int:
    """How many numbers of `progress` a step of so many rows has."""
    return router.max_tiles(num_rows, config, FEW_TILE) + _COUNTERS


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
    gate, _, down = weights
    steps = _steps(num_rows, weights, config)
    partials = _num_partials(steps.row_tiles, weights)
    # a warp's units, of two partials, lie no further apart than the stages
    most = min(steps.gate_up * partials[0] // 2, steps.down * partials[1] // min(steps.row_tiles, 2))
    warps = min(max(partials), _MOST_MULTIPLYING, most) + _OTHER_WARPS
    defines: Defines = {
        "K": gate.shape[-1], "INNER": down.shape[-1], "MATRICES": config.num_experts,
        "ACTIVE": config.experts_per_token, "NUM_ROWS": num_rows, "DOWNS": down.shape[0], "NORMS": 1,
        "BLOCKS": ptx.num_multiprocessors(), "THREADS": 32 * warps, "GATE_UP_STAGES": steps.gate_up,
        "DOWN_STAGES": steps.down, "ROW_TILES": steps.row_tiles, "DOWN_INPUTS": steps.inputs,
    }  # fmt: skip
    kept = _kept_partials(steps.row_tiles, weights)
    for name, n in zip(("GATE_UP", "DOWN"), partials, strict=True):
        defines[f"{name}_SUMS"] = min(kept // n, _MOST_SUMS)
    defines |= {f"FORMAT_{i}": packed.format_macro(w) for i, w in enumerate(weights)}
    if num_rows > FEW_ROWS:
        defines["LISTED"] = 1
    return Launch(FILE, "experts", defines, (int(defines["BLOCKS"]), 1, 1), steps.shared_size)


class _Steps(NamedTuple):
    """Tiles of rows of a step of down, the stages of gate_up and of down, and the shared memory they take.

    `inputs` are the tiles whose inputs down keeps.
    """

    row_tiles: int
    gate_up: int
    down: int
    inputs: int
    shared_size: int


def _steps(num_rows: int, weights: Sequence[QuantTensor], config: ModelConfig) -> _Steps:
    """As many tiles a step as do well: one has its costs however much it multiplies.

    That is a partial for each warp, or two where three such steps and as many of gate_up as ever fit in.
    """
    all_steps = [_steps_of(row_tiles, num_rows, weights, config) for row_tiles in _ROW_TILES]
    first = all_steps[0]
    if not min(first.gate_up, first.down):
        raise ptx.KernelError(
            f"a step of the experts takes {first.shared_size} bytes of shared memory, "
            f"the GPU has {ptx.shared_limit()}"
        )
    best = first
    for steps in all_steps:
        turns = -(-steps.row_tiles * _segments(weights[2]) // _MOST_MULTIPLYING)
        if turns <= 2 and steps.gate_up == first.gate_up and steps.down > turns:
            best = steps
    return best


def _steps_of(row_tiles: int, num_rows: int, weights: Sequence[QuantTensor], config: ModelConfig) -> _Steps:
    """The stages that fit, and the shared memory of them, or of the fewest there may be."""
    gate, up, down = weights
    # the launch number is handed over as so many bytes more
    limit = ptx.shared_limit() - matmul.STATIC_SIZE - gate.shape[0] * down.shape[0]
    before = _fixed_size(num_rows, _kept_partials(row_tiles, weights), config)

    def fitting(w: QuantTensor, step: int, inputs: int) -> tuple[int, int, int]:
        """Stages, tiles of inputs and bytes."""
        fixed = before + inputs * FEW_TILE * (_segments(w) * (packed.SEGMENT + 64) + 32)
        stages = next(n for n in _STAGES if n * step + fixed <= limit or n == 0)
        return stages, inputs, max(stages, 2) * step + fixed

    gate_up, _, size = fitting(gate, _tile_size(gate, 16) + _tile_size(up, 16), 2)
    # a third tile's inputs where it takes no stage's place: steps from the counter are of other tiles each
    step = _tile_size(down, 16 * row_tiles)
    stages, inputs, down_size = max(
        (fitting(down, step, inputs) for inputs in (2, 3)), key=lambda found: found[:2]
    )
    return _Steps(row_tiles, gate_up, stages, inputs, max(size, down_size))


def _segments(w: QuantTensor) -> int:
    return w.shape[-1] // packed.SEGMENT


def _num_partials(row_tiles: int, weights: Sequence[QuantTensor]) -> tuple[int, int]:
    """Of gate_up and of down: partials of a step."""
    return 2 * _segments(weights[0]), row_tiles * _segments(weights[2])


def _kept_partials(row_tiles: int, weights: Sequence[QuantTensor]) -> int:
    return max(n * kept for n, kept in zip(_num_partials(row_tiles, weights), _SUMS, strict=True))


def _fixed_size(num_rows: int, num_partials: int, config: ModelConfig) -> int:
    """Bytes of shared memory before the stages: sums of some steps, and the tiles."""
    size = max(num_partials * _PARTIAL, 12 * config.num_experts)
    if num_rows <= FEW_ROWS:
        pairs = -(-2 * num_rows * config.experts_per_token // 4) * 4
        size += pairs + 4 * router.max_tiles(num_rows, config, FEW_TILE)
    return -(-size // 128) * 128


def _tile_size(w: QuantTensor, num_rows: int) -> int:
    """Bytes of `num_rows` rows of a weight in shared memory: TileRows of experts.cu."""
    size = packed.SEGMENT * packed.code_bits(w) // 8
    size += 0 if w.s is None else 16 if w.group == 16 else 8
    size += 0 if w.m is None else 8
    size += sum(packed.SEGMENT // w.block * d.dtype.itemsize for d in (w.d, w.d_m) if d is not None)
    return -(-num_rows * _segments(w) * size // 128) * 128


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
    wide, narrow = matmul.expert_shapes(config)
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
            (x,) = matmul.random_rows(rng, (num_rows, config.d_model))
            ids, count = matmul.random_ids(rng, num_rows, config), jnp.asarray([num_rows], jnp.int32)
            title = f"experts, {num_rows} rows, {kind.name}"
            yield _comparison(title, config, weights, (fields, x, ids, count))


def _comparison(
    title: str, config: ModelConfig, absent: Sequence[QuantTensor], arrays: tuple[Any, ...]
) -> Comparison:
    places: Any = {"index": matmul.COMPARED_AT, "down_index": matmul.COMPARED_AT}

    def kernel(fields: packed.Fields, x: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        weights, progress = packed.with_fields(absent, fields), _progress(x.shape[0], config)
        hidden, y = run(round_rows(x), ids, count, progress, weights, config=config, **places)
        return (*readable(hidden), y)

    def rounded_twin(fields: packed.Fields, x: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        weights = packed.with_fields(absent, fields)
        h, _ = twin(rounded_values(round_rows(x)), ids, weights, **places)
        hidden = round_rows(h)
        y = matmul.down_twin(rounded_values(hidden), weights[2], ids, index=matmul.COMPARED_AT)
        return (*readable(hidden), y)

    def float_twin(fields: packed.Fields, x: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        h, y = twin(x, ids, packed.with_fields(absent, fields), **places)
        return h, jnp.sum(h.reshape(h.shape[0], -1, 32), axis=-1), y

    return Comparison(title, kernel, rounded_twin, float_twin, arrays)


def _progress(num_rows: int, config: ModelConfig) -> Array:
    return jnp.zeros(num_progress(num_rows, config), jnp.int32)

"""Products of packed weights with rounded activations: the wrappers of matmul_*.cu, and their plain twins.

Activations are `codes` int8 [T, K] and `scales` float32 [T, K/32, 2], (scale, scale * sum of the 32 codes).
With one row the products take the row itself and its norm instead: the kernel norms and rounds on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array, lax

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import ptx, router
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.packed import (
    SEGMENT,
    Fields,
    absent_weights,
    code_bits,
    format_macro,
    has_row_kernels,
    pointers,
    random_weights,
    shared_rows_size,
    with_fields,
)
from jaxmoe.kernels.rounding import Rounded, readable, round_rows, rounded_shapes, rounded_values
from jaxmoe.kernels.rows import norm_quantise_twin, rms_norm
from jaxmoe.quants import QuantTensor, dequantise

FEW_ROWS = 64  # up to here a block has all segments of its weights at once, above it one after the other
FEW_TILE, MANY_TILE = 8, 64  # pairs of one expert that are multiplied together
_ROW, _DENSE, _MANY = "matmul_row.cu", "matmul_dense.cu", "matmul_many.cu"
_MANY_THREADS = 128
_MANY_FACTORS = 8192  # bytes of the scales of its weights
_MANY_BLOCKS = 264  # that run at once: two on each of the 132 multiprocessors of an H200
_MANY_OUTPUTS = 16384  # from so many on a warp streams its rows, and that for many rows has blocks enough
_HALF_ROWS = 64
_DENSE_WARPS = 24  # the most of a dense product of few rows
_WIDE_WARPS = 8  # enough of them where each has many tiles
_STREAM_WARPS = 16  # of one of very many outputs; half of them for 64 rows, which need the registers
_ROW_STATIC_SIZE = 24 << 10  # of a one-row product: the inputs and the sums
STATIC_SIZE = 4096  # more than what kernels declare beside the dynamic shared memory, and the launch number

_DENSE_VARIANTS = (1, 8, 16, 32, 64, 2048)
_COMPARED_ROWS = (1, 8, 64, 300)
_STACK, COMPARED_AT = 2, 1  # of the random weights: how many layers, and which is multiplied


Defines = dict[str, int | float | str]
Variant = tuple[str, str, Defines, int]


class Launch(NamedTuple):
    """A kernel, its macros, its blocks and its bytes of shared memory."""

    file: str
    name: str
    defines: Defines
    grid: tuple[int, int, int]
    shared_size: int

    def __call__(
        self,
        arrays: Sequence[Array],
        outputs: Sequence[jax.ShapeDtypeStruct],
        number: int,
        aliases: Mapping[int, int] | None = None,
    ) -> tuple[Array, ...]:
        """Run it, with the launch number. Raises KernelError where the GPU has too little shared memory."""
        size = self.shared_size + number + (_ROW_STATIC_SIZE if self.file == _ROW else STATIC_SIZE)
        if size > ptx.shared_limit():
            raise ptx.KernelError(
                f"{self.name} takes {size} bytes of shared memory with these weights, "
                f"the GPU has {ptx.shared_limit()}"
            )
        return ptx.launch(
            self.file, self.name, self.defines, arrays, outputs, grid=self.grid,
            threads=int(self.defines["THREADS"]), shared_size=self.shared_size, number=number,
            aliases=aliases,
        )  # fmt: skip


class Row(NamedTuple):
    """One row [1, D] before its norm, norm weights [L, D] and which of them is meant."""

    x: Array
    norm: Array
    layer: int
    eps: float


class Groups(NamedTuple):
    """The pairs (row, expert) by expert: see `router.group`."""

    pairs: Array
    tiles: Array
    num_tiles: Array


def tile_length(num_rows: int) -> int:
    """Pairs of a tile for a step of that many rows."""
    return FEW_TILE if _is_few(num_rows) else MANY_TILE


def _is_few(num_rows: int) -> bool:
    return num_rows <= FEW_ROWS or not _has_many()


def _has_many() -> bool:
    # the kernel for many rows takes more shared memory than the smaller GPUs have
    return ptx.shared_limit() > ptx.SMALL_SHARED


def _takes_many(num_rows: int, weights: Sequence[QuantTensor]) -> bool:
    """Whether a dense product is one for many rows; that kernel multiplies 64 rows of a weight at a time."""
    if any(w.shape[-2] % _HALF_ROWS for w in weights):
        return False
    least = 16 if sum(w.shape[-2] for w in weights) >= _MANY_OUTPUTS else FEW_ROWS
    return num_rows > least and _has_many()


def _stage_size(weights: Sequence[QuantTensor], columns: int) -> int:
    """Shared memory of a step of the kernel for many rows: half a segment of rows and of columns."""
    halves = weights if len(weights) == 2 else [max(weights, key=code_bits)] * 2
    codes = sum(_HALF_ROWS * (SEGMENT // 2 * code_bits(w) // 8 + 16) for w in halves)
    return codes + columns * (SEGMENT // 2 + 16 + 48)


def _weights(weights: Sequence[QuantTensor]) -> Defines:
    rows = [w.shape[-2] for w in weights] + [0, 0]
    macros: Defines = {f"ROWS_{i}": rows[i] for i in range(3)}
    macros |= {f"FORMAT_{i}": format_macro(w) for i, w in enumerate(weights)}
    return macros | {"K": weights[0].shape[-1], "MATRICES": prod(weights[0].codes.shape[1:-2])}


def _many(weights: Sequence[QuantTensor], columns: int = MANY_TILE) -> tuple[Defines, int]:
    stage, half = _stage_size(weights, columns), (ptx.shared_limit() + 1024) // 2 - 2048
    stages = min(4, max(2, (half - _MANY_FACTORS) // stage))
    macros: Defines = {"BLOCKS_AN_SM": 2, "THREADS": _MANY_THREADS}
    return macros | {"MANY_COLUMNS": columns, "STAGES": stages}, stages * stage + _MANY_FACTORS


def _many_columns(blocks: int, num_rows: int) -> int:
    """Columns of a block of the dense product: narrow ones cost 1.1 times as much, but fewer stand idle."""
    wide, narrow = (-(-blocks * -(-num_rows // n) // _MANY_BLOCKS) for n in (MANY_TILE, MANY_TILE // 2))
    return MANY_TILE // 2 if 1.1 * narrow < 2 * wide else MANY_TILE


def _row_size(w: QuantTensor) -> int:
    """Bytes of one row of a weight in shared memory."""
    return shared_rows_size(w, 16, 16) // 16


class _Tiles(NamedTuple):
    """A block of the dense product of few rows: tiles of 16 outputs and 8 rows.

    A cluster is `parts` blocks, each with a part of the inputs' width, or `peers`, which share the
    copies of their rows.
    """

    rows: int
    columns: int
    parts: int = 1
    peers: int = 1

    def size(self, weights: Sequence[QuantTensor]) -> int:
        """Bytes of shared memory, of one weight with room for a residual."""
        inputs, columns, height = weights[0].shape[-1] // self.parts, 8 * self.columns, 16 * self.rows
        rest = height * columns * 4 * ((len(weights) == 1) + self.parts - 1)
        needed = [inputs // SEGMENT * columns * (height + 4) * 4]
        for w in weights:
            row = inputs * code_bits(w) // 8 + 16 + (0 if w.d is None else inputs // 4)
            needed.append(columns * (inputs * 5 // 4 + 32) + 16 * self._tiles(w, weights) * row)
        return max(needed) + rest

    def _tiles(self, w: QuantTensor, weights: Sequence[QuantTensor]) -> int:
        """Those of a block of a weight: of two scales a block fewer, TILES_OF."""
        fewer = w.d is not None and w.group == 16 and self.rows > 2 * self.groups(weights)["ROW_GROUPS"]
        return self.rows - fewer

    def grid(self, num_rows: int, weights: Sequence[QuantTensor]) -> tuple[int, int, int]:
        formats = [format_macro(w) for w in weights]
        same = next((i for i, one in enumerate(formats) if one != formats[0]), len(formats))
        stacks = [weights[:same], *([w] for w in weights[same:])]  # the first of one format are one
        heights = [16 * self._tiles(stack[0], weights) for stack in stacks]
        outputs = [sum(w.shape[-2] for w in stack) for stack in stacks]
        blocks = sum(-(-n // height) for n, height in zip(outputs, heights, strict=True))
        return -(-num_rows // (8 * self.columns)) * self.parts, -(-blocks // self.peers) * self.peers, 1

    def cost(self, num_rows: int, weights: Sequence[QuantTensor]) -> int:
        """Nanoseconds that an H200 needs to copy what blocks read, to multiply and to hand sums over."""
        grid = self.grid(num_rows, weights)
        rounds = -(-prod(grid) // ptx.num_multiprocessors())
        inputs, columns, height = weights[0].shape[-1] // self.parts, 8 * self.columns, 16 * self.rows
        copied = sum(w.shape[-2] * inputs * code_bits(w) // 8 for w in weights) // grid[1]
        copied += columns * inputs * 5 // 4 // self.peers
        tiles = self.rows * self.columns * inputs // 32
        return rounds * (2000 + copied // 40 + 4 * tiles + (self.parts - 1) * (500 + height * columns // 3))

    def groups(self, weights: Sequence[QuantTensor]) -> dict[str, int]:
        """Warps of a segment, each with its own rows where columns are few, or its own columns."""
        segments = _segments(weights) // self.parts
        by_row = self.columns < 4 and segments * self.rows <= _DENSE_WARPS
        by_column = max(1, min(self.columns // 4, _WIDE_WARPS // segments))
        return {"ROW_GROUPS": self.rows if by_row else 1, "COLUMN_GROUPS": 1 if by_row else by_column}

    def defines(self, weights: Sequence[QuantTensor]) -> Defines:
        groups = self.groups(weights)
        units = _segments(weights) // self.parts * prod(groups.values())
        return {
            **groups, "ROW_TILES": self.rows // groups["ROW_GROUPS"],
            "COLUMN_TILES": self.columns // groups["COLUMN_GROUPS"], "THREADS": _threads(units, _DENSE_WARPS),
            "K_PARTS": self.parts, "PEERS": self.peers,
        }  # fmt: skip


def _stream_launch(num_rows: int, weights: Sequence[QuantTensor]) -> tuple[Defines, int] | None:
    """Macros and shared memory of the dense product of few rows and very many outputs; None: there is none.

    Its warps take 16 outputs each and keep some steps of them, beside all inputs of the rows.
    """
    w, tiles = weights[0], next(n for n in (1, 2, 4, 8) if 8 * n >= num_rows)
    if len(weights) > 1 or w.d is None or w.shape[-2] < _MANY_OUTPUTS:
        return None
    warps, scales = _STREAM_WARPS // 2 if tiles == 8 else _STREAM_WARPS, 1024
    inputs = _segments(weights) * 8 * tiles * (SEGMENT + (32 if w.d_m is None else 64))
    room = (ptx.shared_limit() - STATIC_SIZE - inputs) // warps - scales
    for step, least in ((128, 4), (64, 2)):
        size = 16 * step * w.bits // 8
        kept = min(room // size, 2048 // step, SEGMENT // step * _segments(weights) + 1)
        if kept >= least:
            macros: Defines = {"STREAM": 1, "STEPS_KEPT": kept, "STEP": step}
            macros |= {"ROW_TILES": 1, "ROW_GROUPS": 1, "COLUMN_TILES": tiles, "COLUMN_GROUPS": 1}
            return macros | {"THREADS": 32 * warps}, inputs + warps * (kept * size + scales)
    return None


def _few_room() -> int:
    """Shared memory of a block of few rows: what the GPU has, less the launch number's."""
    return ptx.shared_limit() - STATIC_SIZE - 1024


def _segments(weights: Sequence[QuantTensor]) -> int:
    return weights[0].shape[-1] // SEGMENT


def _few_blocks(num_rows: int, weights: Sequence[QuantTensor]) -> list[_Tiles]:
    """The blocks of few rows that the GPU can have, the smallest first."""
    clusters = [(1, 1), (1, 2), (2, 1)] if ptx.has_clusters() else [(1, 1)]
    found = [
        _Tiles(rows, columns, parts, peers)
        for rows in (1, 2, 3, 4, 5)
        for columns in (1, 2, 4, 8)
        for parts, peers in clusters
        if 4 * columns < max(num_rows, 5)
        and 16 * rows <= min(w.shape[-2] for w in weights)
        and _segments(weights) % parts == 0
    ]
    fitting = [one for one in found if one.size(weights) <= _few_room()]
    return fitting or found[:1]


def _few_launch(num_rows: int, weights: Sequence[QuantTensor]) -> tuple[Defines, int, tuple[int, int, int]]:
    """Macros, shared memory and blocks of the dense product of few rows."""
    best = min(_few_blocks(num_rows, weights), key=lambda one: one.cost(num_rows, weights))
    return best.defines(weights), best.size(weights), best.grid(num_rows, weights)


def _row_launch(row_size: int, tasks_a_row: int) -> tuple[Defines, int]:
    """Macros and shared memory of a kernel for one row, whose blocks keep as many weight rows as fit."""
    rows = 16 if 16 * row_size + _ROW_STATIC_SIZE <= ptx.shared_limit() else 8
    threads = min(32 * -(-rows * tasks_a_row // 32), 512)
    return {"ROWS": rows, "THREADS": threads}, rows * row_size


def _norm(inputs: Rounded | Row) -> Defines:
    return {"NORMS": inputs.norm.shape[0], "EPS": inputs.eps} if isinstance(inputs, Row) else {"NORMS": 1}


def _number(inputs: Rounded | Row, index: int) -> int:
    return index * inputs.norm.shape[0] + inputs.layer if isinstance(inputs, Row) else index


def _threads(num_units: int, most: int = 16) -> int:
    return 32 * min(num_units, most)


def dense(
    name: str,
    inputs: Rounded | Row,
    weights: Sequence[QuantTensor],
    count: Array,
    *,
    index: int = 0,
    residual: Array | None = None,
) -> Array:
    """Inputs times the matrices at `index` of one weight or three [n, N, K], side by side.

    -> float32 [T, sum of N]. `count` int32[1] is the number of real rows. `residual` [T, N] is added to the
    product.
    """
    launch = _dense_launch(name, inputs, weights, has_residual=residual is not None)
    first = [inputs.x, inputs.norm] if isinstance(inputs, Row) else list(inputs)
    operands = [array for w in weights for array in pointers(w)]
    arrays = [*first, *operands, *([] if residual is None else [residual]), count]
    shape = (first[0].shape[0], sum(w.shape[-2] for w in weights))
    (out,) = launch(arrays, [jax.ShapeDtypeStruct(shape, jnp.float32)], _number(inputs, index))
    return out


def _dense_launch(
    name: str, inputs: Rounded | Row, weights: Sequence[QuantTensor], *, has_residual: bool = False
) -> Launch:
    assert len(weights) in (1, 3)
    num_rows = 1 if isinstance(inputs, Row) else inputs.codes.shape[0]
    defines = _weights(weights) | _norm(inputs) | {"NAME": name, "DENSE": 1, "NUM_ROWS": num_rows}
    segments, all_rows = weights[0].shape[-1] // SEGMENT, sum(w.shape[-2] for w in weights)
    if has_residual:
        defines["RESIDUAL"] = 1
    if num_rows == 1 and has_row_kernels(*weights):
        file = _ROW
        launch, size = _row_launch(max(map(_row_size, weights)), segments)
        defines |= launch | ({"NORMED": 1} if isinstance(inputs, Row) else {})
        grid = (all_rows // int(launch["ROWS"]), 1, 1)
    elif not has_residual and num_rows <= FEW_ROWS and (stream := _stream_launch(num_rows, weights)):
        file, (few, size), grid = _DENSE, stream, (ptx.num_multiprocessors(), 1, 1)
        defines |= few
    elif not _takes_many(num_rows, weights):
        file, (few, size, grid) = _DENSE, _few_launch(num_rows, weights)
        defines |= few
    else:
        blocks = sum(-(-w.shape[-2] // 128) for w in weights)
        columns = _many_columns(blocks, num_rows)
        file, (many, size) = _MANY, _many(weights, columns)
        defines |= many
        grid = (blocks, -(-num_rows // columns), 1)
    return Launch(file, name, defines, grid, size)


def gate_up_of_row(row: Row, gate: QuantTensor, up: QuantTensor, ids: Array, *, index: int = 0) -> Array:
    """silu(gate) * up of one row's experts, float32 [A, F]: gate and up [n, E, F, D], ids int32 [1, A]."""
    arrays = [row.x, row.norm, ids, *pointers(gate), *pointers(up)]
    shape = jax.ShapeDtypeStruct((ids.shape[1], gate.shape[-2]), jnp.float32)
    (out,) = _gate_up_row_launch(row, gate, up, ids.shape[1])(arrays, [shape], _number(row, index))
    return out


def _gate_up_row_launch(row: Row, gate: QuantTensor, up: QuantTensor, num_active: int) -> Launch:
    launch, size = _row_launch(_row_size(gate) + _row_size(up), 2 * gate.shape[-1] // SEGMENT)
    defines = _weights([gate, up]) | _norm(row) | launch | {"NAME": "gate_up", "GATE_UP": 1}
    grid = (gate.shape[-2] // int(launch["ROWS"]), num_active, 1)
    return Launch(_ROW, "gate_up", defines, grid, size)


def gate_up(
    inputs: Rounded,
    gate: QuantTensor,
    up: QuantTensor,
    groups: Groups,
    *,
    experts_per_token: int,
    index: int = 0,
) -> Rounded:
    """silu(gate) * up of each pair (row, expert) of many rows, rounded: codes [T*A, F] and their scales.

    Gate and up are [n, E, F, D], `groups` the pairs by expert.
    """
    num_rows, num_tiles = inputs.codes.shape[0], groups.tiles.shape[0]
    launch = _gate_up_launch(num_rows, gate, up, experts_per_token, num_tiles)
    arrays = [*inputs, *groups, *pointers(gate), *pointers(up)]
    return Rounded(*launch(arrays, rounded_shapes(num_rows * experts_per_token, gate.shape[-2]), index))


def _gate_up_launch(
    num_rows: int, gate: QuantTensor, up: QuantTensor, num_active: int, num_tiles: int
) -> Launch:
    width = gate.shape[-2]
    defines = _weights([gate, up]) | _grouped(num_rows)
    defines |= {"NAME": "gate_up", "GATE_UP": 1, "ACTIVE": num_active, "NORMS": 1}
    many, size = _many([gate, up])
    return Launch(_MANY, "gate_up", defines | many, (width // _HALF_ROWS, num_tiles, 1), size)


def _grouped(num_rows: int) -> Defines:
    return {"GROUPED": 1, "NUM_ROWS": num_rows}


def down_of_row(
    hidden: Array, w: QuantTensor, ids: Array, weights: Array, residual: Array, *, index: int = 0
) -> Array:
    """The residual [1, D] plus the weighted sum of one row's experts.

    hidden float32 [A, F], ids and weights [1, A].
    """
    shape = jax.ShapeDtypeStruct((1, w.shape[-2]), jnp.float32)
    arrays = [hidden, ids, weights, residual, *pointers(w)]
    (out,) = _down_row_launch(w, ids.shape[1])(arrays, [shape], index)
    return out


def _down_row_launch(w: QuantTensor, num_active: int) -> Launch:
    launch, size = _row_launch(num_active * _row_size(w), num_active * w.shape[-1] // SEGMENT)
    defines = _weights([w]) | launch | {"NAME": "down", "DOWN": 1, "ACTIVE": num_active, "NORMS": 1}
    return Launch(_ROW, "down", defines, (w.shape[-2] // int(launch["ROWS"]), 1, 1), size)


def down(hidden: Rounded, w: QuantTensor, groups: Groups, *, num_rows: int, index: int = 0) -> Array:
    """Each pair's expert output, of many rows: hidden [T*A, F] -> float32 [T*A, D]; `num_rows` is T."""
    shape = jax.ShapeDtypeStruct((hidden.codes.shape[0], w.shape[-2]), jnp.float32)
    launch = _down_launch(num_rows, w, groups.tiles.shape[0])
    (out,) = launch([*hidden, *groups, *pointers(w)], [shape], index)
    return out


def _down_launch(num_rows: int, w: QuantTensor, num_tiles: int) -> Launch:
    defines = _weights([w]) | {"NAME": "down", "DOWN": 1, "NORMS": 1} | _grouped(num_rows)
    many, size = _many([w])
    return Launch(_MANY, "down", defines | many, (w.shape[-2] // 128, num_tiles, 1), size)


# --- Twins, in plain jax, of activations that are rounded or not.


def matrix(w: QuantTensor, *index: int | Array) -> Array:
    """The matrix at `index` of a stack, float32 [N, K]."""
    return dequantise(w.map(lambda array: array[index]), jnp)


def product(x: Array, w: Array) -> Array:
    """x [T, K] times w [N, K] -> [T, N], float32 throughout."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def dense_twin(
    x: Array, weights: Sequence[QuantTensor], *, index: int = 0, residual: Array | None = None
) -> Array:
    """`dense` of activations x [T, K]."""
    y = jnp.concatenate([product(x, matrix(w, index)) for w in weights], axis=1)
    return y if residual is None else residual + y


def gate_up_twin(x: Array, gate: QuantTensor, up: QuantTensor, ids: Array, *, index: int = 0) -> Array:
    """silu(gate) * up of activations x [T, D] for expert ids [T, A] -> float32 [T*A, F]."""

    def one(expert: Array) -> Array:
        g, u = (product(x, matrix(w, index, expert)) for w in (gate, up))
        return jnp.repeat(g / (jnp.float32(1) + jnp.exp(-g)) * u, ids.shape[1], axis=0)

    return _by_expert(one, ids, gate)


def down_twin(hidden: Array, w: QuantTensor, ids: Array, *, index: int = 0) -> Array:
    """Expert outputs of hidden [T*A, F] for ids [T, A] -> float32 [T*A, D]."""
    return _by_expert(lambda expert: product(hidden, matrix(w, index, expert)), ids, w)


def _by_expert(one: Callable[[Array], Array], ids: Array, w: QuantTensor) -> Array:
    """Of the rows [T*A, N] that `one` gives of each expert, those of the expert that is meant."""
    flat, (num_experts, width) = ids.reshape(-1, 1), w.shape[1:3]
    out = jnp.zeros((flat.shape[0], width), jnp.float32)
    return lax.fori_loop(0, num_experts, lambda i, out: jnp.where(flat == i, one(i), out), out)


# --- What is compiled and compared without a model.


def variants(config: ModelConfig) -> Iterator[Variant]:
    """The kernels of a model, for compiling without a GPU: (file, name, macros, shared size)."""
    for launch in (*_dense_launches(config), *_grouped_launches(config)):
        yield launch.file, launch.name, launch.defines, launch.shared_size


def _dense_launches(config: ModelConfig) -> Iterator[Launch]:
    q4, q6 = GGMLType.Q4_K, GGMLType.Q6_K
    for num_rows in _DENSE_VARIANTS:
        for kind in (q4, q6):
            qkv = absent_weights((q4, q4, kind), _qkv_shapes(config))
            if qkv:
                yield _dense_launch("qkv", _absent_inputs(num_rows, config), qkv)
    cases = [(num_rows, q4) for num_rows in _DENSE_VARIANTS]
    for num_rows, kind in (*cases, (1, GGMLType.Q5_K), (2048, GGMLType.Q8_0), (8, GGMLType.F16)):
        if out := absent_weights([kind], [_out_shape(config)]):
            inputs = _absent_rounded(num_rows, out[0].shape[-1])
            yield _dense_launch("attn_output", inputs, out, has_residual=True)
    for num_rows in [n for n in _DENSE_VARIANTS if n <= FEW_ROWS]:
        for kind in (q4, q6):
            if head := absent_weights([kind], [_head_shape(config)]):
                yield _dense_launch("lm_head", _absent_inputs(num_rows, config), head)


def _grouped_launches(config: ModelConfig) -> Iterator[Launch]:
    active, (wide, narrow) = config.experts_per_token, expert_shapes(config)
    for num_rows in (1, 2048) if _has_many() else (1,):
        num_tiles = router.max_tiles(num_rows, config, tile_length(num_rows))
        inputs = _absent_inputs(num_rows, config)
        for gate, up in zip(*[iter(absent_weights([GGMLType.Q4_K] * 2, [wide] * 2))] * 2, strict=True):
            if isinstance(inputs, Row):
                yield _gate_up_row_launch(inputs, gate, up, active)
            else:
                yield _gate_up_launch(num_rows, gate, up, active, num_tiles)
        for kind in (GGMLType.Q4_K, GGMLType.Q6_K):
            for down in absent_weights([kind], [narrow]):
                is_row = num_rows == 1
                yield _down_row_launch(down, active) if is_row else _down_launch(num_rows, down, num_tiles)


def _qkv_shapes(config: ModelConfig) -> list[tuple[int, ...]]:
    return [(_STACK, *config.weight_shape(axes)) for axes in ("ND", "KD", "KD")]


def _out_shape(config: ModelConfig) -> tuple[int, ...]:
    return _STACK, *config.weight_shape("DN")


def _head_shape(config: ModelConfig) -> tuple[int, ...]:
    return 1, *config.weight_shape("VD")


def expert_shapes(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gate's or up's, and down's."""
    return (_STACK, *config.weight_shape("EFD")), (_STACK, *config.weight_shape("EDF"))


def _absent(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _absent_rounded(num_rows: int, width: int) -> Rounded:
    return Rounded(_absent(num_rows, width, dtype=jnp.int8), _absent(num_rows, width // 32, 2))


def _absent_inputs(num_rows: int, config: ModelConfig) -> Rounded | Row:
    """What qkv, the experts and lm_head take: one row before its norm, or several after it."""
    if num_rows > 1:
        return _absent_rounded(num_rows, config.d_model)
    norm = _absent(config.num_layers, config.d_model)
    return Row(_absent(1, config.d_model), norm, 0, float(config.norm_eps))


def comparisons(config: ModelConfig, seed: int, only: str | None = None) -> Iterator[Comparison]:
    """The products of a layer and of the vocabulary on random weights, for one row, few and many.

    Formats that the kernels cannot read are left out. What is rounded is compared as values and sums of 32.
    `only` is the name of one product.
    """
    products = {
        "qkv": _qkv_comparisons,
        "attn_output": _out_comparisons,
        "lm_head": _head_comparisons,
        "gate_up": _gate_up_comparisons,
        "down": _down_comparisons,
    }
    for name, product in products.items():
        if only in (None, name):
            yield from product(config, np.random.default_rng(seed))


def _compared_rows(config: ModelConfig) -> list[int]:
    # on the small shapes more rows would show nothing more
    return [n for n in _COMPARED_ROWS if n <= config.d_model]


def _qkv_comparisons(config: ModelConfig, rng: np.random.Generator) -> Iterator[Comparison]:
    kinds = (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K)
    yield from _dense_comparisons("qkv", config, rng, kinds, _qkv_shapes(config), _compared_rows(config))


def _out_comparisons(config: ModelConfig, rng: np.random.Generator) -> Iterator[Comparison]:
    for kind, counts in ((GGMLType.Q4_K, _compared_rows(config)), (GGMLType.Q6_K, [8, 300])):
        yield from _dense_comparisons("attn_output", config, rng, [kind], [_out_shape(config)], counts)


def _head_comparisons(config: ModelConfig, rng: np.random.Generator) -> Iterator[Comparison]:
    for kind in (GGMLType.Q4_K, GGMLType.Q6_K):
        yield from _dense_comparisons("lm_head", config, rng, [kind], [_head_shape(config)], [1, 8, FEW_ROWS])


def _dense_comparisons(
    name: str,
    config: ModelConfig,
    rng: np.random.Generator,
    kinds: Sequence[GGMLType],
    shapes: Sequence[tuple[int, ...]],
    counts: Sequence[int],
) -> Iterator[Comparison]:
    absent = absent_weights(kinds, shapes)
    if not absent:
        return
    fields = random_weights(rng, absent)
    for num_rows in counts:
        eps = config.norm_eps if name != "attn_output" and num_rows == 1 else None
        x, out = random_rows(rng, (num_rows, absent[0].shape[-1]), (num_rows, config.d_model))
        residual = out if name == "attn_output" else None
        arrays = (fields, x, _random_norm(rng, config), residual, _count(num_rows))
        yield _dense_comparison(name, _title(name, num_rows, kinds), absent, arrays, eps)


def _dense_comparison(
    name: str, title: str, absent: Sequence[QuantTensor], arrays: tuple[Any, ...], eps: float | None
) -> Comparison:
    at = min(COMPARED_AT, absent[0].shape[0] - 1)

    def kernel(fields: Fields, x: Array, norm: Array, residual: Array | None, count: Array) -> Array:
        weights = with_fields(absent, fields)
        return dense(name, _entering(x, norm, eps), weights, count, index=at, residual=residual)

    def plain(fields: Fields, x: Array, residual: Array | None) -> Array:
        return dense_twin(x, with_fields(absent, fields), index=at, residual=residual)

    def twin(fields: Fields, x: Array, norm: Array, residual: Array | None, count: Array) -> Array:
        return plain(fields, _rounded_twin(x, norm, eps), residual)

    def float_twin(fields: Fields, x: Array, norm: Array, residual: Array | None, count: Array) -> Array:
        return plain(fields, _float_twin(x, norm, eps), residual)

    return Comparison(title, kernel, twin, float_twin, arrays)


def _grouped_rows() -> tuple[int, ...]:
    """Rows whose gate_up and down are compared here: those of few rows are one launch, in experts.py."""
    return (1, 300) if _has_many() else (1,)


def _gate_up_comparisons(config: ModelConfig, rng: np.random.Generator) -> Iterator[Comparison]:
    wide, _ = expert_shapes(config)
    for kind in (GGMLType.Q4_K, GGMLType.Q6_K):
        absent = absent_weights([kind] * 2, [wide] * 2)
        if not absent:
            continue
        fields = random_weights(rng, absent)
        for num_rows in _grouped_rows():
            (x,), ids = random_rows(rng, (num_rows, config.d_model)), random_ids(rng, num_rows, config)
            arrays = (fields, x, _random_norm(rng, config), ids, _count(num_rows))
            yield _gate_up_comparison(_title("gate_up", num_rows, [kind] * 2), config, absent, arrays)


def _gate_up_comparison(
    title: str, config: ModelConfig, absent: Sequence[QuantTensor], arrays: tuple[Any, ...]
) -> Comparison:
    num_rows, active = arrays[1].shape[0], config.experts_per_token
    eps = config.norm_eps if num_rows == 1 else None

    def kernel(fields: Fields, x: Array, norm: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        (gate, up), inputs = with_fields(absent, fields), _entering(x, norm, eps)
        if isinstance(inputs, Row):
            return (gate_up_of_row(inputs, gate, up, ids, index=COMPARED_AT),)
        groups = _groups(ids, count, config)
        return readable(gate_up(inputs, gate, up, groups, experts_per_token=active, index=COMPARED_AT))

    def plain(fields: Fields, x: Array, ids: Array) -> Array:
        gate, up = with_fields(absent, fields)
        return gate_up_twin(x, gate, up, ids, index=COMPARED_AT)

    def twin(fields: Fields, x: Array, norm: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        h = plain(fields, _rounded_twin(x, norm, eps), ids)
        return (h,) if num_rows == 1 else readable(round_rows(h))

    def float_twin(fields: Fields, x: Array, norm: Array, ids: Array, count: Array) -> tuple[Array, ...]:
        h = plain(fields, _float_twin(x, norm, eps), ids)
        return (h,) if num_rows == 1 else (h, jnp.sum(h.reshape(h.shape[0], -1, 32), axis=-1))

    return Comparison(title, kernel, twin, float_twin, arrays)


def _down_comparisons(config: ModelConfig, rng: np.random.Generator) -> Iterator[Comparison]:
    active, (_, narrow) = config.experts_per_token, expert_shapes(config)
    for kind in (GGMLType.Q4_K, GGMLType.Q6_K):
        absent = absent_weights([kind], [narrow])
        if not absent:
            continue
        fields = random_weights(rng, absent)
        for num_rows in _grouped_rows():
            hidden, shares, residual = random_rows(
                rng, (num_rows * active, config.expert_width), (num_rows, active), (1, config.d_model)
            )
            ids = random_ids(rng, num_rows, config)
            arrays = (fields, hidden, ids, jax.nn.softmax(shares), residual, _count(num_rows))
            yield _down_comparison(_title("down", num_rows, [kind]), config, absent, arrays)


def _down_comparison(
    title: str, config: ModelConfig, absent: Sequence[QuantTensor], arrays: tuple[Any, ...]
) -> Comparison:
    num_rows = arrays[2].shape[0]

    def kernel(
        fields: Fields, hidden: Array, ids: Array, shares: Array, residual: Array, count: Array
    ) -> Array:
        (w,) = with_fields(absent, fields)
        if num_rows == 1:
            return down_of_row(hidden, w, ids, shares, residual, index=COMPARED_AT)
        return down(round_rows(hidden), w, _groups(ids, count, config), num_rows=num_rows, index=COMPARED_AT)

    def plain(fields: Fields, hidden: Array, ids: Array, shares: Array, residual: Array) -> Array:
        (w,) = with_fields(absent, fields)
        y = down_twin(hidden, w, ids, index=COMPARED_AT)
        return residual + jnp.sum(shares.reshape(-1, 1) * y, axis=0)[None] if num_rows == 1 else y

    def twin(fields: Fields, hidden: Array, *rest: Array) -> Array:
        return plain(fields, rounded_values(round_rows(hidden)), *rest[:3])

    def float_twin(fields: Fields, hidden: Array, *rest: Array) -> Array:
        return plain(fields, hidden, *rest[:3])

    return Comparison(title, kernel, twin, float_twin, arrays)


def _entering(x: Array, norm: Array, eps: float | None) -> Rounded | Row:
    """What a product takes of rows x: the row itself where it norms on its own, and `eps` is given."""
    return round_rows(x) if eps is None else Row(x, norm, COMPARED_AT, float(eps))


def _rounded_twin(x: Array, norm: Array, eps: float | None) -> Array:
    if eps is None:
        return rounded_values(round_rows(x))
    return rounded_values(Rounded(*norm_quantise_twin(x, norm, _count(1), eps=eps, layer=COMPARED_AT)))


def _float_twin(x: Array, norm: Array, eps: float | None) -> Array:
    return x if eps is None else rms_norm(x, norm[COMPARED_AT], eps)


def _groups(ids: Array, count: Array, config: ModelConfig) -> Groups:
    counters, tile = jnp.zeros(router.NUM_COUNTERS, jnp.int32), tile_length(ids.shape[0])
    pairs, tiles, num_tiles, _ = router.group(ids, count, counters, config=config, tile=tile)
    return Groups(pairs, tiles, num_tiles)


def _title(name: str, num_rows: int, kinds: Sequence[GGMLType]) -> str:
    return f"{name}, {num_rows} rows, {' '.join(kind.name for kind in kinds)}"


def _count(num_rows: int) -> Array:
    return jnp.asarray([num_rows], jnp.int32)


def random_rows(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[Array]:
    return [jnp.asarray(rng.uniform(-2, 2, shape).astype(np.float32)) for shape in shapes]


def _random_norm(rng: np.random.Generator, config: ModelConfig) -> Array:
    return jnp.asarray(rng.uniform(0.5, 1.5, (_STACK, config.d_model)).astype(np.float32))


def random_ids(rng: np.random.Generator, num_rows: int, config: ModelConfig) -> Array:
    order = rng.random((num_rows, config.num_experts)).argsort(axis=1)
    return jnp.asarray(order[:, : config.experts_per_token], jnp.int32)

"""Products of packed weights with rounded activations: the wrappers of matmul.cu, and their plain twins.

Activations are `codes` int8 [T, K] and `scales` float32 [T, K/32, 2], (scale, scale * sum of the 32 codes).
With one row the products take the row itself and its norm instead: the kernel norms and rounds on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmoe.kernels import ptx
from jaxmoe.quants import QuantTensor, dequantise

SEGMENT = 256
FEW_ROWS = 64  # up to here all segments of a product are read at once, above it they go through shared memory
FEW_TILE, MANY_TILE = 8, 64  # pairs of one expert that are multiplied together
_ROW, _FEW, _MANY = "matmul_row.cu", "matmul_few.cu", "matmul_many.cu"
_MANY_THREADS = 128
_MANY_FACTORS = 8192  # bytes of the scales of its weights
_MANY_BLOCKS = 264  # that run at once: two on each of the 132 multiprocessors of an H200
_MANY_OUTPUTS = 16384  # from so many outputs on the kernel for many rows has enough blocks for a few of them
_REGISTERS = 65536  # of a multiprocessor
_HALF_ROWS = 64
_OTHER_WARPS = 3  # of a grouped product, that copy and finish
_STATIC_SIZE = 4096  # more than what kernels declare beside the dynamic shared memory, and the launch number
# Shared memory of a block by compute capability, in bytes. Source: NVIDIA, "CUDA C++ Programming Guide".
_SHARED_SIZES = {"8.0": 163 << 10, "8.7": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10, "10.3": 227 << 10}
_SMALL_SHARED = 99 << 10

Variant = tuple[str, str, dict[str, int | float | str], int]


class Rounded(NamedTuple):
    """Activations rounded to int8 in groups of 32: codes [T, K] and scales [T, K/32, 2]."""

    codes: Array
    scales: Array


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


def is_supported(w: QuantTensor) -> bool:
    """Whether the kernels can read the weight [..., N, K]."""
    if w.layout != "rows" or w.shape[-1] % SEGMENT or w.shape[-2] % 16:
        return False
    if w.d is None:
        return w.codes.dtype in (jnp.float16, jnp.bfloat16)
    return w.group == 32 or (w.group == 16 and w.d_m is None and w.s is not None)


def has_row_kernels(*weights: QuantTensor) -> bool:
    """Whether one row can be multiplied on its own; float weights are left to the tensor cores' order of sums."""
    return all(w.d is not None for w in weights)


def tile_length(num_rows: int) -> int:
    """Pairs of a tile for a step of that many rows."""
    return FEW_TILE if _is_few(num_rows) else MANY_TILE


def _is_few(num_rows: int) -> bool:
    return num_rows <= FEW_ROWS or not _has_many()


def _has_many() -> bool:
    # the kernel for many rows takes more shared memory than the smaller GPUs have
    return _shared_limit() > _SMALL_SHARED


def _shared_limit() -> int:
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return _SHARED_SIZES.get(capability, _SMALL_SHARED)


def _format(w: QuantTensor) -> str:
    if w.d is None:
        half = 1 if w.codes.dtype == jnp.float16 else 2
        return f"Format<16,1,1,0,false,false,false,false,{half}>"
    flags = (w.s is not None, w.m is not None, w.d_m is not None, w.d.dtype == jnp.float32)
    zero = w.zero if w.bits == 4 else 0  # 8-bit codes are stored without it
    return f"Format<{w.bits},{w.group},{w.block},{zero},{','.join(str(flag).lower() for flag in flags)}>"


def _pointers(w: QuantTensor) -> list[Array]:
    """The arrays in the kernel's order; where one is absent the codes stand in and are not read."""
    return [w.codes if array is None else array for array in (w.codes, w.s, w.m, w.d, w.d_m)]


def _stage_size(weights: Sequence[QuantTensor], columns: int) -> int:
    """Shared memory of a step of the kernel for many rows: half a segment of two halves and of the columns."""
    halves = weights if len(weights) == 2 else [max(weights, key=_code_bits)] * 2
    codes = sum(_HALF_ROWS * (SEGMENT // 2 * _code_bits(w) // 8 + 16) for w in halves)
    return codes + columns * (SEGMENT // 2 + 16 + 48)


def _code_bits(w: QuantTensor) -> int:
    return 8 * w.codes.dtype.itemsize if w.d is None else w.bits


def _weights(weights: Sequence[QuantTensor]) -> dict[str, int | float | str]:
    rows = [w.shape[-2] for w in weights] + [0, 0]
    macros: dict[str, int | float | str] = {f"ROWS_{i}": rows[i] for i in range(3)}
    macros |= {f"FORMAT_{i}": _format(w) for i, w in enumerate(weights)}
    return macros | {"K": weights[0].shape[-1], "MATRICES": prod(weights[0].codes.shape[1:-2])}


def _many(
    weights: Sequence[QuantTensor], columns: int = MANY_TILE
) -> tuple[dict[str, int | float | str], int]:
    stage, half = _stage_size(weights, columns), (_shared_limit() + 1024) // 2 - 2048
    stages = min(4, max(2, (half - _MANY_FACTORS) // stage))
    macros: dict[str, int | float | str] = {"BLOCKS_AN_SM": 2, "THREADS": _MANY_THREADS}
    return macros | {"MANY_COLUMNS": columns, "STAGES": stages}, stages * stage + _MANY_FACTORS


def _shared_rows_size(w: QuantTensor, num_rows: int, pad: int) -> int:
    """Bytes of `num_rows` rows of a weight in shared memory: SharedRows of weights.cuh."""
    segments = w.shape[-1] // SEGMENT

    def run(size: int) -> int:
        return segments * size + (16 if segments * size % 32 == 0 else 0)

    size = segments * (SEGMENT * _code_bits(w) // 8 + pad)
    size += 0 if w.s is None else run(16 if w.group == 16 else 8)
    size += 0 if w.m is None else run(8)
    for d in (w.d, w.d_m):
        size += 0 if d is None else run(SEGMENT // w.block * d.dtype.itemsize)
    return -(-num_rows * size // 16) * 16


def _many_columns(blocks: int, num_rows: int) -> int:
    """Columns of a block of the dense product: narrow ones cost 1.1 times as much, but fewer stand idle."""
    wide, narrow = (-(-blocks * -(-num_rows // n) // _MANY_BLOCKS) for n in (MANY_TILE, MANY_TILE // 2))
    return MANY_TILE // 2 if 1.1 * narrow < 2 * wide else MANY_TILE


def _row_size(w: QuantTensor) -> int:
    """Bytes of one row of a weight in shared memory."""
    return _shared_rows_size(w, 16, 16) // 16


def _column_tiles(num_rows: int, segments: int) -> int:
    """Tiles of 8 rows that share a block: two, where their inputs leave room for two blocks."""
    return 2 if num_rows > 8 and segments <= 8 else 1


def _inputs_size(segments: int, tiles: int) -> int:
    return segments * 8 * tiles * (SEGMENT + 32 + 80)


def _grouped_launch(
    stage: int, num_units: int, inputs: int, num_steps: int
) -> tuple[dict[str, int | float | str], int]:
    """Macros and shared memory of a grouped product: `num_steps` steps a tile, of `stage` bytes of weights."""
    fixed = 2 * (inputs + num_units * 16 * 9 * 4)
    fitting = [
        n for n in (4, 3, 2) if n <= num_steps + 1 and n * stage + fixed + _STATIC_SIZE <= _shared_limit()
    ]
    assert fitting, f"a step of {stage} bytes does not fit {_shared_limit()} bytes of shared memory"
    threads = _threads(num_units) + 32 * _OTHER_WARPS
    return {"COLUMN_TILES": 1, "THREADS": threads, "STAGES": fitting[0]}, fitting[0] * stage + fixed


def _num_multiprocessors() -> int:
    return int(getattr(jax.devices()[0], "core_count", 132))


def _row_launch(row_size: int, tasks_a_row: int) -> tuple[dict[str, int | float | str], int]:
    """Macros and shared memory of a kernel for one row, whose blocks keep as many weight rows as fit."""
    fixed = 24 << 10  # the inputs and the sums
    rows = 16 if 16 * row_size + fixed <= _shared_limit() else 8
    threads = min(32 * -(-rows * tasks_a_row // 32), 512)
    return {"ROWS": rows, "THREADS": threads}, rows * row_size


def _norm(inputs: Rounded | Row) -> dict[str, int | float | str]:
    return {"NORMS": inputs.norm.shape[0], "EPS": inputs.eps} if isinstance(inputs, Row) else {"NORMS": 1}


def _number(inputs: Rounded | Row, index: int) -> int:
    return index * inputs.norm.shape[0] + inputs.layer if isinstance(inputs, Row) else index


def _blocks(threads: int, registers: int) -> int:
    """Blocks of so many threads and registers a thread that run on a multiprocessor together."""
    return max(1, _REGISTERS // (threads * registers))


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
    """Inputs times the matrices at `index` of one weight or three [n, N, K], side by side -> float32 [T, sum of N].

    `count` int32[1] is the number of real rows. `residual` [T, N] is added to the product.
    """
    assert len(weights) in (1, 3)
    num_rows = 1 if isinstance(inputs, Row) else inputs.codes.shape[0]
    defines = _weights(weights) | _norm(inputs) | {"NAME": name, "DENSE": 1, "NUM_ROWS": num_rows}
    segments, all_rows = weights[0].shape[-1] // SEGMENT, sum(w.shape[-2] for w in weights)
    if residual is not None:
        defines["RESIDUAL"] = 1
    if num_rows == 1 and has_row_kernels(*weights):
        file = _ROW
        launch, size = _row_launch(max(map(_row_size, weights)), segments)
        defines |= launch | ({"NORMED": 1} if isinstance(inputs, Row) else {})
        grid = (all_rows // int(launch["ROWS"]), 1, 1)
    elif _is_few(num_rows) and not (all_rows >= _MANY_OUTPUTS and num_rows > 16 and _has_many()):
        file, tiles, threads = _FEW, _column_tiles(num_rows, segments), _threads(segments)
        defines |= {"COLUMN_TILES": tiles, "THREADS": threads, "BLOCKS_AN_SM": 1}
        size = max(_shared_rows_size(w, 16, 32) for w in weights) + _inputs_size(segments, tiles)
        grid = (-(-num_rows // (8 * tiles)), all_rows // 16, 1)
    else:
        blocks = sum(-(-w.shape[-2] // 128) for w in weights)
        columns = _many_columns(blocks, num_rows)
        file, (many, size) = _MANY, _many(weights, columns)
        defines |= many
        grid = (blocks, -(-num_rows // columns), 1)
    first = [inputs.x, inputs.norm] if isinstance(inputs, Row) else list(inputs)
    pointers = [array for w in weights for array in _pointers(w)]
    arrays = [*first, *pointers, *([] if residual is None else [residual]), count]
    out = jax.ShapeDtypeStruct((num_rows, all_rows), jnp.float32)
    (result,) = ptx.launch(
        file, name, defines, arrays, [out],
        grid=grid, threads=int(defines["THREADS"]), shared_size=size, number=_number(inputs, index),
    )  # fmt: skip
    return result


def gate_up_of_row(row: Row, gate: QuantTensor, up: QuantTensor, ids: Array, *, index: int = 0) -> Array:
    """silu(gate) * up of one row's experts, float32 [A, F]: gate and up [n, E, F, D], ids int32 [1, A]."""
    width = gate.shape[-2]
    launch, size = _row_launch(_row_size(gate) + _row_size(up), 2 * gate.shape[-1] // SEGMENT)
    defines = _weights([gate, up]) | _norm(row) | launch | {"NAME": "gate_up", "GATE_UP": 1}
    (out,) = ptx.launch(
        _ROW, "gate_up", defines, [row.x, row.norm, ids, *_pointers(gate), *_pointers(up)],
        [jax.ShapeDtypeStruct((ids.shape[1], width), jnp.float32)],
        grid=(width // int(launch["ROWS"]), ids.shape[1], 1),
        threads=int(launch["THREADS"]), shared_size=size, number=_number(row, index),
    )  # fmt: skip
    return out


def gate_up(
    inputs: Rounded,
    gate: QuantTensor,
    up: QuantTensor,
    groups: Groups,
    *,
    experts_per_token: int,
    index: int = 0,
) -> Rounded:
    """silu(gate) * up of each (row, expert) pair, rounded: codes [T*A, F], scales [T*A, F/32, 2].

    Gate and up are [n, E, F, D], `groups` the pairs by expert.
    """
    num_rows, width = inputs.codes.shape[0], gate.shape[-2]
    defines = _weights([gate, up]) | {
        "NAME": "gate_up",
        "GATE_UP": 1,
        "ACTIVE": experts_per_token,
        "NORMS": 1,
    }
    defines |= _grouped(num_rows)
    size = 0
    file = _FEW if _is_few(num_rows) else _MANY
    if file == _FEW:
        segments = gate.shape[-1] // SEGMENT
        stage = sum(_shared_rows_size(w, 16, 16) for w in (gate, up))
        launch, size = _grouped_launch(stage, 2 * segments, _inputs_size(segments, 1), width // 16)
        defines |= launch
        grid = (_num_multiprocessors(), 1, 1)
    else:
        many, size = _many([gate, up])
        defines |= many
        grid = (width // _HALF_ROWS, groups.tiles.shape[0], 1)
    codes, scales = ptx.launch(
        file, "gate_up", defines, [*inputs, *groups, *_pointers(gate), *_pointers(up)],
        _rounded_shape(num_rows * experts_per_token, width),
        grid=grid, threads=int(defines["THREADS"]), shared_size=size, number=index,
    )  # fmt: skip
    return Rounded(codes, scales)


def _grouped(num_rows: int) -> dict[str, int | float | str]:
    return {"GROUPED": 1, "NUM_ROWS": num_rows}


def _rounded_shape(num_rows: int, width: int) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((num_rows, width), jnp.int8),
        jax.ShapeDtypeStruct((num_rows, width // 32, 2), jnp.float32),
    ]


def down_of_row(
    hidden: Array, w: QuantTensor, ids: Array, weights: Array, residual: Array, *, index: int = 0
) -> Array:
    """The residual [1, D] plus the weighted sum of one row's experts.

    hidden float32 [A, F], ids and weights [1, A].
    """
    active, width = ids.shape[1], w.shape[-2]
    launch, size = _row_launch(active * _row_size(w), active * w.shape[-1] // SEGMENT)
    defines = _weights([w]) | launch | {"NAME": "down", "DOWN": 1, "ACTIVE": active, "NORMS": 1}
    (out,) = ptx.launch(
        _ROW, "down", defines, [hidden, ids, weights, residual, *_pointers(w)],
        [jax.ShapeDtypeStruct((1, width), jnp.float32)],
        grid=(width // int(launch["ROWS"]), 1, 1),
        threads=int(launch["THREADS"]), shared_size=size, number=index,
    )  # fmt: skip
    return out


def down(hidden: Rounded, w: QuantTensor, groups: Groups, *, num_rows: int, index: int = 0) -> Array:
    """Each pair's expert output: hidden [T*A, F] -> float32 [T*A, D]; `num_rows` is T."""
    num_pairs, segments, width = hidden.codes.shape[0], w.shape[-1] // SEGMENT, w.shape[-2]
    defines = _weights([w]) | {"NAME": "down", "DOWN": 1, "NORMS": 1} | _grouped(num_rows)
    size = 0
    file = _FEW if _is_few(num_rows) else _MANY
    if file == _FEW:
        row_tiles = max(n for n in (1, 2, 4, 8) if n * segments <= 16 or n == 1)
        stage = _shared_rows_size(w, 16 * row_tiles, 32)
        launch, size = _grouped_launch(
            stage, row_tiles * segments, _inputs_size(segments, 1), width // (16 * row_tiles)
        )
        defines |= launch | {"ROW_TILES": row_tiles}
        grid = (_num_multiprocessors(), 1, 1)
    else:
        many, size = _many([w])
        defines |= many
        grid = (width // 128, groups.tiles.shape[0], 1)
    (out,) = ptx.launch(
        file, "down", defines, [*hidden, *groups, *_pointers(w)],
        [jax.ShapeDtypeStruct((num_pairs, width), jnp.float32)],
        grid=grid, threads=int(defines["THREADS"]), shared_size=size, number=index,
    )  # fmt: skip
    return out


# --- Twins, in plain jax. `float_rows` is what the activations were before they were rounded, or stands in for them.


def rounded_values(inputs: Rounded) -> Array:
    """The activations [T, K] that the codes mean, float32."""
    codes = inputs.codes.reshape(*inputs.scales.shape[:2], 32).astype(jnp.float32)
    return (codes * inputs.scales[:, :, :1]).reshape(inputs.codes.shape)


def round_rows(x: Array) -> Rounded:
    """x [T, K] rounded as the kernels do: 127 / max of 32, half to even."""
    groups = x.reshape(x.shape[0], -1, 32)
    highest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    inverse = jnp.where(highest > 0, jnp.float32(127) / highest, jnp.float32(0))
    codes = jnp.round(groups * inverse)
    scale = highest[..., 0] * jnp.float32(1 / 127)
    sums = scale * jnp.sum(codes, axis=-1)
    return Rounded(codes.astype(jnp.int8).reshape(x.shape), jnp.stack((scale, sums), axis=-1))


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

    def pair(row: Array, expert: Array) -> Array:
        g, u = (product(row[None], matrix(w, index, expert))[0] for w in (gate, up))
        return g / (jnp.float32(1) + jnp.exp(-g)) * u

    rows = jnp.repeat(x, ids.shape[1], axis=0)
    return lax.map(lambda both: pair(*both), (rows, ids.reshape(-1)))


def down_twin(hidden: Array, w: QuantTensor, ids: Array, *, index: int = 0) -> Array:
    """Expert outputs of hidden [T*A, F] for ids [T, A] -> float32 [T*A, D]."""
    pairs = (hidden, ids.reshape(-1))
    return lax.map(lambda both: product(both[0][None], matrix(w, index, both[1]))[0], pairs)

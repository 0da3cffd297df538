"""The table of ggml block formats and the one device format that serves them all.

Every weight is d * s * (code - zero) - d_m * m: codes of 4 or 8 bits, s and m one byte a group of inputs, d
and d_m one float a block of inputs. The file's byte layouts are those of ggml-common.h and ggml-quants.c. No
JAX here: what works on arrays of either kind takes the array module as `xp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from math import prod
from operator import itemgetter, mul, sub
from types import ModuleType
from typing import Any, Literal

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

# numpy's on the host, jax's on the device: naming jax's type would import jax
Array = Any
Layout = Literal["rows", "columns"]

_PAIRED = 64  # inputs that share 32 bytes of 4-bit codes
_SLICE_SIZE = 1 << 20  # packed bytes converted at a time: few calls, and temporaries of a few MB


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A weight in the device format: its arrays and the numbers that say how to read them.

    K is the input axis, N the output axis. Layout "rows" is [..., N, K], "columns" is [..., K, N]; `s` and
    `m` have K/group in K's place, `d` and `d_m` K/block. 4-bit codes lie two to a byte along K: of each 64
    inputs, byte j holds input j in its low nibble and input 32 + j in its high nibble. 8-bit codes are int8.
    A float tensor has `codes` alone, the numbers themselves.
    value = d * s * (code - zero) - d_m * m; an absent `s` or `m` counts as 1, an absent `d_m` as 0.
    Where rows are `swapped`, chunk c of each 8 chunks of 16 bytes of row n's codes lies at c ^ n % 8: whole
    rows can be copied to shared memory as they lie, and neighbours then share no bank (`unswapped`).
    """

    codes: Array
    s: Array | None
    m: Array | None
    d: Array | None
    d_m: Array | None
    group: int
    block: int
    bits: int
    zero: int
    layout: Layout
    swapped: bool = False

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays that are present, by field name."""
        named = {name: getattr(self, name) for name in ("codes", "s", "m", "d", "d_m")}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values, in this layout."""
        *lead, first, second = self.codes.shape
        pair = 2 if self.bits == 4 else 1
        return (*lead, first, second * pair) if self.layout == "rows" else (*lead, first * pair, second)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def map(self, change: Callable[[Array], Array]) -> QuantTensor:
        """The same tensor with `change` applied to each array (a move, an index into the leading axes)."""
        return replace(self, **{name: change(array) for name, array in self.arrays.items()})


# --- Reading blocks. A field is [num_blocks, bytes, M], M blocks side by side: for numpy those of M rows, so
# that every operation below runs along a long, contiguous last axis; for a device M is 1. One description
# serves both, as augmented assignment is in place for numpy's arrays and makes new ones of jax's.

Fields = Mapping[str, Array]
Read = Callable[[Fields, ModuleType], Array]


def _split(packed: Array, bits: int, run: int) -> Array:
    """Codes of `bits` bits: each run of bytes holds 8 // bits runs of codes, the lowest bits' first."""
    num_blocks, num_bytes, width = packed.shape
    runs = packed.reshape(num_blocks, num_bytes // run, 1, run, width)
    codes = runs >> np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1, 1)
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(num_blocks, num_bytes * 8 // bits, width)


def _joined(low: Array, high: Array, shift: int) -> Array:
    high <<= high.dtype.type(shift)
    high |= low
    return high


def _minus(codes: Array, zero: int) -> Array:
    signed = codes.view(np.int8)
    signed -= np.int8(zero)
    return signed


def _int8(name: str) -> Read:
    return lambda fields, xp: fields[name].view(np.int8)


def _two_bytes(field: Array) -> Array:
    wide = field.astype(np.uint16)
    return _joined(wide[:, :1], wide[:, 1:], 8)


def _float16(name: str) -> Read:
    return lambda fields, xp: _two_bytes(fields[name]).view(np.float16)


def _minus_float16(name: str) -> Read:
    return lambda fields, xp: (_two_bytes(fields[name]) ^ np.uint16(0x8000)).view(np.float16)


def _half_e8m0(fields: Fields, xp: ModuleType) -> Array:
    """Half of the power of two that an MX scale byte means; bytes 0 and 1 give subnormal numbers."""
    e = fields["e"].astype(np.uint32)
    return xp.where(e < 2, np.uint32(1 << 21) << (e & 1), (e - 1) << 23).view(np.float32)


def _nibbles(run: int) -> Read:
    return lambda fields, xp: _split(fields["qs"], 4, run)


def _fives(run: int, high_run: int, zero: int) -> Read:
    def read(fields: Fields, xp: ModuleType) -> Array:
        codes = _joined(_split(fields["qs"], 4, run), _split(fields["qh"], 1, high_run), 4)
        return _minus(codes, zero)

    return read


def _from_table(values: tuple[int, ...]) -> Read:
    table = np.array(values, np.int8)
    all_bytes = np.resize(table, 256).tobytes()

    def read(fields: Fields, xp: ModuleType) -> Array:
        codes = _split(fields["qs"], 4, 16)
        if xp is not np:
            return xp.take(table, codes, mode="clip")
        # numpy's own indexing would first make an 8-byte index of every code
        return np.frombuffer(codes.tobytes().translate(all_bytes), np.int8).reshape(codes.shape)

    return read


def _crumbs(fields: Fields, xp: ModuleType) -> Array:
    return _split(fields["qs"], 2, 32)


def _q3_k_codes(fields: Fields, xp: ModuleType) -> Array:
    return _joined(_split(fields["qs"], 2, 32), _split(fields["hmask"], 1, 32), 2)


def _q6_k_codes(fields: Fields, xp: ModuleType) -> Array:
    return _minus(_joined(_split(fields["ql"], 4, 64), _split(fields["qh"], 2, 32), 4), 32)


def _q3_k_scales(fields: Fields, xp: ModuleType) -> Array:
    low, high = fields["scales"][:, :8], fields["scales"][:, 8:]
    return _minus(_joined(_split(low, 4, 8), _split(high, 2, 4), 4), 32)


def _iq4_xs_scales(fields: Fields, xp: ModuleType) -> Array:
    return _minus(_joined(_split(fields["scales_l"], 4, 1), _split(fields["scales_h"], 2, 1), 4), 32)


def _low_scales(fields: Fields, xp: ModuleType) -> Array:
    return fields["scales"] & np.uint8(15)


def _high_scales(fields: Fields, xp: ModuleType) -> Array:
    return fields["scales"] >> np.uint8(4)


def _k_scales(fields: Fields, xp: ModuleType) -> Array:
    """Eight 6-bit scales: four whole ones, then four nibbles whose upper bits lie above those."""
    whole, _, rest = xp.split(fields["scales"], 3, axis=1)
    return xp.concatenate((whole & np.uint8(63), rest & np.uint8(15) | whole >> 2 & np.uint8(48)), axis=1)


def _k_mins(fields: Fields, xp: ModuleType) -> Array:
    _, whole, rest = xp.split(fields["scales"], 3, axis=1)
    return xp.concatenate((whole & np.uint8(63), rest >> 4 | whole >> 2 & np.uint8(48)), axis=1)


# --- The table.


@dataclass(frozen=True)
class BlockFormat:
    """How the blocks of one ggml type lie in the file, and how they are read.

    `fields` are the bytes of a block by name, in order; `readers` make QuantTensor's arrays of them; `bits`,
    `group`, `block` and `zero` are QuantTensor's. `paired` names a field whose bytes are 4-bit codes just as
    the device has them. A type of plain numbers has `float_dtype` and no readers.
    """

    fields: Mapping[str, int]
    readers: Mapping[str, Read] = field(default_factory=dict)
    bits: int = 8
    group: int = 32
    block: int = 32
    zero: int = 0
    paired: str | None = None
    float_dtype: np.dtype[Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of a block in the file."""
        return sum(self.fields.values())


def _floats(dtype: Any) -> BlockFormat:
    dtype = np.dtype(dtype)
    return BlockFormat({"x": dtype.itemsize}, bits=8 * dtype.itemsize, group=1, block=1, float_dtype=dtype)


_D = _float16("d")
_D_M = _float16("d_m")
_MINUS_M = _minus_float16("d_m")  # Q4_1 and Q5_1 add theirs
_IQ4_CODES = _from_table((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_TWICE_E2M1 = _from_table((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))

# Why neither the order of the products nor a fused multiply-add changes a bit: float16 has 11 significant
# bits, so d * s * code needs at most 11 + 7 + 5 of float32's 24 (Q6_K; IQ4_XS 11 + 5 + 7, Q5_K 11 + 6 + 5,
# Q8_0 11 + 7) and d_m * m 11 + 6; a power of two such as -128 costs one. Every product is exact, only the
# subtraction rounds. XLA on the CPU flushes subnormal numbers: MXFP4 values below 2^-126 become 0 there.
FORMATS: Mapping[GGMLType, BlockFormat] = {
    GGMLType.F32: _floats(np.float32),
    GGMLType.F16: _floats(np.float16),
    GGMLType.BF16: _floats(ml_dtypes.bfloat16),
    GGMLType.Q8_0: BlockFormat({"d": 2, "qs": 32}, {"codes": _int8("qs"), "d": _D}),
    GGMLType.Q4_0: BlockFormat({"d": 2, "qs": 16}, {"codes": _nibbles(16), "d": _D}, bits=4, zero=8),
    GGMLType.Q4_1: BlockFormat(
        {"d": 2, "d_m": 2, "qs": 16}, {"codes": _nibbles(16), "d": _D, "d_m": _MINUS_M}, bits=4
    ),
    GGMLType.Q5_0: BlockFormat({"d": 2, "qh": 4, "qs": 16}, {"codes": _fives(16, 1, 16), "d": _D}),
    GGMLType.Q5_1: BlockFormat(
        {"d": 2, "d_m": 2, "qh": 4, "qs": 16}, {"codes": _fives(16, 1, 0), "d": _D, "d_m": _MINUS_M}
    ),
    GGMLType.Q2_K: BlockFormat(
        {"scales": 16, "qs": 64, "d": 2, "d_m": 2},
        {"codes": _crumbs, "s": _low_scales, "m": _high_scales, "d": _D, "d_m": _D_M},
        bits=4,
        group=16,
        block=256,
    ),
    GGMLType.Q3_K: BlockFormat(
        {"hmask": 32, "qs": 64, "scales": 12, "d": 2},
        {"codes": _q3_k_codes, "s": _q3_k_scales, "d": _D},
        bits=4,
        group=16,
        block=256,
        zero=4,
    ),
    GGMLType.Q4_K: BlockFormat(
        {"d": 2, "d_m": 2, "scales": 12, "qs": 128},
        {"codes": _nibbles(32), "s": _k_scales, "m": _k_mins, "d": _D, "d_m": _D_M},
        bits=4,
        block=256,
        paired="qs",
    ),
    GGMLType.Q5_K: BlockFormat(
        {"d": 2, "d_m": 2, "scales": 12, "qh": 32, "qs": 128},
        {"codes": _fives(32, 32, 0), "s": _k_scales, "m": _k_mins, "d": _D, "d_m": _D_M},
        block=256,
    ),
    GGMLType.Q6_K: BlockFormat(
        {"ql": 128, "qh": 64, "scales": 16, "d": 2},
        {"codes": _q6_k_codes, "s": _int8("scales"), "d": _D},
        group=16,
        block=256,
    ),
    GGMLType.IQ4_NL: BlockFormat({"d": 2, "qs": 16}, {"codes": _IQ4_CODES, "d": _D}),
    GGMLType.IQ4_XS: BlockFormat(
        {"d": 2, "scales_h": 2, "scales_l": 4, "qs": 128},
        {"codes": _IQ4_CODES, "s": _iq4_xs_scales, "d": _D},
        block=256,
    ),
    GGMLType.MXFP4: BlockFormat({"e": 1, "qs": 16}, {"codes": _TWICE_E2M1, "d": _half_e8m0}),
}


def block_format(ggml_type: GGMLType) -> BlockFormat:
    """The table's entry for a ggml type.

    Raises ValueError, naming the type and the supported ones.
    """
    if ggml_type not in FORMATS:
        supported = ", ".join(known.name for known in FORMATS)
        raise ValueError(f"the tensor type {ggml_type.name} is not supported; supported are {supported}")
    return FORMATS[ggml_type]


def _check_rows(ggml_type: GGMLType, shape: tuple[int, ...]) -> None:
    block = FORMATS[ggml_type].block
    if shape[-1] % block:
        raise ValueError(f"a {ggml_type.name} tensor's rows must be multiples of {block}, got {shape}")


def packed_size(ggml_type: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in the file, shape [..., K].

    Raises ValueError where K does not consist of whole blocks.
    """
    blocks = block_format(ggml_type)
    _check_rows(ggml_type, shape)
    return prod(shape) // blocks.block * blocks.size


# --- From the file's blocks to the device's arrays.


def _bits(blocks: BlockFormat, num_inputs: int) -> int:
    """Bits of a code: 4-bit ones of a row that has no whole number of paired runs take 8."""
    return 8 if blocks.bits == 4 and num_inputs % _PAIRED else blocks.bits


def _fields(blocks: BlockFormat, packed: Array) -> dict[str, Array]:
    ends = tuple(accumulate(blocks.fields.values()))
    starts = (0, *ends[:-1])
    return {name: packed[:, i:j] for name, i, j in zip(blocks.fields, starts, ends, strict=True)}


@cache
def _block_arrays(ggml_type: GGMLType) -> dict[str, tuple[int, np.dtype[Any]]]:
    """How many elements of each array a block makes and of which dtype, found by reading an empty block."""
    blocks = FORMATS[ggml_type]
    if blocks.float_dtype is not None:
        return {"codes": (1, blocks.float_dtype)}
    fields = _fields(blocks, np.zeros((1, blocks.size, 1), np.uint8))
    arrays = {name: read(fields, np) for name, read in blocks.readers.items()}
    return {name: (array.size, array.dtype) for name, array in arrays.items()}


def _device_arrays(
    ggml_type: GGMLType, shape: tuple[int, ...], layout: Layout
) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any]]]:
    """Name, shape and dtype of each array of a tensor [..., N, K]."""
    blocks = block_format(ggml_type)
    _check_rows(ggml_type, shape)
    *lead, num_rows, num_inputs = shape
    for name, (count, dtype) in _block_arrays(ggml_type).items():
        length = num_inputs // blocks.block * count
        if name == "codes" and blocks.bits == 4:
            paired = _bits(blocks, num_inputs) == 4
            length, dtype = (length // 2, np.dtype(np.uint8)) if paired else (length, np.dtype(np.int8))
        yield name, (*lead, num_rows, length) if layout == "rows" else (*lead, length, num_rows), dtype


def device_size(ggml_type: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of the file, shape [..., K], takes on the device, in either layout.

    Raises ValueError for an unknown type, or a K that does not consist of whole blocks.
    """
    arrays = _device_arrays(ggml_type, (1, *shape), "rows")
    return sum(prod(dims) * dtype.itemsize for _, dims, dtype in arrays)


def empty(
    ggml_type: GGMLType, shape: tuple[int, ...], layout: Layout, new: Callable[..., Array] = np.empty
) -> QuantTensor:
    """A QuantTensor with nothing in it; shape is [..., N, K] whatever the layout.

    `new(shape, dtype)` makes each array: numpy's for `pack_into` to fill, or a device's.
    Raises ValueError for an unknown type, or a K that does not consist of whole blocks.
    """
    blocks = block_format(ggml_type)
    arrays: dict[str, Array] = dict.fromkeys(("codes", "s", "m", "d", "d_m"))
    arrays |= {name: new(dims, dtype) for name, dims, dtype in _device_arrays(ggml_type, shape, layout)}
    bits = _bits(blocks, shape[-1])
    zero = blocks.zero if bits == 4 else 0
    return QuantTensor(**arrays, group=blocks.group, block=blocks.block, bits=bits, zero=zero, layout=layout)


def _device_codes(blocks: BlockFormat, fields: Fields, bits: int, xp: ModuleType) -> Array:
    """The codes as the device has them, [..., M]."""
    if blocks.bits != 4:
        return blocks.readers["codes"](fields, xp)
    if bits == 4 and blocks.paired:
        return fields[blocks.paired]
    codes = blocks.readers["codes"](fields, xp)
    if bits == 8:
        return _minus(codes, blocks.zero)
    runs = codes.reshape(-1, 2, _PAIRED // 2, codes.shape[-1])
    return _joined(runs[:, 0], runs[:, 1], 4)


def _read_blocks(blocks: BlockFormat, packed: Array, bits: int, xp: ModuleType) -> dict[str, Array]:
    """The device's arrays, [.., M], of blocks [num_blocks, bytes, M]."""
    fields = _fields(blocks, packed)
    arrays = {name: read(fields, xp) for name, read in blocks.readers.items() if name != "codes"}
    return arrays | {"codes": _device_codes(blocks, fields, bits, xp)}


def read_rows(ggml_type: GGMLType, raw: Array, xp: ModuleType) -> dict[str, Array]:
    """The arrays of a QuantTensor [N, K] in layout "rows", from packed rows [N, bytes].

    For a device's module: numpy gets the same from `pack`, far faster.
    """
    blocks = FORMATS[ggml_type]
    if blocks.float_dtype is not None:
        return {"codes": raw.view(blocks.float_dtype)}
    num_rows, row_size = raw.shape
    bits = _bits(blocks, row_size // blocks.size * blocks.block)
    arrays = _read_blocks(blocks, raw.reshape(-1, blocks.size, 1), bits, xp)
    return {name: array.reshape(num_rows, -1) for name, array in arrays.items()}


def _slice_arrays(blocks: BlockFormat, raw: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """The device's arrays, [.., num_rows], of packed rows [num_rows, bytes]."""
    if blocks.float_dtype is not None:
        return {"codes": raw.view(blocks.float_dtype).T}
    packed = np.ascontiguousarray(raw.T).reshape(-1, blocks.size, len(raw))
    return _read_blocks(blocks, packed, bits, np)


def _write_rows(out: QuantTensor, blocks: BlockFormat, raw: np.ndarray, first_row: int) -> None:
    """Converts packed rows [N, bytes] into `out`, [..., K] by rows or [K, ...] by columns."""
    step = max(1, min(256, _SLICE_SIZE // raw.shape[1]))
    for start in range(0, len(raw), step):
        packed = raw[start : start + step]
        rows = slice(first_row + start, first_row + start + len(packed))
        for name, array in _slice_arrays(blocks, packed, out.bits).items():
            by_column = getattr(out, name) if out.layout == "columns" else getattr(out, name).T
            by_column[:, rows] = array.reshape(-1, len(packed))


def _check_place(
    place: QuantTensor, ggml_type: GGMLType, raw: np.ndarray, shape: tuple[int, ...], first_row: int
) -> None:
    if raw.nbytes != packed_size(ggml_type, shape):
        raise ValueError(
            f"a {ggml_type.name} tensor {shape} has {packed_size(ggml_type, shape)} bytes, got {raw.nbytes}"
        )
    *lead, first, second = place.shape
    num_rows, num_inputs = (first, second) if place.layout == "rows" else (second, first)
    if (*lead, num_inputs) != (*shape[:-2], shape[-1]) or not 0 <= first_row <= num_rows - shape[-2]:
        raise ValueError(
            f"a tensor {shape} does not fit at row {first_row} of {(*lead, num_rows, num_inputs)}"
        )


def pack_into(
    out: QuantTensor,
    index: tuple[int, ...],
    ggml_type: GGMLType,
    raw: np.ndarray,
    shape: tuple[int, ...],
    *,
    first_row: int = 0,
) -> None:
    """Converts a tensor of the file into its place in `out`, in slices whose temporaries take a few MB.

    `raw` is the tensor's flat bytes and `shape` its [..., N, K]. `out` comes from `empty` with the same type;
    `index` picks its place among the leading axes that `shape` does not have, and the rows go to first_row to
    first_row + N of the output axis (several tensors may share it).
    Calls for different places may run in different threads.
    Raises ValueError where the type, the shapes or the number of bytes do not fit.
    """
    blocks = block_format(ggml_type)
    place = out.map(lambda array: array[index])
    _check_place(place, ggml_type, raw, shape, first_row)
    *lead, num_rows, _ = shape
    packed = raw.reshape(*lead, num_rows, -1)
    for at in np.ndindex(*lead):
        _write_rows(place.map(itemgetter(at)), blocks, packed[at], first_row)


def pack(ggml_type: GGMLType, raw: np.ndarray, shape: tuple[int, ...], layout: Layout) -> QuantTensor:
    """A tensor of the file, flat bytes and shape [..., N, K], as a new numpy QuantTensor.

    Raises ValueError as `pack_into` does.
    """
    out = empty(ggml_type, shape, layout)
    pack_into(out, (), ggml_type, raw, shape)
    return out


# --- From the device's arrays to numbers, for numpy and jax arrays alike.


def swap_chunks(codes: Array, first_row: Array | int, xp: ModuleType = np) -> Array:
    """Codes [..., N, bytes] of the rows from `first_row` on as `swapped` has them; of such the plain ones."""
    *lead, num_rows, _ = codes.shape
    rows = first_row + np.arange(num_rows, dtype=np.int32)
    places = (rows & 7)[:, None] ^ np.arange(8, dtype=np.int32)[None]
    chunks = codes.reshape(*lead, num_rows, -1, 8, 16 // codes.dtype.itemsize)
    places = places.reshape(*(1,) * len(lead), num_rows, 1, 8, 1)
    return xp.take_along_axis(chunks, places, axis=-2).reshape(codes.shape)


def unswapped(tensor: QuantTensor, xp: ModuleType = np, *, first_row: Array | int = 0) -> QuantTensor:
    """The tensor, or its rows from `first_row` on, with each chunk of the codes in its own place."""
    if not tensor.swapped:
        return tensor
    return replace(tensor, codes=swap_chunks(tensor.codes, first_row, xp), swapped=False)


def unpack_codes(tensor: QuantTensor, xp: ModuleType = np) -> Array:
    """The codes one to an element with `zero` not yet taken off, [..., N, K] or [..., K, N] by the layout."""
    tensor = unswapped(tensor, xp)
    if tensor.bits != 4:
        return tensor.codes
    *lead, first, second = tensor.codes.shape
    half, axis = _PAIRED // 2, -2 if tensor.layout == "rows" else -3
    split = (first, second // half, half) if tensor.layout == "rows" else (first // half, half, second)
    runs = tensor.codes.reshape(*lead, *split)
    return xp.stack((runs & 15, runs >> 4), axis=axis).reshape(tensor.shape)


def _by_group(
    operation: Callable[[Array, Array], Array], values: Array, factor: Array, layout: Layout
) -> Array:
    """Applies a factor that has one element for several of `values` along K."""
    *lead, first, second = factor.shape
    if layout == "rows":
        grouped = values.reshape(*lead, first, second, -1)
        return operation(grouped, factor[..., None]).reshape(values.shape)
    grouped = values.reshape(*lead, first, -1, second)
    return operation(grouped, factor[..., None, :]).reshape(values.shape)


def dequantise(tensor: QuantTensor, xp: ModuleType = np) -> Array:
    """The values as float32, [..., N, K] or [..., K, N] by the layout; bit-equal to ggml's."""
    values = unpack_codes(tensor, xp).astype(xp.float32)
    if tensor.d is None:
        return values
    if tensor.zero:
        values = values - float(tensor.zero)
    values = _by_group(mul, values, _scales(tensor.d, tensor.s, tensor.layout, xp), tensor.layout)
    if tensor.d_m is None:
        return values
    return _by_group(sub, values, _scales(tensor.d_m, tensor.m, tensor.layout, xp), tensor.layout)


def _scales(d: Array, s: Array | None, layout: Layout, xp: ModuleType) -> Array:
    d = d.astype(xp.float32)
    return d if s is None else _by_group(mul, s.astype(xp.float32), d, layout)

"""Block formats against the gguf package's own dequantize, from the arrays that the device gets."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import prod

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.quants import (
    FORMATS,
    GGMLType,
    Layout,
    QuantTensor,
    block_format,
    dequantise,
    device_size,
    empty,
    pack,
    pack_into,
    packed_size,
    read_rows,
    swap_chunks,
    unpack_codes,
    unswapped,
)

LAYOUTS: tuple[Layout, ...] = ("rows", "columns")
QUANTISED = [known for known in FORMATS if FORMATS[known].float_dtype is None]

# where each block has its float16 numbers, from ggml-common.h
FLOAT16_AT = {
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.F16: (0,),
}


def random_blocks(ggml_type: GGMLType, shape: tuple[int, ...], *, seed: int = 0) -> np.ndarray:
    """Random bytes whose floats are finite; MXFP4's scales are small enough that no value overflows."""
    block, size = gguf.GGML_QUANT_SIZES[ggml_type]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (prod(shape) // block, size), dtype=np.uint8)
    for at in FLOAT16_AT.get(ggml_type, ()):
        infinite = raw[:, at + 1] & 0x7C == 0x7C
        raw[infinite, at + 1] &= 0xBF
    if ggml_type == GGMLType.MXFP4:
        raw[:, 0] %= 253
    if ggml_type in (GGMLType.F32, GGMLType.BF16):
        raw[:, -1] = raw[:, -1] & 0x80 | 0x3F
    return raw.reshape(-1)


def expected(ggml_type: GGMLType, raw: np.ndarray, shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    by_row = raw.reshape(*shape[:-1], -1)
    values = gguf.quants.dequantize(by_row, ggml_type).reshape(shape)
    return values if layout == "rows" else np.ascontiguousarray(np.swapaxes(values, -1, -2))


def jitted_dequantise(tensor: QuantTensor) -> np.ndarray:
    def run(arrays: dict[str, jax.Array]) -> jax.Array:
        return dequantise(replace(tensor, **arrays), jnp)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return np.asarray(jax.jit(run)({name: jnp.asarray(a) for name, a in tensor.arrays.items()}))


def assert_bit_equal(actual: np.ndarray, desired: np.ndarray) -> None:
    assert actual.dtype == np.float32
    assert np.isfinite(desired).all()
    np.testing.assert_array_equal(actual.view(np.uint32), desired.view(np.uint32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda known: known.name)
def test_values_are_bit_equal_to_gguf(ggml_type: GGMLType, layout: Layout) -> None:
    shape = (3, 37, 512)
    raw = random_blocks(ggml_type, shape)
    tensor = pack(ggml_type, raw, shape, layout)
    assert tensor.shape == ((3, 37, 512) if layout == "rows" else (3, 512, 37))
    assert_bit_equal(dequantise(tensor), expected(ggml_type, raw, shape, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda known: known.name)
def test_jitted_values_are_bit_equal_to_gguf(ggml_type: GGMLType, layout: Layout) -> None:
    shape = (2, 64, 768)
    raw = random_blocks(ggml_type, shape, seed=1)
    if ggml_type == GGMLType.MXFP4:
        raw.reshape(-1, 17)[:, 0] = np.maximum(raw.reshape(-1, 17)[:, 0], 2)  # XLA flushes subnormals
    tensor = pack(ggml_type, raw, shape, layout)
    assert_bit_equal(jitted_dequantise(tensor), expected(ggml_type, raw, shape, layout))


@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.F16], ids=lambda t: t.name)
def test_values_of_swapped_rows_are_bit_equal(ggml_type: GGMLType) -> None:
    shape = (3, 40, 512)
    raw = random_blocks(ggml_type, shape, seed=4)
    plain = pack(ggml_type, raw, shape, "rows")
    tensor = replace(plain, codes=swap_chunks(plain.codes, 0), swapped=True)
    chunks, found = (t.codes.view(np.uint8).reshape(3, 40, -1, 16) for t in (plain, tensor))
    for row, chunk in ((0, 5), (6, 3), (13, 0), (39, 15)):
        np.testing.assert_array_equal(found[:, row, chunk], chunks[:, row, chunk ^ row % 8])
    for values in (dequantise(tensor), jitted_dequantise(tensor)):
        assert_bit_equal(values, expected(ggml_type, raw, shape, "rows"))
    part = unswapped(tensor.map(lambda array: array[1, 13:29]), first_row=13)
    assert_bit_equal(dequantise(part), expected(ggml_type, raw, shape, "rows")[1, 13:29])


@pytest.mark.parametrize("shape", [(37, 768), (1, 256), (5, 96)], ids=str)
@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda known: known.name)
def test_rows_read_on_the_device_are_bit_equal(ggml_type: GGMLType, shape: tuple[int, int]) -> None:
    shape = (shape[0], max(shape[1], FORMATS[ggml_type].block))
    raw = random_blocks(ggml_type, shape, seed=3)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        read = jax.jit(lambda rows: read_rows(ggml_type, rows, jnp))(raw.reshape(shape[0], -1))
    packed = pack(ggml_type, raw, shape, "rows")
    assert read.keys() == packed.arrays.keys()
    for name, array in packed.arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert np.asarray(read[name]).tobytes() == array.tobytes(), name
    tensor = replace(packed, **{name: np.asarray(array) for name, array in read.items()})
    assert_bit_equal(dequantise(tensor), expected(ggml_type, raw, shape, "rows"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 32), (5, 32), (1, 96), (1, 64), (2, 3, 160), (300, 64)], ids=str)
@pytest.mark.parametrize("ggml_type", [t for t in FORMATS if FORMATS[t].block <= 32], ids=lambda t: t.name)
def test_small_shapes(ggml_type: GGMLType, shape: tuple[int, ...], layout: Layout) -> None:
    raw = random_blocks(ggml_type, shape)
    tensor = pack(ggml_type, raw, shape, layout)
    assert_bit_equal(dequantise(tensor), expected(ggml_type, raw, shape, layout))
    assert tensor.bits == (8 if shape[-1] % 64 and FORMATS[ggml_type].bits == 4 else FORMATS[ggml_type].bits)


@pytest.mark.parametrize("ggml_type", [t for t in FORMATS if FORMATS[t].block == 256], ids=lambda t: t.name)
def test_one_block(ggml_type: GGMLType) -> None:
    raw = random_blocks(ggml_type, (1, 256))
    for layout in LAYOUTS:
        tensor = pack(ggml_type, raw, (1, 256), layout)
        assert_bit_equal(dequantise(tensor), expected(ggml_type, raw, (1, 256), layout))


@pytest.mark.parametrize("ggml_type", QUANTISED, ids=lambda known: known.name)
def test_products_are_exact(ggml_type: GGMLType) -> None:
    """d * s * code in float32 is what it is in float64, so a fused multiply-add has nothing to change."""
    raw = random_blocks(ggml_type, (64, 512), seed=2)
    tensor = replace(pack(ggml_type, raw, (64, 512), "rows"), m=None, d_m=None)
    exact = unpack_codes(tensor).astype(np.float64) - tensor.zero
    exact *= np.repeat(tensor.d.astype(np.float64), tensor.block, axis=1)
    if tensor.s is not None:
        exact *= np.repeat(tensor.s.astype(np.float64), tensor.group, axis=1)
    np.testing.assert_array_equal(dequantise(tensor).astype(np.float64), exact)


def test_four_bit_codes_lie_in_pairs() -> None:
    """Code 64g + j in the low nibble of byte 32g + j, code 64g + 32 + j in its high nibble."""
    qs = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16)
    raw = np.concatenate((np.full((8, 2), 0x3C, np.uint8), qs), axis=1).reshape(-1)
    natural = np.concatenate((qs & 15, qs >> 4), axis=1).reshape(2, 128)
    rows = pack(GGMLType.Q4_0, raw, (2, 128), "rows")
    assert rows.codes.shape == (2, 64)
    np.testing.assert_array_equal(rows.codes[:, :32] & 15, natural[:, :32])
    np.testing.assert_array_equal(rows.codes[:, :32] >> 4, natural[:, 32:64])
    np.testing.assert_array_equal(rows.codes[:, 32:] & 15, natural[:, 64:96])
    np.testing.assert_array_equal(rows.codes[:, 32:] >> 4, natural[:, 96:])
    np.testing.assert_array_equal(unpack_codes(rows), natural)
    columns = pack(GGMLType.Q4_0, raw, (2, 128), "columns")
    np.testing.assert_array_equal(columns.codes, rows.codes.T)
    assert columns.d.shape == (4, 2)


@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda known: known.name)
def test_columns_are_rows_transposed(ggml_type: GGMLType) -> None:
    raw = random_blocks(ggml_type, (2, 5, 256))
    rows, columns = (pack(ggml_type, raw, (2, 5, 256), layout) for layout in LAYOUTS)
    assert rows.arrays.keys() == columns.arrays.keys()
    for name, array in rows.arrays.items():
        np.testing.assert_array_equal(np.swapaxes(array, -1, -2), columns.arrays[name])


def test_arrays_stay_as_narrow_as_in_the_file() -> None:
    dtypes = {
        known.name: {name: str(array.dtype) for name, array in empty(known, (1, 256), "rows").arrays.items()}
        for known in QUANTISED
    }
    four_with_mins = {"codes": "uint8", "s": "uint8", "m": "uint8", "d": "float16", "d_m": "float16"}
    plain = {"codes": "int8", "d": "float16"}
    assert dtypes == {
        "Q8_0": plain,
        "Q4_0": plain | {"codes": "uint8"},
        "Q4_1": {"codes": "uint8", "d": "float16", "d_m": "float16"},
        "Q5_0": plain,
        "Q5_1": plain | {"d_m": "float16"},
        "Q2_K": four_with_mins,
        "Q3_K": {"codes": "uint8", "s": "int8", "d": "float16"},
        "Q4_K": four_with_mins,
        "Q5_K": four_with_mins | {"codes": "int8"},
        "Q6_K": {"codes": "int8", "s": "int8", "d": "float16"},
        "IQ4_NL": plain,
        "IQ4_XS": {"codes": "int8", "s": "int8", "d": "float16"},
        "MXFP4": {"codes": "int8", "d": "float32"},
    }


@pytest.mark.parametrize("shape", [(7, 768), (2, 3, 256)], ids=str)
@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda known: known.name)
def test_device_size_is_the_real_size(ggml_type: GGMLType, shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS:
        tensor = empty(ggml_type, shape, layout)
        assert tensor.size == device_size(ggml_type, shape)
        assert tensor.size == sum(array.nbytes for array in tensor.arrays.values())


def test_device_size_of_narrow_rows() -> None:
    assert device_size(GGMLType.Q4_0, (3, 96)) == empty(GGMLType.Q4_0, (3, 96), "rows").size == 3 * (96 + 6)
    assert device_size(GGMLType.F32, (2048,)) == 4 * 2048


def test_the_table_has_ggmls_block_sizes() -> None:
    for ggml_type, blocks in FORMATS.items():
        assert (blocks.block, blocks.size) == gguf.GGML_QUANT_SIZES[ggml_type]


def test_tensors_share_a_stack() -> None:
    """Two experts' gate and up rows, written apart, are what one tensor of all rows would be."""
    gate, up = (random_blocks(GGMLType.Q4_K, (2, 3, 256), seed=seed) for seed in (0, 1))
    for layout in LAYOUTS:
        stack = empty(GGMLType.Q4_K, (4, 2, 6, 256), layout)
        pack_into(stack, (1,), GGMLType.Q4_K, gate, (2, 3, 256))
        pack_into(stack, (1,), GGMLType.Q4_K, up, (2, 3, 256), first_row=3)
        both = np.concatenate((gate.reshape(2, -1), up.reshape(2, -1)), axis=1).reshape(-1)
        layer = stack.map(lambda array: array[1])
        assert_bit_equal(dequantise(layer), expected(GGMLType.Q4_K, both, (2, 6, 256), layout))


def test_read_only_bytes_stay_as_they_are() -> None:
    for ggml_type in FORMATS:
        raw = random_blocks(ggml_type, (4, 256))
        before = raw.copy()
        raw.flags.writeable = False
        pack(ggml_type, raw, (4, 256), "rows")
        np.testing.assert_array_equal(raw, before)


def test_unknown_type_is_named_with_the_supported_ones() -> None:
    with pytest.raises(
        ValueError, match=r"tensor type IQ2_XXS is not supported; supported are F32, .*, Q4_K, "
    ):
        block_format(GGMLType.IQ2_XXS)
    with pytest.raises(ValueError, match="IQ1_S is not supported"):
        device_size(GGMLType.IQ1_S, (1, 256))


def test_wrong_shapes_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Q4_K tensor's rows must be multiples of 256, got \(2, 64\)"):
        empty(GGMLType.Q4_K, (2, 64), "rows")
    with pytest.raises(ValueError, match="has 288 bytes, got 287"):
        pack(GGMLType.Q4_K, np.zeros(287, np.uint8), (2, 256), "rows")
    stack = empty(GGMLType.Q4_K, (2, 256), "columns")
    with pytest.raises(ValueError, match="does not fit at row 1 "):
        pack_into(stack, (), GGMLType.Q4_K, np.zeros(288, np.uint8), (2, 256), first_row=1)
    with pytest.raises(ValueError, match="does not fit"):
        pack_into(stack, (), GGMLType.Q4_K, np.zeros(576, np.uint8), (2, 2, 256))


def test_a_q4_k_m_file_takes_at_most_1_12_of_its_size() -> None:
    """Shapes and mixture of the 30B files: Q6_K in half of attn_v and ffn_down_exps, and in output."""
    q4, q6, f32 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.F32
    layer = [
        (q4, (4096, 2048)),
        (q4, (512, 2048)),
        (q4, (2048, 4096)),
        (q4, (2 * 128, 768, 2048)),
        (f32, (128, 2048)),
        (f32, (2 * 2048 + 2 * 128,)),
    ]
    mixed = [(512, 2048), (128, 2048, 768)]
    tensors = [(q4, (151936, 2048)), (q6, (151936, 2048)), *layer * 48]
    tensors += [(t, shape) for t in (q4, q6) for shape in mixed * 24]
    in_file = sum(packed_size(t, shape) for t, shape in tensors)
    on_device = sum(device_size(t, shape) for t, shape in tensors)
    assert 18.5e9 < in_file < 18.7e9
    assert on_device / in_file <= 1.12


def test_importing_it_loads_no_jax() -> None:
    code = "import sys, jaxmoe.quants; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

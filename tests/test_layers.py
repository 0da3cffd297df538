"""Products with packed weights against float64, and the bits of a row wherever it stands."""

from __future__ import annotations

from math import prod

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from jaxmoe import layers
from jaxmoe.layers import (
    MIN_ROWS,
    ROW_TILE,
    Index,
    RMSNorm,
    StackedWeight,
    by_row_tiles,
    column_tile,
    matmul,
    num_tiles,
    padded_rows,
    rms_norm,
)
from jaxmoe.quants import Layout, QuantTensor, pack
from tools.synth_gguf import random_blocks

LAYOUTS: tuple[Layout, ...] = ("rows", "columns")
# 4-bit codes with and without s, m and zero, in groups of 16 and 32; 8-bit codes; plain numbers
TYPES = [GGMLType[n] for n in ("Q4_K", "Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "Q8_0", "F16", "F32")]
L, N, K = 2, 160, 256


def stack_of(
    ggml_type: GGMLType, layout: Layout, shape: tuple[int, ...] = (L, N, K), seed: int = 0
) -> tuple[QuantTensor, np.ndarray]:
    """A random stack on the device, and gguf's float64 values of it [..., N, K]."""
    block = gguf.GGML_QUANT_SIZES[ggml_type][0]
    blocks = random_blocks(np.random.default_rng(seed), ggml_type, np.ones(prod(shape) // block, np.float32))
    values = gguf.quants.dequantize(blocks.reshape(*shape[:-1], -1), ggml_type).reshape(shape)
    packed = pack(ggml_type, np.ascontiguousarray(blocks).reshape(-1), shape, layout)
    return packed.map(jnp.asarray), values.astype(np.float64)


def inputs(num_rows: int, width: int = K, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)


def jitted(w: QuantTensor, num_leading: int = 1):  # type: ignore[no-untyped-def]
    """matmul as the steps call it: index and number of rows are traced."""

    @jax.jit
    def run(x: Array, index: Index, num_rows: Array) -> Array:
        return matmul(x, w, index, num_rows)

    def call(x: np.ndarray, *index: int, num_rows: int | None = None) -> np.ndarray:
        assert len(index) == num_leading
        count = len(x) if num_rows is None else num_rows
        return np.asarray(run(x, tuple(map(np.int32, index)), np.int32(count)))

    return call


def assert_product(y: np.ndarray, x: np.ndarray, values: np.ndarray) -> None:
    truth = x.astype(np.float64) @ values.T
    np.testing.assert_allclose(y, truth, rtol=0, atol=1e-6 * np.abs(truth).max())


def test_no_type_and_no_rank_is_promoted_in_these_tests() -> None:
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 2)) + jnp.ones(2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_a_product_is_float64_s(ggml_type: GGMLType, layout: Layout) -> None:
    w, values = stack_of(ggml_type, layout)
    x = inputs(16)
    y = jitted(w)(x, 1)
    assert y.dtype == np.float32
    assert_product(y, x, values[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_a_row_without_whole_pairs_of_runs_serve_too(layout: Layout) -> None:
    w, values = stack_of(GGMLType.Q4_0, layout, (1, 24, 96))  # 96 is no multiple of 64
    x = inputs(8, 96)
    assert_product(jitted(w)(x, 0), x, values[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_any_number_of_leading_axes_is_indexed(layout: Layout, lead: tuple[int, ...]) -> None:
    w, values = stack_of(GGMLType.Q4_K, layout, (*lead, 8, K))
    x = inputs(8)
    for index in np.ndindex(*lead):
        assert_product(jitted(w, len(lead))(x, *index), x, values[index])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.F32], ids=lambda t: t.name)
def test_the_last_column_tile_may_lie_over_the_one_before(
    monkeypatch: pytest.MonkeyPatch, ggml_type: GGMLType, layout: Layout
) -> None:
    monkeypatch.setattr(layers, "COLUMN_TILES", {jax.default_backend(): 48})  # 160 = 3 x 48 + 16
    assert column_tile(N) == 48
    w, values = stack_of(ggml_type, layout)
    x = inputs(16)
    assert_product(jitted(w)(x, 1), x, values[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ggml_type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.F32], ids=lambda t: t.name)
def test_a_row_has_the_same_bits_alone_and_anywhere_among_others(ggml_type: GGMLType, layout: Layout) -> None:
    w, _ = stack_of(ggml_type, layout)
    run, row = jitted(w), inputs(1, seed=2)
    alone = run(padded(row, 8), 1, num_rows=1)[0]
    for length in (8, 64):
        for place in {0, 1, 7, length // 2 + 3, length - 1}:
            x = inputs(length)
            x[place] = row
            np.testing.assert_array_equal(run(x, 1)[place], alone)
            np.testing.assert_array_equal(run(x, 1, num_rows=place + 1)[place], alone)


def padded(x: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((length - len(x), *x.shape[1:]), x.dtype)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_in_rows_past_the_real_ones_does_not_matter(layout: Layout) -> None:
    w, _ = stack_of(GGMLType.Q4_K, layout)
    run, x = jitted(w), inputs(16)
    expected = run(padded(x[:3], 16), 0, num_rows=3)
    x[3:] = np.nan
    y = run(x, 0, num_rows=3)
    np.testing.assert_array_equal(y[:3], expected[:3])
    np.testing.assert_array_equal(y[ROW_TILE:], 0)


def test_no_rows_cost_nothing_and_give_zeros() -> None:
    w, _ = stack_of(GGMLType.Q4_K, "columns")
    np.testing.assert_array_equal(jitted(w)(np.full((8, K), np.nan, np.float32), 0, num_rows=0), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stacked_weight_finds_each_layer_in_its_stack(layout: Layout) -> None:
    kinds = (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.F32)
    stacks, values = zip(*(stack_of(kind, layout, seed=i) for i, kind in enumerate(kinds)), strict=True)
    places = [(2, 0), (0, 1), (1, 0), (0, 0), (2, 1), (1, 1)]
    weight, x = StackedWeight(stacks, places), inputs(8)

    @jax.jit
    def run(x: Array, layer: Array) -> Array:
        return weight.apply(lambda w, i: matmul(x, w, (i,), len(x)), layer)

    for layer, (which, index) in enumerate(places):
        assert_product(run(x, np.int32(layer)), x, values[which][index])


def test_rms_norm_is_float64_s_and_of_the_layer_asked_for() -> None:
    x, weights = 30 * inputs(6).reshape(2, 3, K), 1 + inputs(4) / 4
    norm = RMSNorm(jnp.asarray(weights), 1e-6)
    wide = x.astype(np.float64)
    for layer in range(4):
        truth = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * weights[layer]
        np.testing.assert_allclose(norm(jnp.asarray(x), jnp.int32(layer)), truth, rtol=2e-6, atol=1e-6)


def test_rms_norm_takes_eps_inside_the_root() -> None:
    assert rms_norm(jnp.zeros((1, 4)), jnp.ones(4), 1e-6).tolist() == [[0, 0, 0, 0]]
    np.testing.assert_allclose(rms_norm(jnp.ones((1, 4)), jnp.full(4, 2.0), 3.0), 1)


@pytest.mark.parametrize("shape", [(256,), (4, 64), (2, 64), (3, 96)])
def test_a_norm_by_row_tiles_has_the_same_bits_in_any_number_of_rows(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(jnp.asarray(1 + inputs(2, shape[-1]) / 4), 1e-6)
    x = np.random.default_rng(0).standard_normal((64, *shape)).astype(np.float32)

    @jax.jit
    def run(x: Array, num_rows: Array) -> Array:
        return by_row_tiles(lambda tile: norm(tile, jnp.int32(1)), jnp.zeros_like(x), (x,), num_rows)

    whole = run(x, np.int32(64))
    for length in (MIN_ROWS, 3 * ROW_TILE):
        np.testing.assert_array_equal(run(x[:length], np.int32(length)), whole[:length])


@pytest.mark.parametrize(("num_rows", "tiles"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_tiles_hold_all_rows(num_rows: int, tiles: int) -> None:
    assert int(num_tiles(num_rows)) == tiles


def test_tiles_past_the_last_row_keep_what_was_there() -> None:
    out = by_row_tiles(
        lambda x: (x + 1, x[:, 0]), (jnp.full((24, 2), 7.0), jnp.zeros(24)), (jnp.ones((24, 2)),), 9
    )
    np.testing.assert_array_equal(out[0][:, 1], [2.0] * 16 + [7.0] * 8)
    np.testing.assert_array_equal(out[1], [1.0] * 16 + [0.0] * 8)


@pytest.mark.parametrize(("length", "expected"), [(1, 16), (8, 16), (16, 16), (17, 24)])
def test_padding_adds_zero_rows_up_to_a_tile(length: int, expected: int) -> None:
    x = jnp.ones((length, 2, 3))
    y = padded_rows(x)
    assert y.shape == (expected, 2, 3)
    assert float(y.sum()) == x.size
    np.testing.assert_array_equal(y[:length], x)

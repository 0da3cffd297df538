"""The kernels of whole rows, run by the emulator: their bits, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_config import small_config

from jaxmoe.kernels import rows

EPS = 1e-5
CONFIG = replace(small_config(), d_model=512, norm_eps=EPS)
WIDTHS = (512, 2560)  # one segment a warp, and two of which only some warps have the second

pytestmark = pytest.mark.usefixtures("emulated")

f32 = np.float32


def fma(a, b, c):
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)).astype(f32)


def sum_of_squares(x):
    """Sums over segments in the order of common.cuh: x [T, D] -> [T, D/256]."""
    lanes = x.reshape(x.shape[0], -1, 32, 8)
    total = lanes[..., 0] * lanes[..., 0]
    for i in range(1, 8):
        total = fma(lanes[..., i], lanes[..., i], total)
    for offset in (16, 8, 4, 2, 1):
        total = total + total[..., np.arange(32) ^ offset]
    return total[..., 0]


def inverse_rms(x):
    sums = sum_of_squares(x)
    total = sums[:, 0]
    for i in range(1, sums.shape[1]):
        total = total + sums[:, i]
    return f32(1) / np.sqrt(total * (f32(1) / f32(x.shape[1])) + f32(EPS))


def rounded(x, g):
    """Codes and scales of a norm, as the README words them."""
    y = (x * g).reshape(x.shape[0], -1, 32)
    highest = np.abs(y).max(-1)
    with np.errstate(divide="ignore"):
        factor = np.where(highest > 0, f32(127) / highest, f32(0)).astype(f32)
    codes = np.rint(y * factor[..., None])
    scale = highest * f32(1 / 127) * inverse_rms(x)[:, None]
    scales = np.stack((scale, scale * codes.sum(-1, dtype=f32)), -1)
    return codes.astype(np.int8).reshape(x.shape), scales


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, f32)


def norm_quantise(x, norm, count=None, layer=1):
    count = jnp.asarray([x.shape[0] if count is None else count], jnp.int32)
    arrays = jnp.asarray(x), jnp.asarray(norm), count
    return [np.asarray(a) for a in rows.norm_quantise(*arrays, eps=EPS, layer=layer)]


def combine(x, y, weights, norm, count=None, layer=1):
    count = jnp.asarray([x.shape[0] if count is None else count], jnp.int32)
    arrays = *map(jnp.asarray, (x, y, weights, norm)), count
    return [np.asarray(a) for a in rows.combine(*arrays, eps=EPS, layer=layer)]


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def assert_untouched(array):
    assert set(array.tobytes()) <= {0xFF}


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_quantise_has_the_bits_of_its_rule(width):
    x, norm = random(0, 3, width), random(1, 3, width)
    x[1] *= 1e-3
    assert_same_bits(norm_quantise(x, norm), rounded(x, norm[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_combine_has_the_bits_of_its_rule(width):
    x, y, weights, norm = random(2, 3, width), random(3, 9, width), random(4, 3, 3), random(5, 2, width)
    terms = y.reshape(3, 3, width)
    total = weights[:, :1] * terms[:, 0]
    for j in (1, 2):
        total = fma(weights[:, j : j + 1], terms[:, j], total)
    expected = x + total
    assert_same_bits(combine(x, y, weights, norm), (expected, *rounded(expected, norm[1])))


def test_a_row_has_the_same_bits_alone_among_few_and_among_many():
    x, norm = random(6, 70, 512), random(7, 2, 512)
    y, weights = random(8, 70 * 3, 512), random(9, 70, 3)
    normed, combined = norm_quantise(x, norm), combine(x, y, weights, norm)
    for few in (slice(4, 5), slice(65, 70)):
        places = slice(few.start * 3, few.stop * 3)
        assert_same_bits(norm_quantise(x[few], norm), [a[few] for a in normed])
        assert_same_bits(combine(x[few], y[places], weights[few], norm), [a[few] for a in combined])


def test_combine_rounds_as_norm_quantise_does():
    x, y, weights, norm = random(10, 5, 512), random(11, 15, 512), random(12, 5, 3), random(13, 2, 512)
    out, *codes_and_scales = combine(x, y, weights, norm)
    assert_same_bits(norm_quantise(out, norm), codes_and_scales)


@pytest.mark.parametrize("num_rows", [5, 70])
@pytest.mark.parametrize("count", [0, 2])
def test_rows_past_the_count_are_left_alone(num_rows, count):
    x, norm = random(14, num_rows, 512), random(15, 2, 512)
    y, weights = random(16, num_rows * 3, 512), random(17, num_rows, 3)
    normed, combined = norm_quantise(x, norm, count), combine(x, y, weights, norm, count)
    for array in (*normed, *combined):
        assert_untouched(array[count:])
    assert_same_bits([a[:count] for a in normed], [a[:count] for a in norm_quantise(x, norm)])
    assert_same_bits([a[:count] for a in combined], [a[:count] for a in combine(x, y, weights, norm)])


def test_the_layer_picks_the_norm():
    x, norm = random(18, 2, 512), random(19, 3, 512)
    for layer in range(3):
        assert_same_bits(norm_quantise(x, norm, layer=layer), rounded(x, norm[layer]))


def test_a_row_of_zeros_gives_zeros():
    codes, scales = norm_quantise(np.zeros((1, 512), f32), random(20, 2, 512))
    assert not codes.any()
    assert not scales.any()


def test_combine_adds_each_expert_with_its_weight():
    x, y = np.zeros((1, 512), f32), np.repeat(f32([[1], [10], [100]]), 512, axis=1)
    out, *_ = combine(x + 1000, y, f32([[1, 2, 3]]), np.ones((2, 512), f32))
    assert (out == 1321).all()


def test_comparisons_hold():
    for comparison in rows.comparisons(CONFIG, 3):
        found = comparison.kernel(*comparison.arrays)
        twin = jax.jit(comparison.twin)(*comparison.arrays)
        exact = jax.jit(comparison.float_twin)(*comparison.arrays)
        for limit, others in ((1e-3, twin), (0.015, exact)):
            for one, other in zip(found, others, strict=True):
                assert np.linalg.norm(one - other) <= limit * np.linalg.norm(other), comparison.name


def test_variants_are_what_the_wrappers_launch(monkeypatch):
    asked = set()
    launch = rows.ptx.launch

    def noted(file, name, defines, *args, shared_size=0, **kwargs):
        asked.add((file, name, tuple(sorted(defines.items())), shared_size))
        return launch(file, name, defines, *args, shared_size=shared_size, **kwargs)

    monkeypatch.setattr(rows.ptx, "launch", noted)
    for comparison in rows.comparisons(CONFIG, 3):
        comparison.kernel(*comparison.arrays)
    named = {(file, name, tuple(sorted(d.items())), size) for file, name, d, size in rows.variants(CONFIG)}
    assert asked == named

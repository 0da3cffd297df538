"""Whole rows: the norm, rounded to int8, and the weighted sum of a row's experts with the next norm.

The kernels are in rows.cu. A rounded row is codes int8 [T, D] and scales float32 [T, D/32, 2]: for each 32
columns the scale, and the scale times the sum of the codes. 1 / rms is in the scales, not in the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import ptx
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.rounding import GROUP, Rounded, readable, round_rows, rounded_shapes

FILE: Final = "rows.cu"
SEGMENT: Final = 256
_MANY_ROWS: Final = 64  # from here on a block past the last row ends before it reads
_VARIANTS: Final = (1, 128)
_COMPARED_ROWS: Final = (1, 5, 128)

Variant = tuple[str, str, dict[str, int | float | str], int]


def norm_quantise(x: Array, norm: Array, count: Array, *, eps: float, layer: int) -> tuple[Array, Array]:
    """Norm of the first `count` rows, rounded: x [T, D], norm [L, D], count int32 [1] -> codes, scales.

    All float32; D is a multiple of 256. Rows from `count` on are left as they are found.
    """
    rows, width = x.shape
    codes, scales = ptx.launch(
        FILE,
        "norm_quantise",
        _defines(rows, width, norm.shape[0], eps),
        (x, norm, count),
        rounded_shapes(rows, width),
        grid=(rows, 1, 1),
        threads=_threads(width),
        number=layer,
    )
    return codes, scales


def combine(
    x: Array, y: Array, weights: Array, norm: Array, count: Array, *, eps: float, layer: int
) -> tuple[Array, Array, Array]:
    """x plus each row's weighted experts, and its norm rounded -> x [T, D], codes, scales.

    x [T, D], y [T*A, D] (row t*A + j is token t's expert j), weights [T, A], norm [L, D], all float32; count
    int32 [1]. Rows from `count` on are left as they are found.
    """
    rows, width = x.shape
    defines = _defines(rows, width, norm.shape[0], eps) | {"A": weights.shape[1]}
    out, codes, scales = ptx.launch(
        FILE,
        "combine",
        defines,
        (x, y, weights, norm, count),
        (jax.ShapeDtypeStruct(x.shape, jnp.float32), *rounded_shapes(rows, width)),
        grid=(rows, 1, 1),
        threads=_threads(width),
        number=layer,
    )
    return out, codes, scales


def _defines(rows: int, width: int, num_norms: int, eps: float) -> dict[str, int | float | str]:
    assert width % SEGMENT == 0, f"rows of {width} columns are no whole segments"
    return {"D": width, "NORMS": num_norms, "EPS": float(eps), "MANY_ROWS": int(rows > _MANY_ROWS)}


def _threads(width: int) -> int:
    return 32 * min(8, width // SEGMENT)


def norm_quantise_twin(x: Array, norm: Array, count: Array, *, eps: float, layer: int) -> tuple[Array, Array]:
    """What norm_quantise gives, of all rows, in plain jnp."""
    return round_rows(x * norm[layer][None], _inverse_rms(x, eps))


def combine_twin(
    x: Array, y: Array, weights: Array, norm: Array, count: Array, *, eps: float, layer: int
) -> tuple[Array, Array, Array]:
    """What combine gives, of all rows, in plain jnp."""
    out = _combined(x, y, weights)
    return (out, *norm_quantise_twin(out, norm, count, eps=eps, layer=layer))


def _inverse_rms(x: Array, eps: float) -> Array:
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return jnp.float32(1) / jnp.sqrt(mean + jnp.float32(eps))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """The norm of x [T, D] with weight [D], not rounded, in plain jnp."""
    return x * weight[None] * _inverse_rms(x, eps)


def _combined(x: Array, y: Array, weights: Array) -> Array:
    return x + jnp.sum(y.reshape(*weights.shape, -1) * weights[..., None], axis=1)


def variants(config: ModelConfig) -> Iterator[Variant]:
    """The kernels of a model, for compiling without a GPU: (file, name, macros, shared size)."""
    for rows in _VARIANTS:
        defines = _defines(rows, config.d_model, config.num_layers, config.norm_eps)
        yield FILE, "norm_quantise", defines, 0
        yield FILE, "combine", defines | {"A": config.experts_per_token}, 0


def comparisons(config: ModelConfig, seed: int) -> Iterator[Comparison]:
    """Both kernels on random rows, for one row, few and many; results are values and sums of each 32."""
    rng = np.random.default_rng(seed)
    for rows in _COMPARED_ROWS:
        yield _norm_comparison(config, rng, rows)
        yield _combine_comparison(config, rng, rows)


def _norm_comparison(config: ModelConfig, rng: np.random.Generator, rows: int) -> Comparison:
    eps, layer = config.norm_eps, config.num_layers - 1

    def kernel(*arrays: Array) -> tuple[Array, Array]:
        return readable(Rounded(*norm_quantise(*arrays, eps=eps, layer=layer)))

    def twin(*arrays: Array) -> tuple[Array, Array]:
        return readable(Rounded(*norm_quantise_twin(*arrays, eps=eps, layer=layer)))

    def float_twin(x: Array, norm: Array, count: Array) -> tuple[Array, Array]:
        return _with_sums(rms_norm(x, norm[layer], eps))

    arrays = (_random(rng, rows, config.d_model), _random_norm(config, rng), _count(rows))
    return Comparison(f"norm_quantise, {rows} rows", kernel, twin, float_twin, arrays)


def _combine_comparison(config: ModelConfig, rng: np.random.Generator, rows: int) -> Comparison:
    eps, layer = config.norm_eps, config.num_layers - 1
    width, per_token = config.d_model, config.experts_per_token

    def kernel(*arrays: Array) -> tuple[Array, ...]:
        out, *rounded = combine(*arrays, eps=eps, layer=layer)
        return (out, *readable(Rounded(*rounded)))

    def twin(*arrays: Array) -> tuple[Array, ...]:
        out, *rounded = combine_twin(*arrays, eps=eps, layer=layer)
        return (out, *readable(Rounded(*rounded)))

    def float_twin(x: Array, y: Array, weights: Array, norm: Array, count: Array) -> tuple[Array, ...]:
        out = _combined(x, y, weights)
        return (out, *_with_sums(rms_norm(out, norm[layer], eps)))

    weights = jax.nn.softmax(_random(rng, rows, per_token), axis=-1)
    x, y = _random(rng, rows, width), _random(rng, rows * per_token, width)
    arrays = (x, y, weights, _random_norm(config, rng), _count(rows))
    return Comparison(f"combine, {rows} rows", kernel, twin, float_twin, arrays)


def _with_sums(values: Array) -> tuple[Array, Array]:
    return values, jnp.sum(values.reshape(values.shape[0], -1, GROUP), axis=-1)


def _random(rng: np.random.Generator, *shape: int) -> Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def _random_norm(config: ModelConfig, rng: np.random.Generator) -> Array:
    return jnp.asarray(rng.uniform(0.5, 1.5, (config.num_layers, config.d_model)).astype(np.float32))


def _count(rows: int) -> Array:
    return jnp.asarray([rows], jnp.int32)

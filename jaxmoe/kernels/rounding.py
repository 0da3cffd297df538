"""Activations rounded to int8 in groups of 32, as the products take them, in plain jnp."""

from __future__ import annotations

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

GROUP: Final = 32


class Rounded(NamedTuple):
    """Codes int8 [T, K] and scales float32 [T, K/32, 2]: (scale, scale * sum of the 32 codes)."""

    codes: Array
    scales: Array


def rounded_shapes(num_rows: int, width: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Those of rows [num_rows, width]."""
    scales = jax.ShapeDtypeStruct((num_rows, width // GROUP, 2), jnp.float32)
    return jax.ShapeDtypeStruct((num_rows, width), jnp.int8), scales


def round_rows(x: Array, factor: Array | None = None) -> Rounded:
    """x [T, K] rounded as the kernels do: 127 / max of 32, half to even; `factor` [T, 1] scales them."""
    groups = x.reshape(x.shape[0], -1, GROUP)
    highest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    inverse = jnp.where(highest > 0, jnp.float32(127) / highest, jnp.float32(0))
    codes = jnp.round(groups * inverse)
    scale = highest[..., 0] * jnp.float32(1 / 127)
    if factor is not None:
        scale = scale * factor
    scales = jnp.stack((scale, scale * jnp.sum(codes, axis=-1)), axis=-1)
    return Rounded(codes.astype(jnp.int8).reshape(x.shape), scales)


def rounded_values(rounded: Rounded) -> Array:
    """The activations [T, K] that the codes mean, float32."""
    groups = rounded.codes.reshape(*rounded.scales.shape[:2], GROUP).astype(jnp.float32)
    return (groups * rounded.scales[..., :1]).reshape(rounded.codes.shape)


def readable(rounded: Rounded) -> tuple[Array, Array]:
    """What rounded rows mean, to be compared with others: values [T, K], and sums of 32 [T, K/32]."""
    return rounded_values(rounded), rounded.scales[..., 1]

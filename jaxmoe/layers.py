"""Weights that stay packed, and the products and norms whose bits do not depend on the batch.

Every float sum runs inside a loop body whose shape is fixed (ROW_TILE rows), so a row gives the same bits
alone, beside others, and in any chunk of a prompt: libraries pick another order of summation for another
number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxmoe.kernels import matmul as kernel_matmul
from jaxmoe.kernels import packed
from jaxmoe.kernels import rows as kernel_rows
from jaxmoe.kernels.matmul import Row
from jaxmoe.kernels.rounding import Rounded, rounded_values
from jaxmoe.quants import QuantTensor, unswapped

ROW_TILE = 8
# Rows of the smallest step. A tile must never be the whole array: XLA then takes what is done to it out of
# the loop and sums in another order (seen with jax 0.12).
MIN_ROWS = 2 * ROW_TILE
# Columns dequantised at a time: on a CPU what a core's caches hold, on a GPU few kernels.
COLUMN_TILES = {"cpu": 512}
_DEFAULT_COLUMN_TILE = 16384

Index = tuple[Array, ...]


def column_tile(num_columns: int) -> int:
    """Columns of a weight that are dequantised at a time on this backend."""
    return min(num_columns, COLUMN_TILES.get(jax.default_backend(), _DEFAULT_COLUMN_TILE))


def num_tiles(num_rows: Array | int) -> Array:
    """How many tiles of ROW_TILE rows hold `num_rows` rows."""
    return lax.div(jnp.asarray(num_rows, jnp.int32) + (ROW_TILE - 1), jnp.int32(ROW_TILE))


def by_row_tiles(function: Callable[..., Any], out: Any, rows: Sequence[Array], num_rows: Array | int) -> Any:
    """Apply `function` to ROW_TILE rows at a time: (tiles of `rows`) -> a pytree like `out`.

    `rows` and `out` are [M, ...], M a multiple of ROW_TILE and at least MIN_ROWS; tiles past `num_rows` keep
    what `out` holds.
    """

    def body(i: Array, out: Any) -> Any:
        start = i * ROW_TILE
        results = function(*(lax.dynamic_slice_in_dim(x, start, ROW_TILE) for x in rows))
        return jax.tree.map(lambda o, y: lax.dynamic_update_slice_in_dim(o, y, start, 0), out, results)

    return lax.fori_loop(0, num_tiles(num_rows), body, out)


def padded_rows(x: Array) -> Array:
    """`x` [M, ...] with zero rows up to MIN_ROWS and a multiple of ROW_TILE."""
    missing = max(MIN_ROWS - x.shape[0], -x.shape[0] % ROW_TILE)
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (Zhang and Sennrich, 2019)."""
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    scaled = x * lax.rsqrt(mean + eps)
    return scaled * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


class RMSNorm(nnx.Module):
    """One norm weight per layer, [L, width] float32."""

    def __init__(self, weight: Array, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Array, layer: Array) -> Array:
        """Norm of x [..., width] with layer `layer`'s weight."""
        return rms_norm(x, lax.dynamic_index_in_dim(self.weight[...], layer, keepdims=False), self.eps)


class PackedWeight(nnx.Module):
    """The arrays of one stacked QuantTensor as the module's parameters."""

    def __init__(self, tensor: QuantTensor) -> None:
        for name, array in tensor.arrays.items():
            setattr(self, name, nnx.Param(array))
        self.names = tuple(tensor.arrays)
        self.format = (tensor.group, tensor.block, tensor.bits, tensor.zero, tensor.layout, tensor.swapped)

    @property
    def tensor(self) -> QuantTensor:
        """The weight as a QuantTensor."""
        arrays = {name: getattr(self, name)[...] if name in self.names else None for name in _FIELDS}
        group, block, bits, zero, layout, swapped = self.format
        return QuantTensor(
            **arrays, group=group, block=block, bits=bits, zero=zero, layout=layout, swapped=swapped
        )


_FIELDS = ("codes", "s", "m", "d", "d_m")


class StackedWeight(nnx.Module):
    """A weight of every layer, [L, ...], one stack per device format that its layers use.

    `places` says for each layer which stack holds it and at which index.
    """

    def __init__(self, stacks: Sequence[QuantTensor], places: Sequence[tuple[int, int]]) -> None:
        self.stacks = nnx.List([PackedWeight(stack) for stack in stacks])
        self.places = tuple(places)

    def apply(self, function: Callable[[QuantTensor, Array], Any], layer: Array) -> Any:
        """`function(stack, index in the stack)` for the stack that holds layer `layer`."""
        if len(self.stacks) == 1:
            return function(self.stacks[0].tensor, layer)
        which, index = (jnp.asarray(column, jnp.int32)[layer] for column in zip(*self.places, strict=True))
        branches = [lambda i, stack=stack: function(stack.tensor, i) for stack in self.stacks]
        return lax.switch(which, branches, index)

    def at(self, layer: int) -> tuple[QuantTensor, int]:
        """The stack that holds layer `layer`, and the layer's index in it."""
        stack, index = self.places[layer]
        return self.stacks[stack].tensor, index


def num_outputs(w: QuantTensor) -> int:
    """N of the product."""
    return w.shape[-1 if w.layout == "columns" else -2]


def halves(x: Array, w: QuantTensor) -> tuple[Array, ...]:
    """x [M, K] split as the codes of `w` are: for 4-bit codes the inputs of low and of high nibbles."""
    if w.bits != 4:
        return (x,)
    pairs = x.reshape(x.shape[0], -1, 2, 32)
    return tuple(pairs[:, :, half].reshape(x.shape[0], -1) for half in (0, 1))


def dequantised_halves(w: QuantTensor) -> tuple[Array, ...]:
    """Float32 values of a 2-D `w`, in the parts that `halves` splits an input into, in the layout of `w`."""
    if w.d is None:
        return (w.codes.astype(jnp.float32),)
    a, b = lax.optimization_barrier((_per_group(w.d, w.s, w), _per_group(w.d_m, w.m, w)))
    if w.bits != 4:
        return (_scaled(w.codes, a, b, w),)
    # the two nibbles as separate products: joining them would copy every dequantised value
    nibbles = (w.codes & jnp.uint8(15), w.codes >> jnp.uint8(4))
    return tuple(
        _scaled(codes, _half_groups(a, half, w), _half_groups(b, half, w), w)
        for half, codes in enumerate(nibbles)
    )


def _input_axis(w: QuantTensor) -> int:
    return 1 if w.layout == "rows" else 0


def _per_group(d: Array | None, s: Array | None, w: QuantTensor) -> Array | None:
    """d * s per group, float32."""
    if d is None:
        return None
    wide = d.astype(jnp.float32)
    if s is None:
        return wide
    axis = _input_axis(w)
    return jnp.repeat(wide, w.block // w.group, axis=axis) * s.astype(jnp.float32)


def _half_groups(a: Array | None, half: int, w: QuantTensor) -> Array | None:
    """The groups of `a` that belong to the low (0) or high (1) nibbles."""
    if a is None:
        return None
    run = 32 // w.group
    axis = _input_axis(w)
    split = (*a.shape[:axis], a.shape[axis] // (2 * run), 2, run, *a.shape[axis + 1 :])
    picked = lax.index_in_dim(a.reshape(split), half, axis + 1, keepdims=False)
    return picked.reshape(*a.shape[:axis], a.shape[axis] // 2, *a.shape[axis + 1 :])


def _scaled(codes: Array, a: Array | None, b: Array | None, w: QuantTensor) -> Array:
    """(codes - zero) * a - b, with one a and b a group."""
    assert a is not None
    axis = _input_axis(w)
    grouped = codes.reshape(*codes.shape[:axis], -1, w.group, *codes.shape[axis + 1 :])
    values = grouped.astype(jnp.float32)
    if w.zero:
        values = values - jnp.float32(w.zero)
    values = values * jnp.expand_dims(a, axis + 1)
    if b is not None:
        values = values - jnp.expand_dims(b, axis + 1)
    return values.reshape(codes.shape)


def weight_tile(w: QuantTensor, index: Index, start: Array | int, width: int) -> QuantTensor:
    """Output columns start .. start + width of the matrix at `index` of the leading axes, as a 2-D tensor."""

    def take(array: Array) -> Array:
        lead = len(index)
        zero = jnp.int32(0)
        corner = (*index, start, zero) if w.layout == "rows" else (*index, zero, start)
        sizes = (width, array.shape[-1]) if w.layout == "rows" else (array.shape[-2], width)
        return lax.dynamic_slice(array, corner, (1,) * lead + sizes).reshape(sizes)

    return unswapped(w.map(take), jnp, first_row=start)


def tile_product(x: Array, values: Sequence[Array], w: QuantTensor) -> Array:
    """One row tile [ROW_TILE, K] times the dequantised halves of one weight tile -> [ROW_TILE, width]."""
    contract = ((1,), (_input_axis(w),))
    parts = [
        lax.dot_general(part, value, (contract, ((), ())), precision=lax.Precision.HIGHEST)
        for part, value in zip(halves(x, w), values, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def matmul(x: Array, w: QuantTensor, index: Index, num_rows: Array | int) -> Array:
    """x [M, K] times the matrix at `index` of `w` -> [M, N] float32; tiles past `num_rows` are 0.

    M is a multiple of ROW_TILE and at least MIN_ROWS.
    """
    num_columns = num_outputs(w)
    width = column_tile(num_columns)

    def columns(i: Array, out: Array) -> Array:
        # the last tile is moved back so that it fits; what it covers twice is the same value
        start = jnp.minimum(i * width, num_columns - width)
        values = dequantised_halves(weight_tile(w, index, start, width))

        def rows(j: Array, out: Array) -> Array:
            product = tile_product(lax.dynamic_slice_in_dim(x, j * ROW_TILE, ROW_TILE), values, w)
            return lax.dynamic_update_slice(out, product, (j * ROW_TILE, start))

        return lax.fori_loop(0, num_tiles(num_rows), rows, out)

    out = jnp.zeros((x.shape[0], num_columns), jnp.float32)
    return lax.fori_loop(0, -(-num_columns // width), columns, out)


def rounded(inputs: Rounded | Row, count: Array) -> Rounded:
    """Activations as the products for several rows take them; count int32[1]."""
    if isinstance(inputs, Rounded):
        return inputs
    return Rounded(
        *kernel_rows.norm_quantise(inputs.x, inputs.norm, count, eps=inputs.eps, layer=inputs.layer)
    )


def kernel_product(
    name: str,
    inputs: Rounded | Row,
    weights: Sequence[StackedWeight],
    layer: int,
    count: Array,
    residual: Array | None = None,
) -> Array:
    """Layer `layer`'s products of one weight or three, side by side [T, N] float32, plus `residual`.

    By the kernel `name`, or by XLA where the kernels cannot read a weight's format.
    """
    stacks, indices = zip(*(weight.at(layer) for weight in weights), strict=True)
    if all(map(packed.is_supported, stacks)):
        if not packed.has_row_kernels(*stacks):
            inputs = rounded(inputs, count)
        return kernel_matmul.dense(name, inputs, stacks, count, index=indices[0], residual=residual)
    x = rounded_values(rounded(inputs, count))
    num_rows = x.shape[0]
    products = [
        matmul(padded_rows(x), stack, (jnp.int32(index),), count[0])[:num_rows]
        for stack, index in zip(stacks, indices, strict=True)
    ]
    y = jnp.concatenate(products, axis=1)
    return y if residual is None else residual + y

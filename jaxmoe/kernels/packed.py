"""Packed weights as the kernels see them: format, arrays, bytes in shared memory; and random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from jaxmoe.quants import QuantTensor, empty, swap_chunks

SEGMENT = 256
# Of random weights: products are then about as large as inputs, and minima take off half of the codes.
_D_SCALE, _D_M_SCALE = 2e-4, 1.6e-3

Fields = list[dict[str, Any]]  # the arrays of some weights, by name


def is_supported(w: QuantTensor) -> bool:
    """Whether the kernels can read the weight [..., N, K]."""
    if w.layout != "rows" or w.shape[-1] % SEGMENT or w.shape[-2] % 16:
        return False
    if w.d is None:
        return w.codes.dtype in (jnp.float16, jnp.bfloat16)
    return w.group == 32 or (w.group == 16 and w.d_m is None and w.s is not None)


def has_row_kernels(*weights: QuantTensor) -> bool:
    """Whether one row can be multiplied on its own; the order of float sums is that of tensor cores."""
    return all(w.d is not None for w in weights)


def reads_swapped(w: QuantTensor) -> bool:
    """Whether the kernels read it `swapped`: experts' weights [n, E, N, K] of 4-bit or 8-bit codes."""
    return w.codes.ndim == 4 and is_supported(w) and has_row_kernels(w)


def as_read(w: QuantTensor) -> QuantTensor:
    """A weight whose codes are not swapped, as the kernels read it."""
    return replace(w, codes=swap_chunks(w.codes, 0, jnp), swapped=True) if reads_swapped(w) else w


def format_macro(w: QuantTensor) -> str:
    """The type that reads the weight: `Format` of weights.cuh."""
    if w.d is None:
        half = 1 if w.codes.dtype == jnp.float16 else 2
        return f"Format<16,1,1,0,false,false,false,false,{half}>"
    flags = (w.s is not None, w.m is not None, w.d_m is not None, w.d.dtype == jnp.float32)
    zero = w.zero if w.bits == 4 else 0  # 8-bit codes are stored without it
    return f"Format<{w.bits},{w.group},{w.block},{zero},{','.join(str(flag).lower() for flag in flags)}>"


def pointers(w: QuantTensor) -> list[Array]:
    """The arrays in the kernel's order; where one is absent the codes stand in and are not read."""
    assert w.swapped == reads_swapped(w), "products of experts read swapped codes, no others do"
    return [w.codes if array is None else array for array in (w.codes, w.s, w.m, w.d, w.d_m)]


def code_bits(w: QuantTensor) -> int:
    """Of one code, or of one number of a weight without codes."""
    return 8 * w.codes.dtype.itemsize if w.d is None else w.bits


def shared_rows_size(w: QuantTensor, num_rows: int, pad: int, *, whole: bool = False) -> int:
    """Bytes of `num_rows` rows of a weight in shared memory: SharedRows of weights.cuh."""
    segments = w.shape[-1] // SEGMENT
    pads = pad if whole else segments * pad
    size = segments * SEGMENT * code_bits(w) // 8 + pads + scale_size(w, segments)
    return -(-num_rows * size // 16) * 16


def scale_size(w: QuantTensor, segments: int) -> int:
    """Of them what the scales of one row take."""

    def run(size: int) -> int:
        return segments * size + (16 if segments * size % 32 == 0 else 0)

    size = 0 if w.s is None else run(16 if w.group == 16 else 8)
    size += 0 if w.m is None else run(8)
    return size + sum(run(SEGMENT // w.block * d.dtype.itemsize) for d in (w.d, w.d_m) if d is not None)


def absent_weights(kinds: Sequence[GGMLType], shapes: Sequence[tuple[int, ...]]) -> list[QuantTensor]:
    """Weights without their numbers; none where the kernels cannot read one of them."""
    if any(shape[-1] % SEGMENT for shape in shapes):
        return []
    both = zip(kinds, shapes, strict=True)
    weights = [empty(kind, shape, "rows", new=jax.ShapeDtypeStruct) for kind, shape in both]
    if not all(map(is_supported, weights)):
        return []
    return [replace(w, swapped=reads_swapped(w)) for w in weights]


def with_fields(absent: Sequence[QuantTensor], fields: Fields) -> list[QuantTensor]:
    """Weights with their numbers, which a traced function takes as arguments."""
    return [replace(w, **arrays) for w, arrays in zip(absent, fields, strict=True)]


def random_weights(rng: np.random.Generator, absent: Sequence[QuantTensor]) -> Fields:
    """Numbers for weights of 4-bit or 8-bit codes, with which products are about as large as inputs."""
    return [
        {name: jnp.asarray(_random_field(rng, name, array)) for name, array in w.arrays.items()}
        for w in absent
    ]


def _random_field(rng: np.random.Generator, name: str, array: jax.ShapeDtypeStruct) -> np.ndarray:
    if name in ("d", "d_m"):
        scale = _D_M_SCALE if name == "d_m" else _D_SCALE
        return rng.uniform(scale / 2, scale, array.shape).astype(array.dtype)
    numbers = rng.integers(0, 256, array.shape, np.uint8).view(array.dtype)
    # 4-bit codes and the scales of Q6_K are any byte, others have 6 bits
    return numbers if (name == "codes") == (array.dtype == jnp.uint8) else numbers >> numbers.dtype.type(2)

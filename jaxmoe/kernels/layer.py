"""A layer of one row after its attention, in one launch: the wrapper of layer_row.cu and its plain twin.

All blocks of the launch run at once and hand each other numbers through `exchange`: see layer_row.cu. The
bits are those of the kernels that it stands for: attn_output, route, gate_up, down, and the next layer's qkv.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import matmul, ptx, router
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.matmul import SEGMENT
from jaxmoe.kernels.rounding import Rounded, round_rows, rounded_values
from jaxmoe.kernels.rows import norm_quantise_twin
from jaxmoe.quants import QuantTensor, empty

FILE: Final = "layer_row.cu"
_THREADS: Final = 384
_UNIT: Final = 8  # rows whose scales are whole pieces of 16 bytes in every format
_MOST_TURNS: Final = 4  # segments of a row, and experts of the router, that a warp keeps in registers

Defines = dict[str, int | float | str]
Variant = tuple[str, str, Defines, int]


class Placed(NamedTuple):
    """A weight of some layers [n, ...] and which layers these are, ascending."""

    stack: QuantTensor
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LayerWeights:
    """What one launch reads: norms [L, D]; `following` are norms [L, D] and q, k and v of the next layer."""

    norms: Array
    router: Placed
    output: Placed
    gate: Placed
    up: Placed
    down: Placed
    following: tuple[Array, Placed, Placed, Placed] | None

    @property
    def products(self) -> list[Placed]:
        """The weights by their number in the kernel."""
        following = () if self.following is None else self.following[1:]
        return [self.output, self.gate, self.up, self.down, *following]


class _Share(NamedTuple):
    """How the work is cut for a number of blocks: macros, blocks and bytes of shared memory."""

    defines: Defines
    grid: int
    shared_size: int


def new_exchange(config: ModelConfig) -> Array:
    """What the launches of a step, one after the other, exchange numbers through: zeros at its start."""
    return jnp.zeros(2 * _num_words(config), jnp.int32)


def _num_words(config: ModelConfig) -> int:
    logits = -(-config.num_experts // 4) * 4
    return 2 * config.d_model + logits + config.experts_per_token * config.expert_width


def is_supported(weights: LayerWeights, config: ModelConfig) -> bool:
    """Whether one launch can do this: formats that have kernels for one row, and enough shared memory.

    All its blocks must run at once, so the number of multiprocessors must be known.
    """
    stacks = [placed.stack for placed in weights.products]
    readable = all(map(matmul.is_supported, stacks)) and matmul.has_row_kernels(*stacks)
    readable = readable and weights.router.stack.codes.dtype == jnp.float32
    return readable and matmul.knows_multiprocessors() and _share(weights, config) is not None


def run(
    mixed: Rounded,
    x: Array,
    exchange: Array,
    weights: LayerWeights,
    *,
    config: ModelConfig,
    layer: int,
    turn: int,
) -> tuple[Array, Array | None, Array]:
    """x [1, D] plus the layer's attention `mixed` and experts -> x, the next layer's qkv or None, exchange.

    `turn` counts the launches that have used this `exchange`.
    """
    share = _share(weights, config)
    assert share is not None
    arrays = [*mixed, x, weights.norms, weights.router.stack.codes]
    outputs = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    for placed in weights.products[:4]:
        arrays += matmul._pointers(placed.stack)
    if weights.following is not None:
        arrays.append(weights.following[0])
        for placed in weights.products[4:]:
            arrays += matmul._pointers(placed.stack)
        width = sum(placed.stack.shape[-2] for placed in weights.products[4:])
        outputs.append(jax.ShapeDtypeStruct((1, width), jnp.float32))
    outputs.append(jax.ShapeDtypeStruct(exchange.shape, exchange.dtype))
    x, *qkv, exchange = ptx.launch(
        FILE, "layer", share.defines, [*arrays, exchange], outputs, grid=(share.grid, 1, 1), threads=_THREADS,
        shared_size=share.shared_size, number=2 * layer + turn % 2, aliases={len(arrays): len(outputs) - 1},
    )  # fmt: skip
    return x, qkv[0] if qkv else None, exchange


def _share(weights: LayerWeights, config: ModelConfig) -> _Share | None:
    """The cut of a launch; None where it cannot be made."""
    blocks = matmul._num_multiprocessors()
    turns = -(-config.d_model // (SEGMENT * _THREADS // 32))
    block_experts = -(-config.num_experts // blocks)
    rows, pairs = _UNIT * -(-config.d_model // (_UNIT * blocks)), _pairs(config, blocks)
    following = [placed.stack.shape[-2] for placed in weights.products[4:]]
    next_rows = _next_rows(following, blocks)
    if pairs is None or next_rows is None or turns * block_experts > _MOST_TURNS:
        return None
    if max(rows, next_rows) > _THREADS:  # a thread adds up one row
        return None
    defines: Defines = {"ROWS": rows, "BLOCK_EXPERTS": block_experts, **pairs}
    grid = max(
        -(-config.d_model // rows),
        -(-config.num_experts // block_experts),
        pairs["EXPERT_BLOCKS"] * config.experts_per_token,
        sum(-(-n // next_rows) for n in following),
    )
    if following:
        defines |= {"NEXT": 1, "NEXT_ROWS": next_rows}
    early, size = _early(weights, config, defines)
    if early is None:
        return None
    return _Share({**defines, **_model(weights, config), "EARLY": early, "THREADS": _THREADS}, grid, size)


def _pairs(config: ModelConfig, blocks: int) -> dict[str, int] | None:
    """The share of gate and up: chunks that give each thread one task, as many blocks for each expert."""
    parts = blocks // config.experts_per_token
    if not parts:
        return None
    units = -(-config.expert_width // (_UNIT * parts))
    most = max(1, _THREADS // (2 * config.d_model // SEGMENT) // _UNIT)
    chunks = -(-units // most)
    rows = _UNIT * -(-units // chunks)
    parts = -(-config.expert_width // (chunks * rows))
    return {"PAIR_CHUNKS": chunks, "PAIR_ROWS": rows, "EXPERT_BLOCKS": parts}


def _next_rows(widths: Sequence[int], blocks: int) -> int | None:
    """The fewest rows of a block, all of one matrix, so that there are blocks enough."""
    fitting = (
        rows
        for rows in range(_UNIT, min(widths, default=_UNIT) + 1, _UNIT)
        if sum(-(-n // rows) for n in widths) <= blocks
    )
    return next(fitting, None)


def _early(weights: LayerWeights, config: ModelConfig, defines: Defines) -> tuple[int | None, int]:
    """How many experts' down fits beside gate and up, and the shared memory of it all."""

    def size(placed: Placed, rows: str) -> int:
        return matmul._shared_rows_size(placed.stack, int(defines[rows]), 16)

    active = config.experts_per_token
    static = _static_size(weights, config, defines) + 2 * config.num_layers
    chunks = int(defines["PAIR_CHUNKS"]) * (size(weights.gate, "PAIR_ROWS") + size(weights.up, "PAIR_ROWS"))
    following = max((size(placed, "NEXT_ROWS") for placed in weights.products[4:]), default=0)
    down = size(weights.down, "ROWS")
    for early in range(active, -1, -1):
        needed = max(size(weights.output, "ROWS"), chunks, (active - early) * down + following) + early * down
        if needed + static <= matmul._shared_limit():
            return early, needed
    return None, 0


def _static_size(weights: LayerWeights, config: ModelConfig, defines: Defines) -> int:
    """Shared memory beside the weights: inputs, sums, and little else."""
    segments, width = config.d_model // SEGMENT, config.expert_width // SEGMENT
    mixed, active = weights.output.stack.shape[-1] // SEGMENT, config.experts_per_token
    rows, pair_rows = int(defines["ROWS"]), int(defines["PAIR_CHUNKS"]) * int(defines["PAIR_ROWS"])
    next_rows = int(defines.get("NEXT_ROWS", 0))
    inputs = max(mixed, segments, active * width) * (SEGMENT + 16 + 72)
    sums = max(rows * mixed, 2 * pair_rows * segments, active * rows * width, next_rows * segments)
    logits = (1 + int(defines["BLOCK_EXPERTS"])) * segments
    return inputs + 4 * (sums + logits + 16 * _THREADS // 32 + 2 * active) + 1024


def _model(weights: LayerWeights, config: ModelConfig) -> Defines:
    """The macros that do not depend on the blocks."""
    defines: Defines = {
        "K": config.d_model, "MIXED": weights.output.stack.shape[-1], "INNER": config.expert_width,
        "MATRICES": config.num_experts, "ACTIVE": config.experts_per_token, "NORMS": 1,
        "EPS": float(config.norm_eps),
    }  # fmt: skip
    stacks = {"OUTPUT": weights.output, "ROUTER": weights.router, "EXPERTS": weights.gate}
    stacks["DOWN"] = weights.down
    if weights.following is not None:
        stacks["QKV"] = weights.products[4]
    defines |= {f"STACK_{name}": _mask(placed.layers) for name, placed in stacks.items()}
    for i, placed in enumerate(weights.products):
        defines[f"FORMAT_{i}"] = matmul._format(placed.stack)
        if i >= 4:
            defines[f"ROWS_{i}"] = placed.stack.shape[-2]
    return defines


def _mask(layers: Sequence[int]) -> str:
    """Layers as bits of words of 64."""
    words = [0] * (max(layers) // 64 + 1)
    for layer in layers:
        words[layer // 64] |= 1 << layer % 64
    return ",".join(f"{word:#x}ull" for word in words)


# --- The twin, what is compiled and compared without a model.


def twin(
    mixed: Rounded, x: Array, weights: LayerWeights, *, config: ModelConfig, layer: int
) -> tuple[Array, Array | None]:
    """x and the next layer's qkv, as `run` gives them, by the twins of the products and of the router."""

    def index(placed: Placed) -> int:
        return placed.layers.index(layer)

    def normed(x: Array, norms: Array, at: int) -> Array:
        count, eps = jnp.ones(1, jnp.int32), config.norm_eps
        return rounded_values(Rounded(*norm_quantise_twin(x, norms, count, eps=eps, layer=at)))

    values, output = rounded_values(mixed), weights.output
    x = matmul.dense_twin(values, [output.stack], index=index(output), residual=x)
    ids, shares, _ = router.route_twin(
        x, weights.norms, weights.router.stack.codes, jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32),
        config=config, layer=layer, index=index(weights.router),
    )  # fmt: skip
    gate, up, down = weights.gate, weights.up, weights.down
    hidden = matmul.gate_up_twin(
        normed(x, weights.norms, layer), gate.stack, up.stack, ids, index=index(gate)
    )
    hidden = rounded_values(round_rows(hidden))
    y = matmul.down_twin(hidden, down.stack, ids, index=index(down))
    x = x + jnp.sum(shares.reshape(-1, 1) * y, axis=0)[None]
    if weights.following is None:
        return x, None
    norms, *qkv = weights.following
    at = qkv[0].layers.index(layer + 1)
    return x, matmul.dense_twin(normed(x, norms, layer + 1), [placed.stack for placed in qkv], index=at)


_Q4, _Q6 = GGMLType.Q4_K, GGMLType.Q6_K
# Formats of down and of the next layer's v, where there is one.
_KINDS = ((_Q4, _Q4), (_Q6, _Q6), (_Q6, None))


def variants(config: ModelConfig) -> Iterator[Variant]:
    """The kernels of a model, for compiling without a GPU: (file, name, macros, shared size)."""
    for down, v in _KINDS:
        weights = _absent(config, down, v)
        share = _share(weights, config) if weights is not None else None
        if share is not None:
            yield FILE, "layer", share.defines, share.shared_size


def _absent(config: ModelConfig, down: GGMLType, v: GGMLType | None) -> LayerWeights | None:
    """Weights without their numbers, of layers 0 and 1; None where the kernels cannot read one of them."""
    wide, narrow = matmul._expert_shapes(config)
    shapes = [matmul._out_shape(config), wide, wide, narrow, *matmul._qkv_shapes(config)]
    kinds = [_Q4, _Q4, _Q4, down, _Q4, _Q4, v or _Q4]
    stacks = matmul._absent_weights(kinds, shapes)
    if not stacks:
        return None
    norms = jax.ShapeDtypeStruct((matmul._STACK, config.d_model), jnp.float32)
    shape = (matmul._STACK, config.num_experts, config.d_model)
    matrix = empty(GGMLType.F32, shape, "rows", new=jax.ShapeDtypeStruct)
    return _with_stacks(norms, matrix, stacks, None if v is None else norms)


def _with_stacks(
    norms: Any, matrix: QuantTensor, stacks: Sequence[QuantTensor], next_norms: Any
) -> LayerWeights:
    router, output, gate, up, down, q, k, v = (Placed(stack, (0, 1)) for stack in (matrix, *stacks))
    following = None if next_norms is None else (next_norms, q, k, v)
    return LayerWeights(norms, router, output, gate, up, down, following)


def comparisons(config: ModelConfig, seed: int) -> Iterator[Comparison]:
    """A layer of random weights, which is followed by another or is the last."""
    for down, v in _KINDS:
        weights = _absent(config, down, v)
        if weights is not None and is_supported(weights, config):
            name = f"layer, {down.name}, then {v.name}" if v else f"layer, {down.name}, the last"
            yield _comparison(name, config, np.random.default_rng(seed), weights)


def _comparison(name: str, config: ModelConfig, rng: np.random.Generator, absent: LayerWeights) -> Comparison:
    matrix, is_last = absent.router.stack, absent.following is None
    stacks = [placed.stack for placed in absent.products]
    fields = matmul._random_weights(rng, stacks)
    x, mixed = matmul._random_rows(rng, (1, config.d_model), (1, stacks[0].shape[-1]))
    norms, next_norms = (matmul._random_norm(rng, config) for _ in range(2))
    numbers = rng.standard_normal(matrix.shape, np.float32) * np.float32(config.d_model**-0.5)
    arrays = (fields, x, mixed, norms, next_norms, jnp.asarray(numbers))

    def given(fields: matmul.Fields, norms: Array, next_norms: Array, numbers: Array) -> LayerWeights:
        filled = matmul._with_fields(stacks, fields)
        filled += [filled[0]] * (7 - len(filled))  # that are not read
        return _with_stacks(norms, replace(matrix, codes=numbers), filled, None if is_last else next_norms)

    def kernel(fields: matmul.Fields, x: Array, mixed: Array, *rest: Array) -> tuple[Array, Array | None]:
        weights, exchange = given(fields, *rest), new_exchange(config)
        return run(round_rows(mixed), x, exchange, weights, config=config, layer=0, turn=0)[:2]

    def composed(fields: matmul.Fields, x: Array, mixed: Array, *rest: Array) -> tuple[Array, Array | None]:
        return twin(round_rows(mixed), x, given(fields, *rest), config=config, layer=0)

    return Comparison(name, kernel, composed, None, arrays)

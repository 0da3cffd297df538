"""All layers of a decode step of one row in one launch: the wrapper of decode_row.cu.

All blocks of the launch run at once and hand each other numbers: see decode_row.cu. The bits are those of the
kernels that it stands for: qkv, attend_decode, attn_output, route, gate_up and down of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from jax import Array

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import attention, matmul, packed, ptx, router
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.kernels.matmul import Row
from jaxmoe.kernels.packed import SEGMENT, shared_rows_size
from jaxmoe.kernels.rounding import Rounded
from jaxmoe.quants import QuantTensor, empty

FILE: Final = "decode_row.cu"
_IN_TWO: Final = ("down", "q", "k", "v")  # weights that may lie in two stacks; q, k, v by the same layers
_THREADS: Final = 384
_BUFFERS: Final = 3  # of a segment's keys or values
_UNIT: Final = 8  # rows whose scales are whole pieces of 16 bytes in every format
_MOST_TURNS: Final = 4  # segments of a row, and experts of the router, that a warp keeps in registers

Defines = dict[str, int | float | str]
Variant = tuple[str, str, Defines, int]


class Placed(NamedTuple):
    """A weight of some layers [n, ...] and which layers these are, ascending."""

    stack: QuantTensor
    layers: tuple[int, ...]


@dataclass(frozen=True)
class RowWeights:
    """What the layers read: norms [L, D], those of heads [L, H], angles [S, H/2], each weight's stacks."""

    norms: Array
    q_norms: Array
    k_norms: Array
    cos: Array
    sin: Array
    expert_norms: Array
    stacks: Mapping[str, tuple[Placed, ...]]

    @property
    def products(self) -> list[QuantTensor]:
        """The weights by their number in the kernel; last the second stacks, or once more the only ones."""
        first = [self.stacks[name][0].stack for name in ("output", "gate", "up", *_IN_TWO)]
        return [*first, *(self.stacks[name][-1].stack for name in _IN_TWO)]

    def at(self, name: str, layer: int) -> tuple[QuantTensor, int]:
        """The stack that holds a layer's weight, and its index in it."""
        (found,) = (placed for placed in self.stacks[name] if layer in placed.layers)
        return found.stack, found.layers.index(layer)


class _Share(NamedTuple):
    """How the work is cut for a number of blocks: macros, blocks and bytes of shared memory."""

    defines: Defines
    grid: int
    shared_size: int


def is_supported(weights: RowWeights, config: ModelConfig) -> bool:
    """Whether one launch can do this: formats that have kernels for one row, and enough shared memory.

    Down, and q, k and v together, may lie in two stacks. All blocks must run at once, so the number of
    multiprocessors must be known.
    """
    if any(len(placed) > 1 + (name in _IN_TWO) for name, placed in weights.stacks.items()):
        return False
    if len({tuple(placed.layers for placed in weights.stacks[name]) for name in ("q", "k", "v")}) > 1:
        return False
    readable = all(map(packed.is_supported, weights.products)) and packed.has_row_kernels(*weights.products)
    readable = readable and weights.stacks["router"][0].stack.codes.dtype == jnp.float32
    return readable and ptx.knows_multiprocessors() and _share(weights, config) is not None


def run(
    x: Array,
    keys: Array,
    values: Array,
    weights: RowWeights,
    *,
    active: Array,
    positions: Array,
    tables: Array,
    count: Array,
    config: ModelConfig,
) -> tuple[Array, Array, Array]:
    """x [1, D] through all layers -> x, keys, values; where `count` [1] is 0 they are not written.

    Shapes of the rest as for `attention.attend_decode`.
    """
    share = _share(weights, config)
    assert share is not None
    defines = _defines(share, keys, tables, config)
    arrays = [
        x, active, positions, tables, count, weights.norms, weights.q_norms, weights.k_norms, weights.cos,
        weights.sin, weights.expert_norms, weights.stacks["router"][0].stack.codes,
    ]  # fmt: skip
    for stack in weights.products:
        arrays += packed.pointers(stack)
    num_words = config.num_layers * _num_words(config) + int(defines["MOST_PARTS"]) * _part_size(config)
    exchange = jnp.zeros(num_words, jnp.int32)
    outputs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, keys, values, exchange)]
    first = len(arrays)
    x, keys, values, _ = ptx.launch(
        FILE, "decode_row", defines, [*arrays, keys, values, exchange], outputs, grid=(share.grid, 1, 1),
        threads=_THREADS, shared_size=share.shared_size, aliases={first + i: 1 + i for i in range(3)},
    )  # fmt: skip
    return x, keys, values


def _defines(share: _Share, keys: Any, tables: Any, config: ModelConfig) -> Defines:
    """All macros, with those that the cache gives."""
    few, num_segments = 2 * int(share.defines["HEAD_BLOCKS"]), attention.num_segments(keys, tables)
    # few segments are a part each, of many a run is one
    parts = max(min(num_segments, few), -(-num_segments // 4))
    return share.defines | attention.cache_macros(config, keys, tables) | {"MOST_PARTS": parts}


def _num_words(config: ModelConfig) -> int:
    """Words of a layer: qkv, the mixed row, the row after attention, logits, hidden numbers, the result."""
    mixed = config.num_heads * config.head_dim
    heads = mixed + 2 * config.num_kv_heads * config.head_dim + mixed // 4 + mixed // 16
    hidden, logits = config.experts_per_token * config.expert_width, -(-config.num_experts // 4) * 4
    return heads + 2 * config.d_model + logits + hidden


def _part_size(config: ModelConfig) -> int:
    """Words of a part of all heads: the mix, the highest score and the sum, each with its layer."""
    return 2 * config.num_heads * (config.head_dim + 4)


def _share(weights: RowWeights, config: ModelConfig) -> _Share | None:
    """The cut of a launch; None where it cannot be made."""
    blocks = ptx.num_multiprocessors()
    turns = -(-config.d_model // (SEGMENT * _THREADS // 32))
    block_experts = -(-config.num_experts // blocks)
    rows, pairs = _UNIT * -(-config.d_model // (_UNIT * blocks)), _pairs(config, blocks)
    widths = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    qkv_rows = _qkv_rows(widths, blocks)
    if pairs is None or qkv_rows is None or turns * block_experts > _MOST_TURNS:
        return None
    if max(rows, qkv_rows) > _THREADS:  # a thread adds up one row
        return None
    defines: Defines = {"ROWS": rows, "BLOCK_EXPERTS": block_experts, **pairs, "QKV_ROWS": qkv_rows}
    grid = max(
        -(-config.d_model // rows),
        -(-config.num_experts // block_experts),
        pairs["EXPERT_BLOCKS"] * config.experts_per_token,
        sum(-(-n // qkv_rows) for n in widths),
    )
    placed = _placed(weights, config, defines)
    if placed is None or grid < config.num_kv_heads:
        return None
    early, late_output, size = placed
    defines |= {"EARLY": early, "LATE_OUTPUT": late_output, "HEAD_BLOCKS": grid // config.num_kv_heads}
    return _Share({**defines, **_model(weights, config), "THREADS": _THREADS}, grid, size)


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


def _qkv_rows(widths: Sequence[int], blocks: int) -> int | None:
    """The fewest rows of a block, all of one matrix, so that there are blocks enough."""
    fitting = (
        rows for rows in range(_UNIT, min(widths) + 1, _UNIT) if sum(-(-n // rows) for n in widths) <= blocks
    )
    return next(fitting, None)


def _placed(weights: RowWeights, config: ModelConfig, defines: Defines) -> tuple[int, int, int] | None:
    """How many experts' down fits beside gate and up, whether attn_output comes late, the size of it all."""
    output, gate, up, *_ = weights.products
    experts, projections = weights.products[3::4], [*weights.products[4:7], *weights.products[8:]]

    def size(macro: str, *stacks: QuantTensor, pad: int = 16) -> int:
        return max(shared_rows_size(stack, int(defines[macro]), pad, whole=True) for stack in stacks)

    active, limit = config.experts_per_token, ptx.shared_limit() - _static_size(config, defines)
    chunks = int(defines["PAIR_CHUNKS"]) * sum(size("PAIR_ROWS", stack, pad=0) for stack in (gate, up))
    own, expert, out = size("QKV_ROWS", *projections), size("ROWS", *experts, pad=0), size("ROWS", output)
    buffer = 2 * attention.SEGMENT_LENGTH * config.head_dim
    rest = -(-attention.decode_shared_size(config, _BUFFERS) // 16) * 16 - buffer
    for early in range(active, -1, -1):
        for late in range(2):
            first = max(own, buffer + late * out)
            needed = max(chunks, first + (active - early) * expert) + early * expert
            needed = max(needed, first + rest + (1 - late) * out)
            if needed <= limit:
                return early, late, needed
    return None


def _static_size(config: ModelConfig, defines: Defines) -> int:
    """Shared memory beside the weights: inputs, sums, and little else."""
    segments, width = config.d_model // SEGMENT, config.expert_width // SEGMENT
    mixed, active = config.num_heads * config.head_dim // SEGMENT, config.experts_per_token
    rows, pair_rows = int(defines["ROWS"]), int(defines["PAIR_CHUNKS"]) * int(defines["PAIR_ROWS"])
    inputs = max(mixed, segments, active * width) * (SEGMENT + 16 + 72)
    sums = max(
        rows * mixed, 2 * pair_rows * segments, active * rows * width, int(defines["QKV_ROWS"]) * segments
    )
    logits = (1 + int(defines["BLOCK_EXPERTS"])) * segments
    return inputs + 4 * (sums + logits + 16 * _THREADS // 32) + 1024


def _model(weights: RowWeights, config: ModelConfig) -> Defines:
    """The macros that do not depend on the blocks."""
    defines: Defines = {
        "NUM_LAYERS": config.num_layers, "K": config.d_model, "INNER": config.expert_width,
        "MATRICES": config.num_experts, "ACTIVE": config.experts_per_token, "NORMS": 1, "BUFFERS": _BUFFERS,
        "STACK_DOWN": _mask(weights.stacks["down"][0].layers),
        "STACK_QKV": _mask(weights.stacks["q"][0].layers),
    }  # fmt: skip
    return defines | {f"FORMAT_{i}": packed.format_macro(stack) for i, stack in enumerate(weights.products)}


def _mask(layers: Sequence[int]) -> str:
    """Layers as bits of words of 64."""
    words = [0] * (max(layers) // 64 + 1)
    for layer in layers:
        words[layer // 64] |= 1 << layer % 64
    return ",".join(f"{word:#x}ull" for word in words)


# --- What it stands for, and what is compiled and compared without a model.


def separate(
    x: Array,
    keys: Array,
    values: Array,
    weights: RowWeights,
    *,
    active: Array,
    positions: Array,
    tables: Array,
    count: Array,
    config: ModelConfig,
) -> tuple[Array, Array, Array]:
    """What `run` gives, by a kernel for each step of each layer."""
    counters, eps = jnp.zeros(max(router.NUM_COUNTERS, config.num_kv_heads), jnp.int32), config.norm_eps
    for layer in range(config.num_layers):

        def at(*names: str, layer: int = layer) -> tuple[list[QuantTensor], int]:
            found = [weights.at(name, layer) for name in names]
            return [stack for stack, _ in found], found[0][1]

        stacks, index = at("q", "k", "v")
        qkv = matmul.dense("qkv", Row(x, weights.norms, layer, eps), stacks, count, index=index)
        codes, scales, keys, values, counters = attention.attend_decode(
            qkv, weights.q_norms, weights.k_norms, weights.cos, weights.sin, active, positions, tables, count,
            keys, values, counters, config=config, layer=layer,
        )  # fmt: skip
        stacks, index = at("output")
        x = matmul.dense("attn_output", Rounded(codes, scales), stacks, count, index=index, residual=x)
        (stack,), index = at("router")
        ids, shares, counters, *_ = router.route(
            x, weights.expert_norms, stack.codes, count, counters, config=config, layer=layer, index=index
        )
        (gate, up), index = at("gate", "up")
        row = Row(x, weights.expert_norms, layer, eps)
        hidden = matmul.gate_up_of_row(row, gate, up, ids, index=index)
        (down,), index = at("down")
        x = matmul.down_of_row(hidden, down, ids, shares, x, index=index)
    return x, keys, values


_Q4, _Q6 = GGMLType.Q4_K, GGMLType.Q6_K
# Formats of v and down: in all layers, or one after the other.
_KINDS = ((_Q4,), (_Q4, _Q6))
_PAGE_LENGTH, _CONTEXT = 64, 9216
_POSITIONS = (0, 128, 700, 9000)  # at the last a block has several segments of the context


def variants(config: ModelConfig) -> Iterator[Variant]:
    """The kernels of a model, for compiling without a GPU: (file, name, macros, shared size)."""
    for kinds in _KINDS:
        weights = absent(config, kinds)
        share = None if weights is None else _share(weights, config)
        if share is not None:
            shape = (config.num_layers, 4096, _PAGE_LENGTH, config.num_kv_heads, config.head_dim)
            keys = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            tables = jax.ShapeDtypeStruct((8, 512), jnp.int32)
            yield FILE, "decode_row", _defines(share, keys, tables, config), share.shared_size


def absent(config: ModelConfig, kinds: Sequence[GGMLType]) -> RowWeights | None:
    """Weights without numbers, v and down of these kinds in turn; None where kernels cannot read it."""
    layers, d_model = tuple(range(config.num_layers)), config.d_model
    stacks: dict[str, tuple[Placed, ...]] = {}
    for name, shape in shapes_of(config).items():
        own = kinds if name in ("v", "down") else [_Q4] * (len(kinds) if name in _IN_TWO else 1)
        turns = [layers[i :: len(own)] for i in range(len(own))]
        found = [
            packed.absent_weights([kind], [(len(at), *shape)]) for kind, at in zip(own, turns, strict=True)
        ]
        if not all(found):
            return None
        stacks[name] = tuple(Placed(stack, at) for (stack,), at in zip(found, turns, strict=True))
    shape = (config.num_layers, config.num_experts, d_model)
    stacks["router"] = (Placed(empty(GGMLType.F32, shape, "rows", new=jax.ShapeDtypeStruct), layers),)
    norm, head_norm = _absent(len(layers), d_model), _absent(len(layers), config.head_dim)
    angles = _absent(_CONTEXT, config.head_dim // 2)
    return RowWeights(norm, head_norm, head_norm, angles, angles, norm, stacks)


def _absent(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """A layer's products by name."""
    axes = {"output": "DN", "gate": "EFD", "up": "EFD", "down": "EDF", "q": "ND", "k": "KD", "v": "KD"}
    return {name: config.weight_shape(letters) for name, letters in axes.items()}


def comparisons(config: ModelConfig, seed: int) -> Iterator[Comparison]:
    """The layers of random weights, beside the kernels that the launch stands for."""
    for kinds in _KINDS:
        weights = absent(config, kinds)
        if weights is None or not is_supported(weights, config):
            continue
        rng = np.random.default_rng(seed)
        arrays = _random_arrays(rng, config, weights)
        for position in (n for n in _POSITIONS if n < min(config.context_length, _CONTEXT)):
            name = f"decode_row at {position}, v and down {' and '.join(kind.name for kind in kinds)}"
            kernel, several = (partial(_called, function, weights, config) for function in (run, separate))
            where = jnp.full(2, position, jnp.int32)
            yield Comparison(name, kernel, several, None, (*arrays, where), exact=True)


def _random_arrays(rng: np.random.Generator, config: ModelConfig, weights: RowWeights) -> tuple[Any, ...]:
    """x, keys, values, tables, the fields of all stacks, and norms and angles."""
    fields = {
        name: packed.random_weights(rng, [one.stack for one in placed])
        for name, placed in weights.stacks.items()
        if name != "router"
    }
    matrix = rng.standard_normal(weights.stacks["router"][0].stack.shape, np.float32)
    fields["router"] = [{"codes": jnp.asarray(matrix * np.float32(config.d_model**-0.5))}]
    angles = rng.uniform(0, 2 * np.pi, weights.cos.shape).astype(np.float32)
    numbers = {"cos": jnp.cos(angles), "sin": jnp.sin(angles)}
    for name in ("norms", "q_norms", "k_norms", "expert_norms"):
        shape = getattr(weights, name).shape
        numbers[name] = jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
    tables = rng.permutation(2 * _CONTEXT // _PAGE_LENGTH).reshape(2, -1)
    shape = (config.num_layers, tables.size, _PAGE_LENGTH, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for _ in range(2))
    x = jnp.asarray(rng.uniform(-2, 2, (1, config.d_model)), jnp.float32)
    return x, keys, values, jnp.asarray(tables, jnp.int32), fields, numbers


def _called(
    function: Callable[..., tuple[Array, ...]],
    outline: RowWeights,
    config: ModelConfig,
    x: Array,
    keys: Array,
    values: Array,
    tables: Array,
    fields: Mapping[str, packed.Fields],
    numbers: Mapping[str, Array],
    positions: Array,
) -> tuple[Array, ...]:
    stacks = {
        name: tuple(
            Placed(stack, one.layers)
            for stack, one in zip(
                packed.with_fields([one.stack for one in placed], fields[name]), placed, strict=True
            )
        )
        for name, placed in outline.stacks.items()
    }
    one = jnp.ones(1, jnp.int32)
    return function(
        x, keys, values, RowWeights(**numbers, stacks=stacks), active=one, positions=positions, tables=tables,
        count=one, config=config,
    )  # fmt: skip

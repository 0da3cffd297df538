"""Grouped-query attention over a paged cache, with q/k norms and NEOX-style RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxmoe.cache import KVCache
from jaxmoe.config import MAX_PAGE_LENGTH, ModelConfig, RopeScaling
from jaxmoe.kernels import attention as kernel_attention
from jaxmoe.kernels.matmul import Row
from jaxmoe.kernels.rounding import Rounded
from jaxmoe.layers import RMSNorm, StackedWeight, by_row_tiles, kernel_product, matmul

# Keys a step of the softmax takes: cut at absolute positions, so that a token's sums do not depend on
# how its prompt was cut into chunks.
SEGMENT_LENGTH = MAX_PAGE_LENGTH
_QUERY_ROWS = 32


def query_tile(config: ModelConfig) -> int:
    """Tokens that attend together: a power of two, some 32 rows of G queries a kv head."""
    fitting = max(1, _QUERY_ROWS * config.num_kv_heads // config.num_heads)
    return 1 << (fitting.bit_length() - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Where the M token rows of a step belong; only the first `num_rows` are real.

    `positions`, `pages` and `offsets` [M] say where a row's key and value go. Queries attend in tiles of
    Q tokens of one slot: `tile_rows` [n, Q] names the rows of a tile (M: none), `tile_tables` [n] the row
    of `page_tables` [slots, P] that it reads; `num_tiles` tiles are real.
    """

    num_rows: Array
    positions: Array
    pages: Array
    offsets: Array
    tile_rows: Array
    tile_tables: Array
    num_tiles: Array
    page_tables: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodePlaces:
    """One token of each slot of active[:count].

    All int32: active [B], positions [slots], tables [slots, P], count [1].
    """

    active: Array
    positions: Array
    tables: Array
    count: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillPlaces:
    """Tokens of one slot that follow each other.

    `where` int32 [4] is (slot, first position, count, 1 on the prompt's last chunk), `tables` [slots, P].
    """

    where: Array
    tables: Array

    @property
    def count(self) -> Array:
        """The number of real rows, int32 [1]."""
        return self.where[2:3]


def rope_tables(config: ModelConfig, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [context_length, H/2] float32 of NEOX-style RoPE (Su et al., 2021), and YaRN's."""
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-np.arange(half, dtype=np.float64) / half)
    scale = 1.0
    if config.rope_scaling is not None:
        frequencies, scale = _yarn(config.rope_scaling, config, frequencies)
    angles = np.arange(context_length, dtype=np.float64)[:, None] * frequencies
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def _yarn(scaling: RopeScaling, config: ModelConfig, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN's blend of interpolated and original frequencies, and its attention factor (Peng et al., 2023)."""
    half = config.head_dim // 2

    def dimension(rotations: float) -> float:
        wavelength = scaling.original_context_length / (rotations * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_base))

    low = max(0.0, math.floor(dimension(scaling.beta_fast)))
    high = min(config.head_dim - 1.0, math.ceil(dimension(scaling.beta_slow)))
    ramp = 1 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0, 1)
    keep = ramp * scaling.ext_factor
    blended = frequencies / scaling.factor * (1 - keep) + frequencies * keep
    scale = scaling.attn_factor
    if scaling.ext_factor != 0:
        scale *= 1 + 0.1 * math.log(scaling.factor)
    return blended, scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE of x [M, heads, H] by cos and sin [M, H/2]: the halves of H are the pairs."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """The attention weights of all layers; calling it writes this layer's keys and values, then attends."""

    def __init__(self, config: ModelConfig, weights: dict[str, Any], cos: Array, sin: Array) -> None:
        self.q: StackedWeight = weights["q"]
        self.k: StackedWeight = weights["k"]
        self.v: StackedWeight = weights["v"]
        self.output: StackedWeight = weights["output"]
        self.q_norm = RMSNorm(weights["q_norm"], config.norm_eps)
        self.k_norm = RMSNorm(weights["k_norm"], config.norm_eps)
        self.cos = nnx.Variable(cos)
        self.sin = nnx.Variable(sin)
        self.config = config

    def __call__(self, x: Array, cache: KVCache, rows: Rows, layer: Array) -> tuple[Array, KVCache]:
        """x [M, D], already normed -> attention output [M, D], and the cache with this step's tokens."""
        with jax.named_scope("qkv"):
            q, k, v = (self._project(x, weight, rows, layer) for weight in (self.q, self.k, self.v))
        with jax.named_scope("qk_norm_rope"):
            q, k = self._norm_and_rotate(q, k, rows, layer)
        with jax.named_scope("cache_write"):
            cache = cache.write(layer, rows.pages, rows.offsets, k, v)
        with jax.named_scope("attend"):
            mixed = attend(q, cache, rows, layer)
        with jax.named_scope("attn_output"):
            flat = mixed.reshape(x.shape[0], -1)
            y = self.output.apply(lambda w, i: matmul(flat, w, (i,), rows.num_rows), layer)
        return y, cache

    def qkv_with_kernels(self, inputs: Rounded | Row, count: Array, layer: int) -> Array:
        """Queries, keys and values of all heads, side by side [T, (N + 2K) * H]; count int32 [1]."""
        return kernel_product("qkv", inputs, (self.q, self.k, self.v), layer, count)

    def mix_with_kernels(
        self,
        qkv: Array,
        cache: KVCache,
        places: DecodePlaces | PrefillPlaces,
        counters: Array,
        layer: int,
    ) -> tuple[Rounded, KVCache, Array]:
        """Attention [T, N * H] of `qkv`, before its output matrix; the cache and counters are updated."""
        weights = self.q_norm.weight[...], self.k_norm.weight[...], self.cos[...], self.sin[...]
        if isinstance(places, DecodePlaces):
            codes, scales, keys, values, counters = kernel_attention.attend_decode(
                qkv, *weights, places.active, places.positions, places.tables, places.count,
                cache.keys, cache.values, counters, config=self.config, layer=layer,
            )  # fmt: skip
        else:
            where, tables = places.where, places.tables
            q, keys, values = kernel_attention.prepare(
                qkv, *weights, where, tables, cache.keys, cache.values, config=self.config, layer=layer
            )
            codes, scales = kernel_attention.attend_prefill(
                q, where, tables, keys, values, config=self.config, layer=layer
            )
        return Rounded(codes, scales), KVCache(keys, values), counters

    def output_with_kernels(self, mixed: Rounded, x: Array, count: Array, layer: int) -> Array:
        """x [T, D] plus `mixed` times the output matrix."""
        return kernel_product("attn_output", mixed, (self.output,), layer, count, residual=x)

    def _project(self, x: Array, weight: StackedWeight, rows: Rows, layer: Array) -> Array:
        y = weight.apply(lambda w, i: matmul(x, w, (i,), rows.num_rows), layer)
        return y.reshape(x.shape[0], -1, self.config.head_dim)

    def _norm_and_rotate(self, q: Array, k: Array, rows: Rows, layer: Array) -> tuple[Array, Array]:
        positions = jnp.clip(rows.positions, 0, self.cos.shape[0] - 1)
        cos, sin = self.cos[...][positions], self.sin[...][positions]

        def tile(q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
            normed = self.q_norm(q, layer), self.k_norm(k, layer)
            return rotate(normed[0], cos, sin), rotate(normed[1], cos, sin)

        zeros = jnp.zeros_like(q), jnp.zeros_like(k)
        return by_row_tiles(tile, zeros, (q, k, cos, sin), rows.num_rows)


def attend(q: Array, cache: KVCache, rows: Rows, layer: Array) -> Array:
    """Softmax attention of q [M, N, H] over each row's slot, up to the row's position -> [M, N, H]."""

    def tile(i: Array, out: Array) -> Array:
        members = rows.tile_rows[i]
        queries = q.at[members].get(mode="fill", fill_value=0)
        positions = rows.positions.at[members].get(mode="fill", fill_value=0)
        mixed = _attend_tile(queries, positions, rows.page_tables[rows.tile_tables[i]], cache, layer)
        return out.at[members].set(mixed, mode="drop")

    return lax.fori_loop(0, rows.num_tiles, tile, jnp.zeros_like(q))


def _attend_tile(queries: Array, positions: Array, table: Array, cache: KVCache, layer: Array) -> Array:
    """Attention of one tile [Q, N, H] at `positions` [Q] over one slot's pages `table` [P]."""
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = cache.keys.shape[3]
    group = num_heads // num_kv_heads
    scale = jnp.float32(1 / math.sqrt(head_dim))
    # [K, Q * G, H]: a kv head's queries side by side
    q = (queries * scale).reshape(num_tokens, num_kv_heads, group, head_dim).swapaxes(0, 1)
    q = q.reshape(num_kv_heads, num_tokens * group, head_dim)
    row_positions = jnp.repeat(positions, group)
    last = jnp.max(positions)
    pages_a_segment = SEGMENT_LENGTH // cache.page_length

    def segment(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = carry
        pages = lax.dynamic_slice_in_dim(table, i * pages_a_segment, pages_a_segment)
        keys, values = cache.segment(layer, pages)
        key_positions = i * SEGMENT_LENGTH + jnp.arange(SEGMENT_LENGTH, dtype=jnp.int32)
        # nothing that a page's former owner left behind may reach this sum, not even as 0 * inf
        values = jnp.where((key_positions <= last)[None, :, None], values, jnp.float32(0))
        scores = _batched(q, keys, (2, 2))
        seen = key_positions[None, :] <= row_positions[:, None]
        scores = jnp.where(seen[None], scores, -jnp.inf)
        new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        shares = jnp.exp(scores - new_highest)
        decay = jnp.exp(highest - new_highest)
        total = total * decay + shares.sum(axis=-1, keepdims=True)
        return new_highest, total, mixed * decay + _batched(shares, values, (2, 1))

    start = (
        jnp.full((num_kv_heads, num_tokens * group, 1), -jnp.inf, jnp.float32),
        jnp.zeros((num_kv_heads, num_tokens * group, 1), jnp.float32),
        jnp.zeros_like(q),
    )
    _, total, mixed = lax.fori_loop(0, last // SEGMENT_LENGTH + 1, segment, start)
    out = (mixed / total).reshape(num_kv_heads, num_tokens, group, head_dim)
    return out.swapaxes(0, 1).reshape(queries.shape)


def _batched(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Product of x and y with axis 0 as batch."""
    axes = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, axes, precision=lax.Precision.HIGHEST)

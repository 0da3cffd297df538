"""The decoder: Flax NNX modules that hold every layer's weights stacked, and one loop over the layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxmoe.attention import Attention, DecodePlaces, PrefillPlaces, Rows
from jaxmoe.cache import KVCache
from jaxmoe.config import ModelConfig
from jaxmoe.kernels import decode_row, packed
from jaxmoe.kernels import matmul as kernel_matmul
from jaxmoe.kernels.decode_row import Placed, RowWeights
from jaxmoe.kernels.matmul import Row
from jaxmoe.kernels.rounding import Rounded
from jaxmoe.layers import (
    PackedWeight,
    RMSNorm,
    StackedWeight,
    by_row_tiles,
    dequantised_halves,
    matmul,
    padded_rows,
    rms_norm,
    rounded,
)
from jaxmoe.moe import MoE
from jaxmoe.quants import QuantTensor


class Embedding(nnx.Module):
    """The token embedding [V, D], packed."""

    def __init__(self, tensor: QuantTensor) -> None:
        self.weight = PackedWeight(tensor)

    def __call__(self, token_ids: Array) -> Array:
        """token_ids [M] -> float32 [M, D]."""
        weight = self.weight.tensor
        axis = 0 if weight.layout == "rows" else 1
        picked = weight.map(lambda a: jnp.take(a, token_ids, axis=axis, mode="clip"))
        parts = dequantised_halves(picked)
        if weight.layout == "columns":
            parts = tuple(part.T for part in parts)
        if len(parts) == 1:
            return parts[0]
        low_high = [part.reshape(part.shape[0], -1, 32) for part in parts]
        return jnp.stack(low_high, axis=2).reshape(token_ids.shape[0], -1)


class Decoder(nnx.Module):
    """A Qwen3-MoE network; weights only, the cache is passed in and handed back."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Embedding,
        attention: Attention,
        moe: MoE,
        norms: dict[str, Array],
        output: QuantTensor | None,
    ) -> None:
        self.embedding = embedding
        self.attention = attention
        self.moe = moe
        self.attn_norm = RMSNorm(norms["attn"], config.norm_eps)
        self.moe_norm = RMSNorm(norms["moe"], config.norm_eps)
        self.final_norm = nnx.Param(norms["final"])
        self.output = None if output is None else PackedWeight(output)
        self.config = config

    def __call__(self, token_ids: Array, cache: KVCache, rows: Rows) -> tuple[Array, KVCache]:
        """token_ids [M] -> hidden states [M, D] before the final norm, and the cache that now has them."""
        with jax.named_scope("embedding"):
            x = self.embedding(token_ids)

        def layer(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            x, cache = carry
            with jax.named_scope("attention"):
                y, cache = self.attention(_normed(self.attn_norm, x, rows, i), cache, rows, i)
                x = x + y
            with jax.named_scope("moe"):
                x = x + self.moe(_normed(self.moe_norm, x, rows, i), rows.num_rows, i)
            return x, cache

        return lax.fori_loop(0, self.config.num_layers, layer, (x, cache))

    def with_kernels(
        self, token_ids: Array, cache: KVCache, places: DecodePlaces | PrefillPlaces, counters: Array
    ) -> tuple[Array, Rounded | Row, KVCache, Array]:
        """token_ids [T] -> hidden [T, D] before the final norm, the input of the logits, cache, counters.

        The layers are unrolled: a command buffer holds the whole step.
        """
        x = self.embedding(token_ids)
        if isinstance(places, DecodePlaces) and x.shape[0] == 1:
            weights = self._row_weights()
            if decode_row.is_supported(weights, self.config):
                x, keys, values = decode_row.run(
                    x, cache.keys, cache.values, weights, active=places.active, positions=places.positions,
                    tables=places.tables, count=places.count, config=self.config,
                )  # fmt: skip
                return x, self.final_row(x), KVCache(keys, values), counters
        inputs: Rounded | Row = Row(x, self.attn_norm.weight[...], 0, self.config.norm_eps)
        if x.shape[0] > 1:
            inputs = rounded(inputs, places.count)
        norms = [(self.attn_norm.weight[...], layer) for layer in range(1, self.config.num_layers)]
        norms.append((self.final_norm[...][None], 0))
        for layer, next_norm in enumerate(norms):
            qkv = self.attention.qkv_with_kernels(inputs, places.count, layer)
            mixed, cache, counters = self.attention.mix_with_kernels(qkv, cache, places, counters, layer)
            x = self.attention.output_with_kernels(mixed, x, places.count, layer)
            x, inputs, counters = self.moe.with_kernels(
                x, self.moe_norm.weight[...], next_norm, places.count, counters, layer
            )
        return x, inputs, cache, counters

    def _row_weights(self) -> RowWeights:
        """What one launch reads that does all layers of one row."""
        attention, moe = self.attention, self.moe
        stacks = {name: getattr(attention, name) for name in ("q", "k", "v", "output")}
        stacks |= {name: getattr(moe, name) for name in ("router", "gate", "up", "down")}
        return RowWeights(
            self.attn_norm.weight[...], attention.q_norm.weight[...], attention.k_norm.weight[...],
            attention.cos[...], attention.sin[...], self.moe_norm.weight[...],
            {name: _placed(weight) for name, weight in stacks.items()},
        )  # fmt: skip

    def logits_with_kernels(self, hidden: Array, inputs: Rounded | Row, count: Array) -> Array:
        """`logits` of hidden [B, D], whose normed rows are `inputs`; count int32 [1] -> float32 [B, V]."""
        tensor = self._output_weight.tensor
        if packed.is_supported(tensor):
            inputs = inputs if packed.has_row_kernels(tensor) else rounded(inputs, count)
            return kernel_matmul.dense("lm_head", inputs, [tensor], count)
        return self.logits(hidden, count[0])[: hidden.shape[0]]

    @property
    def _output_weight(self) -> PackedWeight:
        return self.embedding.weight if self.output is None else self.output

    def final_row(self, hidden: Array) -> Row:
        """One row [1, D] of hidden states as the input of the logits."""
        return Row(hidden, self.final_norm[...][None], 0, self.config.norm_eps)

    def logits(self, hidden: Array, num_rows: Array) -> Array:
        """hidden [B, D] -> logits of the first `num_rows` rows, float32 [MIN_ROWS or more, V]."""
        with jax.named_scope("logits"):
            x = padded_rows(hidden)
            norm: Any = lambda tile: rms_norm(tile, self.final_norm[...], self.config.norm_eps)  # noqa: E731
            x = by_row_tiles(norm, jnp.zeros_like(x), (x,), num_rows)
            return matmul(x, self._output_weight.tensor, (), num_rows)


def _placed(weight: StackedWeight) -> tuple[Placed, ...]:
    """The stacks of a weight, each with the layers that it holds."""
    layers: list[list[int]] = [[] for _ in weight.stacks]
    for layer, (which, _) in enumerate(weight.places):
        layers[which].append(layer)
    return tuple(Placed(stack.tensor, tuple(at)) for stack, at in zip(weight.stacks, layers, strict=True))


def _normed(norm: RMSNorm, x: Array, rows: Rows, layer: Array) -> Array:
    return by_row_tiles(lambda tile: norm(tile, layer), jnp.zeros_like(x), (x,), rows.num_rows)

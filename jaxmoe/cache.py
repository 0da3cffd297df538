"""The KV cache on the device: pages of keys and values, donated to every step."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxmoe.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys after RoPE and values, each [L, pages, page_length, K, H]."""

    keys: Array
    values: Array

    @staticmethod
    def empty(config: ModelConfig, num_pages: int, page_length: int, dtype: str) -> KVCache:
        """A cache of zeros: 2 x L x pages x page_length x K x H x itemsize bytes."""
        shape = (config.num_layers, num_pages, page_length, config.num_kv_heads, config.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @staticmethod
    def page_size(config: ModelConfig, page_length: int, dtype: str) -> int:
        """Bytes of one page over all layers."""
        row_size = config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
        return 2 * config.num_layers * page_length * row_size

    @property
    def page_length(self) -> int:
        """Tokens a page holds."""
        return self.keys.shape[2]

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.keys.shape[1]

    def write(self, layer: Array, pages: Array, offsets: Array, keys: Array, values: Array) -> KVCache:
        """Store keys and values [M, K, H] at (page, offset) [M]; a page id past the end stores nothing."""

        def put(cache: Array, rows: Array) -> Array:
            return cache.at[layer, pages, offsets].set(rows.astype(cache.dtype), mode="drop")

        return KVCache(put(self.keys, keys), put(self.values, values))

    def segment(self, layer: Array, pages: Array) -> tuple[Array, Array]:
        """Keys and values of `pages` [n] in order, float32 [K, n * page_length, H] each."""

        def take(cache: Array) -> Array:
            rows = cache.at[layer, pages].get(mode="clip").astype(jnp.float32)
            return rows.reshape(-1, *rows.shape[2:]).swapaxes(0, 1)

        return take(self.keys), take(self.values)

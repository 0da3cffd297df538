"""The paged cache: what is written at a place is read there, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.cache import KVCache
from jaxmoe.config import ModelConfig

L, PAGES, PAGE, K, H = 3, 5, 4, 2, 6


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        num_layers=L, d_model=8, num_heads=4, num_kv_heads=K, head_dim=H, num_experts=2, experts_per_token=1,
        expert_width=8, vocab_size=10, context_length=64, norm_eps=1e-6, rope_base=1e4, rope_scaling=None,
        name="small",
    )  # fmt: skip


def ids(*numbers: int) -> jax.Array:
    return jnp.array(numbers, jnp.int32)


def rows(count: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, K, H)), jnp.float32)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_a_page_s_size_is_what_it_takes(config: ModelConfig, dtype: str, itemsize: int) -> None:
    cache = KVCache.empty(config, PAGES, PAGE, dtype)
    assert (cache.num_pages, cache.page_length) == (PAGES, PAGE)
    assert cache.keys.shape == cache.values.shape == (L, PAGES, PAGE, K, H)
    assert KVCache.page_size(config, PAGE, dtype) == 2 * 3 * 4 * 2 * 6 * itemsize
    assert cache.keys.nbytes + cache.values.nbytes == PAGES * KVCache.page_size(config, PAGE, dtype)
    assert not cache.keys.any()
    assert not cache.values.any()


def test_a_bfloat16_cache_of_the_30b_model_takes_98304_bytes_a_token(config: ModelConfig) -> None:
    big = replace(config, num_layers=48, num_kv_heads=4, head_dim=128)
    assert KVCache.page_size(big, 1, "bfloat16") == 98304


def test_rows_are_read_in_the_order_of_the_pages_asked_for(config: ModelConfig) -> None:
    keys, values = rows(8, seed=0), rows(8, seed=1)
    # tokens 0..3 in page 3, tokens 4..7 in page 1, written in disorder
    order = np.array([5, 0, 7, 2, 1, 6, 3, 4])
    pages, offsets = ids(*np.where(order < 4, 3, 1)), ids(*order % 4)
    empty = KVCache.empty(config, PAGES, PAGE, "float32")
    cache = empty.write(jnp.int32(1), pages, offsets, keys[order], values[order])
    read_keys, read_values = cache.segment(jnp.int32(1), ids(3, 1))
    np.testing.assert_array_equal(read_keys, keys.swapaxes(0, 1))
    np.testing.assert_array_equal(read_values, values.swapaxes(0, 1))
    np.testing.assert_array_equal(cache.segment(jnp.int32(1), ids(1, 0))[0][:, :4], keys[4:].swapaxes(0, 1))


def test_a_write_touches_its_own_places_only(config: ModelConfig) -> None:
    full = KVCache(*(jnp.full((L, PAGES, PAGE, K, H), n) for n in (7.0, 8.0)))
    cache = full.write(jnp.int32(2), ids(0, 4), ids(1, 3), rows(2, seed=0), rows(2, seed=1))
    for array, number in ((cache.keys, 7), (cache.values, 8)):
        changed = np.argwhere((np.asarray(array) != number).any(axis=(3, 4)))
        assert changed.tolist() == [[2, 0, 1], [2, 4, 3]]


def test_a_page_past_the_end_stores_nothing(config: ModelConfig) -> None:
    empty = KVCache.empty(config, PAGES, PAGE, "float32")
    cache = empty.write(jnp.int32(0), ids(PAGES, PAGES), ids(0, 3), rows(2, seed=0), rows(2, seed=1))
    assert not cache.keys.any()
    assert not cache.values.any()


def test_a_bfloat16_cache_rounds_once(config: ModelConfig) -> None:
    keys = rows(1, seed=0)
    empty = KVCache.empty(config, PAGES, PAGE, "bfloat16")
    read, _ = empty.write(jnp.int32(0), ids(2), ids(0), keys, keys).segment(jnp.int32(0), ids(2))
    assert read.dtype == jnp.float32
    np.testing.assert_array_equal(
        read[:, 0], np.asarray(keys[0]).astype(ml_dtypes.bfloat16).astype(np.float32)
    )

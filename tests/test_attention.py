"""Attention over pages against a plain float64 softmax, and RoPE against rotations of complex numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from on_device import one_slot_rows
from reference import rope_frequencies

from jaxmoe.attention import SEGMENT_LENGTH, Rows, attend, query_tile, rope_tables, rotate
from jaxmoe.cache import KVCache
from jaxmoe.config import ModelConfig, RopeScaling

H, PAGE, NUM_PAGES, LAYER = 16, 64, 64, 1
EDGES = (0, 1, 63, 64, 255, 256, 257, 600)

CONFIG = ModelConfig(
    num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=H, num_experts=4, experts_per_token=2,
    expert_width=32, vocab_size=10, context_length=1024, norm_eps=1e-6, rope_base=1e6, rope_scaling=None,
    name="small",
)  # fmt: skip


@dataclass
class Batch:
    """Slots with their keys and values, and one query each at its last position."""

    queries: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]

    @property
    def positions(self) -> np.ndarray:
        return np.array([len(keys) - 1 for keys in self.keys], np.int32)

    def naive(self) -> np.ndarray:
        return np.stack([naive(*slot) for slot in zip(self.queries, self.keys, self.values, strict=True)])


def random_batch(positions: tuple[int, ...] = EDGES, num_heads: int = 4, num_kv_heads: int = 2) -> Batch:
    rng = np.random.default_rng(len(positions))

    def draw(*shape: int) -> np.ndarray:
        return 1.5 * rng.standard_normal((*shape, H)).astype(np.float32)

    keys = [draw(position + 1, num_kv_heads) for position in positions]
    return Batch(draw(len(positions), num_heads), keys, [draw(len(k), num_kv_heads) for k in keys])


def naive(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Query [N, H] over keys and values [T, K, H] in float64: head n reads kv head n // (N / K)."""
    out = []
    for head, q in enumerate(query.astype(np.float64)):
        kv_head = head * keys.shape[1] // len(query)
        scores = keys[:, kv_head] @ q / np.sqrt(H)
        powers = np.exp(scores - scores.max())
        out.append(powers / powers.sum() @ values[:, kv_head])
    return np.array(out)


def in_order(batch: Batch) -> np.ndarray:
    """A page table [slots, P]: the first slot's pages, then the second's ...; page 0 where there are none."""
    return tables_of(batch, range(NUM_PAGES))


def shuffled(batch: Batch, rest: int = 0) -> np.ndarray:
    return tables_of(batch, np.random.default_rng(3).permutation(NUM_PAGES), rest)


def page_length_of(tables: np.ndarray) -> int:
    """Tables are made for 1024 tokens."""
    return 1024 // tables.shape[1]


def tables_of(batch: Batch, pages: Any, rest: int = 0, page_length: int = PAGE) -> np.ndarray:
    tables, free = np.full((len(batch.keys), 1024 // page_length), rest, np.int32), iter(pages)
    for table, keys in zip(tables, batch.keys, strict=True):
        for i in range(-(-len(keys) // page_length)):
            table[i] = next(free)
    return tables


def cache_of(batch: Batch, tables: np.ndarray, *, rest: float = 0.0, dtype: Any = np.float32) -> KVCache:
    """Keys and values on the pages of `tables` in layer 1; everything else is `rest`."""
    page_length = page_length_of(tables)
    shape = (2, NUM_PAGES * PAGE // page_length, page_length, batch.keys[0].shape[1], H)
    arrays = []
    for rows in (batch.keys, batch.values):
        array = np.full(shape, rest, dtype)
        for slot, table in zip(rows, tables, strict=True):
            for i, row in enumerate(slot):
                array[LAYER, table[i // page_length], i % page_length] = row
        arrays.append(jnp.asarray(array))
    return KVCache(*arrays)


def decode_rows(positions: np.ndarray, tables: np.ndarray, tile: int = 4) -> Rows:
    """One token of each slot."""
    page_length = page_length_of(tables)
    index = np.arange(len(positions), dtype=np.int32)
    others = np.full((len(positions), tile - 1), len(positions), np.int32)
    return Rows(
        num_rows=jnp.int32(len(positions)),
        positions=jnp.asarray(positions),
        pages=jnp.asarray(tables[index, positions // page_length]),
        offsets=jnp.asarray(positions % page_length),
        tile_rows=jnp.asarray(np.concatenate([index[:, None], others], axis=1)),
        tile_tables=jnp.asarray(index),
        num_tiles=jnp.int32(len(positions)),
        page_tables=jnp.asarray(tables),
    )


@jax.jit
def run(q: Array, cache: KVCache, rows: Rows) -> Array:
    return attend(q, cache, rows, jnp.int32(LAYER))


def decoded(batch: Batch, tables: np.ndarray, **cache: Any) -> np.ndarray:
    rows = decode_rows(batch.positions, tables)
    return np.asarray(run(jnp.asarray(batch.queries), cache_of(batch, tables, **cache), rows))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (8, 1)])
def test_each_query_head_reads_its_kv_head_over_all_segments(num_heads: int, num_kv_heads: int) -> None:
    batch = random_batch(num_heads=num_heads, num_kv_heads=num_kv_heads)
    np.testing.assert_allclose(decoded(batch, shuffled(batch)), batch.naive(), rtol=0, atol=3e-6)


def test_pages_in_any_order_give_the_bits_of_pages_in_order() -> None:
    batch = random_batch()
    np.testing.assert_array_equal(decoded(batch, shuffled(batch)), decoded(batch, in_order(batch)))


@pytest.mark.parametrize("rest", [np.nan, np.inf, -np.inf, 3e38])
def test_what_others_left_in_the_cache_does_not_matter(rest: float) -> None:
    batch = random_batch()
    expected = decoded(batch, shuffled(batch))
    np.testing.assert_array_equal(decoded(batch, shuffled(batch), rest=rest), expected)
    np.testing.assert_array_equal(decoded(batch, shuffled(batch, rest=NUM_PAGES - 1), rest=rest), expected)


def test_a_slot_has_the_same_bits_alone_and_among_others() -> None:
    batch = random_batch()
    together = decoded(batch, shuffled(batch))
    for i, out in enumerate(together):
        one = Batch(batch.queries[i : i + 1], batch.keys[i : i + 1], batch.values[i : i + 1])
        np.testing.assert_array_equal(decoded(one, in_order(one))[0], out)


def test_a_longer_page_table_does_not_change_a_bit() -> None:
    batch = random_batch((0, 5, 200, 255))
    tables = shuffled(batch)
    rows, cache = decode_rows(batch.positions, tables), cache_of(batch, tables, rest=np.nan)
    short = replace(rows, page_tables=rows.page_tables[:, :4])
    np.testing.assert_array_equal(run(jnp.asarray(batch.queries), cache, short), decoded(batch, tables))


@pytest.mark.parametrize("page_length", [4, 32, 256])
def test_the_length_of_a_page_does_not_change_a_bit(page_length: int) -> None:
    batch = random_batch()
    pages = np.random.default_rng(5).permutation(NUM_PAGES * PAGE // page_length)
    tables = tables_of(batch, pages, page_length=page_length)
    np.testing.assert_array_equal(decoded(batch, tables, rest=np.nan), decoded(batch, in_order(batch)))


def test_a_bfloat16_cache_is_read_as_float32() -> None:
    batch = random_batch()
    rounded = replace(
        batch,
        keys=[k.astype(ml_dtypes.bfloat16).astype(np.float32) for k in batch.keys],
        values=[v.astype(ml_dtypes.bfloat16).astype(np.float32) for v in batch.values],
    )
    out = decoded(batch, in_order(batch), dtype=ml_dtypes.bfloat16)
    np.testing.assert_allclose(out, rounded.naive(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("start", [0, 200, 256, 500])
@pytest.mark.parametrize("tile", [1, 4, 16])
def test_a_chunk_is_causal_and_has_the_bits_of_single_tokens(start: int, tile: int) -> None:
    count, bucket = 59, 64
    whole = random_batch((start + count - 1,))
    keys, values = whole.keys[0], whole.values[0]
    queries = np.random.default_rng(1).standard_normal((bucket, 4, H)).astype(np.float32)
    tables = shuffled(whole)
    cache = cache_of(whole, tables, rest=np.nan)
    place = partial(one_slot_rows, table=jnp.asarray(tables[0]), page_length=PAGE, num_pages=NUM_PAGES)
    positions = start + jnp.arange(bucket, dtype=jnp.int32)
    out = np.asarray(run(jnp.asarray(queries), cache, place(positions, jnp.int32(count), tile=tile)))
    for i in (0, 1, count // 2, count - 4, count - 1):
        end = start + i + 1
        np.testing.assert_allclose(out[i], naive(queries[i], keys[:end], values[:end]), rtol=0, atol=3e-6)
        # same size of tile: as decode and prefill have it
        alone = place(jnp.full(tile, start + i, jnp.int32), jnp.int32(1), tile=tile)
        query = np.repeat(queries[i : i + 1], tile, axis=0)
        np.testing.assert_array_equal(run(jnp.asarray(query), cache, alone)[0], out[i])
    assert not out[count:].any()


def test_large_scores_do_not_overflow() -> None:
    batch = random_batch((300, 10))
    batch.queries *= 200
    np.testing.assert_allclose(decoded(batch, in_order(batch)), batch.naive(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "tile"), [(32, 4, 4), (4, 2, 16), (4, 4, 32), (64, 1, 1), (40, 8, 4)]
)
def test_a_query_tile_is_some_32_rows_of_a_kv_head(num_heads: int, num_kv_heads: int, tile: int) -> None:
    assert query_tile(replace(CONFIG, num_heads=num_heads, num_kv_heads=num_kv_heads)) == tile


def test_pages_end_at_the_edges_of_segments() -> None:
    assert SEGMENT_LENGTH % PAGE == 0


# RoPE


def test_rope_turns_each_pair_as_a_complex_number() -> None:
    length, heads = 300, 3
    x = np.random.default_rng(0).standard_normal((length, heads, H)).astype(np.float32)
    cos, sin = rope_tables(CONFIG, length)
    out = np.asarray(rotate(jnp.asarray(x), jnp.asarray(cos), jnp.asarray(sin)))
    pairs = x[..., : H // 2] + 1j * x[..., H // 2 :]
    for position in (0, 1, 17, 299):
        for i in range(H // 2):
            turned = pairs[position, :, i] * np.exp(1j * position / 1e6 ** (2 * i / H))
            np.testing.assert_allclose(out[position, :, i], turned.real, rtol=0, atol=1e-6)
            np.testing.assert_allclose(out[position, :, i + H // 2], turned.imag, rtol=0, atol=1e-6)


def test_rope_tables_hold_late_positions_exactly() -> None:
    cos, sin = rope_tables(CONFIG, 131_072)
    angles = 131_071.0 / 1e6 ** (2 * np.arange(H // 2) / H)
    np.testing.assert_allclose(cos[-1], np.cos(angles), rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin[-1], np.sin(angles), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "optional",
    [{}, {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}, {"yarn_attn_factor": 0.8}, {"yarn_ext_factor": 0.5}],
)
@pytest.mark.parametrize(("factor", "original"), [(4.0, 32_768), (1.0, 4096), (16.0, 256)])
def test_yarn_is_the_reference_s(factor: float, original: int, optional: dict[str, float]) -> None:
    keys = {"rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    keys["rope.scaling.original_context_length"] = original
    keys |= {f"rope.scaling.{name}": value for name, value in optional.items()}
    given = {name.removeprefix("yarn_"): value for name, value in optional.items()}
    scaling = RopeScaling(factor=factor, original_context_length=original, **given)
    cos, sin = rope_tables(replace(CONFIG, head_dim=128, rope_scaling=scaling), 1000)
    frequencies, magnitude = rope_frequencies(keys, 128)
    angles = np.arange(1000)[:, None] * frequencies
    np.testing.assert_allclose(cos, magnitude * np.cos(angles), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, magnitude * np.sin(angles), rtol=0, atol=2e-7)


def test_yarn_keeps_the_fastest_pair_and_slows_the_slowest_by_its_factor() -> None:
    scaling = RopeScaling(factor=4.0, original_context_length=32_768)
    config = replace(CONFIG, head_dim=128, rope_scaling=scaling)
    magnitude = 1 + 0.1 * np.log(4)
    cos, _ = rope_tables(config, 30_000)
    np.testing.assert_allclose(cos[1, 0], magnitude * np.cos(1), rtol=1e-6)
    slowest = 1e6 ** (-126 / 128) / 4
    np.testing.assert_allclose(cos[-1, 63], magnitude * np.cos(29_999 * slowest), rtol=1e-6)


def test_yarn_without_its_blend_only_stretches() -> None:
    """ggml leaves the magnitude alone where ext_factor is 0."""
    scaling = RopeScaling(factor=2.0, original_context_length=512, ext_factor=0.0)
    cos, sin = rope_tables(replace(CONFIG, rope_scaling=scaling), 101)
    plain = rope_tables(CONFIG, 51)
    np.testing.assert_allclose(cos[::2], plain[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin[::2], plain[1], rtol=0, atol=1e-7)

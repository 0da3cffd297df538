"""Attention kernels, run by the emulator: against float64 and their twins, and the same bits on both ways."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_config import small_config

from jaxmoe.config import ModelConfig
from jaxmoe.kernels import attention, ptx
from jaxmoe.kernels.attention import attend_decode, attend_prefill, decode_arrays, prepare
from jaxmoe.kernels.rounding import Rounded, rounded_values

LAYER = 1
NARROW = replace(small_config(), num_heads=4, num_kv_heads=1, head_dim=64, context_length=128)
WIDE = replace(small_config(), num_heads=16, num_kv_heads=2, head_dim=128, context_length=600)
ODD = replace(
    small_config(), num_heads=10, num_kv_heads=2, head_dim=64
)  # groups of 5: tiles with rows to spare
EDGES = (0, 31, 255, 256, 257, 600)

pytestmark = pytest.mark.usefixtures("emulated")


def error(found: Any, wanted: Any) -> float:
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def same(found: Any, wanted: Any) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def decode(state: dict[str, Any], config: ModelConfig, **changes: Any) -> list[np.ndarray]:
    """Codes, scales, keys, values and counters."""
    arrays = (jnp.asarray(x) for x in (state | changes).values())
    return [np.asarray(x) for x in attend_decode(*arrays, config=config, layer=LAYER)]


def prefill(
    state: dict[str, Any], config: ModelConfig, qkv: Any, slot: int, start: int, count: int
) -> tuple[Any, Any, dict[str, Any]]:
    """Codes and scales of a chunk padded to all rows of `qkv`, and the state with its pages."""
    where = jnp.asarray([slot, start, count, 0], jnp.int32)
    weights = [state[name] for name in ("q_norm", "k_norm", "cos", "sin")]
    pages = state["tables"], state["keys"], state["values"]
    q, keys, values = prepare(qkv, *weights, where, *pages, config=config, layer=LAYER)
    codes, scales = attend_prefill(q, where, pages[0], keys, values, config=config, layer=LAYER)
    return codes[:count], scales[:count], state | {"keys": keys, "values": values}


def turned(x: np.ndarray, weight: Any, cos: Any, sin: Any, eps: float) -> np.ndarray:
    """Norm and RoPE of heads [n, H] in float64, by complex numbers."""
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    half = x.shape[-1] // 2
    pairs = (x[:, :half] + 1j * x[:, half:]) * (
        np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    )
    return np.concatenate([pairs.real, pairs.imag], -1)


def reference(state: dict[str, Any], config: ModelConfig, row: int) -> np.ndarray:
    """Attention of one row of `attend_decode` in float64."""
    slot = int(state["active"][row])
    position = int(state["positions"][slot])
    heads = np.asarray(state["qkv"], np.float64)[row].reshape(-1, config.head_dim)
    angles = state["cos"][position], state["sin"][position]
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    q = turned(heads[:num_heads], state["q_norm"][LAYER], *angles, config.norm_eps)
    k = turned(heads[num_heads:-num_kv_heads], state["k_norm"][LAYER], *angles, config.norm_eps)
    table = np.asarray(state["tables"])[slot]
    shape = (-1, num_kv_heads, config.head_dim)
    keys, values = (np.asarray(state[x][LAYER], np.float64)[table].reshape(shape) for x in ("keys", "values"))
    keys = np.concatenate([keys[:position], k[None]])
    values = np.concatenate([values[:position], heads[None, -num_kv_heads:]])
    out = []
    for n in range(num_heads):
        scores = keys[:, n * num_kv_heads // num_heads] @ q[n] / np.sqrt(config.head_dim)
        shares = np.exp(scores - scores.max())
        out.append(shares / shares.sum() @ values[:, n * num_kv_heads // num_heads])
    return np.concatenate(out)


def poisoned(state: dict[str, Any], page_length: int) -> dict[str, Any]:
    """NaN wherever no token of an active slot lies."""
    num_pages = state["keys"].shape[1]
    known = np.zeros(num_pages * page_length, bool)
    for slot in np.asarray(state["active"]):
        at = np.arange(int(state["positions"][slot]))
        known[np.asarray(state["tables"])[slot, at // page_length] * page_length + at % page_length] = True
    mask = jnp.asarray(known.reshape(1, num_pages, page_length, 1, 1))
    return state | {name: jnp.where(mask, state[name], jnp.nan) for name in ("keys", "values")}


@pytest.mark.parametrize(("config", "page_length"), [(NARROW, 16), (NARROW, 256), (WIDE, 64), (ODD, 1)])
def test_decode_is_softmax_attention_whatever_lies_in_other_pages(
    config: ModelConfig, page_length: int
) -> None:
    state = poisoned(decode_arrays(config, 3, EDGES, page_length), page_length)
    codes, scales, _, _, counters = decode(state, config)
    found = rounded_values(Rounded(jnp.asarray(codes), jnp.asarray(scales)))
    for row in range(len(EDGES)):
        assert error(found[row], reference(state, config, row)) < 0.015, f"position {EDGES[row]}"
    sums = codes.reshape(*scales.shape[:2], 32).sum(-1)
    np.testing.assert_array_equal(scales[..., 1], scales[..., 0] * sums.astype(np.float32))
    assert not counters.any()


@pytest.mark.parametrize("config", [NARROW, WIDE])
def test_kernels_agree_with_their_twins(config: ModelConfig) -> None:
    for comparison in attention.comparisons(config, 5):
        found = jax.tree.leaves(comparison.kernel(*comparison.arrays))
        wanted = jax.tree.leaves(comparison.twin(*comparison.arrays))
        if comparison.exact:
            assert same(found, wanted), comparison.name
            continue
        assert max(map(error, found, wanted)) < 1e-3, comparison.name
        assert comparison.float_twin is not None
        wanted = jax.tree.leaves(comparison.float_twin(*comparison.arrays))
        assert max(map(error, found, wanted)) < 0.015, comparison.name


@pytest.mark.parametrize(
    ("config", "page_length", "first"),
    [(NARROW, 64, 250), (NARROW, 256, 1019), (WIDE, 16, 250), (ODD, 32, 380)],
)
def test_a_token_has_the_same_bits_in_any_chunk_and_in_decode(
    config: ModelConfig, page_length: int, first: int
) -> None:
    positions = tuple(range(first, first + 9))
    state = decode_arrays(config, 7, positions, page_length)
    qkv, slot = state["qkv"], 3
    whole = prefill(state, config, qkv, slot, positions[0], len(positions))
    for cuts in ([0, 1, 6, 9], [0, 7, 9]):
        codes, scales, after = [], [], state
        for low, high in pairwise(cuts):
            # padded rows, which are not there
            rows = jnp.roll(qkv, -low, axis=0)
            chunk = prefill(after, config, rows, slot, positions[low], high - low)
            codes.append(chunk[0])
            scales.append(chunk[1])
            after = chunk[2]
        assert same((jnp.concatenate(codes), jnp.concatenate(scales)), whole[:2]), cuts
        assert same((after["keys"], after["values"]), (whole[2]["keys"], whole[2]["values"]))
    # one after another in decode, among rows that are only there to fill up
    keys, values = state["keys"], state["values"]
    for row, position in enumerate(positions):
        alone = {"qkv": jnp.roll(qkv, -row, axis=0), "active": jnp.full(len(positions), slot, jnp.int32)}
        at = jnp.full_like(state["positions"], position)
        step = decode(state, config, **alone, positions=at, count=[1], keys=keys, values=values)
        assert same((step[0][0], step[1][0]), (whole[0][row], whole[1][row])), position
        keys, values = step[2], step[3]
    assert same((keys, values), (whole[2]["keys"], whole[2]["values"]))


def test_neighbours_change_nothing_and_rows_past_the_count_are_left_alone() -> None:
    state = decode_arrays(NARROW, 9, EDGES, 64)
    together = decode(state, NARROW)
    for row in (2, 5):
        only = {"qkv": state["qkv"][row : row + 1], "active": state["active"][row : row + 1], "count": [1]}
        alone = decode(state, NARROW, **only)
        assert same((alone[0][0], alone[1][0]), (together[0][row], together[1][row]))
    few = decode(state, NARROW, count=[2])
    assert same((few[0][:2], few[1][:2]), (together[0][:2], together[1][:2]))
    assert np.isnan(few[1][2:]).all()
    for name, after in (("keys", few[2]), ("values", few[3])):
        changed = np.argwhere((after != np.asarray(state[name])).any(-1))
        expected = [page_of(state, row, 64) for row in range(2)]
        assert sorted(map(tuple, changed.tolist())) == sorted(expected)


def page_of(state: dict[str, Any], row: int, page_length: int) -> tuple[int, int, int, int]:
    """Layer, page, offset and key head of a row's token."""
    slot = int(state["active"][row])
    position = int(state["positions"][slot])
    return LAYER, int(state["tables"][slot, position // page_length]), position % page_length, 0


@pytest.mark.parametrize("blocks", [2, 8])
def test_blocks_that_take_several_segments_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    state = decode_arrays(NARROW, 11, (1300, 700), 64)
    wanted = decode(state, NARROW)
    monkeypatch.setattr(attention, "_num_blocks", lambda *_: blocks)
    assert same(decode(state, NARROW), wanted)


def test_less_shared_memory_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    state = decode_arrays(WIDE, 17, (1300, 513), 256)
    monkeypatch.setattr(attention, "_num_blocks", lambda *_: 4)
    wanted = decode(state, WIDE)
    monkeypatch.setattr(ptx, "shared_limit", lambda: ptx.SMALL_SHARED)
    assert (attention._buffers(), attention._query_rows()) == (2, (64, 1))
    assert same(decode(state, WIDE), wanted)


@pytest.mark.parametrize("blocks", [12, 66])
@pytest.mark.parametrize("positions", [(511,), (512,) * 8, (9000, 3, 700), tuple(range(0, 2800, 70))])
def test_a_plan_gives_each_segment_to_one_block(
    monkeypatch: pytest.MonkeyPatch, positions: tuple[int, ...], blocks: int
) -> None:
    state = decode_arrays(NARROW, 19, positions, 64)
    monkeypatch.setattr(attention, "_num_blocks", lambda *_: blocks)
    macros = attention._macros(NARROW, state["keys"], state["tables"])
    active, at, tables, count = (state[name] for name in ("active", "positions", "tables", "count"))
    plans = np.asarray(attention._plan(active, at, tables, count, macros))
    busy = plans[plans[:, 0, 4] > 0]
    largest = max(int(end - first) for first, end in busy[:, 0, 3:5])
    total = sum(position // 128 + 1 for position in positions)
    assert largest <= 4 * -(-sum(position // 512 + 1 for position in positions) // blocks) + 1
    assert total > blocks or largest == 1
    for row, position in enumerate(positions):
        mine = busy[busy[:, 0, 0] == row]
        assert (mine[:, :, 5] == len(mine)).all()
        slot = int(state["active"][row])
        assert (mine[:, :, 1:3] == (slot, position)).all()
        bounds = [0, *mine[:, 0, 4].tolist()]
        assert bounds[-1] == position // 128 + 1
        assert bounds[:-1] == mine[:, 0, 3].tolist()
        assert bounds == sorted(set(bounds))
        assert not any(bound % (1 << int(mine[0, 0, 6])) for bound in bounds[:-1])
        starts = 128 * mine[:, 0, 3, None] + np.arange(0, 128, 16)
        table = np.asarray(state["tables"])[slot]
        np.testing.assert_array_equal(mine[:, :, 7], table[starts // 64])
        np.testing.assert_array_equal(mine[:, :, 8], table[np.minimum(starts // 64 + 2, len(table) - 1)])
        assert (mine[:, :, 9] == table[position // 64]).all()
    np.testing.assert_array_equal(plans[:, 0, 10] > 0, np.arange(len(plans)) + blocks < len(busy))


def test_fewer_rows_a_block_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    state = decode_arrays(WIDE, 13, (250, 251, 252, 253, 254, 255, 256), 64)
    wanted = prefill(state, WIDE, state["qkv"], 2, 250, 7)
    monkeypatch.setattr(attention, "_query_rows", lambda: (64, 1))
    assert same(prefill(state, WIDE, state["qkv"], 2, 250, 7)[:2], wanted[:2])


def test_slots_beyond_a_warp_are_found() -> None:
    state = decode_arrays(NARROW, 15, (40, 300), 64)
    wanted = decode(state, NARROW)
    many = {
        "tables": jnp.pad(state["tables"], ((40, 0), (0, 0))),
        "positions": jnp.pad(state["positions"], (40, 0)),
    }
    assert same(decode(state, NARROW, **many, active=state["active"] + 40), wanted)

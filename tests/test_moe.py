"""Experts by hand and against dense float64, and the bits of a row in any batch."""

from __future__ import annotations

from math import log, prod

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from jaxmoe import layers
from jaxmoe.config import ModelConfig
from jaxmoe.layers import ROW_TILE, StackedWeight
from jaxmoe.moe import MoE, group_by_expert, route, swiglu
from jaxmoe.quants import Layout, pack
from tools.synth_gguf import random_blocks

LAYOUTS: tuple[Layout, ...] = ("rows", "columns")
ROLES = ("router", "gate", "up", "down")


def config_of(d_model: int, width: int, num_experts: int, experts_per_token: int) -> ModelConfig:
    return ModelConfig(
        num_layers=2, d_model=d_model, num_heads=1, num_kv_heads=1, head_dim=2, num_experts=num_experts,
        experts_per_token=experts_per_token, expert_width=width, vocab_size=4, context_length=8,
        norm_eps=1e-6, rope_base=1e4, rope_scaling=None, name="small",
    )  # fmt: skip


class Experts:
    """A MoE of two layers and the float64 values of its second, which is the one that is called."""

    def __init__(self, config: ModelConfig, weights: dict[str, tuple[GGMLType, np.ndarray]], layout: Layout):
        self.config = config
        self.values: dict[str, np.ndarray] = {}
        stacks = {}
        for role, (ggml_type, raw) in weights.items():
            block, size = gguf.GGML_QUANT_SIZES[ggml_type]
            shape = (2, *raw.shape[:-1], raw.shape[-1] // size * block)
            both = np.concatenate([raw[::-1], raw]).reshape(-1)  # the first layer's are other weights
            stacks[role] = StackedWeight(
                [pack(ggml_type, both, shape, layout).map(jnp.asarray)], [(0, 0), (0, 1)]
            )
            self.values[role] = gguf.quants.dequantize(raw, ggml_type).reshape(shape[1:]).astype(np.float64)
        moe = MoE(config, stacks)
        self._run = jax.jit(lambda x, num_rows: moe(x, num_rows, jnp.int32(1)))

    def __call__(self, x: np.ndarray, num_rows: int | None = None) -> np.ndarray:
        """Rows padded to whole tiles, and cut again."""
        missing = -len(x) % ROW_TILE
        padded = np.pad(x, ((0, missing), (0, 0)))
        count = len(x) if num_rows is None else num_rows
        return np.asarray(self._run(jnp.asarray(padded), jnp.int32(count)))[: len(x)]

    def dense(self, x: np.ndarray) -> np.ndarray:
        """Every expert for every row, in float64; a row's weights are 0 for the experts not chosen."""
        wide = x.astype(np.float64)
        logits = wide @ self.values["router"].T
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        num_left_out = logits.shape[-1] - self.config.experts_per_token
        np.put_along_axis(shares, np.argsort(logits, axis=-1)[:, :num_left_out], 0, axis=-1)
        shares /= shares.sum(axis=-1, keepdims=True)
        gate = np.einsum("md,efd->mef", wide, self.values["gate"])
        up = np.einsum("md,efd->mef", wide, self.values["up"])
        hidden = gate / (1 + np.exp(-gate)) * up
        return np.einsum("me,mef,edf->md", shares, hidden, self.values["down"])


def random_experts(kinds: dict[str, GGMLType], layout: Layout, width: int = 256) -> Experts:
    config = config_of(256, width, num_experts=8, experts_per_token=3)
    shapes = {"router": (8, 256), "gate": (8, width, 256), "up": (8, width, 256), "down": (8, 256, width)}
    rng = np.random.default_rng(0)
    weights = {}
    for role, shape in shapes.items():
        kind = kinds.get(role, GGMLType.F32)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        std = np.full(prod(shape) // block, 1 / 16 if role != "router" else 1 / 8, np.float32)
        raw = np.ascontiguousarray(random_blocks(rng, kind, std)).reshape(*shape[:-1], -1)
        weights[role] = (kind, raw)
    return Experts(config, weights, layout)


def rows(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 256)).astype(np.float32)


MIXED = {"gate": GGMLType.Q4_K, "up": GGMLType.Q4_K, "down": GGMLType.Q6_K}
UNLIKE = {"gate": GGMLType.Q4_K, "up": GGMLType.Q8_0, "down": GGMLType.F16}


def by_hand(layout: Layout) -> Experts:
    """D = F = 2, three experts, two a token; expert e's gate is 40 x the input: silu(40 n) is 40 n."""

    def numbers(values: list[object]) -> tuple[GGMLType, np.ndarray]:
        return GGMLType.F32, np.array(values, np.float32).view(np.uint8)

    identity = [[1, 0], [0, 1]]
    weights = {
        # for (1, 0): e^0, e^log 3, e^-5; for (0, 1): e^0, e^-5, e^0
        "router": numbers([[0, 0], [log(3), -5], [-5, 0]]),
        "gate": numbers([[[40, 0], [0, 40]]] * 3),
        "up": numbers([identity, [[2, 0], [0, 2]], [[0, 1], [1, 1]]]),
        "down": numbers([identity, [[1, 5], [0, 1]], [[1, 0], [0, -1]]]),
    }
    return Experts(config_of(2, 2, num_experts=3, experts_per_token=2), weights, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_by_hand(layout: Layout) -> None:
    x = np.array([[1, 0], [0, 1], [2, 0]], np.float32)
    expected: list[list[float]] = [
        # gate (40, 0). Expert 0: up (1, 0), down (40, 0); expert 1: up (2, 0), hidden (80, 0), down (80, 0)
        [40 / 4 + 80 * 3 / 4, 0],
        # gate (0, 40). Expert 0: (0, 40); expert 2: up (1, 1), hidden (0, 40), down (0, -40); equal shares
        [0, 0],
        # logits 0 and log 9; four times what x = (1, 0) gives each expert
        [160 / 10 + 320 * 9 / 10, 0],
    ]
    experts = by_hand(layout)
    np.testing.assert_allclose(experts(x), expected, rtol=1e-6, atol=1e-4)
    for i in range(3):  # with an expert that no row chooses
        np.testing.assert_allclose(experts(x[i : i + 1]), expected[i : i + 1], rtol=1e-6, atol=1e-4)


def test_experts_by_hand_are_the_dense_form_s() -> None:
    x = np.array([[1, 0], [0, 1], [2, 0], [0.3, -0.2]], np.float32)
    experts = by_hand("rows")
    np.testing.assert_allclose(experts(x), experts.dense(x), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", [{}, MIXED, UNLIKE], ids=["F32", "mixed", "unlike"])
def test_grouped_experts_are_every_expert_s_weighted_sum(kinds: dict[str, GGMLType], layout: Layout) -> None:
    experts, x = random_experts(kinds, layout), rows(32)
    truth = experts.dense(x)
    np.testing.assert_allclose(experts(x), truth, rtol=0, atol=3e-6 * np.abs(truth).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_column_tile_may_lie_over_the_one_before(
    monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    monkeypatch.setattr(layers, "COLUMN_TILES", {jax.default_backend(): 96})
    experts, x = random_experts(MIXED, layout), rows(8)
    truth = experts.dense(x)
    np.testing.assert_allclose(experts(x), truth, rtol=0, atol=3e-6 * np.abs(truth).max())


@pytest.mark.parametrize("kinds", [{}, MIXED], ids=["F32", "mixed"])
def test_a_row_has_the_same_bits_in_batches_of_1_4_and_32(kinds: dict[str, GGMLType]) -> None:
    experts, x = random_experts(kinds, "columns"), rows(32)
    together = experts(x)
    np.testing.assert_array_equal(experts(x[7:11]), together[7:11])
    np.testing.assert_array_equal(experts(x[::-1]), together[::-1])
    for i in (0, 5, 31):
        np.testing.assert_array_equal(experts(x[i : i + 1]), together[i : i + 1])


def test_rows_that_all_choose_the_same_experts_share_them() -> None:
    experts = random_experts(MIXED, "columns")
    x = np.repeat(rows(1), 40, axis=0)
    np.testing.assert_array_equal(experts(x), np.repeat(experts(x[:1]), 40, axis=0))


@pytest.mark.parametrize("garbage", [1.0, np.nan, np.inf])
def test_padded_rows_have_no_effect(garbage: float) -> None:
    experts, x = random_experts(MIXED, "columns"), rows(24)
    expected = experts(x[:3])
    x[3:] = garbage
    np.testing.assert_array_equal(experts(x, num_rows=3)[:3], expected)


def test_no_rows_at_all_do_no_harm() -> None:
    assert np.isfinite(random_experts({}, "columns")(rows(8), num_rows=0)).all()


def test_routing_takes_the_largest_and_shares_out_one() -> None:
    ids, weights = route(jnp.log(jnp.array([[1.0, 6, 3, 2], [5, 1, 1, 10]])), 2)
    assert ids.tolist() == [[1, 2], [3, 0]]
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [2 / 3, 1 / 3]], rtol=1e-6)


def test_the_lower_expert_wins_a_tie() -> None:
    ids, weights = route(jnp.array([[0.0, 2, 1, 2, 2], [1, 1, 1, 1, 1]]), 2)
    assert ids.tolist() == [[1, 3], [0, 1]]
    np.testing.assert_array_equal(weights, 0.5)


def test_routing_survives_large_logits() -> None:
    ids, weights = route(jnp.array([[1e4, -1e4, 9999.0, 0]]), 2)
    assert ids.tolist() == [[0, 2]]
    np.testing.assert_allclose(weights, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)]], rtol=1e-6)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 16])
@pytest.mark.parametrize("num_experts", [4, 100])
def test_every_pair_has_one_place_in_a_tile_of_its_expert(num_rows: int, num_experts: int) -> None:
    ids = np.random.default_rng(num_rows).permuted(np.tile(np.arange(num_experts), (16, 1)), axis=1)[:, :3]
    groups = group_by_expert(jnp.asarray(ids.astype(np.int32)), jnp.int32(num_rows), num_experts)
    used = np.unique(ids[:num_rows])
    count = int(groups.num_experts)
    assert groups.experts[:count].tolist() == used.tolist()
    places = np.asarray(groups.places)[:num_rows]
    assert len(np.unique(places)) == places.size
    held = np.asarray(groups.rows)
    np.testing.assert_array_equal(held[places], np.tile(np.arange(num_rows)[:, None], (1, 3)))
    assert np.count_nonzero(held < 16) == places.size
    assert len(held) % ROW_TILE == 0
    owner = np.full(len(held) // ROW_TILE, -1)
    for expert, first, tiles in zip(
        used, np.asarray(groups.first_tiles), np.asarray(groups.num_tiles), strict=False
    ):
        assert (owner[first : first + tiles] == -1).all()
        owner[first : first + tiles] = expert
    np.testing.assert_array_equal(owner[places // ROW_TILE], ids[:num_rows])


def test_swiglu_by_hand() -> None:
    out = swiglu(jnp.array([0.0, 1, -1, 40]), jnp.array([5.0, 2, 2, 3]))
    np.testing.assert_allclose(out, [0, 2 / (1 + np.exp(-1)), -2 / (1 + np.e), 120], rtol=1e-6)

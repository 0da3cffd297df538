"""A layer of one row in one launch, run by the emulator: the bits of the kernels that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as G
from kernel_config import small_config
from test_kernel_matmul import assert_close, assert_same_bits, random, random_weight

from jaxmoe.kernels import layer, matmul, ptx, router
from jaxmoe.kernels.layer import LayerWeights, Placed
from jaxmoe.kernels.matmul import Row
from jaxmoe.kernels.rounding import round_rows
from jaxmoe.quants import empty

pytestmark = pytest.mark.usefixtures("emulated")

CONFIG = replace(small_config(), num_layers=67)
LAYERS = (0, 66)  # that lie in the stacks; of q, k and v those after them
COUNT = jnp.ones(1, jnp.int32)


class Kinds(NamedTuple):
    output: G = G.Q4_K
    gate: G = G.Q4_K
    up: G = G.Q4_K
    down: G = G.Q4_K
    q: G = G.Q4_K
    k: G = G.Q4_K
    v: G = G.Q4_K


MIXTURE = Kinds(down=G.Q6_K, v=G.Q6_K)
OTHERS = Kinds(G.IQ4_XS, G.Q5_K, G.Q3_K, G.Q8_0, G.Q4_1, G.MXFP4, G.MXFP4)


def make_weights(config, kinds):
    """Random weights of two layers; norms and router of all."""
    mixed, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide = (config.num_experts, config.expert_width, config.d_model)
    narrow = (config.num_experts, config.d_model, config.expert_width)
    shapes = ((config.d_model, mixed), wide, wide, narrow, *((n, config.d_model) for n in (mixed, kv, kv)))
    stacks = [random_weight(i, kinds[i], len(LAYERS), *shapes[i]) for i in range(7)]
    output, gate, up, down = (Placed(stack, LAYERS) for stack in stacks[:4])
    q, k, v = (Placed(stack, tuple(i + 1 for i in LAYERS)) for stack in stacks[4:])
    all_layers = tuple(range(config.num_layers))
    matrix = random(20, config.num_layers, config.num_experts, config.d_model) / np.float32(20)
    routing = replace(empty(G.F32, matrix.shape, "rows"), codes=matrix)
    norms, next_norms = (random(21 + i, config.num_layers + 1, config.d_model) for i in range(2))
    return LayerWeights(norms, Placed(routing, all_layers), output, gate, up, down, (next_norms, q, k, v))


def separate(mixed, x, weights, config, at):
    """What `layer.run` gives, by the kernels that it stands for."""
    index, eps = LAYERS.index(at), config.norm_eps
    x = matmul.dense("attn_output", mixed, [weights.output.stack], COUNT, index=index, residual=x)
    counters = jnp.zeros(router.NUM_COUNTERS, jnp.int32)
    ids, shares, _ = router.route(
        x, weights.norms, weights.router.stack.codes, COUNT, counters, config=config, layer=at, index=at
    )
    row = Row(x, weights.norms, at, eps)
    hidden = matmul.gate_up_of_row(row, weights.gate.stack, weights.up.stack, ids, index=index)
    x = matmul.down_of_row(hidden, weights.down.stack, ids, shares, x, index=index)
    norms, *qkv = weights.following
    stacks = [placed.stack for placed in qkv]
    return x, matmul.dense("qkv", Row(x, norms, at + 1, eps), stacks, COUNT, index=index)


def inputs(config, seed=0):
    mixed = random(30 + seed, 1, config.num_heads * config.head_dim)
    return round_rows(mixed), random(40 + seed, 1, config.d_model)


def use_blocks(monkeypatch, number):
    monkeypatch.setattr(matmul, "_num_multiprocessors", lambda: number)


def check(monkeypatch, config=CONFIG, kinds=MIXTURE, *, blocks=12, at=66, turns=1):
    """So many launches with other inputs each, one after the other."""
    use_blocks(monkeypatch, blocks)
    weights, exchange = make_weights(config, kinds), layer.new_exchange(config)
    assert layer.is_supported(weights, config)
    for turn in range(turns):
        mixed, x = inputs(config, turn)
        expected, expected_qkv = separate(mixed, x, weights, config, at)
        found, qkv, exchange = layer.run(mixed, x, exchange, weights, config=config, layer=at, turn=turn)
        assert_same_bits(found, expected)
        assert_same_bits(qkv, expected_qkv)


def test_no_launch_sees_the_numbers_of_another(monkeypatch):
    check(monkeypatch, turns=4)


@pytest.mark.parametrize("number", [np.uint32(0xFFFFFFFF).view(np.float32), np.inf, 0.0])
def test_a_row_that_nobody_wrote_ends_too(number, monkeypatch):
    """A launch that warms a step up runs on whatever lies there, and its blocks wait for each other."""
    use_blocks(monkeypatch, 12)
    weights, (mixed, x) = make_weights(CONFIG, MIXTURE), inputs(CONFIG)
    mixed, x = mixed._replace(scales=jnp.full_like(mixed.scales, number)), jnp.full_like(x, number)
    exchange = layer.new_exchange(CONFIG)
    found, *_ = layer.run(mixed, x, exchange, weights, config=CONFIG, layer=66, turn=0)
    assert found.shape == x.shape


def test_experts_that_do_not_fit_beside_gate_and_up_come_later(monkeypatch):
    monkeypatch.setattr(layer, "_early", lambda *_: (1, 200 << 10))
    check(monkeypatch, blocks=9, at=0)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        # two words of logits a lane, hidden numbers in two turns
        (replace(CONFIG, num_experts=130, experts_per_token=13), MIXTURE),
        # two turns of a row, an odd number of segments
        (replace(CONFIG, d_model=3328, num_experts=8, experts_per_token=2), OTHERS),
    ],
    ids=["experts", "row"],
)
def test_other_shapes(config, kinds, monkeypatch):
    check(monkeypatch, config, kinds, blocks=40)


def test_early_experts_are_as_many_as_fit(monkeypatch):
    use_blocks(monkeypatch, 12)
    weights, found = layer._absent(CONFIG, G.Q4_K, G.Q4_K), []
    for limit in range(40 << 10, 80 << 10, 2048):
        monkeypatch.setattr(matmul, "_shared_limit", lambda limit=limit: limit)
        share = layer._share(weights, CONFIG)
        if share is not None:
            assert share.shared_size < limit
            found.append(share.defines["EARLY"])
    assert found == sorted(found)
    assert set(found) == {0, 1, 2, 3}


@pytest.mark.parametrize("alike", [2, 5])
def test_of_experts_with_the_same_logit_the_lower_id_is_chosen(alike, monkeypatch):
    """In one lane, which has four of them, and in several."""
    use_blocks(monkeypatch, 12)
    weights = make_weights(CONFIG, MIXTURE)
    stack, layers = weights.router
    codes = stack.codes[:, jnp.arange(CONFIG.num_experts) // alike]
    weights = replace(weights, router=Placed(replace(stack, codes=codes), layers))
    mixed, x = inputs(CONFIG)
    expected, _ = separate(mixed, x, weights, CONFIG, 0)
    found, *_ = layer.run(mixed, x, layer.new_exchange(CONFIG), weights, config=CONFIG, layer=0, turn=0)
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    "config", [replace(CONFIG, vocab_size=1003, num_heads=5), replace(CONFIG, d_model=384)]
)
def test_what_cannot_be_read_is_left_out(config):
    assert not list(layer.variants(config))
    assert not list(layer.comparisons(config, 3))


def test_comparisons_hold(monkeypatch):
    use_blocks(monkeypatch, 12)
    found = list(layer.comparisons(CONFIG, 3))
    assert [one.name for one in found] == [
        "layer, Q4_K, then Q4_K",
        "layer, Q6_K, then Q6_K",
        "layer, Q6_K, the last",
    ]
    for one in found[2:]:  # all of them: device_check
        results, expected = one.kernel(*one.arrays), jax.jit(one.twin)(*one.arrays)
        for result, twin in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            assert_close(result, twin, 1e-3)


def test_variants_are_what_the_comparisons_launch(monkeypatch):
    asked = []

    def noted(file, name, defines, arrays, outputs, *, shared_size, **_):
        asked.append((file, name, defines, shared_size))
        return tuple(jnp.zeros(output.shape, output.dtype) for output in outputs)

    monkeypatch.setattr(ptx, "launch", noted)
    use_blocks(monkeypatch, 12)
    for one in layer.comparisons(CONFIG, 3):
        one.kernel(*one.arrays)
    assert asked == list(layer.variants(CONFIG))


def real_config():
    heads = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 128}
    experts = {"num_experts": 128, "experts_per_token": 8, "expert_width": 768}
    return replace(CONFIG, num_layers=48, d_model=2048, **heads, **experts)


def test_the_cut_of_a_real_model(monkeypatch):
    use_blocks(monkeypatch, 132)
    cuts = [layer._share(layer._absent(real_config(), *kinds), real_config()) for kinds in layer._KINDS]
    names = ("ROWS", "BLOCK_EXPERTS", "PAIR_CHUNKS", "PAIR_ROWS", "EXPERT_BLOCKS", "EARLY")
    found = [[*(cut.defines[name] for name in names), cut.defines.get("NEXT_ROWS"), cut.grid] for cut in cuts]
    assert found == [
        [16, 1, 2, 24, 16, 8, 40, 129],
        [16, 1, 2, 24, 16, 6, 40, 129],
        [16, 1, 2, 24, 16, 6, None, 128],
    ]


def test_what_one_launch_cannot_do(monkeypatch):
    """Too little shared memory, too few blocks, formats without a kernel of one row."""
    config = real_config()
    weights = layer._absent(config, G.Q6_K, G.Q6_K)
    use_blocks(monkeypatch, 132)
    assert layer.is_supported(weights, config)
    for stack in (
        empty(G.F16, weights.gate.stack.shape, "rows", new=jax.ShapeDtypeStruct),
        weights.router.stack,
    ):
        assert not layer.is_supported(replace(weights, gate=Placed(stack, (0, 1))), config)
    router16 = replace(
        weights.router.stack, codes=jax.ShapeDtypeStruct(weights.router.stack.shape, jnp.bfloat16)
    )
    assert not layer.is_supported(replace(weights, router=Placed(router16, (0, 1))), config)
    for limit in (163 << 10, 99 << 10):
        with monkeypatch.context() as patch:
            patch.setattr(matmul, "_shared_limit", lambda limit=limit: limit)
            assert not layer.is_supported(weights, config)
    for blocks in (6, 8):  # fewer than experts; than shares of q, k and v
        use_blocks(monkeypatch, blocks)
        assert not layer.is_supported(weights, config)

"""All layers of one row in one launch, run by the emulator: the bits of the kernels that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as G
from kernel_config import small_config
from test_kernel_matmul import assert_same_bits, random, random_weight

from jaxmoe.kernels import decode_row, ptx
from jaxmoe.kernels.decode_row import Placed, RowWeights
from jaxmoe.quants import empty

pytestmark = pytest.mark.usefixtures("emulated")

CONFIG = small_config()
PAGE_LENGTH, NUM_SLOTS = 64, 2


class Kinds(NamedTuple):
    output: G = G.Q4_K
    gate: G = G.Q4_K
    up: G = G.Q4_K
    down: tuple[G, ...] = (G.Q4_K, G.Q6_K)
    q: tuple[G, ...] = (G.Q4_K, G.Q4_K)
    k: tuple[G, ...] = (G.Q4_K, G.Q4_K)
    v: tuple[G, ...] = (G.Q4_K, G.Q6_K)


MIXTURE = Kinds()
OTHERS = Kinds(G.IQ4_XS, G.Q5_K, G.Q3_K, (G.Q8_0,), (G.Q4_1, G.Q4_0), (G.MXFP4, G.Q5_0), (G.MXFP4, G.Q6_K))


def make_weights(config, kinds=MIXTURE):
    """Random weights; of two kinds, the layers have one and the other in turn, beginning with the second."""
    layers = range(config.num_layers)
    experts, d_model = config.num_experts, config.d_model
    stacks = {}
    for i, (name, shape) in enumerate(decode_row.shapes_of(config).items()):
        own = getattr(kinds, name)
        own = own if isinstance(own, tuple) else (own,)
        turns = [tuple(layers)[::-1][j :: len(own)][::-1] for j in range(len(own))][::-1]
        stacks[name] = tuple(
            Placed(random_weight(10 * i + j, kind, len(at), *shape), at)
            for j, (kind, at) in enumerate(zip(own, turns, strict=True))
        )
    matrix = random(80, config.num_layers, experts, d_model) / np.float32(20)
    stacks["router"] = (Placed(replace(empty(G.F32, matrix.shape, "rows"), codes=matrix), tuple(layers)),)
    norms, expert_norms = (random(81 + i, config.num_layers, d_model) for i in range(2))
    q_norms, k_norms = (1 + random(83 + i, config.num_layers, config.head_dim) / 10 for i in range(2))
    angles = random(85, config.context_length, config.head_dim // 2) * 3
    return RowWeights(norms, q_norms, k_norms, jnp.cos(angles), jnp.sin(angles), expert_norms, stacks)


def make_cache(config, seed=0):
    """Tables of whole segments in any order of pages, keys and values."""
    rng, per_slot = np.random.default_rng(seed), config.context_length // PAGE_LENGTH
    tables = rng.permutation(NUM_SLOTS * per_slot).reshape(NUM_SLOTS, per_slot)
    shape = (config.num_layers, tables.size, PAGE_LENGTH, config.num_kv_heads, config.head_dim)
    pages = [jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for _ in range(2)]
    return jnp.asarray(tables, jnp.int32), pages


def use_blocks(monkeypatch, number):
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: number)


def use_shared_memory(monkeypatch, kilobytes):
    monkeypatch.setattr(ptx, "shared_limit", lambda: kilobytes << 10)


def both(config, weights, position, *, slot=1, count=1, seed=0, function=decode_row.run, cache=None):
    """x, keys and values of a step."""
    tables, pages = make_cache(config) if cache is None else cache
    where = {
        "active": jnp.asarray([slot], jnp.int32), "tables": tables, "count": jnp.asarray([count], jnp.int32),
        "positions": jnp.full(NUM_SLOTS, 3, jnp.int32).at[slot].set(position),
    }  # fmt: skip
    x = random(40 + seed, 1, config.d_model)
    return function(x, *pages, weights, **where, config=config)


def check(monkeypatch, config=CONFIG, kinds=MIXTURE, *, blocks=12, positions=(0,)):
    use_blocks(monkeypatch, blocks)
    weights = make_weights(config, kinds)
    assert decode_row.is_supported(weights, config)
    for seed, position in enumerate(positions):
        expected = both(config, weights, position, seed=seed, function=decode_row.separate)
        found = both(config, weights, position, seed=seed)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one.astype(jnp.float32), other.astype(jnp.float32))


def test_it_gives_the_bits_of_the_kernels_it_stands_for(monkeypatch):
    """In a first segment, at its edges, in several segments."""
    check(monkeypatch, positions=(0, 1, 127, 128, 300))


def test_older_gpus_give_the_bits_of_theirs(monkeypatch, use_older):
    use_older()
    check(monkeypatch, positions=(128,))


def test_of_many_segments_runs_are_parts(monkeypatch):
    """Blocks with one run and with two, the last one not full; a part of one segment."""
    config = replace(CONFIG, num_layers=2, context_length=4096)
    check(monkeypatch, config, positions=(2049, 4095))


TWO_LAYERS = replace(CONFIG, num_layers=2)
WIDE_HEADS = replace(TWO_LAYERS, num_heads=16, num_kv_heads=1, head_dim=128)
LONG_ROW = replace(TWO_LAYERS, d_model=3328, num_experts=8, experts_per_token=2)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        # two words of logits a lane, hidden numbers in two turns
        (replace(TWO_LAYERS, num_experts=130, experts_per_token=13), MIXTURE),
        # two turns of a row, an odd number of segments
        (LONG_ROW, OTHERS),
        # more than one group of mixed numbers a block, heads of 128 numbers, 16 of a key head
        (WIDE_HEADS, MIXTURE),
    ],
    ids=["experts", "row", "heads"],
)
def test_other_shapes(config, kinds, monkeypatch):
    check(monkeypatch, config, kinds, blocks=40, positions=(200,))


@pytest.mark.parametrize(
    ("config", "kinds", "blocks", "kilobytes", "early"),
    [
        (TWO_LAYERS, MIXTURE, 12, 70, 2),
        # attn_output and a buffer take more than q, k and v, as in real models; segments in all buffers
        (replace(WIDE_HEADS, context_length=8192), MIXTURE, 40, 136, 3),
        # all experts late, gate and up in three chunks
        (LONG_ROW, OTHERS, 28, 161, 0),
    ],
    ids=["small", "heads", "row"],
)
def test_little_shared_memory(config, kinds, blocks, kilobytes, early, monkeypatch):
    """attn_output comes late, in the place of q, k and v, and so may some experts, or all."""
    use_blocks(monkeypatch, blocks)
    use_shared_memory(monkeypatch, kilobytes)
    defines = decode_row._share(make_weights(config, kinds), config).defines
    assert (defines["EARLY"], defines["LATE_OUTPUT"]) == (early, 1)
    check(monkeypatch, config, kinds, blocks=blocks, positions=(300, config.context_length - 1))


# --- What is refused.


def is_supported(config=CONFIG, **stacks):
    """Whether weights of Q4_K, other than `stacks`, are."""
    weights = decode_row.absent(config, (G.Q4_K,))
    return decode_row.is_supported(replace(weights, stacks=weights.stacks | stacks), config)


def placed(kind, shape, *layers):
    """Weights without numbers, one for each group of layers."""
    return tuple(
        Placed(empty(kind, (len(at), *shape), "rows", new=jax.ShapeDtypeStruct), at) for at in layers
    )


ONE, TWO, THREE = ((0, 1, 2),), ((0, 2), (1,)), ((0,), (1,), (2,))


def test_more_stacks_than_it_knows_are_refused(monkeypatch):
    use_blocks(monkeypatch, 12)
    shapes = decode_row.shapes_of(CONFIG) | {"router": (CONFIG.num_experts, CONFIG.d_model)}
    mosts = {"output": 1, "gate": 1, "up": 1, "router": 1, "down": 2, "q k v": 2}
    for names, most in mosts.items():
        kind = G.F32 if names == "router" else G.Q4_K
        for layers in (ONE, TWO, THREE):
            stacks = {name: placed(kind, shapes[name], *layers) for name in names.split()}
            assert is_supported(**stacks) == (len(layers) <= most), names


def test_q_k_and_v_of_other_layers_are_refused(monkeypatch):
    """One of the three is not split, or by other layers, or the same stacks are in another order."""
    use_blocks(monkeypatch, 12)
    shapes = decode_row.shapes_of(CONFIG)
    for name in "qkv":
        for layers, others in ((TWO, ONE), (TWO, ((0,), (1, 2))), (TWO, TWO[::-1]), (ONE, TWO)):
            stacks = {one: placed(G.Q4_K, shapes[one], *layers) for one in "qkv"}
            assert is_supported(**stacks)
            assert not is_supported(**stacks | {name: placed(G.Q4_K, shapes[name], *others)}), name


def test_formats_without_kernels_for_a_row_are_refused(monkeypatch):
    """Floats, scales and minima of 16 numbers, and a router that is not of float32."""
    use_blocks(monkeypatch, 12)
    for name, shape in decode_row.shapes_of(CONFIG).items():
        kinds = {G.IQ4_XS: True, G.F16: False, G.BF16: False, G.Q2_K: False}
        assert {kind: is_supported(**{name: placed(kind, shape, *ONE)}) for kind in kinds} == kinds, name
    router = (CONFIG.num_experts, CONFIG.d_model)
    kinds = {G.F32: True, G.F16: False, G.BF16: False}
    assert {kind: is_supported(router=placed(kind, router, *ONE)) for kind in kinds} == kinds


@pytest.mark.parametrize(
    ("configs", "blocks"),
    [
        # experts of a token
        ([replace(CONFIG, num_experts=16, experts_per_token=n) for n in (4, 5)], (4, 4)),
        # q in two blocks, k and v in one
        ([replace(CONFIG, num_experts=8, experts_per_token=2)] * 2, (4, 3)),
        # experts of a block
        ([replace(CONFIG, num_experts=n) for n in (16, 20)], (4, 4)),
        # the same in two turns of a row
        ([replace(CONFIG, d_model=3328, num_experts=n) for n in (32, 48)], (16, 16)),
        # rows of attn_output and of down
        ([replace(CONFIG, d_model=n, num_experts=16) for n in (1536, 1792)], (4, 4)),
        # rows of q, k and v
        ([replace(CONFIG, num_heads=8, num_kv_heads=4, head_dim=128, num_experts=8)] * 2, (7, 6)),
        # blocks of a key head
        ([replace(CONFIG, num_heads=16, num_kv_heads=n) for n in (8, 16)], (12, 12)),
    ],
    ids=["active", "matrices", "experts", "turns", "rows", "qkv", "heads"],
)
def test_more_work_than_a_block_can_do_is_refused(configs, blocks, monkeypatch):
    use_shared_memory(monkeypatch, 1024)
    found = []
    for one, number in zip(configs, blocks, strict=True):
        use_blocks(monkeypatch, number)
        found.append(is_supported(one))
    assert found == [True, False]


def test_too_little_shared_memory_is_refused(monkeypatch):
    """What is found has place, beside what the kernel has of its own, in no less than it needs."""
    use_blocks(monkeypatch, 12)
    weights = decode_row.absent(CONFIG, (G.Q4_K,))
    sizes = {}
    for kilobytes in range(40, 120):
        use_shared_memory(monkeypatch, kilobytes)
        share = decode_row._share(weights, CONFIG)
        assert (share is not None) == decode_row.is_supported(weights, CONFIG)
        sizes[kilobytes] = share and share.shared_size + decode_row._static_size(CONFIG, share.defines)
    least = min(kilobytes for kilobytes, size in sizes.items() if size)
    assert 40 < least < 119
    assert [bool(size) for size in sizes.values()] == [kilobytes >= least for kilobytes in sizes]
    assert all(size <= kilobytes << 10 for kilobytes, size in sizes.items() if size)


def test_a_gpu_that_does_not_say_its_multiprocessors_is_refused(monkeypatch):
    class Device:
        compute_capability = "9.0"

    use_blocks(monkeypatch, 12)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert not is_supported()
    monkeypatch.setattr(Device, "core_count", 12, raising=False)
    assert is_supported()

"""The router's kernels, run by the emulator: choices, weights, ties, pairs and tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_config import small_config

from jaxmoe.kernels import router
from jaxmoe.kernels.rows import norm_quantise

CONFIG = small_config()
LAYER, INDEX = 2, 1
# one row has a kernel of its own; the others take every cut into blocks, with a rest
NUM_ROWS = (1, 3, 13, 21, 40, 150)
MANY = 100

pytestmark = pytest.mark.usefixtures("emulated", "few_are_many")

f32 = np.float32


@pytest.fixture
def few_are_many(monkeypatch):
    """The kernel for many rows takes no more than the emulator has patience for."""
    monkeypatch.setattr(router, "_MOST_FEW", MANY)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, f32)


def network(config=CONFIG, seed=0):
    norm = random(seed, config.num_layers, config.d_model)
    return norm, random(seed + 1, 2, config.num_experts, config.d_model) * f32(config.d_model**-0.5)


def route(x, norm, w, count=None, config=CONFIG, layer=LAYER, index=INDEX):
    """Ids and weights; the counters must be zero again."""
    count = jnp.asarray([x.shape[0] if count is None else count], jnp.int32)
    arrays = *map(jnp.asarray, (x, norm, w)), count, jnp.zeros(router.NUM_COUNTERS, jnp.int32)
    routed = router.route(*arrays, config=config, layer=layer, index=index)
    assert not np.asarray(routed.counters).any()
    return np.asarray(routed.ids), np.asarray(routed.weights)


@pytest.mark.parametrize(("num_rows", "count"), [(3, 3), (3, 0), (13, 7), (40, 40), (150, 150)])
def test_few_rows_come_with_their_norm_and_zeros(num_rows, count):
    x, (norm, w) = random(9, num_rows, 512), network()
    arrays = *map(jnp.asarray, (x, norm, w)), jnp.asarray([count], jnp.int32)
    counters = jnp.zeros(router.NUM_COUNTERS, jnp.int32)
    routed = router.route(*arrays, counters, config=CONFIG, layer=LAYER, index=INDEX, num_zeros=300)
    if num_rows > MANY:
        assert (routed.inputs, routed.zeros) == (None, None)
        return
    assert routed.zeros.shape == (300,)
    assert not np.asarray(routed.zeros).any()
    expected = norm_quantise(arrays[0], arrays[1], arrays[3], eps=CONFIG.norm_eps, layer=LAYER)
    for one, other in zip(routed.inputs, expected, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        assert set(np.asarray(one[count:]).tobytes()) <= {0xFF}


def test_rows_whose_logits_do_not_fit_the_counters_take_the_kernel_for_many(monkeypatch):
    x, (norm, w) = random(12, 13, 512), network()
    few = route(x, norm, w)
    monkeypatch.setattr(router, "NUM_COUNTERS", 13 * CONFIG.num_experts * 2 - 1)
    assert not router.makes_norms(13, CONFIG)
    assert router.makes_norms(12, CONFIG)
    for one, other in zip(route(x, norm, w), few, strict=True):
        assert one.tobytes() == other.tobytes()


def exact_logits(x, norm, w, layer=LAYER, index=INDEX):
    x = x.astype(np.float64)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * norm[layer]
    return normed @ w[index].T.astype(np.float64)


def softmax_of_all_renormalised(logits, per_token):
    """numpy's own answer in float64: ids by falling logit, ties by rising id, and their weights."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :per_token]
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share = np.take_along_axis(share / share.sum(-1, keepdims=True), ids, -1)
    return ids, share / share.sum(-1, keepdims=True)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_choices_and_weights_are_those_of_the_softmax_of_all(num_rows):
    x, (norm, w) = random(2, num_rows, 512), network()
    ids, weights = route(x, norm, w)
    expected, shares = softmax_of_all_renormalised(exact_logits(x, norm, w), 3)
    assert np.array_equal(ids, expected)
    np.testing.assert_allclose(weights, shares, rtol=3e-6)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_a_row_has_the_same_bits_in_every_kernel(num_rows):
    x, (norm, w) = random(3, 150, 512), network()
    found = route(x[:num_rows], norm, w)
    for t in sorted({0, num_rows // 2, num_rows - 1}):
        alone = route(x[t : t + 1], norm, w)
        for one, other in zip(alone, found, strict=True):
            assert one.tobytes() == other[t : t + 1].tobytes()


@pytest.mark.parametrize("num_rows", [5, 17, MANY + 1])
@pytest.mark.parametrize("width", [256, 2304, 2560])
def test_other_widths(width, num_rows):
    config = small_config(d_model=width)
    x, (norm, w) = random(4, num_rows, width), network(config)
    expected, shares = softmax_of_all_renormalised(exact_logits(x, norm, w), 3)
    ids, weights = route(x, norm, w, config=config)
    alone = route(x[-1:], norm, w, config=config)
    assert np.array_equal(ids, expected)
    np.testing.assert_allclose(weights, shares, rtol=3e-6)
    assert [a.tobytes() for a in alone] == [ids[-1:].tobytes(), weights[-1:].tobytes()]


def test_one_row_is_routed_even_if_it_is_not_real():
    (norm, w) = network()
    for x in (random(5, 1, 512), np.full((1, 512), np.nan, np.float32)):
        ids, _ = route(x, norm, w, 0)
        assert len(set(ids[0].tolist())) == 3
        assert 0 <= ids.min() <= ids.max() < 20


@pytest.mark.parametrize("num_rows", [number for number in NUM_ROWS if number > 1])
def test_rows_past_the_count_are_left_alone(num_rows):
    x, (norm, w) = random(5, num_rows, 512), network()
    count = num_rows // 2
    x[count:] = np.nan
    some, whole = route(x, norm, w, count), route(x, norm, w)
    for one, other in zip(some, whole, strict=True):
        assert one[:count].tobytes() == other[:count].tobytes()
        assert set(one[count:].tobytes()) <= {0xFF}


@pytest.mark.parametrize("num_rows", [1, 3, 20, MANY + 1])
@pytest.mark.parametrize(("num_experts", "per_token"), [(20, 6), (70, 6), (256, 16)])
def test_ties_go_to_the_lower_id(num_rows, num_experts, per_token):
    config = small_config(num_experts=num_experts, experts_per_token=per_token)
    x, (norm, w) = random(6, num_rows, 512), network(config)
    w[:] = w[:, np.arange(num_experts) % 5]
    ids, weights = route(x, norm, w, config=config)
    best = exact_logits(x, norm, w)[:, :5].argsort(-1)[:, ::-1]
    expected = [[e for b in row for e in range(b, num_experts, 5)][:per_token] for row in best]
    assert np.array_equal(ids, expected)
    assert (weights[:, 0] == weights[:, 1]).all()
    chosen = np.take_along_axis(exact_logits(x, norm, w), ids, -1)
    share = np.exp(chosen - chosen.max(-1, keepdims=True))
    np.testing.assert_allclose(weights, share / share.sum(-1, keepdims=True), rtol=3e-6)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_all_experts_equal(num_rows):
    x, (norm, w) = random(7, num_rows, 512), network()
    ids, weights = route(x, norm, 0 * w)
    assert np.array_equal(ids, np.tile([0, 1, 2], (num_rows, 1)))
    assert (weights == f32(1) / f32(3)).all()


def test_layer_and_index_pick_norm_and_weights():
    x, (norm, w) = random(8, 4, 512), network()
    for layer, index in ((0, 0), (1, 1), (2, 0)):
        expected, _ = softmax_of_all_renormalised(exact_logits(x, norm, w, layer, index), 3)
        for rows in (x, x[:1]):
            ids, _ = route(rows, norm, w, layer=layer, index=index)
            assert np.array_equal(ids, expected[: len(rows)])


@pytest.mark.parametrize("num_rows", [1, 3, MANY + 1])
def test_a_row_of_nan_still_gets_different_experts(num_rows):
    norm, w = network()
    ids, _ = route(np.full((num_rows, 512), np.nan, f32), norm, w)
    for row in ids:
        assert set(row) <= set(range(CONFIG.num_experts))
        assert len(set(row)) == 3


def pairs_and_tiles(ids, num_experts, tile):
    """A plain construction: each expert's pairs, and the list of tiles."""
    flat = ids.reshape(-1).tolist()
    pairs = [[p for p, e in enumerate(flat) if e == expert] for expert in range(num_experts)]
    tiles = [
        [expert, first, min(tile, len(mine) - first), 0]
        for expert, mine in enumerate(pairs)
        for first in range(0, len(mine), tile)
    ]
    return pairs, tiles


def group(ids, count, config, tile):
    counters = jnp.zeros(router.NUM_COUNTERS, jnp.int32)
    arrays = jnp.asarray(ids, jnp.int32), jnp.asarray([count], jnp.int32), counters
    found = [np.asarray(a) for a in router.group(*arrays, config=config, tile=tile)]
    assert not found[3].any()
    return found[:3]


def random_ids(seed, num_rows, config):
    order = np.random.default_rng(seed).random((num_rows, config.num_experts)).argsort(1)
    return order[:, : config.experts_per_token]


def check_groups(ids, count, config, tile):
    pairs, tiles, num_tiles = group(ids, count, config, tile)
    expected_pairs, expected_tiles = pairs_and_tiles(ids[:count], config.num_experts, tile)
    assert num_tiles.tolist() == [len(expected_tiles)]
    assert tiles[: len(expected_tiles)].tolist() == expected_tiles
    assert not tiles[len(expected_tiles) :].any()
    for found, expected in zip(pairs, expected_pairs, strict=True):
        assert found[: len(expected)].tolist() == expected
        assert set(found[len(expected) :].tobytes()) <= {0xFF}


@pytest.mark.parametrize("tile", [8, 32, 64])
@pytest.mark.parametrize(("num_rows", "count"), [(1, 1), (33, 33), (33, 10), (600, 501), (5, 0)])
def test_groups_are_those_of_a_plain_construction(num_rows, count, tile):
    check_groups(random_ids(9, num_rows, CONFIG), count, CONFIG, tile)


@pytest.mark.parametrize("tile", [8, 32, 64])
def test_an_expert_with_all_tokens_and_experts_with_none(tile):
    ids = np.tile([19, 0, 7], (130, 1))
    ids[64:, 1:] = [[3, 4]]
    check_groups(ids, 130, CONFIG, tile)
    check_groups(ids, 64, CONFIG, tile)


def test_groups_of_more_pairs_than_one_round_takes():
    config = small_config(num_experts=10, experts_per_token=8)
    check_groups(random_ids(10, 2100, config), 2099, config, 64)


def test_max_tiles_is_enough_for_the_worst_case():
    config = small_config(num_experts=20, experts_per_token=1)
    ids = np.concatenate((np.full(8 * 6 + 1, 19), np.arange(19)))[:, None]
    check_groups(ids, len(ids), config, 8)


def test_the_twins_of_the_comparisons_agree():
    for comparison in router.comparisons(CONFIG, 5):
        found = comparison.kernel(*comparison.arrays)
        twin = jax.jit(comparison.twin)(*comparison.arrays)
        for one, other in zip(found, twin, strict=True):
            if comparison.exact or one.dtype == jnp.int32:
                assert np.array_equal(one, other), comparison.name
            else:
                np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=comparison.name)


def test_variants_have_each_cut_into_blocks(monkeypatch):
    monkeypatch.undo()

    def cut(name, defines):
        return name, *(defines.get(key) for key in ("TILE_E", "TILE_T", "NT"))

    cuts = {cut(name, defines) for _, name, defines, _ in router.variants(CONFIG)}
    for rows in (1, 4, 16, 17, 32, 33, 1024, 1025, 4096):
        name, defines, _, size = router._route_launch(rows, CONFIG.num_layers, CONFIG)
        assert cut(name, defines) in cuts
        assert size <= 99 * 1024


def test_full_tiles_need_no_kernel_of_their_own():
    for one, other in ((8, 16), (48, 64)):
        assert router._route_launch(one, 3, CONFIG)[1] == router._route_launch(other, 3, CONFIG)[1]

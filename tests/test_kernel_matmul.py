"""The products of packed weights, run by the emulator: the same bits for every number of rows, and twins."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as G
from kernel_config import real_config, small_config

from jaxmoe.kernels import experts as few_experts
from jaxmoe.kernels import matmul, packed, ptx, router, rows
from jaxmoe.kernels.rounding import Rounded, round_rows, rounded_values
from jaxmoe.quants import FORMATS, empty, pack, packed_size

EPS = 1e-5
CONFIG = small_config(num_experts=8, experts_per_token=2)
OUTPUTS, INPUTS, EXPERTS, WIDTH, ACTIVE = 192, 512, 8, 256, 2
ROWS = (1, 8, 130)  # a kernel each
GROUPED_ROWS = (1, 17, 70)  # 17 and 70 pairs of an expert are several tiles, one of them of one pair
BUSY = 3  # the expert of all rows; 5 and 7 have none
INDEX = 1  # in stacks of two
# Each type at one number of rows; those that differ most in how they are read at all.
WHOLE = (G.Q4_K, G.Q6_K, G.Q8_0, G.F16)
OTHERS = {
    G.Q4_0: 130, G.Q4_1: 8, G.Q5_0: 1, G.Q5_1: 130, G.Q3_K: 8, G.Q5_K: 1, G.IQ4_NL: 8, G.IQ4_XS: 130,
    G.MXFP4: 1, G.BF16: 130,
}  # fmt: skip
REFUSED = (G.Q2_K, G.F32)

pytestmark = pytest.mark.usefixtures("emulated")

f32 = np.float32


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch):
    """So few blocks that each has several steps of a grouped product, of more than one tile."""
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: 3)


def packed_bytes(rng, ggml_type, shape):
    """The bytes of a file: any bits, but scales of a size that sums keep."""
    blocks = FORMATS[ggml_type]
    if blocks.float_dtype is not None:
        return rng.standard_normal(shape, f32).astype(blocks.float_dtype).view(np.uint8).reshape(-1)
    raw = rng.integers(0, 256, packed_size(ggml_type, shape), np.uint8).reshape(-1, blocks.size)
    start = 0
    for name, size in blocks.fields.items():
        if name in ("d", "d_m"):
            scales = rng.uniform(0.005, 0.01, len(raw)).astype(np.float16)
            raw[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
        if name == "e":
            raw[:, start] = rng.integers(110, 125, len(raw))
        start += size
    return raw.reshape(-1)


def random_weight(seed, ggml_type, *shape):
    raw = packed_bytes(np.random.default_rng(seed), ggml_type, shape)
    return packed.as_read(pack(ggml_type, raw, shape, "rows").map(jnp.asarray))


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, f32))


def count_of(number):
    return jnp.asarray([number], jnp.int32)


def first(inputs, number):
    return Rounded(inputs.codes[:number], inputs.scales[:number])


def attn_output(inputs, w, count=None, residual=None, index=INDEX):
    """The product plus the residual, of zeros if there is none: fewer kernels to compile."""
    num_rows = inputs.codes.shape[0]
    count = count_of(num_rows if count is None else count)
    residual = jnp.zeros((num_rows, w.shape[-2]), f32) if residual is None else residual
    return np.asarray(matmul.dense("attn_output", inputs, [w], count, index=index, residual=residual))


def assert_same_bits(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape
    assert one.tobytes() == other.tobytes()


def assert_close(found, twin, limit=1e-5):
    found, twin = np.asarray(found, np.float64), np.asarray(twin, np.float64)
    assert found.shape == twin.shape
    assert np.linalg.norm(found - twin) <= limit * np.linalg.norm(twin)


def assert_untouched(array):
    assert set(np.asarray(array).tobytes()) <= {0xFF}


# --- Dense products.


def test_each_type_is_in_one_of_the_lists():
    assert {*WHOLE, *OTHERS, *REFUSED} == set(FORMATS)


@pytest.mark.parametrize("ggml_type", WHOLE, ids=lambda t: t.name)
def test_a_row_has_the_same_bits_alone_among_few_and_among_many(ggml_type):
    w, inputs = (
        random_weight(0, ggml_type, 2, OUTPUTS, INPUTS),
        round_rows(random(1, ROWS[-1], INPUTS)),
    )
    twin = matmul.dense_twin(rounded_values(inputs), [w], index=INDEX)
    found = {number: attn_output(first(inputs, number), w) for number in ROWS}
    for number in ROWS:
        assert_close(found[number], twin[:number])
        assert_same_bits(found[number], found[ROWS[-1]][:number])


@pytest.mark.parametrize("ggml_type", OTHERS, ids=lambda t: t.name)
def test_each_other_type_is_multiplied(ggml_type):
    w, inputs = (
        random_weight(2, ggml_type, 2, OUTPUTS, INPUTS),
        round_rows(random(3, ROWS[-1], INPUTS)),
    )
    some = first(inputs, OTHERS[ggml_type])
    assert_close(attn_output(some, w), matmul.dense_twin(rounded_values(some), [w], index=INDEX))


@pytest.mark.parametrize("number", ROWS)
def test_the_residual_is_added_and_rows_past_the_count_are_left_alone(number):
    w, inputs = random_weight(4, G.Q4_K, 2, OUTPUTS, INPUTS), round_rows(random(5, number, INPUTS))
    residual, count = random(6, number, OUTPUTS), number - number // 2
    found = attn_output(inputs, w, count, residual)
    assert_same_bits(found[:count], (residual + attn_output(inputs, w))[:count])
    assert_untouched(found[count:])


@pytest.mark.parametrize("number", ROWS)
def test_three_weights_of_two_formats_stand_side_by_side(number):
    kinds, sizes = (G.Q4_K, G.Q4_K, G.Q6_K), (OUTPUTS, 64, 64)
    weights = [random_weight(7 + i, kinds[i], 2, sizes[i], INPUTS) for i in range(3)]
    inputs = round_rows(random(10, number, INPUTS))
    found = np.asarray(matmul.dense("qkv", inputs, weights, count_of(number), index=INDEX))
    twin = matmul.dense_twin(rounded_values(inputs), weights, index=INDEX)
    for start, end in ((0, 192), (192, 256), (256, 320)):
        assert_close(found[:, start:end], twin[:, start:end])


def test_the_index_picks_the_matrix():
    w, inputs = random_weight(11, G.Q4_K, 2, OUTPUTS, INPUTS), round_rows(random(12, 8, INPUTS))
    for index in range(2):
        twin = matmul.dense_twin(rounded_values(inputs), [w], index=index)
        assert_close(attn_output(inputs, w, index=index), twin)


@pytest.mark.parametrize(("name", "number"), [("qkv", 3), ("lm_head", 1)])
def test_a_row_before_its_norm_has_the_bits_of_norm_and_product(name, number):
    x, norm = random(13, 1, INPUTS), random(14, 3, INPUTS)
    weights = [random_weight(15 + i, G.Q4_K, 2, 64, INPUTS) for i in range(number)]
    for layer in range(3):
        rounded = Rounded(*rows.norm_quantise(x, norm, count_of(1), eps=EPS, layer=layer))
        row = matmul.Row(x, norm, layer, EPS)
        one, other = (
            matmul.dense(name, inputs, weights, count_of(1), index=INDEX) for inputs in (row, rounded)
        )
        assert_same_bits(one, other)


@cache
def eight_at_a_time(ggml_type):
    """A weight, 64 rows of inputs, and their product by blocks of one tile of columns."""
    w, inputs = random_weight(40, ggml_type, 2, 208, INPUTS), round_rows(random(41, 64, INPUTS))
    parts = [Rounded(inputs.codes[i : i + 8], inputs.scales[i : i + 8]) for i in range(0, 64, 8)]
    return w, inputs, np.concatenate([attn_output(part, w) for part in parts])


@pytest.mark.parametrize(
    ("ggml_type", "num_blocks", "number"),
    [(G.Q4_K, 5, 17), (G.Q4_K, 1, 64), (G.Q6_K, 1, 33), (G.Q8_0, 5, 64), (G.F16, 1, 17)],
)
def test_blocks_of_several_tiles_give_the_same_bits(ggml_type, num_blocks, number, monkeypatch):
    w, inputs, expected = eight_at_a_time(ggml_type)
    count = number - number // 3
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: num_blocks)
    defines = matmul._dense_launch("attn_output", first(inputs, number), [w], has_residual=True).defines
    assert defines["ROW_TILES"] * defines["COLUMN_TILES"] > 1
    found = attn_output(first(inputs, number), w, count)
    assert_same_bits(found[:count], expected[:count])
    assert_untouched(found[count:])


@pytest.mark.parametrize(
    ("number", "warps", "last", "tiles"),
    [
        (16, 24, G.Q6_K, (3, 2)),
        (16, 24, G.Q6_K, (3, 2, 1, 2)),  # nine blocks, and one more, which does the last one's work too
        (60, 3, G.Q6_K, (5, 8)),  # more units of work than warps: they take turns
        (60, 24, G.Q6_K, (5, 4, 1, 2)),  # two blocks share inputs
        (60, 24, G.Q6_K, (5, 4, 2, 1)),  # or the segments
        (60, 24, G.Q4_K, (5, 8, 2, 1)),
    ],
)
def test_three_weights_in_blocks_of_any_shape_give_the_same_bits(number, warps, last, tiles, monkeypatch):
    kinds, sizes = (G.Q4_K, G.Q4_K, last), (208, 96, 80)
    weights = [random_weight(44 + i, kinds[i], 2, sizes[i], INPUTS) for i in range(3)]
    inputs = round_rows(random(47, number, INPUTS))
    monkeypatch.setattr(matmul, "_DENSE_WARPS", warps)
    monkeypatch.setattr(matmul, "_few_blocks", lambda *_: [matmul._Tiles(*tiles)])
    found = np.asarray(matmul.dense("qkv", inputs, weights, count_of(number), index=INDEX))
    monkeypatch.setattr(matmul, "_few_blocks", lambda *_: [matmul._Tiles(1, 1)])
    for i in (0, number - 8):
        part = Rounded(inputs.codes[i : i + 8], inputs.scales[i : i + 8])
        expected = matmul.dense("qkv", part, weights, count_of(8), index=INDEX)
        assert_same_bits(found[i : i + 8], expected)


def test_without_clusters_blocks_share_nothing(monkeypatch):
    weights = packed.absent_weights([G.Q4_K], [(48, 2048, 4096)])
    for limit, sharing in ((99 << 10, 1), (163 << 10, 1), (227 << 10, 2)):
        monkeypatch.setattr(ptx, "shared_limit", lambda limit=limit: limit)
        blocks = matmul._few_blocks(64, weights)
        assert max(one.parts * one.peers for one in blocks) == sharing


@pytest.mark.parametrize("number", [8, 60])
def test_older_gpus_give_the_same_bits(number, use_older):
    w, inputs, expected = eight_at_a_time(G.Q4_K)
    use_older()
    assert_same_bits(attn_output(first(inputs, number), w), expected[:number])


def test_a_block_leaves_room_for_the_launch_number(monkeypatch):
    monkeypatch.setattr(ptx, "shared_limit", lambda: 232448)
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: 114)
    weights = packed.absent_weights([G.Q4_K], [(48, 2048, 4096)])
    launch = matmul._dense_launch("out", matmul._absent_rounded(32, 4096), weights, has_residual=True)
    assert launch.shared_size + 48 + matmul.STATIC_SIZE <= 232448


@pytest.mark.parametrize(("ggml_type", "number"), [(G.Q4_K, 64), (G.Q6_K, 17), (G.Q8_0, 5), (G.MXFP4, 33)])
def test_very_many_outputs_give_the_same_bits(ggml_type, number, monkeypatch):
    w, inputs, expected = eight_at_a_time(ggml_type)
    count = number - number // 3
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: 1)  # so that a warp has two groups of rows
    monkeypatch.setattr(matmul, "_MANY_OUTPUTS", 64)
    assert "STREAM" in matmul._dense_launch("lm_head", first(inputs, number), [w]).defines
    found = matmul.dense("lm_head", first(inputs, number), [w], count_of(count), index=INDEX)
    assert_same_bits(found[:count], expected[:count])
    assert_untouched(found[count:])


def test_wide_and_narrow_blocks_give_the_same_bits(monkeypatch):
    w, inputs = random_weight(18, G.Q4_K, 2, OUTPUTS, INPUTS), round_rows(random(19, 128, INPUTS))
    assert matmul._many_columns(2, 128) == 32
    narrow = attn_output(inputs, w)
    monkeypatch.setattr(matmul, "_MANY_BLOCKS", 1)
    assert matmul._many_columns(2, 128) == 64
    assert_same_bits(attn_output(inputs, w), narrow)


def test_outputs_that_fill_no_block_of_64():
    w, inputs = random_weight(20, G.Q4_K, 2, 80, INPUTS), round_rows(random(21, 70, INPUTS))
    twin = matmul.dense_twin(rounded_values(inputs), [w], index=INDEX)
    assert_close(attn_output(inputs, w), twin)


@pytest.mark.parametrize(
    ("ggml_type", "shape", "expected"),
    [
        *((ggml_type, (16, 256), True) for ggml_type in (*WHOLE, *OTHERS)),
        *((ggml_type, (16, 256), False) for ggml_type in REFUSED),
        (G.Q4_K, (2, 3, 32, 512), True),
        (G.Q8_0, (16, 288), False),
        (G.F16, (16, 128), False),
        (G.Q4_K, (24, 256), False),
        (G.Q4_K, (1003, 256), False),
    ],
)
def test_what_the_kernels_can_read(ggml_type, shape, expected):
    assert packed.is_supported(empty(ggml_type, shape, "rows")) is expected


@pytest.mark.parametrize(
    ("ggml_type", "shape", "expected"),
    [
        (G.Q4_K, (2, 3, 32, 512), True),
        (G.Q6_K, (2, 3, 32, 512), True),
        (G.Q4_K, (2, 32, 512), False),
        (G.F16, (2, 3, 32, 512), False),
        (G.Q4_K, (2, 3, 24, 512), False),
    ],
)
def test_codes_of_experts_alone_are_read_swapped(ggml_type, shape, expected):
    w = empty(ggml_type, shape, "rows")
    assert packed.reads_swapped(w) is expected
    packed.pointers(replace(w, swapped=expected))
    with pytest.raises(AssertionError, match="swapped"):
        packed.pointers(replace(w, swapped=not expected))


def test_other_layouts_are_refused():
    assert not packed.is_supported(empty(G.Q4_K, (256, 256), "columns"))


# --- Grouped products: gate, up and down of experts, of two formats.


@cache
def experts():
    gate = random_weight(30, G.Q4_K, 2, EXPERTS, WIDTH, INPUTS)
    up = random_weight(31, G.Q6_K, 2, EXPERTS, WIDTH, INPUTS)
    return gate, up, random_weight(32, G.Q6_K, 2, EXPERTS, INPUTS, WIDTH)


@cache
def chosen():
    """x, norm, ids and weights of the most rows: one expert in all of them, two in none."""
    rng = np.random.default_rng(33)
    number = GROUPED_ROWS[-1]
    other = rng.choice([0, 1, 2, 4, 6], number)
    ids = np.where(
        rng.random(number)[:, None] < 0.5, np.c_[[BUSY] * number, other], np.c_[other, [BUSY] * number]
    )
    weights = jnp.asarray(rng.random((number, ACTIVE), f32))
    return random(34, number, INPUTS), random(35, 2, INPUTS), jnp.asarray(ids, jnp.int32), weights


def rounded_rows(number, count):
    x, norm, _, _ = chosen()
    codes, scales = rows.norm_quantise(x[:number], norm, count_of(count), eps=EPS, layer=1)
    return Rounded(codes, scales)


def grouped(number, count):
    """gate_up and down of the first `count` of `number` rows."""
    gate, up, down = experts()
    ids, inputs = chosen()[2][:number], rounded_rows(number, count)
    if few_experts.takes(number):
        progress = jnp.zeros(few_experts.num_progress(number, CONFIG), jnp.int32)
        places = {"index": INDEX, "down_index": INDEX}
        weights = gate, up, down
        return few_experts.run(inputs, ids, count_of(count), progress, weights, config=CONFIG, **places)
    counters, tile = jnp.zeros(router.NUM_COUNTERS, jnp.int32), matmul.tile_length(number)
    groups = matmul.Groups(*router.group(ids, count_of(count), counters, config=CONFIG, tile=tile)[:3])
    hidden = matmul.gate_up(inputs, gate, up, groups, experts_per_token=ACTIVE, index=INDEX)
    return hidden, matmul.down(hidden, down, groups, num_rows=number, index=INDEX)


@cache
def whole(number):
    return grouped(number, number)


def single(t):
    """gate_up and down of row t alone."""
    (x, norm, ids, weights), (gate, up, down) = chosen(), experts()
    here = slice(t, t + 1)
    hidden = matmul.gate_up_of_row(matmul.Row(x[here], norm, 1, EPS), gate, up, ids[here], index=INDEX)
    return hidden, matmul.down_of_row(hidden, down, ids[here], weights[here], x[here], index=INDEX)


def combined(number):
    x, norm, _, weights = chosen()
    y = whole(number)[1]
    return rows.combine(x[:number], y, weights[:number], norm, count_of(number), eps=EPS, layer=0)[0]


def test_some_tiles_are_of_one_expert_and_some_experts_have_none():
    _, counts = np.unique(np.asarray(chosen()[2][:17]), return_counts=True)
    assert counts.max() == 17 == 2 * matmul.tile_length(17) + 1
    assert len(counts) < EXPERTS
    assert matmul.tile_length(GROUPED_ROWS[-1]) == 64 < GROUPED_ROWS[-1]


@pytest.mark.parametrize("number", GROUPED_ROWS[1:])
def test_gate_up_is_its_twin_rounded(number):
    gate, up, _ = experts()
    inputs = rounded_rows(number, number)
    twin = matmul.gate_up_twin(rounded_values(inputs), gate, up, chosen()[2][:number], index=INDEX)
    found, expected = whole(number)[0], round_rows(twin)
    assert_close(found.scales[..., 0], expected.scales[..., 0])
    steps = np.abs(np.asarray(found.codes, np.int32) - np.asarray(expected.codes, np.int32))
    assert steps.max() <= 1  # a value between two codes may go either way
    assert (steps > 0).mean() < 1e-3
    sums = np.asarray(found.codes, f32).reshape(*found.scales.shape[:2], 32).sum(-1)
    assert_same_bits(found.scales[..., 1], np.asarray(found.scales[..., 0]) * sums)


def test_gate_up_of_a_row_is_its_twin():
    gate, up, _ = experts()
    inputs = rounded_rows(1, 1)
    twin = matmul.gate_up_twin(rounded_values(inputs), gate, up, chosen()[2][:1], index=INDEX)
    assert_close(single(0)[0], twin)


@pytest.mark.parametrize("number", GROUPED_ROWS[1:])
def test_down_is_its_twin(number):
    hidden, y = whole(number)
    ids = chosen()[2][:number]
    assert_close(y, matmul.down_twin(rounded_values(hidden), experts()[2], ids, index=INDEX))


def test_down_of_a_row_is_the_weighted_sum_of_its_twin():
    x, _, ids, weights = chosen()
    hidden, y = single(0)
    values = rounded_values(round_rows(hidden))
    terms = matmul.down_twin(values, experts()[2], ids[:1], index=INDEX)
    assert_close(y - x[:1], jnp.sum(weights[0][:, None] * terms, axis=0)[None])


def test_experts_give_a_row_the_same_bits_alone_among_few_and_among_many():
    few, many = (whole(number) for number in GROUPED_ROWS[1:])
    num_pairs = GROUPED_ROWS[1] * ACTIVE
    assert_same_bits(few[0].codes, many[0].codes[:num_pairs])
    assert_same_bits(few[0].scales, many[0].scales[:num_pairs])
    assert_same_bits(few[1], many[1][:num_pairs])
    sums = combined(GROUPED_ROWS[-1])
    for t in (0, 7, 69):
        hidden, y = single(t)
        alone, here = round_rows(hidden), slice(t * ACTIVE, (t + 1) * ACTIVE)
        assert_same_bits(alone.codes, many[0].codes[here])
        assert_same_bits(alone.scales, many[0].scales[here])
        assert_same_bits(y, sums[t : t + 1])


@pytest.mark.parametrize("number", GROUPED_ROWS[1:])
@pytest.mark.parametrize("count", [0, 11])
def test_pairs_past_the_count_are_left_alone(number, count):
    (hidden, y), (all_hidden, all_y) = grouped(number, count), whole(number)
    for found, expected in ((hidden.codes, all_hidden.codes), (hidden.scales, all_hidden.scales), (y, all_y)):
        assert_same_bits(found[: count * ACTIVE], expected[: count * ACTIVE])
        assert_untouched(found[count * ACTIVE :])


def test_other_numbers_of_blocks_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: 30)
    (hidden, y), (expected, expected_y) = grouped(17, 17), whole(17)
    assert_same_bits(hidden.codes, expected.codes)
    assert_same_bits(hidden.scales, expected.scales)
    assert_same_bits(y, expected_y)


# --- What is compiled and compared elsewhere.


def test_comparisons_hold():
    names = ("qkv, 1 rows, Q4_K Q4_K Q6_K", "gate_up, 1 rows, Q4_K Q4_K", "down, 1 rows, Q6_K")
    found = [comparison for comparison in matmul.comparisons(CONFIG, 3) if comparison.name in names]
    assert [comparison.name for comparison in found] == list(names)
    for comparison in found:
        results = jax.tree.leaves(comparison.kernel(*comparison.arrays))
        for limit, twin in ((1e-3, comparison.twin), (0.015, comparison.float_twin)):
            for one, other in zip(results, jax.tree.leaves(twin(*comparison.arrays)), strict=True):
                assert_close(one, other, limit)


def noted_launches(monkeypatch, config):
    """What the comparisons launch of matmul's sources, without running it."""
    asked = {}

    def noted(file, name, defines, arrays, outputs, *, shared_size=0, **_):
        if file.startswith("matmul"):
            asked[running[0], file, name, tuple(sorted(defines.items())), shared_size] = None
        return tuple(jnp.zeros(output.shape, output.dtype) for output in outputs)

    monkeypatch.setattr(ptx, "launch", noted)
    running = [""]
    for comparison in matmul.comparisons(config, 3):
        running[0] = comparison.name
        comparison.kernel(*comparison.arrays)
    return list(asked)


def test_variants_are_what_the_wrappers_launch(monkeypatch):
    config = replace(CONFIG, num_layers=2)
    named = {
        (file, name, tuple(sorted(defines.items())), size)
        for file, name, defines, size in matmul.variants(config)
    }
    asked = noted_launches(monkeypatch, config)
    assert {launch[0].split(",")[0] for launch in asked} == {
        "qkv",
        "attn_output",
        "lm_head",
        "gate_up",
        "down",
    }
    for what, *launch in asked:
        extra = "300 rows" in what or ("Q6_K" in what and what.startswith(("attn_output", "gate_up")))
        assert extra or tuple(launch) in named, what


def test_what_cannot_be_read_is_left_out():
    config = replace(CONFIG, vocab_size=1003, num_heads=5)
    names = {name for _, name, _, _ in matmul.variants(config)}
    assert names == {"qkv", "gate_up", "down"}
    assert {one.name.split(",")[0] for one in matmul.comparisons(config, 3)} == names


def test_the_shapes_of_a_real_model_fit_the_gpus_they_are_meant_for(monkeypatch):
    config = real_config()
    for capability in ("8.0", "9.0", "10.0"):
        limit = ptx._SHARED_SIZES[capability]
        monkeypatch.setattr(ptx, "shared_limit", lambda limit=limit: limit)
        variants = matmul.variants(config)
        sizes = [size for _, _, defines, size in variants if "<16," not in defines["FORMAT_0"]]
        assert max(sizes) + matmul.STATIC_SIZE <= limit


def test_a_gpu_with_too_little_shared_memory_is_told_so(monkeypatch):
    monkeypatch.setattr(ptx, "shared_limit", lambda: ptx.SMALL_SHARED)
    launch = matmul.Launch("matmul_dense.cu", "qkv", {"THREADS": 32}, (1, 1, 1), 100_000)
    with pytest.raises(ptx.KernelError, match=r"qkv takes 104103 bytes of shared memory .* has 101376"):
        launch([], [], 7)

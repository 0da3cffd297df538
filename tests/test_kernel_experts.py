"""The experts of few rows in one launch, run by the emulator: the bits of a row alone."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as G
from kernel_config import real_config, small_config

from jaxmoe.kernels import experts, matmul, packed, ptx, rows
from jaxmoe.kernels.matmul import Row
from jaxmoe.kernels.rounding import Rounded, round_rows

CONFIG = small_config(num_experts=12, experts_per_token=3)
NUM_ROWS = 41
EPS, INDEX, DOWN_INDEX = 1e-5, 1, 0
BUSY = 5  # the expert of all rows; 2 and 9 have none

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch):
    set_blocks(monkeypatch, 3)


def set_blocks(monkeypatch, number):
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: number)


@cache
def weights(down):
    """Gate and up in two stacked layers, down in three."""
    wide, narrow = (2, 12, 256, 512), (3, 12, 512, 256)
    absent = packed.absent_weights((G.Q4_K, G.Q4_K, down), (wide, wide, narrow))
    return packed.with_fields(absent, packed.random_weights(np.random.default_rng(0), absent))


@cache
def chosen():
    """x, norm, ids and weights of all rows."""
    rng = np.random.default_rng(1)
    others = np.array([e for e in range(12) if e not in (BUSY, 2, 9)])
    ids = np.array([[BUSY, *rng.choice(others, 2, replace=False)] for _ in range(NUM_ROWS)])
    ids = rng.permuted(ids, axis=1)
    x, norm = rng.standard_normal((NUM_ROWS, 512)), rng.uniform(0.5, 1.5, (2, 512))
    shares = rng.random((NUM_ROWS, 3))
    return (
        *(jnp.asarray(a, jnp.float32) for a in (x, norm)),
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(shares, jnp.float32),
    )


def progress(num_rows, config=CONFIG):
    return jnp.zeros(experts.num_progress(num_rows, config), jnp.int32)


def count_of(number):
    return jnp.asarray([number], jnp.int32)


def run(down, number, count=None):
    """Codes, scales and outputs of the first `count` of `number` rows."""
    x, norm, ids, _ = chosen()
    count = count_of(number if count is None else count)
    inputs = Rounded(*rows.norm_quantise(x[:number], norm, count, eps=EPS, layer=1))
    places = {"index": INDEX, "down_index": DOWN_INDEX}
    hidden, y = experts.run(
        inputs, ids[:number], count, progress(number), weights(down), config=CONFIG, **places
    )
    return [np.asarray(a) for a in (*hidden, y)]


@cache
def alone(down, t):
    """The same of row t by the kernels of one row: its codes and scales, and the row plus its experts."""
    x, norm, ids, shares = chosen()
    gate, up, matrix = weights(down)
    here = slice(t, t + 1)
    hidden = matmul.gate_up_of_row(Row(x[here], norm, 1, EPS), gate, up, ids[here], index=INDEX)
    y = matmul.down_of_row(hidden, matrix, ids[here], shares[here], x[here], index=DOWN_INDEX)
    return [np.asarray(a) for a in (*round_rows(hidden), y)]


def assert_rows_are_those_alone(down, number, found, which):
    x, norm, _, shares = chosen()
    codes, scales, y = found
    combined, *_ = rows.combine(
        x[:number], jnp.asarray(y), shares[:number], norm, count_of(number), eps=EPS, layer=0
    )
    for t in which:
        pairs = slice(3 * t, 3 * t + 3)
        for one, other in zip(
            (codes[pairs], scales[pairs], combined[t : t + 1]), alone(down, t), strict=True
        ):
            assert np.asarray(one).tobytes() == other.tobytes()


@pytest.mark.parametrize("down", [G.Q4_K, G.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("blocks", [1, 3, 24])
def test_rows_have_the_bits_of_a_row_alone(down, blocks, monkeypatch):
    set_blocks(monkeypatch, blocks)
    assert_rows_are_those_alone(down, NUM_ROWS, run(down, NUM_ROWS), (0, 7, 8, 31, 32, 40))


@pytest.mark.parametrize("blocks", [3, 24])
def test_two_rows_have_the_bits_of_a_row_alone(blocks, monkeypatch):
    set_blocks(monkeypatch, blocks)  # blocks without a step of one product or of both
    assert_rows_are_those_alone(G.Q4_K, 2, run(G.Q4_K, 2), (0, 1))


@pytest.mark.parametrize("down", [G.Q4_K, G.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("columns", [1, 2, 5, 8])  # of the tile of BUSY
def test_a_tile_of_so_many_columns_has_the_bits_of_each_row_alone(down, columns):
    assert_rows_are_those_alone(down, columns, run(down, 8, columns), range(columns))


@pytest.mark.parametrize("down", [G.Q4_K, G.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("row_tiles", "most", "warps"), [(1, 16, 8), (2, 16, 8), (4, 16, 8), (8, 4, 8)])
def test_tiles_of_rows_and_warps_change_nothing(down, row_tiles, most, warps, monkeypatch):
    expected = run(down, NUM_ROWS)
    assert experts._launch(NUM_ROWS, weights(down), CONFIG).defines["ROW_TILES"] == 8
    # units of a step of down: one, one or two, two or four, and four or eight for four warps
    monkeypatch.setattr(experts, "_ROW_TILES", tuple(n for n in experts._ROW_TILES if n <= row_tiles))
    monkeypatch.setattr(experts, "_MOST_MULTIPLYING", most)
    defines = experts._launch(NUM_ROWS, weights(down), CONFIG).defines
    assert (defines["ROW_TILES"], defines["THREADS"]) == (row_tiles, 32 * warps)
    for one, other in zip(run(down, NUM_ROWS), expected, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("count", [0, 1, 33])
def test_pairs_past_the_count_are_left_alone(count):
    found, whole = run(G.Q4_K, NUM_ROWS, count), run(G.Q4_K, NUM_ROWS)
    for one, other in zip(found, whole, strict=True):
        assert one[: 3 * count].tobytes() == other[: 3 * count].tobytes()
        assert set(one[3 * count :].tobytes()) <= {0xFF}


def test_lists_of_more_rows_come_from_group(monkeypatch):
    expected = run(G.Q4_K, NUM_ROWS, 39)
    monkeypatch.setattr(experts, "FEW_ROWS", 40)
    assert "LISTED" in experts._launch(NUM_ROWS, weights(G.Q4_K), CONFIG).defines
    for one, other in zip(run(G.Q4_K, NUM_ROWS, 39), expected, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("down", [G.Q4_K, G.Q6_K])
def test_older_gpus_give_the_same_bits(down, use_older):
    expected = run(down, NUM_ROWS, 39)
    use_older()
    for one, other in zip(run(down, NUM_ROWS, 39), expected, strict=True):
        assert one.tobytes() == other.tobytes()


def test_more_rows_are_few_where_shared_memory_is_small(monkeypatch):
    assert [experts.takes(number) for number in (1, 64, 65)] == [True, True, False]
    monkeypatch.setattr(ptx, "shared_limit", lambda: ptx.SMALL_SHARED)
    assert experts.takes(65)


def test_comparisons_hold():
    found = [comparison for comparison in experts.comparisons(CONFIG, 3) if " 8 rows" in comparison.name]
    assert [comparison.name for comparison in found] == ["experts, 8 rows, Q4_K", "experts, 8 rows, Q6_K"]
    for comparison in found:
        results = comparison.kernel(*comparison.arrays)
        for limit, twin in ((1e-3, comparison.twin), (0.015, comparison.float_twin)):
            for one, other in zip(results, jax.jit(twin)(*comparison.arrays), strict=True):
                assert np.linalg.norm(one - other) <= limit * np.linalg.norm(other)


def test_variants_are_what_the_wrapper_launches(monkeypatch):
    asked = set()

    def noted(file, name, defines, arrays, outputs, *, shared_size=0, **_):
        asked.add((file, name, tuple(sorted(defines.items())), shared_size))
        return tuple(jnp.zeros(output.shape, output.dtype) for output in outputs)

    monkeypatch.setattr(ptx, "launch", noted)
    for comparison in experts.comparisons(CONFIG, 3):
        comparison.kernel(*comparison.arrays)
    named = {(file, name, tuple(sorted(d.items())), size) for file, name, d, size in experts.variants(CONFIG)}
    assert named < asked
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("capability", "gate_up", "down"),
    # stages: one step is multiplied while the others are on their way; and tiles of rows a step of down
    [("8.0", 2, [(4, 4), (2, 4)]), ("9.0", 4, [(3, 8), (3, 4)]), ("10.0", 4, [(3, 8), (3, 4)])],
)
def test_the_shapes_of_a_real_model_fit_the_gpus_they_are_meant_for(capability, gate_up, down, monkeypatch):
    limit = ptx._SHARED_SIZES[capability]
    monkeypatch.setattr(ptx, "shared_limit", lambda: limit)
    found = list(experts.variants(real_config()))
    assert max(size for *_, size in found) + matmul.STATIC_SIZE <= limit
    assert [defines["GATE_UP_STAGES"] for _, _, defines, _ in found] == [gate_up] * 4
    assert [(defines["DOWN_STAGES"], defines["ROW_TILES"]) for _, _, defines, _ in found] == down * 2


def test_a_gpu_on_which_it_cannot_run_is_told_so(monkeypatch):
    monkeypatch.setattr(ptx, "knows_multiprocessors", lambda: False)
    with pytest.raises(ptx.KernelError, match="does not say how many multiprocessors"):
        run(G.Q4_K, 2)
    monkeypatch.setattr(ptx, "shared_limit", lambda: ptx.SMALL_SHARED)
    with pytest.raises(ptx.KernelError, match=r"takes \d+ bytes of shared memory, the GPU has 101376"):
        list(experts.variants(real_config()))


@pytest.mark.parametrize("down", [G.Q4_K, G.Q6_K, G.Q5_1])
@pytest.mark.parametrize("limit", [232448, 166912])
@pytest.mark.parametrize("num_layers", [48, 94])
def test_the_launch_number_of_the_last_layer_fits(
    num_layers: int, limit: int, down: G, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptx, "shared_limit", lambda: limit)
    monkeypatch.setattr(ptx, "num_multiprocessors", lambda: 132)
    wide, narrow = (num_layers, 128, 768, 2048), (num_layers, 128, 2048, 768)
    weights = packed.absent_weights((G.Q4_K, G.Q4_K, down), (wide, wide, narrow))
    for num_rows in (8, 64):
        launch = experts._launch(num_rows, weights, real_config())
        assert launch.shared_size + num_layers**2 - 1 + matmul.STATIC_SIZE <= limit

"""The emulator: what it computes, and that it sees the mistakes it is there to see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorError, emulated_launch, source_text, unavailable
from jax import Array

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

Run = Callable[..., np.ndarray]

SOURCE = """
#include "common.cuh"
#ifndef MMA
#define MMA mma_half
#endif
#ifndef WAIT
#define WAIT 1
#endif
#ifndef SENT
#define SENT 16
#endif
#ifndef EXPECTED
#define EXPECTED 64
#endif
#ifndef ARRIVALS
#define ARRIVALS 1
#endif
#ifndef TOLD
#define TOLD 0
#endif
#ifndef SILENT
#define SILENT -1
#endif
KERNEL(256, 1) sums(const float* x, float* out) {
    __shared__ float parts[8];
    if (blockIdx.x == 1 && threadIdx.x >= 64) return;
    float sum = sum_of_lanes(x[blockIdx.x * 256 + threadIdx.x]);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    float total = launch_number<SHARED_SIZE>();
    for (int i = 0; i < (blockIdx.x == 1 ? 2 : 8); i++) total += parts[i];
    out[blockIdx.x] = total;
}
KERNEL(32, 1) shuffles(const int* x, int* out) {
    int lane = threadIdx.x, v = x[lane];
    out[lane] = __shfl_sync(ALL_LANES, v, 5);
    out[32 + lane] = __shfl_up_sync(ALL_LANES, v, 3);
    out[64 + lane] = __shfl_down_sync(ALL_LANES, v, 3);
    out[96 + lane] = __shfl_xor_sync(ALL_LANES, v, 9);
    out[128 + lane] = (int)__ballot_sync(ALL_LANES, v % 3 == 0);
    out[160 + lane] = __shfl_sync(ALL_LANES, v, 2, 8);
}
KERNEL(32, 1) int8_tile(const u32* a, const u32* b, int* out) {
    int row = threadIdx.x / 4, word = threadIdx.x % 4, d[4];
    mma_int8(d, a[row * 8 + word], a[(row + 8) * 8 + word],
             a[row * 8 + word + 4], a[(row + 8) * 8 + word + 4], b[row * 8 + word], b[row * 8 + word + 4], 7);
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * 8 + word * 2 + i % 2] = d[i];
}
KERNEL(32, 1) float_tile(const u32* a, const u32* b, float* out) {
    int row = threadIdx.x / 4, word = threadIdx.x % 4;
    float d[4] = {1, 1, 1, 1};
    MMA(d, a[row * 8 + word], a[(row + 8) * 8 + word], a[row * 8 + word + 4], a[(row + 8) * 8 + word + 4],
        b[row * 8 + word], b[row * 8 + word + 4]);
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * 8 + word * 2 + i % 2] = d[i];
}
KERNEL(32, 1) transposed(const uint4* x, u32* out) {
    extern __shared__ __align__(16) u8 shared[];
    copy_async(shared + threadIdx.x * 16, x + threadIdx.x);
    commit_copies();
#if WAIT
    wait_copies<0>();
#endif
    __syncwarp();
    u32 r[4];
    load_transposed(r, shared + threadIdx.x * 16);
    for (int i = 0; i < 4; i++) out[i * 32 + threadIdx.x] = r[i];
}
KERNEL(64, 1) two_groups(const uint4* x, uint4* out) {
    __shared__ uint4 first, second;
    if (threadIdx.x) return;
    copy_async(&first, x), commit_copies();
    copy_async(&second, x + 1, false), commit_copies();
    wait_copies<1>();
    out[0] = first;
    out[1] = second;
    wait_copies<0>();
    out[2] = second;
}
// A block's word is its neighbour's and one of its own shared memory's.
KERNEL(64, 1) relay(const u32*, u32* out) {
    __shared__ u32 mine[64];
    u32 block = blockIdx.x, before = 0;
    mine[threadIdx.x] = threadIdx.x + block;
    if (threadIdx.x >= 40) return;
    __syncthreads();
    if (threadIdx.x == 35 && block) {
        while (!before) {
            before = read_words(out + 4 * (block - 1)).x;
            if (!before) let_others_run();
        }
    }
    __syncthreads();
    if (threadIdx.x == 35 && block != SILENT) write_word(out + 4 * block, before + mine[31]);
}
// Blocks in pairs: each copies half of x for both; then the first copies a word of its own to the second.
KERNEL(64, 1) paired(const uint4* x, uint4* out) {
    __shared__ u64 arrived, handed;
    __shared__ uint4 both[2], own;
    u32 second = blockIdx.x % 2;
    if (threadIdx.x == 0) {
        init_phases(&arrived, 1), init_phases(&handed, 1);
        expect_bulk(&arrived, 32), expect_bulk(&handed, second ? SENT : 0);
    }
    arrive_in_cluster<2, 1>();
    wait_in_cluster<2, 1>();
    if (threadIdx.x == 0) copy_bulk_to_both<2, 1>(&both[second], x + second, 16, &arrived);
    if (WAIT) wait_phase(&arrived, 0);
    uint4 found = both[threadIdx.x % 2];
    __syncthreads();
    wait_phase(&arrived, 0);
    if (second) wait_phase(&handed, 0);
    if (!second && threadIdx.x == 0) {
        own = make_uint4(blockIdx.x + 7, 0, 0, 0);
        copy_bulk_to_next(&own, 16, &handed);
    }
    __syncthreads();
    if (threadIdx.x < 3) out[3 * blockIdx.x + threadIdx.x] = threadIdx.x < 2 ? found : own;
}
// Four rows by bulk copies, for which all threads wait; some of the second warp may have to arrive too.
KERNEL(64, 1) bulk(const uint4* x, uint4* out) {
    __shared__ u64 arrived;
    __shared__ uint4 rows[4];
    if (threadIdx.x == 0) init_phases(&arrived, ARRIVALS);
    __syncthreads();
    if (threadIdx.x == 0) expect_bulk(&arrived, EXPECTED);
    __syncthreads();
    for (int i = 32; i < 32 + TOLD; i++)
        if (threadIdx.x == i) arrive(&arrived);
    if (threadIdx.x < 4) copy_bulk(rows + threadIdx.x, x + threadIdx.x, 16, &arrived);
    if (WAIT) wait_phase(&arrived, 0);
    __syncthreads();
    if (threadIdx.x < 4) out[threadIdx.x] = rows[threadIdx.x];
}
KERNEL(64, 1) mistake(const int* x, int* out) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ int words[64];
    int i = threadIdx.x, kind = launch_number<SHARED_SIZE>();
    if (kind == 0 && i < 32) __syncthreads();
    if (kind == 0 && i >= 32 && i < 40) sum_of_lanes(1.f);
    if (kind == 1) out[i + 2] = 1;
    if (kind == 2) out[i] = x[i + 64];
    if (kind == 3) ((int*)x)[i] = 1;
    if (kind == 4) out[i] = ((const int4*)(x + 1))->x;
    if (kind == 5) words[i + x[0] + 1] = 1;
    if (kind == 6) words[i] = i, out[i] = words[i ^ 1];
    if (kind == 7 && i == 0) out[0] = blockIdx.x;
    if (kind == 8) shared[i] = 1;
    if (kind == 9) out[i] = words[i];
    if (kind == 10 && i == 0) __syncwarp();
    if (kind == 10 && i) sum_of_lanes(1.f);
    if (kind == 11) words[i] = 1 << (x[i] + 32);
    if (kind == 12) copy_async(shared + 8, x);
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run kernel `name` of SOURCE on arrays, for one output of this shape and type."""
    path = tmp_path_factory.mktemp("kernels") / "emulated.cu"
    path.write_text(SOURCE)

    def launch(
        name: str, shape: tuple[int, ...], dtype: object, *arrays: np.ndarray, **options: object
    ) -> np.ndarray:
        given: dict[str, Any] = {"defines": {}, "grid": (1, 1, 1), "threads": 32} | options
        inputs = [jnp.asarray(array) for array in arrays]
        (out,) = emulated_launch(
            str(path), name, arrays=inputs, outputs=[jax.ShapeDtypeStruct(shape, dtype)], **given
        )
        return np.asarray(out)

    return launch


def test_an_older_gpu_is_emulated(use_older: Callable[[], None]) -> None:
    source = partial(source_text, "rows.cu", "norm_quantise", {})
    assert source().startswith("#define EMULATED 900\n")
    use_older()
    assert source().startswith("#define EMULATED 800\n")


def test_blocks_sum_with_barriers_and_threads_that_returned(run: Run) -> None:
    x = np.arange(768, dtype=np.float32).reshape(3, 256)
    expected = [x[0].sum() + 5, x[1, :64].sum() + 5, x[2].sum() + 5]
    assert run("sums", (3,), jnp.float32, x, grid=(3, 1, 1), threads=256, number=5).tolist() == expected


def test_runs_inside_jit(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "emulated.cu"
    path.write_text(SOURCE)
    output = [jax.ShapeDtypeStruct((1,), jnp.float32)]

    @jax.jit
    def twice(x: Array) -> Array:
        return 2 * emulated_launch(str(path), "sums", {}, [x + 1], output, grid=(1, 1, 1), threads=256)[0]

    assert twice(jnp.zeros(256, jnp.float32)).tolist() == [512]


def test_lanes_exchange(run: Run) -> None:
    x = np.arange(32, dtype=np.int32) * 7 + 1
    lane = np.arange(32)
    mask = int(sum(1 << i for i in range(32) if x[i] % 3 == 0))
    expected = [
        x[[5] * 32],
        np.where(lane < 3, x, np.roll(x, 3)),
        np.where(lane > 28, x, np.roll(x, -3)),
        x[lane ^ 9],
        np.full(32, np.uint32(mask).astype(np.int32)),
        x[lane // 8 * 8 + 2],
    ]
    assert (run("shuffles", (6, 32), jnp.int32, x) == np.stack(expected)).all()


def test_int8_tile_is_a_product(run: Run) -> None:
    draw = np.random.default_rng(0)
    a, b = (draw.integers(-128, 128, (rows, 32), dtype=np.int8) for rows in (16, 8))
    found = run("int8_tile", (16, 8), jnp.int32, a.view(np.uint32), b.view(np.uint32))
    assert (found == a.astype(np.int32) @ b.astype(np.int32).T + 7).all()


@pytest.mark.parametrize(("word", "dtype"), [("mma_bfloat16", ml_dtypes.bfloat16), ("mma_half", np.float16)])
def test_float_tile_is_a_product(run: Run, word: str, dtype: type) -> None:
    draw = np.random.default_rng(0)
    a: np.ndarray = draw.standard_normal((16, 16)).astype(dtype)
    b: np.ndarray = draw.standard_normal((8, 16)).astype(dtype)
    found = run(
        "float_tile", (16, 8), jnp.float32, a.view(np.uint32), b.view(np.uint32), defines={"MMA": word}
    )
    expected = a.astype(np.float64) @ b.astype(np.float64).T + 1
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=2e-7, atol=1e-7)


def test_transposed_tiles(run: Run) -> None:
    x = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    words = x.view(np.uint32).reshape(32, 4)
    found = run("transposed", (4, 32), jnp.uint32, words, defines={"WAIT": 1}, shared_size=512)
    assert (found.view(np.uint16).reshape(4, 8, 8) == x.transpose(0, 2, 1)).all()


def test_copy_without_wait_is_seen(run: Run) -> None:
    words = np.zeros((32, 4), np.uint32)
    found = run("transposed", (4, 32), jnp.uint32, words, defines={"WAIT": 0}, shared_size=512)
    assert (found == 0xFFFFFFFF).all()


def test_waits_count_groups_of_copies(run: Run) -> None:
    x = np.arange(8, dtype=np.uint32)
    found = run("two_groups", (3, 4), jnp.uint32, x)
    assert found.tolist() == [[0, 1, 2, 3], [0xFFFFFFFF] * 4, [0] * 4]


def relayed(run: Run, **defines: int) -> list[int]:
    zeros = np.zeros((4, 4), np.uint32)
    options = {"grid": (4, 1, 1), "threads": 64, "aliases": {0: 0}, "defines": defines}
    return run("relay", (4, 4), jnp.uint32, zeros, **options)[:, 0].tolist()


def test_blocks_wait_for_each_other(run: Run) -> None:
    assert relayed(run) == [31, 31 + 32, 31 + 32 + 33, 31 + 32 + 33 + 34]


def test_blocks_that_wait_for_ever_are_reported(run: Run) -> None:
    where = r"39 threads wait at __syncthreads .*; 1 threads wait at other blocks in emulated.cu:\d+"
    with pytest.raises(
        EmulatorError, match=rf"deadlock in block \(3, 0, 0\): {where}.*; 24 threads returned"
    ):
        relayed(run, SILENT=1)


def paired(run: Run, blocks: int = 4, **defines: int) -> np.ndarray:
    x = np.arange(8, dtype=np.uint32)
    options = {"grid": (blocks, 1, 1), "threads": 64, "defines": defines}
    return run("paired", (blocks, 3, 4), jnp.uint32, x, **options)


def test_blocks_of_a_cluster_copy_to_each_other(run: Run) -> None:
    found = paired(run)
    assert found[:, :2].tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 4
    assert found[:, 2, 0].tolist() == [7, 7, 9, 9]


def test_what_another_block_copied_is_not_there_before_it_is_waited_for(run: Run) -> None:
    found = paired(run, WAIT=0)
    assert (found[::2, 1] == 0xFFFFFFFF).all()
    assert (found[1::2, 0] == 0xFFFFFFFF).all()


def test_mistakes_in_clusters_are_reported(run: Run) -> None:
    with pytest.raises(EmulatorError, match="a grid that is not made of whole clusters"):
        paired(run, blocks=3)
    with pytest.raises(EmulatorError, match=r"deadlock .*threads wait at other blocks"):
        paired(run, SENT=32)


@pytest.mark.parametrize("defines", [{}, {"ARRIVALS": 3, "TOLD": 2}])
def test_a_phase_waits_for_arrivals_and_bytes(run: Run, defines: dict[str, int]) -> None:
    x = np.arange(16, dtype=np.uint32).reshape(4, 4)
    assert (run("bulk", (4, 4), jnp.uint32, x, threads=64, defines=defines) == x).all()


@pytest.mark.parametrize(
    ("message", "defines"),
    [
        (r"deadlock in block \(0, 0, 0\): 64 threads wait at a phase", {"ARRIVALS": 2}),
        (r"deadlock in block \(0, 0, 0\): 64 threads wait at a phase", {"EXPECTED": 80}),
        ("8 bytes more than a phase expects were copied", {"EXPECTED": 56}),
        ("16 bytes were copied that no thread waited for", {"EXPECTED": 48}),
        (r"an arrival too many in emulated.cu:\d+", {"TOLD": 1, "EXPECTED": 80}),
        ("left a phase with 1 of 3 arrivals and 64 bytes to come", {"ARRIVALS": 3, "TOLD": 1, "WAIT": 0}),
        ("16 bytes were copied that no thread waited for", {"EXPECTED": 0}),
        ("left a phase with 0 of 1 arrivals and 64 bytes to come", {"WAIT": 0}),
    ],
)
def test_mistakes_in_phases_are_reported(run: Run, message: str, defines: dict[str, int]) -> None:
    x = np.arange(16, dtype=np.uint32).reshape(4, 4)
    with pytest.raises(EmulatorError, match=message):
        run("bulk", (4, 4), jnp.uint32, x, threads=64, defines=defines)


MISTAKES = {
    0: r"deadlock in block \(0, 0, 0\): 32 threads wait at __syncthreads in emulated.cu:\d+ "
    r"\(the first is thread 0\); 8 threads wait at a shuffle in common.cuh:\d+ .*; 24 threads returned",
    1: r"something was written at byte 260 of output 0 \(260 bytes\)",
    2: r"thread 0 of block .* reads byte 256 of input 0 \(256 bytes\) at .*emulated.cu:\d+",
    3: r"thread 0 of block .* writes byte 0 of input 0",
    4: r"emulated.cu:\d+: an access through 0x\w+, which is not a multiple of 16",
    5: r"thread 63 .* emulated.cu:\d+: index 64 is outside",
    6: r"output 0 depends on the order",
    7: r"output 0 depends on the order",
    8: r"block \(0, 0, 0\) wrote byte 32 of its 32 bytes of dynamic shared memory",
    10: r"thread 1 .* is at a shuffle in common.cuh:\d+ while other lanes of its warp wait at __syncwarp",
    11: r"emulated.cu:\d+: a shift by 32",
    12: r"copy_async in emulated.cu:\d+ must write 16 aligned bytes of shared memory",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_is_reported(run: Run, kind: int) -> None:
    options = {"grid": (2, 1, 1), "threads": 64, "shared_size": 32, "number": kind}
    with pytest.raises(EmulatorError, match=MISTAKES[kind]):
        run("mistake", (65,), jnp.int32, np.zeros(64, np.int32), **options)


def test_memory_that_nobody_wrote_is_poison(run: Run) -> None:
    found = run("mistake", (65,), jnp.int32, np.zeros(64, np.int32), threads=64, shared_size=32, number=9)
    assert (found == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 512}, "512 threads a block, but the kernel's bound is 256"),
        ({"threads": 256, "shared_size": 300_000}, "bytes of dynamic shared memory"),
        ({"threads": 256, "grid": (1, 70_000, 1)}, "a grid of"),
    ],
)
def test_impossible_launch_is_refused(run: Run, options: dict[str, object], message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run("sums", (1,), jnp.float32, np.zeros(256, np.float32), **options)


def test_number_of_arrays_must_fit(run: Run) -> None:
    with pytest.raises(EmulatorError, match="3 arrays, but the kernel has 2 parameters"):
        run("sums", (1,), jnp.float32, np.zeros(256, np.float32), np.zeros(1, np.float32), threads=256)


def test_source_that_does_not_compile_is_reported(run: Run) -> None:
    with pytest.raises(EmulatorError, match="nowhere"):
        run("nowhere", (1,), jnp.float32)

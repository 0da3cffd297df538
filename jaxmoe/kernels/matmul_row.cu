// Products of one row. All of a block's weights come to shared memory in the background while the row is normed and
// rounded; then a lane multiplies one row of a weight by one segment of the inputs, and the segments are added.
#include "row.cuh"  // ROWS, a macro: rows of a weight in a block

extern __shared__ __align__(16) u8 shared[];

#ifdef DENSE
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;

#ifdef NORMED
#define INPUT const float *x, const float *norm
#define GIVEN_INPUT x, norm
#else
#define INPUT const i8 *x, const float *x_scales
#define GIVEN_INPUT x, x_scales
#endif

template <class F> DEVICE void dense(const Weight& w, int rows, int row, int out_row, INPUT, const float* residual, float* out) {
    using Rows = SharedRows<F, SEGMENTS, ROWS, true, 16, true>;
    static_assert(Rows::SIZE <= SHARED_SIZE, "the weights must fit");
    __shared__ SharedRow<SEGMENTS> input;
    __shared__ float sums[Rows::TASKS];
    __shared__ u64 barrier;
    if (threadIdx.x == 0) init_phases(&barrier, 1);
    fence_bulk();
    __syncthreads();
    u32 first = stack_index() * rows + row;
    start_rows<F, Rows>(shared, w, first, &barrier);
    float before = 0;
    if (threadIdx.x < ROWS && residual) before = residual[out_row + threadIdx.x];
#ifdef NORMED
    __shared__ float segment_sums[SEGMENTS];
    commit_copies();
    norm_row<K>(input, segment_sums, x, norm + (size_t)norm_layer() * K, EPS);
#else
    copy_row<K>(input, x, x_scales);
    commit_copies();
#endif
    wait_phase(&barrier, 0);
    wait_copies<0>();
    __syncthreads();
    multiply_rows<F, Rows>(sums, shared, input);
    __syncthreads();
    if (threadIdx.x < ROWS) {
        float sum = total<Rows>(sums, threadIdx.x);
        out[out_row + threadIdx.x] = residual ? before + sum : sum;
    }
}

KERNEL(THREADS, 1) NAME(INPUT, DENSE_WEIGHTS, DENSE_RESIDUAL const int*, float* out) {
    int row = blockIdx.x * ROWS;
#if ROWS_1
    // weights of one format share the code: less of it to fetch
    bool is_1 = row >= ROWS_0 && row < ROWS_0 + ROWS_1, is_2 = row >= ROWS_0 + ROWS_1;
    int before = is_2 ? ROWS_0 + ROWS_1 : is_1 ? ROWS_0 : 0, rows = is_2 ? ROWS_2 : is_1 ? ROWS_1 : ROWS_0;
    Weight w = choose(is_2, GIVEN(2), choose(is_1, GIVEN(1), GIVEN(0)));
    if (IS_SAME<FORMAT_0, FORMAT_1> && IS_SAME<FORMAT_1, FORMAT_2>)
        dense<FORMAT_0>(w, rows, row - before, row, GIVEN_INPUT, GIVEN_RESIDUAL, out);
    else if (is_2)
        dense<FORMAT_2>(w, rows, row - before, row, GIVEN_INPUT, GIVEN_RESIDUAL, out);
    else if (is_1 && !IS_SAME<FORMAT_0, FORMAT_1>)
        dense<FORMAT_1>(w, rows, row - before, row, GIVEN_INPUT, GIVEN_RESIDUAL, out);
    else
        dense<FORMAT_0>(w, rows, row - before, row, GIVEN_INPUT, GIVEN_RESIDUAL, out);
#else
    dense<FORMAT_0>(GIVEN(0), ROWS_0, row, row, GIVEN_INPUT, GIVEN_RESIDUAL, out);
#endif
}
#endif  // DENSE

#ifdef GATE_UP
// h = silu(gate) * up for ROWS of the F rows of one expert.
KERNEL(THREADS, 1) NAME(const float* x, const float* norm, const int* ids, WEIGHT(0), WEIGHT(1), float* out) {
    using Gate = SharedRows<FORMAT_0, SEGMENTS, ROWS, false, 16>;
    using Up = SharedRows<FORMAT_1, SEGMENTS, ROWS, false, 16>;
    static_assert(Gate::SIZE + Up::SIZE <= SHARED_SIZE, "the weights must fit");
    __shared__ SharedRow<SEGMENTS> input;
    __shared__ float sums[2 * Gate::TASKS], segment_sums[SEGMENTS];
    int first = blockIdx.x * ROWS;
    size_t row = ((size_t)stack_index() * MATRICES + ids[blockIdx.y]) * ROWS_0 + first;
    copy_rows<FORMAT_0, Gate, true>(shared, GIVEN(0), row);
    copy_rows<FORMAT_1, Up, true>(shared + Gate::SIZE, GIVEN(1), row);
    commit_copies();
    norm_row<K>(input, segment_sums, x, norm + (size_t)norm_layer() * K, EPS);
    wait_copies<0>();
    __syncthreads();
    multiply_gate_up<FORMAT_0, Gate, FORMAT_1, Up>(sums, shared, input);
    __syncthreads();
    if (threadIdx.x < ROWS) {
        float gate = total<Gate>(sums, threadIdx.x), up = total<Gate>(sums + Gate::TASKS, threadIdx.x);
        out[blockIdx.y * ROWS_0 + first + threadIdx.x] = swiglu(gate, up);
    }
}
#endif  // GATE_UP

#ifdef DOWN
// All A experts of ROWS rows, weighted and added to the residual; h [A, K] is rounded here.
KERNEL(THREADS, 1) NAME(const float* h, const int* ids, const float* weights, const float* residual, WEIGHT(0), float* out) {
    using Rows = SharedRows<FORMAT_0, SEGMENTS, ROWS, false, 16>;
    constexpr int ALL = ACTIVE * SEGMENTS, TURNS = (ALL + WARPS - 1) / WARPS;
    static_assert(ACTIVE * Rows::SIZE <= SHARED_SIZE, "the weights must fit");
    __shared__ SharedRow<ALL> input;
    __shared__ float sums[ACTIVE * Rows::TASKS];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = blockIdx.x * ROWS;
#pragma unroll
    for (int j = 0; j < ACTIVE; j++)
        copy_rows<FORMAT_0, Rows, true>(shared + j * Rows::SIZE, GIVEN(0), ((size_t)stack_index() * MATRICES + ids[j]) * ROWS_0 + first);
    commit_copies();
    float before = 0, shares[ACTIVE], v[TURNS][8];
    if (threadIdx.x < ROWS) {
        before = residual[first + threadIdx.x];
#pragma unroll
        for (int j = 0; j < ACTIVE; j++) shares[j] = weights[j];
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (warp + i * WARPS < ALL) load8(v[i], h + (warp + i * WARPS) * SEGMENT + 8 * lane);
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (warp + i * WARPS < ALL) put_segment(input, warp + i * WARPS, v[i]);
    wait_copies<0>();
    __syncthreads();
    multiply_down<FORMAT_0, Rows>(sums, [](int j) { return (const u8*)shared + j * Rows::SIZE; }, input);
    __syncthreads();
    if (threadIdx.x < ROWS) out[first + threadIdx.x] = before + sum_of_experts<Rows>(sums, shares, threadIdx.x);
}
#endif  // DOWN

// Products of one row. All of a block's weights come to shared memory in the background while the row is normed and
// rounded; then a lane multiplies one row of a weight by one segment of the inputs, and the segments are added.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int WARPS = THREADS / 32;  // ROWS, a macro: rows of a weight in a block
constexpr int INPUT_STRIDE = SEGMENT + 16;      // bytes of a segment's inputs; some more keep the banks apart
constexpr int SCALES_STRIDE = 9;                // pairs of floats of a segment's 8 blocks, likewise

// One row of inputs in shared memory.
template <int SEGMENTS_> struct SharedRow {
    __align__(16) u8 codes[SEGMENTS_ * INPUT_STRIDE];  // read 16 bytes at a time
    float2 scales[SEGMENTS_ * SCALES_STRIDE];
};

static_assert(alignof(SharedRow<1>) >= 16, "codes are read 16 bytes at a time");

// A segment of it, 8 numbers a lane, rounded; `by` multiplies the scales.
DEVICE void put_scales(float2* scales, float scale, int sum, float by) {
    float s = scale * by;
    int lane = threadIdx.x & 31;
    if ((lane & 3) == 0) scales[lane >> 2] = make_float2(s, s * (float)sum);
}

// Norm and rounding of the whole row by all threads; README.md says how. Ends before a __syncthreads.
template <int INPUTS>
DEVICE void norm_row(SharedRow<INPUTS / SEGMENT>& row, float* segment_sums, const float* x, const float* g, float eps) {
    constexpr int COUNT = INPUTS / SEGMENT, TURNS = (COUNT + WARPS - 1) / WARPS;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sum[TURNS];
    float scale[TURNS], v[TURNS][8], w[TURNS][8];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= COUNT) break;
        load8(v[i], x + segment * SEGMENT + 8 * lane);
        load8(w[i], g + segment * SEGMENT + 8 * lane);
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= COUNT) break;
        float squares = sum_of_squares(v[i]);
        if (lane == 0) segment_sums[segment] = squares;
#pragma unroll
        for (int j = 0; j < 8; j++) v[i][j] = v[i][j] * w[i][j];
        uint2 codes;
        quantise(v[i], codes, scale[i], sum[i]);
        *(uint2*)(row.codes + segment * INPUT_STRIDE + 8 * lane) = codes;
    }
    __syncthreads();
    float r = inverse_rms<INPUTS>(segment_sums, eps);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= COUNT) break;
        put_scales(row.scales + segment * SCALES_STRIDE, scale[i], sum[i], r);
    }
}

// The sum of one segment of one row: x its inputs, `scales` theirs.
template <class F, class Rows> struct Dot {
    METHOD static float d_of(const u8* p, int block) {
        if constexpr (F::BLOCK == SEGMENT) return half_to_float(*(const u16*)p);
        if constexpr (F::WIDE_D) return ((const float*)p)[block];
        return half_to_float(((const u16*)p)[block]);
    }

    static_assert(!F::HALF, "floats are summed by tensor cores alone, in their order");
    METHOD static float multiply(const u8* from, int row, int segment, const u8* x, const float2* scales) {
        const u8 *codes = from + Rows::at_codes(row, segment), *d = from + Rows::at_d(row, segment);
        const u8 *s = from + Rows::at_s(row, segment), *m = from + Rows::at_m(row, segment), *d_m = from + Rows::at_d_m(row, segment);
        float total = 0;
#pragma unroll 1
        for (int pair = 0; pair < 4; pair++) {  // two blocks of 32 inputs
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int block = 2 * pair + i;
                float2 scale = scales[block];
                int v[2];
                dot(v, codes, x + block * 32, pair, i);
#pragma unroll
                for (int part = 0; part < (F::SPLIT ? 2 : 1); part++) {
                    float by = d_of(d, block);
                    if constexpr (F::S) by = times<F::SIGNED>(by, s[F::SPLIT ? 2 * block + part : block]);
                    total = fmaf((float)v[part] * by, scale.x, total);
                }
                if constexpr (F::D_M) {
                    float md = d_of(d_m, block);
                    if constexpr (F::M) md = times<false>(md, m[block]);
                    total = fmaf(-md, scale.y, total);
                }
            }
        }
        return total;
    }
    template <bool SIGNED> METHOD static float times(float d, u8 byte) {
        return d * (SIGNED ? (float)(i8)byte : (float)byte);
    }
    // Sums of codes * inputs of block 2 * pair + i: of the two groups of 16 where the format has such, else in v[0].
    METHOD static void dot(int (&v)[2], const u8* codes, const u8* x, int pair, int i) {
        v[0] = v[1] = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 c = *(const uint4*)(codes + (F::BITS == 4 ? pair * 32 : (2 * pair + i) * 32) + 16 * half);
            uint4 b = *(const uint4*)(x + 16 * half);
            int& to = v[F::SPLIT ? half : 0];
            to = __dp4a((int)signed_codes<F>(c.x, i), (int)b.x, to);
            to = __dp4a((int)signed_codes<F>(c.y, i), (int)b.y, to);
            to = __dp4a((int)signed_codes<F>(c.z, i), (int)b.z, to);
            to = __dp4a((int)signed_codes<F>(c.w, i), (int)b.w, to);
        }
    }
};

template <int COUNT> DEVICE float total(const float* sums) {
    float sum = sums[0];
#pragma unroll
    for (int i = 1; i < COUNT; i++) sum = sum + sums[i];
    return sum;
}

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
    using Rows = SharedRows<F, SEGMENTS, ROWS, false, 16>;
    static_assert(Rows::SIZE <= SHARED_SIZE, "the weights must fit");
    __shared__ SharedRow<SEGMENTS> input;
    __shared__ float sums[Rows::TASKS];
    size_t first = (size_t)stack_index() * rows + row;
    RowsCopy<F, Rows>(w, threadIdx.x).start(shared, first);
    float before = 0;
    if (threadIdx.x < ROWS && residual) before = residual[out_row + threadIdx.x];
#ifdef NORMED
    __shared__ float segment_sums[SEGMENTS];
    commit_copies();
    norm_row<K>(input, segment_sums, x, norm + (size_t)norm_layer() * K, EPS);
#else
    for (int i = threadIdx.x; i < K / 16; i += THREADS) copy_async(input.codes + i / 16 * INPUT_STRIDE + i % 16 * 16, x + i * 16);
    commit_copies();
    for (int i = threadIdx.x; i < K / 32; i += THREADS) input.scales[i / 8 * SCALES_STRIDE + i % 8] = ((const float2*)x_scales)[i];
#endif
    wait_copies<0>();
    __syncthreads();
    for (int task = threadIdx.x; task < Rows::TASKS; task += THREADS) {
        int segment = task % SEGMENTS;
        sums[task] = Dot<F, Rows>::multiply(shared, task / SEGMENTS, segment, input.codes + segment * INPUT_STRIDE, input.scales + segment * SCALES_STRIDE);
    }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        float sum = total<SEGMENTS>(sums + threadIdx.x * SEGMENTS);
        out[out_row + threadIdx.x] = residual ? before + sum : sum;
    }
}

KERNEL(THREADS, 1) NAME(INPUT, WEIGHT(0),
#if ROWS_1
    WEIGHT(1), WEIGHT(2),
#endif
#ifdef RESIDUAL
    const float* residual,
#else
#define residual nullptr
#endif
    const int*, float* out) {
    int row = blockIdx.x * ROWS;
#if ROWS_1
    // weights of one format share the code: less of it to fetch
    bool is_1 = row >= ROWS_0 && row < ROWS_0 + ROWS_1, is_2 = row >= ROWS_0 + ROWS_1;
    int before = is_2 ? ROWS_0 + ROWS_1 : is_1 ? ROWS_0 : 0, rows = is_2 ? ROWS_2 : is_1 ? ROWS_1 : ROWS_0;
    Weight w = choose(is_2, GIVEN(2), choose(is_1, GIVEN(1), GIVEN(0)));
    if (IS_SAME<FORMAT_0, FORMAT_1> && IS_SAME<FORMAT_1, FORMAT_2>)
        dense<FORMAT_0>(w, rows, row - before, row, GIVEN_INPUT, residual, out);
    else if (is_2)
        dense<FORMAT_2>(w, rows, row - before, row, GIVEN_INPUT, residual, out);
    else if (is_1 && !IS_SAME<FORMAT_0, FORMAT_1>)
        dense<FORMAT_1>(w, rows, row - before, row, GIVEN_INPUT, residual, out);
    else
        dense<FORMAT_0>(w, rows, row - before, row, GIVEN_INPUT, residual, out);
#else
    dense<FORMAT_0>(GIVEN(0), ROWS_0, row, row, GIVEN_INPUT, residual, out);
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
    RowsCopy<FORMAT_0, Gate>(GIVEN(0), threadIdx.x).start(shared, row);
    RowsCopy<FORMAT_1, Up>(GIVEN(1), threadIdx.x).start(shared + Gate::SIZE, row);
    commit_copies();
    norm_row<K>(input, segment_sums, x, norm + (size_t)norm_layer() * K, EPS);
    wait_copies<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * Gate::TASKS; i += THREADS) {
        bool is_up = i >= Gate::TASKS;
        int task = is_up ? i - Gate::TASKS : i, segment = task % SEGMENTS;
        const u8* x_codes = input.codes + segment * INPUT_STRIDE;
        const float2* x_scales = input.scales + segment * SCALES_STRIDE;
        if (IS_SAME<FORMAT_0, FORMAT_1> || !is_up)
            sums[i] = Dot<FORMAT_0, Gate>::multiply(shared + (is_up ? Gate::SIZE : 0), task / SEGMENTS, segment, x_codes, x_scales);
        else
            sums[i] = Dot<FORMAT_1, Up>::multiply(shared + Gate::SIZE, task / SEGMENTS, segment, x_codes, x_scales);
    }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const float* gate = sums + threadIdx.x * SEGMENTS;
        out[blockIdx.y * ROWS_0 + first + threadIdx.x] = swiglu(total<SEGMENTS>(gate), total<SEGMENTS>(gate + Gate::TASKS));
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
    RowsCopy<FORMAT_0, Rows> rows(GIVEN(0), threadIdx.x);
#pragma unroll
    for (int j = 0; j < ACTIVE; j++)
        rows.start(shared + j * Rows::SIZE, ((size_t)stack_index() * MATRICES + ids[j]) * ROWS_0 + first);
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
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS, sum;
        if (segment >= ALL) break;
        uint2 codes;
        float scale;
        quantise(v[i], codes, scale, sum);
        *(uint2*)(input.codes + segment * INPUT_STRIDE + 8 * lane) = codes;
        put_scales(input.scales + segment * SCALES_STRIDE, scale, sum, 1.f);
    }
    wait_copies<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < ACTIVE * Rows::TASKS; i += THREADS) {
        int j = i / Rows::TASKS, task = i % Rows::TASKS, segment = j * SEGMENTS + task % SEGMENTS;
        sums[i] = Dot<FORMAT_0, Rows>::multiply(shared + j * Rows::SIZE, task / SEGMENTS, task % SEGMENTS, input.codes + segment * INPUT_STRIDE,
                                                input.scales + segment * SCALES_STRIDE);
    }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const float* mine = sums + threadIdx.x * SEGMENTS;
        float sum = shares[0] * total<SEGMENTS>(mine);
#pragma unroll
        for (int j = 1; j < ACTIVE; j++) sum = fmaf(shares[j], total<SEGMENTS>(mine + j * Rows::TASKS), sum);
        out[first + threadIdx.x] = before + sum;
    }
}
#endif  // DOWN

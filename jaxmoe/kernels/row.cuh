// What products of one row share: copies of a weight's rows to shared memory, the row there, its norm and rounding by all threads, and the product of
// one row of a weight and one segment of inputs by one lane. THREADS, a macro: of a block.
#pragma once
#include "weights.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int INPUT_STRIDE = SEGMENT + 16;  // bytes of a segment's inputs; some more keep the banks apart
constexpr int SCALES_STRIDE = 9;            // pairs of floats of a segment's 8 blocks, likewise

// One row of inputs in shared memory.
template <int SEGMENTS_> struct SharedRow {
    __align__(16) u8 codes[SEGMENTS_ * INPUT_STRIDE];  // read 16 bytes at a time
    float2 scales[SEGMENTS_ * SCALES_STRIDE];

    METHOD u8* codes_of(int segment) { return codes + segment * INPUT_STRIDE; }
    METHOD float2* scales_of(int segment) { return scales + segment * SCALES_STRIDE; }
};

static_assert(alignof(SharedRow<1>) >= 16, "codes are read 16 bytes at a time");

// A segment of it, 8 numbers a lane, rounded; `by` multiplies the scales.
DEVICE void put_scales(float2* scales, float scale, int sum, float by) {
    float s = scale * by;
    int lane = threadIdx.x & 31;
    if ((lane & 3) == 0) scales[lane >> 2] = make_float2(s, s * (float)sum);
}

// Work of COUNT pieces by all threads: copy(n, turn) for each thread's n of each turn. The first is thread FIRST's, so
// that those get work which had none before.
template <u32 COUNT, u32 FIRST, class Copy> DEVICE void spread(Copy copy) {
    constexpr u32 SHIFT = FIRST % THREADS;
    u32 thread = threadIdx.x;
    if constexpr (SHIFT != 0) thread = thread < SHIFT ? thread + (THREADS - SHIFT) : thread - SHIFT;
#pragma unroll 8  // all at once, the addresses would not fit the registers
    for (u32 i = 0; i < (COUNT + THREADS - 1) / THREADS; i++)
        if ((i + 1) * THREADS <= COUNT || i * THREADS + thread < COUNT) copy(i * THREADS + thread, i);
}

// HEIGHT rows of scales, RUN bytes each, from `row` on.
template <int HEIGHT, int RUN, int STRIDE, int FIRST> DEVICE void copy_scales(u8* to, const void* array, size_t row) {
    constexpr u32 COUNT = RUN / 16;  // rows are one run where they lie without a gap
    static_assert(RUN * HEIGHT % 16 == 0 && (RUN == STRIDE || RUN % 16 == 0), "pieces of 16 bytes");
    const u8* from = (const u8*)array + row * RUN;
    spread<RUN * HEIGHT / 16, FIRST>([&](u32 n, u32) {
        u32 place = n * 16;
        if constexpr (RUN != STRIDE) place = n / COUNT * STRIDE + n % COUNT * 16;
        copy_async(to + place, from + n * 16);
    });
}

// The scales of a weight's rows from `row` on, to shared memory in the background. The first piece is thread FIRST's.
template <class F, class Rows, int FIRST> DEVICE void copy_all_scales(u8* to, const Weight& w, size_t row) {
    constexpr int M = FIRST + (F::S ? Rows::HEIGHT * Rows::S_RUN / 16 : 0);
    constexpr int D = M + (F::M ? Rows::HEIGHT * Rows::M_RUN / 16 : 0), D_M = D + Rows::HEIGHT * Rows::D_RUN / 16;
    if constexpr (F::S) copy_scales<Rows::HEIGHT, Rows::S_RUN, Rows::S_STRIDE, FIRST>(to + Rows::AT_S, w.s, row);
    if constexpr (F::M) copy_scales<Rows::HEIGHT, Rows::M_RUN, Rows::M_STRIDE, M>(to + Rows::AT_M, w.m, row);
    copy_scales<Rows::HEIGHT, Rows::D_RUN, Rows::D_STRIDE, D>(to + Rows::AT_D, w.d, row);
    if constexpr (F::D_M) copy_scales<Rows::HEIGHT, Rows::D_RUN, Rows::D_STRIDE, D_M>(to + Rows::AT_D_M, w.d_m, row);
}

// The rows of a weight from `row` on, to shared memory in the background. OF_EXPERTS: their codes are swapped.
template <class F, class Rows, bool OF_EXPERTS = false> DEVICE void copy_rows(u8* to, const Weight& w, size_t row) {
    constexpr u32 CHUNKS = F::BYTES / 16, A_ROW = Rows::NUM_SEGMENTS * CHUNKS, ALL = Rows::TASKS * CHUNKS;
    const u8* from = w.codes + row * (Rows::NUM_SEGMENTS * F::BYTES);
    u32 first = Rows::at_codes(threadIdx.x / A_ROW, threadIdx.x % A_ROW / CHUNKS) + threadIdx.x % CHUNKS * 16;
    spread<ALL, 0>([&](u32 n, u32 turn) {
        u32 place = first + turn * (THREADS / A_ROW) * Rows::ROW_STRIDE;  // mostly whole rows apart
        if constexpr (THREADS % A_ROW != 0) place = Rows::at_codes(n / A_ROW, n % A_ROW / CHUNKS) + n % CHUNKS * 16;
        u32 chunk = threadIdx.x, its_row = THREADS % A_ROW == 0 ? threadIdx.x / A_ROW + turn * (THREADS / A_ROW) : n / A_ROW;
        if constexpr (OF_EXPERTS) chunk = swapped<F>(chunk, its_row);
        copy_async(to + place, from + chunk * 16 + turn * THREADS * 16);
    });
    copy_all_scales<F, Rows, ALL>(to, w, row);
}

// A copy is started by one warp, so that the others need not issue its instructions. Rows come in UNITs: the scales of 8 rows are
// whole pieces of 16 bytes in every format.
constexpr int UNIT = 8;
template <class F, class Rows> constexpr int ROW_BYTES = Rows::NUM_SEGMENTS * F::BYTES;
// The codes of NUM rows of the weight, from `row` on, to the rows from `first` on of Rows, as they lie; in one copy where they lie
// without a gap. `barrier` waits for them.
template <class F, class Rows, int NUM> DEVICE void start_codes(u8* to, const Weight& w, u32 row, int first, u64* barrier) {
    constexpr int SIZE = ROW_BYTES<F, Rows>, STRIDE = Rows::ROW_STRIDE, TOGETHER = STRIDE == SIZE ? NUM : 1;
    const u8* from = w.codes + (size_t)row * SIZE;
    to += first * STRIDE;
    if (!is_bulk_copier()) return;
#pragma unroll 1
    for (int i = 0; i < NUM; i += TOGETHER)
        copy_bulk(to + i * STRIDE, from + i * SIZE, TOGETHER * SIZE, barrier, threadIdx.x & 31, BULK_COPIERS);
}
// And their scales, which the lanes wait for.
template <int NUM, int RUN, int STRIDE> DEVICE void start_scales_of(u8* to, const void* array, u32 row, int first) {
    constexpr int COUNT = RUN / 16;  // rows are one run where they lie without a gap
    static_assert(RUN * NUM % 16 == 0 && STRIDE * UNIT % 16 == 0 && (RUN == STRIDE || RUN % 16 == 0), "pieces of 16 bytes");
    const u8* from = (const u8*)array + (size_t)row * RUN;
    to += first * STRIDE;
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = lane; n < RUN * NUM / 16; n += 32) {
        int place = n * 16;
        if constexpr (RUN != STRIDE) place = n / COUNT * STRIDE + n % COUNT * 16;
        copy_async(to + place, from + n * 16);
    }
}
template <class F, class Rows, int NUM> DEVICE void start_scales(u8* to, const Weight& w, u32 row, int first) {
    if constexpr (F::S) start_scales_of<NUM, Rows::S_RUN, Rows::S_STRIDE>(to + Rows::AT_S, w.s, row, first);
    if constexpr (F::M) start_scales_of<NUM, Rows::M_RUN, Rows::M_STRIDE>(to + Rows::AT_M, w.m, row, first);
    start_scales_of<NUM, Rows::D_RUN, Rows::D_STRIDE>(to + Rows::AT_D, w.d, row, first);
    if constexpr (F::D_M) start_scales_of<NUM, Rows::D_RUN, Rows::D_STRIDE>(to + Rows::AT_D_M, w.d_m, row, first);
}
// All of Rows, by the last warps: the first ones are those that have a row to norm.
template <class F, class Rows> DEVICE void start_rows(u8* to, const Weight& w, u32 row, u64* barrier) {
    static_assert(Rows::HEIGHT % UNIT == 0, "whole units");
#pragma unroll 1
    for (int first = (WARPS - 1 - (int)(threadIdx.x >> 5)) * UNIT; first < Rows::HEIGHT; first += WARPS * UNIT) {
        if (first == 0 && is_bulk_copier()) expect_bulk(barrier, Rows::HEIGHT * ROW_BYTES<F, Rows>);
        start_codes<F, Rows, UNIT>(to, w, row + first, first, barrier);
        start_scales<F, Rows, UNIT>(to, w, row + first, first);
    }
}

// A row that has come as codes and scales; the codes are copied in the background.
template <int INPUTS> DEVICE void copy_row(SharedRow<INPUTS / SEGMENT>& row, const i8* x, const float* x_scales) {
    spread<INPUTS / 16, 0>([&](u32 n, u32) { copy_async(row.codes_of(n / 16) + n % 16 * 16, x + n * 16); });
    spread<INPUTS / 32, INPUTS / 16>([&](u32 n, u32) { row.scales_of(n / 8)[n % 8] = ((const float2*)x_scales)[n]; });
}

// Norm and rounding of a row by all threads: a thread's 8 numbers of some segments. README.md says how.
template <int INPUTS> struct Norm {
    static constexpr int COUNT = INPUTS / SEGMENT, TURNS = (COUNT + WARPS - 1) / WARPS;
    float v[TURNS][8], w[TURNS][8], scale[TURNS];
    int sum[TURNS];

    METHOD static int segment(int turn) { return (int)(threadIdx.x >> 5) + turn * WARPS; }
    METHOD static void load(float (&to)[TURNS][8], const float* from) {
#pragma unroll
        for (int i = 0; i < TURNS; i++)
            if (segment(i) < COUNT) load8(to[i], from + segment(i) * SEGMENT + 8 * (threadIdx.x & 31));
    }
    METHOD void put_squares(float* segment_sums) const {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            if (segment(i) >= COUNT) break;
            float squares = sum_of_squares(v[i]);
            if ((threadIdx.x & 31) == 0) segment_sums[segment(i)] = squares;
        }
    }
    METHOD void multiply() {
#pragma unroll
        for (int i = 0; i < TURNS; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) v[i][j] = v[i][j] * w[i][j];
    }
    METHOD void put_codes(SharedRow<COUNT>& row) {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            if (segment(i) >= COUNT) break;
            uint2 codes;
            quantise(v[i], codes, scale[i], sum[i]);
            *(uint2*)(row.codes_of(segment(i)) + 8 * (threadIdx.x & 31)) = codes;
        }
    }
    METHOD void put_scales(SharedRow<COUNT>& row, float r) const {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            if (segment(i) >= COUNT) break;
            ::put_scales(row.scales_of(segment(i)), scale[i], sum[i], r);
        }
    }
};

// All of it, of a row in global memory; ends before a __syncthreads.
template <int INPUTS>
DEVICE void norm_row(SharedRow<INPUTS / SEGMENT>& row, float* segment_sums, const float* x, const float* g, float eps) {
    Norm<INPUTS> norm;
    norm.load(norm.v, x);
    norm.load(norm.w, g);
    norm.put_squares(segment_sums);
    norm.multiply();
    norm.put_codes(row);
    __syncthreads();
    norm.put_scales(row, inverse_rms<INPUTS>(segment_sums, eps));
}

// A warp's segment of a row that has no norm, rounded.
template <int COUNT> DEVICE void put_segment(SharedRow<COUNT>& row, int segment, const float (&v)[8]) {
    uint2 codes;
    float scale;
    int sum;
    quantise(v, codes, scale, sum);
    *(uint2*)(row.codes_of(segment) + 8 * (threadIdx.x & 31)) = codes;
    put_scales(row.scales_of(segment), scale, sum, 1.f);
}

// One segment of one row of a weight in shared memory, and of inputs.
struct Segment {
    SharedPlace codes, s, m, d, d_m, x, scales;
    u32 swap;  // of the codes, in bytes: SharedRows
};

// Its sum. Inlined, or where DOT_CALLED is set a function: products that alternate then find its code in the nearest cache.
#ifdef DOT_CALLED
#define DOT static __device__ __noinline__
#else
#define DOT METHOD static
#endif
template <class F> struct Dot {
    // High nibbles stay where they are: 16 times the sum, and a sixteenth of d. Both are exact.
    static constexpr bool IN_PLACE = F::BITS == 4 && F::ZERO == 0;

    METHOD static float d_of(const u8* p, int block) {
        if constexpr (F::BLOCK == SEGMENT) return half_to_float(*(const u16*)p);
        if constexpr (F::WIDE_D) return ((const float*)p)[block];
        return half_to_float(((const u16*)p)[block]);
    }

    static_assert(!F::HALF, "floats are summed by tensor cores alone, in their order");
    DOT float multiply(Segment at) {
        const u8 *codes = in_shared(at.codes), *d = in_shared(at.d), *x = in_shared(at.x);
        const u8 *s = in_shared(at.s), *m = in_shared(at.m), *d_m = in_shared(at.d_m);
        const float2* scales = (const float2*)in_shared(at.scales);
        float total = 0;
#pragma unroll 1
        for (int pair = 0; pair < 4; pair++) {  // two blocks of 32 inputs
            u32 s_pair = 0, m_pair = 0;
            if constexpr (F::S) s_pair = F::SPLIT ? ((const u32*)s)[pair] : ((const u16*)s)[pair];
            if constexpr (F::M) m_pair = ((const u16*)m)[pair];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int block = 2 * pair + i;
                float2 scale = scales[block];
                int v[2];
                dot(v, codes, at.swap, x + block * 32, pair, i);
#pragma unroll
                for (int part = 0; part < (F::SPLIT ? 2 : 1); part++) {
                    float by = d_of(d, block) * (IN_PLACE && i == 1 ? 1.f / 16 : 1.f);
                    if constexpr (F::S) by = times<F::SIGNED>(by, (u8)(s_pair >> 8 * (F::SPLIT ? 2 * i + part : i)));
                    total = fmaf((float)v[part] * by, scale.x, total);
                }
                if constexpr (F::D_M) {
                    float md = d_of(d_m, block);
                    if constexpr (F::M) md = times<false>(md, (u8)(m_pair >> 8 * i));
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
    METHOD static void dot(int (&v)[2], const u8* codes, u32 swap, const u8* x, int pair, int i) {
        v[0] = v[1] = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 place = (F::BITS == 4 ? pair * 32 : (2 * pair + i) * 32) + 16 * half;
            uint4 c = *(const uint4*)(codes + (place ^ swap));
            uint4 b = *(const uint4*)(x + 16 * half);
            int& to = v[F::SPLIT ? half : 0];
            to = add_four(to, c.x, b.x, i);
            to = add_four(to, c.y, b.y, i);
            to = add_four(to, c.z, b.z, i);
            to = add_four(to, c.w, b.w, i);
        }
    }
    METHOD static int add_four(int sum, u32 codes, u32 x, int i) {
        if constexpr (IN_PLACE) return dot_of_bytes(codes & (i ? 0xf0f0f0f0u : 0x0f0f0f0fu), x, sum);
        return __dp4a((int)signed_codes<F>(codes, i), (int)x, sum);
    }
};

// The segment of a task, whose row it returns. Where rows lie side by side, neighbours share the inputs that they read.
template <class Rows> DEVICE int row_of(int task, int& segment) {
    constexpr bool BY_SEGMENT = Rows::BY_SEGMENT;
    segment = BY_SEGMENT ? task / Rows::HEIGHT : task % Rows::NUM_SEGMENTS;
    return BY_SEGMENT ? task % Rows::HEIGHT : task / Rows::NUM_SEGMENTS;
}

// Row `row` of Rows at `from`, and segment `input_segment` of inputs.
template <class F, class Rows, int COUNT>
DEVICE float multiply_segment(const u8* from, int row, int segment, SharedRow<COUNT>& input, int input_segment) {
    const u8 *s = from + Rows::at_s(row, segment), *m = from + Rows::at_m(row, segment), *d_m = from + Rows::at_d_m(row, segment);
    return Dot<F>::multiply({place_in_shared(from + Rows::at_codes(row, segment)), place_in_shared(s), place_in_shared(m),
                             place_in_shared(from + Rows::at_d(row, segment)), place_in_shared(d_m),
                             place_in_shared(input.codes_of(input_segment)), place_in_shared(input.scales_of(input_segment)), Rows::swap(row)});
}

// The products of all rows and segments of Rows, and of as many inputs: a sum for each task.
template <class F, class Rows> DEVICE void multiply_rows(float* sums, const u8* from, SharedRow<Rows::NUM_SEGMENTS>& input) {
#pragma unroll 1
    for (int task = threadIdx.x; task < Rows::TASKS; task += THREADS) {
        int segment, row = row_of<Rows>(task, segment);
        sums[task] = multiply_segment<F, Rows>(from, row, segment, input, segment);
    }
}

// A row's, from the sums of the tasks.
template <class Rows> DEVICE float total(const float* sums, int row) {
    constexpr bool BY_SEGMENT = Rows::BY_SEGMENT;
    sums += BY_SEGMENT ? row : row * Rows::NUM_SEGMENTS;
    float sum = sums[0];
#pragma unroll
    for (int i = 1; i < Rows::NUM_SEGMENTS; i++) sum = sum + sums[BY_SEGMENT ? i * Rows::HEIGHT : i];
    return sum;
}

// The same of gate and up of one expert, whose rows lie one after the other: gate's sums, then up's.
template <class FG, class Gate, class FU, class Up>
DEVICE void multiply_gate_up(float* sums, const u8* from, SharedRow<Gate::NUM_SEGMENTS>& input) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * Gate::TASKS; i += THREADS) {
        bool is_up = i >= Gate::TASKS;
        int segment, row = row_of<Gate>(is_up ? i - Gate::TASKS : i, segment);
        float& sum = sums[i];
        if (IS_SAME<FG, FU> || !is_up)  // weights of one format share the code: less of it to fetch
            sum = multiply_segment<FG, Gate>(from + (is_up ? Gate::SIZE : 0), row, segment, input, segment);
        else
            sum = multiply_segment<FU, Up>(from + Gate::SIZE, row, segment, input, segment);
    }
}

// The same of all experts' down: expert j's rows lie at place(j), its inputs follow those of j - 1.
template <class F, class Rows, class Place, int ALL> DEVICE void multiply_down(float* sums, Place place, SharedRow<ALL>& input) {
#pragma unroll 1
    for (int i = threadIdx.x; i < ALL * Rows::HEIGHT; i += THREADS) {
        int j = i / Rows::TASKS, segment, row = row_of<Rows>(i % Rows::TASKS, segment), from = j * Rows::NUM_SEGMENTS + segment;
        sums[i] = multiply_segment<F, Rows>(place(j), row, segment, input, from);
    }
}

// The weighted sum of a row's experts, from the sums of multiply_down.
template <class Rows, int EXPERTS> DEVICE float sum_of_experts(const float* sums, const float (&shares)[EXPERTS], int row) {
    float sum = shares[0] * total<Rows>(sums, row);
#pragma unroll
    for (int j = 1; j < EXPERTS; j++) sum = fmaf(shares[j], total<Rows>(sums + j * Rows::TASKS, row), sum);
    return sum;
}

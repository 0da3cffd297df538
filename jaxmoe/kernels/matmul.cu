// Products of packed weights with int8 activations: dense, and grouped by expert. README.md gives the order of sums.
//
// The launch's macros choose: NAME the kernel's name; K the inputs, FORMAT_i and ROWS_i format and rows of each
// weight; MATRICES the matrices in a stack (experts, or 1); NORMS the norms in their stack. Arguments that a
// variant does not have are not passed.
#include "common.cuh"

// How a weight lies in memory: see QuantTensor in quants.py. HALF: 1 for float16 codes, 2 for bfloat16.
template <int BITS_, int GROUP_, int BLOCK_, int ZERO_, bool S_, bool M_, bool D_M_, bool WIDE_D_, int HALF_ = 0>
struct Format {
    static constexpr int BITS = BITS_, BLOCK = BLOCK_, ZERO = ZERO_, HALF = HALF_;
    static constexpr bool S = S_, M = M_, D_M = D_M_, WIDE_D = WIDE_D_, SPLIT = GROUP_ == 16;
    static constexpr bool SIGNED = S && !M;                // s is int8; uint8 where there is an m
    static constexpr int BYTES = SEGMENT * BITS / 8;       // of a row's segment
    static constexpr int WORD = HALF ? 16 : 8;             // bytes a lane reads at once
    static constexpr int WORDS = BYTES / (4 * WORD);       // such reads in a segment
    static constexpr int BLOCKS_A_WORD = 8 / WORDS;        // blocks of 32 inputs in one read
    static_assert(HALF ? BITS == 16 : BITS == 4 || BITS == 8, "codes have 4, 8 or 16 bits");
    static_assert(!SPLIT || !D_M, "groups of 16 have no minimum here");
};

struct Weight {
    const u8* codes;
    const i8* s;
    const i8* m;
    const void* d;
    const void* d_m;
};
DEVICE Weight choose(bool first, const Weight& a, const Weight& b) {
    return {first ? a.codes : b.codes, first ? a.s : b.s, first ? a.m : b.m, first ? a.d : b.d, first ? a.d_m : b.d_m};
}
#define WEIGHT(n) const u8 *codes_##n, const i8 *s_##n, const i8 *m_##n, const void *d_##n, const void *d_m_##n
#define GIVEN(n) Weight{codes_##n, s_##n, m_##n, d_##n, d_m_##n}

constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: added to an integer below 2^22 it gives its float's low bits
constexpr int MAGIC_BITS = 0x4B400000;

// --- Scales of one row's segment.

template <class F> constexpr int FACTOR_WORDS = F::BLOCK == SEGMENT ? 1 : F::WIDE_D ? 8 : 4;

template <class F> DEVICE void read_factors(u32 (&words)[FACTOR_WORDS<F>], const void* base, size_t row, int segment) {
    if constexpr (F::BLOCK == SEGMENT) {
        words[0] = ((const u16*)base)[row * (K / SEGMENT) + segment];
    } else {
        const uint4* p = (const uint4*)((const u8*)base + (row * (K / 32) + segment * 8) * (F::WIDE_D ? 4 : 2));
#pragma unroll
        for (int i = 0; i < FACTOR_WORDS<F> / 4; i++) {
            uint4 v = p[i];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    }
}

template <class F> DEVICE float factor(const u32 (&words)[FACTOR_WORDS<F>], int block) {
    if constexpr (F::BLOCK == SEGMENT) return half_to_float((u16)words[0]);
    if constexpr (F::WIDE_D) return __uint_as_float(words[block % FACTOR_WORDS<F>]);
    return half_to_float((u16)(words[(block / 2) % FACTOR_WORDS<F>] >> (16 * (block & 1))));
}

// d times byte i of the words, exactly: the byte becomes the low bits of a float of 2^23, which the
// multiply-add takes off again (a power of two times d is exact). To signed ones 128 is added first.
template <class F> DEVICE float times_byte(float d, const u32* words, int i) {
    u32 word = F::SIGNED ? words[i >> 2] ^ 0x80808080u : words[i >> 2];
    float byte = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7540 | (i & 3)));
    return F::SIGNED ? (byte - 8388736.f) * d : fmaf(byte, d, -8388608.f * d);
}

template <class F> struct Scales {  // of a lane's two rows
    static constexpr int S_WORDS = F::SPLIT ? 4 : 2;
    u32 s[2][S_WORDS], m[2][2], d[2][FACTOR_WORDS<F>], d_m[2][FACTOR_WORDS<F>];

    METHOD void read(const Weight& w, size_t row, int segment) {
        if constexpr (F::HALF) return;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            size_t at = row + 8 * h;
            read_factors<F>(d[h], w.d, at, segment);
            if constexpr (F::D_M) read_factors<F>(d_m[h], w.d_m, at, segment);
            if constexpr (F::S) {
                const u32* p = (const u32*)(w.s + at * (K / (F::SPLIT ? 16 : 32)) + segment * 4 * S_WORDS);
                if constexpr (F::SPLIT) {
                    uint4 v = *(const uint4*)p;
                    s[h][0] = v.x, s[h][1] = v.y, s[h][2] = v.z, s[h][3] = v.w;
                } else {
                    uint2 v = *(const uint2*)p;
                    s[h][0] = v.x, s[h][1] = v.y;
                }
            }
            if constexpr (F::M) {
                uint2 v = *(const uint2*)(w.m + at * (K / 32) + segment * 8);
                m[h][0] = v.x, m[h][1] = v.y;
            }
        }
    }
    // d * s of group `part` of a block, and what takes MAGIC off again
    METHOD void scale(int h, int block, int part, float& sd, float& minus_magic) const {
        sd = factor<F>(d[h], block);
        if constexpr (F::S) sd = times_byte<F>(sd, s[h], F::SPLIT ? 2 * block + part : block);
        minus_magic = -MAGIC * sd;
    }
    METHOD float minimum(int h, int block) const {
        float md = factor<F>(d_m[h], block);
        if constexpr (F::M) md = times_byte<F>(md, m[h], block);
        return -md;
    }
};

// --- One block of 32 inputs: 16 rows times 8 * TILES columns. Lane l has rows l/4, l/4 + 8 and columns
// 2 * (l%4), 2 * (l%4) + 1 of each tile; inputs are taken in the order lane by lane, 8 each.

template <class F> struct Codes {  // a lane's codes of its two rows, for BLOCKS_A_WORD blocks
    u32 low[F::WORD / 4], high[F::WORD / 4];

    template <bool ONCE> METHOD void read(const u8* p, size_t stride) {  // p: the first of the lane's rows
        read_row<ONCE>(low, p);
        read_row<ONCE>(high, p + 8 * stride);
    }
    template <bool ONCE> static METHOD void read_row(u32 (&out)[F::WORD / 4], const u8* p) {
        if constexpr (F::WORD == 16) {
            uint4 v = ONCE ? load_once((const uint4*)p) : *(const uint4*)p;
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        } else {
            uint2 v = ONCE ? load_once((const uint2*)p) : *(const uint2*)p;
            out[0] = v.x, out[1] = v.y;
        }
    }
};

template <class F> DEVICE u32 signed_codes(u32 word, int block) {
    if constexpr (F::BITS == 8) return word;
    u32 codes = (block & 1 ? word >> 4 : word) & 0x0f0f0f0fu;
    if constexpr (F::ZERO != 0) codes = ((codes | 0x80808080u) - F::ZERO * 0x01010101u) ^ 0x80808080u;
    return codes;
}

DEVICE u32 two_halves(u32 word, int first, bool brain) {
    float low = (float)(i8)(word >> (8 * first)), high = (float)(i8)(word >> (8 * first + 8));
    return brain ? pack_bfloat16(low, high) : pack_half(low, high);
}

// 16 rows of one block, ready to meet the columns: x is the lane's 8 inputs of column l/4 of a tile, `scales`
// (scale, scale * sum) of its two columns there.
template <class F> struct Block {
    static constexpr int PARTS = F::SPLIT ? 2 : 1;
    u32 a[F::HALF ? 8 : 4];
    float sd[PARTS][2], minus_magic[PARTS][2], minimum[2];

    template <class Factors> METHOD Block(const Codes<F>& codes, const Factors& factors, int block) {
        if constexpr (F::HALF != 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[2 * i] = codes.low[i], a[2 * i + 1] = codes.high[i];
            return;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            a[2 * i] = signed_codes<F>(codes.low[i], block);
            a[2 * i + 1] = signed_codes<F>(codes.high[i], block);
        }
        if constexpr (!F::HALF)
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int part = 0; part < PARTS; part++) factors.scale(h, block, part, sd[part][h], minus_magic[part][h]);
                if constexpr (F::D_M) minimum[h] = factors.minimum(h, block);
            }
    }
    // STEP 2: only the first of the lane's two columns counts.
    template <int STEP = 1> METHOD void add(float (&sums)[4], uint2 x, float4 scales) const {
        if constexpr (F::HALF != 0) {
            add_floats(sums, x, scales);
            return;
        }
        bool first_half = (threadIdx.x & 2) == 0;  // the lane's inputs lie in the block's first group of 16
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            bool counts = !F::SPLIT || first_half == (part == 0);
            int v[4];
            mma_int8(v, a[0], a[1], a[2], a[3], counts ? x.x : 0u, counts ? x.y : 0u, MAGIC_BITS);
#pragma unroll
            for (int e = 0; e < 4; e += STEP) {
                float t = fmaf(__int_as_float(v[e]), sd[part][e >> 1], minus_magic[part][e >> 1]);
                sums[e] = fmaf(t, e & 1 ? scales.z : scales.x, sums[e]);
            }
        }
        if constexpr (F::D_M)
#pragma unroll
            for (int e = 0; e < 4; e += STEP) sums[e] = fmaf(minimum[e >> 1], e & 1 ? scales.w : scales.y, sums[e]);
    }
    METHOD void add_floats(float (&sums)[4], uint2 x, float4 scales) const {
        constexpr bool brain = F::HALF == 2;
        float v[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 word = i ? x.y : x.x, b0 = two_halves(word, 0, brain), b1 = two_halves(word, 2, brain);
            const u32* from = a + (F::HALF ? 4 * i : 0);
            if constexpr (brain)
                mma_bfloat16(v, from[0], from[1], from[2], from[3], b0, b1);
            else
                mma_half(v, from[0], from[1], from[2], from[3], b0, b1);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) sums[e] = fmaf(v[e], e & 1 ? scales.z : scales.x, sums[e]);
    }
};

// --- Few columns: a warp takes 16 rows of one segment, so that all of a block's weights are on their way at
// once; the segments meet in shared memory.

template <class F> struct Unit {
    Codes<F> codes[F::WORDS];
    Scales<F> scales;

    METHOD void read(const Weight& w, size_t first_row, int segment) {
        int lane = threadIdx.x & 31;
        size_t row = first_row + (lane >> 2);
        constexpr size_t stride = (size_t)K * F::BITS / 8;
        const u8* p = w.codes + row * stride + segment * F::BYTES + (lane & 3) * F::WORD;
#pragma unroll
        for (int i = 0; i < F::WORDS; i++) codes[i].template read<true>(p + i * 4 * F::WORD, stride);
        scales.read(w, row, segment);
    }
    template <int TILES, class Inputs> METHOD void multiply(float (&sums)[TILES][4], const Inputs& inputs, int segment) const {
#pragma unroll
        for (int n = 0; n < TILES; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
#pragma unroll
        for (int block = 0; block < 8; block++) {
            Block<F> weights(codes[block / F::BLOCKS_A_WORD], scales, block);
#pragma unroll
            for (int n = 0; n < TILES; n++)
                weights.template add<Inputs::STEP>(sums[n], inputs.codes(n, segment, block), inputs.scales(n, segment, block));
        }
    }
};

// One row of inputs in shared memory, the same in every column.
template <int INPUTS> struct SharedRow {
    static constexpr int STEP = 2;
    uint2 codes_[INPUTS / 8];
    float2 scales_[INPUTS / 32];
    METHOD uint2 codes(int, int segment, int block) const { return codes_[segment * 32 + block * 4 + (threadIdx.x & 3)]; }
    METHOD float4 scales(int, int segment, int block) const {
        float2 s = scales_[segment * 8 + block];
        return make_float4(s.x, s.y, s.x, s.y);
    }
};

// Rows of inputs in global memory; lane l reads the codes of its column l/4 and the scales of two columns.
template <int TILES, int INPUTS, int STEP_ = 1> struct GlobalRows {
    static constexpr int STEP = STEP_;
    const u8* codes_[TILES];
    const float2 *first[TILES], *second[TILES];
    METHOD uint2 codes(int n, int segment, int block) const {
        return *(const uint2*)(codes_[n] + segment * SEGMENT + block * 32);
    }
    METHOD float4 scales(int n, int segment, int block) const {
        float2 a = first[n][segment * 8 + block], b = second[n][segment * 8 + block];
        return make_float4(a.x, a.y, b.x, b.y);
    }
    template <class Row> METHOD void at(const i8* codes, const float* scales, Row row) {  // row(column) -> row of the inputs
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            codes_[n] = (const u8*)codes + (size_t)row(8 * n + (lane >> 2)) * INPUTS + (lane & 3) * 8;
            first[n] = (const float2*)scales + (size_t)row(8 * n + 2 * (lane & 3)) * (INPUTS / 32);
            second[n] = (const float2*)scales + (size_t)row(8 * n + 2 * (lane & 3) + 1) * (INPUTS / 32);
        }
    }
};

// Norm and rounding of one row by all threads of a block, into shared memory: see README.md.
template <int INPUTS, int NUM_THREADS>
DEVICE void normed_row(SharedRow<INPUTS>& row, float* segment_sums, const float* x, const float* g, float eps) {
    constexpr int SEGMENTS = INPUTS / SEGMENT, WARPS = NUM_THREADS / 32, TURNS = (SEGMENTS + WARPS - 1) / WARPS;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float scale[TURNS];
    int sum[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= SEGMENTS) break;
        float v[8], w[8];
        load8(v, x + segment * SEGMENT + 8 * lane);
        load8(w, g + segment * SEGMENT + 8 * lane);
        float squares = sum_of_squares(v);
        if (lane == 0) segment_sums[segment] = squares;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = v[j] * w[j];
        quantise(v, row.codes_[segment * 32 + lane], scale[i], sum[i]);
    }
    __syncthreads();
    float r = inverse_rms<INPUTS>(segment_sums, eps);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= SEGMENTS) break;
        float s = scale[i] * r;
        if ((lane & 3) == 0) row.scales_[segment * 8 + (lane >> 2)] = make_float2(s, s * (float)sum[i]);
    }
    __syncthreads();
}

// The sums of a unit [16, COLUMNS] in shared memory; a column more keeps the banks apart.
template <int COLUMNS> struct Partial {
    float sums[16][COLUMNS + (COLUMNS > 1)];
    template <int TILES> METHOD void put(const float (&from)[TILES][4]) {
        int lane = threadIdx.x & 31, row = lane >> 2, column = 2 * (lane & 3);
        if constexpr (COLUMNS == 1) {
            if (column == 0) sums[row][0] = from[0][0], sums[row + 8][0] = from[0][2];
        } else {
#pragma unroll
            for (int n = 0; n < TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[row + 8 * (e >> 1)][8 * n + column + (e & 1)] = from[n][e];
        }
    }
};
template <int COUNT, int COLUMNS> DEVICE float total(const Partial<COLUMNS>* parts, int row, int column) {
    float sum = parts[0].sums[row][column];
#pragma unroll
    for (int i = 1; i < COUNT; i++) sum = sum + parts[i].sums[row][column];
    return sum;
}

DEVICE float swiglu(float gate, float up) {
    return __fdiv_rn(gate, 1.f + exp2_fast(gate * -1.44269504f)) * up;
}

constexpr int SEGMENTS = K / SEGMENT;

// 32 rows of h for each column, from shared memory [columns][H_STRIDE], to int8 in global memory.
constexpr int H_STRIDE = 36;
template <class Place> DEVICE void put_hidden(const float* h, int num_columns, int width, int first, i8* codes, float* scales, Place place) {
    int quarter = threadIdx.x & 3;
    for (int c0 = 0; c0 < num_columns; c0 += blockDim.x / 4) {
        int column = c0 + (threadIdx.x >> 2);
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = column < num_columns ? h[column * H_STRIDE + quarter * 8 + i] : 0.f;
        uint2 words;
        float scale;
        int sum;
        quantise(v, words, scale, sum);
        if (column < num_columns) {
            size_t at = (size_t)place(column) * width + first;
            ((uint2*)(codes + at))[quarter] = words;
            if (quarter == 0) ((float2*)scales)[at / 32] = make_float2(scale, scale * (float)sum);
        }
    }
}

extern __shared__ __align__(16) u8 shared[];

DEVICE int stack_index() { return launch_number<SHARED_SIZE>() / NORMS; }
DEVICE int norm_layer() { return launch_number<SHARED_SIZE>() % NORMS; }

// ONE_ROW: a single row of inputs, so COLUMNS is 1 and what comes before and after is done in the same kernel.
#ifdef ONE_ROW
constexpr int COLUMNS = 1, TILES = 1;
#elif defined(COLUMN_TILES)
constexpr int TILES = COLUMN_TILES, COLUMNS = 8 * TILES;
#endif

#ifdef GROUPED
// A tile of one expert's pairs (token, expert): see router.cu. Columns past the last repeat it.
struct PairTile {
    const int* pairs;
    int expert, count;
    METHOD PairTile(const int* pairs_, const int* tiles) {
        int4 tile = ((const int4*)tiles)[blockIdx.y];
        expert = tile.x, count = tile.z;
        pairs = pairs_ + (size_t)expert * NUM_ROWS + tile.y;
    }
    METHOD int pair(int column) const { return pairs[min(column, count - 1)]; }
};
#endif

// ------------------------------------------------------------------------------------------------ few rows
#ifdef FEW
constexpr int WARPS = THREADS / 32;

#ifdef DENSE
constexpr int UNITS = SEGMENTS, TURNS = (UNITS + WARPS - 1) / WARPS;
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;

template <class F>
DEVICE void dense(const Weight& w, int rows, int row, int out_row,
#ifdef ONE_ROW_NORMED
                  const float* x, const float* norm,
#else
                  const i8* codes, const float* scales,
#endif
                  const float* residual, const int* count, float* out) {
    int warp = threadIdx.x >> 5, num_columns = count[0];
    Unit<F> units[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment < SEGMENTS) units[i].read(w, (size_t)stack_index() * rows + row, segment);
    }
    auto* parts = (Partial<COLUMNS>*)shared;
    static_assert(sizeof(Partial<COLUMNS>) * SEGMENTS <= SHARED_SIZE, "a partial sum a segment must fit");
#ifdef ONE_ROW_NORMED
    __shared__ SharedRow<K> inputs;
    __shared__ float segment_sums[SEGMENTS];
    normed_row<K, THREADS>(inputs, segment_sums, x, norm + (size_t)norm_layer() * K, EPS);
#else
    GlobalRows<TILES, K, COLUMNS == 1 ? 2 : 1> inputs;
    inputs.at(codes, scales, [](int column) { return COLUMNS == 1 ? 0 : blockIdx.x * COLUMNS + column; });
#endif
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= SEGMENTS) break;
        float sums[TILES][4];
        units[i].template multiply<TILES>(sums, inputs, segment);
        parts[segment].put(sums);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * COLUMNS; i += THREADS) {
        int column = blockIdx.x * COLUMNS + i / 16, r = i % 16;
        if (column >= num_columns) break;
        size_t at = (size_t)column * ALL_ROWS + out_row + r;
        float sum = total<SEGMENTS>(parts, r, i / 16);
#ifdef RESIDUAL
        sum = residual[at] + sum;
#endif
        out[at] = sum;
    }
}

KERNEL(THREADS, BLOCKS_AN_SM) NAME(
#ifdef ONE_ROW_NORMED
    const float* x, const float* norm,
#define GIVEN_INPUTS x, norm
#else
    const i8* codes, const float* scales,
#define GIVEN_INPUTS codes, scales
#endif
    WEIGHT(0),
#if ROWS_1
    WEIGHT(1), WEIGHT(2),
#endif
#ifdef RESIDUAL
    const float* residual,
#else
#define residual nullptr
#endif
    const int* count, float* out) {
    int row = blockIdx.y * 16;
    if (row < ROWS_0) {
        dense<FORMAT_0>(GIVEN(0), ROWS_0, row, row, GIVEN_INPUTS, residual, count, out);
        return;
    }
#if ROWS_1
    if (row < ROWS_0 + ROWS_1)
        dense<FORMAT_1>(GIVEN(1), ROWS_1, row - ROWS_0, row, GIVEN_INPUTS, residual, count, out);
    else
        dense<FORMAT_2>(GIVEN(2), ROWS_2, row - ROWS_0 - ROWS_1, row, GIVEN_INPUTS, residual, count, out);
#endif
}
#endif  // DENSE

#if defined(GATE_UP) && defined(ONE_ROW)
// h = silu(gate) * up for 16 of the F rows of one expert; a warp has a segment of both.
constexpr int TURNS = (SEGMENTS + WARPS - 1) / WARPS;

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const float* x, const float* norm, const int* ids, WEIGHT(0), WEIGHT(1), float* out) {
    int expert = ids[blockIdx.y], warp = threadIdx.x >> 5, first = blockIdx.x * 16;
    size_t row = ((size_t)stack_index() * MATRICES + expert) * ROWS_0 + first;
    Unit<FORMAT_0> gates[TURNS];
    Unit<FORMAT_1> ups[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= SEGMENTS) break;
        gates[i].read(GIVEN(0), row, segment);
        ups[i].read(GIVEN(1), row, segment);
    }
    __shared__ Partial<1> gate_parts[SEGMENTS], up_parts[SEGMENTS];
    __shared__ SharedRow<K> inputs;
    __shared__ float segment_sums[SEGMENTS];
    normed_row<K, THREADS>(inputs, segment_sums, x, norm + (size_t)norm_layer() * K, EPS);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= SEGMENTS) break;
        float sums[1][4];
        gates[i].template multiply<1>(sums, inputs, segment);
        gate_parts[segment].put(sums);
        ups[i].template multiply<1>(sums, inputs, segment);
        up_parts[segment].put(sums);
    }
    __syncthreads();
    if (threadIdx.x < 16) {
        float gate = total<SEGMENTS>(gate_parts, threadIdx.x, 0), up = total<SEGMENTS>(up_parts, threadIdx.x, 0);
        out[blockIdx.y * ROWS_0 + first + threadIdx.x] = swiglu(gate, up);
    }
}
#elif defined(GATE_UP)
// h = silu(gate) * up for 32 of the F rows and a tile of pairs, rounded. Units are (gate or up, 16 rows, segment),
// in turns: while one is multiplied the next one's weights are on their way.
constexpr int UNITS = 2 * SEGMENTS, TURNS = (UNITS + WARPS - 1) / WARPS;

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), WEIGHT(1), i8* out_codes, float* out_scales) {
    if (blockIdx.y >= num_tiles[0]) return;
    PairTile tile(pairs, tiles);
    int warp = threadIdx.x >> 5, first = blockIdx.x * 32, num_columns = tile.count;
    size_t row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    __shared__ Partial<COLUMNS> gate_parts[UNITS], up_parts[UNITS];
    __shared__ float h[COLUMNS * H_STRIDE];
    Unit<FORMAT_0> gate;
    Unit<FORMAT_1> up;
    auto at = [&](int unit) { return row + 16 * (unit / SEGMENTS); };
    if (warp < UNITS) gate.read(GIVEN(0), at(warp), warp % SEGMENTS);
    GlobalRows<TILES, K> inputs;
    inputs.at(codes, scales, [&](int column) { return tile.pair(column) / ACTIVE; });
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS, next = unit + WARPS;
        if (unit >= UNITS) break;
        up.read(GIVEN(1), at(unit), unit % SEGMENTS);
        float sums[TILES][4];
        gate.template multiply<TILES>(sums, inputs, unit % SEGMENTS);
        gate_parts[unit].put(sums);
        if (i + 1 < TURNS && next < UNITS) gate.read(GIVEN(0), at(next), next % SEGMENTS);
        up.template multiply<TILES>(sums, inputs, unit % SEGMENTS);
        up_parts[unit].put(sums);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * num_columns; i += THREADS) {
        int column = i / 32, r = i % 32, part = r / 16 * SEGMENTS;
        float gate_sum = total<SEGMENTS>(gate_parts + part, r % 16, column);
        float up_sum = total<SEGMENTS>(up_parts + part, r % 16, column);
        h[column * H_STRIDE + r] = swiglu(gate_sum, up_sum);
    }
    __syncthreads();
    put_hidden(h, num_columns, ROWS_0, first, out_codes, out_scales, [&](int column) { return tile.pair(column); });
}
#endif  // GATE_UP

#if defined(DOWN) && defined(ONE_ROW)
// All A experts of 16 rows, weighted and added to the residual. A unit rounds its own segment of h.
constexpr int UNITS = ACTIVE * SEGMENTS, TURNS = (UNITS + WARPS - 1) / WARPS;

struct SharedSegment {
    static constexpr int STEP = 2;
    uint2 codes_[SEGMENT / 8];
    float2 scales_[8];
    METHOD uint2 codes(int, int, int block) const { return codes_[block * 4 + (threadIdx.x & 3)]; }
    METHOD float4 scales(int, int, int block) const {
        float2 s = scales_[block];
        return make_float4(s.x, s.y, s.x, s.y);
    }
    METHOD void round(const float (&v)[8]) {
        int lane = threadIdx.x & 31, sum;
        float scale;
        quantise(v, codes_[lane], scale, sum);
        if ((lane & 3) == 0) scales_[lane >> 2] = make_float2(scale, scale * (float)sum);
        __syncwarp();
    }
};

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const float* hidden, const int* ids, const float* weights, const float* residual, WEIGHT(0), float* out) {
    __shared__ Partial<1> parts[UNITS];
    __shared__ SharedSegment inputs[WARPS];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = blockIdx.x * 16;
    Unit<FORMAT_0> units[TURNS];
    float h[TURNS][8], x, shares[ACTIVE];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS;
        if (unit >= UNITS) break;
        int expert = ids[unit / SEGMENTS];
        load8(h[i], hidden + unit * SEGMENT + 8 * lane);
        units[i].read(GIVEN(0), ((size_t)stack_index() * MATRICES + expert) * ROWS_0 + first, unit % SEGMENTS);
    }
    if (threadIdx.x < 16) {
        x = residual[first + threadIdx.x];
#pragma unroll
        for (int j = 0; j < ACTIVE; j++) shares[j] = weights[j];
    }
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS;
        if (unit >= UNITS) break;
        __syncwarp();
        inputs[warp].round(h[i]);
        float sums[1][4];
        units[i].template multiply<1>(sums, inputs[warp], unit % SEGMENTS);
        parts[unit].put(sums);
    }
    __syncthreads();
    if (threadIdx.x < 16) {
        float sum = shares[0] * total<SEGMENTS>(parts, threadIdx.x, 0);
#pragma unroll
        for (int j = 1; j < ACTIVE; j++) sum = fmaf(shares[j], total<SEGMENTS>(parts + j * SEGMENTS, threadIdx.x, 0), sum);
        out[first + threadIdx.x] = x + sum;
    }
}
#elif defined(DOWN)
// y of each pair of a tile, 16 * ROW_TILES rows a block.
constexpr int UNITS = ROW_TILES * SEGMENTS, TURNS = (UNITS + WARPS - 1) / WARPS;

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), float* out) {
    if (blockIdx.y >= num_tiles[0]) return;
    PairTile tile(pairs, tiles);
    int warp = threadIdx.x >> 5, first = blockIdx.x * 16 * ROW_TILES;
    size_t matrix_row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    Unit<FORMAT_0> units[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS;
        if (unit >= UNITS) break;
        units[i].read(GIVEN(0), matrix_row + 16 * (unit / SEGMENTS), unit % SEGMENTS);
    }
    __shared__ Partial<COLUMNS> parts[UNITS];
    GlobalRows<TILES, K> inputs;
    inputs.at(codes, scales, [&](int column) { return tile.pair(column); });
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS;
        if (unit >= UNITS) break;
        float sums[TILES][4];
        units[i].template multiply<TILES>(sums, inputs, unit % SEGMENTS);
        parts[unit].put(sums);
    }
    __syncthreads();
    constexpr int ROWS = 16 * ROW_TILES;
    for (int i = threadIdx.x; i < ROWS * tile.count; i += THREADS) {
        int column = i / ROWS, r = i % ROWS;
        out[(size_t)tile.pair(column) * ROWS_0 + first + r] = total<SEGMENTS>(parts + r / 16 * SEGMENTS, r % 16, column);
    }
}
#endif
#endif  // FEW

// ----------------------------------------------------------------------------------------------- many rows
#ifdef MANY
// A block: two halves of 64 rows (of one weight, or of gate and up) times 64 columns, segment after segment
// through shared memory; a warp: 32 rows times 32 columns.
constexpr int MANY_COLUMNS = 64, HALF_ROWS = 64, X_STRIDE = SEGMENT + 32, SCALE_STRIDE = 80;

template <class A, class B> constexpr bool IS_SAME = false;
template <class A> constexpr bool IS_SAME<A, A> = true;
template <class F> constexpr int CODE_STRIDE = F::BYTES + 32;
constexpr int FACTOR_STRIDE = 36;  // floats of a row: 4 for each block, and some to keep the banks apart

template <class F0, class F1> struct Stage {
    static constexpr int SECOND = HALF_ROWS * CODE_STRIDE<F0>, X = SECOND + HALF_ROWS * CODE_STRIDE<F1>;
    static constexpr int SCALES = X + MANY_COLUMNS * X_STRIDE, SIZE = SCALES + MANY_COLUMNS * SCALE_STRIDE;
    static constexpr int FACTORS = 2 * SIZE;  // after the two stages
    static_assert(FACTORS + 2 * HALF_ROWS * FACTOR_STRIDE * 4 <= SHARED_SIZE, "two stages and the scales must fit");
};

template <class F> DEVICE void stage_codes(u8* to, const Weight& w, size_t first_row, int segment) {
    constexpr int CHUNKS = F::BYTES / 16;
    constexpr size_t stride = (size_t)K * F::BITS / 8;
    const u8* from = w.codes + first_row * stride + segment * F::BYTES;
#pragma unroll 1
    for (int i = 0; i < HALF_ROWS * CHUNKS / THREADS; i++) {
        int chunk = threadIdx.x + i * THREADS, row = chunk / CHUNKS, at = chunk % CHUNKS * 16;
        copy_async(to + row * CODE_STRIDE<F> + at, from + row * stride + at);
    }
}

// The scales of 4 blocks of one row on their way to shared memory: a thread reads them a segment ahead.
template <class F> struct RowScales {
    static constexpr int D_WORDS = F::BLOCK == SEGMENT ? 1 : F::WIDE_D ? 4 : 2, S_WORDS = F::SPLIT ? 2 : 1;
    u32 d[D_WORDS], d_m[D_WORDS], s[S_WORDS], m;

    METHOD void read(const Weight& w, size_t row, int segment, int first) {  // first block: 0 or 4
        if constexpr (F::HALF) return;
        read_d(d, w.d, row, segment, first);
        if constexpr (F::D_M) read_d(d_m, w.d_m, row, segment, first);
        size_t block = row * (K / 32) + segment * 8 + first;
#pragma unroll
        for (int i = 0; i < S_WORDS; i++)
            if constexpr (F::S) s[i] = ((const u32*)(w.s + block * S_WORDS))[i];
        if constexpr (F::M) m = *(const u32*)(w.m + block);
    }
    METHOD static void read_d(u32 (&words)[D_WORDS], const void* base, size_t row, int segment, int first) {
        if constexpr (F::BLOCK == SEGMENT) {
            words[0] = ((const u16*)base)[row * (K / SEGMENT) + segment];
        } else {
            const u32* p = (const u32*)((const u8*)base + (row * (K / 32) + segment * 8 + first) * (F::WIDE_D ? 4 : 2));
#pragma unroll
            for (int i = 0; i < D_WORDS; i++) words[i] = p[i];
        }
    }
    METHOD static float d_of(const u32 (&words)[D_WORDS], int block) {
        if constexpr (F::BLOCK == SEGMENT) return half_to_float((u16)words[0]);
        if constexpr (F::WIDE_D) return __uint_as_float(words[block % D_WORDS]);
        return half_to_float((u16)(words[block / 2 % D_WORDS] >> (16 * (block & 1))));
    }
    METHOD void put(float* to) const {  // 4 blocks of (scale of the first part, of the second, minus the minimum)
        if constexpr (F::HALF) return;
#pragma unroll
        for (int block = 0; block < 4; block++) {
            float4 f = make_float4(d_of(d, block), 0.f, 0.f, 0.f);
            f.y = f.x;
            if constexpr (F::S) {
                f.x = times_byte<F>(f.x, s, F::SPLIT ? 2 * block : block);
                if constexpr (F::SPLIT) f.y = times_byte<F>(f.y, s, 2 * block + 1);
            }
            if constexpr (F::D_M) {
                f.z = d_of(d_m, block);
                if constexpr (F::M) f.z = times_byte<F>(f.z, &m, block);
                f.z = -f.z;
            }
            ((float4*)to)[block] = f;
        }
    }
};
struct SharedFactors {  // of a lane's two rows and one block
    float4 of[2];
    METHOD SharedFactors(const float* p) : of{*(const float4*)p, *(const float4*)(p + 8 * FACTOR_STRIDE)} {}
    METHOD void scale(int h, int, int part, float& sd, float& minus_magic) const {
        sd = part ? of[h].y : of[h].x;
        minus_magic = -MAGIC * sd;
    }
    METHOD float minimum(int h, int) const { return of[h].z; }
};

DEVICE void stage_inputs(u8* x, u8* s, const i8* codes, const float* scales, const int* rows, int segment) {
#pragma unroll 1  // unrolled, its addresses would take the registers of the sums
    for (int i = 0; i < MANY_COLUMNS * 16 / THREADS; i++) {
        int chunk = threadIdx.x + i * THREADS, row = chunk / 16, at = chunk % 16 * 16;
        copy_async(x + row * X_STRIDE + at, codes + (size_t)rows[row] * K + segment * SEGMENT + at);
    }
    for (int chunk = threadIdx.x; chunk < MANY_COLUMNS * 4; chunk += THREADS) {
        int row = chunk / 4, at = chunk % 4 * 16;
        copy_async(s + row * SCALE_STRIDE + at, (const u8*)scales + ((size_t)rows[row] * (K / 32) + segment * 8) * 8 + at);
    }
}

// One segment for the warp's 32 x 32; codes, inputs and factors are those of this warp in the stage.
template <class F>
DEVICE void multiply_stage(float (&sums)[2][4][4], const u8* codes, const u8* x, const u8* s, const float* factors) {
    int lane = threadIdx.x & 31;
    const u8* mine = codes + (lane >> 2) * CODE_STRIDE<F> + (lane & 3) * F::WORD;
    const float* my_factors = factors + (lane >> 2) * FACTOR_STRIDE;
    x += (lane >> 2) * X_STRIDE + (lane & 3) * 8, s += 2 * (lane & 3) * SCALE_STRIDE;
#pragma unroll 1
    for (int word = 0; word < F::WORDS; word++) {
        Codes<F> words[2];
#pragma unroll
        for (int t = 0; t < 2; t++) words[t].template read<false>(mine + 16 * t * CODE_STRIDE<F> + word * 4 * F::WORD, CODE_STRIDE<F>);
#pragma unroll
        for (int i = 0; i < F::BLOCKS_A_WORD; i++) {
            int block = word * F::BLOCKS_A_WORD + i;
            Block<F> weights[2] = {{words[0], SharedFactors(my_factors + 4 * block), i},
                                   {words[1], SharedFactors(my_factors + 16 * FACTOR_STRIDE + 4 * block), i}};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                uint2 inputs = *(const uint2*)(x + 8 * n * X_STRIDE + block * 32);
                const u8* p = s + 8 * n * SCALE_STRIDE + block * 8;
                float2 first = *(const float2*)p, second = *(const float2*)(p + SCALE_STRIDE);
                float4 scales = make_float4(first.x, first.y, second.x, second.y);
                weights[0].add(sums[0][n], inputs, scales);
                weights[1].add(sums[1][n], inputs, scales);
            }
        }
    }
}

// The products of both halves; `totals` are the warp's. `rows`: the inputs' row of each column, in shared memory.
template <class F0, class F1>
DEVICE void multiply_many(float (&totals)[2][4][4], const Weight& w0, size_t row0, const Weight& w1, size_t row1,
                          const i8* codes, const float* scales, const int* rows) {
    using S = Stage<F0, F1>;
    constexpr bool SAME = IS_SAME<F0, F1>;
    int warp = threadIdx.x >> 5, second = threadIdx.x >> 7, r = (warp >> 1 & 1) * 32, c = (warp & 1) * 32;
    int scale_row = (threadIdx.x & 127) >> 1, scale_block = (threadIdx.x & 1) * 4;
    float* factors = (float*)(shared + S::FACTORS);
    float* my_factors = factors + (second * HALF_ROWS + scale_row) * FACTOR_STRIDE + 4 * scale_block;
    RowScales<F0> ahead0;
    RowScales<F1> ahead1;
    auto stage = [&](int segment) {
        u8* to = shared + (segment & 1) * S::SIZE;
        stage_codes<F0>(to, w0, row0, segment);
        stage_codes<F1>(to + S::SECOND, w1, row1, segment);
        stage_inputs(to + S::X, to + S::SCALES, codes, scales, rows, segment);
        commit_copies();
        if (SAME || !second)
            ahead0.read(choose(second, w1, w0), (second ? row1 : row0) + scale_row, segment, scale_block);
        else
            ahead1.read(w1, row1 + scale_row, segment, scale_block);
    };
    stage(0);
#pragma unroll 1
    for (int segment = 0; segment < SEGMENTS; segment++) {
        if (SAME || !second)
            ahead0.put(my_factors);
        else
            ahead1.put(my_factors);
        if (segment + 1 < SEGMENTS) {
            stage(segment + 1);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        const u8* from = shared + (segment & 1) * S::SIZE;
        const u8 *x = from + S::X + c * X_STRIDE, *s = from + S::SCALES + c * SCALE_STRIDE;
        const float* f = factors + (second * HALF_ROWS + r) * FACTOR_STRIDE;
        float sums[2][4][4] = {};
        if (SAME || !second)
            multiply_stage<F0>(sums, from + (second ? S::SECOND : 0) + r * CODE_STRIDE<F0>, x, s, f);
        else
            multiply_stage<F1>(sums, from + S::SECOND + r * CODE_STRIDE<F1>, x, s, f);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float& to = totals[i / 16][i / 4 % 4][i % 4];
            float sum = sums[i / 16][i / 4 % 4][i % 4];
            to = segment ? to + sum : sum;
        }
        __syncthreads();
    }
}

// visit(row of 64 in the half, column, value) for each of the warp's totals.
template <class Visit> DEVICE void each_total(const float (&totals)[2][4][4], Visit visit) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, r = (warp >> 1 & 1) * 32 + (lane >> 2), c = (warp & 1) * 32 + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int t = i / 16, n = i / 4 % 4, e = i % 4;
        visit(r + 16 * t + 8 * (e >> 1), c + 8 * n + (e & 1), totals[t][n][e]);
    }
}

#ifdef DENSE
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;

template <class F>
DEVICE void dense(const Weight& w, int rows, int row, int out_row, const i8* codes, const float* scales, const float* residual,
                  int num_columns, float* out) {
    __shared__ int inputs[MANY_COLUMNS];
    int column0 = blockIdx.y * MANY_COLUMNS;
    if (threadIdx.x < MANY_COLUMNS) inputs[threadIdx.x] = min(column0 + (int)threadIdx.x, num_columns - 1);
    __syncthreads();
    size_t first = (size_t)stack_index() * rows + row;
    bool has_second = row + HALF_ROWS < rows;  // else the first half twice
    float totals[2][4][4];
    multiply_many<F, F>(totals, w, first, w, first + (has_second ? HALF_ROWS : 0), codes, scales, inputs);
    int second = threadIdx.x >> 7;
    if (second && !has_second) return;
    each_total(totals, [&](int r, int c, float sum) {
        if (column0 + c >= num_columns) return;
        size_t at = (size_t)(column0 + c) * ALL_ROWS + out_row + second * HALF_ROWS + r;
#ifdef RESIDUAL
        sum = residual[at] + sum;
#endif
        out[at] = sum;
    });
}

constexpr int BLOCKS_0 = (ROWS_0 + 127) / 128, BLOCKS_1 = (ROWS_1 + 127) / 128;

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, WEIGHT(0),
#if ROWS_1
    WEIGHT(1), WEIGHT(2),
#endif
#ifdef RESIDUAL
    const float* residual,
#else
#define residual nullptr
#endif
    const int* count, float* out) {
    int num_columns = count[0], block = blockIdx.x;
    if (blockIdx.y * MANY_COLUMNS >= num_columns) return;
    if (block < BLOCKS_0) {
        dense<FORMAT_0>(GIVEN(0), ROWS_0, block * 128, block * 128, codes, scales, residual, num_columns, out);
        return;
    }
#if ROWS_1
    block -= BLOCKS_0;
    if (block < BLOCKS_1)
        dense<FORMAT_1>(GIVEN(1), ROWS_1, block * 128, ROWS_0 + block * 128, codes, scales, residual, num_columns, out);
    else
        dense<FORMAT_2>(GIVEN(2), ROWS_2, (block - BLOCKS_1) * 128, ROWS_0 + ROWS_1 + (block - BLOCKS_1) * 128, codes, scales, residual, num_columns, out);
#endif
}
#endif  // DENSE

#ifdef GATE_UP
KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), WEIGHT(1), i8* out_codes, float* out_scales) {
    if (blockIdx.y >= num_tiles[0]) return;
    PairTile tile(pairs, tiles);
    __shared__ int inputs[MANY_COLUMNS];
    if (threadIdx.x < MANY_COLUMNS) inputs[threadIdx.x] = tile.pair(threadIdx.x) / ACTIVE;
    __syncthreads();
    int first = blockIdx.x * HALF_ROWS;
    size_t row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    float totals[2][4][4];
    multiply_many<FORMAT_0, FORMAT_1>(totals, GIVEN(0), row, GIVEN(1), row, codes, scales, inputs);
    // up's products to shared memory, gate's threads multiply
    constexpr int UP_STRIDE = HALF_ROWS + 1;
    float *ups = (float*)shared, *h = ups + MANY_COLUMNS * UP_STRIDE;
    bool is_up = threadIdx.x >= 128;
    if (is_up) each_total(totals, [&](int r, int c, float sum) { ups[c * UP_STRIDE + r] = sum; });
    __syncthreads();
    if (!is_up)
        each_total(totals, [&](int r, int c, float sum) {
            h[(r / 32 * MANY_COLUMNS + c) * H_STRIDE + r % 32] = swiglu(sum, ups[c * UP_STRIDE + r]);
        });
    __syncthreads();
    auto place = [&](int column) { return tile.pair(column); };
    put_hidden(h, tile.count, ROWS_0, first, out_codes, out_scales, place);
    put_hidden(h + MANY_COLUMNS * H_STRIDE, tile.count, ROWS_0, first + 32, out_codes, out_scales, place);
}
#endif  // GATE_UP

#ifdef DOWN
KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), float* out) {
    if (blockIdx.y >= num_tiles[0]) return;
    PairTile tile(pairs, tiles);
    __shared__ int inputs[MANY_COLUMNS];
    if (threadIdx.x < MANY_COLUMNS) inputs[threadIdx.x] = tile.pair(threadIdx.x);
    __syncthreads();
    int first = blockIdx.x * 2 * HALF_ROWS, second = threadIdx.x >> 7;
    size_t row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    float totals[2][4][4];
    multiply_many<FORMAT_0, FORMAT_0>(totals, GIVEN(0), row, GIVEN(0), row + HALF_ROWS, codes, scales, inputs);
    each_total(totals, [&](int r, int c, float sum) {
        if (c < tile.count) out[(size_t)inputs[c] * ROWS_0 + first + second * HALF_ROWS + r] = sum;
    });
}
#endif  // DOWN
#endif  // MANY

// Packed weights as the products read them: formats, scales, and the step of one block of 32 inputs.
//
// The macros of every product: NAME the kernel's name; DENSE, GATE_UP or DOWN what it does; K the inputs, FORMAT_i
// and ROWS_i format and rows of each weight; MATRICES the matrices in a stack (experts, or 1); NORMS the norms in
// their stack; ACTIVE the experts of a row, NUM_ROWS the rows of the step. README.md gives the order of sums.
#pragma once
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

// Codes of experts lie swapped in memory, but for floats: of 8 chunks of 16 bytes of row r, chunk c is at c ^ r % 8. Rows
// are counted from any multiple of 8 on.
template <class F> DEVICE u32 swapped(u32 chunk, u32 row) { return F::HALF ? chunk : chunk ^ (row & 7); }

template <class A, class B> constexpr bool IS_SAME = false;
template <class A> constexpr bool IS_SAME<A, A> = true;

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
// A dense product has one weight, or three whose outputs lie side by side, and adds a residual or not.
#if ROWS_1
#define DENSE_WEIGHTS WEIGHT(0), WEIGHT(1), WEIGHT(2)
#else
#define DENSE_WEIGHTS WEIGHT(0)
#endif
#ifdef RESIDUAL
#define DENSE_RESIDUAL const float* residual,
#define GIVEN_RESIDUAL residual
#else
#define DENSE_RESIDUAL
#define GIVEN_RESIDUAL nullptr
#endif

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

// --- One block of 32 inputs: 16 rows times 8 * TILES columns. Lane l has rows l/4, l/4 + 8 and columns
// 2 * (l%4), 2 * (l%4) + 1 of each tile; inputs are taken in the order lane by lane, 8 each.

template <class F> struct Codes {  // a lane's codes of its two rows, for BLOCKS_A_WORD blocks
    u32 low[F::WORD / 4], high[F::WORD / 4];

    METHOD void read(const u8* p, size_t stride) {  // p: the first of the lane's rows
        read_row(low, p);
        read_row(high, p + 8 * stride);
    }
    static METHOD void read_row(u32 (&out)[F::WORD / 4], const u8* p) {
        if constexpr (F::WORD == 16) {
            uint4 v = *(const uint4*)p;
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        } else {
            uint2 v = *(const uint2*)p;
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
    // EVEN: only the first of the lane's two columns counts.
    template <bool EVEN = false> METHOD void add(float (&sums)[4], uint2 x, float4 scales) const {
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
            for (int e = 0; e < 4; e += EVEN ? 2 : 1) {
                float t = fmaf(__int_as_float(v[e]), sd[part][e >> 1], minus_magic[part][e >> 1]);
                sums[e] = fmaf(t, e & 1 ? scales.z : scales.x, sums[e]);
            }
        }
        if constexpr (F::D_M)
#pragma unroll
            for (int e = 0; e < 4; e += EVEN ? 2 : 1) sums[e] = fmaf(minimum[e >> 1], e & 1 ? scales.w : scales.y, sums[e]);
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

DEVICE float swiglu(float gate, float up) {
    return __fdiv_rn(gate, 1.f + exp2_fast(gate * -1.44269504f)) * up;
}

constexpr int SEGMENTS = K / SEGMENT;

// 32 rows of h for each column, from shared memory [columns][H_STRIDE], to int8 in global memory.
constexpr int H_STRIDE = 36;
template <class Place>
DEVICE void put_hidden(const float* h, int num_columns, int width, int first, i8* codes, float* scales, Place place, int thread, int num_threads) {
    int quarter = thread & 3;
    for (int c0 = 0; c0 < num_columns; c0 += num_threads / 4) {
        int column = c0 + (thread >> 2);
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

DEVICE int stack_index() { return launch_number<SHARED_SIZE>() / NORMS; }
DEVICE int norm_layer() { return launch_number<SHARED_SIZE>() % NORMS; }
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

// NUM rows of a weight, COUNT segments each, in shared memory: codes by row and segment (or by segment and row) with PAD
// bytes between, which keep the banks apart; then s, m, d and d_m row by row. Of WHOLE rows the codes lie without a gap.
// SWAPPED: of 8 chunks of 16 bytes of row r's codes, chunk c is at c ^ r % 8, so that PAD can be 0.
template <class F, int COUNT, int NUM, bool BY_SEGMENT_, int PAD, bool WHOLE = false, bool SWAPPED = false> struct SharedRows {
    static constexpr bool BY_SEGMENT = BY_SEGMENT_;  // neighbouring lanes multiply rows of one segment
    static constexpr int HEIGHT = NUM, NUM_SEGMENTS = COUNT, TASKS = NUM * COUNT, CODE_STRIDE = F::BYTES + (WHOLE ? 0 : PAD);
    static constexpr bool APART = BY_SEGMENT && !WHOLE;  // a row's segments lie
    static constexpr int ROW_STRIDE = APART ? CODE_STRIDE : COUNT * CODE_STRIDE + (WHOLE ? PAD : 0);  // from a row to the next
    static constexpr int S = F::SPLIT ? 16 : 8, D = (F::BLOCK == SEGMENT ? 1 : 8) * (F::WIDE_D ? 4 : 2);  // bytes a segment
    static constexpr int stride(int size) { return size % 32 == 0 ? size + 16 : size; }
    static constexpr int S_RUN = COUNT * S, M_RUN = COUNT * 8, D_RUN = COUNT * D;  // bytes of a row
    static constexpr int S_STRIDE = stride(S_RUN), M_STRIDE = stride(M_RUN), D_STRIDE = stride(D_RUN);
    static constexpr int AT_S = APART ? TASKS * CODE_STRIDE : NUM * ROW_STRIDE, AT_M = AT_S + (F::S ? NUM * S_STRIDE : 0);
    static constexpr int AT_D = AT_M + (F::M ? NUM * M_STRIDE : 0), AT_D_M = AT_D + (F::HALF ? 0 : NUM * D_STRIDE);
    static constexpr int SIZE = (AT_D_M + (F::D_M ? NUM * D_STRIDE : 0) + 15) / 16 * 16;

    METHOD static int at_codes(int row, int segment) {
        return row * ROW_STRIDE + segment * (APART ? NUM : 1) * CODE_STRIDE;
    }
    METHOD static u32 swap(int row) { return SWAPPED ? (u32)(row & 7) * 16 : 0; }
    METHOD static int at_s(int row, int segment) { return AT_S + row * S_STRIDE + segment * S; }
    METHOD static int at_m(int row, int segment) { return AT_M + row * M_STRIDE + segment * 8; }
    METHOD static int at_d(int row, int segment) { return AT_D + row * D_STRIDE + segment * D; }
    METHOD static int at_d_m(int row, int segment) { return AT_D_M + row * D_STRIDE + segment * D; }
};

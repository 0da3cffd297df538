// Products of many rows: segment after segment through shared memory. README.md gives the order of sums.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

// A block: two halves of 64 rows (of one weight, or of gate and up) times 64 columns, segment after segment
// through shared memory; a warp: 32 rows times 32 columns.
constexpr int MANY_COLUMNS = 64, HALF_ROWS = 64, X_STRIDE = SEGMENT + 32, SCALE_STRIDE = 80;

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

// Products of many rows: step after step through shared memory. README.md gives the order of sums.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

// A block: two halves of 64 rows (of one weight, or of gate and up) times MANY_COLUMNS columns; a warp: 32 rows
// times all columns, whose codes and scales only it reads. A step is half a segment; STAGES steps are on their way
// or being read. Rows in shared memory are an odd number of 16 bytes long: 8 of them then share no bank.
constexpr int WARPS = THREADS / 32, WARP_ROWS = 32, HALF_ROWS = WARPS / 2 * WARP_ROWS, COLUMN_TILES = MANY_COLUMNS / 8;
constexpr int STEP = SEGMENT / 2, STEPS = 2 * (K / SEGMENT), X_STRIDE = STEP + 16, SCALE_STRIDE = 48;
constexpr int FACTORS_SIZE = 8 * 2 * WARP_ROWS;  // floats of a warp: 8 blocks of two factors for each row

template <class F> constexpr int STEP_BYTES = F::BYTES / 2;
template <class F> constexpr int CODE_STRIDE = STEP_BYTES<F> + 16;

template <class F0, class F1> struct Stage {
    static constexpr int SECOND = HALF_ROWS * CODE_STRIDE<F0>, X = SECOND + HALF_ROWS * CODE_STRIDE<F1>;
    static constexpr int SCALES = X + MANY_COLUMNS * X_STRIDE, SIZE = SCALES + MANY_COLUMNS * SCALE_STRIDE;
    static constexpr int FACTORS = STAGES * SIZE;  // after the stages
    static_assert(FACTORS + WARPS * FACTORS_SIZE * 4 <= SHARED_SIZE, "the stages and the scales must fit");
};

using Totals = float[2][COLUMN_TILES][4];

#ifdef DENSE
constexpr bool OF_EXPERTS = false;
#else
constexpr bool OF_EXPERTS = true;  // whose codes are swapped
#endif

// A warp's 32 rows of codes; `from` is the lane's first 16 bytes.
template <class F> DEVICE const u8* lane_codes(const Weight& w, size_t row) {
    constexpr int CHUNKS = STEP_BYTES<F> / 16;
    u32 lane = threadIdx.x & 31, chunk = OF_EXPERTS ? swapped<F>(lane % CHUNKS, lane / CHUNKS) : lane % CHUNKS;
    return w.codes + (row + lane / CHUNKS) * ((size_t)K * F::BITS / 8) + chunk * 16;
}
template <class F> DEVICE void stage_codes(u8* to, const u8* from, int step) {
    constexpr int CHUNKS = STEP_BYTES<F> / 16, ROWS_AT_ONCE = 32 / CHUNKS;
    int lane = threadIdx.x & 31, row = lane / CHUNKS, apart = 0;
    to += row * CODE_STRIDE<F> + lane % CHUNKS * 16, from += step * STEP_BYTES<F>;
    // of rows 4 .. 7 the halves of 8 chunks have changed places: those of two steps, or in every other copy those of one
    if (OF_EXPERTS && CHUNKS == 4) from -= 2 * STEP_BYTES<F> * (step & row >> 2);
    if (OF_EXPERTS && CHUNKS == 8) apart = lane & 4 ? -64 : 64;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
        copy_async(to + i * ROWS_AT_ONCE * CODE_STRIDE<F>, from + i * ROWS_AT_ONCE * ((size_t)K * F::BITS / 8) + i % 2 * apart);
}

// The first `num_columns` columns, up to a multiple of 16 of them, and all columns' scales.
DEVICE void stage_inputs(u8* x, u8* s, const i8* codes, const float* scales, const int* rows, int step, int num_columns) {
    constexpr int CHUNKS = STEP / 16, AT_ONCE = THREADS / CHUNKS, SCALE_CHUNKS = STEP / GROUP * 8 / 16;
    constexpr int COPIES = MANY_COLUMNS / AT_ONCE, SCALE_COPIES = (MANY_COLUMNS * SCALE_CHUNKS + THREADS - 1) / THREADS;
    static_assert(AT_ONCE == 16 && SCALE_COPIES == 1, "a thread copies scales once");
    int column = threadIdx.x / CHUNKS, at = threadIdx.x % CHUNKS * 16;
    int scale_column = threadIdx.x / SCALE_CHUNKS % MANY_COLUMNS, scale_at = threadIdx.x % SCALE_CHUNKS * 16;
    int row[COPIES], scale_row = rows[scale_column];  // all read before the first copy, which they could not pass
#pragma unroll
    for (int i = 0; i < COPIES; i++) row[i] = rows[column + i * AT_ONCE];
    x += column * X_STRIDE + at, codes += step * STEP + at;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        if (i * AT_ONCE >= num_columns) break;
        copy_async(x + i * AT_ONCE * X_STRIDE, codes + (size_t)(u32)row[i] * K);
    }
    const u8* from = (const u8*)scales + step * (STEP / GROUP * 8) + scale_at;
    if (MANY_COLUMNS * SCALE_CHUNKS == THREADS || threadIdx.x < MANY_COLUMNS * SCALE_CHUNKS)
        copy_async(s + scale_column * SCALE_STRIDE + scale_at, from + (size_t)(u32)scale_row * (K / GROUP * 8));
}

// The scales of a segment of the lane's row on their way to shared memory: read a segment ahead.
template <class F> struct RowScales {
    static constexpr int S_WORDS = F::SPLIT ? 4 : 2;
    u32 d[FACTOR_WORDS<F>], d_m[FACTOR_WORDS<F>], s[S_WORDS], m[2];

    METHOD void read(const Weight& w, size_t row, int segment) {
        if constexpr (F::HALF) return;
        read_factors<F>(d, w.d, row, segment);
        if constexpr (F::D_M) read_factors<F>(d_m, w.d_m, row, segment);
        size_t block = row * (K / GROUP) + segment * 8;
        if constexpr (F::S && F::SPLIT) {
            uint4 v = *(const uint4*)(w.s + 2 * block);
            s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
        } else if constexpr (F::S) {
            uint2 v = *(const uint2*)(w.s + block);
            s[0] = v.x, s[1] = v.y;
        }
        if constexpr (F::M) {
            uint2 v = *(const uint2*)(w.m + block);
            m[0] = v.x, m[1] = v.y;
        }
    }
    // Of each block the rows' scales, then the second part's or minus the minimum; row r + 8 * j is number 4 * r + j.
    METHOD void put(float* to) const {
        if constexpr (F::HALF) return;
        int lane = threadIdx.x & 31;
        to += lane % 8 * 4 + lane / 8;
#pragma unroll
        for (int block = 0; block < 8; block++) {
            float scale = factor<F>(d, block);
            if constexpr (F::SPLIT) to[block * 64 + 32] = times_byte<F>(scale, s, 2 * block + 1);
            if constexpr (F::S) scale = times_byte<F>(scale, s, F::SPLIT ? 2 * block : block);
            to[block * 64] = scale;
            if constexpr (F::D_M) {
                float minimum = factor<F>(d_m, block);
                if constexpr (F::M) minimum = times_byte<F>(minimum, m, block);
                to[block * 64 + 32] = -minimum;
            }
        }
    }
};

struct BlockFactors {  // of a lane's four rows
    float first[4], second[4];
    template <class F> METHOD void read(const float* p) {
        float4 v = *(const float4*)p;
        first[0] = v.x, first[1] = v.y, first[2] = v.z, first[3] = v.w;
        if constexpr (F::SPLIT || F::D_M) {
            v = *(const float4*)(p + 32);
            second[0] = v.x, second[1] = v.y, second[2] = v.z, second[3] = v.w;
        }
    }
};

DEVICE void add_products(float (&sums)[4], const int (&v)[4], const float* sd, float4 scales) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float t = fmaf(__int_as_float(v[e]), sd[e >> 1], -MAGIC * sd[e >> 1]);
        sums[e] = fmaf(t, e & 1 ? scales.z : scales.x, sums[e]);
    }
}

// One block of 32 inputs, 16 rows and 8 columns: Block::add of weights.cuh, with the inputs in their own order.
template <class F>
DEVICE void add_block(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, const BlockFactors& factors, int t, float4 scales) {
    int v[4];
    if constexpr (F::SPLIT) {
        int second[4];
        mma_int8(v, a[0], a[1], b0, MAGIC_BITS);
        mma_int8(second, a[2], a[3], b1, MAGIC_BITS);
        add_products(sums, v, factors.first + 2 * t, scales);
        add_products(sums, second, factors.second + 2 * t, scales);
    } else {
        mma_int8(v, a[0], a[1], a[2], a[3], b0, b1, MAGIC_BITS);
        add_products(sums, v, factors.first + 2 * t, scales);
    }
    if constexpr (F::D_M)
#pragma unroll
        for (int e = 0; e < 4; e++)
            sums[e] = fmaf(factors.second[2 * t + (e >> 1)], e & 1 ? scales.w : scales.y, sums[e]);
}

// One step for the warp's rows and the first `num_columns` columns; codes and factors are those of this warp. Two
// blocks of inputs at a time, or one of two parts: more registers there are not.
template <class F>
DEVICE void multiply_step(Totals& sums, const u8* codes, const u8* x, const u8* s, const float* factors, int num_columns) {
    constexpr int BLOCKS = F::SPLIT ? 1 : 2, TILES = 2 / BLOCKS;  // TILES: of columns, in four matrices of inputs
    int lane = threadIdx.x & 31;
    codes += (lane & 15) * CODE_STRIDE<F> + (lane >> 4) * 16;
    x += F::SPLIT ? ((lane & 7) + (lane >> 4) * 8) * X_STRIDE + (lane >> 3 & 1) * 16 : (lane & 7) * X_STRIDE + (lane >> 3) * 16;
    s += 2 * (lane & 3) * SCALE_STRIDE, factors += (lane >> 2) * 4;
#pragma unroll 1
    for (int block = 0; block < STEP / GROUP; block += BLOCKS) {
        u32 ahead[4], a[BLOCKS][2][4];
        BlockFactors of[BLOCKS];
        load_matrices(ahead, x + block * 32);
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const u8* from = codes + 16 * t * CODE_STRIDE<F>;
            if constexpr (F::BITS == 4) {
                u32 words[4];
                load_matrices(words, from + block / 2 * 32);
#pragma unroll
                for (int i = 0; i < 4 * BLOCKS; i++) a[i / 4][t][i % 4] = signed_codes<F>(words[i % 4], F::SPLIT ? block : i / 4);
            } else {
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) load_matrices(a[b][t], from + (block + b) * 32);
            }
        }
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) of[b].template read<F>(factors + (block + b) * 64);
        u32 inputs[4];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            if (n % 2 == 0 && 8 * n >= num_columns) break;
            if (n % TILES == 0) {
#pragma unroll
                for (int i = 0; i < 4; i++) inputs[i] = ahead[i];
                if (n + TILES < COLUMN_TILES) load_matrices(ahead, x + 8 * (n + TILES) * X_STRIDE + block * 32);
            }
            const u8* p = s + 8 * n * SCALE_STRIDE + block * 8;
            float4 scales[2];
            if constexpr (F::SPLIT) {
                scales[0] = make_float4(*(const float*)p, 0.f, *(const float*)(p + SCALE_STRIDE), 0.f);
            } else {
                float4 left = *(const float4*)p, right = *(const float4*)(p + SCALE_STRIDE);
                scales[0] = make_float4(left.x, left.y, right.x, right.y);
                scales[1] = make_float4(left.z, left.w, right.z, right.w);
            }
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                int i = F::SPLIT ? n % 2 * 2 : 2 * b;
#pragma unroll
                for (int t = 0; t < 2; t++)
                    add_block<F>(sums[t][n], a[b][t], inputs[i], inputs[i + 1], of[b], t, scales[b]);
            }
        }
    }
}

// The same for float weights, whose sums depend on the order of inputs: that of weights.cuh.
template <class F>
DEVICE void multiply_floats(Totals& sums, const u8* codes, const u8* x, const u8* s, int num_columns) {
    int lane = threadIdx.x & 31;
    codes += (lane >> 2) * CODE_STRIDE<F> + (lane & 3) * 16;
    x += (lane >> 2) * X_STRIDE + (lane & 3) * 8, s += 2 * (lane & 3) * SCALE_STRIDE;
#pragma unroll 1
    for (int block = 0; block < STEP / GROUP; block++) {
        Codes<F> words[2];
#pragma unroll
        for (int t = 0; t < 2; t++) words[t].read(codes + 16 * t * CODE_STRIDE<F> + block * 64, CODE_STRIDE<F>);
        Block<F> weights[2] = {{words[0], 0, 0}, {words[1], 0, 0}};
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            if (n % 2 == 0 && 8 * n >= num_columns) break;
            uint2 inputs = *(const uint2*)(x + 8 * n * X_STRIDE + block * 32);
            const u8* p = s + 8 * n * SCALE_STRIDE + block * 8;
            float4 scales = make_float4(*(const float*)p, 0.f, *(const float*)(p + SCALE_STRIDE), 0.f);
#pragma unroll
            for (int t = 0; t < 2; t++) weights[t].add(sums[t][n], inputs, scales);
        }
    }
}

// The products of both halves; `totals` are the warp's, `row` its half's first. `rows`, in shared memory, becomes the inputs' row of each
// column, a thread's own `my_row`: that of column threadIdx.x.
template <class F0, class F1>
DEVICE void multiply_many(Totals& totals, const Weight& w0, const Weight& w1, size_t row, const i8* codes,
                          const float* scales, int* rows, int my_row, int num_columns) {
    using S = Stage<F0, F1>;
    int warp = threadIdx.x >> 5, r = warp % (WARPS / 2) * WARP_ROWS, lane = threadIdx.x & 31;
    bool second = warp >= WARPS / 2, is_first = IS_SAME<F0, F1> || !second;
    const Weight w = choose(second, w1, w0);
    row += r;
    int my_codes = second ? S::SECOND + r * CODE_STRIDE<F1> : r * CODE_STRIDE<F0>;
    float* factors = (float*)(shared + S::FACTORS) + warp * FACTORS_SIZE;
    const u8* from = is_first ? lane_codes<F0>(w, row) : lane_codes<F1>(w, row);
    RowScales<F0> ahead0;
    RowScales<F1> ahead1;
    auto stage_weights = [&](int step, u8* to) {
        if (is_first)
            stage_codes<F0>(to + my_codes, from, step);
        else
            stage_codes<F1>(to + my_codes, from, step);
    };
    auto stage_columns = [&](int step, u8* to) {
        stage_inputs(to + S::X, to + S::SCALES, codes, scales, rows, step, num_columns);
    };
    auto read_scales = [&](int segment) {
        if (is_first)
            ahead0.read(w, row + lane, segment);
        else
            ahead1.read(w, row + lane, segment);
    };
    constexpr int AHEAD = STAGES - 1 < STEPS ? STAGES - 1 : STEPS;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) stage_weights(i, shared + i * S::SIZE);
    read_scales(0);
    if (threadIdx.x < MANY_COLUMNS) rows[threadIdx.x] = my_row;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < AHEAD) stage_columns(i, shared + i * S::SIZE);
        commit_copies();
    }
#pragma unroll
    for (int i = 0; i < 8 * COLUMN_TILES; i++) totals[i / (4 * COLUMN_TILES)][i / 4 % COLUMN_TILES][i % 4] = -0.f;
    u8 *now = shared, *before = shared + (STAGES - 1) * S::SIZE;
#pragma unroll 1
    for (int segment = 0; segment < SEGMENTS; segment++) {
        __syncwarp();
        if (is_first)
            ahead0.put(factors);
        else
            ahead1.put(factors);
        if (segment + 1 < SEGMENTS) read_scales(segment + 1);
        Totals sums = {};
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            wait_copies<STAGES - 2>();
            __syncthreads();
            int next = 2 * segment + half + STAGES - 1;
            if (next < STEPS) stage_weights(next, before), stage_columns(next, before);
            commit_copies();
            const u8 *x = now + S::X, *s = now + S::SCALES;
            const float* f = factors + half * (FACTORS_SIZE / 2);
            auto multiply = [&](auto format) {
                using F = decltype(format);
                if constexpr (F::HALF != 0)
                    multiply_floats<F>(sums, now + my_codes, x, s, num_columns);
                else
                    multiply_step<F>(sums, now + my_codes, x, s, f, num_columns);
            };
            if (is_first)
                multiply(F0{});
            else
                multiply(F1{});
            before = now;
            now = now == shared + (STAGES - 1) * S::SIZE ? shared : now + S::SIZE;
        }
#pragma unroll
        for (int i = 0; i < 8 * COLUMN_TILES; i++) {
            int t = i / (4 * COLUMN_TILES), n = i / 4 % COLUMN_TILES;
            totals[t][n][i % 4] += sums[t][n][i % 4];  // the first to -0, which changes no bit of it
        }
    }
    wait_copies<0>();
}

// visit(column, row of the half, sums of that row and of those 8, 16 and 24 on) for each of the lane's columns.
template <class Visit> DEVICE void each_column(const Totals& totals, int num_columns, Visit visit) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = warp % (WARPS / 2) * WARP_ROWS + (lane >> 2);
#pragma unroll
    for (int i = 0; i < 2 * COLUMN_TILES; i++) {
        int n = i / 2, e = i % 2, column = 8 * n + 2 * (lane & 3) + e;
        const float sums[4] = {totals[0][n][e], totals[0][n][2 + e], totals[1][n][e], totals[1][n][2 + e]};
        if (column < num_columns) visit(column, row, sums);
    }
}

#ifdef DENSE
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;

template <class F>
DEVICE void dense(const Weight& w, int rows, int row, int out_row, const i8* codes, const float* scales, const float* residual,
                  int num_columns, float* out) {
    __shared__ int inputs[MANY_COLUMNS];
    int column0 = blockIdx.y * MANY_COLUMNS;
    size_t first = (size_t)stack_index() * rows + row;
    bool has_second = row + HALF_ROWS < rows;  // else the first half twice
    bool second = (int)threadIdx.x >= THREADS / 2;
    Totals totals;
    multiply_many<F, F>(totals, w, w, first + (second && has_second ? HALF_ROWS : 0), codes, scales, inputs,
                        min(column0 + (int)threadIdx.x, num_columns - 1), num_columns - column0);
    if (second && !has_second) return;
    size_t first_out = (size_t)column0 * ALL_ROWS + out_row + second * HALF_ROWS;
    each_column(totals, num_columns - column0, [&](int column, int r, const float (&sums)[4]) {
        size_t at = first_out + (u32)(column * ALL_ROWS + r);
#pragma unroll
        for (int j = 0; j < 4; j++) {
#ifdef RESIDUAL
            out[at + 8 * j] = residual[at + 8 * j] + sums[j];
#else
            out[at + 8 * j] = sums[j];
#endif
        }
    });
}

constexpr int BLOCKS_0 = (ROWS_0 + 127) / 128, BLOCKS_1 = (ROWS_1 + 127) / 128;

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, DENSE_WEIGHTS, DENSE_RESIDUAL const int* count, float* out) {
    int num_columns = count[0], block = blockIdx.x;
    if (blockIdx.y * MANY_COLUMNS >= num_columns) return;
    if (block < BLOCKS_0) {
        dense<FORMAT_0>(GIVEN(0), ROWS_0, block * 128, block * 128, codes, scales, GIVEN_RESIDUAL, num_columns, out);
        return;
    }
#if ROWS_1
    block -= BLOCKS_0;
    if (block < BLOCKS_1)
        dense<FORMAT_1>(GIVEN(1), ROWS_1, block * 128, ROWS_0 + block * 128, codes, scales, GIVEN_RESIDUAL, num_columns, out);
    else
        dense<FORMAT_2>(GIVEN(2), ROWS_2, (block - BLOCKS_1) * 128, ROWS_0 + ROWS_1 + (block - BLOCKS_1) * 128, codes, scales, GIVEN_RESIDUAL, num_columns, out);
#endif
}
#endif  // DENSE

#ifdef GATE_UP
KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), WEIGHT(1), i8* out_codes, float* out_scales) {
    PairTile tile(pairs, tiles);  // read along with the number of tiles
    if (blockIdx.y >= num_tiles[0]) return;
    __shared__ int inputs[MANY_COLUMNS];
    int first = blockIdx.x * HALF_ROWS;
    size_t row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    Totals totals;
    multiply_many<FORMAT_0, FORMAT_1>(totals, GIVEN(0), GIVEN(1), row, codes, scales, inputs,
                                      tile.pair(threadIdx.x) / ACTIVE, tile.count);
    __syncthreads();
    constexpr int SUM_STRIDE = HALF_ROWS + 1;
    float *gates = (float*)shared, *ups = gates + MANY_COLUMNS * SUM_STRIDE, *h = ups + MANY_COLUMNS * SUM_STRIDE;
    static_assert(MANY_COLUMNS * (2 * SUM_STRIDE + 2 * H_STRIDE) * 4 <= SHARED_SIZE, "the products must fit");
    float* mine = (int)threadIdx.x >= THREADS / 2 ? ups : gates;
    each_column(totals, tile.count, [&](int column, int r, const float (&sums)[4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) mine[column * SUM_STRIDE + r + 8 * j] = sums[j];
    });
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < tile.count * HALF_ROWS; i += THREADS) {
        int column = i / HALF_ROWS, r = i % HALF_ROWS, at = column * SUM_STRIDE + r;
        h[(r / 32 * MANY_COLUMNS + column) * H_STRIDE + r % 32] = swiglu(gates[at], ups[at]);
    }
    __syncthreads();
    auto place = [&](int column) { return tile.pair(column); };
    put_hidden(h, tile.count, ROWS_0, first, out_codes, out_scales, place, threadIdx.x, THREADS);
    put_hidden(h + MANY_COLUMNS * H_STRIDE, tile.count, ROWS_0, first + 32, out_codes, out_scales, place, threadIdx.x, THREADS);
}
#endif  // GATE_UP

#ifdef DOWN
KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), float* out) {
    PairTile tile(pairs, tiles);  // read along with the number of tiles
    if (blockIdx.y >= num_tiles[0]) return;
    __shared__ int inputs[MANY_COLUMNS];
    int first = blockIdx.x * 2 * HALF_ROWS + (int)(2 * threadIdx.x / THREADS) * HALF_ROWS;  // of the thread's half
    size_t row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    Totals totals;
    multiply_many<FORMAT_0, FORMAT_0>(totals, GIVEN(0), GIVEN(0), row, codes, scales, inputs,
                                      tile.pair(threadIdx.x), tile.count);
    each_column(totals, tile.count, [&](int column, int r, const float (&sums)[4]) {
        float* to = out + (size_t)inputs[column] * ROWS_0 + first + r;
#pragma unroll
        for (int j = 0; j < 4; j++) to[8 * j] = sums[j];
    });
}
#endif  // DOWN

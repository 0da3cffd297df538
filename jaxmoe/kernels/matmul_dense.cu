// Dense products of few rows. A block takes HEIGHT rows of a weight and COLUMNS columns, a warp one segment of 16 * ROW_TILES
// rows and 8 * COLUMN_TILES columns: each weight is unpacked for all of those, each column read for all of those rows.
// Codes come to shared memory in steps of STEP inputs of every segment (few large pieces are faster than many small ones):
// those of the columns have room for STAGES steps, the weights for all. The segments meet in shared memory.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int WARPS = THREADS / 32, HEIGHT = 16 * ROW_TILES * ROW_GROUPS, COLUMNS = 8 * COLUMN_TILES * COLUMN_GROUPS;
constexpr int UNITS = SEGMENTS * ROW_GROUPS * COLUMN_GROUPS, TURNS = (UNITS + WARPS - 1) / WARPS;
constexpr int STEPS = SEGMENT / STEP, PAIRS = STEP / 64;  // PAIRS: of blocks of 32 inputs in a step
constexpr int AHEAD = STAGES == STEPS ? STEPS : STAGES - 1;  // steps on their way
constexpr int CODE_PARTS = STAGES == STEPS ? STEPS : 1;  // the weights' codes come with the inputs, or all at first
template <class F> constexpr int CHUNKS = F::BYTES / STEPS / 16;  // of a row's codes in a step
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;
// Two scales a block are more work and more registers: of the tallest such blocks there are more.
template <class F> constexpr int TILES_OF = F::SPLIT && ROW_TILES == 3 ? 2 : ROW_TILES;
template <class F> constexpr int HEIGHT_OF = 16 * TILES_OF<F> * ROW_GROUPS;

// Of each segment and column a step's codes, and 64 bytes of scales. Their chunks of 16 bytes are swapped so that eight
// columns share no bank.
constexpr int SCALES = 64, PIECES_SIZE = SEGMENTS * COLUMNS * STEP, AT_SCALES = STAGES * PIECES_SIZE;
constexpr int AT_WEIGHTS = AT_SCALES + SEGMENTS * COLUMNS * SCALES;
template <int SIZE> DEVICE int swapped(int chunk, int column) { return (chunk ^ (SIZE == 64 ? column >> 1 & 3 : column & 7)) * 16; }

// SIZE bytes of each segment and column; ROW_SIZE: bytes of a row of inputs.
template <int ROW_SIZE, int SIZE> DEVICE void copy_pieces(u8* to, const u8* from, int column0) {
    constexpr int CHUNKS = SIZE / 16, AT_ONCE = 32 / CHUNKS;  // columns
    constexpr int TILES = COLUMNS / AT_ONCE, COPIES = SEGMENTS * TILES, IN_SEGMENT = ROW_SIZE / SEGMENTS;
    constexpr bool EVEN = WARPS % TILES == 0;  // then a warp's columns are the same each time
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = lane / CHUNKS, chunk = lane % CHUNKS;
    auto column = [=](int at) { return at % TILES * AT_ONCE + first; };
    auto offset = [=](int at) { return (u32)(min(column0 + column(at), NUM_ROWS - 1) * ROW_SIZE + at / TILES * IN_SEGMENT); };
    auto place = [=](int at) { return at * 512 + first * SIZE + swapped<SIZE>(chunk, column(at)); };
    from += chunk * 16;
    if (EVEN) from += offset(warp), to += place(warp);
#pragma unroll 4  // all at once, the addresses would not fit the registers
    for (int i = 0; i < (COPIES + WARPS - 1) / WARPS; i++) {
        int at = i * WARPS + warp;
        if (COPIES % WARPS == 0 || at < COPIES)
            copy_async(to + (EVEN ? i * WARPS * 512 : place(at)), from + (EVEN ? i * (WARPS / TILES) * IN_SEGMENT : offset(at)));
    }
}

// The scales of 16 rows and a pair of blocks: a lane finds those of row l/4 + 8 * (l/2%2) and block l%2, d * s and the
// second part's or minus the minimum, for the other three that have this row or that block.
template <class F, class Rows> struct PairFactors {
    float scale, other;

    METHOD void read(const u8* from, int row, int segment, int pair) {
        int lane = threadIdx.x & 31, block = 2 * pair + (lane & 1);
        row += (lane >> 2) + (lane & 2) * 4;
        const u8 *s = from + Rows::at_s(row, segment), *m = from + Rows::at_m(row, segment);
        scale = read_d(from + Rows::at_d(row, segment), block);
        if constexpr (F::S && F::SPLIT) {
            u32 bytes = ((const u16*)s)[block];
            other = times_byte<F>(scale, &bytes, 1), scale = times_byte<F>(scale, &bytes, 0);
        } else if constexpr (F::S) {
            u32 byte = s[block];
            scale = times_byte<F>(scale, &byte, 0);
        }
        if constexpr (F::D_M) {
            float minimum = read_d(from + Rows::at_d_m(row, segment), block);
            u32 byte = m[block];
            if constexpr (F::M) minimum = times_byte<F>(minimum, &byte, 0);
            other = -minimum;
        }
    }
    METHOD static float read_d(const u8* p, int block) {
        if constexpr (F::WIDE_D) return ((const float*)p)[block];
        return half_to_float(((const u16*)p)[F::BLOCK == SEGMENT ? 0 : block]);
    }
};

// 16 rows of one block of 32 inputs, in their own order: `a` as mma_int8 takes it. Block of weights.cuh has another order.
template <class F> struct Tile {
    static constexpr int PARTS = F::SPLIT ? 2 : 1;
    u32 a[4];
    float sd[PARTS][2], minus_magic[PARTS][2], minus_minimum[2];

    template <class Factors> METHOD void unpack(const u32 (&words)[4], const Factors& factors, int b) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = signed_codes<F>(F::BITS == 4 ? words[i] >> 4 * b : words[i], 0);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int from = (threadIdx.x & 28) + 2 * h + b;
            sd[0][h] = __shfl_sync(ALL_LANES, factors.scale, from);
            if constexpr (F::SPLIT) sd[PARTS - 1][h] = __shfl_sync(ALL_LANES, factors.other, from);
            if constexpr (F::D_M) minus_minimum[h] = __shfl_sync(ALL_LANES, factors.other, from);
#pragma unroll
            for (int part = 0; part < PARTS; part++) minus_magic[part][h] = -MAGIC * sd[part][h];
        }
    }
    // x: the lane's inputs of column l/4; scales: (scale, scale * sum) of its two columns.
    METHOD void add(float (&sums)[4], u32 x0, u32 x1, float2 left, float2 right) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int v[4];
            if constexpr (F::SPLIT)
                mma_int8(v, a[2 * part], a[2 * part + 1], part ? x1 : x0, MAGIC_BITS);
            else
                mma_int8(v, a[0], a[1], a[2], a[3], x0, x1, MAGIC_BITS);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float t = fmaf(__int_as_float(v[e]), sd[part][e >> 1], minus_magic[part][e >> 1]);
                sums[e] = fmaf(t, e & 1 ? right.x : left.x, sums[e]);
            }
        }
        if constexpr (F::D_M)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[e] = fmaf(minus_minimum[e >> 1], e & 1 ? right.y : left.y, sums[e]);
    }
};

// In registers these would be in the way of the sums: how many columns count, and where the block's outputs go.
__shared__ int num_columns;
__shared__ float* block_out;

template <int ROWS> using Sums = float[ROWS][COLUMN_TILES][4];

// The words of block b of a step for tiles n and n + 1 of columns; the second is the first where there is but one.
DEVICE void read_columns(u32 (&x)[4], const u8* from, int n, int b) {
    int lane = threadIdx.x & 31, column = lane & 7, tile = COLUMN_TILES == 1 ? 0 : n + (lane >> 4);
    load_matrices(x, from + (8 * tile + column) * STEP + swapped<STEP>(2 * b + (lane >> 3 & 1), column));
}

// One step of 16 * TALL rows. place(row, chunk): 16 bytes of the step's codes; `row` and `segment`: where the scales of the
// weights lie; `x` and `scales` are those of the segment's first column.
template <class F, class Rows, int TALL, class Place>
DEVICE void multiply_step(Sums<TALL>& sums, Place place, const u8* weights, const u8* x, const u8* scales, int row, int segment, int step) {
    constexpr bool SMALL = TALL * COLUMN_TILES <= 2;
    int lane = threadIdx.x & 31, quarter = lane & 3;
    scales += 2 * quarter * SCALES;
    u32 words[4], inputs[4];
#pragma unroll(SMALL ? 2 : 1)
    for (int pair = 0; pair < PAIRS; pair++) {
        const u8* here = scales + ((step * PAIRS + pair) ^ quarter) * 16;
        PairFactors<F, Rows> factors[TALL];
#pragma unroll
        for (int t = 0; t < TALL; t++) factors[t].read(weights, row + 16 * t, segment, step * PAIRS + pair);
#pragma unroll(SMALL ? 2 : 1)
        for (int b = 0; b < 2; b++) {
            Tile<F> tiles[TALL];
#pragma unroll
            for (int t = 0; t < TALL; t++) {
                load_matrices(words, place(16 * t + (lane & 15), pair * (F::BITS / 2) + (lane >> 4) + (F::BITS == 4 ? 0 : 2 * b)));
                tiles[t].unpack(words, factors[t], b);
            }
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                if (n % 2 == 0) read_columns(inputs, x, n, 2 * pair + b);
                int i = n % 2 * 2;
                const u8* p = here + n * 8 * SCALES + b * 8;
                float2 left = *(const float2*)p, right = *(const float2*)(p + SCALES);
#pragma unroll
                for (int t = 0; t < TALL; t++) tiles[t].add(sums[t][n], inputs[i], inputs[i + 1], left, right);
            }
        }
    }
}

#ifndef STREAM
// Part `part` of CODE_PARTS of the weights' codes, a step's or all; `from` is the first row's.
template <class F, class Rows> DEVICE void copy_codes(u8* to, const u8* from, int part) {
    constexpr int CHUNKS = F::BYTES / CODE_PARTS / 16, A_ROW = SEGMENTS * CHUNKS, COPIES = Rows::HEIGHT * A_ROW, ROW_SIZE = SEGMENTS * F::BYTES;
    constexpr bool EVEN = THREADS % A_ROW == 0;  // then a thread's inputs are the same each time
    int thread = threadIdx.x;
    auto offset = [](int at) { return (u32)(at / A_ROW * ROW_SIZE + at % A_ROW / CHUNKS * F::BYTES + at % CHUNKS * 16); };
    auto place = [](int at) { return Rows::at_codes(at / A_ROW, at % A_ROW / CHUNKS) + at % CHUNKS * 16; };
    to += part * CHUNKS * 16, from += part * CHUNKS * 16;
    if (EVEN) to += place(thread), from += offset(thread);
#pragma unroll 4
    for (int i = 0; i < (COPIES + THREADS - 1) / THREADS; i++) {
        int at = i * THREADS + thread, rows = i * (THREADS / A_ROW);
        if (COPIES % THREADS == 0 || at < COPIES)
            copy_async(to + (EVEN ? rows * Rows::ROW_STRIDE : place(at)), from + (EVEN ? rows * ROW_SIZE : offset(at)));
    }
}

// The scales of the weights; `row` is the first. RUN: bytes of a row of the array, STRIDE: of one in shared memory.
template <class Rows, int RUN, int STRIDE> DEVICE void copy_array(u8* to, const void* array, size_t row) {
    constexpr int ALL = RUN * Rows::HEIGHT / 16, A_RUN = RUN == STRIDE ? ALL : RUN / 16;  // pieces of 16 bytes
#pragma unroll
    for (int i = 0; i < (ALL + THREADS - 1) / THREADS; i++) {
        int at = i * THREADS + (int)threadIdx.x;
        if (at < ALL) copy_async(to + at / A_RUN * STRIDE + at % A_RUN * 16, (const u8*)array + row * RUN + at * 16);
    }
}
template <class F, class Rows> DEVICE void copy_scales(u8* to, const Weight& w, size_t row) {
    if constexpr (F::S) copy_array<Rows, Rows::S_RUN, Rows::S_STRIDE>(to + Rows::AT_S, w.s, row);
    if constexpr (F::M) copy_array<Rows, Rows::M_RUN, Rows::M_STRIDE>(to + Rows::AT_M, w.m, row);
    if constexpr (!F::HALF) copy_array<Rows, Rows::D_RUN, Rows::D_STRIDE>(to + Rows::AT_D, w.d, row);
    if constexpr (F::D_M) copy_array<Rows, Rows::D_RUN, Rows::D_STRIDE>(to + Rows::AT_D_M, w.d_m, row);
}

// multiply_step for float weights, whose sums depend on the order of inputs: that of weights.cuh.
template <class F, class Rows, int TALL> DEVICE void multiply_floats(Sums<TALL>& sums, const u8* weights, const u8* x, const u8* scales, int row, int segment, int step) {
    int lane = threadIdx.x & 31, quarter = lane & 3, column = lane >> 2;
    const u8* codes = weights + Rows::at_codes(row + column, segment) + quarter * 16;
    scales += 2 * quarter * SCALES;
#pragma unroll 2
    for (int b = 0; b < 2 * PAIRS; b++) {
        int block = 2 * PAIRS * step + b;
        const u8* inputs = x + column * STEP + swapped<STEP>(2 * b + quarter / 2, column) + quarter % 2 * 8;
#pragma unroll
        for (int t = 0; t < TALL; t++) {
            Codes<F> words;
            words.read(codes + t * 16 * Rows::CODE_STRIDE + block * 64, Rows::CODE_STRIDE);
            Block<F> tile(words, 0, 0);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                const u8* p = scales + n * 8 * SCALES + (block / 2 ^ quarter) * 16 + block % 2 * 8;
                float4 of = make_float4(*(const float*)p, 0.f, *(const float*)(p + SCALES), 0.f);
                tile.add(sums[t][n], *(const uint2*)(inputs + n * 8 * STEP), of);
            }
        }
    }
}

// Where a warp's unit begins.
template <int TALL> struct Unit {
    int segment, row, column;
    METHOD Unit(u32 unit) : segment(unit % SEGMENTS) {
        u32 group = unit / SEGMENTS;
        row = group % ROW_GROUPS * (16 * TALL), column = group / ROW_GROUPS * (8 * COLUMN_TILES);
    }
};

// The sums by segment, column and row; four rows more keep the banks apart.
template <int TALL> constexpr int PART_STRIDE = 16 * TALL * ROW_GROUPS + 4;
#ifdef RESIDUAL
constexpr int AT_RESIDUAL = SHARED_SIZE - HEIGHT * COLUMNS * 4;
#else
constexpr int AT_RESIDUAL = SHARED_SIZE;
#endif
static_assert(SEGMENTS * COLUMNS * PART_STRIDE<ROW_TILES> * 4 <= AT_RESIDUAL, "the sums must fit");

template <int TALL> DEVICE void put_sums(const Sums<TALL>& sums, Unit<TALL> unit) {
    int lane = threadIdx.x & 31;
    float* to = (float*)shared + (unit.segment * COLUMNS + unit.column + 2 * (lane & 3)) * PART_STRIDE<TALL> + unit.row + (lane >> 2);
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int i = 0; i < 4 * COLUMN_TILES; i++)
            to[(i / 4 * 8 + i % 2) * PART_STRIDE<TALL> + 16 * t + i / 2 % 2 * 8] = sums[t][i / 4][i % 4];
}

// Four rows of a column are a thread's `out`: number thread + i * THREADS of the block.
template <int TALL> constexpr int FOURS = 4 * TALL * ROW_GROUPS;
template <int TALL> constexpr int OUTS = (FOURS<TALL> * COLUMNS + THREADS - 1) / THREADS;
template <int TALL> DEVICE int out_column(int i) { return ((int)threadIdx.x + i * THREADS) / FOURS<TALL>; }
template <int TALL> DEVICE int out_row(int i) { return ((int)threadIdx.x + i * THREADS) % FOURS<TALL> * 4; }
DEVICE float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
template <int TALL> DEVICE float4 total(int row, int column) {
    const float* p = (const float*)shared + column * PART_STRIDE<TALL> + row;
    float4 sum = *(const float4*)p;
#pragma unroll
    for (int segment = 1; segment < SEGMENTS; segment++) sum = plus(sum, *(const float4*)(p + segment * COLUMNS * PART_STRIDE<TALL>));
    return sum;
}

// The block's products, in `shared` by segment; false where no column of the block counts.
template <class F> DEVICE bool multiply(const Weight& w, size_t row, const i8* codes, const float* scales, const int* count, int column0) {
    constexpr int TALL = TILES_OF<F>;
    using Rows = SharedRows<F, SEGMENTS, HEIGHT_OF<F>, true, 16>;
    static_assert(AT_WEIGHTS + Rows::SIZE <= AT_RESIDUAL, "weights and inputs must fit");
    u8* weights = shared + AT_WEIGHTS;
    auto stage = [](int step) { return shared + step % STAGES * PIECES_SIZE; };
    auto copy_inputs = [=](int step) { copy_pieces<K, STEP>(stage(step), (const u8*)codes + step * STEP, column0); };
    int number = threadIdx.x == 0 ? count[0] : 0;
    copy_scales<F, Rows>(weights, w, row);
    copy_pieces<K / 4, SCALES>(shared + AT_SCALES, (const u8*)scales, column0);
#pragma unroll 1
    for (int step = 0; step < AHEAD; step++) {
        if (step < CODE_PARTS) copy_codes<F, Rows>(weights, w.codes + row * (SEGMENTS * F::BYTES), step);
        copy_inputs(step);
        commit_copies();
    }
    if (threadIdx.x == 0) num_columns = number;  // to wait for it before the copies are on their way would cost
    __syncthreads();
    if (column0 >= num_columns) {
        wait_copies<0>();
        return false;
    }
    Sums<TALL> sums[TURNS] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        wait_copies<AHEAD - 1>();
        __syncthreads();
        if (AHEAD < STEPS && step + AHEAD < STEPS) copy_inputs(step + AHEAD);
        commit_copies();
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            u32 number = (threadIdx.x >> 5) + turn * WARPS;
            if (UNITS % WARPS != 0 && number >= UNITS) break;
            Unit<TALL> unit(number);
            int column = unit.segment * COLUMNS + unit.column;
            const u8 *x = stage(step) + column * STEP, *s = shared + AT_SCALES + column * SCALES;
            auto place = [=](int r, int chunk) { return weights + Rows::at_codes(unit.row + r, unit.segment) + (step * CHUNKS<F> + chunk) * 16; };
            if constexpr (F::HALF != 0)
                multiply_floats<F, Rows>(sums[turn], weights, x, s, unit.row, unit.segment, step);
            else
                multiply_step<F, Rows>(sums[turn], place, weights, x, s, unit.row, unit.segment, step);
        }
    }
    __syncthreads();
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        u32 number = (threadIdx.x >> 5) + turn * WARPS;
        if (UNITS % WARPS == 0 || number < UNITS) put_sums<TALL>(sums[turn], Unit<TALL>(number));
    }
    __syncthreads();
    return true;
}

template <class F>
DEVICE void dense(const Weight& w, int rows, int block, int first_out, const i8* codes, const float* scales, const float* residual,
                  const int* count, float* out) {
    int column0 = blockIdx.x * COLUMNS, row = min(block * HEIGHT_OF<F>, rows - HEIGHT_OF<F>);  // the last two may overlap
    constexpr int TALL = TILES_OF<F>;
    int first = column0 * ALL_ROWS + first_out + row;
    float4* before = (float4*)(shared + AT_RESIDUAL);  // the residual, a thread's own fours
#ifdef RESIDUAL
#pragma unroll
    for (int i = 0; i < OUTS<TALL>; i++)
        if (out_column<TALL>(i) < min(COLUMNS, NUM_ROWS - column0))
            copy_async(before + (int)threadIdx.x + i * THREADS, residual + first + out_column<TALL>(i) * ALL_ROWS + out_row<TALL>(i));
#endif
    if (threadIdx.x == 0) block_out = out + first;
    if (!multiply<F>(w, (size_t)stack_index() * rows + row, codes, scales, count, column0)) return;
#pragma unroll
    for (int i = 0; i < OUTS<TALL>; i++) {
        int column = out_column<TALL>(i), r = out_row<TALL>(i);
        if (column >= min(COLUMNS, num_columns - column0)) break;
        float4 sum = total<TALL>(r, column);
#ifdef RESIDUAL
        sum = plus(before[(int)threadIdx.x + i * THREADS], sum);
#endif
        *(float4*)(block_out + column * ALL_ROWS + r) = sum;
    }
}

template <class F, int ROWS> constexpr int NUM_BLOCKS = (ROWS + HEIGHT_OF<F> - 1) / HEIGHT_OF<F>;

KERNEL(THREADS, 1) NAME(const i8* codes, const float* scales, DENSE_WEIGHTS, DENSE_RESIDUAL const int* count, float* out) {
    int block = blockIdx.y;
#if ROWS_1
    constexpr int BLOCKS_0 = NUM_BLOCKS<FORMAT_0, ROWS_0>, BLOCKS_1 = NUM_BLOCKS<FORMAT_1, ROWS_1>;
    // weights of one format share the code: less of it to fetch
    bool is_2 = block >= BLOCKS_0 + BLOCKS_1, is_1 = block >= BLOCKS_0 && !is_2;
    block -= is_2 ? BLOCKS_0 + BLOCKS_1 : is_1 ? BLOCKS_0 : 0;
    int rows = is_2 ? ROWS_2 : is_1 ? ROWS_1 : ROWS_0, first_out = is_2 ? ROWS_0 + ROWS_1 : is_1 ? ROWS_0 : 0;
    Weight w = choose(is_2, GIVEN(2), choose(is_1, GIVEN(1), GIVEN(0)));
    if (is_2 && !IS_SAME<FORMAT_0, FORMAT_2>)
        dense<FORMAT_2>(w, rows, block, first_out, codes, scales, GIVEN_RESIDUAL, count, out);
    else if (is_1 && !IS_SAME<FORMAT_0, FORMAT_1>)
        dense<FORMAT_1>(w, rows, block, first_out, codes, scales, GIVEN_RESIDUAL, count, out);
    else
        dense<FORMAT_0>(w, rows, block, first_out, codes, scales, GIVEN_RESIDUAL, count, out);
#else
    dense<FORMAT_0>(GIVEN(0), ROWS_0, block, 0, codes, scales, GIVEN_RESIDUAL, count, out);
#endif
}
#endif  // STREAM

#ifdef STREAM
// So many outputs that each warp takes HEIGHT rows of the weight and all columns, one group of rows after the other: it adds
// its segments itself. All inputs stay in shared memory; a warp's weights pass through STEPS_KEPT steps of its own.
static_assert(STAGES == STEPS && HEIGHT <= 32, "all inputs; a row's scales are read by a lane");
constexpr int STEPS_A_ROW = SEGMENTS * STEPS, GROUPS = (ROWS_0 + HEIGHT - 1) / HEIGHT;

// The scales of a lane's row: a segment ahead on their way to shared memory.
template <class F> struct LaneScales {
    using Rows = SharedRows<F, 1, HEIGHT, true, 0>;
    static constexpr int SIZE = Rows::SIZE - Rows::AT_S;
    u32 d[FACTOR_WORDS<F>], d_m[FACTOR_WORDS<F>];
    uint4 long_s;
    uint2 s, m;

    METHOD void read(const Weight& w, size_t row, int segment) {
        size_t block = row * (K / GROUP) + segment * 8;
        read_factors<F>(d, w.d, row, segment);
        if constexpr (F::D_M) read_factors<F>(d_m, w.d_m, row, segment);
        if constexpr (F::S && F::SPLIT) long_s = *(const uint4*)(w.s + 2 * block);
        if constexpr (F::S && !F::SPLIT) s = *(const uint2*)(w.s + block);
        if constexpr (F::M) m = *(const uint2*)(w.m + block);
    }
    METHOD void put(u8* to) const {  // to: where codes would begin
        int row = threadIdx.x % HEIGHT;
        put_factors(to + Rows::at_d(row, 0), d);
        if constexpr (F::D_M) put_factors(to + Rows::at_d_m(row, 0), d_m);
        if constexpr (F::S && F::SPLIT) *(uint4*)(to + Rows::at_s(row, 0)) = long_s;
        if constexpr (F::S && !F::SPLIT) *(uint2*)(to + Rows::at_s(row, 0)) = s;
        if constexpr (F::M) *(uint2*)(to + Rows::at_m(row, 0)) = m;
    }
    METHOD static void put_factors(u8* to, const u32 (&words)[FACTOR_WORDS<F>]) {
        if constexpr (F::BLOCK == SEGMENT)
            *(u16*)to = (u16)words[0];
        else
#pragma unroll
            for (int i = 0; i < FACTOR_WORDS<F>; i++) ((u32*)to)[i] = words[i];
    }
};

// A warp's codes in shared memory: STEPS_KEPT steps of a group of rows.
template <class F> struct GroupCodes {
    static constexpr int CHUNKS = ::CHUNKS<F>, ROW_SIZE = SEGMENTS * F::BYTES, SIZE = HEIGHT * CHUNKS * 16;

    // The rows of the matrix that a group has; those of the last two groups may overlap.
    METHOD static int first_row(int group) { return min(group * HEIGHT, ROWS_0 - HEIGHT); }
    METHOD static size_t row(int group) { return (size_t)stack_index() * ROWS_0 + first_row(group); }
    // Eight rows of one chunk share no bank: chunks are swapped by the bits of `twist`.
    METHOD static int twist(int row) { return (CHUNKS < 8 ? row * CHUNKS / 8 & (CHUNKS - 1) : row & 7) * 16; }
    METHOD static int place(int row, int chunk) { return row * CHUNKS * 16 + (chunk * 16 ^ twist(row)); }
    // Start the copy of a step; where it is past the row's last, of the group that the warp has next.
    METHOD static void copy(const Weight& w, u8* to, int group, int step) {
        if (step >= STEPS_A_ROW) step -= STEPS_A_ROW, group += gridDim.x * WARPS;
        constexpr int ROWS = 32 / CHUNKS;  // at once
        int first = (threadIdx.x & 31) / CHUNKS, chunk = threadIdx.x % CHUNKS, here = place(first, chunk);
        const u8* from = w.codes + (row(group) + first) * ROW_SIZE + (step * CHUNKS + chunk) * 16;
        if (group < GROUPS)
#pragma unroll
            for (int i = 0; i < HEIGHT * CHUNKS / 32; i++)
                copy_async(to + i * 512 + (here ^ twist(i * ROWS)), from + i * ROWS * ROW_SIZE);
        commit_copies();
    }
};

DEVICE void put_totals(const Sums<ROW_TILES>& totals, float* out) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2 * COLUMN_TILES; i++) {
        int column = i / 2 * 8 + 2 * (lane & 3) + i % 2;
        if (column < num_columns)
#pragma unroll
            for (int j = 0; j < 2 * ROW_TILES; j++) out[(size_t)column * ROWS_0 + (lane >> 2) + 8 * j] = totals[j / 2][i / 2][j % 2 * 2 + i % 2];
    }
}

template <class F> DEVICE void stream(const Weight& w, const i8* codes, const float* scales, const int* count, float* out) {
    using Group = GroupCodes<F>;
    constexpr int SIZE = STEPS_KEPT * Group::SIZE + LaneScales<F>::SIZE;
    static_assert(AT_WEIGHTS + WARPS * SIZE <= SHARED_SIZE && STEPS_KEPT <= STEPS_A_ROW + 1, "inputs and weights must fit");
    int row = threadIdx.x % HEIGHT, group = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    u8 *stages = shared + AT_WEIGHTS + (threadIdx.x >> 5) * SIZE, *factors = stages + STEPS_KEPT * Group::SIZE - LaneScales<F>::Rows::AT_S;
    LaneScales<F> next;
    if (group < GROUPS) next.read(w, Group::row(group) + row, 0);
    int number = threadIdx.x == 0 ? count[0] : 0;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) copy_pieces<K, STEP>(shared + step * PIECES_SIZE, (const u8*)codes + step * STEP, 0);
    copy_pieces<K / 4, SCALES>(shared + AT_SCALES, (const u8*)scales, 0);
#pragma unroll 1
    for (int step = 0; step < STEPS_KEPT - 1; step++) Group::copy(w, stages + step * Group::SIZE, group, step);
    if (threadIdx.x == 0) num_columns = number;
    wait_copies<STEPS_KEPT - 2>();
    __syncthreads();
    int now = 0;
#pragma unroll 1
    for (; group < GROUPS; group += gridDim.x * WARPS) {
        Sums<ROW_TILES> totals;
#pragma unroll
        for (int i = 0; i < 4 * ROW_TILES * COLUMN_TILES; i++) totals[i / (4 * COLUMN_TILES)][i / 4 % COLUMN_TILES][i % 4] = -0.f;
#pragma unroll 1
        for (int segment = 0; segment < SEGMENTS; segment++) {
            __syncwarp();
            next.put(factors);
            bool last = segment == SEGMENTS - 1;
            int group_then = last ? group + gridDim.x * WARPS : group;
            if (group_then < GROUPS) next.read(w, Group::row(group_then) + row, last ? 0 : segment + 1);
            Sums<ROW_TILES> sums = {};
#pragma unroll 1
            for (int step = 0; step < STEPS; step++) {
                wait_copies<STEPS_KEPT - 2>();
                __syncwarp();
                int before = now == 0 ? (STEPS_KEPT - 1) * Group::SIZE : now - Group::SIZE;
                Group::copy(w, stages + before, group, segment * STEPS + step + STEPS_KEPT - 1);
                const u8 *here = stages + now, *x = shared + step * PIECES_SIZE + segment * COLUMNS * STEP;
                auto place = [=](int r, int chunk) { return here + Group::place(r, chunk); };
                multiply_step<F, typename LaneScales<F>::Rows>(sums, place, factors, x, shared + AT_SCALES + segment * COLUMNS * SCALES, 0, 0, step);
                now = now == (STEPS_KEPT - 1) * Group::SIZE ? 0 : now + Group::SIZE;
            }
#pragma unroll
            for (int i = 0; i < 4 * ROW_TILES * COLUMN_TILES; i++) {
                int t = i / (4 * COLUMN_TILES), n = i / 4 % COLUMN_TILES;
                totals[t][n][i % 4] += sums[t][n][i % 4];  // the first to -0, which changes no bit of it
            }
        }
        put_totals(totals, out + Group::first_row(group));
    }
    wait_copies<0>();
}

KERNEL(THREADS, 1) NAME(const i8* codes, const float* scales, WEIGHT(0), const int* count, float* out) {
    stream<FORMAT_0>(GIVEN(0), codes, scales, count, out);
}
#endif  // STREAM

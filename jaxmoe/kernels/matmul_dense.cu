// Dense products of few rows. A block takes HEIGHT rows of a weight and COLUMNS columns, a warp one segment of 16 * ROW_TILES
// rows and 8 * COLUMN_TILES columns: each weight is unpacked for all of those, each column read for all of those rows.
// Codes of columns come to shared memory in steps of STEP inputs of every segment, those of weights at once: few large pieces
// are faster than many small ones. Scales of the weights are made floats once for the block, while codes are on their way.
// The segments meet in shared memory.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int WARPS = THREADS / 32, HEIGHT = 16 * ROW_TILES * ROW_GROUPS, COLUMNS = 8 * COLUMN_TILES * COLUMN_GROUPS;
constexpr int UNITS = SEGMENTS * ROW_GROUPS * COLUMN_GROUPS, TURNS = (UNITS + WARPS - 1) / WARPS;
constexpr int STEPS = SEGMENT / STEP, PAIRS = STEP / 64;  // PAIRS: of blocks of 32 inputs in a step
template <class F> constexpr int CHUNKS = F::BYTES / STEPS / 16;  // of a row's codes in a step
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;
// Codes of 8 bits take twice the room: of the tallest such blocks there are more.
template <class F> constexpr int TILES_OF = F::SPLIT && ROW_TILES > 2 ? ROW_TILES - 1 : ROW_TILES;
template <class F> constexpr int HEIGHT_OF = 16 * TILES_OF<F> * ROW_GROUPS;

// Of each segment and column a step's codes, and 64 bytes of scales. Their chunks of 16 bytes are swapped so that eight
// columns share no bank.
constexpr int SCALES = 64, PIECES_SIZE = SEGMENTS * COLUMNS * STEP, SCALES_SIZE = SEGMENTS * COLUMNS * SCALES;
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

template <int NUM> DEVICE void read_vector(u32 (&to)[NUM], const void* from) {
    if constexpr (NUM == 1) to[0] = *(const u32*)from;
    if constexpr (NUM == 2) {
        uint2 v = *(const uint2*)from;
        to[0] = v.x, to[1] = v.y;
    }
#pragma unroll
    for (int i = 0; i < NUM / 4; i++) {
        uint4 v = ((const uint4*)from)[i];
        to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
}

// The high ones of two codes of 4 bits are multiplied where they stand, 16 times as large.
template <class F> constexpr bool AS_BYTES = F::BITS == 4 && F::ZERO == 0 && !F::SPLIT;

// The scales of NUM blocks of a row, as they lie in memory.
template <class F, int NUM> struct RowScales {
    static constexpr int D = F::BLOCK == SEGMENT ? 1 : NUM * (F::WIDE_D ? 4 : 2) / 4;
    u32 d[D], d_m[D], s[NUM * (F::SPLIT ? 2 : 1) / 4], m[NUM / 4];

    METHOD void read(const Weight& w, size_t row, int block) {
        size_t at = row * (K / GROUP) + block;
        read_d(d, w.d, at);
        if constexpr (F::S) read_vector(s, w.s + (F::SPLIT ? 2 * at : at));
        if constexpr (F::M) read_vector(m, w.m + at);
        if constexpr (F::D_M) read_d(d_m, w.d_m, at);
    }
    METHOD static void read_d(u32 (&to)[D], const void* from, size_t at) {
        if constexpr (F::BLOCK == SEGMENT)
            to[0] = ((const u16*)from)[at / 8];
        else
            read_vector(to, (const u8*)from + at * (F::WIDE_D ? 4 : 2));
    }
    METHOD static float number(const u32 (&words)[D], int block) {
        if constexpr (F::BLOCK == SEGMENT) return half_to_float((u16)words[0]);
        if constexpr (F::WIDE_D) return __uint_as_float(words[block % D]);
        return half_to_float((u16)(words[block / 2 % D] >> (16 * (block & 1))));
    }
    // d * s, and that of the second part or minus the minimum.
    METHOD float2 of(int block) const {
        float scale = number(d, block), other = 0.f;
        if constexpr (F::S && F::SPLIT) {
            other = times_byte<F>(scale, s, 2 * block + 1), scale = times_byte<F>(scale, s, 2 * block);
        } else if constexpr (F::S) {
            scale = times_byte<F>(scale, s, block);
        }
        if (AS_BYTES<F> && block % 2) scale *= 1.f / 16;
        if constexpr (F::D_M) {
            other = number(d_m, block);
            if constexpr (F::M) other = times_byte<F>(other, m, block);
            other = -other;
        }
        return make_float2(scale, other);
    }
};

// Those of TILES tiles of 16 rows in shared memory, as a lane wants them: by segment and block, of rows r and r + 8 of a
// tile side by side. Eight rows share no bank, neither when they are read nor, by another order in each segment, when written.
template <int TILES> struct Factors {
    static constexpr int BLOCK = TILES * 128, SEGMENT_SIZE = 8 * BLOCK, SIZE = SEGMENTS * SEGMENT_SIZE;
    METHOD static int at(int segment, int tile, int row) { return segment * SEGMENT_SIZE + tile * 128 + (row ^ (segment & 7)) * 16; }
};

// 16 rows of one block of 32 inputs, in their own order: `a` as mma_int8 takes it. Block of weights.cuh has another order.
template <class F> struct Tile {
    static constexpr int PARTS = F::SPLIT ? 2 : 1;
    u32 a[4];
    float sd[PARTS][2], minus_magic[PARTS][2], minus_minimum[2];

    // factors: of rows l/4 and l/4 + 8, the scale and the other number of each.
    METHOD void unpack(const u32 (&words)[4], float4 factors, int b) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i] = AS_BYTES<F> ? words[i] & (b ? 0xf0f0f0f0u : 0x0f0f0f0fu) : signed_codes<F>(words[i], b);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sd[0][h] = h ? factors.z : factors.x;
            if constexpr (F::SPLIT) sd[PARTS - 1][h] = h ? factors.w : factors.y;
            if constexpr (F::D_M) minus_minimum[h] = h ? factors.w : factors.y;
#pragma unroll
            for (int part = 0; part < PARTS; part++) minus_magic[part][h] = -MAGIC * sd[part][h];
        }
    }
    // x: the lane's inputs of column l/4; (scale, scale * sum) of its two columns.
    METHOD void add(float (&sums)[4], u32 x0, u32 x1, float2 left, float2 right) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int v[4];
            if constexpr (F::SPLIT)
                mma_int8(v, a[2 * part], a[2 * part + 1], part ? x1 : x0, MAGIC_BITS);
            else if constexpr (AS_BYTES<F>)
                mma_bytes(v, a[0], a[1], a[2], a[3], x0, x1, MAGIC_BITS);
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

// Both blocks of a pair of 16 rows.
template <class F> struct PairTile {
    Tile<F> tiles[2];

    // place(row, chunk): 16 bytes of the codes; factors: those of the pair's first block, STRIDE bytes before the second's.
    template <int STRIDE, class Place> METHOD void read(Place place, int row, int pair, const u8* factors) {
        int lane = threadIdx.x & 31;
        u32 words[4];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            if (F::BITS == 8 || b == 0) load_matrices(words, place(row + (lane & 15), pair * (F::BITS / 2) + (lane >> 4) + (F::BITS == 4 ? 0 : 2 * b)));
            tiles[b].unpack(words, *(const float4*)(factors + b * STRIDE), b);
        }
    }
};

// Both blocks of a pair of 8 columns: the lane's inputs of column l/4, the scales of columns 2 * (l%4) and the next.
struct PairColumns {
    u32 x[4];
    float4 left, right;

    METHOD void read(const u8* inputs, const u8* scales, int n, int pair, int all_pairs) {
        int lane = threadIdx.x & 31, column = lane & 7, quarter = lane & 3;
        u32 at = (column * STEP + swapped<STEP>(lane >> 3, column)) ^ (64 * pair);
        load_matrices(x, inputs + (at + n * (8 * STEP)));
        const u8* p = scales + (8 * n + 2 * quarter) * SCALES + (all_pairs ^ quarter) * 16;
        left = *(const float4*)p, right = *(const float4*)(p + SCALES);
    }
    template <class F> METHOD void add(float (&sums)[4], const PairTile<F>& rows, int b) const {
        rows.tiles[b].add(sums, x[2 * b], x[2 * b + 1], b ? make_float2(left.z, left.w) : make_float2(left.x, left.y),
                          b ? make_float2(right.z, right.w) : make_float2(right.x, right.y));
    }
};

// In registers these would be in the way of the sums: how many columns count, and where the block's outputs go.
__shared__ int num_columns;
__shared__ float* block_out;

template <int ROWS> using Sums = float[ROWS][COLUMN_TILES][4];

// One step of 16 * TALL rows. `factors`: the lane's, of the segment's first block and the first 16 rows; a block has STRIDE
// bytes of them. `x` and `scales` are those of the segment's first column.
template <class F, int TALL, int STRIDE, class Place>
DEVICE void multiply_step(Sums<TALL>& sums, Place place, const u8* factors, const u8* x, const u8* scales, int step) {
    constexpr bool SMALL = TALL * COLUMN_TILES <= 2;
#pragma unroll(SMALL ? 2 : 1)
    for (int pair = 0; pair < PAIRS; pair++) {
        int all_pairs = step * PAIRS + pair;
        const u8* here = factors + 2 * all_pairs * STRIDE;
        if constexpr (TALL <= COLUMN_TILES) {  // the fewer stay in registers
            PairTile<F> rows[TALL];
#pragma unroll
            for (int t = 0; t < TALL; t++) rows[t].template read<STRIDE>(place, 16 * t, pair, here + t * 128);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                PairColumns columns;
                if (COLUMN_TILES > 4 && n % 4 == 2) __syncwarp();  // or all columns come first, and registers spill
                columns.read(x, scales, n, pair, all_pairs);
#pragma unroll
                for (int i = 0; i < 2 * TALL; i++) columns.add(sums[i % TALL][n], rows[i % TALL], i / TALL);
            }
        } else {
            PairColumns columns[COLUMN_TILES];
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) columns[n].read(x, scales, n, pair, all_pairs);
#pragma unroll
            for (int t = 0; t < TALL; t++) {
                PairTile<F> rows;
                rows.template read<STRIDE>(place, 16 * t, pair, here + t * 128);
#pragma unroll
                for (int i = 0; i < 2 * COLUMN_TILES; i++) columns[i % COLUMN_TILES].add(sums[t][i % COLUMN_TILES], rows, i / COLUMN_TILES);
            }
        }
    }
}

#ifndef STREAM
// Weights of one format, whose rows follow each other. Sixteen rows lie in one of them.
template <int NUM> struct Stack {
    Weight weights[NUM];
    int rows;  // of the first

    METHOD Stack(const Weight* from, int rows_) : rows(rows_) {
#pragma unroll
        for (int i = 0; i < NUM; i++) weights[i] = from[i];
    }
    METHOD static bool is_past(int row) { return NUM > 1 && row >= ROWS_0; }
    METHOD static bool is_last(int row) { return NUM > 2 && row >= ROWS_0 + ROWS_1; }
    // Rows before the one that counts as row 0 in weight i.
    METHOD int rows_before(int i) const {
        return stack_index() * (i == 2 ? ROWS_2 : i == 1 ? ROWS_1 : rows) - (i == 2 ? ROWS_0 + ROWS_1 : i == 1 ? ROWS_0 : 0);
    }
    METHOD Weight at(int row, int& place) const {  // the weight that has the row, and where
        place = row + (is_last(row) ? rows_before(2) : is_past(row) ? rows_before(1) : rows_before(0));
        return choose(is_last(row), weights[NUM - 1], choose(is_past(row), weights[NUM > 1], weights[0]));
    }
    // As if all rows were in weight i.
    template <int SIZE> METHOD const u8* codes(int i, int row) const { return weights[i].codes + (long long)(row + rows_before(i)) * SIZE; }
};

// How the rows of a block lie in shared memory: the columns' scales, the factors, the codes by segment and row (16 bytes
// more keep the banks apart), the columns' codes.
#ifdef RESIDUAL
constexpr int AT_RESIDUAL = SHARED_SIZE - HEIGHT * COLUMNS * 4;
#else
constexpr int AT_RESIDUAL = SHARED_SIZE;
#endif
template <class F> struct Layout {
    static constexpr int TILES = TILES_OF<F> * ROW_GROUPS, HEIGHT = 16 * TILES, STRIDE = F::BYTES + 16;
    static constexpr int AT_CODES = SCALES_SIZE + (F::HALF ? 0 : Factors<TILES>::SIZE), AT_STAGES = AT_CODES + SEGMENTS * HEIGHT * STRIDE;
    static constexpr int FIT = (AT_RESIDUAL - AT_STAGES) / PIECES_SIZE, STAGES = FIT < STEPS ? FIT : STEPS;
    static_assert(STAGES > (STEPS > 1), "weights and inputs must fit");
    METHOD static int at_codes(int row, int segment) { return AT_CODES + (segment * HEIGHT + row) * STRIDE; }
};

template <class F, int NUM> DEVICE void copy_codes(const Stack<NUM>& stack, int row) {
    using Place = Layout<F>;
    constexpr int CHUNKS = F::BYTES / 16, A_ROW = SEGMENTS * CHUNKS, COPIES = Place::HEIGHT * A_ROW, ROW_SIZE = SEGMENTS * F::BYTES;
    u8* to = shared;
    constexpr bool EVEN = THREADS % A_ROW == 0;  // then a thread's inputs are the same each time
    u32 thread = threadIdx.x;
    auto inside = [=](u32 at) { return at / A_ROW * ROW_SIZE + at % A_ROW * 16; };
    auto place = [=](u32 at) { return Place::at_codes(at / A_ROW, at % A_ROW / CHUNKS) + at % CHUNKS * 16; };
    const u8* from[NUM];
#pragma unroll
    for (int i = 0; i < NUM; i++) from[i] = stack.template codes<ROW_SIZE>(i, row) + (EVEN ? inside(thread) : 0);
    if (EVEN) to += place(thread);
#pragma unroll 4
    for (int i = 0; i < (COPIES + THREADS - 1) / THREADS; i++) {
        u32 at = i * THREADS + thread, rows = i * (THREADS / A_ROW);
        int r = row + at / A_ROW;
        const u8* p = Stack<NUM>::is_last(r) ? from[NUM - 1] : Stack<NUM>::is_past(r) ? from[NUM > 1] : from[0];
        if (COPIES % THREADS == 0 || at < COPIES)
            copy_async(to + (EVEN ? rows * Place::STRIDE : place(at)), p + (EVEN ? rows * ROW_SIZE : inside(at)));
    }
}

// The scales of the weights, on their way through registers: a thread takes rows r and r + 8 of a tile's segment.
template <class F> struct BlockScales {
    static constexpr int TILES = Layout<F>::TILES, TASKS = TILES * 8 * SEGMENTS, NUM = (TASKS + THREADS - 1) / THREADS;
    RowScales<F, 8> kept[NUM][2];

    METHOD static u32 task(int i) { return threadIdx.x + i * THREADS; }
    METHOD static bool is_one(int i) { return TASKS % THREADS == 0 || task(i) < TASKS; }
    METHOD static int row(int i) { return task(i) / SEGMENTS / 8 * 16 + task(i) / SEGMENTS % 8; }
    template <int WEIGHTS> METHOD void read(const Stack<WEIGHTS>& stack, int first) {
#pragma unroll
        for (int i = 0; i < NUM; i++) {
            if (!is_one(i)) break;
            int place;
            Weight w = stack.at(first + row(i), place);
            kept[i][0].read(w, place, task(i) % SEGMENTS * 8), kept[i][1].read(w, place + 8, task(i) % SEGMENTS * 8);
        }
    }
    METHOD void put() const {
#pragma unroll
        for (int i = 0; i < NUM; i++) {
            u8* to = shared + SCALES_SIZE + Factors<TILES>::at(task(i) % SEGMENTS, row(i) / 16, row(i) % 16);
            if (is_one(i))
#pragma unroll
                for (int block = 0; block < 8; block++) {
                    float2 one = kept[i][0].of(block), other = kept[i][1].of(block);
                    *(float4*)(to + block * Factors<TILES>::BLOCK) = make_float4(one.x, one.y, other.x, other.y);
                }
        }
    }
};
template <class F> struct NoScales {
    template <int WEIGHTS> METHOD void read(const Stack<WEIGHTS>&, int) {}
    METHOD void put() const {}
};
template <bool FIRST, class A, class B> struct Either { typedef A Type; };
template <class A, class B> struct Either<false, A, B> { typedef B Type; };

// multiply_step for float weights, whose sums depend on the order of inputs: that of weights.cuh. `codes`: the lane's.
template <class F, int TALL> DEVICE void multiply_floats(Sums<TALL>& sums, const u8* codes, const u8* x, const u8* scales, int step) {
    constexpr int STRIDE = Layout<F>::STRIDE;
    int lane = threadIdx.x & 31, quarter = lane & 3, column = lane >> 2;
    codes += column * STRIDE + quarter * 16;
    scales += 2 * quarter * SCALES;
#pragma unroll 2
    for (int b = 0; b < 2 * PAIRS; b++) {
        int block = 2 * PAIRS * step + b;
        const u8* inputs = x + column * STEP + swapped<STEP>(2 * b + quarter / 2, column) + quarter % 2 * 8;
#pragma unroll
        for (int t = 0; t < TALL; t++) {
            Codes<F> words;
            words.read(codes + t * 16 * STRIDE + block * 64, STRIDE);
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
static_assert(ROW_GROUPS == 1 || COLUMN_GROUPS == 1, "a segment is cut one way");
template <int TALL> struct Unit {
    int segment, row, column;
    METHOD Unit(u32 unit) : segment(unit % SEGMENTS) {
        u32 group = unit / SEGMENTS;
        row = ROW_GROUPS > 1 ? group * (16 * TALL) : 0, column = COLUMN_GROUPS > 1 ? group * (8 * COLUMN_TILES) : 0;
    }
};

// The sums by segment, column and row; four rows more keep the banks apart.
template <int TALL> constexpr int PART_STRIDE = 16 * TALL * ROW_GROUPS + 4;
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

// One step of a warp's units.
template <class F, class AllSums> DEVICE void multiply_units(AllSums& sums, int step) {
    using Place = Layout<F>;
    constexpr int TALL = TILES_OF<F>;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        u32 number = (threadIdx.x >> 5) + turn * WARPS;
        if (UNITS % WARPS != 0 && number >= UNITS) break;
        Unit<TALL> unit(number);
        int column = unit.segment * COLUMNS + unit.column;
        const u8 *x = shared + Place::AT_STAGES + step % Place::STAGES * PIECES_SIZE + column * STEP, *scales = shared + column * SCALES;
        const u8* codes = shared + Place::at_codes(unit.row, unit.segment);
        if constexpr (F::HALF != 0) {
            multiply_floats<F>(sums[turn], codes, x, scales, step);
        } else {
            using Table = Factors<Place::TILES>;
            auto place = [=](int r, int chunk) { return codes + r * Place::STRIDE + (step * CHUNKS<F> + chunk) * 16; };
            const u8* factors = shared + SCALES_SIZE + Table::at(unit.segment, unit.row / 16, (threadIdx.x & 31) / 4);
            multiply_step<F, TALL, Table::BLOCK>(sums[turn], place, factors, x, scales, step);
        }
    }
}

// The block's products, in `shared` by segment.
template <class F, int NUM> DEVICE void multiply(const Stack<NUM>& stack, int row, const i8* codes, const float* scales, const int* count, int column0) {
    using Place = Layout<F>;
    constexpr int STAGES = Place::STAGES, TALL = TILES_OF<F>;
    auto copy_inputs = [=](int step) {
        copy_pieces<K, STEP>(shared + Place::AT_STAGES + step % STAGES * PIECES_SIZE, (const u8*)codes + step * STEP, column0);
    };
    int number = threadIdx.x == 0 ? count[0] : 0;
    typename Either<F::HALF == 0, BlockScales<F>, NoScales<F>>::Type factors;
    factors.read(stack, row);
    copy_pieces<K / 4, SCALES>(shared, (const u8*)scales, column0);
    copy_codes<F>(stack, row);
#pragma unroll 1
    for (int step = 0; step < STAGES; step++) {
        copy_inputs(step);
        commit_copies();
    }
    if (threadIdx.x == 0) num_columns = number;
    factors.put();
    Sums<TALL> sums[TURNS] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
        wait_copies<STAGES - 1>();
        __syncthreads();
        multiply_units<F>(sums, step);
        if (step + STAGES < STEPS) {
            __syncthreads();
            copy_inputs(step + STAGES);
        }
        commit_copies();
    }
    __syncthreads();
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        u32 number = (threadIdx.x >> 5) + turn * WARPS;
        if (UNITS % WARPS == 0 || number < UNITS) put_sums<TALL>(sums[turn], Unit<TALL>(number));
    }
    __syncthreads();
}

// Block `block` of the `rows` of a stack.
template <class F, int NUM>
DEVICE void dense(const Stack<NUM>& stack, int rows, int block, int first_out, const i8* codes, const float* scales, const float* residual,
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
    multiply<F>(stack, row, codes, scales, count, column0);
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
    // weights of one format are one: fewer blocks, and less code to fetch
    constexpr int NUM = !IS_SAME<FORMAT_0, FORMAT_1> ? 1 : IS_SAME<FORMAT_0, FORMAT_2> ? 3 : 2;
    constexpr int ROWS = NUM == 3 ? ALL_ROWS : NUM == 2 ? ROWS_0 + ROWS_1 : ROWS_0, BLOCKS = NUM_BLOCKS<FORMAT_0, ROWS>;
    constexpr int BLOCKS_1 = NUM == 1 ? NUM_BLOCKS<FORMAT_1, ROWS_1> : 0;
    const Weight weights[] = {GIVEN(0), GIVEN(1), GIVEN(2)};
    if (NUM < 3 && block >= BLOCKS + BLOCKS_1) {
        if constexpr (NUM < 3)
            dense<FORMAT_2>(Stack<1>(weights + 2, ROWS_2), ROWS_2, block - BLOCKS - BLOCKS_1, ROWS_0 + ROWS_1, codes, scales, GIVEN_RESIDUAL, count, out);
    } else if (NUM == 1 && block >= BLOCKS) {
        if constexpr (NUM == 1)
            dense<FORMAT_1>(Stack<1>(weights + 1, ROWS_1), ROWS_1, block - BLOCKS, ROWS_0, codes, scales, GIVEN_RESIDUAL, count, out);
    } else {
        dense<FORMAT_0>(Stack<NUM>(weights, ROWS_0), ROWS, block, 0, codes, scales, GIVEN_RESIDUAL, count, out);
    }
#else
    const Weight weight = GIVEN(0);
    dense<FORMAT_0>(Stack<1>(&weight, ROWS_0), ROWS_0, block, 0, codes, scales, GIVEN_RESIDUAL, count, out);
#endif
}
#endif  // STREAM

#ifdef STREAM
// So many outputs that each warp takes HEIGHT rows of the weight and all columns, one group of rows after the other: it adds
// its segments itself. All inputs stay in shared memory; a warp's weights pass through STEPS_KEPT steps of its own.
static_assert(HEIGHT == 16, "a half of the lanes for each half of a row's scales");
constexpr int STEPS_A_ROW = SEGMENTS * STEPS, GROUPS = (ROWS_0 + HEIGHT - 1) / HEIGHT, FACTORS_SIZE = 8 * 128;

// The scales of a segment, of which a lane has half a row: a segment ahead on their way to shared memory.
template <class F> struct LaneScales {
    RowScales<F, 4> kept;
    METHOD void read(const Weight& w, size_t row, int segment) {
        int lane = threadIdx.x & 31;
        kept.read(w, row + lane % 16, segment * 8 + lane / 16 * 4);
    }
    METHOD void put(u8* factors) const {
        int lane = threadIdx.x & 31;
        factors += lane / 16 * 512 + lane % 8 * 16 + lane % 16 / 8 * 8;
#pragma unroll
        for (int block = 0; block < 4; block++) *(float2*)(factors + block * 128) = kept.of(block);
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
    constexpr int SIZE = STEPS_KEPT * Group::SIZE + FACTORS_SIZE, AT_WEIGHTS = SCALES_SIZE + STEPS * PIECES_SIZE;
    static_assert(AT_WEIGHTS + WARPS * SIZE <= SHARED_SIZE && STEPS_KEPT <= STEPS_A_ROW + 1, "inputs and weights must fit");
    int group = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    u8 *stages = shared + AT_WEIGHTS + (threadIdx.x >> 5) * SIZE, *factors = stages + STEPS_KEPT * Group::SIZE;
    LaneScales<F> next;
    if (group < GROUPS) next.read(w, Group::row(group), 0);
    int number = threadIdx.x == 0 ? count[0] : 0;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) copy_pieces<K, STEP>(shared + SCALES_SIZE + step * PIECES_SIZE, (const u8*)codes + step * STEP, 0);
    copy_pieces<K / 4, SCALES>(shared, (const u8*)scales, 0);
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
            if (group_then < GROUPS) next.read(w, Group::row(group_then), last ? 0 : segment + 1);
            Sums<ROW_TILES> sums = {};
#pragma unroll 1
            for (int step = 0; step < STEPS; step++) {
                wait_copies<STEPS_KEPT - 2>();
                __syncwarp();
                int before = now == 0 ? (STEPS_KEPT - 1) * Group::SIZE : now - Group::SIZE;
                Group::copy(w, stages + before, group, segment * STEPS + step + STEPS_KEPT - 1);
                const u8 *here = stages + now, *x = shared + SCALES_SIZE + step * PIECES_SIZE + segment * COLUMNS * STEP;
                auto place = [=](int r, int chunk) { return here + Group::place(r, chunk); };
                multiply_step<F, 1, 128>(sums, place, factors + (threadIdx.x & 31) / 4 * 16, x, shared + segment * COLUMNS * SCALES, step);
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

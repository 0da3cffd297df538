// Dense products of few rows. A block takes HEIGHT rows of a weight and COLUMNS columns, a warp one segment of 16 * ROW_TILES
// rows and 8 * COLUMN_TILES columns: each weight is unpacked for all of those, each column read for all of those rows.
// Everything that the block reads comes to shared memory at once, by bulk copies of whole rows. Two blocks can be a cluster: of
// the same columns (PEERS), each copies half of the inputs for both; or each takes half of the segments (K_PARTS), and the
// first hands its sums over. Formats with two scales a block have two parts of a block too: PARTS.
// Scales of the weights are made floats once for the block, while codes are on their way. The segments meet in shared memory.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int WARPS = THREADS / 32, HEIGHT = 16 * ROW_TILES * ROW_GROUPS, COLUMNS = 8 * COLUMN_TILES * COLUMN_GROUPS;
constexpr int TOGETHER = COLUMN_TILES > 1 ? 2 : 1;  // tiles of columns that one ldmatrix reads
template <int ROWS> using Sums = float[ROWS][COLUMN_TILES][4];

// In registers these would be in the way of the sums: how many columns count, and where the block's outputs go.
__shared__ int num_columns;
__shared__ float* block_out;

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

#ifndef STREAM
constexpr int PART_SEGMENTS = SEGMENTS / K_PARTS, PART_K = K / K_PARTS;  // of a block
constexpr int UNITS = PART_SEGMENTS * ROW_GROUPS * COLUMN_GROUPS, TURNS = (UNITS + WARPS - 1) / WARPS;
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;
// Codes of 8 bits take twice the room: of the tallest such blocks there are more.
template <class F> constexpr int TILES_OF = F::SPLIT && ROW_TILES > 2 ? ROW_TILES - 1 : ROW_TILES;
template <class F> constexpr int HEIGHT_OF = 16 * TILES_OF<F> * ROW_GROUPS;

static_assert(K_PARTS * PEERS <= 2, "a cluster is one block or two");
constexpr bool IN_CLUSTERS = K_PARTS * PEERS > 1;
static_assert(HAS_CLUSTERS || !IN_CLUSTERS, "this architecture has no clusters");
DEVICE int part() { return K_PARTS > 1 ? blockIdx.x % K_PARTS : 0; }

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
    // The codes of a row of SIZE bytes.
    template <int SIZE> METHOD const u8* codes(int row) const {
        int place;
        Weight w = at(row, place);
        return w.codes + (size_t)place * SIZE;
    }
};

// Those of TILES tiles of 16 rows in shared memory, as a lane wants them: by segment and block, of rows r and r + 8 of a
// tile side by side. Eight rows share no bank, neither when they are read nor, by another order in each segment, when written.
template <int TILES> struct Factors {
    static constexpr int BLOCK = TILES * 128, SEGMENT_SIZE = 8 * BLOCK, SIZE = PART_SEGMENTS * SEGMENT_SIZE;
    METHOD static int at(int segment, int tile, int row) { return segment * SEGMENT_SIZE + tile * 128 + (row ^ (segment & 7)) * 16; }
};

// How what a block reads lies in shared memory: the columns' scales and codes, which are at the same place whatever the weights
// are, the factors, the weights' codes, each row by row (16 bytes more keep the banks apart); behind it the sums of the first
// part and the residual.
constexpr int INPUTS_STRIDE = PART_K + 16, SCALES_STRIDE = PART_K / 4 + 16, OUTS_SIZE = HEIGHT * COLUMNS * 4;
constexpr int INPUTS_SIZE = COLUMNS * (PART_K + PART_K / 4), AT_INPUTS = COLUMNS * SCALES_STRIDE, AT_FACTORS = AT_INPUTS + COLUMNS * INPUTS_STRIDE;
#ifdef RESIDUAL
constexpr int AT_RESIDUAL = SHARED_SIZE - OUTS_SIZE;
#else
constexpr int AT_RESIDUAL = SHARED_SIZE;
#endif
constexpr int AT_HANDED = AT_RESIDUAL - (K_PARTS - 1) * OUTS_SIZE;
template <class F> struct Layout {
    static constexpr int TILES = TILES_OF<F> * ROW_GROUPS, HEIGHT = 16 * TILES, IN_ROW = PART_SEGMENTS * F::BYTES, STRIDE = IN_ROW + 16;
    static constexpr int AT_CODES = AT_FACTORS + (F::HALF ? 0 : Factors<TILES>::SIZE);
    static_assert(AT_CODES + HEIGHT * STRIDE <= AT_HANDED, "weights and inputs must fit");
};

__shared__ u64 arrived, handed_over;

// Start all copies of the block; a warp's lanes take one each, where the GPU copies in bulk.
template <class F, int NUM> DEVICE void copy_all(const Stack<NUM>& stack, int row, const i8* codes, const float* scales, int column0) {
    using Place = Layout<F>;
    constexpr u32 MINE = COLUMNS / PEERS, AT_ONCE = 32 / BULK_COPIERS;  // MINE: columns
#pragma unroll 1
    for (u32 i = threadIdx.x / 32 + threadIdx.x % 32 / BULK_COPIERS * WARPS; i < Place::HEIGHT + 2 * MINE; i += AT_ONCE * WARPS) {
        const u8* from;
        u32 to, size;
        if (i < Place::HEIGHT) {
            from = stack.template codes<SEGMENTS * F::BYTES>(row + i) + part() * Place::IN_ROW;
            to = Place::AT_CODES + i * Place::STRIDE, size = Place::IN_ROW;
        } else {
            u32 column = (i - Place::HEIGHT) % MINE * PEERS + (PEERS > 1 ? blockIdx.y % PEERS : 0);
            size_t input = min(column0 + (int)column, NUM_ROWS - 1);
            if (i < Place::HEIGHT + MINE)
                from = (const u8*)codes + input * K + part() * PART_K, to = AT_INPUTS + column * INPUTS_STRIDE, size = PART_K;
            else
                from = (const u8*)scales + input * (K / 4) + part() * (PART_K / 4), to = column * SCALES_STRIDE, size = PART_K / 4;
        }
        if (PEERS > 1 && i >= Place::HEIGHT)
            copy_bulk_to_both<K_PARTS, PEERS>(shared + to, from, size, &arrived);
        else
            copy_bulk(shared + to, from, size, &arrived, threadIdx.x % BULK_COPIERS, BULK_COPIERS);
    }
    commit_copies();
}

// The scales of the weights, on their way through registers: a thread takes rows r and r + 8 of a tile's segment.
template <class F> struct BlockScales {
    static constexpr int TILES = Layout<F>::TILES, TASKS = TILES * 8 * PART_SEGMENTS, NUM = (TASKS + THREADS - 1) / THREADS;
    RowScales<F, 8> kept[NUM][2];

    METHOD static u32 task(int i) { return threadIdx.x + i * THREADS; }
    METHOD static bool is_one(int i) { return TASKS % THREADS == 0 || task(i) < TASKS; }
    METHOD static int row(int i) { return task(i) / PART_SEGMENTS / 8 * 16 + task(i) / PART_SEGMENTS % 8; }
    template <int WEIGHTS> METHOD void read(const Stack<WEIGHTS>& stack, int first) {
#pragma unroll
        for (int i = 0; i < NUM; i++) {
            if (!is_one(i)) break;
            int place;
            Weight w = stack.at(first + row(i), place);
            int block = (part() * PART_SEGMENTS + task(i) % PART_SEGMENTS) * 8;
            kept[i][0].read(w, place, block), kept[i][1].read(w, place + 8, block);
        }
    }
    METHOD void put() const {
#pragma unroll
        for (int i = 0; i < NUM; i++) {
            u8* to = shared + AT_FACTORS + Factors<TILES>::at(task(i) % PART_SEGMENTS, row(i) / 16, row(i) % 16);
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

// A segment of a warp's rows and columns, block after block: little code, since it comes cold from L2, but enough to do while
// a block's numbers are on their way. `factors` and `scales` are the lane's, the others the warp's.
template <class F, int TALL, int STRIDE>
DEVICE void multiply_segment(Sums<TALL>& sums, const u8* codes, const u8* factors, const u8* x, const u8* scales) {
    int lane = threadIdx.x & 31;
    codes += (lane & 15) * Layout<F>::STRIDE + (lane >> 4) * 16;
    x += ((lane & 7) + (TOGETHER - 1) * (lane / 16 * 8)) * INPUTS_STRIDE + lane / 8 % 2 * 16;
    constexpr int SIZE = TALL * COLUMN_TILES, UNROLLED = SIZE > 10 ? 1 : SIZE > 2 ? 2 : 4;
#pragma unroll UNROLLED
    for (int b = 0; b < 8; b++) {
        u32 inputs[COLUMN_TILES / TOGETHER][4];
        float2 left[COLUMN_TILES], right[COLUMN_TILES];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            const u8* p = scales + n * 8 * SCALES_STRIDE + b * 8;
            if (n % TOGETHER == 0) load_matrices(inputs[n / TOGETHER], x + n * 8 * INPUTS_STRIDE + b * 32);
            left[n] = *(const float2*)p, right[n] = *(const float2*)(p + SCALES_STRIDE);
        }
#pragma unroll
        for (int t = 0; t < TALL; t++) {
            u32 words[4];
            Tile<F> rows;
            load_matrices(words, codes + t * 16 * Layout<F>::STRIDE + (F::BITS == 4 ? b / 2 * 32 : b * 32));
            rows.unpack(words, *(const float4*)(factors + b * STRIDE + t * 128), b & 1);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                const u32* of = inputs[n / TOGETHER] + n % TOGETHER * 2;
                rows.add(sums[t][n], of[0], of[1], left[n], right[n]);
            }
        }
    }
}

// The same for float weights, whose sums depend on the order of inputs: that of weights.cuh.
template <class F, int TALL> DEVICE void multiply_floats(Sums<TALL>& sums, const u8* codes, const u8* x, const u8* scales) {
    constexpr int STRIDE = Layout<F>::STRIDE;
    int lane = threadIdx.x & 31, quarter = lane & 3, column = lane >> 2;
    codes += column * STRIDE + quarter * 16, x += column * INPUTS_STRIDE + quarter * 8;
#pragma unroll 2
    for (int b = 0; b < 8; b++) {
#pragma unroll
        for (int t = 0; t < TALL; t++) {
            Codes<F> words;
            words.read(codes + t * 16 * STRIDE + b * 64, STRIDE);
            Block<F> tile(words, 0, 0);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
                const u8* p = scales + n * 8 * SCALES_STRIDE + b * 8;
                float4 of = make_float4(*(const float*)p, 0.f, *(const float*)(p + SCALES_STRIDE), 0.f);
                tile.add(sums[t][n], *(const uint2*)(x + n * 8 * INPUTS_STRIDE + b * 32), of);
            }
        }
    }
}

// Where a warp's unit begins.
static_assert(ROW_GROUPS == 1 || COLUMN_GROUPS == 1, "a segment is cut one way");
template <int TALL> struct Unit {
    int segment, row, column;
    METHOD Unit(u32 unit) : segment(unit % PART_SEGMENTS) {
        u32 group = unit / PART_SEGMENTS;
        row = ROW_GROUPS > 1 ? group * (16 * TALL) : 0, column = COLUMN_GROUPS > 1 ? group * (8 * COLUMN_TILES) : 0;
    }
};

// The sums by segment, column and row; four rows more keep the banks apart.
template <int TALL> constexpr int PART_STRIDE = 16 * TALL * ROW_GROUPS + 4;
static_assert(PART_SEGMENTS * COLUMNS * PART_STRIDE<ROW_TILES> * 4 <= AT_HANDED, "the sums must fit");

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
// The block's segments, added to those of the part before it.
template <int TALL> DEVICE float4 total(int row, int column, const float4* before) {
    const float* p = (const float*)shared + column * PART_STRIDE<TALL> + row;
    float4 sum = *(const float4*)p;
    if (before) sum = plus(*before, sum);
#pragma unroll
    for (int segment = 1; segment < PART_SEGMENTS; segment++) sum = plus(sum, *(const float4*)(p + segment * COLUMNS * PART_STRIDE<TALL>));
    return sum;
}

template <class F, class AllSums> DEVICE void multiply_units(AllSums& sums) {
    using Place = Layout<F>;
    constexpr int TALL = TILES_OF<F>;
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        u32 number = (threadIdx.x >> 5) + turn * WARPS;
        if (UNITS % WARPS != 0 && number >= UNITS) break;
        Unit<TALL> unit(number);
        const u8 *x = shared + AT_INPUTS + unit.column * INPUTS_STRIDE + unit.segment * SEGMENT;
        const u8* scales = shared + (unit.column + 2 * (lane & 3)) * SCALES_STRIDE + unit.segment * (SEGMENT / 4);
        const u8* codes = shared + Place::AT_CODES + unit.row * Place::STRIDE + unit.segment * F::BYTES;
        if constexpr (F::HALF != 0) {
            multiply_floats<F>(sums[turn], codes, x, scales);
        } else {
            using Table = Factors<Place::TILES>;
            const u8* factors = shared + AT_FACTORS + Table::at(unit.segment, unit.row / 16, lane / 4);
            multiply_segment<F, TALL, Table::BLOCK>(sums[turn], codes, factors, x, scales);
        }
    }
}

// The block's products, in `shared` by segment.
template <class F, int NUM> DEVICE void multiply(const Stack<NUM>& stack, int row, const i8* codes, const float* scales, const int* count, int column0) {
    constexpr int TALL = TILES_OF<F>;
    int number = threadIdx.x == 0 ? count[0] : 0;
    if (threadIdx.x == 0) {
        init_phases(&arrived, 1), init_phases(&handed_over, 1);
        fence_barriers();
        expect_bulk(&arrived, Layout<F>::HEIGHT * Layout<F>::IN_ROW + INPUTS_SIZE);
        if (part() > 0) expect_bulk(&handed_over, FOURS<TALL> * COLUMNS * 16);
    }
    typename Either<F::HALF == 0, BlockScales<F>, NoScales<F>>::Type factors;
    if (IN_CLUSTERS) {  // no block may copy to another whose barrier is not there
        arrive_in_cluster<K_PARTS, PEERS>();
        factors.read(stack, row);
        wait_in_cluster<K_PARTS, PEERS>();
    } else {
        __syncthreads();
    }
    copy_all<F>(stack, row, codes, scales, column0);
    if (!IN_CLUSTERS) factors.read(stack, row);
    if (threadIdx.x == 0) num_columns = number;
    factors.put();
    wait_copies<0>();
    __syncthreads();
    wait_phase(&arrived, 0);
    Sums<TALL> sums[TURNS] = {};
    multiply_units<F>(sums);
    __syncthreads();
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        u32 number = (threadIdx.x >> 5) + turn * WARPS;
        if (UNITS % WARPS == 0 || number < UNITS) put_sums<TALL>(sums[turn], Unit<TALL>(number));
    }
    __syncthreads();
}

// The first part's block copies its sums to the second's, which has them then.
template <int TALL> DEVICE void hand_over(float4* sums) {
    if (part() == 0) {
#pragma unroll
        for (int i = 0; i < OUTS<TALL>; i++) {
            float4* mine = sums + (int)threadIdx.x + i * THREADS;
            if (out_column<TALL>(i) >= COLUMNS) break;  // a whole warp
            *mine = total<TALL>(out_row<TALL>(i), out_column<TALL>(i), nullptr);
            fence_bulk();
            __syncwarp();
            if ((threadIdx.x & 31) == 0) copy_bulk_to_next(mine, 512, &handed_over);
        }
    } else {
        wait_phase(&handed_over, 0);
    }
}

// Block `block` of the `rows` of a stack.
template <class F, int NUM>
DEVICE void dense(const Stack<NUM>& stack, int rows, int block, int first_out, const i8* codes, const float* scales, const float* residual,
                  const int* count, float* out) {
    constexpr int TALL = TILES_OF<F>;
    int column0 = blockIdx.x / K_PARTS * COLUMNS, row = min(block * HEIGHT_OF<F>, rows - HEIGHT_OF<F>);  // the last ones may overlap
    int first = column0 * ALL_ROWS + first_out + row;
    float4 *before = (float4*)(shared + AT_RESIDUAL), *handed = (float4*)(shared + AT_HANDED);  // a thread's own fours
#ifdef RESIDUAL
#pragma unroll
    for (int i = 0; i < OUTS<TALL>; i++)
        if (out_column<TALL>(i) < min(COLUMNS, NUM_ROWS - column0))
            copy_async(before + (int)threadIdx.x + i * THREADS, residual + first + out_column<TALL>(i) * ALL_ROWS + out_row<TALL>(i));
#endif
    if (threadIdx.x == 0) block_out = out + first;
    multiply<F>(stack, row, codes, scales, count, column0);
    if (K_PARTS > 1) {
        hand_over<TALL>(handed);
        arrive_in_cluster<K_PARTS, PEERS>();
    }
    if (part() == K_PARTS - 1)
#pragma unroll
        for (int i = 0; i < OUTS<TALL>; i++) {
            int column = out_column<TALL>(i), r = out_row<TALL>(i);
            if (column >= min(COLUMNS, num_columns - column0)) break;
            float4 sum = total<TALL>(r, column, K_PARTS > 1 ? handed + (int)threadIdx.x + i * THREADS : nullptr);
#ifdef RESIDUAL
            sum = plus(before[(int)threadIdx.x + i * THREADS], sum);
#endif
            *(float4*)(block_out + column * ALL_ROWS + r) = sum;
        }
    if (K_PARTS > 1) wait_in_cluster<K_PARTS, PEERS>();  // what the first part copies lies in its shared memory until it is there
}

template <class F, int ROWS> constexpr int NUM_BLOCKS = (ROWS + HEIGHT_OF<F> - 1) / HEIGHT_OF<F>;

#if K_PARTS * PEERS > 1
#define CLUSTERED CLUSTER(K_PARTS, PEERS)
#else
#define CLUSTERED
#endif
KERNEL(THREADS, 1) CLUSTERED NAME(const i8* codes, const float* scales, DENSE_WEIGHTS, DENSE_RESIDUAL const int* count, float* out) {
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
#else
// So many outputs that each warp takes HEIGHT rows of the weight and all columns, one group of rows after the other: it adds
// its segments itself. All inputs stay in shared memory; a warp's weights pass through STEPS_KEPT steps of its own.
constexpr int STEPS = SEGMENT / STEP;
template <class F> constexpr int CHUNKS = F::BYTES / STEPS / 16;  // of a row's codes in a step
// Of each segment and column a step's codes. Their chunks of 16 bytes are swapped so that eight columns share no bank.
constexpr int PIECES_SIZE = SEGMENTS * COLUMNS * STEP;
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

static_assert(HEIGHT == 16, "a half of the lanes for each half of a row's scales");
constexpr int STEPS_A_ROW = SEGMENTS * STEPS, GROUPS = (ROWS_0 + HEIGHT - 1) / HEIGHT, FACTORS_SIZE = 8 * 128;

// The columns' scales by block: those of a lane's columns of TOGETHER tiles lie side by side, so that one read brings nothing
// but what counts. Formats with a minimum have a second table, of scale * sum.
template <class F> struct ColumnScales {
    static constexpr int BLOCK = COLUMNS * 4, TABLE = K / GROUP * BLOCK, SIZE = TABLE * (F::D_M ? 2 : 1), WIDE = 8 * TOGETHER;
    METHOD static int place(int column) { return (column / WIDE * WIDE + column % 8 / 2 * (2 * TOGETHER) + column / 8 % TOGETHER * 2 + column % 2) * 4; }
    // A thread takes two blocks of a column at a time, its neighbours other columns.
    METHOD static void put(u8* to, const float* scales) {
        constexpr int PAIRS_A_ROW = K / GROUP / 2;
#pragma unroll 4
        for (int i = threadIdx.x; i < COLUMNS * PAIRS_A_ROW; i += THREADS) {
            int column = i / WIDE / PAIRS_A_ROW * WIDE + i % WIDE, pair = i / WIDE % PAIRS_A_ROW;
            float4 v = ((const float4*)scales)[min(column, NUM_ROWS - 1) * PAIRS_A_ROW + pair];
            u8* p = to + 2 * pair * BLOCK + place(column);
            *(float*)p = v.x, *(float*)(p + BLOCK) = v.z;
            if constexpr (F::D_M) *(float*)(p + TABLE) = v.y, *(float*)(p + TABLE + BLOCK) = v.w;
        }
    }
};

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

// The warp's rows times all columns, one step. `codes` are the warp's; `factors` and `scales` the lane's, of the step.
template <class F> DEVICE void stream_step(Sums<1>& sums, const u8* codes, const u8* factors, const u8* x, const u8* scales) {
    int lane = threadIdx.x & 31;
    u32 at = ((lane & 7) + (TOGETHER - 1) * (lane / 16 * 8)) * STEP + swapped<STEP>(lane / 8 % 2, lane & 7);
#pragma unroll 1
    for (int b = 0; b < STEP / 32; b++) {
        u32 words[4];
        Tile<F> rows;
        load_matrices(words, codes + GroupCodes<F>::place(lane & 15, (F::BITS == 4 ? b & ~1 : 2 * b) + (lane >> 4)));
        rows.unpack(words, *(const float4*)(factors + b * 128), b & 1);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n += TOGETHER) {
            float of[2 * TOGETHER], others[2 * TOGETHER] = {};
            const u8* p = scales + b * ColumnScales<F>::BLOCK + n * 32;
            load_matrices(words, x + n * 8 * STEP + (at ^ 32 * b));
            read_vector((u32(&)[2 * TOGETHER])of, p);
            if constexpr (F::D_M) read_vector((u32(&)[2 * TOGETHER])others, p + ColumnScales<F>::TABLE);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
                rows.add(sums[0][n + i], words[2 * i], words[2 * i + 1], make_float2(of[2 * i], others[2 * i]), make_float2(of[2 * i + 1], others[2 * i + 1]));
        }
    }
}

DEVICE void put_totals(const Sums<1>& totals, float* out) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2 * COLUMN_TILES; i++) {
        int column = i / 2 * 8 + 2 * (lane & 3) + i % 2;
        if (column < num_columns)
#pragma unroll
            for (int j = 0; j < 2; j++) out[(size_t)column * ROWS_0 + (lane >> 2) + 8 * j] = totals[0][i / 2][j * 2 + i % 2];
    }
}

template <class F> DEVICE void stream(const Weight& w, const i8* codes, const float* scales, const int* count, float* out) {
    using Group = GroupCodes<F>;
    using Scales = ColumnScales<F>;
    constexpr int SIZE = STEPS_KEPT * Group::SIZE + FACTORS_SIZE, AT_WEIGHTS = Scales::SIZE + STEPS * PIECES_SIZE;
    static_assert(AT_WEIGHTS + WARPS * SIZE <= SHARED_SIZE && STEPS_KEPT <= STEPS_A_ROW + 1, "inputs and weights must fit");
    int group = (threadIdx.x >> 5) * gridDim.x + blockIdx.x, lane = threadIdx.x & 31;
    u8 *stages = shared + AT_WEIGHTS + (threadIdx.x >> 5) * SIZE, *factors = stages + STEPS_KEPT * Group::SIZE;
    LaneScales<F> next;
    if (group < GROUPS) next.read(w, Group::row(group), 0);
    int number = threadIdx.x == 0 ? count[0] : 0;
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) copy_pieces<K, STEP>(shared + Scales::SIZE + step * PIECES_SIZE, (const u8*)codes + step * STEP, 0);
#pragma unroll 1
    for (int step = 0; step < STEPS_KEPT - 1; step++) Group::copy(w, stages + step * Group::SIZE, group, step);
    Scales::put(shared, scales);
    if (threadIdx.x == 0) num_columns = number;
    wait_copies<STEPS_KEPT - 2>();
    __syncthreads();
    const u8 *lane_factors = factors + lane / 4 * 16, *lane_scales = shared + lane % 4 * 8 * TOGETHER;
    int now = 0;
#pragma unroll 1
    for (; group < GROUPS; group += gridDim.x * WARPS) {
        Sums<1> totals;
#pragma unroll
        for (int i = 0; i < 4 * COLUMN_TILES; i++) totals[0][i / 4][i % 4] = -0.f;
#pragma unroll 1
        for (int segment = 0; segment < SEGMENTS; segment++) {
            __syncwarp();
            next.put(factors);
            bool last = segment == SEGMENTS - 1;
            int group_then = last ? group + gridDim.x * WARPS : group;
            if (group_then < GROUPS) next.read(w, Group::row(group_then), last ? 0 : segment + 1);
            Sums<1> sums = {};
#pragma unroll 1
            for (int step = 0; step < STEPS; step++) {
                wait_copies<STEPS_KEPT - 2>();
                __syncwarp();
                int before = now == 0 ? (STEPS_KEPT - 1) * Group::SIZE : now - Group::SIZE;
                Group::copy(w, stages + before, group, segment * STEPS + step + STEPS_KEPT - 1);
                const u8* x = shared + Scales::SIZE + step * PIECES_SIZE + segment * COLUMNS * STEP;
                int block = step * (STEP / 32);
                stream_step<F>(sums, stages + now, lane_factors + block * 128, x, lane_scales + (segment * 8 + block) * Scales::BLOCK);
                now = now == (STEPS_KEPT - 1) * Group::SIZE ? 0 : now + Group::SIZE;
            }
#pragma unroll
            for (int i = 0; i < 4 * COLUMN_TILES; i++) totals[0][i / 4][i % 4] += sums[0][i / 4][i % 4];  // the first to -0, which changes no bit of it
        }
        put_totals(totals, out + Group::first_row(group));
    }
    wait_copies<0>();
}

KERNEL(THREADS, 1) NAME(const i8* codes, const float* scales, WEIGHT(0), const int* count, float* out) {
    stream<FORMAT_0>(GIVEN(0), codes, scales, count, out);
}
#endif  // STREAM

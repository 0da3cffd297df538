// Products of few rows: all of a block's weights and inputs come to shared memory in the background; then a warp takes
// 16 rows of a weight, one segment and COLUMN_TILES * 8 inputs; the segments meet in shared memory.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int WARPS = THREADS / 32, TILES = COLUMN_TILES, COLUMNS = 8 * TILES;

// COLUMNS rows of inputs in shared memory, by segment and column.
struct Inputs {
    static constexpr int CODE_STRIDE = SEGMENT + 32, SCALE_STRIDE = 80;  // banks kept apart
    static constexpr int AT_SCALES = SEGMENTS * COLUMNS * CODE_STRIDE, SIZE = AT_SCALES + SEGMENTS * COLUMNS * SCALE_STRIDE;

    // row(column): which row of the inputs is meant.
    template <class Row> METHOD static void copy(u8* to, const i8* codes, const float* scales, Row row, int thread, int copiers) {
#pragma unroll 1
        for (int i = thread; i < COLUMNS * SEGMENTS * 16; i += copiers) {
            int column = i / (SEGMENTS * 16), chunk = i % (SEGMENTS * 16);
            copy_async(to + (chunk / 16 * COLUMNS + column) * CODE_STRIDE + chunk % 16 * 16, codes + (size_t)row(column) * K + chunk * 16);
        }
#pragma unroll 1
        for (int i = thread; i < COLUMNS * SEGMENTS * 4; i += copiers) {
            int column = i / (SEGMENTS * 4), chunk = i % (SEGMENTS * 4);
            copy_async(to + AT_SCALES + (chunk / 4 * COLUMNS + column) * SCALE_STRIDE + chunk % 4 * 16,
                       (const u8*)scales + (size_t)row(column) * (K / 4) + chunk * 16);
        }
    }
};

// The scales of a lane's two rows for four blocks, read as they lie.
template <class F, class Rows> struct QuarterScales {
    static constexpr int S_WORDS = F::SPLIT ? 2 : 1, D_WORDS = F::BLOCK == SEGMENT ? 1 : F::WIDE_D ? 4 : 2;
    u32 s[2][S_WORDS], m[2], d[2][D_WORDS], d_m[2][D_WORDS];

    METHOD QuarterScales(const u8* from, int row, int segment, int half) {
        if constexpr (F::HALF) return;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int at = row + 8 * h;
            read_d(d[h], from + Rows::at_d(at, segment), half);
            if constexpr (F::D_M) read_d(d_m[h], from + Rows::at_d_m(at, segment), half);
            const u32* p = (const u32*)(from + Rows::at_s(at, segment)) + half * S_WORDS;
            if constexpr (F::S)
#pragma unroll
                for (int i = 0; i < S_WORDS; i++) s[h][i] = p[i];
            if constexpr (F::M) m[h] = ((const u32*)(from + Rows::at_m(at, segment)))[half];
        }
    }
    METHOD static void read_d(u32 (&words)[D_WORDS], const u8* p, int half) {
        if constexpr (F::BLOCK == SEGMENT) {
            words[0] = *(const u16*)p;
        } else {
#pragma unroll
            for (int i = 0; i < D_WORDS; i++) words[i] = ((const u32*)p)[half * D_WORDS + i];
        }
    }
    METHOD static float d_of(const u32 (&words)[D_WORDS], int block) {
        if constexpr (F::BLOCK == SEGMENT) return half_to_float((u16)words[0]);
        if constexpr (F::WIDE_D) return __uint_as_float(words[block % D_WORDS]);
        return half_to_float((u16)(words[block / 2 % D_WORDS] >> (16 * (block & 1))));
    }
    METHOD void scale(int h, int block, int part, float& sd, float& minus_magic) const {
        sd = d_of(d[h], block);
        if constexpr (F::S) sd = times_byte<F>(sd, s[h], F::SPLIT ? 2 * block + part : block);
        minus_magic = -MAGIC * sd;
    }
    METHOD float minimum(int h, int block) const {
        float md = d_of(d_m[h], block);
        if constexpr (F::M) md = times_byte<F>(md, &m[h], block);
        return -md;
    }
};

// 16 rows from `row` on, one segment, all columns; ONE: the first column is all there is.
template <class F, class Rows, bool ONE = false> DEVICE void multiply(float (&sums)[TILES][4], const u8* from, const u8* inputs, int row, int segment) {
    int lane = threadIdx.x & 31;
    row += lane >> 2;
    const u8* codes = from + Rows::at_codes(row, segment) + (lane & 3) * F::WORD;
    const u8* x = inputs + (segment * COLUMNS + (lane >> 2)) * Inputs::CODE_STRIDE + (lane & 3) * 8;
    const u8* s = inputs + Inputs::AT_SCALES + (segment * COLUMNS + 2 * (lane & 3)) * Inputs::SCALE_STRIDE;
#pragma unroll
    for (int n = 0; n < TILES; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        QuarterScales<F, Rows> scales(from, row, segment, half);
#pragma unroll
        for (int word = 0; word < F::WORDS / 2; word++) {
            Codes<F> words;
            words.read(codes + (half * (F::WORDS / 2) + word) * 4 * F::WORD, Rows::CODE_STRIDE);
#pragma unroll
            for (int i = 0; i < F::BLOCKS_A_WORD; i++) {
                int in_half = word * F::BLOCKS_A_WORD + i, block = half * 4 + in_half;
                Block<F> weights(words, scales, in_half);
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    uint2 codes_of_x = *(const uint2*)(x + n * 8 * Inputs::CODE_STRIDE + block * 32);
                    const u8* p = s + n * 8 * Inputs::SCALE_STRIDE + block * 8;
                    float2 first = *(const float2*)p, second = *(const float2*)(p + Inputs::SCALE_STRIDE);
                    weights.template add<ONE>(sums[n], codes_of_x, make_float4(first.x, first.y, second.x, second.y));
                }
            }
        }
    }
}

// The sums of a unit [16, COLUMNS] in shared memory; a column more keeps the banks apart.
struct Partial {
    float sums[16][COLUMNS + 1];
    METHOD void put(const float (&from)[TILES][4]) {
        int lane = threadIdx.x & 31, row = lane >> 2, column = 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[row + 8 * (e >> 1)][8 * n + column + (e & 1)] = from[n][e];
    }
};
DEVICE float total(const Partial* parts, int row, int column) {
    float sum = parts[0].sums[row][column];
#pragma unroll
    for (int i = 1; i < SEGMENTS; i++) sum = sum + parts[i].sums[row][column];
    return sum;
}

// Multiply units warp, warp + WARPS ... and leave their sums in `shared`, in the place of the weights.
template <int UNITS, class Unit> DEVICE Partial* each_unit(Unit unit) {
    constexpr int TURNS = (UNITS + WARPS - 1) / WARPS;
    static_assert(UNITS * sizeof(Partial) <= SHARED_SIZE, "the sums must fit");
    int warp = threadIdx.x >> 5;
    float sums[TURNS][TILES][4];
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (warp + i * WARPS < UNITS) unit(sums[i], warp + i * WARPS);
    __syncthreads();
    Partial* parts = (Partial*)shared;
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (warp + i * WARPS < UNITS) parts[warp + i * WARPS].put(sums[i]);
    __syncthreads();
    return parts;
}

#ifdef DENSE
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;

template <class F>
DEVICE void dense(const Weight& w, int rows, int row, int out_row, const i8* codes, const float* scales, const float* residual,
                  const int* count, float* out) {
    using Rows = SharedRows<F, SEGMENTS, 16, true, 32>;
    static_assert(Rows::SIZE + Inputs::SIZE <= SHARED_SIZE, "weights and inputs must fit");
    size_t first = (size_t)stack_index() * rows + row;
    int column0 = blockIdx.x * COLUMNS, num_columns = count[0];
    RowsCopy<F, Rows>(w, threadIdx.x).start(shared, first);
    Inputs::copy(shared + Rows::SIZE, codes, scales, [=](int column) { return min(column0 + column, NUM_ROWS - 1); }, threadIdx.x, THREADS);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    Partial* parts = each_unit<SEGMENTS>(
        [&](float (&sums)[TILES][4], int segment) { multiply<F, Rows>(sums, shared, shared + Rows::SIZE, 0, segment); });
    for (int i = threadIdx.x; i < 16 * COLUMNS; i += THREADS) {
        int column = i / 16, r = i % 16;
        if (column0 + column >= num_columns) break;
        size_t at = (size_t)(column0 + column) * ALL_ROWS + out_row + r;
        float sum = total(parts, r, column);
#ifdef RESIDUAL
        sum = residual[at] + sum;
#endif
        out[at] = sum;
    }
}

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
    int row = blockIdx.y * 16;
#if ROWS_1
    // weights of one format share the code: less of it to fetch
    bool is_1 = row >= ROWS_0 && row < ROWS_0 + ROWS_1, is_2 = row >= ROWS_0 + ROWS_1;
    int before = is_2 ? ROWS_0 + ROWS_1 : is_1 ? ROWS_0 : 0, rows = is_2 ? ROWS_2 : is_1 ? ROWS_1 : ROWS_0;
    Weight w = choose(is_2, GIVEN(2), choose(is_1, GIVEN(1), GIVEN(0)));
    if (is_2 && !IS_SAME<FORMAT_0, FORMAT_2>)
        dense<FORMAT_2>(w, rows, row - before, row, codes, scales, residual, count, out);
    else if (is_1 && !IS_SAME<FORMAT_0, FORMAT_1>)
        dense<FORMAT_1>(w, rows, row - before, row, codes, scales, residual, count, out);
    else
        dense<FORMAT_0>(w, rows, row - before, row, codes, scales, residual, count, out);
#else
    dense<FORMAT_0>(GIVEN(0), ROWS_0, row, row, codes, scales, residual, count, out);
#endif
}
#endif  // DENSE

#if defined(GATE_UP) || defined(DOWN)
#ifdef GATE_UP
constexpr int STEP_ROWS = 16, STEPS_AN_ITEM = 2, PAIRS_A_ROW = ACTIVE;  // 32 rows of h are rounded together
using First = SharedRows<FORMAT_0, SEGMENTS, STEP_ROWS, true, 16>;
using Second = SharedRows<FORMAT_1, SEGMENTS, STEP_ROWS, true, 16>;
constexpr int STAGE = First::SIZE + Second::SIZE, UNITS = 2 * SEGMENTS;
#else
constexpr int STEP_ROWS = 16 * ROW_TILES, STEPS_AN_ITEM = 1, PAIRS_A_ROW = 1;
using First = SharedRows<FORMAT_0, SEGMENTS, STEP_ROWS, true, 32>;
constexpr int STAGE = First::SIZE, UNITS = ROW_TILES * SEGMENTS;
#endif

// The grouped products: the blocks share all (tile, rows) out among them in runs. Most warps multiply; one finishes what
// the step before left in `parts`; COPYING warps fetch the weights of STAGES - 1 steps ahead. A step is STEP_ROWS rows of
// gate and of up, or of down.
constexpr int AT_INPUTS = STAGES * STAGE, AT_PARTS = AT_INPUTS + 2 * Inputs::SIZE, STEPS_A_TILE = ROWS_0 / STEP_ROWS;
static_assert(AT_PARTS + 2 * UNITS * sizeof(Partial) <= SHARED_SIZE, "stages, inputs and sums must fit");
static_assert(STAGES >= 2 && STEPS_A_TILE >= STAGES - 1, "the inputs of two tiles are kept");
constexpr int COPYING = 2, MULTIPLYING = WARPS - COPYING - 1;

KERNEL(THREADS, 1) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles, WEIGHT(0),
#ifdef GATE_UP
                        WEIGHT(1), i8* out_codes, float* out_scales) {
    __shared__ float h[COLUMNS * H_STRIDE];
#else
                        float* out) {
#endif
    constexpr int ITEMS_A_TILE = STEPS_A_TILE / STEPS_AN_ITEM;
    int num_items = num_tiles[0] * ITEMS_A_TILE, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int begin = (int)((long long)num_items * blockIdx.x / gridDim.x) * STEPS_AN_ITEM;
    int end = (int)((long long)num_items * (blockIdx.x + 1) / gridDim.x) * STEPS_AN_ITEM;
    if (begin == end) return;
    const int4* all_tiles = (const int4*)tiles;
    auto pair_of = [&](int4 tile, int column) { return pairs[(size_t)tile.x * NUM_ROWS + tile.y + min(column, tile.z - 1)]; };
    Partial* parts = (Partial*)(shared + AT_PARTS);

    if (warp > MULTIPLYING) {
        int copier = threadIdx.x - 32 * (MULTIPLYING + 1), last_tile = -1, slot = 0;
        int4 tile = make_int4(0, 0, 0, 0);
        RowsCopy<FORMAT_0, First, 32 * COPYING> first(GIVEN(0), copier);
#ifdef GATE_UP
        RowsCopy<FORMAT_1, Second, 32 * COPYING> second(GIVEN(1), copier);
#endif
        auto copy_step = [&](int step) {
            if (step < end) {
                if (step / STEPS_A_TILE != last_tile) {
                    last_tile = step / STEPS_A_TILE, tile = all_tiles[last_tile], slot ^= 1;
                    auto row_of = [&](int column) { return pair_of(tile, column) / PAIRS_A_ROW; };
                    Inputs::copy(shared + AT_INPUTS + slot * Inputs::SIZE, codes, scales, row_of, copier, 32 * COPYING);
                }
                size_t row = ((size_t)stack_index() * MATRICES + tile.x) * ROWS_0 + step % STEPS_A_TILE * STEP_ROWS;
                u8* to = shared + (step - begin) % STAGES * STAGE;
                first.start(to, row);
#ifdef GATE_UP
                second.start(to + First::SIZE, row);
#endif
            }
            commit_copies();
        };
#pragma unroll 1
        for (int step = begin; step < begin + STAGES - 1; step++) copy_step(step);
#pragma unroll 1
        for (int step = begin; step < end; step++) {
            wait_copies<STAGES - 2>();
            __syncthreads();
            copy_step(step + STAGES - 1);
        }
        __syncthreads();
    } else if (warp == MULTIPLYING) {
        int here = -1;
        int4 tile = make_int4(0, 0, 0, 0);
        __syncthreads();
#pragma unroll 1
        for (int step = begin; step < end; step++) {
            if (step / STEPS_A_TILE != here) here = step / STEPS_A_TILE, tile = all_tiles[here];
            int first_row = step % STEPS_A_TILE * STEP_ROWS;
            __syncthreads();
            const Partial* sums = parts + step % 2 * UNITS;
            for (int i = lane; i < STEP_ROWS * tile.z; i += 32) {
                int column = i / STEP_ROWS, r = i % STEP_ROWS;
#ifdef GATE_UP
                h[column * H_STRIDE + step % 2 * 16 + r] = swiglu(total(sums, r, column), total(sums + SEGMENTS, r, column));
#else
                out[(size_t)pair_of(tile, column) * ROWS_0 + first_row + r] = total(sums + r / 16 * SEGMENTS, r % 16, column);
#endif
            }
#ifdef GATE_UP
            __syncwarp();
            auto place = [&](int column) { return pair_of(tile, column); };
            if (step % 2) put_hidden(h, tile.z, ROWS_0, first_row - STEP_ROWS, out_codes, out_scales, place, lane, 32);
            __syncwarp();
#endif
        }
    } else {
        int here = -1, slot = 0;
        bool is_one = false;
#pragma unroll 1
        for (int step = begin; step < end; step++) {
            if (step / STEPS_A_TILE != here) here = step / STEPS_A_TILE, slot ^= 1, is_one = all_tiles[here].z == 1;
            __syncthreads();
            const u8 *from = shared + (step - begin) % STAGES * STAGE, *inputs = shared + AT_INPUTS + slot * Inputs::SIZE;
#pragma unroll 1
            for (int unit = warp; unit < UNITS; unit += MULTIPLYING) {
                float sums[TILES][4];
#ifdef GATE_UP
                bool is_up = unit >= SEGMENTS;
                int segment = is_up ? unit - SEGMENTS : unit, row = 0;
                const u8* mine = from + (is_up ? First::SIZE : 0);
                constexpr bool SAME = IS_SAME<FORMAT_0, FORMAT_1>;
#else
                int segment = unit % SEGMENTS, row = unit / SEGMENTS * 16;
                const u8* mine = from;
                constexpr bool SAME = true;
#endif
                if (SAME && is_one)
                    multiply<FORMAT_0, First, true>(sums, mine, inputs, row, segment);
                else if (SAME || mine == from)
                    multiply<FORMAT_0, First>(sums, mine, inputs, row, segment);
#ifdef GATE_UP
                else
                    multiply<FORMAT_1, Second>(sums, mine, inputs, row, segment);
#endif
                parts[step % 2 * UNITS + unit].put(sums);
            }
        }
        __syncthreads();
    }
}
#endif  // GATE_UP or DOWN

// Products of few rows with the experts that each of them has: the blocks share all (tile, rows) out among them in runs.
// Most warps multiply; one finishes what the step before left in `parts`; COPYING warps fetch the weights of STAGES - 1
// steps ahead. A step is STEP_ROWS rows of gate and of up, or of down. Columns past a tile's last are whatever they are.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int WARPS = THREADS / 32, COLUMNS = 8;  // of a tile

// COLUMNS rows of inputs in shared memory, by segment and column.
struct Inputs {
    static constexpr int CODE_STRIDE = SEGMENT + 32, SCALE_STRIDE = 80;  // banks kept apart
    static constexpr int AT_SCALES = SEGMENTS * COLUMNS * CODE_STRIDE, SIZE = AT_SCALES + SEGMENTS * COLUMNS * SCALE_STRIDE;

    // One row of the inputs to its column.
    METHOD static void copy(u8* to, const i8* codes, const float* scales, int column, int row, int thread, int copiers) {
        codes += (size_t)row * K, scales += (size_t)row * (K / 16);
        for (int i = thread; i < SEGMENTS * 16; i += copiers)
            copy_async(to + (i / 16 * COLUMNS + column) * CODE_STRIDE + i % 16 * 16, codes + i * 16);
        for (int i = thread; i < SEGMENTS * 4; i += copiers)
            copy_async(to + AT_SCALES + (i / 4 * COLUMNS + column) * SCALE_STRIDE + i % 4 * 16, scales + i * 4);
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

// 16 rows from `row` on, one segment, all columns or the even ones.
template <class F, class Rows, bool EVEN> DEVICE void multiply(float (&sums)[4], const u8* from, const u8* inputs, int row, int segment) {
    int lane = threadIdx.x & 31;
    row += lane >> 2;
    const u8* codes = from + Rows::at_codes(row, segment) + (lane & 3) * F::WORD;
    const u8* x = inputs + (segment * COLUMNS + (lane >> 2)) * Inputs::CODE_STRIDE + (lane & 3) * 8;
    const u8* s = inputs + Inputs::AT_SCALES + (segment * COLUMNS + 2 * (lane & 3)) * Inputs::SCALE_STRIDE;
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
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
                float2 one = *(const float2*)(s + block * 8), two = EVEN ? one : *(const float2*)(s + block * 8 + Inputs::SCALE_STRIDE);
                Block<F>(words, scales, in_half).template add<EVEN>(sums, *(const uint2*)(x + block * 32), make_float4(one.x, one.y, two.x, two.y));
            }
        }
    }
}

// A lane's row of a weight, one segment, columns 0 .. N - 1, without tensor cores: less work for few columns. All lanes
// of a warp have the same segment.
template <class F, class Rows, int N> struct LaneRow {
    const u8 *codes, *x, *scales, *s, *m, *d, *d_m;

    METHOD LaneRow(const u8* from, const u8* inputs, int row, int segment)
        : codes(from + Rows::at_codes(row, segment)), x(inputs + segment * COLUMNS * Inputs::CODE_STRIDE),
          scales(inputs + Inputs::AT_SCALES + segment * COLUMNS * Inputs::SCALE_STRIDE), s(from + Rows::at_s(row, segment)),
          m(from + Rows::at_m(row, segment)), d(from + Rows::at_d(row, segment)), d_m(from + Rows::at_d_m(row, segment)) {}

    METHOD static float d_of(const u8* p, int block) {
        if constexpr (F::BLOCK == SEGMENT) return half_to_float(*(const u16*)p);
        if constexpr (F::WIDE_D) return ((const float*)p)[block];
        return half_to_float(((const u16*)p)[block]);
    }
    METHOD static float times(float d, u8 byte, bool is_signed) { return d * (is_signed ? (float)(i8)byte : (float)byte); }

    METHOD void multiply(float (&sums)[N]) const {
#pragma unroll
        for (int n = 0; n < N; n++) sums[n] = 0;
#pragma unroll 1
        for (int pair = 0; pair < 4; pair++) {  // two blocks of 32 inputs
            u32 words[2][8];
            read_codes(words, pair);
#pragma unroll
            for (int i = 0; i < 2; i++) add_block(sums, words[F::BITS == 4 ? 0 : i], 2 * pair + i, i);
        }
    }
    METHOD void read_codes(u32 (&words)[2][8], int pair) const {
#pragma unroll
        for (int i = 0; i < (F::BITS == 4 ? 2 : 4); i++) {
            uint4 v = *(const uint4*)(codes + pair * (F::BITS * 8) + 16 * i);
            u32* to = words[i / 2] + i % 2 * 4;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
    METHOD void add_block(float (&sums)[N], const u32 (&words)[8], int block, int i) const {
        constexpr int PARTS = F::SPLIT ? 2 : 1;
        float sd[PARTS], md = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            sd[part] = d_of(d, block);
            if constexpr (F::S) sd[part] = times(sd[part], s[F::SPLIT ? 2 * block + part : block], F::SIGNED);
        }
        if constexpr (F::D_M) md = d_of(d_m, block);
        if constexpr (F::D_M && F::M) md = times(md, m[block], false);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint4* p = (const uint4*)(x + n * Inputs::CODE_STRIDE + block * 32);
            float2 scale = *(const float2*)(scales + n * Inputs::SCALE_STRIDE + block * 8);
            uint4 b[2] = {p[0], p[1]};
            int v[2] = {MAGIC_BITS, MAGIC_BITS};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int& to = v[F::SPLIT ? half : 0];
                to = __dp4a((int)signed_codes<F>(words[4 * half], i), (int)b[half].x, to);
                to = __dp4a((int)signed_codes<F>(words[4 * half + 1], i), (int)b[half].y, to);
                to = __dp4a((int)signed_codes<F>(words[4 * half + 2], i), (int)b[half].z, to);
                to = __dp4a((int)signed_codes<F>(words[4 * half + 3], i), (int)b[half].w, to);
            }
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                sums[n] = fmaf(fmaf(__int_as_float(v[part]), sd[part], -MAGIC * sd[part]), scale.x, sums[n]);
            if constexpr (F::D_M) sums[n] = fmaf(-md, scale.y, sums[n]);
        }
    }
};

// The sums of a unit [16, COLUMNS] in shared memory; a column more keeps the banks apart.
struct Partial {
    float sums[16][COLUMNS + 1];
    template <bool EVEN> METHOD void put(const float (&from)[4]) {
        int lane = threadIdx.x & 31, row = lane >> 2, column = 2 * (lane & 3);
#pragma unroll
        for (int e = 0; e < 4; e += EVEN ? 2 : 1) sums[row + 8 * (e >> 1)][column + (e & 1)] = from[e];
    }
};
DEVICE float total(const Partial* parts, int row, int column) {
    float sum = parts[0].sums[row][column];
#pragma unroll
    for (int i = 1; i < SEGMENTS; i++) sum = sum + parts[i].sums[row][column];
    return sum;
}

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

constexpr int AT_INPUTS = STAGES * STAGE, AT_PARTS = AT_INPUTS + 2 * Inputs::SIZE, STEPS_A_TILE = ROWS_0 / STEP_ROWS;
static_assert(AT_PARTS + 2 * UNITS * sizeof(Partial) <= SHARED_SIZE, "stages, inputs and sums must fit");
static_assert(STAGES >= 2 && STEPS_A_TILE >= STAGES - 1, "the inputs of two tiles are kept");
constexpr int MULTIPLYING = WARPS - COPYING - 1;
#ifdef GATE_UP
constexpr int LANE_COLUMNS = FORMAT_0::HALF || FORMAT_1::HALF ? 0 : 2;  // to here a lane has a row of its own
#else
constexpr int LANE_COLUMNS = 0;
#endif
// Where the columns of a tile lie: some in even ones, so that a lane has but one of its two.
DEVICE int column_step(int count) { return count > LANE_COLUMNS && 2 * count <= COLUMNS ? 2 : 1; }

// A step's units by tensor cores, 16 rows of one weight and one segment each.
template <bool EVEN> DEVICE void each_tile(const u8* from, const u8* inputs, Partial* to) {
#pragma unroll 1
    for (int unit = threadIdx.x / 32; unit < UNITS; unit += MULTIPLYING) {
        float sums[4];
        int segment = unit % SEGMENTS, group = unit / SEGMENTS;
#ifdef GATE_UP
        if (IS_SAME<FORMAT_0, FORMAT_1> || group == 0)
            multiply<FORMAT_0, First, EVEN>(sums, from + group * First::SIZE, inputs, 0, segment);
        else
            multiply<FORMAT_1, Second, EVEN>(sums, from + First::SIZE, inputs, 0, segment);
#else
        multiply<FORMAT_0, First, EVEN>(sums, from, inputs, 16 * group, segment);
#endif
        to[unit].put<EVEN>(sums);
    }
}

#ifdef GATE_UP
// The same for at most LANE_COLUMNS columns: a warp has one segment of gate and of up, a lane a row.
template <int N> DEVICE void each_lane(const u8* from, const u8* inputs, Partial* to) {
    if constexpr (LANE_COLUMNS > 0) {
        int lane = threadIdx.x & 31, row = lane & 15, is_up = lane >> 4;
#pragma unroll 1
        for (int segment = threadIdx.x / 32; segment < SEGMENTS; segment += MULTIPLYING) {
            float sums[N];
            if (IS_SAME<FORMAT_0, FORMAT_1> || !is_up)
                LaneRow<FORMAT_0, First, N>(from + is_up * First::SIZE, inputs, row, segment).multiply(sums);
            else
                LaneRow<FORMAT_1, Second, N>(from + First::SIZE, inputs, row, segment).multiply(sums);
#pragma unroll
            for (int n = 0; n < N; n++) to[is_up * SEGMENTS + segment].sums[row][n] = sums[n];
        }
    }
}
#endif

// A warp's tile and, while it is multiplied, the one after it. A lane has the pair of a column.
struct TileAhead {
    const int* pairs;
    const int4* tiles;
    int at, last, expert, count, pair, next_expert, next_count, next_pair;

    METHOD TileAhead(const int* pairs_, const int4* tiles_, int first, int last_) : pairs(pairs_), tiles(tiles_), at(first - 1), last(last_) {
        look_ahead();
    }
    METHOD void look_ahead() {
        int4 tile = tiles[min(at + 1, last)];
        next_expert = tile.x, next_count = tile.z;
        next_pair = pairs[(size_t)tile.x * NUM_ROWS + tile.y + min((int)threadIdx.x % COLUMNS, tile.z - 1)];
    }
    METHOD void advance() { at++, expert = next_expert, count = next_count, pair = next_pair; }
    METHOD int pair_of(int column) const { return __shfl_sync(ALL_LANES, pair, column); }
};

KERNEL(THREADS, 1) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles, WEIGHT(0),
#ifdef GATE_UP
                        WEIGHT(1), i8* out_codes, float* out_scales) {
    __shared__ float h[COLUMNS * H_STRIDE];
    __shared__ int places[COLUMNS];
#else
                        float* out) {
    __shared__ int places[COLUMNS];
#endif
    constexpr int ITEMS_A_TILE = STEPS_A_TILE / STEPS_AN_ITEM;
    int num_items = num_tiles[0] * ITEMS_A_TILE, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int begin = (int)((long long)num_items * blockIdx.x / gridDim.x) * STEPS_AN_ITEM;
    int end = (int)((long long)num_items * (blockIdx.x + 1) / gridDim.x) * STEPS_AN_ITEM;
    if (begin == end) return;
    TileAhead tile(pairs, (const int4*)tiles, begin / STEPS_A_TILE, (end - 1) / STEPS_A_TILE);
    Partial* parts = (Partial*)(shared + AT_PARTS);

    if (warp > MULTIPLYING) {
        int copier = threadIdx.x - 32 * (MULTIPLYING + 1), slot = 0;
        RowsCopy<FORMAT_0, First, 32 * COPYING> first(GIVEN(0), copier);
#ifdef GATE_UP
        RowsCopy<FORMAT_1, Second, 32 * COPYING> second(GIVEN(1), copier);
#endif
        auto copy_step = [&](int step) {
            if (step < end) {
                bool is_new = step == begin || step % STEPS_A_TILE == 0;
                if (is_new) tile.advance(), slot ^= 1;
                size_t row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + step % STEPS_A_TILE * STEP_ROWS;
                u8* to = shared + (step - begin) % STAGES * STAGE;
                first.start(to, row);
#ifdef GATE_UP
                second.start(to + First::SIZE, row);
#endif
                if (is_new) {
                    u8* to = shared + AT_INPUTS + slot * Inputs::SIZE;
                    int apart = column_step(tile.count);
#pragma unroll 1
                    for (int column = 0; column < tile.count; column++)
                        Inputs::copy(to, codes, scales, column * apart, tile.pair_of(column) / PAIRS_A_ROW, copier, 32 * COPYING);
                    tile.look_ahead();
                }
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
        __syncthreads();
#pragma unroll 1
        for (int step = begin; step < end; step++) {
            int first_row = step % STEPS_A_TILE * STEP_ROWS;
            if (step == begin || first_row == 0) {
                tile.advance(), tile.look_ahead();
                if (lane < COLUMNS) places[lane] = tile.pair;
            }
            __syncthreads();
            const Partial* sums = parts + step % 2 * UNITS;
            int apart = column_step(tile.count);
#pragma unroll 2
            for (int i = lane; i < STEP_ROWS * tile.count; i += 32) {
                int column = i / STEP_ROWS, r = i % STEP_ROWS, at = column * apart;
#ifdef GATE_UP
                h[column * H_STRIDE + step % 2 * 16 + r] = swiglu(total(sums, r, at), total(sums + SEGMENTS, r, at));
#else
                out[(size_t)places[column] * ROWS_0 + first_row + r] = total(sums + r / 16 * SEGMENTS, r % 16, at);
#endif
            }
#ifdef GATE_UP
            __syncwarp();
            auto place = [&](int column) { return places[column]; };
            if (step % 2) put_hidden(h, tile.count, ROWS_0, first_row - STEP_ROWS, out_codes, out_scales, place, lane, 32);
#endif
            __syncwarp();
        }
    } else {
        int slot = 0;
#pragma unroll 1
        for (int step = begin; step < end; step++) {
            if (step == begin || step % STEPS_A_TILE == 0) tile.advance(), tile.look_ahead(), slot ^= 1;
            __syncthreads();
            const u8 *from = shared + (step - begin) % STAGES * STAGE, *inputs = shared + AT_INPUTS + slot * Inputs::SIZE;
            Partial* to = parts + step % 2 * UNITS;
            if (column_step(tile.count) == 2)
                each_tile<true>(from, inputs, to);
            else if (tile.count > LANE_COLUMNS)
                each_tile<false>(from, inputs, to);
#ifdef GATE_UP
            else if (tile.count == 1)
                each_lane<1>(from, inputs, to);
            else
                each_lane<2>(from, inputs, to);
#endif
        }
        __syncthreads();
    }
}

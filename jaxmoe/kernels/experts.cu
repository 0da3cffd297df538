// The experts of few rows in one launch, gate_up and then down, one block a multiprocessor, all at once. The blocks share
// all (tile, rows) of a product out among them in runs; a tile is up to COLUMNS pairs (token, expert) of one expert. Most
// warps multiply; one finishes what the step before left in `parts`; COPYING warps fetch the weights of some steps
// ahead. A step is STEP_ROWS rows of gate and of up, or of down. Columns past a tile's last are whatever they are.
//
// While a block's last steps of gate_up are multiplied, weights of down already come to where earlier ones lay. The hidden
// rows of a tile are those of several blocks, which count in progress[tile] what they have finished.
//
// Macros: K inputs of gate_up, INNER of down; FORMAT_0 gate's, 1 up's, 2 down's; MATRICES experts, ACTIVE of a row; NUM_ROWS of
// the step; BLOCKS. With LISTED the tiles come from `group`, otherwise each block finds them for itself. The launch number: the
// place of gate and up in their stack * DOWNS + that of down.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int WARPS = THREADS / 32, MULTIPLYING = WARPS - COPYING - 1, COLUMNS = 8;  // of a tile

// COLUMNS rows of inputs in shared memory, by segment and column.
template <int SEGMENTS> struct Inputs {
    static constexpr int CODE_STRIDE = SEGMENT + 32, SCALE_STRIDE = 80;  // banks kept apart
    static constexpr int AT_SCALES = SEGMENTS * COLUMNS * CODE_STRIDE, SIZE = AT_SCALES + SEGMENTS * COLUMNS * SCALE_STRIDE;
    static constexpr int PIECES = SEGMENTS * 20;  // of 16 bytes, codes and then scales

    // One row of the inputs to its column, in the background.
    METHOD static void copy(u8* to, const i8* codes, const float* scales, int column, int row, int thread) {
        codes += (size_t)row * (SEGMENTS * SEGMENT), scales += (size_t)row * (SEGMENTS * 16);
        for (int i = thread; i < SEGMENTS * 16; i += 32 * COPYING)
            copy_async(to + (i / 16 * COLUMNS + column) * CODE_STRIDE + i % 16 * 16, codes + i * 16);
        for (int i = thread; i < SEGMENTS * 4; i += 32 * COPYING)
            copy_async(to + AT_SCALES + (i / 4 * COLUMNS + column) * SCALE_STRIDE + i % 4 * 16, scales + i * 4);
    }
    // The rows of `count` columns, at once: copies in the background would come after those that were begun before.
    template <class Row> METHOD static void fetch(u8* to, const i8* codes, const float* scales, int count, int apart, Row row, int thread) {
        constexpr int TURN = 6, APART = 32 * COPYING;
        int end = count * PIECES;
#pragma unroll 1
        for (int first = thread; first < end; first += TURN * APART) {
            uint4 v[TURN];
            int place[TURN];
#pragma unroll
            for (int i = 0; i < TURN; i++) {
                int n = first + i * APART, column = n / PIECES, piece = n % PIECES;
                if (n >= end) break;
                size_t at = (size_t)row(column) * SEGMENTS;
                bool is_scale = piece >= SEGMENTS * 16;
                int rest = is_scale ? piece - SEGMENTS * 16 : piece, segment = is_scale ? rest / 4 : rest / 16;
                const u8* from = is_scale ? (const u8*)(scales + at * 16 + rest * 4) : (const u8*)(codes + at * SEGMENT + rest * 16);
                v[i] = __ldcg((const uint4*)from);
                place[i] = (segment * COLUMNS + column * apart) * (is_scale ? SCALE_STRIDE : CODE_STRIDE);
                place[i] += is_scale ? AT_SCALES + rest % 4 * 16 : rest % 16 * 16;
            }
#pragma unroll
            for (int i = 0; i < TURN && first + i * APART < end; i++) *(uint4*)(to + place[i]) = v[i];
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

// 16 rows from `row` on, one segment, all columns or the even ones.
template <class F, class Rows, bool EVEN> DEVICE void multiply(float (&sums)[4], const u8* from, const u8* inputs, int row, int segment) {
    int lane = threadIdx.x & 31;
    row += lane >> 2;
    const u8* codes = from + Rows::at_codes(row, segment) + (lane & 3) * F::WORD;
    using In = Inputs<Rows::NUM_SEGMENTS>;
    const u8* x = inputs + (segment * COLUMNS + (lane >> 2)) * In::CODE_STRIDE + (lane & 3) * 8;
    const u8* s = inputs + In::AT_SCALES + (segment * COLUMNS + 2 * (lane & 3)) * In::SCALE_STRIDE;
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
                float2 one = *(const float2*)(s + block * 8), two = EVEN ? one : *(const float2*)(s + block * 8 + In::SCALE_STRIDE);
                Block<F>(words, scales, in_half).template add<EVEN>(sums, *(const uint2*)(x + block * 32), make_float4(one.x, one.y, two.x, two.y));
            }
        }
    }
}

// A lane's row of a weight, one segment, columns 0 .. N - 1, without tensor cores: less work for few columns. All lanes
// of a warp have the same segment.
template <class F, class Rows, int N> struct LaneRow {
    using In = Inputs<Rows::NUM_SEGMENTS>;
    const u8 *codes, *x, *scales, *s, *m, *d, *d_m;

    METHOD LaneRow(const u8* from, const u8* inputs, int row, int segment)
        : codes(from + Rows::at_codes(row, segment)), x(inputs + segment * COLUMNS * In::CODE_STRIDE),
          scales(inputs + In::AT_SCALES + segment * COLUMNS * In::SCALE_STRIDE), s(from + Rows::at_s(row, segment)),
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
            const uint4* p = (const uint4*)(x + n * In::CODE_STRIDE + block * 32);
            float2 scale = *(const float2*)(scales + n * In::SCALE_STRIDE + block * 8);
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
template <int SEGMENTS> DEVICE float total(const Partial* parts, int row, int column) {
    float sum = parts[0].sums[row][column];
#pragma unroll
    for (int i = 1; i < SEGMENTS; i++) sum = sum + parts[i].sums[row][column];
    return sum;
}

// --- The two products. A step's units: 16 rows of one weight and one segment each.

struct GateUp {
    using In = Inputs<K / SEGMENT>;
    using First = SharedRows<FORMAT_0, K / SEGMENT, 16, true, 16>;
    using Second = SharedRows<FORMAT_1, K / SEGMENT, 16, true, 16>;
    static constexpr int SEGMENTS = K / SEGMENT, STEP_ROWS = 16, STEPS_A_TILE = INNER / STEP_ROWS, UNITS = 2 * SEGMENTS;
    static constexpr int STEPS_AN_ITEM = 2, ITEMS_A_TILE = STEPS_A_TILE / 2;  // 32 rows of h are rounded together
    static constexpr int STAGE = First::SIZE + Second::SIZE, STAGES = GATE_UP_STAGES, COPIERS = 32 * GATE_UP_COPYING;
    static constexpr int LANE_COLUMNS = FORMAT_0::HALF || FORMAT_1::HALF ? 0 : 2;  // to here a lane has a row of its own

    struct Copy {
        RowsCopy<FORMAT_0, First, COPIERS> first;
        RowsCopy<FORMAT_1, Second, COPIERS> second;
        int copier;
        METHOD Copy(const Weight& gate, const Weight& up, int copier_) : first(gate, copier_), second(up, copier_), copier(copier_) {}
        METHOD void start(u8* to, size_t row) const {
            if (COPIERS < 32 * COPYING && copier >= COPIERS) return;
            first.start(to, row);
            second.start(to + First::SIZE, row);
        }
    };
    template <bool EVEN> METHOD static void multiply_unit(float (&sums)[4], const u8* from, const u8* inputs, int unit) {
        int segment = unit % SEGMENTS, is_up = unit / SEGMENTS;
        if (IS_SAME<FORMAT_0, FORMAT_1> || !is_up)  // weights of one format share the code: less of it to fetch
            multiply<FORMAT_0, First, EVEN>(sums, from + is_up * First::SIZE, inputs, 0, segment);
        else
            multiply<FORMAT_1, Second, EVEN>(sums, from + First::SIZE, inputs, 0, segment);
    }
};

struct Down {
    using In = Inputs<INNER / SEGMENT>;
    using First = SharedRows<FORMAT_2, INNER / SEGMENT, 16 * ROW_TILES, true, 32>;
    static constexpr int SEGMENTS = INNER / SEGMENT, STEP_ROWS = 16 * ROW_TILES, STEPS_A_TILE = K / STEP_ROWS, UNITS = ROW_TILES * SEGMENTS;
    static constexpr int STAGE = First::SIZE, STAGES = DOWN_STAGES, COPIERS = 32 * DOWN_COPYING, LANE_COLUMNS = 0;

    struct Copy {
        RowsCopy<FORMAT_2, First, COPIERS> first;
        int copier;
        METHOD Copy(const Weight& down, int copier_) : first(down, copier_), copier(copier_) {}
        METHOD void start(u8* to, size_t row) const {
            if (COPIERS == 32 * COPYING || copier < COPIERS) first.start(to, row);
        }
    };
    template <bool EVEN> METHOD static void multiply_unit(float (&sums)[4], const u8* from, const u8* inputs, int unit) {
        multiply<FORMAT_2, First, EVEN>(sums, from, inputs, 16 * (unit / SEGMENTS), unit % SEGMENTS);
    }
};

// Shared memory: the sums of two steps, the list of tiles, and what a product keeps, down's over gate_up's.
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int MOST_UNITS = larger(GateUp::UNITS, Down::UNITS), AT_LISTS = larger(2 * MOST_UNITS * (int)sizeof(Partial), 12 * MATRICES);
constexpr int MOST_PAIRS = NUM_ROWS * ACTIVE, MOST_TILES = (MOST_PAIRS < MATRICES ? MOST_PAIRS : MATRICES) + MOST_PAIRS / COLUMNS + 1;
#ifdef LISTED
constexpr int AT_STAGES = AT_LISTS;
#else
constexpr int AT_TILES = AT_LISTS + (2 * MOST_PAIRS + 3) / 4 * 4, AT_STAGES = (AT_TILES + 4 * MOST_TILES + 15) / 16 * 16;
static_assert(NUM_ROWS <= 64 && MATRICES <= 256, "a bit a row, and a byte an expert");
#endif
template <class Product> constexpr int AT_INPUTS = AT_STAGES + Product::STAGES * Product::STAGE;
template <class Product> constexpr bool FITS =
    AT_INPUTS<Product> + 2 * Product::In::SIZE <= SHARED_SIZE && Product::STAGES >= 2 && Product::STEPS_A_TILE >= Product::STAGES - 1;
static_assert(FITS<GateUp> && FITS<Down>, "stages and the inputs of two tiles must fit");

// Where the columns of a tile lie: some in even ones, so that a lane has but one of its two.
template <class Product> DEVICE int column_step(int count) { return count > Product::LANE_COLUMNS && 2 * count <= COLUMNS ? 2 : 1; }

// --- The tiles.

struct Tile {
    int expert, first, count;  // its pairs are `count` of the list from `first` on
};

#ifdef LISTED
#define LISTS const int *pairs, const int *tiles, const int *num_tiles
#define GIVEN_LISTS pairs, tiles, num_tiles
struct Lists {
    const int* pairs;
    const int4* tiles;
    int num_tiles;

    METHOD Lists(const int* pairs_, const int* tiles_, const int* num_tiles_) : pairs(pairs_), tiles((const int4*)tiles_), num_tiles(*num_tiles_) {}
    METHOD Tile tile(int i) const {
        int4 found = tiles[i];
        return Tile{found.x, found.x * NUM_ROWS + found.y, found.z};
    }
    METHOD int pair(int place) const { return pairs[place]; }
};
#else
#define LISTS const int *ids, const int *count
#define GIVEN_LISTS ids, count
struct Lists {
    int num_tiles;

    METHOD static u16* pairs() { return (u16*)(shared + AT_LISTS); }
    METHOD static u32* tiles() { return (u32*)(shared + AT_TILES); }
    METHOD static Tile tile(int i) {
        u32 word = tiles()[i];
        return Tile{(int)(word & 255), (int)(word >> 8 & 0xffff), (int)(word >> 24)};
    }
    METHOD static int pair(int place) { return pairs()[place]; }

    // An expert's rows as bits, since none has it twice: their number gives its tiles, a pair's place is that of its bit.
    METHOD Lists(const int* ids, const int* count) {
        constexpr int TURNS = (MOST_PAIRS + THREADS - 1) / THREADS;
        u32* rows = (u32*)shared;  // of each expert two words
        int* firsts = (int*)(rows + 2 * MATRICES);
        __shared__ int all;
        int found[TURNS], num_pairs = min(*count, NUM_ROWS) * ACTIVE;
#pragma unroll
        for (int i = 0; i < TURNS; i++) found[i] = ids[min((int)threadIdx.x + i * THREADS, MOST_PAIRS - 1)];
        for (int i = threadIdx.x; i < 2 * MATRICES; i += THREADS) rows[i] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            int pair = threadIdx.x + i * THREADS, row = pair / ACTIVE;
            if (pair < num_pairs) atomicOr(&rows[2 * found[i] + row / 32], 1u << row % 32);
        }
        __syncthreads();
        if (threadIdx.x < 32) put_tiles(rows, firsts, all);
        __syncthreads();
        num_tiles = all;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            int pair = threadIdx.x + i * THREADS, row = pair / ACTIVE, expert = found[i];
            if (pair >= num_pairs) break;
            u32 low = rows[2 * expert], high = rows[2 * expert + 1], below = (1u << row % 32) - 1;
            int before = row < 32 ? __popc(low & below) : __popc(low) + __popc(high & below);
            pairs()[firsts[expert] + before] = (u16)pair;
        }
        __syncthreads();
    }
    // By one warp, a lane some neighbouring experts: their tiles, and the places of their first pairs.
    METHOD static void put_tiles(const u32* rows, int* firsts, int& all) {
        constexpr int PER_LANE = (MATRICES + 31) / 32;
        int lane = threadIdx.x, counts[PER_LANE], mine = 0;  // pairs, and tiles in the upper half
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int expert = lane * PER_LANE + i;
            counts[i] = expert < MATRICES ? __popc(rows[2 * expert]) + __popc(rows[2 * expert + 1]) : 0;
            mine += counts[i] + ((counts[i] + COLUMNS - 1) / COLUMNS << 16);
        }
        int sum = mine;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            int lower = __shfl_up_sync(ALL_LANES, sum, offset);
            if (lane >= offset) sum += lower;
        }
        if (lane == 31) all = sum >> 16;
        int first = sum - mine & 0xffff, number = sum - mine >> 16;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int expert = lane * PER_LANE + i;
            if (expert < MATRICES) firsts[expert] = first;
#pragma unroll 1
            for (int done = 0; done < counts[i]; done += COLUMNS)
                tiles()[number++] = (u32)expert | (u32)(first + done) << 8 | (u32)min(counts[i] - done, COLUMNS) << 24;
            first += counts[i];
        }
    }
};
#endif

// A block's steps begin .. end - 1 of a product.
struct Share {
    int begin, end;
    METHOD int size() const { return end - begin; }
};
DEVICE Share share_of_gate_up(int num_tiles) {
    u32 num_items = num_tiles * GateUp::ITEMS_A_TILE, begin = num_items * blockIdx.x / BLOCKS, end = num_items * (blockIdx.x + 1) / BLOCKS;
    return Share{(int)begin * GateUp::STEPS_AN_ITEM, (int)end * GateUp::STEPS_AN_ITEM};
}
// Blocks that have an item of gate_up less have more of down.
DEVICE int begin_of_down(int num_tiles, int block) {
    constexpr u32 UNIT = 16, ITEM = UNIT * GateUp::STEPS_AN_ITEM * GateUp::STAGE / Down::STAGE;  // a step of down is a UNIT
    static_assert((u64)MOST_TILES * larger(UNIT * Down::STEPS_A_TILE, GateUp::ITEMS_A_TILE) * BLOCKS >> 31 == 0, "products fit");
    u32 items = num_tiles * GateUp::ITEMS_A_TILE, steps = num_tiles * Down::STEPS_A_TILE;
    u32 behind = UNIT * steps < ITEM * BLOCKS ? 0 : ITEM * (items * block % BLOCKS);
    return (int)((UNIT * steps * block + behind) / (UNIT * BLOCKS));
}

// --- What warps that multiply do.

template <class Product, bool EVEN> DEVICE void each_tile(const u8* from, const u8* inputs, Partial* to) {
#pragma unroll 1
    for (int unit = threadIdx.x / 32; unit < Product::UNITS; unit += MULTIPLYING) {
        float sums[4];
        Product::template multiply_unit<EVEN>(sums, from, inputs, unit);
        to[unit].put<EVEN>(sums);
    }
}

// The same for at most LANE_COLUMNS columns of gate_up: a warp has one segment of gate and of up, a lane a row.
template <int N> DEVICE void each_lane(const u8* from, const u8* inputs, Partial* to) {
    using First = GateUp::First;
    if constexpr (GateUp::LANE_COLUMNS > 0) {
        int lane = threadIdx.x & 31, row = lane & 15, is_up = lane >> 4;
#pragma unroll 1
        for (int segment = threadIdx.x / 32; segment < GateUp::SEGMENTS; segment += MULTIPLYING) {
            float sums[N];
            if (IS_SAME<FORMAT_0, FORMAT_1> || !is_up)
                LaneRow<FORMAT_0, First, N>(from + is_up * First::SIZE, inputs, row, segment).multiply(sums);
            else
                LaneRow<FORMAT_1, GateUp::Second, N>(from + First::SIZE, inputs, row, segment).multiply(sums);
#pragma unroll
            for (int n = 0; n < N; n++) to[is_up * GateUp::SEGMENTS + segment].sums[row][n] = sums[n];
        }
    }
}

// Step n of a share lies in stage (n + first_stage) % STAGES. The last one of gate_up lies in the last stage, so that down's
// stages can be filled from the first on.
template <class Product> DEVICE int first_stage(const Share& share) {
    return IS_SAME<Product, GateUp> ? Product::STAGES - share.size() % Product::STAGES : 0;
}

template <class Product> DEVICE void multiply_steps(const Lists& lists, const Share& share) {
    Partial* parts = (Partial*)shared;
    int stage = first_stage<Product>(share) % Product::STAGES, count = 0, number = 0;
#pragma unroll 1
    for (int step = share.begin; step < share.end; step++) {
        if (step == share.begin || step % Product::STEPS_A_TILE == 0) {
            number = step / Product::STEPS_A_TILE;
            count = lists.tile(number).count;
        }
        __syncthreads();
        const u8 *from = shared + AT_STAGES + stage * Product::STAGE, *inputs = shared + AT_INPUTS<Product> + number % 2 * Product::In::SIZE;
        Partial* to = parts + step % 2 * MOST_UNITS;
        if (column_step<Product>(count) == 2)
            each_tile<Product, true>(from, inputs, to);
        else if (Product::LANE_COLUMNS == 0 || count > Product::LANE_COLUMNS)
            each_tile<Product, false>(from, inputs, to);
        else if (count == 1)
            each_lane<1>(from, inputs, to);
        else
            each_lane<2>(from, inputs, to);
        stage = stage + 1 < Product::STAGES ? stage + 1 : 0;
    }
    __syncthreads();
}

// --- What the warp that finishes does: finish(first row, tile's number, count, where the sums lie) of each step, one step
// later. `places` are the pairs of the tile's columns.

template <class Product, class Finish> DEVICE void finish_steps(const Lists& lists, const Share& share, int* places, Finish finish) {
    int lane = threadIdx.x & 31, number = 0;
    Tile tile{0, 0, 0};
    __syncthreads();
#pragma unroll 1
    for (int step = share.begin; step < share.end; step++) {
        int first_row = step % Product::STEPS_A_TILE * Product::STEP_ROWS;
        if (step == share.begin || first_row == 0) {
            number = step / Product::STEPS_A_TILE, tile = lists.tile(number);
            if (lane < tile.count) places[lane] = lists.pair(tile.first + lane);
        }
        __syncthreads();
        finish(step, first_row, number, tile.count, (const Partial*)shared + step % 2 * MOST_UNITS);
        __syncwarp();
    }
}

DEVICE void finish_gate_up(const Lists& lists, const Share& share, int* places, i8* codes, float* scales, int* progress) {
    __shared__ float h[COLUMNS * H_STRIDE];
    int lane = threadIdx.x & 31, untold = 0;
    finish_steps<GateUp>(lists, share, places, [&](int step, int first_row, int number, int count, const Partial* sums) {
        int apart = column_step<GateUp>(count);
#pragma unroll 2
        for (int i = lane; i < 16 * count; i += 32) {
            int column = i / 16, r = i % 16, at = column * apart;
            float gate = total<GateUp::SEGMENTS>(sums, r, at), up = total<GateUp::SEGMENTS>(sums + GateUp::SEGMENTS, r, at);
            h[column * H_STRIDE + step % 2 * 16 + r] = swiglu(gate, up);
        }
        __syncwarp();
        if (step % 2 == 0) return;
        auto place = [&](int column) { return places[column]; };
        put_hidden(h, count, INNER, first_row - 16, codes, scales, place, lane, 32);
        __syncwarp();
        // a tile's items together: each time costs about a step, until all that was written is in the cache
        untold++;
        if (step + 1 < share.end && first_row + 16 < INNER) return;
        if (lane == 0) add_after(progress + number, untold);
        untold = 0;
    });
}

DEVICE void finish_down(const Lists& lists, const Share& share, int* places, float* out) {
    constexpr int ROWS = Down::STEP_ROWS;
    finish_steps<Down>(lists, share, places, [&](int, int first_row, int, int count, const Partial* sums) {
        int apart = column_step<Down>(count);
#pragma unroll 2
        for (int i = threadIdx.x & 31; i < ROWS * count; i += 32) {
            int column = i / ROWS, r = i % ROWS;
            out[(size_t)places[column] * K + first_row + r] = total<Down::SEGMENTS>(sums + r / 16 * Down::SEGMENTS, r % 16, column * apart);
        }
    });
}

// --- What the copying warps do.

// A share's weights and inputs, step by step.
template <class Product> struct Fetch {
    const Lists& lists;
    Share share;
    const typename Product::Copy& weights;
    const i8* codes;
    const float* scales;
    size_t first_row;  // of all matrices that lie before this layer's in the stack
    int copier, stage0;

    METHOD Fetch(const Lists& lists_, const Share& share_, const typename Product::Copy& weights_, const i8* codes_, const float* scales_, int index)
        : lists(lists_), share(share_), weights(weights_), codes(codes_), scales(scales_),
          first_row((size_t)index * MATRICES * (Product::STEPS_A_TILE * Product::STEP_ROWS)), copier(weights_.copier),
          stage0(first_stage<Product>(share_)) {}
    METHOD bool is_new(int n) const { return n == 0 || (share.begin + n) % Product::STEPS_A_TILE == 0; }
    METHOD int number_of(int n) const { return (share.begin + n) / Product::STEPS_A_TILE; }
    METHOD u8* inputs(int number) const { return shared + AT_INPUTS<Product> + number % 2 * Product::In::SIZE; }
    METHOD void start_weights(int n) const {
        int step = share.begin + n, rows = Product::STEPS_A_TILE * Product::STEP_ROWS;
        size_t row = first_row + (size_t)lists.tile(number_of(n)).expert * rows + step % Product::STEPS_A_TILE * Product::STEP_ROWS;
        weights.start(shared + AT_STAGES + (n + stage0) % Product::STAGES * Product::STAGE, row);
    }
    // Pairs are `shared_by` to a row of inputs.
    METHOD void start_inputs(int number, int shared_by) const {
        Tile tile = lists.tile(number);
        int apart = column_step<Product>(tile.count);
#pragma unroll 1
        for (int column = 0; column < tile.count; column++)
            Product::In::copy(inputs(number), codes, scales, column * apart, lists.pair(tile.first + column) / shared_by, copier);
    }
};

// All of gate_up, and the first weights of down as soon as there is room; returns how many steps of them.
DEVICE int fetch_gate_up(const Fetch<GateUp>& gate_up, const Fetch<Down>& down) {
    constexpr int AHEAD = GateUp::STAGES - 1;
    int size = gate_up.share.size(), early = 0;
    auto start = [&](int n) {
        if (n < size) {
            gate_up.start_weights(n);
            if (gate_up.is_new(n)) gate_up.start_inputs(gate_up.number_of(n), ACTIVE);
        }
    };
#pragma unroll 1
    for (int n = 0; n < AHEAD; n++) start(n), commit_copies();
#pragma unroll 1
    for (int n = 0; n < size; n++) {
        wait_copies<AHEAD - 1>();
        __syncthreads();
        start(n + AHEAD);
        int room = (GateUp::STAGES - (size - n)) * GateUp::STAGE;  // where nothing lies that will be multiplied
        for (; early < min(Down::STAGES, down.share.size()) && (early + 1) * Down::STAGE <= room; early++) down.start_weights(early);
        commit_copies();
    }
    __syncthreads();
    return early;
}

// Down, whose first `early` weights are on their way.
DEVICE void fetch_down(const Fetch<Down>& down, int early, const int* progress) {
    constexpr int AHEAD = Down::STAGES - 1;
    const Lists& lists = down.lists;
    int size = down.share.size();
    auto wait_for_hidden = [&](int number) { wait_for(progress + number, GateUp::ITEMS_A_TILE); };
#pragma unroll 1
    for (int n = 0; n < Down::STAGES; n++) {  // all of them, since there is time
        if (n >= early && n < size) down.start_weights(n);
        if (n < AHEAD) commit_copies();
    }
#pragma unroll 1
    for (int n = 0; n < min(AHEAD, size); n++) {
        if (!down.is_new(n)) continue;
        int number = down.number_of(n);
        Tile tile = lists.tile(number);
        int apart = column_step<Down>(tile.count);
        wait_for_hidden(number);
        Down::In::fetch(down.inputs(number), down.codes, down.scales, tile.count, apart, [&](int column) { return lists.pair(tile.first + column); }, down.copier);
    }
#pragma unroll 1
    for (int n = 0; n < size; n++) {
        wait_copies<AHEAD - 1>();
        __syncthreads();
        int later = n + AHEAD;
        if (later < size) {
            if (n > 0) down.start_weights(later);
            if (down.is_new(later)) {
                wait_for_hidden(down.number_of(later));
                down.start_inputs(down.number_of(later), 1);
            }
        }
        commit_copies();
    }
    __syncthreads();
}

KERNEL(THREADS, 1)
experts(const i8* codes, const float* scales, LISTS, WEIGHT(0), WEIGHT(1), WEIGHT(2), const int*, i8* hidden_codes, float* hidden_scales,
        float* out, int* progress) {
    __shared__ int places[COLUMNS];
    int warp = threadIdx.x >> 5, index = launch_number<SHARED_SIZE>() / DOWNS, down_index = launch_number<SHARED_SIZE>() % DOWNS;
    Lists lists(GIVEN_LISTS);
    Share gate_up = share_of_gate_up(lists.num_tiles);
    Share down{begin_of_down(lists.num_tiles, blockIdx.x), begin_of_down(lists.num_tiles, blockIdx.x + 1)};
    if (warp > MULTIPLYING) {
        int copier = threadIdx.x - 32 * (MULTIPLYING + 1);
        GateUp::Copy first(GIVEN(0), GIVEN(1), copier);
        Down::Copy second(GIVEN(2), copier);
        Fetch<Down> later(lists, down, second, hidden_codes, hidden_scales, down_index);
        int early = fetch_gate_up(Fetch<GateUp>(lists, gate_up, first, codes, scales, index), later);
        fetch_down(later, early, progress);
    } else if (warp == MULTIPLYING) {
        finish_gate_up(lists, gate_up, places, hidden_codes, hidden_scales, progress);
        finish_down(lists, down, places, out);
    } else {
        multiply_steps<GateUp>(lists, gate_up);
        multiply_steps<Down>(lists, down);
    }
}

// The experts of few rows in one launch, gate_up and then down, one block a multiprocessor, all at once. A tile is up to
// COLUMNS pairs (token, expert) of one expert; a step is STEP_ROWS rows of gate and of up, or of down, of a tile. Blocks take
// most steps in runs that are shared out beforehand, and the last ones from a counter, so that all end together. Most warps
// multiply; FINISHING ones finish what was multiplied; one fetches the tiles' inputs and one the weights of some steps
// ahead, each array of a step by one bulk copy. They wait for each other at barriers of phases, each warp on its own, so that
// none keeps step with others. Columns past a tile's last are whatever they are. 16 rows of a weight are called a tile of rows.
//
// While a block's last steps of gate_up are multiplied, weights of down already come to where earlier ones lay. The hidden
// rows of a tile are those of several blocks, which count in progress[tile] what they have finished.
//
// Macros: K inputs of gate_up, INNER of down; FORMAT_0 gate's, 1 up's, 2 down's; MATRICES experts, ACTIVE of a row; NUM_ROWS of
// the step; BLOCKS; ROW_TILES tiles of 16 rows in a step of down; for each product STAGES, the steps that are kept, and SUMS,
// those whose sums are; DOWN_INPUTS tiles whose inputs are. With LISTED the tiles come from `group`, otherwise each block finds
// them for itself. The launch number: the place of gate and up in their stack * DOWNS + that of down.
#include "weights.cuh"

extern __shared__ __align__(128) u8 shared[];

constexpr int WARPS = THREADS / 32, FINISHING = 2, MULTIPLYING = WARPS - FINISHING - 2, COLUMNS = 8;  // of a tile

// COLUMNS rows of inputs in shared memory, as they lie in global memory but for 16 bytes between, which keep the banks apart.
template <int SEGMENTS> struct Inputs {
    static constexpr int CODE_STRIDE = SEGMENTS * SEGMENT + 16, SCALE_STRIDE = SEGMENTS * 64 + 16;
    static constexpr int AT_SCALES = COLUMNS * CODE_STRIDE, SIZE = AT_SCALES + COLUMNS * SCALE_STRIDE;
    static constexpr int PIECES = SEGMENTS * 20;  // of 16 bytes, codes and then scales

    METHOD static int place(int column, int piece) {
        bool is_scale = piece >= SEGMENTS * 16;
        return is_scale ? AT_SCALES + column * SCALE_STRIDE + (piece - SEGMENTS * 16) * 16 : column * CODE_STRIDE + piece * 16;
    }
    METHOD static const u8* source(const i8* codes, const float* scales, int row, int piece) {
        bool is_scale = piece >= SEGMENTS * 16;
        const u8* from = is_scale ? (const u8*)(scales + (size_t)row * (SEGMENTS * 16)) - SEGMENTS * SEGMENT : (const u8*)codes + (size_t)row * (SEGMENTS * SEGMENT);
        return from + piece * 16;
    }
    // One row of the inputs to its column, in the background.
    METHOD static void copy(u8* to, const i8* codes, const float* scales, int column, int row, int lane) {
#pragma unroll 4
        for (int i = lane; i < PIECES; i += 32) copy_async(to + place(column, i), source(codes, scales, row, i));
    }
};

// NUM rows of a weight, COUNT segments each, each array as it lies in global memory: codes `swapped`, so that eight rows share
// no bank.
template <class F, int COUNT, int NUM> struct TileRows {
    static constexpr int NUM_SEGMENTS = COUNT, TASKS = NUM * COUNT, GROUPS = F::BLOCK == SEGMENT ? 1 : 8;
    static constexpr int CODES = TASKS * F::BYTES, S = F::S ? TASKS * (F::SPLIT ? 16 : 8) : 0, M = F::M ? TASKS * 8 : 0;
    static constexpr int D = F::HALF ? 0 : TASKS * GROUPS * (F::WIDE_D ? 4 : 2), D_M = F::D_M ? D : 0;
    static constexpr int AT_S = CODES, AT_M = AT_S + S, AT_D = AT_M + M, AT_D_M = AT_D + D, BYTES = AT_D_M + D_M;
    static constexpr int SIZE = (BYTES + 127) / 128 * 128;

    METHOD static int at_codes(int row, int segment) { return (row * COUNT + segment) * F::BYTES; }
    METHOD static int at_s(int row, int segment) { return AT_S + (row * COUNT + segment) * (F::SPLIT ? 16 : 8); }
    METHOD static int at_m(int row, int segment) { return AT_M + (row * COUNT + segment) * 8; }
    METHOD static int at_d(int row, int segment) { return AT_D + (row * COUNT + segment) * (GROUPS * (F::WIDE_D ? 4 : 2)); }
    METHOD static int at_d_m(int row, int segment) { return at_d(row, segment) + D; }

    // Starts the copies of the rows from `row` on, of all arrays.
    METHOD static void start(u8* to, const Weight& w, size_t row, u64* arrived) {
        row /= NUM;
        auto copy = [&](u8* there, const void* array, int size) {
            copy_bulk(there, (const u8*)array + row * size, size, arrived, threadIdx.x & 31, BULK_COPIERS);
        };
        copy(to, w.codes, CODES);
        if constexpr (F::S) copy(to + AT_S, w.s, S);
        if constexpr (F::M) copy(to + AT_M, w.m, M);
        if constexpr (D > 0) copy(to + AT_D, w.d, D);
        if constexpr (D_M > 0) copy(to + AT_D_M, w.d_m, D_M);
    }
    static_assert(CODES % 16 == 0 && S % 16 == 0 && M % 16 == 0 && D % 16 == 0, "pieces of 16 bytes");
};

// High nibbles are multiplied as they lie, as 16 times the code: the scale has the sixteenth.
template <class F> constexpr bool AS_SIXTEEN = F::BITS == 4 && (F::ZERO == 0 || F::ZERO == 8);

// The scales of NUM rows of one segment, of rows 8 apart.
template <class F, class Rows, int NUM> struct UnitScales {
    static constexpr bool WHOLE = F::BLOCK == SEGMENT;  // one d of the segment
    static constexpr int S_WORDS = F::SPLIT ? 4 : 2, D_WORDS = F::WIDE_D ? 2 : 1;
    u32 s[NUM][S_WORDS], m[NUM][2], d[NUM][D_WORDS], d_m[NUM][D_WORDS];
    const u8* at_d;
    u32 large;  // 2^23 as a float, or 2^15 for signed bytes, from where the compiler does not see it: then it stays in a register

    METHOD UnitScales(const u8* from, int row, int segment) : at_d(from + Rows::at_d(row, segment)), large((F::SIGNED ? 0x47000000u : 0x4B000000u) + blockIdx.z) {
        const u8 *at_s = from + Rows::at_s(row, segment), *at_m = from + Rows::at_m(row, segment);
#pragma unroll
        for (int h = 0; h < NUM; h++) {
            constexpr int ROWS = 8 * Rows::NUM_SEGMENTS;
            if constexpr (F::S && F::SPLIT) {
                uint4 v = *(const uint4*)(at_s + h * ROWS * 16);
                s[h][0] = v.x, s[h][1] = v.y, s[h][S_WORDS - 2] = v.z, s[h][S_WORDS - 1] = v.w;
            } else if constexpr (F::S) {
                uint2 v = *(const uint2*)(at_s + h * ROWS * 8);
                s[h][0] = v.x, s[h][1] = v.y;
            }
            if constexpr (F::S && F::SIGNED)
#pragma unroll
                for (int i = 0; i < S_WORDS; i++) s[h][i] ^= 0x80808080u;
            if constexpr (F::M) {
                uint2 v = *(const uint2*)(at_m + h * ROWS * 8);
                m[h][0] = v.x, m[h][1] = v.y;
            }
            if constexpr (WHOLE) {
                d[h][0] = *(const u16*)(at_d + h * ROWS * 2);
                if constexpr (F::D_M) d_m[h][0] = *(const u16*)(at_d + Rows::D + h * ROWS * 2);
            }
        }
    }
    METHOD void read_pair(int pair) {
        if constexpr (!WHOLE)
#pragma unroll
            for (int h = 0; h < NUM; h++) {
                int at = (Rows::at_d(8 * h, 0) - Rows::AT_D) + pair * 4 * D_WORDS;
#pragma unroll
                for (int i = 0; i < D_WORDS; i++) {
                    d[h][i] = ((const u32*)(at_d + at))[i];
                    if constexpr (F::D_M) d_m[h][i] = ((const u32*)(at_d + Rows::D + at))[i];
                }
            }
    }
    METHOD static float d_of(const u32 (&words)[D_WORDS], int i) {
        if constexpr (WHOLE) return half_to_float((u16)words[0]);
        if constexpr (F::WIDE_D) return __uint_as_float(words[i % D_WORDS]);
        return half_to_float((u16)(words[0] >> 16 * i));
    }
    // The word of byte i, by choice and not by address: the words stay in registers.
    template <int NUM_WORDS> METHOD static u32 word_of(const u32 (&words)[NUM_WORDS], int i) {
        u32 word = i & 4 ? words[1] : words[0];
        return NUM_WORDS == 4 && i & 8 ? (i & 4 ? words[NUM_WORDS - 1] : words[NUM_WORDS - 2]) : word;
    }
    // d times a byte, exactly: the byte becomes the low bits of a float, whose other bits a multiply-add takes off.
    METHOD float times_unsigned(float d, u32 word, int i) const {
        return fmaf(__uint_as_float(__byte_perm(word, large, 0x7540 | (i & 3))), d, -8388608.f * d);
    }
    METHOD float times_signed(float d, u32 word, int i) const {  // of bytes to which 128 was added
        return fmaf(__uint_as_float(__byte_perm(word, large, 0x7404 | (i & 3) << 4)), d, -32896.f * d);
    }
    template <bool SIXTEEN> METHOD float scale(int h, int pair, int i, int part) const {
        int block = 2 * pair + i;
        float factor = d_of(d[h], i) * (SIXTEEN && i == 1 ? 0.0625f : 1.f);
        int at = F::SPLIT ? 2 * block + part : block;
        if constexpr (F::S && F::SIGNED) return times_signed(factor, word_of(s[h], at), at);
        if constexpr (F::S) return times_unsigned(factor, word_of(s[h], at), at);
        return factor;
    }
    METHOD float minus_minimum(int h, int pair, int i) const {
        float md = d_of(d_m[h], i);
        if constexpr (F::M) md = times_unsigned(md, word_of(m[h], 2 * pair + i), 2 * pair + i);
        return -md;
    }
};

// Block i of a pair: words as load_matrices gives them, of 4-bit codes those of both blocks.
template <class F> DEVICE void multiply_block(int (&v)[4], const u32 (&words)[4], u32 x0, u32 x1, int i) {
    u32 a[4];
    if (AS_SIXTEEN<F> && i == 1) {
#pragma unroll
        for (int n = 0; n < 4; n++) a[n] = words[n] & 0xf0f0f0f0u ^ (F::ZERO == 8 ? 0x80808080u : 0u);
        if (F::ZERO == 8)
            mma_int8(v, a[0], a[1], a[2], a[3], x0, x1, MAGIC_BITS);
        else
            mma_bytes(v, a[0], a[1], a[2], a[3], x0, x1, MAGIC_BITS);
        return;
    }
#pragma unroll
    for (int n = 0; n < 4; n++) a[n] = signed_codes<F>(words[n], i);
    mma_int8(v, a[0], a[1], a[2], a[3], x0, x1, MAGIC_BITS);
}
template <class F, bool EVEN> DEVICE void add_part(float (&sums)[4], const int (&v)[4], const float (&sd)[2], float left, float right) {
#pragma unroll
    for (int e = 0; e < 4; e += EVEN ? 2 : 1) {
        float t = fmaf(__int_as_float(v[e]), sd[e >> 1], -MAGIC * sd[e >> 1]);
        sums[e] = fmaf(t, e & 1 ? right : left, sums[e]);
    }
}
template <class F, bool EVEN, class Scales>
DEVICE void add_pair_block(float (&sums)[4], const u32 (&words)[4], u32 x0, u32 x1, const Scales& scales, int pair, int i, float4 left, float4 right) {
    float2 l = i ? make_float2(left.z, left.w) : make_float2(left.x, left.y), r = i ? make_float2(right.z, right.w) : make_float2(right.x, right.y);
    int v[4];
    if constexpr (F::SPLIT) {
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float sd[2] = {scales.template scale<AS_SIXTEEN<F>>(0, pair, i, part), scales.template scale<AS_SIXTEEN<F>>(1, pair, i, part)};
            if constexpr (F::BITS == 8) {
                mma_int8(v, words[2 * part], words[2 * part + 1], part ? x1 : x0, MAGIC_BITS);
            } else {
                multiply_block<F>(v, words, part ? 0u : x0, part ? x1 : 0u, i);
            }
            add_part<F, EVEN>(sums, v, sd, l.x, r.x);
        }
        return;
    }
    multiply_block<F>(v, words, x0, x1, i);
    float sd[2] = {scales.template scale<AS_SIXTEEN<F>>(0, pair, i, 0), scales.template scale<AS_SIXTEEN<F>>(1, pair, i, 0)};
    add_part<F, EVEN>(sums, v, sd, l.x, r.x);
    if constexpr (F::D_M)
#pragma unroll
        for (int e = 0; e < 4; e += EVEN ? 2 : 1) sums[e] = fmaf(scales.minus_minimum(e >> 1, pair, i), e & 1 ? r.y : l.y, sums[e]);
}

// What a warp reads of a pair of blocks.
template <class F, bool EVEN> struct PairWords {
    u32 codes[F::BITS == 4 ? 1 : 2][4], x[4];
    float4 left, right;

    METHOD void read(SharedPlace codes_at, const u8* x_at, const u8* scales_at, int scale_stride, int pair) {
        load_matrices(x, x_at + pair * 64);
        if constexpr (F::BITS == 4) {
            load_matrices(codes[0], flipped(codes_at, pair * 32));
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) load_matrices(codes[i % (F::BITS == 4 ? 1 : 2)], flipped(codes_at, (2 * pair + i & 3) * 32), pair / 2 * 128);
        }
        left = *(const float4*)(scales_at + pair * 16);
        right = EVEN ? left : *(const float4*)(scales_at + scale_stride + pair * 16);
    }
};

// 16 rows from `row` on, one segment, all columns or the even ones.
template <class F, class Rows, bool EVEN> DEVICE void multiply(float (&sums)[4], const u8* from, const u8* inputs, int row, int segment) {
    int lane = threadIdx.x & 31;
    using In = Inputs<Rows::NUM_SEGMENTS>;
    const u8* s = inputs + In::AT_SCALES + 2 * (lane & 3) * In::SCALE_STRIDE + segment * 64;
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
    if constexpr (F::HALF != 0) {  // the sums depend on the order of inputs
        const u8* codes = from + Rows::at_codes(row + (lane >> 2), segment) + (lane & 3) * F::WORD;
        const u8* x = inputs + (lane >> 2) * In::CODE_STRIDE + segment * SEGMENT + (lane & 3) * 8;
#pragma unroll 2
        for (int block = 0; block < 8; block++) {
            Codes<F> words;
            words.read(codes + block * 4 * F::WORD, Rows::NUM_SEGMENTS * F::BYTES);
            float one = *(const float*)(s + block * 8), two = *(const float*)(s + block * 8 + In::SCALE_STRIDE);
            Block<F>(words, 0, 0).add(sums, *(const uint2*)(x + block * 32), make_float4(one, 0.f, two, 0.f));
        }
    } else {
        UnitScales<F, Rows, 2> scales(from, row + (lane >> 2), segment);
        SharedPlace codes_at = place_in_shared(from + Rows::at_codes(row + (lane & 15), segment) + swapped<F>(lane >> 4, lane) * 16);
        const u8* x = inputs + (lane & 7) * In::CODE_STRIDE + segment * SEGMENT + (lane >> 3) * 16;
#pragma unroll (F::SPLIT ? 2 : 4)
        for (int pair = 0; pair < 4; pair++) {
            PairWords<F, EVEN> here;
            here.read(codes_at, x, s, In::SCALE_STRIDE, pair);
            scales.read_pair(pair);
#pragma unroll
            for (int i = 0; i < 2; i++)
                add_pair_block<F, EVEN>(sums, here.codes[F::BITS == 4 ? 0 : i], here.x[2 * i], here.x[2 * i + 1], scales, pair, i, here.left, here.right);
        }
    }
}

// A lane's row of a weight, one segment, columns 0 .. N - 1, without tensor cores: less work for few columns. All lanes
// of a warp have the same segment.
template <class F, class Rows, int N> DEVICE void multiply_lane(float (&sums)[N], const u8* from, const u8* inputs, int row, int segment) {
    using In = Inputs<Rows::NUM_SEGMENTS>;
    UnitScales<F, Rows, 1> factors(from, row, segment);
    const u8 *codes = from + Rows::at_codes(row, segment), *x = inputs + segment * SEGMENT, *scales = inputs + In::AT_SCALES + segment * 64;
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = 0;
#pragma unroll 2
    for (int pair = 0; pair < 4; pair++) {  // two blocks of 32 inputs
        u32 words[2][8];
#pragma unroll
        for (int i = 0; i < (F::BITS == 4 ? 2 : 4); i++) {
            uint4 v = *(const uint4*)(codes + swapped<F>(pair * (F::BITS / 2) + i, row) * 16);
            u32* to = words[i / 2] + i % 2 * 4;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
        factors.read_pair(pair);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            constexpr int PARTS = F::SPLIT ? 2 : 1;
            const u32* w = words[F::BITS == 4 ? 0 : i];
            int block = 2 * pair + i;
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint4* p = (const uint4*)(x + n * In::CODE_STRIDE + block * 32);
                float2 scale = *(const float2*)(scales + n * In::SCALE_STRIDE + block * 8);
                uint4 b[2] = {p[0], p[1]};
                int v[2] = {MAGIC_BITS, MAGIC_BITS};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int& to = v[F::SPLIT ? half : 0];
                    to = __dp4a((int)signed_codes<F>(w[4 * half], i), (int)b[half].x, to);
                    to = __dp4a((int)signed_codes<F>(w[4 * half + 1], i), (int)b[half].y, to);
                    to = __dp4a((int)signed_codes<F>(w[4 * half + 2], i), (int)b[half].z, to);
                    to = __dp4a((int)signed_codes<F>(w[4 * half + 3], i), (int)b[half].w, to);
                }
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    float sd = factors.template scale<false>(0, pair, i, part);
                    sums[n] = fmaf(fmaf(__int_as_float(v[part]), sd, -MAGIC * sd), scale.x, sums[n]);
                }
                if constexpr (F::D_M) sums[n] = fmaf(factors.minus_minimum(0, pair, i), scale.y, sums[n]);
            }
        }
    }
}

// The sums of 16 rows and a segment in shared memory, column by column; with 4 floats behind a column its writers share no bank. Column c
// is at c ^ 4 in every second tile of down's rows: what lanes read of two tiles at once shares no bank either.
struct Partial {
    float sums[COLUMNS][16 + 4];
    template <bool EVEN> METHOD void put(const float (&from)[4], int flip) {
        int lane = threadIdx.x & 31, row = lane >> 2, column = 2 * (lane & 3) ^ flip;
#pragma unroll
        for (int e = 0; e < 4; e += EVEN ? 2 : 1) sums[column + (e & 1)][row + 8 * (e >> 1)] = from[e];
    }
};
DEVICE int flip_of_tile(int tile) { return tile % 2 * 4; }
// The sums of four rows from `row` on.
template <int SEGMENTS> DEVICE float4 totals(const Partial* parts, int row, int column) {
    float4 sum = *(const float4*)&parts[0].sums[column][row];
#pragma unroll
    for (int i = 1; i < SEGMENTS; i++) {
        float4 v = *(const float4*)&parts[i].sums[column][row];
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    return sum;
}

// --- The two products. A step's units, of which a warp takes one at a time, are 32 rows of one segment,
// gate's and up's or TILES of down's (one where a block has two scales: a loop over two needs more registers than there are).

struct GateUp {
    using In = Inputs<K / SEGMENT>;
    using First = TileRows<FORMAT_0, K / SEGMENT, 16>;
    using Second = TileRows<FORMAT_1, K / SEGMENT, 16>;
    static constexpr int SEGMENTS = K / SEGMENT, STEP_ROWS = 16, STEPS_A_TILE = INNER / STEP_ROWS, UNITS = SEGMENTS, PARTIALS = 2 * SEGMENTS;
    static constexpr int TOGETHER = 2;  // steps, whose 32 rows of h are rounded together
    static constexpr int STAGE = First::SIZE + Second::SIZE, BYTES = First::BYTES + Second::BYTES, STAGES = GATE_UP_STAGES, SUMS = GATE_UP_SUMS, INPUTS = 2;
    static constexpr int LANE_COLUMNS = FORMAT_0::HALF || FORMAT_1::HALF ? 0 : 2;  // to here a lane has a row of its own

    struct Copy {
        Weight gate, up;
        METHOD Copy(const Weight& gate_, const Weight& up_) : gate(gate_), up(up_) {}
        METHOD void start(u8* to, size_t row, u64* arrived) const {
            First::start(to, gate, row, arrived);
            Second::start(to + First::SIZE, up, row, arrived);
        }
    };
    template <bool EVEN> METHOD static void multiply_unit(Partial* to, const u8* from, const u8* inputs, int segment) {
#pragma unroll 1
        for (int unit = segment; unit < 2 * SEGMENTS; unit += SEGMENTS, from += First::SIZE) {
            float sums[4];
            if (IS_SAME<FORMAT_0, FORMAT_1> || unit < SEGMENTS)  // weights of one format share the code: less of it to fetch
                multiply<FORMAT_0, First, EVEN>(sums, from, inputs, 0, segment);
            else
                multiply<FORMAT_1, Second, EVEN>(sums, from, inputs, 0, segment);
            to[unit].put<EVEN>(sums, 0);
        }
    }
};

struct Down {
    using In = Inputs<INNER / SEGMENT>;
    using First = TileRows<FORMAT_2, INNER / SEGMENT, 16 * ROW_TILES>;
    static constexpr int SEGMENTS = INNER / SEGMENT, STEP_ROWS = 16 * ROW_TILES, STEPS_A_TILE = K / STEP_ROWS;
    static constexpr int TILES = ROW_TILES > 1 && !FORMAT_2::SPLIT ? 2 : 1, UNITS = ROW_TILES / TILES * SEGMENTS, PARTIALS = ROW_TILES * SEGMENTS;
    static constexpr int TOGETHER = 1, STAGE = First::SIZE, BYTES = First::BYTES, STAGES = DOWN_STAGES, SUMS = DOWN_SUMS, INPUTS = DOWN_INPUTS, LANE_COLUMNS = 0;

    struct Copy {
        Weight down;
        METHOD Copy(const Weight& down_) : down(down_) {}
        METHOD void start(u8* to, size_t row, u64* arrived) const { First::start(to, down, row, arrived); }
    };
    template <bool EVEN> METHOD static void multiply_unit(Partial* to, const u8* from, const u8* inputs, int unit) {
        int segment = unit % SEGMENTS;
#pragma unroll 1
        for (int tile = unit / SEGMENTS * TILES;;) {
            float sums[4];
            multiply<FORMAT_2, First, EVEN>(sums, from, inputs, 16 * tile, segment);
            to[tile * SEGMENTS + segment].put<EVEN>(sums, flip_of_tile(tile));
            if (++tile % TILES == 0) break;
        }
    }
};

// Shared memory: the sums of some steps, the list of tiles, and what a product keeps, down's over gate_up's.
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int AT_LISTS = larger(larger(GateUp::SUMS * GateUp::PARTIALS, Down::SUMS * Down::PARTIALS) * (int)sizeof(Partial), 12 * MATRICES);
constexpr int MOST_PAIRS = NUM_ROWS * ACTIVE, MOST_TILES = (MOST_PAIRS < MATRICES ? MOST_PAIRS : MATRICES) + MOST_PAIRS / COLUMNS + 1;
#ifdef LISTED
constexpr int AT_STAGES = (AT_LISTS + 127) / 128 * 128;
#else
constexpr int AT_TILES = AT_LISTS + (2 * MOST_PAIRS + 3) / 4 * 4, AT_STAGES = (AT_TILES + 4 * MOST_TILES + 127) / 128 * 128;
static_assert(NUM_ROWS <= 64 && MATRICES <= 256, "a bit a row, and a byte an expert");
#endif
template <class Product> constexpr int AT_INPUTS = AT_STAGES + Product::STAGES * Product::STAGE;
template <class Product> constexpr bool FITS =
    AT_INPUTS<Product> + Product::INPUTS * Product::In::SIZE <= SHARED_SIZE && Product::STAGES >= 2;
static_assert(FITS<GateUp> && FITS<Down>, "stages and the inputs of some tiles must fit");

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

    METHOD Lists(const int* pairs_, const int* tiles_, const int* num_tiles_) : pairs(pairs_), tiles((const int4*)tiles_), num_tiles(*num_tiles_) {
        __syncthreads();  // of the barriers
    }
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

// A block's steps: its run of the first ones, of which all blocks have as many, and then some at a time from a counter, so
// that blocks end together however long their steps take. More from the counter means more tiles a block, whose inputs
// must come. `take` gives -1 when there are no more; the counter's answer is asked for ahead.
template <class Product> struct Work {
    int next, left, from, all, taken;
    int* counter;

    METHOD Work(int num_tiles, int* counter_) : counter(counter_) {
        constexpr int TOGETHER = Product::TOGETHER;
        static_assert(Product::STEPS_A_TILE % TOGETHER == 0 && (u64)MOST_TILES * Product::STEPS_A_TILE * larger(BLOCKS, 8) >> 31 == 0, "products fit");
        int runs = num_tiles * (Product::STEPS_A_TILE / TOGETHER), first = runs * 3 / 4;
        next = first * blockIdx.x / BLOCKS * TOGETHER, left = first * (blockIdx.x + 1) / BLOCKS * TOGETHER - next;
        from = first * TOGETHER, all = runs * TOGETHER;
        ask();
    }
    METHOD void ask() { taken = (threadIdx.x & 31) == 0 ? atomicAdd(counter, 1) : 0; }
    METHOD int take() {
        if (left == 0) {
            next = from + __shfl_sync(ALL_LANES, taken, 0) * Product::TOGETHER;
            if (next >= all) return -1;
            left = Product::TOGETHER;
            ask();
        }
        left--;
        return next++;
    }
};

// --- How the warps of a block wait for each other.

// A phase of `full`: the weights and inputs of a step are there; of `empty`: they are multiplied; of `planned`: it is told which
// step it is. Barriers by RING let a warp look at a step without having looked at those before: the phase before in that
// place is over for sure, and the next one cannot end until the warp has looked.
template <class Product> struct Pipeline {
    static constexpr int RING = 16, AHEAD = larger(Product::STAGES, 2 * FINISHING);  // past the last step someone may look so far
    static_assert(RING % (Product::TOGETHER * FINISHING) == 0 && Product::STAGES + Product::SUMS + AHEAD <= RING, "no phase is missed");
    static_assert((MULTIPLYING + Product::UNITS - 1) / Product::UNITS <= Product::STAGES, "a warp's units lie so near");
    // At `full` arrive the lanes that fetch inputs, who tells the step, and the lanes that copy weights where no bulk copy does.
    static constexpr int FULL = 32 + 1 + (BULK_COPIERS > 1 ? BULK_COPIERS : 0);
    int4 told[RING];  // of a step: its number, -1 past the last; the tile's count; where its inputs lie
    u64 empty[Product::STAGES], planned[RING], full[RING], sums_full[RING], sums_free[RING];

    METHOD void init() {  // by the first lane of each warp some: ptxas does those of a warp one by one
        for (int i = threadIdx.x / 32; i < RING && threadIdx.x % 32 == 0; i += WARPS) {
            if (i < Product::STAGES) init_phases(empty + i, Product::UNITS);
            init_phases(planned + i, 1), init_phases(full + i, FULL);
            init_phases(sums_full + i, Product::UNITS), init_phases(sums_free + i, 1);
        }
        fence_bulk();
    }
    METHOD static void wait(u64 (&ring)[RING], u32 n) { wait_phase(ring + n % RING, n / RING & 1); }
    METHOD void wait_multiplied(int n) {  // a step below 0 is
        if (n >= 0) wait_phase(empty + n % Product::STAGES, n / Product::STAGES & 1);
    }
    METHOD static const Partial* sums(u32 n) { return (const Partial*)shared + n % Product::SUMS * Product::PARTIALS; }
    METHOD static const u8* stage(u32 n) { return shared + AT_STAGES + n % Product::STAGES * Product::STAGE; }
    METHOD static const u8* inputs(int place) { return shared + AT_INPUTS<Product> + place * Product::In::SIZE; }
};
DEVICE void arrive_as_warp(u64* barrier) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive(barrier);
}

// --- What warps that multiply do.

// A unit of gate_up with at most LANE_COLUMNS columns: a lane has a row of gate or of up.
template <int N> DEVICE void multiply_lanes(Partial* to, const u8* from, const u8* inputs, int segment) {
    using First = GateUp::First;
    if constexpr (GateUp::LANE_COLUMNS > 0) {
        int lane = threadIdx.x & 31, row = lane & 15, is_up = lane >> 4;
        float sums[N];
        if (IS_SAME<FORMAT_0, FORMAT_1> || !is_up)
            multiply_lane<FORMAT_0, First, N>(sums, from + is_up * First::SIZE, inputs, row, segment);
        else
            multiply_lane<FORMAT_1, GateUp::Second, N>(sums, from + First::SIZE, inputs, row, segment);
#pragma unroll
        for (int n = 0; n < N; n++) to[is_up * GateUp::SEGMENTS + segment].sums[n][row] = sums[n];
    }
}

// The units of all steps are dealt to the warps in turn.
template <class Product> DEVICE void multiply_steps(Pipeline<Product>& pipeline) {
#pragma unroll 1
    for (u32 all = threadIdx.x / 32;; all += MULTIPLYING) {
        u32 n = all / Product::UNITS, unit = all % Product::UNITS;
        pipeline.wait(pipeline.full, n);
        if (pipeline.told[n % pipeline.RING].x < 0) break;
        pipeline.wait(pipeline.sums_free, n - Product::SUMS);  // of the first steps: the phase before a barrier's first, parity 1, is over
        int4 told = pipeline.told[n % pipeline.RING];
        int count = told.y;
        const u8 *from = pipeline.stage(n), *inputs = pipeline.inputs(told.z);
        Partial* to = (Partial*)pipeline.sums(n);
        if (column_step<Product>(count) == 2)
            Product::template multiply_unit<true>(to, from, inputs, unit);
        else if (Product::LANE_COLUMNS == 0 || count > Product::LANE_COLUMNS)
            Product::template multiply_unit<false>(to, from, inputs, unit);
        else if (count == 1)
            multiply_lanes<1>(to, from, inputs, unit);
        else
            multiply_lanes<2>(to, from, inputs, unit);
        __syncwarp();
        if ((threadIdx.x & 31) == 0) arrive(pipeline.empty + n % Product::STAGES), arrive(pipeline.sums_full + n % pipeline.RING);
    }
}

// --- What the warps that finish do: finish(n, first row, tile's number, count, sums, whom to tell that they are read) of each
// step n. A warp takes every FINISHING-th TOGETHER steps. `places` are the pairs of the tile's columns, of each warp.

template <class Product, class Finish> DEVICE void finish_steps(const Lists& lists, Pipeline<Product>& pipeline, int* places, int which, Finish finish) {
    constexpr int TOGETHER = Product::TOGETHER;
    int lane = threadIdx.x & 31, number = -1, count = 0;
#pragma unroll 1
    for (int n = which * TOGETHER;; n += n % TOGETHER == TOGETHER - 1 ? (FINISHING - 1) * TOGETHER + 1 : 1) {
        pipeline.wait(pipeline.sums_full, n);
        int step = pipeline.told[n % pipeline.RING].x;
        if (step < 0) break;
        if (step / Product::STEPS_A_TILE != number) {
            number = step / Product::STEPS_A_TILE;
            Tile tile = lists.tile(number);
            count = tile.count;
            __syncwarp();
            if (lane < count) places[lane] = lists.pair(tile.first + lane);
            __syncwarp();
        }
        finish(n, step % Product::STEPS_A_TILE * Product::STEP_ROWS, number, count, pipeline.sums(n), pipeline.sums_free + n % pipeline.RING);
    }
}

// A lane has four rows of one column, of both steps whose 32 rows are rounded together.
DEVICE void finish_gate_up(const Lists& lists, Pipeline<GateUp>& pipeline, int* places, int which, i8* codes, float* scales, int* progress) {
    int lane = threadIdx.x & 31, column = lane >> 2, quarter = lane & 3;
    float v[8];
    finish_steps(lists, pipeline, places, which, [&](int n, int first_row, int number, int count, const Partial* sums, u64* read) {
        int from = min(column, count - 1) * column_step<GateUp>(count);
        float4 gate = totals<GateUp::SEGMENTS>(sums, 4 * quarter, from), up = totals<GateUp::SEGMENTS>(sums + GateUp::SEGMENTS, 4 * quarter, from);
        arrive_as_warp(read);
        float h[4] = {swiglu(gate.x, up.x), swiglu(gate.y, up.y), swiglu(gate.z, up.z), swiglu(gate.w, up.w)};
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = n % 2 ? v[i] : h[i], v[4 + i] = h[i];
        if (n % 2 == 0) return;
        u32 words[2];
        float scale;
        int sum;
        round_group(v, words, scale, sum);
        if (column < count) {
            size_t at = (size_t)places[column] * INNER + first_row - 16;
            u32* to = (u32*)(codes + at) + quarter;
            to[0] = words[0], to[4] = words[1];
            if (quarter == 0) ((float2*)scales)[at / 32] = make_float2(scale, scale * (float)sum);
        }
        __syncwarp();
        if (lane == 0) add_after(progress + number, 1);
    });
}

// A lane four rows of a column at a time.
DEVICE void finish_down(const Lists& lists, Pipeline<Down>& pipeline, int* places, int which, float* out) {
    constexpr int FOURS = Down::STEP_ROWS / 4;
    finish_steps(lists, pipeline, places, which, [&](int, int first_row, int, int count, const Partial* sums, u64* read) {
        int apart = column_step<Down>(count);
#pragma unroll 2
        for (int i = threadIdx.x & 31; i < FOURS * count; i += 32) {
            int row = i % FOURS * 4, tile = row / 16, column = i / FOURS;
            float4 sum = totals<Down::SEGMENTS>(sums + tile * Down::SEGMENTS, row % 16, column * apart ^ flip_of_tile(tile));
            *(float4*)(out + (size_t)places[column] * K + first_row + row) = sum;
        }
        arrive_as_warp(read);
    });
}

// --- What the warp that fetches weights does: it also says which steps are this block's.

template <class Product> struct Weights {
    const Lists& lists;
    const typename Product::Copy& weights;
    size_t first_row;  // of all matrices that lie before this layer's in the stack
    Pipeline<Product>& pipeline;
    Work<Product> work;
    int n = 0, number = -1, place = 0;  // steps so far; the last one's tile, and where its inputs lie

    METHOD Weights(const Lists& lists_, const typename Product::Copy& weights_, int index, Pipeline<Product>& pipeline_, int* counter)
        : lists(lists_), weights(weights_), first_row((size_t)index * MATRICES * (Product::STEPS_A_TILE * Product::STEP_ROWS)),
          pipeline(pipeline_), work(lists_.num_tiles, counter) {}
    // Step n's weights begin to come, for which there is room.
    METHOD void start(int step) {
        int rows = Product::STEPS_A_TILE * Product::STEP_ROWS, now = step / Product::STEPS_A_TILE;
        Tile tile = lists.tile(now);
        size_t row = first_row + (size_t)tile.expert * rows + step % Product::STEPS_A_TILE * Product::STEP_ROWS;
        if (now != number) number = now, place = place + 1 < Product::INPUTS ? place + 1 : 0;
        u64* here = pipeline.full + n % pipeline.RING;
        if (is_bulk_copier()) {
            pipeline.told[n % pipeline.RING] = make_int4(step, tile.count, place, 0);
            expect_bulk(here, Product::BYTES);
            weights.start((u8*)pipeline.stage(n), row, here);
        }
        if (BULK_COPIERS > 1) arrive_with_copies(here);
        n++;
    }
    METHOD void plan(int i) const { arrive_as_warp(pipeline.planned + i % pipeline.RING); }
    // There are no more: who looks for another step is told so.
    METHOD void end() const {
        int lane = threadIdx.x & 31;
#pragma unroll 1
        for (int i = n; i < n + pipeline.AHEAD; i++) {
            if (lane == 0) pipeline.told[i % pipeline.RING] = make_int4(-1, 0, 0, 0);
            plan(i);
            for (int arrival = lane; arrival < pipeline.FULL; arrival += 32) arrive(pipeline.full + i % pipeline.RING);
            for (int unit = lane; unit < Product::UNITS; unit += 32) arrive(pipeline.sums_full + i % pipeline.RING);
        }
    }
};

// All of gate_up; the first of down as soon as there is room; the rest of down.
DEVICE void fetch_weights(Weights<GateUp>& gate_up, Weights<Down>& down) {
    constexpr int ALL = GateUp::STAGES;
    int step;
#pragma unroll 1
    while ((step = gate_up.work.take()) >= 0) {
        gate_up.pipeline.wait_multiplied(gate_up.n - ALL);
        gate_up.start(step);
        gate_up.plan(gate_up.n - 1);
    }
    gate_up.end();
    auto wait_stages = [&](int from, int to) {  // of gate_up, until the last steps there are multiplied
#pragma unroll 1
        for (int i = from; i < min(to, ALL); i++) gate_up.pipeline.wait_multiplied(gate_up.n - 1 - (gate_up.n - 1 - i + ALL) % ALL);
    };
    step = 0;
#pragma unroll 1
    while (down.n < Down::STAGES && (step = down.work.take()) >= 0) {
        int begin = down.n * Down::STAGE, end = begin + Down::STAGE;
        wait_stages(end > ALL * GateUp::STAGE ? 0 : begin / GateUp::STAGE, (end - 1) / GateUp::STAGE + 1);  // behind the stages are inputs
        fence_bulk();
        down.start(step);
    }
    wait_stages(0, ALL);
#pragma unroll 1
    for (int i = 0; i < down.n; i++) down.plan(i);
#pragma unroll 1
    while (step >= 0 && (step = down.work.take()) >= 0) {
        down.pipeline.wait_multiplied(down.n - Down::STAGES);
        down.start(step);
        down.plan(down.n - 1);
    }
    down.end();
}

// --- What the warp that fetches inputs does: those of each step, unless they are the step's before. Pairs are `shared_by` to a
// row of inputs; wait_for_rows(tile's number) comes before they are read.

template <class Product, class Wait>
DEVICE void fetch_inputs(const Lists& lists, Pipeline<Product>& pipeline, const i8* codes, const float* scales, int shared_by, Wait wait_for_rows) {
    int number = -1, lasts[Product::INPUTS];  // the last steps of the tiles before; the first's inputs lay in the next place
#pragma unroll
    for (int i = 0; i < Product::INPUTS; i++) lasts[i] = -1;
#pragma unroll 1
    for (int n = 0;; n++) {
        pipeline.wait(pipeline.planned, n);
        int4 told = pipeline.told[n % pipeline.RING];
        if (told.x < 0) break;
        if (told.x / Product::STEPS_A_TILE != number) {
            number = told.x / Product::STEPS_A_TILE;
#pragma unroll
            for (int i = 0; i < Product::INPUTS; i++) lasts[i] = i + 1 < Product::INPUTS ? lasts[(i + 1) % Product::INPUTS] : n - 1;
            wait_for_rows(number);
#pragma unroll 1
            for (int i = max(n - Product::STAGES + 1, 0); i <= lasts[0]; i++) pipeline.wait_multiplied(i);
            Tile tile = lists.tile(number);
            int apart = column_step<Product>(tile.count);
#pragma unroll 1
            for (int column = 0; column < tile.count; column++)
                Product::In::copy((u8*)pipeline.inputs(told.z), codes, scales, column * apart, lists.pair(tile.first + column) / shared_by, threadIdx.x & 31);
        }
        arrive_with_copies(pipeline.full + n % pipeline.RING);
    }
}

KERNEL(THREADS, 1)
experts(const i8* codes, const float* scales, LISTS, WEIGHT(0), WEIGHT(1), WEIGHT(2), const int*, i8* hidden_codes, float* hidden_scales,
        float* out, int* progress) {
    __shared__ Pipeline<GateUp> gate_up;
    __shared__ Pipeline<Down> down;
    __shared__ u64 finished;  // gate_up's sums are read: down's lie there too
    __shared__ int places[FINISHING][COLUMNS];
    int warp = threadIdx.x >> 5, index = launch_number<SHARED_SIZE>() / DOWNS, down_index = launch_number<SHARED_SIZE>() % DOWNS;
    if (threadIdx.x == 0) init_phases(&finished, FINISHING);
    gate_up.init(), down.init();
    Lists lists(GIVEN_LISTS);
    if (warp < MULTIPLYING) {
        multiply_steps(gate_up);
        wait_phase(&finished, 0);
        multiply_steps(down);
    } else if (warp < MULTIPLYING + FINISHING) {
        int which = warp - MULTIPLYING;
        finish_gate_up(lists, gate_up, places[which], which, hidden_codes, hidden_scales, progress);
        arrive_as_warp(&finished);
        finish_down(lists, down, places[which], which, out);
    } else if (warp == MULTIPLYING + FINISHING) {
        fetch_inputs(lists, gate_up, codes, scales, ACTIVE, [](int) {});
        fetch_inputs(lists, down, hidden_codes, hidden_scales, 1, [&](int number) { wait_for(progress + number, GateUp::STEPS_A_TILE / GateUp::TOGETHER); });
    } else {
        GateUp::Copy first(GIVEN(0), GIVEN(1));
        Down::Copy second(GIVEN(2));
        Weights<GateUp> of_gate_up(lists, first, index, gate_up, progress + MOST_TILES);
        Weights<Down> of_down(lists, second, down_index, down, progress + MOST_TILES + 1);
        fetch_weights(of_gate_up, of_down);
    }
}

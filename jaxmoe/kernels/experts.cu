// The experts of few rows in one launch, gate_up and then down, one block a multiprocessor, all at once. The blocks share
// all (tile, rows) of a product out among them in runs; a tile is up to COLUMNS pairs (token, expert) of one expert. Most
// warps multiply; FINISHING ones finish what the step before left in `parts`, and of down those without a unit too; the last
// one fetches the weights of some steps ahead, each array of a step by one bulk copy. A step is STEP_ROWS rows of gate and of
// up, or of down. Columns past a tile's last are whatever they are.
//
// While a block's last steps of gate_up are multiplied, weights of down already come to where earlier ones lay. The hidden
// rows of a tile are those of several blocks, which count in progress[tile] what they have finished.
//
// Macros: K inputs of gate_up, INNER of down; FORMAT_0 gate's, 1 up's, 2 down's; MATRICES experts, ACTIVE of a row; NUM_ROWS of
// the step; BLOCKS. With LISTED the tiles come from `group`, otherwise each block finds them for itself. The launch number: the
// place of gate and up in their stack * DOWNS + that of down.
#include "weights.cuh"

extern __shared__ __align__(128) u8 shared[];

constexpr int WARPS = THREADS / 32, FINISHING = 3, MULTIPLYING = WARPS - FINISHING - 1, COLUMNS = 8;  // of a tile

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
    // The rows of `count` columns, at once: copies in the background would come after those that were begun before.
    template <class Row> METHOD static void fetch(u8* to, const i8* codes, const float* scales, int count, int apart, Row row, int lane) {
        constexpr int TURN = 6, APART = 32;
        int end = count * PIECES;
#pragma unroll 1
        for (int first = lane; first < end; first += TURN * APART) {
            uint4 v[TURN];
            int to_place[TURN];
#pragma unroll
            for (int i = 0; i < TURN; i++) {
                int n = first + i * APART, column = n / PIECES, piece = n % PIECES;
                if (n >= end) break;
                v[i] = __ldcg((const uint4*)source(codes, scales, row(column), piece));
                to_place[i] = place(column * apart, piece);
            }
#pragma unroll
            for (int i = 0; i < TURN && first + i * APART < end; i++) *(uint4*)(to + to_place[i]) = v[i];
        }
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
    u32 large;  // 2^23 as a float, from where the compiler does not see it: then it stays in a register

    METHOD UnitScales(const u8* from, int row, int segment) : at_d(from + Rows::at_d(row, segment)), large(0x4B000000u + blockIdx.z) {
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
        return fmaf(__uint_as_float(__byte_perm(word, large - 0x4000000u, 0x7404 | (i & 3) << 4)), d, -32896.f * d);
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

// The sums of a unit in shared memory, column by column; with 4 floats behind a column its writers share no bank. Column c
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
template <int SEGMENTS> DEVICE float total(const Partial* parts, int row, int column) {
    float sum = parts[0].sums[column][row];
#pragma unroll
    for (int i = 1; i < SEGMENTS; i++) sum = sum + parts[i].sums[column][row];
    return sum;
}
// The same of the four rows from `row` on.
template <int SEGMENTS> DEVICE float4 totals(const Partial* parts, int row, int column) {
    float4 sum = *(const float4*)&parts[0].sums[column][row];
#pragma unroll
    for (int i = 1; i < SEGMENTS; i++) {
        float4 v = *(const float4*)&parts[i].sums[column][row];
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    return sum;
}

// --- The two products. A step's units: 16 rows of one weight and one segment each.

struct GateUp {
    using In = Inputs<K / SEGMENT>;
    using First = TileRows<FORMAT_0, K / SEGMENT, 16>;
    using Second = TileRows<FORMAT_1, K / SEGMENT, 16>;
    static constexpr int SEGMENTS = K / SEGMENT, STEP_ROWS = 16, STEPS_A_TILE = INNER / STEP_ROWS, UNITS = 2 * SEGMENTS;
    static constexpr int STEPS_AN_ITEM = 2, ITEMS_A_TILE = STEPS_A_TILE / 2;  // 32 rows of h are rounded together
    static constexpr int STAGE = First::SIZE + Second::SIZE, STAGES = GATE_UP_STAGES, BYTES = First::BYTES + Second::BYTES;
    static constexpr int LANE_COLUMNS = FORMAT_0::HALF || FORMAT_1::HALF ? 0 : 2;  // to here a lane has a row of its own

    struct Copy {
        Weight gate, up;
        METHOD Copy(const Weight& gate_, const Weight& up_) : gate(gate_), up(up_) {}
        METHOD void start(u8* to, size_t row, u64* arrived) const {
            First::start(to, gate, row, arrived);
            Second::start(to + First::SIZE, up, row, arrived);
        }
    };
    METHOD static int flip(int) { return 0; }
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
    using First = TileRows<FORMAT_2, INNER / SEGMENT, 16 * ROW_TILES>;
    static constexpr int SEGMENTS = INNER / SEGMENT, STEP_ROWS = 16 * ROW_TILES, STEPS_A_TILE = K / STEP_ROWS, UNITS = ROW_TILES * SEGMENTS;
    static constexpr int STAGE = First::SIZE, STAGES = DOWN_STAGES, LANE_COLUMNS = 0, BYTES = First::BYTES;

    struct Copy {
        Weight down;
        METHOD Copy(const Weight& down_) : down(down_) {}
        METHOD void start(u8* to, size_t row, u64* arrived) const { First::start(to, down, row, arrived); }
    };
    METHOD static int flip(int unit) { return flip_of_tile(unit / SEGMENTS); }
    template <bool EVEN> METHOD static void multiply_unit(float (&sums)[4], const u8* from, const u8* inputs, int unit) {
        multiply<FORMAT_2, First, EVEN>(sums, from, inputs, 16 * (unit / SEGMENTS), unit % SEGMENTS);
    }
};

// Shared memory: the sums of two steps, the list of tiles, and what a product keeps, down's over gate_up's.
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int MOST_UNITS = larger(GateUp::UNITS, Down::UNITS), AT_LISTS = larger(2 * MOST_UNITS * (int)sizeof(Partial), 12 * MATRICES);
constexpr int MOST_PAIRS = NUM_ROWS * ACTIVE, MOST_TILES = (MOST_PAIRS < MATRICES ? MOST_PAIRS : MATRICES) + MOST_PAIRS / COLUMNS + 1;
#ifdef LISTED
constexpr int AT_STAGES = (AT_LISTS + 127) / 128 * 128;
#else
constexpr int AT_TILES = AT_LISTS + (2 * MOST_PAIRS + 3) / 4 * 4, AT_STAGES = (AT_TILES + 4 * MOST_TILES + 127) / 128 * 128;
static_assert(NUM_ROWS <= 64 && MATRICES <= 256, "a bit a row, and a byte an expert");
#endif
template <class Product> constexpr int AT_INPUTS = AT_STAGES + Product::STAGES * Product::STAGE;
constexpr int IDLE = Down::UNITS < MULTIPLYING ? MULTIPLYING - Down::UNITS : 0;  // warps without a unit of down: they finish it too
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
        to[unit].put<EVEN>(sums, Product::flip(unit));
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
                multiply_lane<FORMAT_0, First, N>(sums, from + is_up * First::SIZE, inputs, row, segment);
            else
                multiply_lane<FORMAT_1, GateUp::Second, N>(sums, from + First::SIZE, inputs, row, segment);
#pragma unroll
            for (int n = 0; n < N; n++) to[is_up * GateUp::SEGMENTS + segment].sums[n][row] = sums[n];
        }
    }
}

// Step n of a share lies in stage (n + first_stage) % STAGES. The last one of gate_up lies in the last stage, so that down's
// stages can be filled from the first on.
template <class Product> DEVICE int first_stage(const Share& share) {
    return IS_SAME<Product, GateUp> ? Product::STAGES - share.size() % Product::STAGES : 0;
}

template <class Product> DEVICE void multiply_steps(const Lists& lists, const Share& share, u64* arrived) {
    Partial* parts = (Partial*)shared;
    int stage = first_stage<Product>(share) % Product::STAGES, count = 0, number = 0;
#pragma unroll 1
    for (int step = share.begin; step < share.end; step++) {
        if (step == share.begin || step % Product::STEPS_A_TILE == 0) {
            number = step / Product::STEPS_A_TILE;
            count = lists.tile(number).count;
        }
        __syncthreads();
        int n = step - share.begin;
        wait_bulk(arrived + n % Product::STAGES, n / Product::STAGES & 1);
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

// --- What the warps that finish do: finish(step, first row, tile's number, count, where the sums lie) of each step, one
// step later. `places` are the pairs of the tile's columns, of each warp.

template <class Product, class Finish> DEVICE void finish_steps(const Lists& lists, const Share& share, int* places, Finish finish) {
    int lane = threadIdx.x & 31, number = 0;
    Tile tile{0, 0, 0};
    __syncthreads();
#pragma unroll 1
    for (int step = share.begin; step < share.end; step++) {
        int first_row = step % Product::STEPS_A_TILE * Product::STEP_ROWS;
        if (step == share.begin || first_row == 0) {
            number = step / Product::STEPS_A_TILE, tile = lists.tile(number);
            __syncwarp();
            if (lane < tile.count) places[lane] = lists.pair(tile.first + lane);
            __syncwarp();
        }
        __syncthreads();
        finish(step, first_row, number, tile.count, (const Partial*)shared + step % 2 * MOST_UNITS);
    }
}

// Of two columns, each 16 lanes' numbers: the highest of floats that are not negative, or the sum.
DEVICE float highest_of_column(float v) {
    bool second = threadIdx.x & 16;
    u32 a = highest_of_lanes(second ? 0u : __float_as_uint(v)), b = highest_of_lanes(second ? __float_as_uint(v) : 0u);
    return __uint_as_float(second ? b : a);
}
DEVICE int sum_of_column(int v) {
    bool second = threadIdx.x & 16;
    int a = sum_of_lanes(second ? 0 : v), b = sum_of_lanes(second ? v : 0);
    return second ? b : a;
}

// Two rows, 16 apart, of a column's 32 in each lane: to int8 in global memory, as round_group does it.
DEVICE void put_rows(float v, float w, bool counts, size_t at, i8* codes, float* scales) {
    int row = threadIdx.x & 15;
    float highest = highest_of_column(fmaxf(fabsf(v), fabsf(w))), scale = highest * (1.f / 127.f);
    float inverse = highest > 0 ? __fdiv_rn(127.f, highest) : 0.f;
    int first = __float2int_rn(v * inverse), second = __float2int_rn(w * inverse), sum = sum_of_column(first + second);
    if (!counts) return;
    codes[at + row] = (i8)first, codes[at + 16 + row] = (i8)second;
    if (row == 0) ((float2*)scales)[at / 32] = make_float2(scale, scale * (float)sum);
}

// A lane has a row of one column, a warp every FINISHING-th two columns.
DEVICE void finish_gate_up(const Lists& lists, const Share& share, int* places, int which, i8* codes, float* scales, int* progress) {
    constexpr int TURNS = (COLUMNS / 2 + FINISHING - 1) / FINISHING;
    int lane = threadIdx.x & 31, untold = 0;
    float before[TURNS];  // h of the step before
    finish_steps<GateUp>(lists, share, places, [&](int step, int first_row, int number, int count, const Partial* sums) {
        int apart = column_step<GateUp>(count);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int first = 2 * (turn * FINISHING + which), column = first + (lane >> 4), real = min(column, count - 1);
            if (first >= count) break;
            float gate = total<GateUp::SEGMENTS>(sums, lane & 15, real * apart);
            float up = total<GateUp::SEGMENTS>(sums + GateUp::SEGMENTS, lane & 15, real * apart);
            float h = swiglu(gate, up);
            if (step % 2) put_rows(before[turn], h, column < count, (size_t)places[real] * INNER + first_row - 16, codes, scales);
            before[turn] = h;
        }
        if (step % 2 == 0) return;
        __syncwarp();
        // a tile's items together: each time costs about a step, until all that was written is in the cache
        untold++;
        if (step + 1 < share.end && first_row + 16 < INNER) return;
        if (lane == 0) add_after(progress + number, untold);
        untold = 0;
    });
}

// By NUM_WARPS warps, a lane four rows of a column at a time; all sums are read before the first is written.
template <int NUM_WARPS> DEVICE void finish_down(const Lists& lists, const Share& share, int* places, int which, float* out) {
    constexpr int FOURS = Down::STEP_ROWS / 4, APART = 32 * NUM_WARPS, TURNS = (FOURS * COLUMNS + APART - 1) / APART;
    finish_steps<Down>(lists, share, places, [&](int, int first_row, int, int count, const Partial* sums) {
        int apart = column_step<Down>(count), first = 32 * which + (threadIdx.x & 31), end = FOURS * count;
        float4 sum[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int i = first + turn * APART, row = i % FOURS * 4, tile = row / 16;
            if (i < end) sum[turn] = totals<Down::SEGMENTS>(sums + tile * Down::SEGMENTS, row % 16, i / FOURS * apart ^ flip_of_tile(tile));
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int i = first + turn * APART;
            if (i < end) *(float4*)(out + (size_t)places[i / FOURS] * K + first_row + i % FOURS * 4) = sum[turn];
        }
    });
}

// --- What the copying warp does.

// A share's weights and inputs, step by step.
template <class Product> struct Fetch {
    const Lists& lists;
    Share share;
    const typename Product::Copy& weights;
    const i8* codes;
    const float* scales;
    size_t first_row;  // of all matrices that lie before this layer's in the stack
    u64* arrived;  // of each stage, whether its weights have come
    int stage0;

    METHOD Fetch(const Lists& lists_, const Share& share_, const typename Product::Copy& weights_, const i8* codes_, const float* scales_, int index, u64* arrived_)
        : lists(lists_), share(share_), weights(weights_), codes(codes_), scales(scales_), arrived(arrived_),
          first_row((size_t)index * MATRICES * (Product::STEPS_A_TILE * Product::STEP_ROWS)),
          stage0(first_stage<Product>(share_)) {}
    METHOD bool is_new(int n) const { return n == 0 || (share.begin + n) % Product::STEPS_A_TILE == 0; }
    METHOD int number_of(int n) const { return (share.begin + n) / Product::STEPS_A_TILE; }
    METHOD u8* inputs(int number) const { return shared + AT_INPUTS<Product> + number % 2 * Product::In::SIZE; }
    METHOD void start_weights(int n) const {
        int step = share.begin + n, rows = Product::STEPS_A_TILE * Product::STEP_ROWS;
        size_t row = first_row + (size_t)lists.tile(number_of(n)).expert * rows + step % Product::STEPS_A_TILE * Product::STEP_ROWS;
        u64* here = arrived + n % Product::STAGES;
        if ((threadIdx.x & 31) >= BULK_COPIERS) return;
        expect_bulk(here, Product::BYTES);
        weights.start(shared + AT_STAGES + (n + stage0) % Product::STAGES * Product::STAGE, row, here);
    }
    // Pairs are `shared_by` to a row of inputs.
    METHOD void start_inputs(int number, int shared_by) const {
        Tile tile = lists.tile(number);
        int apart = column_step<Product>(tile.count);
#pragma unroll 1
        for (int column = 0; column < tile.count; column++)
            Product::In::copy(inputs(number), codes, scales, column * apart, lists.pair(tile.first + column) / shared_by, threadIdx.x & 31);
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
    fence_bulk();
    auto wait_for_hidden = [&](int number) { wait_for(progress + number, GateUp::ITEMS_A_TILE * FINISHING); };
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
        Down::In::fetch(down.inputs(number), down.codes, down.scales, tile.count, apart, [&](int column) { return lists.pair(tile.first + column); }, threadIdx.x & 31);
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
    __shared__ u64 arrived[GateUp::STAGES + Down::STAGES];
    __shared__ int places[FINISHING + IDLE][COLUMNS];
    int warp = threadIdx.x >> 5, index = launch_number<SHARED_SIZE>() / DOWNS, down_index = launch_number<SHARED_SIZE>() % DOWNS;
    Lists lists(GIVEN_LISTS);
    Share gate_up = share_of_gate_up(lists.num_tiles);
    Share down{begin_of_down(lists.num_tiles, blockIdx.x), begin_of_down(lists.num_tiles, blockIdx.x + 1)};
    if (warp >= MULTIPLYING + FINISHING) {
        int lane = threadIdx.x & 31;
        if (lane < GateUp::STAGES + Down::STAGES) init_bulk(arrived + lane);
        fence_bulk();
        __syncwarp();
        GateUp::Copy first(GIVEN(0), GIVEN(1));
        Down::Copy second(GIVEN(2));
        Fetch<Down> later(lists, down, second, hidden_codes, hidden_scales, down_index, arrived + GateUp::STAGES);
        int early = fetch_gate_up(Fetch<GateUp>(lists, gate_up, first, codes, scales, index, arrived), later);
        fetch_down(later, early, progress);
        return;
    }
    if (warp >= MULTIPLYING)
        finish_gate_up(lists, gate_up, places[warp - MULTIPLYING], warp - MULTIPLYING, hidden_codes, hidden_scales, progress);
    else
        multiply_steps<GateUp>(lists, gate_up, arrived);
    if (warp >= MULTIPLYING - IDLE)
        finish_down<FINISHING + IDLE>(lists, down, places[warp - (MULTIPLYING - IDLE)], warp - (MULTIPLYING - IDLE), out);
    else
        multiply_steps<Down>(lists, down, arrived + GateUp::STAGES);
}

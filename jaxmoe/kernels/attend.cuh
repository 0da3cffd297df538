// What attention of one token and of many share: the norm and RoPE of a head, keys and values on their way to shared
// memory, scores, shares and mixes, and how parts are merged. attention.cu says in which order.
//
// Macros: NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, EPS; PAGE_LENGTH, NUM_PAGES, TABLE_LENGTH of the cache; BUFFERS.
#pragma once
#include "common.cuh"

constexpr int H = HEAD_DIM, G = NUM_HEADS / NUM_KV_HEADS;
constexpr int ATTENDING = 8;         // warps that attend to one token
constexpr int KEYS = 128;            // of a segment
constexpr int RUN = 4;               // segments
constexpr int CHUNKS = H / 8;        // pieces of 16 bytes in a row of H bfloat16
constexpr int PARTS = H / 32;        // pieces of a key that one lane multiplies
constexpr int PAIRS = H / 64;        // pairs of numbers that a lane rotates
constexpr int ROW = H * 2;           // bytes of a key
constexpr float SCALE = 1.4426950408889634 * (H == 64 ? 0.125 : 0.08838834764831845);
constexpr bool ONE_PAGE = PAGE_LENGTH >= 16;  // keys that a warp copies share a page
constexpr u32 ONES = 0x3f803f80u;
static_assert(H == 64 || H == 128, "heads of 64 or 128 numbers");
static_assert(NUM_HEADS % NUM_KV_HEADS == 0 && G <= 16, "at most 16 query heads a key head");
static_assert(256 % PAGE_LENGTH == 0, "pages are cut from two segments without a rest");

#define INFINITE __uint_as_float(0x7f800000u)

// The same number, which is then kept in a register instead of computed anew wherever it is needed.
#ifdef EMULATED
DEVICE int kept(int number) { return number; }
#else
DEVICE int kept(int number) {
    asm volatile("" : "+r"(number));
    return number;
}
#endif

// Pieces of 16 bytes are mixed up inside a row, so that neither 8 rows of one column nor pairs of rows meet in
// the same banks.
DEVICE int row_mix(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

// Where the token at `position` of a slot lies in a layer's pages, in tokens.
DEVICE int token_of(const int* table, int position) {
    return __ldg(table + position / PAGE_LENGTH) * PAGE_LENGTH + position % PAGE_LENGTH;
}
DEVICE u64 layer_start(int layer) { return (u64)layer * NUM_PAGES * PAGE_LENGTH * NUM_KV_HEADS * H; }
DEVICE u64 row_start(int token, int kv_head) { return ((u64)token * NUM_KV_HEADS + kv_head) * H; }

// PAIRS neighbouring numbers.
struct Few {
    float v[PAIRS];
};
DEVICE Few load_few(const float* p) {
    Few few;
    if constexpr (PAIRS == 2) {
        float2 both = __ldg((const float2*)p);
        few.v[0] = both.x, few.v[1] = both.y;
    } else {
        few.v[0] = __ldg(p);
    }
    return few;
}
DEVICE Few load_shared(const float* p) {
    Few few;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) few.v[i] = p[i];
    return few;
}
DEVICE void store_few(u16* p, const Few& few) {
    if constexpr (PAIRS == 2)
        *(u32*)p = pack_bfloat16(few.v[0], few.v[1]);
    else
        *p = float_to_bfloat16(few.v[0]);
}

// A lane's numbers of a head or of its norm, from both halves.
struct Head {
    Few low, high;
};
struct Angles {
    Few cosines, sines;
};
DEVICE Head load_head(const float* x) {
    int i = PAIRS * (threadIdx.x & 31);
    return {load_few(x + i), load_few(x + H / 2 + i)};
}
DEVICE Head load_head_shared(const float* x) {
    int i = PAIRS * (threadIdx.x & 31);
    return {load_shared(x + i), load_shared(x + H / 2 + i)};
}
DEVICE Angles load_angles(const float* cosines, const float* sines, int position) {
    u64 i = (u64)position * (H / 2) + PAIRS * (threadIdx.x & 31);
    return {load_few(cosines + i), load_few(sines + i)};
}
DEVICE void norm_and_rotate(Head& head, const Head& norm, const Angles& angles) {
    float sum = head.low.v[0] * head.low.v[0];
#pragma unroll
    for (int i = 1; i < PAIRS; i++) sum = fmaf(head.low.v[i], head.low.v[i], sum);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) sum = fmaf(head.high.v[i], head.high.v[i], sum);
    float r = rsqrtf(sum_of_lanes(sum) * (1.f / H) + EPS);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        float low = head.low.v[i] * r * norm.low.v[i], high = head.high.v[i] * r * norm.high.v[i];
        head.low.v[i] = low * angles.cosines.v[i] - high * angles.sines.v[i];
        head.high.v[i] = high * angles.cosines.v[i] + low * angles.sines.v[i];
    }
}

// 16 keys of a segment, from `first` on, or values, into shared memory, in the background: those of tokens before
// `end`, then zeros. `token` is where the first lies, if 16 share a page. For one warp.
DEVICE void copy_rows(u8* rows, const u16* pages, const int* table, int token, int start, int first, int end,
                      int kv_head) {
    int lane = threadIdx.x & 31, own = lane / CHUNKS, chunk = lane % CHUNKS, known = end - start - first - own;
    const u16* from = pages + row_start(ONE_PAGE ? token + own : 0, kv_head) + 8 * chunk;
    u8* to = rows + (first + own) * ROW;
#pragma unroll
    for (int i = 0; i < 16; i += 32 / CHUNKS) {
        const u16* row = from + i * NUM_KV_HEADS * H;
        if (!ONE_PAGE)
            row = from + row_start(token_of(table, min(start + first + own + i, TABLE_LENGTH * PAGE_LENGTH - 1)), 0);
        copy_async(to + i * ROW + (chunk ^ row_mix(own + i)) * 16, row, i < known);
    }
}

// Where in rows of keys a lane finds piece j of key l/4.
DEVICE int piece_of_key(int j) {
    int lane = threadIdx.x & 31;
    return (lane >> 2) * ROW + ((4 * j + (lane & 3)) ^ row_mix(lane >> 2)) * 16;
}
// scores[n] += queries * keys of 8 keys each: lane l has keys 2 * (l%4) and the next, of rows l/4 and l/4 + 8.
template <int TILES>
DEVICE void score_keys(float (*scores)[4], uint4 first, uint4 second, const u8* keys) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        uint4 key = *(const uint4*)(keys + 8 * n * ROW);
        mma_bfloat16(scores[n], first.x, first.y, first.z, first.w, key.x, key.y);
        mma_bfloat16(scores[n], second.x, second.y, second.z, second.w, key.z, key.w);
    }
}

DEVICE float highest_of_four_lanes(float v) {
    v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 1));
    return fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 2));
}
// For a row that sees nothing, whose scores are -infinite.
DEVICE float finite(float highest) { return highest == -INFINITE ? 0.f : highest; }
// Two neighbours' shares; `highest` is finite and scaled.
DEVICE u32 shares_of(float low, float high, float highest) {
    return pack_bfloat16(exp2_fast(fmaf(low, SCALE, -highest)), exp2_fast(fmaf(high, SCALE, -highest)));
}

// Take another part's highest score into the running one: its sums count `b`, those before it `a`. `base` is the
// higher of both, or any number if neither saw a key.
DEVICE void weigh(float highest, float next, float base, float& a, float& b) {
    a = exp2_fast(highest - base), b = exp2_fast(next - base);
}

// ---------------------------------------------------------------------------------------------------- one token

constexpr bool WIDE = G > 8;  // rows 8..15 of the tile are in use
constexpr int HALVES = 1 + WIDE, QUERIES = 8 * HALVES;
constexpr int ROW_FLOATS = H + 4;  // a head's part of a run: the mix, the highest score, the sum
constexpr int PART_FLOATS = G * ROW_FLOATS;
// Rows of `incoming` after the queries, and how many of them a warp copies.
constexpr int KEY = G, VALUE = G + 1, Q_NORM = G + 2, K_NORM = G + 3, ANGLES = G + 4, ROUNDS = ANGLES / ATTENDING + 1;
constexpr int COLUMNS = H / 64;        // tiles of 8 numbers of H that a warp mixes

struct DecodeShared {
    u8 buffers[BUFFERS][KEYS * ROW];  // keys and values of segments in turn; at the end parts that are merged
    // both as lanes multiply them, 16 bytes a lane: [step of 16][lane][rows l/4, l/4 + 8, l/4, l/4 + 8]; rows past G
    // are whatever they are
    u8 queries[16 * ROW];
    union {
        u8 shares[16 * KEYS * 2];
        float incoming[ANGLES + 1][H];  // queries, key, value, norms, cosines and sines; not after the first scores
    };
    u8 fresh[2 * ROW];  // the token's own key and value
    float maxima[QUERIES][ATTENDING];
    int is_last;
};
static_assert(BUFFERS == 2 || BUFFERS == 3, "a segment's keys and values, or the next one's too");

struct Token {
    int row, kv_head, position;
    const int* table;
};

// Where number i of a head lies among the queries; i + H / 2 lies 8 * ROW bytes after it.
DEVICE int place_of_query(int head, int i) {
    int step = i / 32 * 2 + i % 8 / 4, lane = head % 8 * 4 + i % 32 / 8;
    return (step * 32 + lane) * 16 + (i % 4 / 2 * 2 + head / 8) * 4 + i % 2 * 2;
}

// A head of the token, from PAIRS * lane on, to the queries, or as its own key or value.
DEVICE void put_head(DecodeShared& s, int head, const Head& h) {
    int i = PAIRS * (threadIdx.x & 31);
    u8* to = head < G ? s.queries + place_of_query(head, i) : s.fresh + (head - G) * ROW + 2 * i;
    store_few((u16*)to, h.low);
    store_few((u16*)(to + (head < G ? 8 * ROW : ROW / 2)), h.high);
}

// Where a warp's 16 tokens of a segment lie.
DEVICE int page_of(const Token& token, int segment) {
    u32 there = KEYS * segment + 16 * (threadIdx.x >> 5);
    return ONE_PAGE ? __ldg(token.table + min(there / PAGE_LENGTH, TABLE_LENGTH - 1u)) : 0;
}
DEVICE int around(int buffer) { return buffer < BUFFERS ? buffer : buffer - BUFFERS; }
// A segment's keys to buffer `place` and its values to the next, if it is before `end`: two groups of copies.
DEVICE void copy_segment(DecodeShared& s, const Token& token, const u16* keys, const u16* values, int segment, int end,
                         int place, int page) {
    int first = 16 * (threadIdx.x >> 5), start = KEYS * segment;
    int at = page * PAGE_LENGTH + (int)((u32)(start + first) % PAGE_LENGTH);
#pragma unroll 1
    for (int i = 0; i < 2; i++, place = around(place + 1), keys = values) {
        if (segment < end)
            copy_rows(s.buffers[place], keys, token.table, at, start, first, token.position, token.kv_head);
        commit_copies();
    }
}

// The token's own key or value to place `known` of the segment in shared memory, after what its warp copied there, and
// to its page.
DEVICE void insert_token(u8* rows, u16* pages, const u8* fresh, const Token& token, int known, int page) {
    int lane = threadIdx.x & 31, own = lane / CHUNKS, chunk = lane % CHUNKS;
    if (known >> 4 == (int)threadIdx.x >> 5 && known % (32 / CHUNKS) == own) {
        uint4 piece = ((const uint4*)fresh)[chunk];
        ((uint4*)rows)[known * CHUNKS + (chunk ^ row_mix(known))] = piece;
        int in_page = (u32)token.position % PAGE_LENGTH;
        int at = ONE_PAGE ? page * PAGE_LENGTH + in_page : token_of(token.table, token.position);
        ((uint4*)(pages + row_start(at, token.kv_head)))[chunk] = piece;
    }
    __syncwarp();
}

// Scores of this warp's 16 keys, of which `seen` of the segment count; their highest into shared memory.
DEVICE void score_segment(DecodeShared& s, const u8* keys, int seen, float (&scores)[2][4]) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2;
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        const uint4* query = (const uint4*)s.queries + 64 * j + lane;
        score_keys<2>(scores, query[0], query[32], keys + 16 * warp * ROW + piece_of_key(j));
    }
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float found = -INFINITE;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& score = scores[i >> 1][2 * h + (i & 1)];
            score = 16 * warp + 8 * (i >> 1) + 2 * (lane & 3) + (i & 1) < seen ? score : -INFINITE;
            found = fmaxf(found, score);
        }
        found = highest_of_four_lanes(found);
        if ((lane & 3) == 0) s.maxima[8 * h + row][warp] = found;
    }
}
// Highest scores of rows l/4 and l/4 + 8 in all warps; this warp's shares into shared memory.
DEVICE void share_segment(DecodeShared& s, const float (&scores)[2][4], float (&highest)[2]) {
    int row = (threadIdx.x & 31) >> 2;
    u32 shares[2][2] = {};
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const float4* of = (const float4*)s.maxima[8 * h + row];
        float4 a = of[0], b = of[1];
        highest[h] = SCALE * fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
        shares[0][h] = shares_of(scores[0][2 * h], scores[0][2 * h + 1], highest[h]);
        shares[1][h] = shares_of(scores[1][2 * h], scores[1][2 * h + 1], highest[h]);
    }
    ((uint4*)s.shares)[threadIdx.x] = make_uint4(shares[0][0], shares[0][1], shares[1][0], shares[1][1]);
}

// A warp's rows l/4 and l/4 + 8 of a segment, of a run so far or of all runs so far.
struct Running {
    float mix[COLUMNS][4], sum[2], highest[2];
};
// Shares * values for COLUMNS * 8 numbers of H, and shares * 1; both are 0 before.
DEVICE void mix_segment(const DecodeShared& s, const u8* values, Running& segment) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, key = COLUMNS == 2 ? lane & 15 : lane;
    const u8* value = values + key * ROW + ((COLUMNS * warp + (COLUMNS == 2 ? lane >> 4 : 0)) ^ row_mix(key)) * 16;
    const uint4* share = (const uint4*)s.shares + lane;
    float (&mix)[COLUMNS][4] = segment.mix, sum[4] = {};
#pragma unroll
    for (int group = 0; group < KEYS / 32; group++, share += 64, value += 32 * ROW) {
        uint4 a = share[0], b = share[32];
        u32 r[4], q[4];
        load_transposed(r, value);
        if (COLUMNS == 2) load_transposed(q, value + 16 * ROW);
        mma_bfloat16(mix[0], a.x, a.y, a.z, a.w, r[0], r[1]);
        if (COLUMNS == 2) mma_bfloat16(mix[COLUMNS - 1], a.x, a.y, a.z, a.w, r[2], r[3]);
        mma_bfloat16(sum, a.x, a.y, a.z, a.w, ONES, ONES);
        mma_bfloat16(mix[0], b.x, b.y, b.z, b.w, COLUMNS == 2 ? q[0] : r[2], COLUMNS == 2 ? q[1] : r[3]);
        if (COLUMNS == 2) mma_bfloat16(mix[COLUMNS - 1], b.x, b.y, b.z, b.w, q[2], q[3]);
        mma_bfloat16(sum, b.x, b.y, b.z, b.w, ONES, ONES);
    }
    segment.sum[0] = sum[0], segment.sum[1] = sum[2];
}

DEVICE Running no_segment() {
    Running none = {};
    none.highest[0] = none.highest[1] = -INFINITE;
    return none;
}
DEVICE void merge_rows(Running& to, const Running& next) {
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float a, b, both = fmaxf(to.highest[h], next.highest[h]);
        weigh(to.highest[h], next.highest[h], both, a, b);
        to.highest[h] = both;
        to.sum[h] = fmaf(next.sum[h], b, to.sum[h] * a);
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; i++) {
            float& mix = to.mix[i >> 1][2 * h + (i & 1)];
            mix = fmaf(next.mix[i >> 1][2 * h + (i & 1)], b, mix * a);
        }
    }
}
// A run as [G, ROW_FLOATS]: put(place, a, b) for two neighbours each.
template <class Put> DEVICE void put_rows(const Running& run, Put put) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        int head = 8 * h + (lane >> 2), row = head * ROW_FLOATS;
        if (head >= G) continue;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
            put(row + 8 * (COLUMNS * warp + n) + 2 * (lane & 3), run.mix[n][2 * h], run.mix[n][2 * h + 1]);
        if (warp == 0 && (lane & 3) == 0) put(row + H, run.highest[h], run.sum[h]);
    }
}

// 4 numbers of a head.
struct Mixed {
    float4 mix;
    float highest, sum;
};
DEVICE Mixed no_part() { return {make_float4(0, 0, 0, 0), -INFINITE, 0}; }
DEVICE void merge(Mixed& to, const Mixed& next) {
    float a, b, both = fmaxf(to.highest, next.highest);
    weigh(to.highest, next.highest, both, a, b);
    to.highest = both;
    to.sum = fmaf(next.sum, b, to.sum * a);
    to.mix.x = fmaf(next.mix.x, b, to.mix.x * a), to.mix.y = fmaf(next.mix.y, b, to.mix.y * a);
    to.mix.z = fmaf(next.mix.z, b, to.mix.z * a), to.mix.w = fmaf(next.mix.w, b, to.mix.w * a);
}
// Up to 4 parts, each a run or, `single`, a segment. Runs go on from those before them, which is the same as merging
// them with nothing first. Nothing is merged in the place of parts that are not there: cheaper than to branch.
DEVICE void merge_four(Mixed& all, const Mixed (&parts)[RUN], int num_parts, bool single) {
    Mixed run = single ? no_part() : all;
#pragma unroll
    for (int i = 0; i < RUN; i++)
        merge(run, i < num_parts ? parts[i] : no_part());
    if (single)
        merge(all, run);
    else
        all = run;
}

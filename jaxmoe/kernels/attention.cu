// Attention over a paged bfloat16 cache: one token of many slots, or many tokens of one slot, with the same bits.
//
// Keys are cut at absolute positions into segments of 128, and segments into runs of 4. What a segment gives a row
// (highest score, sum of shares, mix of values) is computed by the same instructions for both; the segments of a run
// are merged ascending, then the runs.
// Scores: mma over H, 32 numbers at a time: of each 32, the first mma takes 8 * i .. 8 * i + 3 (i < 4), the second
// the others. Shares: exp2(score * SCALE - highest of the 128), a fused multiply-add, as bfloat16. Mix and sum: one chain
// of mma over ascending keys; groups of 32 keys that no row sees may be left out (they add zeros).
// A norm of a head is one warp's: lane i has numbers PAIRS * i .. and H / 2 + PAIRS * i .., fmaf in that order, then
// sum_of_lanes.
#include "common.cuh"

constexpr int N = NUM_HEADS, K = NUM_KV_HEADS, H = HEAD_DIM, G = N / K, P = TABLE_LENGTH;
constexpr int THREADS = 256, WARPS = 8;
constexpr int KEYS = 128;            // of a segment
constexpr int RUN = 4;               // segments
constexpr int FEW_SEGMENTS = 32;     // of a token, to be merged one by one though every block has two
constexpr int CHUNKS = H / 8;        // pieces of 16 bytes in a row of H bfloat16
constexpr int PARTS = H / 32;        // pieces of a key that one lane multiplies
constexpr int PAIRS = H / 64;        // pairs of numbers that a lane rotates
constexpr int ROW = H * 2;           // bytes of a key
constexpr int QKV = (N + 2 * K) * H; // numbers a token brings
constexpr float SCALE = 1.4426950408889634 * (H == 64 ? 0.125 : 0.08838834764831845);
constexpr bool ONE_PAGE = PAGE_LENGTH >= 16;  // keys that a warp copies share a page
constexpr u32 ONES = 0x3f803f80u;
static_assert(H == 64 || H == 128, "heads of 64 or 128 numbers");
static_assert(N % K == 0 && G <= 16, "at most 16 query heads a key head");
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
DEVICE u64 layer_start(int layer) { return (u64)layer * NUM_PAGES * PAGE_LENGTH * K * H; }
DEVICE u64 row_start(int token, int kv_head) { return ((u64)token * K + kv_head) * H; }

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
        const u16* row = from + i * K * H;
        if (!ONE_PAGE)
            row = from + row_start(token_of(table, min(start + first + own + i, P * PAGE_LENGTH - 1)), 0);
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
constexpr int ITEMS = G * H / 4;       // 4 numbers of a head, which a thread merges and rounds
// Rows of `incoming` after the queries, and how many of them a warp copies.
constexpr int KEY = G, VALUE = G + 1, Q_NORM = G + 2, K_NORM = G + 3, ANGLES = G + 4, ROUNDS = ANGLES / WARPS + 1;
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
    float maxima[QUERIES][WARPS];
    int is_last;
};
constexpr int PART_SIZE = PART_FLOATS * 4, MERGED = BUFFERS * KEYS * ROW / (RUN * PART_SIZE);  // fours on their way
static_assert(BUFFERS == 2 || BUFFERS == 3, "a segment's keys and values, or the next one's too");
static_assert(MERGED > 0, "four parts fit where the keys and values were");

struct Token {
    int row, kv_head, position;
    const int* table;
};

// The token's heads of this key head, norms and angles into shared memory in the background.
DEVICE void copy_token(DecodeShared& s, const Token& token, const float* qkv, const float* q_norm, const float* k_norm,
                       const float* cosines, const float* sines) {
    int lane = threadIdx.x & 31, piece = lane % (H / 4);
    qkv += (u64)token.row * QKV;
    u64 angles = (u64)token.position * (H / 2);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int row = WARPS * round + (threadIdx.x >> 5);
        const float* from = qkv + (token.kv_head * G + row) * H;
        if (row >= KEY) from = qkv + (N + (row - KEY) * K + token.kv_head) * H;
        if (row == Q_NORM) from = q_norm;
        if (row == K_NORM) from = k_norm;
        if (row == ANGLES) from = piece < H / 8 ? cosines + angles : sines + angles - H / 2;
        if (row <= ANGLES && lane == piece) copy_async(s.incoming[row] + 4 * piece, from + 4 * piece);
    }
    commit_copies();
}

// Where number i of a head lies among the queries; i + H / 2 lies 8 * ROW bytes after it.
DEVICE int place_of_query(int head, int i) {
    int step = i / 32 * 2 + i % 8 / 4, lane = head % 8 * 4 + i % 32 / 8;
    return (step * 32 + lane) * 16 + (i % 4 / 2 * 2 + head / 8) * 4 + i % 2 * 2;
}

// Queries of this key head, and, for the owner, the token's own key and value, to shared memory.
DEVICE void prepare_token(DecodeShared& s, bool is_owner) {
    int i = PAIRS * (threadIdx.x & 31);
    Angles angles = {load_shared(s.incoming[ANGLES] + i), load_shared(s.incoming[ANGLES] + H / 2 + i)};
#pragma unroll 1
    for (int head = threadIdx.x >> 5; head < (is_owner ? G + 2 : G); head += WARPS) {
        Head h = load_head_shared(s.incoming[head]);
        if (head < VALUE) norm_and_rotate(h, load_head_shared(s.incoming[head < G ? Q_NORM : K_NORM]), angles);
        u8* to = head < G ? s.queries + place_of_query(head, i) : s.fresh + (head - G) * ROW + 2 * i;
        store_few((u16*)to, h.low);
        store_few((u16*)(to + (head < G ? 8 * ROW : ROW / 2)), h.high);
    }
}

// Where a warp's 16 tokens of a segment lie.
DEVICE int page_of(const Token& token, int segment) {
    u32 there = KEYS * segment + 16 * (threadIdx.x >> 5);
    return ONE_PAGE ? __ldg(token.table + min(there / PAGE_LENGTH, P - 1u)) : 0;
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
// As [G, ROW_FLOATS].
DEVICE void store_part(float* part, const Running& run) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        int head = 8 * h + (lane >> 2);
        if (head >= G) continue;
        float* row = part + head * ROW_FLOATS;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
            *(float2*)(row + 8 * (COLUMNS * warp + n) + 2 * (lane & 3)) =
                make_float2(run.mix[n][2 * h], run.mix[n][2 * h + 1]);
        if (warp == 0 && (lane & 3) == 0) *(float2*)(row + H) = make_float2(run.highest[h], run.sum[h]);
    }
}

// 4 numbers of a head.
struct Mixed {
    float4 mix;
    float highest, sum;
};
DEVICE Mixed no_part() { return {make_float4(0, 0, 0, 0), -INFINITE, 0}; }
// Where a thread's 4 numbers of a part lie, and the highest score and the sum of their head.
DEVICE int place_of_mix(int item) { return (item / (H / 4) * ROW_FLOATS + item % (H / 4) * 4) * 4; }
DEVICE int place_of_rest(int item) { return (item / (H / 4) * ROW_FLOATS + H) * 4; }
DEVICE Mixed load_part(const u8* part, int item) {
    float2 rest = *(const float2*)(part + place_of_rest(item));
    return {*(const float4*)(part + place_of_mix(item)), rest.x, rest.y};
}
DEVICE void merge(Mixed& to, const Mixed& next) {
    float a, b, both = fmaxf(to.highest, next.highest);
    weigh(to.highest, next.highest, both, a, b);
    to.highest = both;
    to.sum = fmaf(next.sum, b, to.sum * a);
    to.mix.x = fmaf(next.mix.x, b, to.mix.x * a), to.mix.y = fmaf(next.mix.y, b, to.mix.y * a);
    to.mix.z = fmaf(next.mix.z, b, to.mix.z * a), to.mix.w = fmaf(next.mix.w, b, to.mix.w * a);
}
// Up to 4 parts, each a run or, `single`, a segment. Runs go on from those before them, which is the same as merging
// them with nothing first.
DEVICE void merge_four(Mixed& all, const Mixed (&parts)[RUN], int num_parts, bool single) {
    Mixed run = single ? no_part() : all;
#pragma unroll
    for (int i = 0; i < RUN; i++)
        if (i < num_parts) merge(run, parts[i]);
    if (single)
        merge(all, run);
    else
        all = run;
}
// Parts ascending. What a thread merges comes to shared memory in the background, 4 parts at a time; a head's threads
// share the rest.
DEVICE Mixed merge_parts(DecodeShared& s, const u8* parts, int num_parts, bool single, int item) {
    constexpr int AHEAD = RUN * MERGED;
    u8* buffers = (u8*)s.buffers;
    int mix = place_of_mix(item), rest = place_of_rest(item), lane = threadIdx.x % (H / 4), stage = 0;
    Mixed all = no_part();
#pragma unroll 1
    for (int first = -AHEAD; first < num_parts; first += RUN) {
        u8* place = buffers + stage * (RUN * PART_SIZE);
        Mixed four[RUN];
        if (first >= 0) {
            wait_copies<MERGED - 1>();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < RUN; i++) four[i] = load_part(place + i * PART_SIZE, min(item, ITEMS - 1));
            __syncwarp();
        }
#pragma unroll 1
        for (int i = 0; i < RUN && first + AHEAD + i < num_parts && item < ITEMS; i++, place += PART_SIZE) {
            const u8* from = parts + (u64)(u32)(first + AHEAD + i) * PART_SIZE;
            copy_async(place + mix, from + mix);
            if (lane == i) copy_async(place + rest, from + rest);
        }
        commit_copies();
        stage = stage < MERGED - 1 ? stage + 1 : 0;
        if (first >= 0) merge_four(all, four, num_parts - first, single);
    }
    return all;
}

// Divide by the sum, round and write 4 numbers; neighbouring 8 lanes have a group.
DEVICE void store_codes(const Token& token, const Mixed& all, int item, i8* codes, float* scales) {
    float share = __fdiv_rn(1.f, all.sum);
    float v[4] = {all.mix.x * share, all.mix.y * share, all.mix.z * share, all.mix.w * share};
    float highest = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
    highest = highest_of_four_lanes(highest);
    highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 4));
    float inverse = highest > 0 ? __fdiv_rn(127.f, highest) : 0.f, scale = highest * (1.f / 127.f);
    u32 word = 0;
    int total = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int code = __float2int_rn(v[i] * inverse);
        total += code;
        word |= (u32)(code & 255) << (8 * i);
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) total += __shfl_xor_sync(ALL_LANES, total, offset);
    if (item >= ITEMS) return;
    u64 first = ((u64)token.row * N + token.kv_head * G) * H + 4 * item;
    *(u32*)(codes + first) = word;
    if (item % 8 == 0) *(float2*)(scales + first / GROUP * 2) = make_float2(scale, scale * (float)total);
}

// Whether all other blocks of this token and key head have stored their parts; the counter is left at zero.
DEVICE bool is_last_block(DecodeShared& s, int* counter, int num_blocks) {
    __syncthreads();
    if (threadIdx.x == 0) {
        s.is_last = add_in_order(counter, 1) == num_blocks - 1;
        if (s.is_last) *counter = 0;
    }
    __syncthreads();
    return s.is_last;
}

// What a warp of attend_decode does: segments `first` to `end` of a row, which has `blocks` blocks. A part is
// 1 << shift segments. `page` is where the warp's keys of the first segment lie. An idle block's `first` is its `end`.
struct alignas(16) Plan {
    int row, slot, position, first, end, blocks, shift, page;
};

DEVICE Plan load_plan(const Plan* plan) {
    int4 a = __ldg((const int4*)plan), b = __ldg((const int4*)plan + 1);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// The nth block's share of a row, in parts of `length` segments.
DEVICE Plan share_of(int row, int slot, int position, int nth, int blocks, int length) {
    int segments = position / KEYS + 1, parts = (segments + length - 1) / length;
    int shift = length == 1 && blocks > 1 ? 0 : 2;
    int first = nth * parts / blocks * length, end = min((nth + 1) * parts / blocks * length, segments);
    return {row, slot, position, first, end, blocks, shift, 0};
}

// All rows' parts are shared out evenly among DECODE_BLOCKS blocks; a block has but one row, so that there are up to
// one more for each row. A part is a run, or a segment: then there are more blocks for few segments, and more to merge.
KERNEL(32, 1)
plan_decode(const int* active, const int* positions, const int* tables, const int* count, Plan* plans) {
    int lane = threadIdx.x, num_rows = __ldg(count), nth = blockIdx.x, segments = 0, runs = 0, most = 0;
#pragma unroll 1
    for (int row = lane; row < num_rows; row += 32) {
        int own = __ldg(positions + __ldg(active + row)) / KEYS + 1;
        segments += own, runs += (own + RUN - 1) / RUN, most = max(most, own);
    }
#pragma unroll 1
    for (int offset = 16; offset; offset /= 2) {
        segments += __shfl_xor_sync(ALL_LANES, segments, offset), runs += __shfl_xor_sync(ALL_LANES, runs, offset);
        most = max(most, __shfl_xor_sync(ALL_LANES, most, offset));
    }
    bool single = segments <= DECODE_BLOCKS || (segments <= 2 * DECODE_BLOCKS && most <= FEW_SEGMENTS);
    int length = single ? 1 : RUN, share = ((single ? segments : runs) + DECODE_BLOCKS - 1) / DECODE_BLOCKS;
    Plan plan = {};
#pragma unroll 1
    for (int first = 0; first < num_rows && plan.end == 0; first += 32) {
        int row = min(first + lane, num_rows - 1), slot = __ldg(active + row), position = __ldg(positions + slot);
        int own = position / KEYS + 1, parts = (own + length - 1) / length;
        // a run and a bit are not worth a second block
        int blocks = !single && own <= RUN * share + 1 ? 1 : (parts + share - 1) / share;
        int end = first + lane < num_rows ? blocks : 0;
#pragma unroll 1
        for (int offset = 1; offset < 32; offset *= 2) {
            int before = __shfl_up_sync(ALL_LANES, end, offset);
            end += lane >= offset ? before : 0;
        }
        u32 later = __ballot_sync(ALL_LANES, end > nth);
        int from = later ? __ffs(later) - 1 : 31, mine = nth - end + blocks;
        auto of = [&](int number) { return __shfl_sync(ALL_LANES, number, from); };
        if (later) plan = share_of(of(row), of(slot), of(position), of(mine), of(blocks), length);
        nth -= of(end);
    }
    if (lane >= WARPS) return;
    int page = (KEYS * plan.first + KEYS / WARPS * lane) / PAGE_LENGTH;
    plan.page = __ldg(tables + plan.slot * P + min(page, P - 1));
    plans[WARPS * blockIdx.x + lane] = plan;
}

// A token's only block has all parts merged, otherwise the last of its blocks to finish merges them.
DEVICE void finish_token(DecodeShared& s, const Token& token, const Plan& plan, const Running& all, const float* parts,
                         int* counters, i8* codes, float* scales) {
    if (plan.blocks == 1) {
        __syncthreads();
        store_part((float*)s.buffers, all);
        __syncthreads();
    } else if (!is_last_block(s, counters + token.row * K + token.kv_head, plan.blocks)) {
        return;
    }
    int num_parts = (token.position / KEYS >> plan.shift) + 1;
#pragma unroll 1
    for (int item = threadIdx.x; item - (int)(threadIdx.x & 31) < ITEMS; item += THREADS) {
        Mixed mixed = plan.blocks == 1 ? load_part((const u8*)s.buffers, min(item, ITEMS - 1))
                                       : merge_parts(s, (const u8*)parts, num_parts, plan.shift == 0, item);
        store_codes(token, mixed, item, codes, scales);
    }
}

// A block's segments of one token. The block that has the last one stores the token's key and value in their page.
KERNEL(THREADS, 2)
attend_decode(const float* qkv, const float* q_norm, const float* k_norm, const float* cosines, const float* sines,
              const Plan* plans, const int* tables, const u16*, const u16*, const int*, i8* codes, float* scales,
              u16* keys, u16* values, int* counters, float* parts) {
    extern __shared__ __align__(16) u8 shared[];
    DecodeShared& s = *(DecodeShared*)shared;
    int kv_head = blockIdx.x, layer = launch_number<SHARED_SIZE>(), place = 0;
    Plan plan = load_plan(plans + WARPS * blockIdx.y + (threadIdx.x >> 5));
    int position = plan.position, segment = plan.first, end = plan.end, page = plan.page;
    if (segment >= end) return;
    Token token = {plan.row, kv_head, position, tables + plan.slot * P};
    keys += layer_start(layer), values += layer_start(layer);
    parts += ((u64)token.row * K + kv_head) * NUM_SEGMENTS * PART_FLOATS;
    copy_token(s, token, qkv, q_norm + layer * H, k_norm + layer * H, cosines, sines);
    copy_segment(s, token, keys, values, segment, end, place, page);
    int next_page = page_of(token, segment + 1);
    wait_copies<2>();
    __syncthreads();
    prepare_token(s, KEYS * end > position);
    __syncthreads();
    Running run = no_segment(), all = no_segment();
#pragma unroll 1
    while (segment < end) {
        int known = position - KEYS * segment, next_place = around(place + 2);
        u8 *own_keys = s.buffers[place], *own_values = s.buffers[around(place + 1)];
        wait_copies<1>();
        insert_token(own_keys, keys, s.fresh, token, known, page);
        float scores[2][4] = {};
        score_segment(s, own_keys, min(known + 1, KEYS), scores);
        __syncthreads();
        // this warp has its scores, and all have mixed the values before
        if (BUFFERS == 3) copy_segment(s, token, keys, values, segment + 1, end, next_place, next_page);
        Running next = {};
        share_segment(s, scores, next.highest);
        wait_copies<2 * (BUFFERS - 2)>();
        insert_token(own_values, values, s.fresh + ROW, token, known, page);
        __syncthreads();
        mix_segment(s, own_values, next);
        merge_rows(run, next);
        segment++, place = next_place;
        if (BUFFERS == 2) {
            __syncthreads();
            copy_segment(s, token, keys, values, segment, end, place, next_page);
        }
        page = next_page, next_page = page_of(token, segment + 1);
        if ((segment & ((1 << plan.shift) - 1)) > 0 && segment < end) continue;
        if (plan.blocks == 1)
            merge_rows(all, run);
        else
            store_part(parts + (u64)(u32)((segment - 1) >> plan.shift) * PART_FLOATS, run);
        run = no_segment();
    }
    finish_token(s, token, plan, all, parts, counters, codes, scales);
}

// ------------------------------------------------------------------------------------------------- many tokens

// Heads that a warp has on their way at once.
constexpr int AT_ONCE = 5;

// Queries and keys of one token: norm, RoPE and bfloat16; keys and values to their page.
KERNEL(THREADS, 4)
prepare(const float* qkv, const float* q_norm, const float* k_norm, const float* cosines, const float* sines,
        const int* where, const int* tables, const u16*, const u16*, u16* queries, u16* keys, u16* values) {
    int warp = threadIdx.x >> 5, i = PAIRS * (threadIdx.x & 31), row = blockIdx.x;
    int layer = launch_number<SHARED_SIZE>();
    if (row >= __ldg(where + 2)) return;
    int position = __ldg(where + 1) + row, token = token_of(tables + __ldg(where) * P, position);
    Head norms[2] = {load_head(q_norm + layer * H), load_head(k_norm + layer * H)};
    Angles angles = load_angles(cosines, sines, position);
    keys += layer_start(layer) + row_start(token, 0), values += layer_start(layer) + row_start(token, 0);
#pragma unroll 1
    for (int first = 0; first < N + 2 * K; first += AT_ONCE * WARPS) {
        Head heads[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++)
            heads[n] = load_head(qkv + (u64)row * QKV + min(first + n * WARPS + warp, N + 2 * K - 1) * H);
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            // what all warps have needs no question
            int lowest = first + n * WARPS, head = lowest + warp;
            bool is_query = lowest + WARPS <= N || (lowest < N && head < N);
            if (lowest + WARPS > N + 2 * K && head >= N + 2 * K) break;
            u16* to = queries + ((u64)row * N + head) * H;
            if (is_query)
                norm_and_rotate(heads[n], norms[0], angles);
            else if (head < N + K)
                norm_and_rotate(heads[n], norms[1], angles), to = keys + (head - N) * H;
            else
                to = values + (head - N - K) * H;
            store_few(to + i, heads[n].low);
            store_few(to + H / 2 + i, heads[n].high);
        }
    }
}

constexpr int ROWS = QUERY_ROWS, TOKENS = ROWS / G;  // a block's queries: all heads of a key head, of so many tokens
constexpr int MANY_THREADS = 2 * ROWS, MANY_WARPS = ROWS / 16;  // a warp has 16 rows
constexpr int TILES = KEYS / 8, WIDTH = H / 8;

struct PrefillShared {
    u8 keys[STAGES][KEYS * ROW], values[STAGES][KEYS * ROW];
    float4 runs[WIDTH * MANY_THREADS];  // the mix of the runs so far, each thread's own
};
struct Tile {
    int position, num_tokens;
};
DEVICE int first_token() { return (gridDim.y - 1 - blockIdx.y) * TOKENS; }

DEVICE void copy_segment(PrefillShared& s, int stage, const u16* keys, const u16* values, const int* table, int start,
                         int end) {
#pragma unroll 1
    for (int first = 16 * (threadIdx.x >> 5); first < KEYS; first += 16 * MANY_WARPS) {
        int at = ONE_PAGE ? token_of(table, min(start + first, P * PAGE_LENGTH - 1)) : 0;
        copy_rows(s.keys[stage], keys, table, at, start, first, end, blockIdx.x);
        copy_rows(s.values[stage], values, table, at, start, first, end, blockIdx.x);
    }
}

// Where a lane finds its pieces in a segment.
struct Places {
    int key[PARTS], value[WIDTH / 2];
};
DEVICE Places places_of_lane() {
    int lane = threadIdx.x & 31, key = lane & 15;
    Places places;
#pragma unroll
    for (int j = 0; j < PARTS; j++) places.key[j] = kept(piece_of_key(j));
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++)
        places.value[i] = kept(key * ROW + ((2 * i + (lane >> 4)) ^ row_mix(key)) * 16);
    return places;
}

// Shares of 16 rows and a segment's keys, as a lane multiplies them: two words of row l/4 and l/4 + 8 for 16 keys.
// Row h sees the first seen[h] keys, `least` of them at least, and no row more than `most`.
DEVICE void share_rows(const Places& places, const u8* keys, const uint4 (&queries)[PARTS][2],
                       const int (&seen)[2], int least, int most, u32 (&shares)[TILES][2], float (&highest)[2]) {
    int lane = threadIdx.x & 31;
    float scores[TILES][4] = {};
#pragma unroll
    for (int n = 0; n < TILES; n += 4)
        if (8 * n < most)
#pragma unroll
            for (int j = 0; j < PARTS; j++)
                score_keys<4>(scores + n, queries[j][0], queries[j][1], keys + 8 * n * ROW + places.key[j]);
    if (least < KEYS)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * n + 2 * (lane & 3) + (e & 1) >= seen[e >> 1]) scores[n][e] = -INFINITE;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float found = -INFINITE;
#pragma unroll
        for (int n = 0; n < TILES; n++) found = fmaxf(found, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
        highest[h] = SCALE * highest_of_four_lanes(found);
        float base = finite(highest[h]);
#pragma unroll
        for (int n = 0; n < TILES; n++) shares[n][h] = shares_of(scores[n][2 * h], scores[n][2 * h + 1], base);
    }
}

// A running mix of rows l/4 and l/4 + 8.
struct MixedRows {
    float mix[WIDTH][4], sum[2], highest[2];
};
DEVICE void clear(MixedRows& rows) {
#pragma unroll
    for (int i = 0; i < 4 * WIDTH; i++) rows.mix[i >> 2][i & 3] = 0;
    rows.sum[0] = rows.sum[1] = 0, rows.highest[0] = rows.highest[1] = -INFINITE;
}

// A segment's shares * values and shares * 1, merged into the run. Half of the numbers of H at a time: registers.
DEVICE void mix_rows(const Places& places, MixedRows& run, const u32 (&shares)[TILES][2],
                     const float (&highest)[2], const u8* values, int most) {
    float a[2], b[2], sum[4] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float both = fmaxf(run.highest[h], highest[h]);
        weigh(run.highest[h], highest[h], finite(both), a[h], b[h]);
        run.highest[h] = both;
    }
#pragma unroll
    for (int first = 0; first < WIDTH; first += WIDTH / 2) {
        float mix[WIDTH / 2][4] = {};
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            if (8 * (n & ~3) >= most) continue;
            u32 a0 = shares[n][0], a1 = shares[n][1], a2 = shares[n + 1][0], a3 = shares[n + 1][1];
#pragma unroll
            for (int i = 0; i < WIDTH / 2; i += 2) {
                u32 r[4];
                load_transposed(r, values + 8 * n * ROW + places.value[(first + i) / 2]);
                mma_bfloat16(mix[i], a0, a1, a2, a3, r[0], r[1]);
                mma_bfloat16(mix[i + 1], a0, a1, a2, a3, r[2], r[3]);
            }
            if (first == 0) mma_bfloat16(sum, a0, a1, a2, a3, ONES, ONES);
        }
#pragma unroll
        for (int i = 0; i < 2 * WIDTH; i++) {
            float& to = run.mix[first + i / 4][i & 3];
            to = fmaf(mix[i / 4][i & 3], b[i >> 1 & 1], to * a[i >> 1 & 1]);
        }
    }
    run.sum[0] = fmaf(sum[0], b[0], run.sum[0] * a[0]), run.sum[1] = fmaf(sum[2], b[1], run.sum[1] * a[1]);
}

// Divide by the sums, round and write: a lane has 2 numbers of each 8 of rows l/4 and l/4 + 8, in shared memory.
DEVICE void store_rows(const PrefillShared& s, const float (&sums)[2], const Tile& tile, i8* codes, float* scales) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int piece = 0; piece < 2 * PARTS; piece++) {
        int h = piece & 1, column = piece >> 1, row = 16 * warp + 8 * h + (lane >> 2), token = row / G, total;
        float v[8], share = __fdiv_rn(1.f, h ? sums[1] : sums[0]), scale;
        uint2 rounded;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 two = ((const float2*)&s.runs[(4 * column + i) * MANY_THREADS + threadIdx.x])[h];
            v[2 * i] = two.x * share, v[2 * i + 1] = two.y * share;
        }
        quantise(v, rounded, scale, total);
        if (token >= tile.num_tokens) continue;
        u64 first = ((u64)(first_token() + token) * N + (int)blockIdx.x * G + row % G) * H + 32 * column;
        u16* to = (u16*)(codes + first) + (lane & 3);
        to[0] = rounded.x & 0xffff, to[4] = rounded.x >> 16, to[8] = rounded.y & 0xffff, to[12] = rounded.y >> 16;
        if ((lane & 3) == 0) *(float2*)(scales + first / GROUP * 2) = make_float2(scale, scale * (float)total);
    }
}

// The runs so far, whose mix is in shared memory, and one more: together, in both places.
DEVICE void merge_run(PrefillShared& s, MixedRows& run, float (&sum)[2], float (&highest)[2], bool is_first) {
    float a[2], b[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float both = fmaxf(highest[h], run.highest[h]);
        weigh(highest[h], run.highest[h], finite(both), a[h], b[h]);
        highest[h] = both;
        sum[h] = fmaf(run.sum[h], b[h], sum[h] * a[h]);
    }
#pragma unroll
    for (int n = 0; n < WIDTH; n++) {
        float4& place = s.runs[n * MANY_THREADS + threadIdx.x];
        float4 v = is_first ? make_float4(0, 0, 0, 0) : place;
        place = make_float4(fmaf(run.mix[n][0], b[0], v.x * a[0]), fmaf(run.mix[n][1], b[0], v.y * a[0]),
                            fmaf(run.mix[n][2], b[1], v.z * a[1]), fmaf(run.mix[n][3], b[1], v.w * a[1]));
    }
}

// Attention of the tokens of one tile; those with most segments start first.
KERNEL(MANY_THREADS, 1)
attend_prefill(const u16* queries, const int* where, const int* tables, const u16* keys, const u16* values, i8* codes,
               float* scales) {
    extern __shared__ __align__(16) u8 shared[];
    PrefillShared& s = *(PrefillShared*)shared;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = first_token(), count = __ldg(where + 2);
    if (first >= count) return;
    Tile tile = {__ldg(where + 1) + first, min(TOKENS, count - first)};
    const int* table = tables + __ldg(where) * P;
    int layer = launch_number<SHARED_SIZE>(), end = tile.position + tile.num_tokens, last = (end - 1) / KEYS;
    keys += layer_start(layer), values += layer_start(layer);
    copy_segment(s, 0, keys, values, table, 0, end);
    commit_copies();
    uint4 pieces[2][PARTS], q[PARTS][2];
    int bounds[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = 16 * warp + 8 * h + (lane >> 2), token = row / G;
        bounds[h] = token < tile.num_tokens ? tile.position + token + 1 : 0;
        const u16* from = queries + ((u64)(first + min(token, tile.num_tokens - 1)) * N + (int)blockIdx.x * G +
                                     row % G) * H + 8 * (lane & 3);
#pragma unroll
        for (int j = 0; j < PARTS; j++) pieces[h][j] = __ldg((const uint4*)(from + 32 * j));
    }
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        uint4 low = pieces[0][j], high = pieces[1][j];
        q[j][0] = make_uint4(low.x, high.x, low.y, high.y), q[j][1] = make_uint4(low.z, high.z, low.w, high.w);
    }
    Places places = places_of_lane();
    MixedRows run;
    clear(run);
    float sum[2] = {0, 0}, highest[2] = {-INFINITE, -INFINITE};
#pragma unroll 1
    for (int segment = 0; segment <= last; segment++) {
        int start = KEYS * segment, stage = segment % STAGES;
        wait_copies<0>();
        __syncthreads();
        if (STAGES > 1) {
            if (segment < last) copy_segment(s, (segment + 1) % STAGES, keys, values, table, start + KEYS, end);
            commit_copies();
        }
        u32 shares[TILES][2];
        int seen[2] = {bounds[0] - start, bounds[1] - start};
        float next_highest[2];
        share_rows(places, s.keys[stage], q, seen, tile.position + 1 - start, end - start, shares, next_highest);
        mix_rows(places, run, shares, next_highest, s.values[stage], end - start);
        if (segment == last || segment % RUN == RUN - 1) {
            merge_run(s, run, sum, highest, segment < RUN);
            clear(run);
        }
        if (STAGES == 1) {
            __syncthreads();
            if (segment < last) copy_segment(s, 0, keys, values, table, start + KEYS, end);
            commit_copies();
        }
    }
    store_rows(s, sum, tile, codes, scales);
}

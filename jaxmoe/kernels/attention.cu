// Attention over a paged bfloat16 cache: one token of many slots, or many tokens of one slot, with the same bits.
//
// Keys are cut at absolute positions into segments of 256. What a segment gives a row (highest score, sum of
// shares, mix of values) is computed by the same functions for both; segments are merged ascending.
// Scores: mma over H, 32 numbers at a time in the order of `score_keys`. Shares: exp2(score - highest of the 256),
// as bfloat16. Mix and sum: one chain of mma over ascending groups of 32 keys in the order of `mix_values`; groups
// with no key that any row sees are left out (they would add zeros).
// A norm of a head is one warp's: lane i has numbers i + 32 * j, fmaf over ascending j, then sum_of_lanes.
#include "common.cuh"

constexpr int N = NUM_HEADS, K = NUM_KV_HEADS, H = HEAD_DIM, G = N / K, P = TABLE_LENGTH;
constexpr int THREADS = 256, WARPS = 8;
constexpr int CHUNKS = H / 8;        // pieces of 16 bytes in a row of H bfloat16
constexpr int PARTS = H / 32;        // pieces of a key that one lane multiplies
constexpr int KEY_CHUNKS = 32;       // pieces of 16 bytes in a row of 256 shares
constexpr int QKV = (N + 2 * K) * H; // numbers a token brings
constexpr float SCALE = 1.4426950408889634 * (H == 64 ? 0.125 : 0.08838834764831845);
constexpr bool ONE_PAGE = PAGE_LENGTH >= 32;  // keys that a warp loads share a page
constexpr u32 ONES = 0x3f803f80u;
static_assert(H == 64 || H == 128, "heads of 64 or 128 numbers");
static_assert(N % K == 0 && G <= 16, "at most 16 query heads a key head");
static_assert(256 % PAGE_LENGTH == 0, "pages are cut from a segment without a rest");

// The thread's index, read again at every call: what follows from it would otherwise be kept in registers from one
// segment to the next.
#ifdef EMULATED
DEVICE int thread_again() { return threadIdx.x; }
#else
DEVICE int thread_again() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}
#endif

#define INFINITE __uint_as_float(0x7f800000u)

// Pieces of 16 bytes are mixed up inside a row, so that neither 8 rows of one column nor pairs of rows meet in
// the same banks.
DEVICE int row_mix(int row) { return (row & 1) << 2 | (row >> 1 & 3); }
DEVICE int key_mix(int key) { return (key & 1) | (key >> 3 & 3) << 1; }

// Where the token at `position` of a slot lies in a layer's pages, in tokens.
DEVICE int token_of(const int* table, int position) {
    return __ldg(table + position / PAGE_LENGTH) * PAGE_LENGTH + position % PAGE_LENGTH;
}
DEVICE u64 layer_start(int layer) { return (u64)layer * NUM_PAGES * PAGE_LENGTH * K * H; }
DEVICE u64 row_start(int token, int kv_head) { return ((u64)token * K + kv_head) * H; }

// A lane's numbers of one head: i, i + 32, ... of H, with their norm weights, and the angles of the pairs (i, i + H/2).
struct Head {
    float x[PARTS], norm[PARTS];
};
struct Angles {
    float cosines[PARTS / 2], sines[PARTS / 2];
};
DEVICE Head load_head(const float* x, const float* norm) {
    Head head;
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        int i = (threadIdx.x & 31) + 32 * j;
        head.x[j] = __ldg(x + i), head.norm[j] = __ldg(norm + i);
    }
    return head;
}
DEVICE Angles load_angles(const float* cosines, const float* sines, int position) {
    Angles angles;
#pragma unroll
    for (int j = 0; j < PARTS / 2; j++) {
        u64 i = (u64)position * (H / 2) + (threadIdx.x & 31) + 32 * j;
        angles.cosines[j] = __ldg(cosines + i), angles.sines[j] = __ldg(sines + i);
    }
    return angles;
}
DEVICE void norm_and_rotate(Head& head, const Angles& angles) {
    float(&x)[PARTS] = head.x;
    float sum = x[0] * x[0];
#pragma unroll
    for (int j = 1; j < PARTS; j++) sum = fmaf(x[j], x[j], sum);
    float r = __fdiv_rn(1.f, __fsqrt_rn(sum_of_lanes(sum) * (1.f / H) + EPS));
#pragma unroll
    for (int j = 0; j < PARTS; j++) x[j] = x[j] * r * head.norm[j];
#pragma unroll
    for (int j = 0; j < PARTS / 2; j++) {
        float first = x[j], second = x[j + PARTS / 2];
        x[j] = first * angles.cosines[j] - second * angles.sines[j];
        x[j + PARTS / 2] = second * angles.cosines[j] + first * angles.sines[j];
    }
}

DEVICE uint4 pack8(const float (&v)[8]) {
    return make_uint4(pack_bfloat16(v[0], v[1]), pack_bfloat16(v[2], v[3]), pack_bfloat16(v[4], v[5]),
                      pack_bfloat16(v[6], v[7]));
}

// Keys first .. of the segment, 8 a tile: lane l has of key 8 * n + l/4 the pieces 4 * j + l%4. Keys from `known` on
// are not read: zeros. `token` is where the first of a page's keys lies, if 32 keys share a page.
template <int TILES>
DEVICE void load_keys(uint4 (&keys)[TILES][PARTS], const u16* pages, const int* table, int token, int start, int known,
                      int kv_head, int first) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        int key = first + 8 * n + (lane >> 2);
#pragma unroll
        for (int j = 0; j < PARTS; j++) keys[n][j] = make_uint4(0, 0, 0, 0);
        if (key < known) {
            int at = ONE_PAGE ? token + key - first : token_of(table, start + key);
            const uint4* row = (const uint4*)(pages + row_start(at, kv_head)) + (lane & 3);
#pragma unroll
            for (int j = 0; j < PARTS; j++) keys[n][j] = row[4 * j];
        }
    }
}

// The segment's values into shared memory, in the background: those of tokens before `end`, then zeros up to a
// multiple of 32. `end` itself is left alone if it is a token's own, `OWN`.
template <bool OWN>
DEVICE void copy_values(u8* shared_values, const u16* pages, const int* table, int start, int end, int kv_head) {
    int thread = thread_again(), chunk = thread % CHUNKS, padded = (end + OWN - start + 31) & ~31;
    // many tokens have no registers left for more
    constexpr int AT_ONCE = OWN ? SEGMENT * CHUNKS / THREADS : 4;
#pragma unroll AT_ONCE
    for (int i = 0; i < SEGMENT * CHUNKS / THREADS; i++) {
        int key = i * (THREADS / CHUNKS) + thread / CHUNKS, position = start + key;
        if (key < padded && !(OWN && position == end)) {
            bool wanted = position < end;
            const u16* from = wanted ? pages + row_start(token_of(table, position), kv_head) + 8 * chunk : pages;
            copy_async(shared_values + (key * CHUNKS + (chunk ^ key_mix(key))) * 16, from, wanted);
        }
    }
    commit_copies();
}

// scores += queries * keys for tiles of 8 keys from FIRST on: lane l has keys 8 * n + 2 * (l%4) and the next, of
// rows l/4 and l/4 + 8 of each tile.
// Of each 32 numbers of H, the first mma takes 8 * i .. 8 * i + 3 (i < 4), the second the others.
template <int TILES, bool FULL, int FIRST, int KEY_TILES>
DEVICE void score_keys(float (&scores)[TILES][4][4], const uint4 (&keys)[KEY_TILES][PARTS], const u8* queries) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < PARTS; j++)
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            // queries of many tiles are not read ahead: registers
            if (TILES > 1) __syncwarp();
            int row = 16 * m + (lane >> 2), chunk = (4 * j + (lane & 3)) ^ row_mix(row);
            uint4 low = ((const uint4*)queries)[row * CHUNKS + chunk], high = make_uint4(0, 0, 0, 0);
            if (FULL) high = ((const uint4*)queries)[(row + 8) * CHUNKS + chunk];
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) {
                uint4 key = keys[n][j];
                mma_bfloat16(scores[m][FIRST + n], low.x, high.x, low.y, high.y, key.x, key.y);
                mma_bfloat16(scores[m][FIRST + n], low.z, high.z, low.w, high.w, key.z, key.w);
            }
        }
}

// Scale and mask this warp's scores, and the highest of each row: of row l/4 + 8 * h of tile m the keys below
// seen[m][h] count.
template <int TILES, bool FULL>
DEVICE void mask_scores(float (&scores)[TILES][4][4], const int (&seen)[TILES][2], float (&highest)[TILES][2]) {
    int thread = thread_again(), lane = thread & 31, warp = thread >> 5;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int h = 0; h < 1 + FULL; h++) {
            float found = -INFINITE;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; e++) {
                    int key = 32 * warp + 8 * n + 2 * (lane & 3) + (e & 1);
                    scores[m][n][e] = key < seen[m][h] ? scores[m][n][e] * SCALE : -INFINITE;
                    found = fmaxf(found, scores[m][n][e]);
                }
            found = fmaxf(found, __shfl_xor_sync(ALL_LANES, found, 1));
            highest[m][h] = fmaxf(found, __shfl_xor_sync(ALL_LANES, found, 2));
        }
}

DEVICE float highest_of(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }

// One row's shares of this warp's 32 keys into shared memory: half `h` of a tile's scores.
DEVICE void store_shares(const float (&scores)[4][4], int h, float highest, int row, u8* shares) {
    int thread = thread_again(), lane = thread & 31, warp = thread >> 5;
    // a row that sees nothing here
    if (highest == -INFINITE) highest = 0;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        float low = exp2_fast(scores[n][2 * h] - highest), high = exp2_fast(scores[n][2 * h + 1] - highest);
        int chunk = (4 * warp + n) ^ row_mix(row);
        ((u32*)shares)[(row * KEY_CHUNKS + chunk) * 4 + (lane & 3)] = pack_bfloat16(low, high);
    }
}

// mix += shares * values for rows 16 * first_tile .. of `shares` and COLUMNS * 8 numbers of H from piece
// `first_chunk`; sum += shares * 1 for tile `summed` of them. Of each 32 keys, the first mma takes 8 * i .. 8 * i + 3
// (i < 4) and the second the others: a lane's share of a row is then one piece of 16 bytes.
template <int TILES, bool FULL, int COLUMNS>
DEVICE void mix_values(float (&mix)[TILES][COLUMNS][4], float (&sum)[4], const u8* shares, const u8* values,
                       int first_tile, int first_chunk, int summed, int groups) {
    int lane = thread_again() & 31;
    int key = 4 * (lane & 6) + (lane & 1) + 2 * (lane >> 3 & 1), mixed = key_mix(key);
    for (int group = 0; group < groups; group++) {
        u32 b[2][COLUMNS][2];
        const u8* base = values + (32 * group + key) * CHUNKS * 16;
        if (COLUMNS == 1) {
            u32 r[4];
            load_transposed(r, base + (4 * (lane >> 4)) * CHUNKS * 16 + ((first_chunk ^ mixed) * 16));
            b[0][0][0] = r[0], b[0][0][1] = r[1], b[1][0][0] = r[2], b[1][0][1] = r[3];
        } else {
#pragma unroll
            for (int step = 0; step < 2; step++)
#pragma unroll
                for (int n = 0; n + 1 < COLUMNS; n += 2) {
                    u32 r[4];
                    int chunk = (first_chunk + n + (lane >> 4)) ^ mixed;
                    load_transposed(r, base + 4 * step * CHUNKS * 16 + chunk * 16);
                    b[step][n][0] = r[0], b[step][n][1] = r[1], b[step][n + 1][0] = r[2], b[step][n + 1][1] = r[3];
                }
        }
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            int row = 16 * (first_tile + m) + (lane >> 2), chunk = (4 * group + (lane & 3)) ^ row_mix(row);
            uint4 low = ((const uint4*)shares)[row * KEY_CHUNKS + chunk], high = make_uint4(0, 0, 0, 0);
            if (FULL) high = ((const uint4*)shares)[(row + 8) * KEY_CHUNKS + chunk];
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                mma_bfloat16(mix[m][n], low.x, high.x, low.y, high.y, b[0][n][0], b[0][n][1]);
                mma_bfloat16(mix[m][n], low.z, high.z, low.w, high.w, b[1][n][0], b[1][n][1]);
            }
            if (m == summed) {
                mma_bfloat16(sum, low.x, high.x, low.y, high.y, ONES, ONES);
                mma_bfloat16(sum, low.z, high.z, low.w, high.w, ONES, ONES);
            }
        }
    }
}

// Take a segment's highest score into the running one: its sums count `b`, those before it `a`.
DEVICE void weigh(float& highest, float next, float& a, float& b) {
    float both = fmaxf(highest, next);
    a = exp2_fast(highest - both), b = exp2_fast(next - both);
    highest = both;
}

// ---------------------------------------------------------------------------------------------------- one token

constexpr bool WIDE = G > 8;  // rows 8..15 of the tile are in use
constexpr int ROW_FLOATS = H + 4;  // a head's part of a segment: the mix, the highest score, the sum
constexpr int PART_FLOATS = G * ROW_FLOATS;
constexpr int ITEMS = G * H / 8;  // threads that merge and round, 8 numbers each
constexpr int VALUES_SIZE = SEGMENT * H * 2;
constexpr int FITTING = VALUES_SIZE / (PART_FLOATS * 4);
constexpr int RING = FITTING < 15 ? FITTING : 15;  // segments on their way while others are merged
constexpr int ROUNDS = G / WARPS + 1;    // heads that a warp prepares
constexpr int NUM_COLUMNS = H / 64;  // tiles of 8 numbers of H that a warp mixes

struct DecodeShared {
    u8 values[VALUES_SIZE];
    u8 shares[(WIDE ? 16 : 8) * SEGMENT * 2];
    u8 queries[(WIDE ? 16 : 8) * H * 2];
    u8 fresh[2 * H * 2];  // the token's own key and value
    float maxima[WIDE ? 16 : 8][WARPS];
    int is_last;
};

struct Token {
    int row, kv_head, position;
    const int* table;
};

// What a warp brings of the token: heads warp and warp + 8 of the queries of this key head, the key after them.
struct Incoming {
    Head heads[ROUNDS];
};

DEVICE Incoming load_token(const float* qkv, const float* q_norm, const float* k_norm, int row, int kv_head,
                           int layer) {
    Incoming in;
    const float* from = qkv + (u64)row * QKV;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int head = min(WARPS * round + ((int)threadIdx.x >> 5), G);
        in.heads[round] = load_head(from + (head < G ? kv_head * G + head : N + kv_head) * H,
                                    (head < G ? q_norm : k_norm) + layer * H);
    }
    return in;
}

// Queries of this key head, and the token's own key and value where it is `owner`, to shared memory.
DEVICE void prepare_token(DecodeShared& s, Incoming& in, const Angles& angles, bool owner, const float* value) {
    int lane = threadIdx.x & 31, own_chunk = owner ? (int)threadIdx.x - (THREADS - CHUNKS) : -1;
    float v[8];
    if (own_chunk >= 0) load8(v, value + 8 * own_chunk);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int head = WARPS * round + ((int)threadIdx.x >> 5);
        if (head > G || (head == G && !owner)) continue;
        norm_and_rotate(in.heads[round], angles);
        u16* row = (u16*)(head < G ? s.queries + head * H * 2 : s.fresh);
#pragma unroll
        for (int j = 0; j < PARTS; j++) {
            int i = lane + 32 * j, chunk = head < G ? (i >> 3) ^ row_mix(head) : i >> 3;
            row[chunk * 8 + (i & 7)] = float_to_bfloat16(in.heads[round].x[j]);
        }
    }
    if (own_chunk >= 0) ((uint4*)s.fresh)[CHUNKS + own_chunk] = pack8(v);
}

// The token's key and value from shared memory to their page.
DEVICE void store_token(const DecodeShared& s, const Token& token, u16* keys, u16* values) {
    int chunk = threadIdx.x;
    if (chunk >= 2 * CHUNKS) return;
    u16* pages = chunk < CHUNKS ? keys : values;
    u64 start = row_start(token_of(token.table, token.position), token.kv_head);
    ((uint4*)(pages + start))[chunk % CHUNKS] = ((const uint4*)s.fresh)[chunk];
}

// The token's own key into the registers of the lanes that hold it, its value into shared memory: place `known` of
// the segment.
DEVICE void insert_token(DecodeShared& s, uint4 (&keys)[4][PARTS], int known) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunk = threadIdx.x;
    if (known >> 5 == warp) {
#pragma unroll
        for (int n = 0; n < 4; n++)
            if (32 * warp + 8 * n + (lane >> 2) == known)
#pragma unroll
                for (int j = 0; j < PARTS; j++) keys[n][j] = ((const uint4*)s.fresh)[4 * j + (lane & 3)];
    }
    if (chunk < CHUNKS)
        ((uint4*)s.values)[known * CHUNKS + (chunk ^ key_mix(known))] = ((const uint4*)s.fresh)[CHUNKS + chunk];
}

// Shares of the segment's first `seen` keys into shared memory, for G rows.
DEVICE void share_segment(DecodeShared& s, const uint4 (&keys)[4][PARTS], int seen, float (&highest)[1][2]) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float scores[1][4][4] = {};
    int bounds[1][2] = {{seen, seen}};
    if (32 * warp < seen) score_keys<1, WIDE, 0, 4>(scores, keys, s.queries);
    mask_scores<1, WIDE>(scores, bounds, highest);
#pragma unroll
    for (int h = 0; h < 1 + WIDE; h++)
        if ((lane & 3) == 0) s.maxima[8 * h + (lane >> 2)][warp] = highest[0][h];
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 1 + WIDE; h++) {
        const float4* of = (const float4*)s.maxima[8 * h + (lane >> 2)];
        highest[0][h] = fmaxf(highest_of(of[0]), highest_of(of[1]));
        if (32 * warp < seen) store_shares(scores[0], h, highest[0][h], 8 * h + (lane >> 2), s.shares);
    }
}

// What a segment gave, as [G, ROW_FLOATS].
DEVICE void store_part(float* part, const float (&mix)[1][NUM_COLUMNS][4], const float (&sum)[4],
                       const float (&highest)[1][2]) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int h = 0; h < 1 + WIDE; h++) {
        int head = 8 * h + (lane >> 2);
        if (head >= G) continue;
        float* row = part + head * ROW_FLOATS;
#pragma unroll
        for (int n = 0; n < NUM_COLUMNS; n++)
            *(float2*)(row + 8 * (NUM_COLUMNS * warp + n) + 2 * (lane & 3)) =
                make_float2(mix[0][n][2 * h], mix[0][n][2 * h + 1]);
        if (warp == 0 && (lane & 3) == 0) *(float2*)(row + H) = make_float2(highest[0][h], sum[2 * h]);
    }
}

// Divide by the sum, round and write 8 numbers of each of the first ITEMS threads.
DEVICE void store_codes(const Token& token, float (&v)[8], float sum, i8* codes, float* scales) {
    int item = threadIdx.x, total;
    float scale;
    uint2 rounded;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fdiv_rn(v[i], sum);
    quantise(v, rounded, scale, total);
    if (item >= ITEMS) return;
    u64 first = ((u64)token.row * N + token.kv_head * G) * H + 8 * item;
    *(uint2*)(codes + first) = rounded;
    if (item % 4 == 0) *(float2*)(scales + first / GROUP * 2) = make_float2(scale, scale * (float)total);
}

// Merge the parts of all segments, ascending: they come through shared memory, RING of them under way.
DEVICE void merge_parts(DecodeShared& s, const float* parts, int num_segments, float (&mix)[8], float& sum) {
    int item = threadIdx.x, head = item / CHUNKS, chunk = item % CHUNKS;
    float* ring = (float*)s.values;
    float highest = -INFINITE;
    auto request = [&](int segment) {
        if (segment < num_segments && item < ITEMS) {
            const float* from = parts + (u64)segment * PART_FLOATS + head * ROW_FLOATS;
            float* to = ring + segment % RING * PART_FLOATS + head * ROW_FLOATS;
            copy_async(to + 8 * chunk, from + 8 * chunk);
            copy_async(to + 8 * chunk + 4, from + 8 * chunk + 4);
            if (chunk == 0) copy_async(to + H, from + H);
        }
        commit_copies();
    };
    for (int i = 0; i < RING - 1; i++) request(i);
    for (int segment = 0; segment < num_segments; segment++) {
        wait_copies<RING - 2>();
        // what lane `chunk == 0` copied is read by its neighbours, and the place of the last segment is free
        __syncwarp();
        request(segment + RING - 1);
        if (item < ITEMS) {
            const float* part = ring + segment % RING * PART_FLOATS + head * ROW_FLOATS;
            float next[8], a, b;
            load8(next, part + 8 * chunk);
            weigh(highest, part[H], a, b);
            sum = fmaf(part[H + 1], b, sum * a);
#pragma unroll
            for (int i = 0; i < 8; i++) mix[i] = fmaf(next[i], b, mix[i] * a);
        }
    }
}

// Whether all other blocks of this token and key head have stored their parts; the counter is left at zero.
DEVICE bool is_last_block(DecodeShared& s, int* counter, int num_blocks) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        s.is_last = atomicAdd(counter, 1) == num_blocks - 1;
        if (s.is_last) *counter = 0;
    }
    __syncthreads();
    return s.is_last;
}

// Merge, unless the token has one segment, which shared memory then holds; round and write. For the last block.
DEVICE void finish_token(DecodeShared& s, const Token& token, const float* parts, int* counter, i8* codes,
                         float* scales) {
    int num_segments = token.position / SEGMENT + 1, item = threadIdx.x;
    bool alone = num_segments == 1;
    if (alone) __syncthreads();
    if (!alone && !is_last_block(s, counter, min(num_segments, (int)gridDim.y))) return;
    if (item >= (ITEMS + 31) / 32 * 32) return;
    float mix[8] = {}, sum = 0;
    if (alone) {
        const float* part = (const float*)s.values + min(item, ITEMS - 1) / CHUNKS * ROW_FLOATS;
        load8(mix, part + 8 * (item % CHUNKS));
        sum = part[H + 1];
    } else {
        merge_parts(s, parts, num_segments, mix, sum);
    }
    store_codes(token, mix, sum, codes, scales);
}

// The segments s, s + gridDim.y, ... of one token of a slot, its row of `active` being blockIdx.z. The block that has
// the last segment stores the token's key and value; the last block to finish merges.
KERNEL(THREADS, 2)
attend_decode(const float* qkv, const float* q_norm, const float* k_norm, const float* cosines, const float* sines,
              const int* active, const int* positions, const int* tables, const int* count, const u16*, const u16*,
              const int*, i8* codes, float* scales, u16* keys, u16* values, int* counters, float* parts) {
    extern __shared__ __align__(16) u8 shared[];
    DecodeShared& s = *(DecodeShared*)shared;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, kv_head = blockIdx.x, segment = blockIdx.y, row = blockIdx.z;
    int layer = launch_number<SHARED_SIZE>(), num_rows = __ldg(count), slot = __ldg(active + row);
    // all slots' numbers at once, if they are few: the slot is still on its way
    constexpr bool FEW = NUM_SLOTS <= 32;
    int some_slot = min(lane, NUM_SLOTS - 1), page = (SEGMENT * segment + 32 * warp) / PAGE_LENGTH;
    int position = FEW ? __ldg(positions + some_slot) : 0;
    int first_page = FEW && ONE_PAGE ? __ldg(tables + some_slot * P + page) : 0;
    Incoming in = load_token(qkv, q_norm, k_norm, row, kv_head, layer);
    const int* table = tables + slot * P;
    position = FEW ? __shfl_sync(ALL_LANES, position, slot) : __ldg(positions + slot);
    int last = position / SEGMENT;
    if (row >= num_rows || segment > last) return;
    if (ONE_PAGE) first_page = FEW ? __shfl_sync(ALL_LANES, first_page, slot) : __ldg(table + page);

    Token token = {row, kv_head, position, table};
    keys += layer_start(layer), values += layer_start(layer);
    bool owner = last % (int)gridDim.y == segment;
    Angles angles = load_angles(cosines, sines, position);
    uint4 key[4][PARTS];
    load_keys<4>(key, keys, table, first_page * PAGE_LENGTH + 32 * warp % PAGE_LENGTH, SEGMENT * segment,
                 position - SEGMENT * segment, kv_head, 32 * warp);
    copy_values<true>(s.values, values, table, SEGMENT * segment, position, kv_head);
    prepare_token(s, in, angles, owner, qkv + (u64)row * QKV + (N + K + kv_head) * H);
    __syncthreads();
    if (owner) store_token(s, token, keys, values);
    parts += ((u64)row * K + kv_head) * NUM_SEGMENTS * PART_FLOATS;
    for (int next; segment <= last; segment = next) {
        next = segment + gridDim.y;
        int known = position - SEGMENT * segment, seen = min(known + 1, SEGMENT);
        if (known < SEGMENT) insert_token(s, key, known);
        float mix[1][NUM_COLUMNS][4] = {}, sum[4] = {}, highest[1][2];
        share_segment(s, key, seen, highest);
        if (next <= last) {
            int at = ONE_PAGE ? token_of(table, SEGMENT * next + 32 * warp) : 0;
            load_keys<4>(key, keys, table, at, SEGMENT * next, position - SEGMENT * next, kv_head, 32 * warp);
        }
        wait_copies<0>();
        __syncthreads();
        mix_values<1, WIDE, NUM_COLUMNS>(mix, sum, s.shares, s.values, 0, warp * NUM_COLUMNS, 0, (seen + 31) / 32);
        if (last > 0) store_part(parts + (u64)segment * PART_FLOATS, mix, sum, highest);
        __syncthreads();
        if (next <= last) copy_values<true>(s.values, values, table, SEGMENT * next, position, kv_head);
        if (last == 0) store_part((float*)s.values, mix, sum, highest);
    }

    finish_token(s, token, parts, counters + row * K + kv_head, codes, scales);
}

// ------------------------------------------------------------------------------------------------- many tokens

// Queries and keys of one token: norm, RoPE and bfloat16; keys and values to their page.
KERNEL(THREADS, 2)
prepare(const float* qkv, const float* q_norm, const float* k_norm, const float* cosines, const float* sines,
        const int* where, const int* tables, const u16*, const u16*, u16* queries, u16* keys, u16* values) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.x, layer = launch_number<SHARED_SIZE>();
    if (row >= __ldg(where + 2)) return;
    int position = __ldg(where + 1) + row, token = token_of(tables + __ldg(where) * P, position);
    Angles angles = load_angles(cosines, sines, position);
    const float* from = qkv + (u64)row * QKV;
    keys += layer_start(layer) + row_start(token, 0), values += layer_start(layer) + row_start(token, 0);
#pragma unroll 2
    for (int head = warp; head < N + K; head += WARPS) {
        Head h = load_head(from + head * H, (head < N ? q_norm : k_norm) + layer * H);
        norm_and_rotate(h, angles);
        u16* to = head < N ? queries + ((u64)row * N + head) * H : keys + (head - N) * H;
#pragma unroll
        for (int j = 0; j < PARTS; j++) to[lane + 32 * j] = float_to_bfloat16(h.x[j]);
    }
    for (int chunk = threadIdx.x; chunk < K * CHUNKS; chunk += THREADS) {
        float v[8];
        load8(v, from + (N + K) * H + 8 * chunk);
        ((uint4*)values)[chunk] = pack8(v);
    }
}

constexpr int ROWS = QUERY_ROWS, TOKENS = ROWS / G;  // a block's queries: all heads of a key head, of so many tokens
constexpr int TILES = ROWS / 16;
constexpr int MIX_TILES = TILES * PARTS / WARPS;  // tiles of 16 rows that a warp mixes, 32 numbers of H each
static_assert(MIX_TILES > 0, "too few rows");

// With 113 KB two blocks fit into the 228 KB of a Hopper SM, and the 1 KB that each takes besides. Registers for two
// are just too few.
#ifndef PREFILL_BLOCKS
#define PREFILL_BLOCKS 1
#endif
struct PrefillShared {
    u8 values[VALUES_SIZE];
    u8 shares[ROWS * SEGMENT * 2];  // while scores are computed: the mix so far, which would not fit into registers
    u8 queries[ROWS * H * 2];
    float maxima[ROWS][WARPS / 2];  // at the end the sums
};
static_assert(ROWS * SEGMENT * 2 >= MIX_TILES * 16 * 4 * THREADS, "the mix fits where the shares go");

struct Tile {
    int position, num_tokens;
};
// Which part a warp mixes: rows from tile `first_tile`, 32 numbers of H from `column`; tile `summed` is summed too.
struct Part {
    int first_tile, column, summed;
};
DEVICE Part part_of(int thread) {
    int warp = thread >> 5, column = warp % PARTS;
    return {warp / PARTS * MIX_TILES, column, column < MIX_TILES ? column : -1};
}
DEVICE int first_token() { return (gridDim.y - 1 - blockIdx.y) * TOKENS; }

DEVICE void copy_queries(u8* shared_queries, const u16* queries, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int piece = i * THREADS + threadIdx.x, row = piece / CHUNKS, chunk = piece % CHUNKS, token = row / G;
        bool wanted = token < tile.num_tokens;
        u64 start = ((u64)(first_token() + token) * N + (int)blockIdx.x * G + row % G) * H + 8 * chunk;
        const u16* from = wanted ? queries + start : queries;
        copy_async(shared_queries + (row * CHUNKS + (chunk ^ row_mix(row))) * 16, from, wanted);
    }
    commit_copies();
}

// Scores of 64 rows and the warp's 32 keys of a segment; the keys from `end` on are not read.
DEVICE void score_rows(PrefillShared& s, const u16* pages, const int* table, int start, int end, int kv_head,
                       float (&scores)[TILES][4][4]) {
    int first = 32 * (threadIdx.x >> 5), known = end - start;
    if (first >= known) return;
    int token = ONE_PAGE ? token_of(table, start + first) : 0;
    uint4 keys[2][PARTS];
    load_keys<2>(keys, pages, table, token, start, known, kv_head, first);
    score_keys<TILES, true, 0, 2>(scores, keys, s.queries);
    load_keys<2>(keys, pages, table, token + 16, start, known, kv_head, first + 16);
    score_keys<TILES, true, 2, 2>(scores, keys, s.queries);
}

// The highest score of each row, of all warps; maxima come from the upper warps after those of the lower ones.
DEVICE void share_maxima(PrefillShared& s, float (&highest)[TILES][2], bool lower) {
    int thread = thread_again(), lane = thread & 31, warp = thread >> 5;
    if ((warp < WARPS / 2) != lower || (lane & 3) != 0) return;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float& place = s.maxima[16 * m + 8 * h + (lane >> 2)][warp % (WARPS / 2)];
            place = lower ? highest[m][h] : fmaxf(place, highest[m][h]);
        }
}

DEVICE void put_away(PrefillShared& s, const float (&mix)[MIX_TILES][4][4]) {
#pragma unroll
    for (int i = 0; i < MIX_TILES * 4; i++)
        ((float4*)s.shares)[i * THREADS + threadIdx.x] =
            make_float4(mix[i / 4][i % 4][0], mix[i / 4][i % 4][1], mix[i / 4][i % 4][2], mix[i / 4][i % 4][3]);
}
DEVICE void take_back(const PrefillShared& s, float (&mix)[MIX_TILES][4][4]) {
#pragma unroll
    for (int i = 0; i < MIX_TILES * 4; i++) {
        float4 v = ((const float4*)s.shares)[i * THREADS + threadIdx.x];
        float(&to)[4] = mix[i / 4][i % 4];
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
}

// Shares of 64 rows and a segment's keys into shared memory, beside the highest scores. Row r sees the keys up to
// its own token's, position + r / G; rows past the tile's tokens see none.
DEVICE void share_rows(PrefillShared& s, const u16* pages, const int* table, int start, const Tile& tile,
                       float (&mix)[MIX_TILES][4][4]) {
    int thread = thread_again(), lane = thread & 31, warp = thread >> 5, end = tile.position + tile.num_tokens;
    int seen[TILES][2];
    float scores[TILES][4][4] = {}, top[TILES][2];
    put_away(s, mix);
    score_rows(s, pages, table, start, end, (int)blockIdx.x, scores);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int token = (16 * m + 8 * h + (lane >> 2)) / G;
            seen[m][h] = token < tile.num_tokens ? tile.position + token - start + 1 : 0;
        }
    mask_scores<TILES, true>(scores, seen, top);
    share_maxima(s, top, true);
    __syncthreads();
    share_maxima(s, top, false);
    take_back(s, mix);
    __syncthreads();
    if (start + 32 * warp >= end) return;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = 16 * m + 8 * h + (lane >> 2);
            store_shares(scores[m], h, highest_of(*(const float4*)s.maxima[row]), row, s.shares);
        }
}

// The rows of a warp's tiles, of which four neighbouring lanes mix the same, are divided up among those lanes: each
// keeps the highest score of one row, and the sum of one.
struct Running {
    float highest, sum;
};

// Merge a segment into the running mix and sums.
DEVICE void merge_segment(float (&mix)[MIX_TILES][4][4], Running& running, const float (&next_mix)[MIX_TILES][4][4],
                          const float (&next_sum)[4], int summed, const PrefillShared& s, int first_tile) {
    int lane = thread_again() & 31, own = lane % (2 * MIX_TILES);
    int row = 16 * first_tile + 8 * own + (lane >> 2);
    float a, b;
    weigh(running.highest, highest_of(*(const float4*)s.maxima[row]), a, b);
    int from = (lane & ~3) + 2 * max(summed, 0) + (lane & 1);
    float sum_a = __shfl_sync(ALL_LANES, a, from), sum_b = __shfl_sync(ALL_LANES, b, from);
    running.sum = fmaf(lane & 1 ? next_sum[2] : next_sum[0], sum_b, running.sum * sum_a);
#pragma unroll
    for (int m = 0; m < MIX_TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float row_a = __shfl_sync(ALL_LANES, a, (lane & ~3) + 2 * m + h);
            float row_b = __shfl_sync(ALL_LANES, b, (lane & ~3) + 2 * m + h);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; e++)
                    mix[m][n][e] = fmaf(next_mix[m][n][e], row_b, mix[m][n][e] * row_a);
        }
}

// Divide by the sums, round and write: a warp has 32 numbers of H, four neighbouring lanes those of a row.
DEVICE void store_rows(const float (&mix)[MIX_TILES][4][4], const float* sums, const Tile& tile, i8* codes,
                       float* scales) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int m = 0; m < MIX_TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = 16 * (warp / PARTS * MIX_TILES + m) + 8 * h + (lane >> 2), token = row / G, total;
            float v[8], sum = sums[row], scale;
            uint2 rounded;
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = __fdiv_rn(mix[m][i >> 1][2 * h + (i & 1)], sum);
            quantise(v, rounded, scale, total);
            if (token >= tile.num_tokens) continue;
            u64 first = ((u64)(first_token() + token) * N + (int)blockIdx.x * G + row % G) * H + 32 * (warp % PARTS);
            u16* to = (u16*)(codes + first) + (lane & 3);
            to[0] = rounded.x & 0xffff, to[4] = rounded.x >> 16, to[8] = rounded.y & 0xffff, to[12] = rounded.y >> 16;
            if ((lane & 3) == 0) *(float2*)(scales + first / GROUP * 2) = make_float2(scale, scale * (float)total);
        }
}

// Attention of the tokens of one tile; those with most segments start first.
KERNEL(THREADS, PREFILL_BLOCKS)
attend_prefill(const u16* queries, const int* where, const int* tables, const u16* keys, const u16* values, i8* codes,
               float* scales) {
    extern __shared__ __align__(16) u8 shared[];
    PrefillShared& s = *(PrefillShared*)shared;
    int lane = threadIdx.x & 31;
    int first = first_token(), count = __ldg(where + 2);
    if (first >= count) return;
    Tile tile = {__ldg(where + 1) + first, min(TOKENS, count - first)};
    const int* table = tables + __ldg(where) * P;
    copy_queries(s.queries, queries, tile);
    wait_copies<0>();
    __syncthreads();

    float mix[MIX_TILES][4][4] = {};
    Running running = {-INFINITE, 0.f};
    // the warps of the first columns keep the sums, of one tile each
    int last = tile.position + tile.num_tokens - 1;
    for (int start = 0; start <= last; start += SEGMENT) {
        int groups = (min(last - start + 1, SEGMENT) + 31) / 32;
        copy_values<false>(s.values, values + layer_start(launch_number<SHARED_SIZE>()), table, start, last + 1,
                           blockIdx.x);
        share_rows(s, keys + layer_start(launch_number<SHARED_SIZE>()), table, start, tile, mix);
        wait_copies<0>();
        __syncthreads();
        Part part = part_of(thread_again());
        float next_mix[MIX_TILES][4][4] = {}, next_sum[4] = {};
        mix_values<MIX_TILES, true, 4>(next_mix, next_sum, s.shares, s.values, part.first_tile, 4 * part.column,
                                       part.summed, groups);
        merge_segment(mix, running, next_mix, next_sum, part.summed, s, part.first_tile);
        __syncthreads();
    }
    Part part = part_of(threadIdx.x);
    float* sums = s.maxima[0];
    int row = 16 * (part.first_tile + part.summed) + 8 * (lane & 1) + (lane >> 2);
    if (part.summed >= 0 && (lane & 3) < 2) sums[row] = running.sum;
    __syncthreads();
    store_rows(mix, sums, tile, codes, scales);
}

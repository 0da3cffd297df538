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
#include "attend.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int FEW_SEGMENTS = 32;     // of a token, to be merged one by one though a block has more than one
constexpr int QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * H; // numbers a token brings
static_assert(WARPS == ATTENDING, "all warps attend");

// ---------------------------------------------------------------------------------------------------- one token

constexpr int ITEMS = G * H / 4;  // 4 numbers of a head, which a thread merges and rounds
constexpr int PART_SIZE = PART_FLOATS * 4, MERGED = BUFFERS * KEYS * ROW / (RUN * PART_SIZE);  // fours on their way
static_assert(MERGED > 0, "four parts fit where the keys and values were");

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
        if (row >= KEY) from = qkv + (NUM_HEADS + (row - KEY) * NUM_KV_HEADS + token.kv_head) * H;
        if (row == Q_NORM) from = q_norm;
        if (row == K_NORM) from = k_norm;
        if (row == ANGLES) from = piece < H / 8 ? cosines + angles : sines + angles - H / 2;
        if (row <= ANGLES && lane == piece) copy_async(s.incoming[row] + 4 * piece, from + 4 * piece);
    }
    commit_copies();
}

// Queries of this key head, and, for the owner, the token's own key and value, to shared memory.
DEVICE void prepare_token(DecodeShared& s, bool is_owner) {
    int i = PAIRS * (threadIdx.x & 31);
    Angles angles = {load_shared(s.incoming[ANGLES] + i), load_shared(s.incoming[ANGLES] + H / 2 + i)};
#pragma unroll 1
    for (int head = threadIdx.x >> 5; head < (is_owner ? G + 2 : G); head += WARPS) {
        Head h = load_head_shared(s.incoming[head]);
        if (head < VALUE) norm_and_rotate(h, load_head_shared(s.incoming[head < G ? Q_NORM : K_NORM]), angles);
        put_head(s, head, h);
    }
}

// As [G, ROW_FLOATS].
DEVICE void store_part(float* part, const Running& run) {
    put_rows(run, [&](int place, float a, float b) { *(float2*)(part + place) = make_float2(a, b); });
}

// Where a thread's 4 numbers of a part lie, and the highest score and the sum of their head.
DEVICE int place_of_mix(int item) { return (item / (H / 4) * ROW_FLOATS + item % (H / 4) * 4) * 4; }
DEVICE int place_of_rest(int item) { return (item / (H / 4) * ROW_FLOATS + H) * 4; }
DEVICE Mixed load_part(const u8* part, int item) {
    float2 rest = *(const float2*)(part + place_of_rest(item));
    return {*(const float4*)(part + place_of_mix(item)), rest.x, rest.y};
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
    u64 first = ((u64)token.row * NUM_HEADS + token.kv_head * G) * H + 4 * item;
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
// 1 << shift segments. An idle block's `first` is its `end`. `page` and `next_page` are where the warp's keys of the first
// two segments lie, so that no block waits for the table before it has scores; `own_page` is the token's. `more`: the block
// also has what is planned DECODE_BLOCKS later.
struct alignas(16) Plan {
    int row, slot, position, first, end, blocks, shift, page, next_page, own_page, more, unused;
};

DEVICE Plan load_plan(const Plan* plan) {
    int4 a = __ldg((const int4*)plan), b = __ldg((const int4*)plan + 1);
    int4 c = __ldg((const int4*)plan + 2);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
}

// The nth block's share of a row, in parts of `length` segments.
DEVICE Plan share_of(int row, int slot, int position, int nth, int blocks, int length) {
    int segments = position / KEYS + 1, parts = (segments + length - 1) / length;
    int shift = length == 1 && blocks > 1 ? 0 : 2;
    int first = nth * parts / blocks * length, end = min((nth + 1) * parts / blocks * length, segments);
    return {row, slot, position, first, end, blocks, shift};
}

// Of the lanes before this one and its own.
DEVICE int sum_of_lanes_to_this(int number) {
#pragma unroll 1
    for (int offset = 1; offset < 32; offset *= 2) {
        int before = __shfl_up_sync(ALL_LANES, number, offset);
        number += (threadIdx.x & 31) >= offset ? before : 0;
    }
    return number;
}

// All rows' parts are shared out evenly among DECODE_BLOCKS blocks; a share is of one row, so that there are up to one more
// for each row, which the first blocks have as their second. A part is a run, or a segment: then there are more blocks for
// few segments, and more to merge.
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
    bool single = segments <= DECODE_BLOCKS || (segments <= MOST_SEGMENTS && most <= FEW_SEGMENTS);
    int length = single ? 1 : RUN, share = ((single ? segments : runs) + DECODE_BLOCKS - 1) / DECODE_BLOCKS;
    Plan plan = {};
    int before = 0;  // blocks of the rows before these
#pragma unroll 1
    for (int first = 0; first < num_rows; first += 32) {
        int row = min(first + lane, num_rows - 1), slot = __ldg(active + row), position = __ldg(positions + slot);
        int own = position / KEYS + 1, parts = (own + length - 1) / length;
        // a run and a bit are not worth a second block
        int blocks = !single && own <= RUN * share + 1 ? 1 : (parts + share - 1) / share;
        int end = before + sum_of_lanes_to_this(first + lane < num_rows ? blocks : 0);
        u32 later = __ballot_sync(ALL_LANES, end > nth);
        int from = later ? __ffs(later) - 1 : 31, mine = nth - end + blocks;
        auto of = [&](int number) { return __shfl_sync(ALL_LANES, number, from); };
        Plan here = share_of(of(row), of(slot), of(position), of(mine), of(blocks), length);
        if (later && nth >= before) plan = here;
        before = __shfl_sync(ALL_LANES, end, 31);
    }
    plan.more = nth + DECODE_BLOCKS < before;
    if (lane >= WARPS) return;
    tables += plan.slot * TABLE_LENGTH;
    auto page_at = [&](int position) { return __ldg(tables + min(position / PAGE_LENGTH, TABLE_LENGTH - 1)); };
    int start = KEYS * plan.first + KEYS / WARPS * lane;
    plan.page = page_at(start), plan.next_page = page_at(start + KEYS), plan.own_page = page_at(plan.position);
    plans[WARPS * blockIdx.x + lane] = plan;
}

// A token's only block has all parts merged, otherwise the last of its blocks to finish merges them.
DEVICE void finish_token(DecodeShared& s, const Token& token, const Plan& plan, const Running& all, const float* parts,
                         int* counters, i8* codes, float* scales) {
    if (plan.blocks == 1) {
        __syncthreads();
        store_part((float*)s.buffers, all);
        __syncthreads();
    } else if (!is_last_block(s, counters + token.row * NUM_KV_HEADS + token.kv_head, plan.blocks)) {
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

// A block's segments, the first of which is on its way: what they give of a token that has but this block, otherwise they
// leave their parts.
DEVICE Running attend_segments(DecodeShared& s, const Token& token, const Plan& plan, u16* keys, u16* values,
                               float* parts) {
    int segment = plan.first, place = 0, next_page = plan.next_page;
    Running run = no_segment(), all = no_segment();
#pragma unroll 1
    while (segment < plan.end) {
        int known = token.position - KEYS * segment, next_place = around(place + 2);
        u8 *own_keys = s.buffers[place], *own_values = s.buffers[around(place + 1)];
        wait_copies<1>();
        insert_token(own_keys, keys, s.fresh, token, known, plan.own_page);
        float scores[2][4] = {};
        score_segment(s, own_keys, min(known + 1, KEYS), scores);
        __syncthreads();
        // this warp has its scores, and all have mixed the values before
        if (BUFFERS == 3) {
            copy_segment(s, token, keys, values, segment + 1, plan.end, next_place, next_page);
            next_page = page_of(token, segment + 2);
        }
        Running next = {};
        share_segment(s, scores, next.highest);
        wait_copies<2 * (BUFFERS - 2)>();
        insert_token(own_values, values, s.fresh + ROW, token, known, plan.own_page);
        __syncthreads();
        mix_segment(s, own_values, next);
        merge_rows(run, next);
        segment++, place = next_place;
        if (BUFFERS == 2) {
            __syncthreads();
            copy_segment(s, token, keys, values, segment, plan.end, place, next_page);
            next_page = page_of(token, segment + 1);
        }
        if ((segment & ((1 << plan.shift) - 1)) > 0 && segment < plan.end) continue;
        if (plan.blocks == 1)
            merge_rows(all, run);
        else
            store_part(parts + (u64)(u32)((segment - 1) >> plan.shift) * PART_FLOATS, run);
        run = no_segment();
    }
    return all;
}

// A block's segments of one token, and of more where there are more shares of tokens than blocks. The block that has the last
// one stores the token's key and value in their page.
KERNEL(THREADS, 2)
attend_decode(const float* qkv, const float* q_norm, const float* k_norm, const float* cosines, const float* sines,
              const Plan* plans, const int* tables, const u16*, const u16*, const int*, i8* codes, float* scales,
              u16* keys, u16* values, int* counters, float* parts) {
    extern __shared__ __align__(16) u8 shared[];
    DecodeShared& s = *(DecodeShared*)shared;
    int layer = launch_number<SHARED_SIZE>(), kv_head = blockIdx.x;
    plans += WARPS * blockIdx.y + (threadIdx.x >> 5);
    Plan plan = load_plan(plans);
    if (plan.first >= plan.end) return;
    keys += layer_start(layer), values += layer_start(layer), q_norm += layer * H, k_norm += layer * H;
#pragma unroll 1
    while (true) {
        Token token = {plan.row, kv_head, plan.position, tables + plan.slot * TABLE_LENGTH};
        float* own_parts = parts + ((u64)token.row * NUM_KV_HEADS + kv_head) * NUM_SEGMENTS * PART_FLOATS;
        copy_token(s, token, qkv, q_norm, k_norm, cosines, sines);
        copy_segment(s, token, keys, values, plan.first, plan.end, 0, plan.page);
        wait_copies<2>();
        __syncthreads();
        prepare_token(s, KEYS * plan.end > token.position);
        __syncthreads();
        Running all = attend_segments(s, token, plan, keys, values, own_parts);
        finish_token(s, token, plan, all, own_parts, counters, codes, scales);
        if (!plan.more) return;
        plans += WARPS * DECODE_BLOCKS;
        plan = load_plan(plans);
        __syncthreads();
    }
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
    int position = __ldg(where + 1) + row, token = token_of(tables + __ldg(where) * TABLE_LENGTH, position);
    Head norms[2] = {load_head(q_norm + layer * H), load_head(k_norm + layer * H)};
    Angles angles = load_angles(cosines, sines, position);
    keys += layer_start(layer) + row_start(token, 0), values += layer_start(layer) + row_start(token, 0);
#pragma unroll 1
    for (int first = 0; first < NUM_HEADS + 2 * NUM_KV_HEADS; first += AT_ONCE * WARPS) {
        Head heads[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++)
            heads[n] = load_head(qkv + (u64)row * QKV + min(first + n * WARPS + warp, NUM_HEADS + 2 * NUM_KV_HEADS - 1) * H);
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            // what all warps have needs no question
            int lowest = first + n * WARPS, head = lowest + warp;
            bool is_query = lowest + WARPS <= NUM_HEADS || (lowest < NUM_HEADS && head < NUM_HEADS);
            if (lowest + WARPS > NUM_HEADS + 2 * NUM_KV_HEADS && head >= NUM_HEADS + 2 * NUM_KV_HEADS) break;
            u16* to = queries + ((u64)row * NUM_HEADS + head) * H;
            if (is_query)
                norm_and_rotate(heads[n], norms[0], angles);
            else if (head < NUM_HEADS + NUM_KV_HEADS)
                norm_and_rotate(heads[n], norms[1], angles), to = keys + (head - NUM_HEADS) * H;
            else
                to = values + (head - NUM_HEADS - NUM_KV_HEADS) * H;
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
        int at = ONE_PAGE ? token_of(table, min(start + first, TABLE_LENGTH * PAGE_LENGTH - 1)) : 0;
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
        u64 first = ((u64)(first_token() + token) * NUM_HEADS + (int)blockIdx.x * G + row % G) * H + 32 * column;
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
    const int* table = tables + __ldg(where) * TABLE_LENGTH;
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
        const u16* from = queries + ((u64)(first + min(token, tile.num_tokens - 1)) * NUM_HEADS + (int)blockIdx.x * G +
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

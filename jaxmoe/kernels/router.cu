// The router: norm, logits, the A best experts of each token and their weights; and the pairs (token, expert)
// sorted by expert, in tiles. A (token, expert) sum is the same chain in route_row and route_rows.
// Macros: E; A. For the routes D, NORMS, EPS; the launch number is the place of the weights * NORMS + layer of the
// norm. For route_rows ROWS; a warp has NE experts x NT tokens, a block WE x WT warps; STAGES. For group ROWS, TILE.
#include "common.cuh"

#ifndef TILE
constexpr int SEGMENTS = D / SEGMENT;
constexpr int PER_LANE = (E + 31) / 32;
constexpr float LOG2_E = 1.44269504088896341f;

// Larger floats have larger words.
DEVICE u32 ordered_word(float v) {
    u32 bits = __float_as_uint(v + 0.f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of_word(u32 word) { return __uint_as_float(word >> 31 ? word & 0x7fffffffu : ~word); }

// By one warp: the A highest of a token's logits, ties to the lower id, and their softmax. A lane holds
// neighbouring experts, so that the lowest lane and the lowest place give the lowest id. 0 is below any logit.
DEVICE void choose(const float* sums, int* ids, float* weights, bool is_real) {
    int lane = threadIdx.x % 32, id = 0;
    float values[PER_LANE];
    u32 words[PER_LANE], word = 0;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) values[k] = __ldcg(sums + min(lane * PER_LANE + k, E - 1));
    float inverse = __ldcg(sums + E);
#pragma unroll
    for (int k = 0; k < PER_LANE; k++)
        words[k] = lane * PER_LANE + k < E ? max(ordered_word(values[k] * inverse), 1u) : 0u;
#pragma unroll
    for (int j = 0; j < A; j++) {
        u32 highest = words[0];
#pragma unroll
        for (int k = 1; k < PER_LANE; k++) highest = max(highest, words[k]);
        u32 best = highest_of_lanes(highest);
        int owner = __ffs(__ballot_sync(ALL_LANES, highest == best)) - 1, place = PER_LANE - 1;
#pragma unroll
        for (int k = PER_LANE - 2; k >= 0; k--) place = words[k] == best ? k : place;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) words[k] = lane == owner && k == place ? 0u : words[k];
        int expert = __shfl_sync(ALL_LANES, lane * PER_LANE + place, owner);
        if (lane == j) word = best, id = expert;
    }
    float logit = float_of_word(word);
    float share = exp2_fast((logit - __shfl_sync(ALL_LANES, logit, 0)) * LOG2_E);
    float total = __shfl_sync(ALL_LANES, share, 0);
#pragma unroll
    for (int j = 1; j < A; j++) total += __shfl_sync(ALL_LANES, share, j);
    if (lane < A && is_real) {
        ids[lane] = id;
        weights[lane] = __fdiv_rn(share, total);
    }
}

// Whether this block is the last of `blocks` to come here; what the others wrote before is then visible. The
// last one puts the counter back to zero.
DEVICE bool is_last(int* counter, int blocks) {
    __shared__ int arrived;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        arrived = atomicAdd(counter, 1);
        if (arrived == blocks - 1) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return arrived == blocks - 1;
}

DEVICE void multiply_add(float& total, float4 w, float4 y) {
    total = fmaf(w.x, y.x, total);
    total = fmaf(w.y, y.y, total);
    total = fmaf(w.z, y.z, total);
    total = fmaf(w.w, y.w, total);
}
DEVICE float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
#endif

#if defined(ROUTE_ROW)
constexpr int WARPS = 4;
constexpr int HELD = SEGMENTS < 8 ? SEGMENTS : 8;  // segments of an expert's weights in flight together

// x * g of the whole row in shared memory, and the sums of squares: each warp its own segments.
DEVICE void norm_row(const float* x, const float* g, float4 (*products)[2][32], float* segment_sums) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int TURNS = (SEGMENTS + WARPS - 1) / WARPS;
    float v[TURNS][8];
    float4 weight[TURNS][2];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int segment = min(warp + turn * WARPS, SEGMENTS - 1);
        load8(v[turn], x + segment * SEGMENT + lane * 8);
        weight[turn][0] = ((const float4*)(g + segment * SEGMENT))[lane * 2];
        weight[turn][1] = ((const float4*)(g + segment * SEGMENT))[lane * 2 + 1];
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int segment = warp + turn * WARPS;
        if (segment >= SEGMENTS) break;
        float(&u)[8] = v[turn];
        float squares = sum_of_squares(u);
        if (lane == 0) segment_sums[segment] = squares;
        products[segment][0][lane] = times(make_float4(u[0], u[1], u[2], u[3]), weight[turn][0]);
        products[segment][1][lane] = times(make_float4(u[4], u[5], u[6], u[7]), weight[turn][1]);
    }
}

// One token: a warp an expert.
KERNEL(WARPS * 32, 1)
route_row(const float* x, const float* norm, const float* w, const int* count, const int*, int* ids, float* weights,
          int* counters, float* sums) {
    __shared__ float4 products[SEGMENTS][2][32];
    __shared__ float segment_sums[SEGMENTS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.x * WARPS + warp;
    int number = launch_number<SHARED_SIZE>(), index = number / NORMS, layer = number % NORMS;
    const float4* row = (const float4*)(w + ((size_t)index * E + min(expert, E - 1)) * D) + lane * 2;
    bool is_real = *count > 0;
    float total = 0;
#pragma unroll
    for (int first = 0; first < SEGMENTS; first += HELD) {
        float4 held[HELD][2];
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int segment = min(first + i, SEGMENTS - 1);
            held[i][0] = __ldcg(row + segment * (SEGMENT / 4));
            held[i][1] = __ldcg(row + segment * (SEGMENT / 4) + 1);
        }
        if (first == 0) {
            norm_row(x, norm + (size_t)layer * D, products, segment_sums);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (first + i >= SEGMENTS) break;
            multiply_add(total, held[i][0], products[first + i][0][lane]);
            multiply_add(total, held[i][1], products[first + i][1][lane]);
        }
    }
    total = sum_of_lanes(total);
    if (lane == 0 && expert < E) sums[expert] = total;
    if (threadIdx.x == 0 && blockIdx.x == 0) sums[E] = inverse_rms<D>(segment_sums, EPS);
    if (is_last(counters, gridDim.x) && warp == 0) choose(sums, ids, weights, is_real);
}
#endif

#if defined(ROUTE_ROWS)
constexpr int WARPS = WE * WT;
constexpr int BLOCK_EXPERTS = WE * NE;
constexpr int BLOCK_TOKENS = WT * NT;
constexpr int BLOCK_ROWS = BLOCK_EXPERTS + BLOCK_TOKENS + 1;  // weights, tokens, and the norm's weight
constexpr int SUMS = NE * NT;
constexpr int STRIDE = E + 1;  // a token's row of sums, which 1 / rms follows
static_assert(SUMS == 16 || SUMS == 32, "a lane or two for each sum of a warp");
static_assert(SHARED_SIZE == STAGES * BLOCK_ROWS * SEGMENT * 4, "shared memory holds the stages");
static_assert(STAGES >= 2, "one segment is read while another is used");

// Each sum over the lanes, in the order of sum_of_lanes: every step leaves a lane half as many. Lane l then has
// sum l * SUMS / 32 in v[0].
template <int LEFT, int OFFSET> DEVICE void sum_each(float (&v)[SUMS]) {
    if constexpr (LEFT == 1) v[0] += __shfl_xor_sync(ALL_LANES, v[0], OFFSET);
#pragma unroll
    for (int k = 0; k < LEFT / 2; k++) {
        bool upper = threadIdx.x & OFFSET;
        float other = __shfl_xor_sync(ALL_LANES, upper ? v[k] : v[k + LEFT / 2], OFFSET);
        v[k] = (upper ? v[k + LEFT / 2] : v[k]) + other;
    }
    if constexpr (OFFSET > 1) sum_each<LEFT == 1 ? 1 : LEFT / 2, OFFSET / 2>(v);
}

// Where a row of the block lies: weights, then tokens, then the norm. Rows past the end are read as the last.
DEVICE const float* row_of_block(int i, const float* x, const float* g, const float* w) {
    if (i < BLOCK_EXPERTS) return w + (size_t)min((int)blockIdx.x * BLOCK_EXPERTS + i, E - 1) * D;
    i -= BLOCK_EXPERTS;
    if (i < BLOCK_TOKENS) return x + (size_t)min((int)blockIdx.y * BLOCK_TOKENS + i, ROWS - 1) * D;
    return g;
}

// One segment of all rows on its way to shared memory: first the lanes' first fours, then the second.
DEVICE void fetch(float4* stage, int segment, const float* x, const float* g, const float* w) {
    for (int i = threadIdx.x; i < BLOCK_ROWS * 64; i += WARPS * 32) {
        int row = i / 64, place = i % 64;
        const float* from = row_of_block(row, x, g, w) + segment * SEGMENT + place * 4;
        copy_async(stage + row * 64 + (place % 2) * 32 + place / 2, from);
    }
}

DEVICE void add_segment(const float4* stage, float (&totals)[SUMS]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float4 *experts = stage + (warp % WE) * NE * 64, *norm = stage + (BLOCK_ROWS - 1) * 64;
    const float4* tokens = stage + (BLOCK_EXPERTS + (warp / WE) * NT) * 64;
#pragma unroll
    for (int half = 0; half < 64; half += 32) {
        float4 g = norm[half + lane], y[NT], w[NE];
#pragma unroll
        for (int t = 0; t < NT; t++) y[t] = times(tokens[t * 64 + half + lane], g);
#pragma unroll
        for (int e = 0; e < NE; e++) w[e] = experts[e * 64 + half + lane];
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
            for (int e = 0; e < NE; e++) multiply_add(totals[t * NE + e], w[e], y[t]);
    }
}

// The blocks of a tile of tokens share the tokens' sums of squares among them: token t is block t % gridDim.x's.
DEVICE void add_squares(const float4* stage, float (*segment_sums)[SEGMENTS], int segment) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int t = blockIdx.x + warp * gridDim.x; t < BLOCK_TOKENS; t += WARPS * gridDim.x) {
        const float4* row = stage + (BLOCK_EXPERTS + t) * 64;
        float4 a = row[lane], b = row[lane + 32];
        float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        float squares = sum_of_squares(v);
        if (lane == 0) segment_sums[t][segment] = squares;
    }
}

// Many tokens: grid (tiles of experts, tiles of tokens); the last block of a tile of tokens chooses for it.
KERNEL(WARPS * 32, NE > 4 ? 2 : 1)
route_rows(const float* x, const float* norm, const float* w, const int* count, const int*, int* ids, float* weights,
           int* counters, float* sums) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ float segment_sums[BLOCK_TOKENS][SEGMENTS];
    int first_token = blockIdx.y * BLOCK_TOKENS, num_tokens = min(*count, ROWS) - first_token;
    if (num_tokens <= 0) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int number = launch_number<SHARED_SIZE>(), index = number / NORMS;
    float4* stages = (float4*)shared;
    const float* g = norm + (size_t)(number % NORMS) * D;
    w += (size_t)index * E * D;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < SEGMENTS) fetch(stages + s * BLOCK_ROWS * 64, s, x, g, w);
        commit_copies();
    }
    float totals[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) totals[i] = 0;
    for (int s = 0; s < SEGMENTS; s++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        int next = s + STAGES - 1;
        if (next < SEGMENTS) fetch(stages + next % STAGES * BLOCK_ROWS * 64, next, x, g, w);
        commit_copies();
        const float4* stage = stages + s % STAGES * BLOCK_ROWS * 64;
        add_squares(stage, segment_sums, s);
        add_segment(stage, totals);
    }
    sum_each<SUMS, 16>(totals);
    int place = lane * SUMS / 32, token = (warp / WE) * NT + place / NE;
    int expert = blockIdx.x * BLOCK_EXPERTS + (warp % WE) * NE + place % NE;
    if (token < num_tokens && expert < E) sums[(size_t)(first_token + token) * STRIDE + expert] = totals[0];
    __syncthreads();
    for (int t = blockIdx.x + threadIdx.x * gridDim.x; t < min(BLOCK_TOKENS, num_tokens); t += WARPS * 32 * gridDim.x)
        sums[(size_t)(first_token + t) * STRIDE + E] = inverse_rms<D>(segment_sums[t], EPS);
    if (!is_last(counters + blockIdx.y, gridDim.x)) return;
    for (int t = warp; t < min(BLOCK_TOKENS, num_tokens); t += WARPS) {
        size_t row = first_token + t;
        choose(sums + row * STRIDE, ids + row * A, weights + row * A, true);
    }
}
#endif

#ifdef TILE
constexpr int PAIRS = ROWS * A;
constexpr int WARPS = 8;
constexpr int CHUNK = 128;  // pairs that a warp looks at together, four a lane
constexpr int CHUNKS = PAIRS > 16 * WARPS * CHUNK ? 16 : (PAIRS + WARPS * CHUNK - 1) / (WARPS * CHUNK);
constexpr int ROUND = WARPS * CHUNKS * CHUNK;
static_assert(E <= WARPS * 32, "a thread an expert");

// Four neighbouring ids, -1 for pairs past the end.
DEVICE int4 load_ids(const int* ids, int first, int num_pairs) {
    int4 found = make_int4(-1, -1, -1, -1);
    if (PAIRS % 4 == 0 && first + 3 < num_pairs) return *(const int4*)(ids + first);
    if (first < num_pairs) found.x = ids[first];
    if (first + 1 < num_pairs) found.y = ids[first + 1];
    if (first + 2 < num_pairs) found.z = ids[first + 2];
    if (first + 3 < num_pairs) found.w = ids[first + 3];
    return found;
}

DEVICE int sum_of_ints(int v) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(ALL_LANES, v, offset);
    return v;
}

// The same number in all threads: the sum of `v` over the block. `lower`: over the warps below this one.
DEVICE int sum_of_block(int v, int& lower) {
    __shared__ int sums[WARPS];
    int warp = threadIdx.x / 32, total = 0;
    v = sum_of_ints(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[warp] = v;
    __syncthreads();
    lower = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) lower += sums[i];
        total += sums[i];
    }
    return total;
}

// Appends a warp's pairs first .. first + 127 that are this block's expert's, in order; returns how many.
DEVICE int append(const bool (&is_mine)[4], int first, int* pairs) {
    int lane = threadIdx.x % 32, place = 0, total = 0;
    u32 below = (1u << lane) - 1;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        u32 lanes = __ballot_sync(ALL_LANES, is_mine[c]);
        place += __popc(lanes & below);
        total += __popc(lanes);
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (is_mine[c]) pairs[place++] = first + lane * 4 + c;
    return total;
}

// A block an expert: its pairs ascending, then its tiles. Every block counts all experts' pairs for itself, so
// that none has to wait for another.
KERNEL(WARPS * 32, 1)
group(const int* ids, const int* count, int* pairs, int4* tiles, int* num_tiles) {
    __shared__ int sizes[E];
    int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int num_pairs = min(*count, ROWS) * A, size = 0, lower;
    if ((int)threadIdx.x < E) sizes[threadIdx.x] = 0;
    __syncthreads();
    for (int start = 0; start < num_pairs; start += ROUND) {
        int first = start + warp * CHUNKS * CHUNK, mine = 0;
        int4 found[CHUNKS];
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) found[i] = load_ids(ids, first + i * CHUNK + lane * 4, num_pairs);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            int each[4] = {found[i].x, found[i].y, found[i].z, found[i].w};
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (each[c] >= 0) atomicAdd(&sizes[each[c]], 1);
                mine += each[c] == expert;
            }
        }
        int total = sum_of_block(mine, lower);
        int* to = pairs + (size_t)expert * ROWS + size + lower;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            int4 f = found[i];
            bool is_mine[4] = {f.x == expert, f.y == expert, f.z == expert, f.w == expert};
            to += append(is_mine, first + i * CHUNK, to);
        }
        size += total;
    }
    __syncthreads();
    int counted = (int)threadIdx.x < expert ? (sizes[threadIdx.x] + TILE - 1) / TILE : 0;
    int first_tile = sum_of_block(counted, lower), own_tiles = (size + TILE - 1) / TILE;
    for (int i = threadIdx.x; i < own_tiles; i += WARPS * 32)
        tiles[first_tile + i] = make_int4(expert, i * TILE, min(TILE, size - i * TILE), 0);
    if (expert == E - 1 && threadIdx.x == 0) *num_tiles = first_tile + own_tiles;
}
#endif

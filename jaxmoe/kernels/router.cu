// The router: norm, logits, the A best experts of each token and their weights; and the pairs (token, expert)
// sorted by expert, in tiles.
//
// Order of sums of a logit, the same in every route. A segment of 256 columns falls into 16 chains: chain i has
// columns 8i .. 8i + 7, then 128 + 8i .. 128 + 8i + 7, in one chain of fmaf(w, x * g, sum) from 0. The chains of a
// segment are added ascending, the segments in pairs (0 + 1, 2 + 3, ..), the pairs ascending; the total is
// multiplied by 1 / rms. So one row can have a chain a lane, a few rows a block for each segment and their chains
// spread over its threads, and many rows one thread for all chains of a segment.
//
// Macros: E; A. For the routes D, NORMS, EPS; the launch number is the place of the weights * NORMS + layer of the
// norm. For route_few and route_many REST: the rows of the last tile of tokens. For route_few the tile of a block,
// TILE_E experts x TILE_T tokens, a thread's NE x NT, and ZEROS. For group ROWS, TILE.
#include "choose.cuh"
#include "rounding.cuh"

#ifndef TILE
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int SEGMENTS = D / SEGMENT;
constexpr int PAIRS = (SEGMENTS + 1) / 2;
#ifdef ROUTE_FEW
constexpr bool IS_PAIRED = false;
#else
constexpr bool IS_PAIRED = true;
#endif
constexpr int PARTS = IS_PAIRED ? PAIRS : SEGMENTS;  // sums that blocks leave of each logit
constexpr int PER_LANE = (E + 31) / 32;

// The words of a lane's neighbouring experts, as other blocks left them; past the last expert, its.
DEVICE void read_neighbours(u32 (&found)[PER_LANE], const u32* words) {
    int first = threadIdx.x % 32 * PER_LANE;
    if constexpr (PER_LANE % 4 == 0 && E == 32 * PER_LANE) {
#pragma unroll
        for (int k = 0; k < PER_LANE; k += 4) {
            uint4 four = read_words(words + first + k);
            found[k] = four.x, found[k + 1] = four.y, found[k + 2] = four.z, found[k + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) found[k] = read_word(words + min(first + k, E - 1));
    }
}

// By one warp: the A highest of the logits of tokens first .. first + N - 1 below `end`, ties to the lower id, and
// their softmax. The tokens go side by side, so that they wait together.
template <int N>
DEVICE void choose(const float (&values)[N][PARTS][PER_LANE], const float (&inverse)[N], int first, int end, int* ids,
                   float* weights) {
    int lane = threadIdx.x % 32;
    Ranked<PER_LANE> ranked[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            float total = 0;
#pragma unroll
            for (int s = 0; s < PARTS; s += IS_PAIRED ? 1 : 2)
                total += IS_PAIRED || s + 1 == PARTS ? values[n][s][k] : values[n][s][k] + values[n][s + 1][k];
            ranked[n].words[k] = lane * PER_LANE + k < E ? max(ordered_word(total * inverse[n]), 1u) : 0u;
        }
        ranked[n].sort();
    }
    u32 mine[N];
    int chosen[N];
#pragma unroll 1
    for (int j = 0; j < A; j++)
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 best;
            int id = ranked[n].take(best);
            if (j == 0 || lane == j) chosen[n] = id, mine[n] = best;
        }
#pragma unroll
    for (int n = 0; n < N; n++) {
        float share = share_of<A>(mine[n]);
        if (lane >= A || first + n >= end) continue;
        ids[(size_t)(first + n) * A + lane] = chosen[n];
        weights[(size_t)(first + n) * A + lane] = share;
    }
}

#ifndef ROUTE_FEW
constexpr int STRIDE = (PARTS * E + SEGMENTS + 3) / 4 * 4;  // a token's parts, then its sums of squares

// The same of tokens whose sums lie in memory.
template <int N>
DEVICE void choose_of(const float* sums, const float (&squares)[N][SEGMENTS], int first, int end, int* ids, float* weights) {
    float values[N][PARTS][PER_LANE], inverse[N];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int s = 0; s < PARTS; s++) {
            u32 found[PER_LANE];
            read_neighbours(found, (const u32*)sums + (size_t)min(first + n, end - 1) * STRIDE + s * E);
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) values[n][s][k] = __uint_as_float(found[k]);
        }
#pragma unroll
    for (int n = 0; n < N; n++) inverse[n] = inverse_rms<D>(squares[n], EPS);
    choose<N>(values, inverse, first, end, ids, weights);
}

// Whether this block is the last of `blocks` to come here; what the others wrote before is then visible. The
// last one puts the counter back to zero.
DEVICE bool is_last(int* counter, int blocks) {
    __shared__ int arrived;
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = add_in_order(counter, 1);
        if (arrived == blocks - 1) *counter = 0;
    }
    __syncthreads();
    return arrived == blocks - 1;
}
#endif

DEVICE void multiply_add(float& sum, float4 w, float4 y) {
    sum = fmaf(w.x, y.x, sum);
    sum = fmaf(w.y, y.y, sum);
    sum = fmaf(w.z, y.z, sum);
    sum = fmaf(w.w, y.w, sum);
}
DEVICE float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

// Four columns of a row from `column` on; zeros past its end.
DEVICE float4 load_columns(const float* row, int column) {
    return SEGMENTS % 2 == 0 || column < D ? *(const float4*)(row + column) : make_float4(0, 0, 0, 0);
}
#endif

#if defined(ROUTE_ROW)
constexpr int EXPERTS = 2;  // of a block
constexpr int PART = WARPS / EXPERTS;
constexpr int TURNS = (PAIRS + PART - 1) / PART;
constexpr int PITCH = 2 * CHAINS + 4;

// A warp has one expert's pair of segments, or every PART-th; a lane a chain. The squares are summed while the
// weights are on their way.
DEVICE void sum_chains(const float* x, const float* g, const float* w, float (*chains)[PITCH], float* squares) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4 weight[TURNS][4], value[TURNS][4], factor[TURNS][4];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int segment = min(warp % PART + turn * PART, PAIRS - 1) * 2 + lane / CHAINS;
            int column = segment * SEGMENT + j / 2 * 128 + lane % CHAINS * 8 + j % 2 * 4;
            weight[turn][j] = load_columns(w, column);
            value[turn][j] = load_columns(x, column);
            factor[turn][j] = load_columns(g, column);
        }
    for (int segment = warp; segment < SEGMENTS; segment += WARPS) {
        float v[8];
        load8(v, x + segment * SEGMENT + lane * 8);
        float sum = sum_of_squares(v);
        if (lane == 0) squares[segment] = sum;
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int pair = warp % PART + turn * PART;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) multiply_add(sum, weight[turn][j], times(value[turn][j], factor[turn][j]));
        if (pair < PAIRS) chains[warp / PART * PAIRS + pair][lane] = sum;
    }
}

// One token, real or not: the kernels that follow read its experts. The last block chooses.
KERNEL(THREADS, 1)
route_row(const float* x, const float* norm, const float* w, const int*, const int*, int* ids, float* weights,
          int* counters, float* sums) {
    __shared__ __align__(16) float chains[EXPERTS * PAIRS][PITCH];
    __shared__ float squares[1][SEGMENTS];
    int warp = threadIdx.x / 32, first_expert = blockIdx.x * EXPERTS;
    int number = launch_number<SHARED_SIZE>(), index = number / NORMS, layer = number % NORMS;
    w += ((size_t)index * E + min(first_expert + warp / PART, E - 1)) * D;
    sum_chains(x, norm + (size_t)layer * D, w, chains, squares[0]);
    __syncthreads();
    for (int i = threadIdx.x; i < EXPERTS * PAIRS; i += THREADS) {
        const float4 *one = (const float4*)chains[i], *other = one + CHAINS / 4;
        int expert = first_expert + i / PAIRS;
        if (expert < E) sums[i % PAIRS * E + expert] = sum_of_chains(one) + sum_of_chains(other);
    }
    if (!is_last(counters, gridDim.x) || warp > 0) return;
    choose_of<1>(sums, squares, 0, 1, ids, weights);
}
#endif

#if defined(ROUTE_MANY)
// The sums of squares of one segment of N tokens of a tile, which its `blocks` share among them: token k of a block is
// blockIdx.x + k * blocks. Past the end the last one is summed once more.
template <int TOKENS, int N>
DEVICE void add_squares(int k, int blocks, int segment, const float* x, int first_token, int limit, float* sums) {
    float v[N][8];
    size_t rows[N];
    segment = min(segment, SEGMENTS - 1);
#pragma unroll
    for (int n = 0; n < N; n++) {
        int token = min((int)blockIdx.x + (k + n) * blocks, TOKENS - 1);
        rows[n] = min(first_token + token, limit - 1);
        load8(v[n], x + rows[n] * D + segment * SEGMENT + threadIdx.x % 32 * 8);
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        float squares = sum_of_squares(v[n]);
        if (threadIdx.x % 32 == 0) sums[rows[n] * STRIDE + PARTS * E + segment] = squares;
    }
}

// A warp's tokens from `first` on, N at a time.
template <int TOKENS>
DEVICE void choose_tile(const float* sums, int first_token, int end, int* ids, float* weights) {
    constexpr int MOST = 128 / (PARTS * PER_LANE);  // what the registers hold
    constexpr int N = TOKENS <= MOST ? TOKENS : MOST < 2 ? 1 : MOST < 4 ? 2 : 4;
    int last = min(end, first_token + ((int)threadIdx.x / 32 + 1) * TOKENS);
#pragma unroll 1
    for (int first = first_token + threadIdx.x / 32 * TOKENS; first < last; first += N) {
        float squares[N][SEGMENTS];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int s = 0; s < SEGMENTS; s++)
                squares[n][s] = __ldcg(sums + (size_t)min(first + n, end - 1) * STRIDE + PARTS * E + s);
        choose_of<N>(sums, squares, first, last, ids, weights);
    }
}
#endif

#if defined(ROUTE_FEW)
constexpr int LANES_E = TILE_E / NE, LANES_T = TILE_T / NT;
constexpr int WIDTH = SEGMENT / 4, PITCH = WIDTH + 1;  // of a row in shared memory, in fours
constexpr int TOKEN_PITCH = TILE_E + LANES_E;          // of the chains' sums; no two lanes of a warp share a bank
constexpr int CHAIN_PITCH = TILE_T * TOKEN_PITCH + 16;
constexpr int COPIES = TILE_T * WIDTH / THREADS;
static_assert(LANES_E * LANES_T * CHAINS == THREADS && CHAIN_PITCH % 32 == 16, "half a warp a chain");
static_assert(SHARED_SIZE >= (TILE_E + TILE_T) * PITCH * 16, "shared memory holds a segment of the tile's rows");
static_assert(SHARED_SIZE >= CHAINS * CHAIN_PITCH * 4, "shared memory holds the chains' sums");

// One segment of the tile's rows, tokens then experts, on its way to shared memory.
DEVICE void fetch(float4* rows, const float* x, const float* w, int first_token, int limit) {
    int place = threadIdx.x % WIDTH, column = blockIdx.z * SEGMENT + place * 4;
#pragma unroll
    for (int k = 0; k < (TILE_T + TILE_E) * WIDTH / THREADS; k++) {
        int i = threadIdx.x / WIDTH + k * (THREADS / WIDTH);
        int expert = min((int)blockIdx.x * TILE_E + i - TILE_T, E - 1), token = min(first_token + i, limit - 1);
        const float* row = i < TILE_T ? x + (size_t)token * D : w + (size_t)expert * D;
        copy_async(rows + i * PITCH + place, row + column);
        if (k == COPIES - 1) commit_copies();  // the tokens are there sooner
    }
    commit_copies();
}

// Half a warp has one chain of the whole tile, whose sums then take the place of the rows.
DEVICE void sum_chains(float4* rows) {
    float sums[NT][NE];
    int lane_e = threadIdx.x % LANES_E, lane_t = threadIdx.x / LANES_E % LANES_T, chain = threadIdx.x / 16;
    const float4 *tokens = rows + lane_t * PITCH + chain * 2, *experts = rows + (TILE_T + lane_e) * PITCH + chain * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int place = j / 2 * 32 + j % 2;
        float4 w[NE];
#pragma unroll
        for (int e = 0; e < NE; e++) w[e] = experts[e * LANES_E * PITCH + place];
#pragma unroll
        for (int t = 0; t < NT; t++) {
            float4 y = tokens[t * LANES_T * PITCH + place];
#pragma unroll
            for (int e = 0; e < NE; e++) {
                if (j == 0) sums[t][e] = 0;
                multiply_add(sums[t][e], w[e], y);
            }
        }
    }
    __syncthreads();
    float* to = (float*)rows + chain * CHAIN_PITCH + lane_t * TOKEN_PITCH + lane_e;
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
        for (int e = 0; e < NE; e++) to[t * LANES_T * TOKEN_PITCH + e * LANES_E] = sums[t][e];
    __syncthreads();
}

// What a lane's neighbouring experts have of all segments, as soon as other blocks have written it; zeros take its place.
DEVICE void take_sums(float (&values)[1][SEGMENTS][PER_LANE], u32* words) {
    u32 looks = 0;
    bool is_there = false;
    while (!is_there) {
        is_there = true;
#pragma unroll
        for (int s = 0; s < SEGMENTS; s++) {
            u32 found[PER_LANE];
            read_neighbours(found, words + s * E);
#pragma unroll
            for (int k = 0; k < PER_LANE; k++) is_there &= found[k] > 0, values[0][s][k] = number_of(found[k]);
        }
        if (!is_there) look_again(looks);
    }
    __syncwarp();
    int first = threadIdx.x % 32 * PER_LANE;
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++)
#pragma unroll
        for (int k = 0; k < PER_LANE; k++)
            if (first + k < E) words[s * E + first + k] = 0;
}

// The norm of a token, rounded; its experts; and zeros for what follows to count in.
DEVICE void finish_token(const float* x, const float* g, int token, bool is_real, u32* words, int* ids, float* weights,
                         u8* codes, float* scales, int* zeros) {
    __shared__ float squares[SEGMENTS];
    Rounding<D, WARPS> rounding;
    size_t row = token;
    rounding.norm(x + row * D, g, EPS, squares, codes + row * D, scales + row * (D / GROUP * 2), is_real);
    if (token == 0)
        for (int i = threadIdx.x; i < ZEROS; i += THREADS) zeros[i] = 0;
    // the second warp chooses among nothing while the first waits, which brings the instructions
    bool waits = threadIdx.x < 32;
    if (threadIdx.x >= 64 || !is_real) return;
    float values[1][SEGMENTS][PER_LANE] = {}, inverse[1] = {inverse_rms<D>(squares, EPS)};
    if (waits) take_sums(values, words + row * SEGMENTS * E);
    choose<1>(values, inverse, token, waits ? token + 1 : token, ids, weights);
}

// Some tokens: grid (tiles of experts, tiles of tokens, segments). Behind the last segment, so that they start last, is a
// block for each token: its norm, and the choice among its logits as soon as `words` has them.
KERNEL(THREADS, 1)
route_few(const float* x, const float* norm, const float* w, const int* count, const int*, int* ids, float* weights,
          u32* words, u8* codes, float* scales, int* zeros) {
    extern __shared__ __align__(16) u8 shared[];
    float4* rows = (float4*)shared;
    int first_token = blockIdx.y * TILE_T, limit = (gridDim.y - 1) * TILE_T + REST;
    int number = launch_number<SHARED_SIZE>(), index = number / NORMS, tiles_of_experts = gridDim.x;
    norm += (size_t)(number % NORMS) * D;
    if (blockIdx.z >= SEGMENTS) {
        int token = first_token + (blockIdx.z - SEGMENTS) * tiles_of_experts + blockIdx.x;
        if (token < min(first_token + TILE_T, limit))
            finish_token(x, norm, token, token < *count, words, ids, weights, codes, scales, zeros);
        return;
    }
    fetch(rows, x, w + (size_t)index * E * D, first_token, limit);
    int end = min(first_token + TILE_T, min(*count, limit));  // read once the copies are on their way
    int place = threadIdx.x % WIDTH;
    float4 g = load_columns(norm, blockIdx.z * SEGMENT + place * 4);
    wait_copies<1>();
#pragma unroll
    for (int i = 0; i < COPIES; i++) {  // those that this thread fetched
        float4& y = rows[(threadIdx.x / WIDTH + i * (THREADS / WIDTH)) * PITCH + place];
        y = times(y, g);
    }
    wait_copies<0>();
    __syncthreads();
    if (first_token >= end) return;
    sum_chains(rows);
#pragma unroll
    for (int i = threadIdx.x; i < TILE_T * TILE_E; i += THREADS) {
        int token = i / TILE_E, expert = blockIdx.x * TILE_E + i % TILE_E;
        const float* from = (const float*)shared + token * TOKEN_PITCH + i % TILE_E;
        float sum = 0;
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) sum += from[chain * CHAIN_PITCH];
        if (first_token + token < end && expert < E)
            put_number(words + ((size_t)(first_token + token) * SEGMENTS + blockIdx.z) * E + expert, sum);
    }
}
#endif

#if defined(ROUTE_MANY)
constexpr int TILE_E = 128, TILE_T = 64, NE = 8, NT = 8;
constexpr int STAGES = 3, ROUNDS = CHAINS;  // a round has a chain of each segment of a pair: the halves of a block
constexpr int PITCH = 9;                        // of a round's row in shared memory, in fours: 8 are used
constexpr int STAGE = (TILE_E + TILE_T) * PITCH;
constexpr int COPIES = TILE_T * 8 / THREADS;
static_assert(SHARED_SIZE == STAGES * STAGE * 16, "shared memory holds the stages");
static_assert(SHARED_SIZE >= NT / 2 * NE * THREADS * 4, "shared memory holds half of the sums");

// The first column of the four that this thread copies of each row in a round, and multiplies by the norm.
DEVICE int own_column(int round) {
    int place = threadIdx.x % 8;
    return blockIdx.z * 2 * SEGMENT + place / 2 * 128 + round * 8 + place % 2 * 4;
}

// One round of the tile's rows, tokens then experts.
DEVICE void fetch(float4* stage, int round, const float* x, const float* w, int first_token, int limit) {
    int column = own_column(round), from = min(column, D - 4);
    stage += threadIdx.x % 8;
#pragma unroll
    for (int k = 0; k < (TILE_T + TILE_E) * 8 / THREADS; k++) {
        int i = threadIdx.x / 8 + k * (THREADS / 8);
        int expert = min((int)blockIdx.x * TILE_E + i - TILE_T, E - 1), token = min(first_token + i, limit - 1);
        const float* row = i < TILE_T ? x + (size_t)token * D : w + (size_t)expert * D;
        copy_async(stage + i * PITCH, row + from, column < D);
    }
}

// One chain of a thread's 8 x 8: tokens 4 rows apart, experts 8.
DEVICE void add_chain(const float4* tokens, const float4* experts, float (&totals)[NT][NE]) {
    float sums[NT][NE];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float4 w[NE];
#pragma unroll
        for (int e = 0; e < NE; e++) w[e] = experts[e * 8 * PITCH + j];
#pragma unroll
        for (int t = 0; t < NT; t++) {
            float4 y = tokens[t * 4 * PITCH + j];
#pragma unroll
            for (int e = 0; e < NE; e++) {
                if (j == 0) sums[t][e] = 0;
                multiply_add(sums[t][e], w[e], y);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
        for (int e = 0; e < NE; e++) totals[t][e] += sums[t][e];
}

// The segments of the pair are added: a thread of the first half finishes its first four tokens, of the second the
// others.
DEVICE void finish_sums(float* exchange, float (&totals)[NT][NE], int token, int expert, int end, float* sums) {
    bool is_second = threadIdx.x >= THREADS / 2;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < NT / 2; t++)
#pragma unroll
        for (int e = 0; e < NE; e++)
            exchange[(t * NE + e) * THREADS + threadIdx.x] = is_second ? totals[t][e] : totals[t + NT / 2][e];
    __syncthreads();
#pragma unroll
    for (int t = 0; t < NT / 2; t++)
#pragma unroll
        for (int e = 0; e < NE; e++) {
            float other = exchange[(t * NE + e) * THREADS + (threadIdx.x ^ (THREADS / 2))];
            float total = (is_second ? totals[t + NT / 2][e] : totals[t][e]) + other;
            int row = token + (is_second ? t + NT / 2 : t) * 4;
            if (row < end && expert + e * 8 < E) sums[(size_t)row * STRIDE + blockIdx.z * E + expert + e * 8] = total;
        }
}

// Many tokens: grid as route_few, but pairs of segments, of which each half of a block has one.
KERNEL(THREADS, 1)
route_many(const float* x, const float* norm, const float* w, const int* count, const int*, int* ids, float* weights,
           int* counters, float* sums) {
    extern __shared__ __align__(16) u8 shared[];
    float4* stages = (float4*)shared;
    int first_token = blockIdx.y * TILE_T, limit = (gridDim.y - 1) * TILE_T + REST;
    int end = min(first_token + TILE_T, min(*count, limit));
    if (first_token >= end) return;
    int number = launch_number<SHARED_SIZE>(), index = number / NORMS;
    const float* g = norm + (size_t)(number % NORMS) * D;
    w += (size_t)index * E * D;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = warp / 4;
    int token = warp % 4 / 2 * 32 + lane / 8, expert = warp % 2 * 64 + lane % 8;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        fetch(stages + s * STAGE, s, x, w, first_token, limit);
        commit_copies();
    }
    float4 next = load_columns(g, own_column(0));
    for (int k = warp / 2 * 8; k * (int)gridDim.x < TILE_T; k += 32)
        add_squares<TILE_T, 8>(k, gridDim.x, blockIdx.z * 2 + warp % 2, x, first_token, limit, sums);
    float totals[NT][NE];
#pragma unroll
    for (int i = 0; i < NT * NE; i++) totals[i / NE][i % NE] = 0;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
        float4 *stage = stages + round % STAGES * STAGE, factor = next;
        next = load_columns(g, own_column(min(round + 1, ROUNDS - 1)));
        wait_copies<STAGES - 2>();
#pragma unroll
        for (int i = 0; i < COPIES; i++) {  // those that this thread fetched
            float4& y = stage[(threadIdx.x / 8 + i * (THREADS / 8)) * PITCH + threadIdx.x % 8];
            y = times(y, factor);
        }
        __syncthreads();
        int later = round + STAGES - 1;
        if (later < ROUNDS) fetch(stages + later % STAGES * STAGE, later, x, w, first_token, limit);
        commit_copies();
        add_chain(stage + token * PITCH + half * 4, stage + (TILE_T + expert) * PITCH + half * 4, totals);
    }
    finish_sums((float*)shared, totals, first_token + token, blockIdx.x * TILE_E + expert, end, sums);
    if (!is_last(counters + blockIdx.y, gridDim.x * PAIRS)) return;
    choose_tile<TILE_T / WARPS>(sums, first_token, end, ids, weights);
}
#endif

#ifdef TILE
constexpr int PAIRS = ROWS * A;
constexpr int WARPS = 8;
constexpr int CHUNK = 128;  // pairs that a warp looks at together, four a lane
constexpr int CHUNKS = PAIRS > 16 * WARPS * CHUNK ? 16 : (PAIRS + WARPS * CHUNK - 1) / (WARPS * CHUNK);
constexpr int ROUND = WARPS * CHUNKS * CHUNK;
constexpr int MAX_TILES = (PAIRS < E ? PAIRS : E) + PAIRS / TILE + 1;
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

// A block an expert: its pairs ascending, then its tiles; the last one's also fills the list with zeros, so that
// a consumer needs nothing but its own entry. Every block counts all experts' pairs for itself, so
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
    if (expert < E - 1) return;
    for (int i = first_tile + own_tiles + threadIdx.x; i < MAX_TILES; i += WARPS * 32) tiles[i] = make_int4(0, 0, 0, 0);
    if (threadIdx.x == 0) *num_tiles = first_tile + own_tiles;
}
#endif

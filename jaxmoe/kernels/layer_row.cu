// One row's way through a layer after its attention, in one launch: attn_output, router, gate_up and down of the chosen
// experts, and qkv of the next layer. One block a multiprocessor, all at once; each has a share of every product, whose
// weights are fetched before what they are multiplied by is there.
//
// What one block computes and all others need goes through the words of `exchange`: 0 until a number is there, then the
// number itself, so that nobody waits for more than what it reads. There are two sets of words: a launch uses one and
// clears the other for the next launch. Shares at the end are moved back to be whole: some rows are then computed twice.
//
// Macros: K columns of the row, MIXED those of the attention's output, INNER of an expert; MATRICES experts, ACTIVE of
// them chosen. Weights 0 is attn_output, 1 gate, 2 up, 3 down; with NEXT 4, 5, 6 are q, k and v of the next layer.
// A block's share: ROWS of attn_output and of down, BLOCK_EXPERTS experts of the router, PAIR_CHUNKS times PAIR_ROWS rows of
// an expert's gate and up (EXPERT_BLOCKS blocks an expert), NEXT_ROWS of q, k or v. EARLY experts' down is fetched beside gate
// and up. STACK_*: which layers lie in a weight's stack, a bit each. The launch number: 2 * layer + set of words.
#include "choose.cuh"
#include "row.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int CHAINS = 16;  // of a logit's segment: see router.cu
constexpr int MIXED_SEGMENTS = MIXED / SEGMENT, INNER_SEGMENTS = INNER / SEGMENT, HIDDEN_SEGMENTS = ACTIVE * INNER_SEGMENTS;

using Out = SharedRows<FORMAT_0, MIXED_SEGMENTS, ROWS, true, 16>;
using Gate = SharedRows<FORMAT_1, SEGMENTS, PAIR_ROWS, true, 16>;
using Up = SharedRows<FORMAT_2, SEGMENTS, PAIR_ROWS, true, 16>;
using Down = SharedRows<FORMAT_3, INNER_SEGMENTS, ROWS, true, 16>;

constexpr int larger(int a, int b) { return a > b ? a : b; }

#ifdef NEXT
template <class F> using Next = SharedRows<F, SEGMENTS, NEXT_ROWS, true, 16>;
constexpr int NEXT_SIZE = larger(Next<FORMAT_4>::SIZE, larger(Next<FORMAT_5>::SIZE, Next<FORMAT_6>::SIZE));
constexpr int NEXT_TASKS = Next<FORMAT_4>::TASKS;
#else
constexpr int NEXT_SIZE = 0, NEXT_TASKS = 0;
#endif

// Dynamic shared memory: attn_output; then chunks of gate and up; then the late experts of down, and the next layer's.
// Behind all of these the early experts of down.
constexpr int CHUNK_SIZE = Gate::SIZE + Up::SIZE, CHUNK_TASKS = 2 * Gate::TASKS;
constexpr int AT_NEXT = (ACTIVE - EARLY) * Down::SIZE;
constexpr int AT_EARLY = larger(larger(Out::SIZE, PAIR_CHUNKS * CHUNK_SIZE), AT_NEXT + NEXT_SIZE);
static_assert(AT_EARLY + EARLY * Down::SIZE <= SHARED_SIZE, "the weights must fit");

// A set of words, by number: the row after attention, logits, experts' hidden numbers, the row after the experts.
constexpr int LOGITS = K, HIDDEN = LOGITS + (MATRICES + 3) / 4 * 4, RESULT = HIDDEN + ACTIVE * INNER, WORDS = RESULT + K;

constexpr int MOST_SEGMENTS = larger(larger(MIXED_SEGMENTS, SEGMENTS), HIDDEN_SEGMENTS);
constexpr int MOST_TASKS = larger(larger(Out::TASKS, PAIR_CHUNKS * CHUNK_TASKS), larger(ACTIVE * Down::TASKS, NEXT_TASKS));
__shared__ __align__(16) u8 inputs[sizeof(SharedRow<MOST_SEGMENTS>)];  // of one product after the other
__shared__ __align__(16) float sums[MOST_TASKS], chains[WARPS][CHAINS];
__shared__ float segment_sums[SEGMENTS], segment_logits[BLOCK_EXPERTS][SEGMENTS];

template <int COUNT> DEVICE SharedRow<COUNT>& input() { return *(SharedRow<COUNT>*)inputs; }

// How many layers before this one lie in a stack: the layer's place there.
template <u64... MASKS> DEVICE int place_in(int layer) {
    constexpr u64 masks[] = {MASKS...};
    int count = 0;
#pragma unroll
    for (int i = 0; i < (int)sizeof...(MASKS); i++) {
        int below = min(max(layer - 64 * i, 0), 64);
        count += __popcll(below == 64 ? masks[i] : masks[i] & ((1ull << below) - 1));
    }
    return count;
}

template <u64... MASKS> DEVICE bool is_in(int layer) {
    constexpr u64 masks[] = {MASKS...};
    bool found = false;
#pragma unroll
    for (int i = 0; i < (int)sizeof...(MASKS); i++) found |= layer >> 6 == i && (masks[i] >> (layer & 63) & 1);
    return found;
}

// --- Words.

// No number that is computed has all bits set; if one had, it would come as another NaN.
DEVICE void put_number(u32* word, float v) { write_word(word, max(~__float_as_uint(v), 1u)); }
DEVICE float number_of(u32 word) { return __uint_as_float(~word); }

// Turn t of a warp's segments of COUNT, 8 numbers a lane, when all are there.
template <int COUNT, int TURNS> DEVICE void take(float (&v)[TURNS][8], const u32* words) {
    int lane = threadIdx.x & 31;
    bool is_missing = true;
    while (is_missing) {
        uint4 found[TURNS][2];
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            int segment = min(Norm<COUNT * SEGMENT>::segment(i), COUNT - 1);
#pragma unroll
            for (int j = 0; j < 2; j++) found[i][j] = read_words(words + segment * SEGMENT + 8 * lane + 4 * j);
        }
        is_missing = false;
#pragma unroll
        for (int i = 0; i < TURNS; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint4 f = found[i][j];
                is_missing |= min(min(f.x, f.y), min(f.z, f.w)) == 0;
                v[i][4 * j] = number_of(f.x), v[i][4 * j + 1] = number_of(f.y);
                v[i][4 * j + 2] = number_of(f.z), v[i][4 * j + 3] = number_of(f.w);
            }
        if (is_missing) let_others_run();
    }
}

DEVICE void clear(u32* words) {
#pragma unroll 1
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < WORDS / 4; i += gridDim.x * THREADS) ((uint4*)words)[i] = make_uint4(0, 0, 0, 0);
}

// --- The router.

using RowNorm = Norm<K>;

struct Logits {  // of this block's experts
    float w[BLOCK_EXPERTS][RowNorm::TURNS][8];

    METHOD static int expert(int e) { return min((int)blockIdx.x * BLOCK_EXPERTS + e, MATRICES - 1); }
    METHOD Logits(const float* matrix) {
#pragma unroll
        for (int e = 0; e < BLOCK_EXPERTS; e++) RowNorm::load(w[e], matrix + (size_t)expert(e) * K);
    }
    // The sums of the segments of y. Half a warp begins the chains, the other half ends them.
    METHOD void put_segments(const float (&y)[RowNorm::TURNS][8]) const {
        int lane = threadIdx.x & 31;
        float* mine = chains[threadIdx.x >> 5];
#pragma unroll
        for (int i = 0; i < RowNorm::TURNS; i++) {
            if (RowNorm::segment(i) >= SEGMENTS) break;
#pragma unroll
            for (int e = 0; e < BLOCK_EXPERTS; e++) {
                float begun = chain(0, w[e][i], y[i]);
                float sum = chain(__shfl_sync(ALL_LANES, begun, lane & 15), w[e][i], y[i]);
                __syncwarp();
                if (lane >= CHAINS) mine[lane - CHAINS] = sum;
                __syncwarp();
                if (lane == 0) segment_logits[e][RowNorm::segment(i)] = sum_of_chains((const float4*)mine);
            }
        }
    }
    METHOD static float chain(float sum, const float (&w)[8], const float (&y)[8]) {
#pragma unroll
        for (int j = 0; j < 8; j++) sum = fmaf(w[j], y[j], sum);
        return sum;
    }
    METHOD static float sum_of_chains(const float4* chains) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < CHAINS / 4; i++) {
            float4 v = chains[i];
            sum = sum + v.x + v.y + v.z + v.w;
        }
        return sum;
    }
    // By one warp: segments in pairs, pairs ascending; without 1 / rms.
    METHOD static void put(u32* words) {
        int lane = threadIdx.x & 31;
        if (lane >= BLOCK_EXPERTS) return;
        const float* from = segment_logits[lane];
        float total = 0;
#pragma unroll
        for (int s = 0; s < SEGMENTS; s += 2) total += from[s] + (s + 1 < SEGMENTS ? from[s + 1] : 0.f);
        put_number(words + expert(lane), total);
    }
};

// What a warp knows of the chosen experts: lane j the j-th one's id and its share.
struct Choice {
    int id;
    float share;
};

// A lane's neighbouring experts: their logits times r as words that are larger for larger ones, 0 past the last.
template <int FOURS> DEVICE void take_logits(u32 (&logits)[4 * FOURS], const u32* words, float r) {
    constexpr int LAST = (MATRICES - 1) / 4;
    bool is_missing = true;
    while (is_missing) {
        is_missing = false;
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            int four = (int)(threadIdx.x & 31) * FOURS + k;
            uint4 found = read_words(words + 4 * min(four, LAST));
            u32 each[4] = {found.x, found.y, found.z, found.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool is_expert = MATRICES == 128 * FOURS || 4 * four + i < MATRICES;
                is_missing |= is_expert && each[i] == 0;
                logits[4 * k + i] = is_expert ? max(ordered_word(number_of(each[i]) * r), 1u) : 0u;
            }
        }
        if (is_missing) let_others_run();
    }
    __syncwarp();
}

// By each warp: the experts with the highest logits, ties to the lower id, and their softmax. `chosen` is told of
// the j-th one's id as soon as it is known.
template <class Chosen> DEVICE Choice choose_experts(const u32* words, float r, Chosen chosen) {
    constexpr int FOURS = (MATRICES + 127) / 128;
    int lane = threadIdx.x & 31;
    Ranked<4 * FOURS> ranked;
    take_logits<FOURS>(ranked.words, words, r);
    ranked.sort();
    u32 mine = 0;
    int id_of_mine = 0;
#pragma unroll 1
    for (int j = 0; j < ACTIVE; j++) {
        u32 best;
        int id = ranked.take(best);
        if (lane == j) id_of_mine = id, mine = best;
        chosen(j, id);
    }
    return Choice{id_of_mine, share_of<ACTIVE>(mine)};
}

// This thread's row of attn_output, when the copies have come.
DEVICE float multiply_output() {
    wait_copies<0>();
    __syncthreads();
    multiply_rows<FORMAT_0, Out>(sums, shared, input<MIXED_SEGMENTS>());
    __syncthreads();
    return threadIdx.x < ROWS ? total<MIXED_SEGMENTS>(sums + threadIdx.x * MIXED_SEGMENTS) : 0.f;
}

// The row after attention, times its norm's weights; the logits of this block's experts. All threads have the sums.
DEVICE void put_logits(RowNorm& norm, const Logits& logits, u32* words) {
    if ((threadIdx.x >> 5) < SEGMENTS) {
        take<SEGMENTS>(norm.v, words);
        norm.put_squares(segment_sums);
        norm.multiply();
        logits.put_segments(norm.v);
    }
    __syncthreads();
    if ((threadIdx.x >> 5) == WARPS - 1) Logits::put(words + LOGITS);
}

// --- Gate and up.

struct Pairs {  // this block's share: some rows of one of the chosen experts
    int j, first;

    METHOD Pairs() : j(min((int)blockIdx.x / EXPERT_BLOCKS, ACTIVE - 1)), first((int)blockIdx.x % EXPERT_BLOCKS * PAIR_CHUNKS * PAIR_ROWS) {}
    METHOD int row(int chunk) const { return min(first + chunk * PAIR_ROWS, INNER - PAIR_ROWS); }
    METHOD void start(const Weight& gate, const Weight& up, size_t matrix) const {
#pragma unroll 1
        for (int c = 0; c < PAIR_CHUNKS; c++) {
            copy_rows<FORMAT_1, Gate>(shared + c * CHUNK_SIZE, gate, matrix * INNER + row(c));
            copy_rows<FORMAT_2, Up>(shared + c * CHUNK_SIZE + Gate::SIZE, up, matrix * INNER + row(c));
            commit_copies();
        }
    }
    // `later` starts one group of copies more, when the first chunk is there: these are needed before.
    template <class Later> METHOD void multiply(Later later) const {
#pragma unroll 1
        for (int c = 0; c < PAIR_CHUNKS; c++) {
            if (c == 0)
                wait_copies<PAIR_CHUNKS - 1>();
            else if (c < PAIR_CHUNKS - 1)
                wait_copies<2>();
            else
                wait_copies<1>();
            __syncthreads();
            if (c == 0) later();
            multiply_gate_up<FORMAT_1, Gate, FORMAT_2, Up>(sums + c * CHUNK_TASKS, shared + c * CHUNK_SIZE, input<SEGMENTS>());
        }
    }
    METHOD void put(u32* words) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < PAIR_CHUNKS * PAIR_ROWS; i += THREADS) {
            int c = i / PAIR_ROWS, r = i % PAIR_ROWS;
            const float* gate = sums + c * CHUNK_TASKS + r * SEGMENTS;
            put_number(words + j * INNER + row(c) + r, swiglu(total<SEGMENTS>(gate), total<SEGMENTS>(gate + Gate::TASKS)));
        }
    }
};

// --- Down.

DEVICE u8* place_of_down(int j) { return shared + (j < EARLY ? AT_EARLY + j * Down::SIZE : (j - EARLY) * Down::SIZE); }

// Experts begin .. end - 1 of the chosen ones.
DEVICE void start_down(const Weight& w, size_t first_matrix, const Choice& choice, int row, int begin, int end) {
#pragma unroll 1
    for (int j = begin; j < end; j++)
        copy_rows<FORMAT_3, Down>(place_of_down(j), w, (first_matrix + __shfl_sync(ALL_LANES, choice.id, j)) * K + row);
    commit_copies();
}

// The hidden numbers of all chosen experts, rounded.
DEVICE void put_hidden_row(const u32* words) {
    constexpr int TURNS = Norm<HIDDEN_SEGMENTS * SEGMENT>::TURNS;
    float v[TURNS][8];
    if ((threadIdx.x >> 5) >= HIDDEN_SEGMENTS) return;
    take<HIDDEN_SEGMENTS>(v, words);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = Norm<HIDDEN_SEGMENTS * SEGMENT>::segment(i);
        if (segment < HIDDEN_SEGMENTS) put_segment(input<HIDDEN_SEGMENTS>(), segment, v[i]);
    }
}

// The weighted sum of this thread's row of all experts.
DEVICE float multiply_experts(const Choice& choice) {
    multiply_down<FORMAT_3, Down>(sums, [](int j) { return (const u8*)place_of_down(j); }, input<HIDDEN_SEGMENTS>());
    float shares[ACTIVE];
#pragma unroll
    for (int j = 0; j < ACTIVE; j++) shares[j] = __shfl_sync(ALL_LANES, choice.share, j);
    __syncthreads();
    return threadIdx.x < ROWS ? sum_of_experts<Down>(sums, shares, threadIdx.x) : 0.f;
}

// --- The next layer: its q, k and v.

#ifdef NEXT
template <class F_> struct Tag { using F = F_; };

struct NextShare {  // this block's rows of one of the three
    int matrix, row, out;

    METHOD NextShare() {
        constexpr int Q = (ROWS_4 + NEXT_ROWS - 1) / NEXT_ROWS, KEYS = (ROWS_5 + NEXT_ROWS - 1) / NEXT_ROWS;
        constexpr int ALL = Q + KEYS + (ROWS_6 + NEXT_ROWS - 1) / NEXT_ROWS;
        int block = min((int)blockIdx.x, ALL - 1);
        matrix = block < Q ? 0 : block < Q + KEYS ? 1 : 2;
        row = (block - (matrix == 0 ? 0 : matrix == 1 ? Q : Q + KEYS)) * NEXT_ROWS;
        row = min(row, (matrix == 0 ? ROWS_4 : matrix == 1 ? ROWS_5 : ROWS_6) - NEXT_ROWS);
        out = row + (matrix == 0 ? 0 : matrix == 1 ? ROWS_4 : ROWS_4 + ROWS_5);
    }
    // Weights of one format share the code: less of it to fetch.
    template <class Work> METHOD void with_format(Work work) const {
        constexpr bool SAME_5 = IS_SAME<FORMAT_4, FORMAT_5>, SAME_6 = IS_SAME<FORMAT_4, FORMAT_6>;
        if (matrix == 0 || (matrix == 1 ? SAME_5 : SAME_6))
            work(Tag<FORMAT_4>());
        else if (matrix == 1 || IS_SAME<FORMAT_5, FORMAT_6>)
            work(Tag<FORMAT_5>());
        else
            work(Tag<FORMAT_6>());
    }
    METHOD void start(const Weight& w, int place) const {
        with_format([&](auto tag) {
            using F = typename decltype(tag)::F;
            int rows = matrix == 0 ? ROWS_4 : matrix == 1 ? ROWS_5 : ROWS_6;
            copy_rows<F, Next<F>>(shared + AT_NEXT, w, (size_t)place * rows + row);
        });
    }
    METHOD void multiply() const {
        with_format([&](auto tag) {
            using F = typename decltype(tag)::F;
            multiply_rows<F, Next<F>>(sums, shared + AT_NEXT, input<SEGMENTS>());
        });
    }
};

// This block's rows of q, k and v, of the row that has come through the experts.
DEVICE void multiply_next(RowNorm& norm, const NextShare& next, const u32* words, float* qkv) {
    if ((threadIdx.x >> 5) < SEGMENTS) take<SEGMENTS>(norm.v, words);
    norm.put_squares(segment_sums);
    norm.multiply();
    norm.put_codes(input<SEGMENTS>());
    wait_copies<0>();
    __syncthreads();
    norm.put_scales(input<SEGMENTS>(), inverse_rms<K>(segment_sums, EPS));
    __syncthreads();
    next.multiply();
    __syncthreads();
    if (threadIdx.x < NEXT_ROWS) qkv[next.out + threadIdx.x] = total<SEGMENTS>(sums + threadIdx.x * SEGMENTS);
}

// What the next launch reads first comes to the L2 cache while the attention before it reads little.
DEVICE void fetch_next(int layer, int row, const Weight& output, const float* norms, const float* router) {
    if (is_in<STACK_OUTPUT>(layer)) fetch_rows<FORMAT_0, Out>(output, (size_t)place_in<STACK_OUTPUT>(layer) * K + row);
    fetch_bytes<K * 4>(norms + (size_t)layer * K);
    if (!is_in<STACK_ROUTER>(layer)) return;
#pragma unroll
    for (int e = 0; e < BLOCK_EXPERTS; e++)
        fetch_bytes<K * 4>(router + ((size_t)place_in<STACK_ROUTER>(layer) * MATRICES + Logits::expert(e)) * K);
}
#endif

KERNEL(THREADS, 1)
layer(const i8* x, const float* x_scales, const float* residual, const float* norms, const float* router, WEIGHT(0),
      WEIGHT(1), WEIGHT(2), WEIGHT(3),
#ifdef NEXT
      const float* next_norms, WEIGHT(4), WEIGHT(5), WEIGHT(6),
#endif
      const u32*, float* out,
#ifdef NEXT
      float* qkv,
#endif
      u32* exchange) {
    int number = launch_number<SHARED_SIZE>(), at = number >> 1;
    int first = min((int)blockIdx.x * ROWS, K - ROWS), mine = first + min((int)threadIdx.x, ROWS - 1);
    u32* words = exchange + (number & 1) * WORDS;

    copy_rows<FORMAT_0, Out>(shared, GIVEN(0), (size_t)place_in<STACK_OUTPUT>(at) * K + first);
    float before = residual[mine];
    RowNorm norm;
    norm.load(norm.w, norms + (size_t)at * K);
    Logits logits(router + (size_t)place_in<STACK_ROUTER>(at) * MATRICES * K);
    copy_row<MIXED>(input<MIXED_SEGMENTS>(), x, x_scales);
    commit_copies();
    clear(exchange + (~number & 1) * WORDS);
    before = before + multiply_output();
    if (threadIdx.x < ROWS) put_number(words + mine, before);

    put_logits(norm, logits, words);
    Pairs pairs;
    size_t first_pair = (size_t)place_in<STACK_EXPERTS>(at) * MATRICES, first_down = (size_t)place_in<STACK_DOWN>(at) * MATRICES;
    float r = inverse_rms<K>(segment_sums, EPS);
    Choice choice = choose_experts(words + LOGITS, r, [&](int j, int id) {
        if (j == pairs.j) pairs.start(GIVEN(1), GIVEN(2), first_pair + id);
    });
    norm.put_codes(input<SEGMENTS>());
    norm.put_scales(input<SEGMENTS>(), r);
    pairs.multiply([&]() { start_down(GIVEN(3), first_down, choice, first, 0, EARLY); });
    __syncthreads();
    pairs.put(words + HIDDEN);

    start_down(GIVEN(3), first_down, choice, first, EARLY, ACTIVE);
#ifdef NEXT
    NextShare next;
    next.start(choose(next.matrix == 2, GIVEN(6), choose(next.matrix == 1, GIVEN(5), GIVEN(4))), place_in<STACK_QKV>(at + 1));
    norm.load(norm.w, next_norms + (size_t)(at + 1) * K);
#endif
    commit_copies();
    put_hidden_row(words + HIDDEN);
    wait_copies<1>();
    __syncthreads();
    before = before + multiply_experts(choice);
#ifdef NEXT
    if (threadIdx.x < ROWS) put_number(words + RESULT + mine, before);
    fetch_next(at + 1, first, GIVEN(0), norms, router);
#endif
    if (threadIdx.x < ROWS) out[mine] = before;
#ifdef NEXT
    multiply_next(norm, next, words + RESULT, qkv);
#endif
}

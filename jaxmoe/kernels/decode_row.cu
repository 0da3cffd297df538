// A decode step of one row, all layers in one launch: qkv, attention, attn_output, router, gate_up and down of the chosen
// experts. One block a multiprocessor, all at once; each has a share of everything, and fetches weights, keys and values
// before what they are multiplied by is there.
//
// What one block computes and all others need goes through words of `exchange`, zeros before: 0 until a number is there,
// then the number itself, so that nobody waits for more than what it reads. Every layer has words of its own. Parts of
// attention, which are many, share their place among the layers: beside each number stands the layer's tag. A layer's parts
// have been merged before anybody can put the next one's, since that takes qkv, which takes all that was merged.
// Shares at the end are moved back to be whole: some rows are then computed twice.
//
// Macros: NUM_LAYERS; K columns of the row, INNER of an expert; MATRICES experts, ACTIVE of them chosen. Weights 0 is
// attn_output, 1 gate, 2 up, 3 down, 4 q, 5 k, 6 v; 7 is down and 8, 9, 10 are q, k, v of the layers that are not in
// STACK_DOWN or STACK_QKV (a bit each).
// A block's share: ROWS of attn_output and of down, BLOCK_EXPERTS experts of the router, PAIR_CHUNKS times PAIR_ROWS rows of
// an expert's gate and up (EXPERT_BLOCKS blocks an expert), QKV_ROWS of q, k or v. EARLY experts' down is fetched beside gate
// and up; with LATE_OUTPUT attn_output is fetched after q, k and v are multiplied, in their place. HEAD_BLOCKS blocks attend
// for a key head, in up to MOST_PARTS parts.
#define DOT_CALLED
#include "choose.cuh"
#include "row.cuh"
#include "attend.cuh"

extern __shared__ __align__(16) u8 shared[];

constexpr int MIXED = NUM_HEADS * H, QUERY_ROWS = MIXED, KEY_ROWS = NUM_KV_HEADS * H;
constexpr int MIXED_SEGMENTS = MIXED / SEGMENT, INNER_SEGMENTS = INNER / SEGMENT, HIDDEN_SEGMENTS = ACTIVE * INNER_SEGMENTS;

// Whole rows are copied as they lie; 16 bytes between keep the banks apart, or that experts' codes are swapped.
template <class F, int COUNT, int NUM> using WholeRows = SharedRows<F, COUNT, NUM, true, 16, true>;
template <class F, int COUNT, int NUM> using ExpertRows = SharedRows<F, COUNT, NUM, true, 0, true, true>;
using Out = WholeRows<FORMAT_0, MIXED_SEGMENTS, ROWS>;
using Gate = ExpertRows<FORMAT_1, SEGMENTS, PAIR_ROWS>;
using Up = ExpertRows<FORMAT_2, SEGMENTS, PAIR_ROWS>;
template <class F> using Down = ExpertRows<F, INNER_SEGMENTS, ROWS>;
template <class F> using Share = WholeRows<F, SEGMENTS, QKV_ROWS>;
template <class F_> struct Tag { using F = F_; };

// work(Tag) for the nth of some formats, I being the first that is left and DONE a bit for each that is not. Equal ones share
// the code: less of it to fetch.
template <u32 DONE, int I, class Work> DEVICE void with_format(int, Work) {}
template <u32 DONE, int I, class F, class... Rest, class Work> DEVICE void with_format(int n, Work work) {
    constexpr bool same[] = {true, IS_SAME<F, Rest>...};
    constexpr u32 HERE = [&] {
        u32 bits = 0;
        for (int i = 0; i < 1 + (int)sizeof...(Rest); i++) bits |= (u32)same[i] << (I + i);
        return bits;
    }();
    if constexpr (DONE >> I & 1) {
        with_format<DONE, I + 1, Rest...>(n, work);
    } else {
        if (HERE >> n & 1)
            work(Tag<F>());
        else
            with_format<DONE | HERE, I + 1, Rest...>(n, work);
    }
}

constexpr int larger(int a, int b) { return a > b ? a : b; }
template <class... F> constexpr int largest_share() {
    int size = 0;
    for (int one : {Share<F>::SIZE...}) size = larger(size, one);
    return size;
}

// Dynamic shared memory: the share of q, k and v, whose end is attention's third buffer; the rest of attention; attn_output.
// After these gate and up; the late experts of down behind the share of the next layer; behind all the early ones.
constexpr int CHUNK_SIZE = Gate::SIZE + Up::SIZE, CHUNK_TASKS = 2 * Gate::TASKS;
constexpr int DOWN_SIZE = larger(Down<FORMAT_3>::SIZE, Down<FORMAT_7>::SIZE), BUFFER = KEYS * ROW;
constexpr int QKV_SIZE = largest_share<FORMAT_4, FORMAT_5, FORMAT_6, FORMAT_8, FORMAT_9, FORMAT_10>();
constexpr int FIRST_SIZE = LATE_OUTPUT ? larger(Out::SIZE + BUFFER, QKV_SIZE) : larger(BUFFER, QKV_SIZE);
constexpr int AT_ATTENTION = FIRST_SIZE - BUFFER, ATTENTION_END = AT_ATTENTION + ((int)sizeof(DecodeShared) + 15) / 16 * 16;
constexpr int AT_OUTPUT = LATE_OUTPUT ? 0 : ATTENTION_END, AT_LATE = FIRST_SIZE;
constexpr int AT_EARLY = larger(PAIR_CHUNKS * CHUNK_SIZE, AT_LATE + (ACTIVE - EARLY) * DOWN_SIZE);
static_assert(AT_EARLY + EARLY * DOWN_SIZE <= SHARED_SIZE, "the experts must fit");
static_assert(larger(ATTENTION_END, AT_OUTPUT + Out::SIZE) <= SHARED_SIZE, "attention and its output must fit");
static_assert(BUFFERS == 3, "of which the first is not used before q, k and v are multiplied");

// A layer's words, by number: qkv, the mixed row's codes (4 a word) and scales, the row after attention, logits, experts'
// hidden numbers, the row after the experts. Behind those of all layers, parts.
constexpr int MIX = QUERY_ROWS + 2 * KEY_ROWS, MIX_SCALES = MIX + MIXED / 4, AFTER = MIX_SCALES + MIXED / 16, LOGITS = AFTER + K;
constexpr int HIDDEN = LOGITS + (MATRICES + 3) / 4 * 4, RESULT = HIDDEN + ACTIVE * INNER, WORDS = RESULT + K;

constexpr int MOST_SEGMENTS = larger(larger(MIXED_SEGMENTS, SEGMENTS), HIDDEN_SEGMENTS);
constexpr int MOST_TASKS = larger(larger(Out::TASKS, PAIR_CHUNKS * CHUNK_TASKS), larger(ACTIVE * Down<FORMAT_3>::TASKS, QKV_ROWS * SEGMENTS));
__shared__ __align__(16) u8 inputs[sizeof(SharedRow<MOST_SEGMENTS>)];  // of one product after the other
__shared__ __align__(16) float sums[MOST_TASKS], chains[WARPS][CHAINS];
__shared__ float segment_sums[SEGMENTS], segment_logits[BLOCK_EXPERTS][SEGMENTS];

// The copies of codes, each of which is there once a layer: with the parity of the layer.
enum { QKV_COPY, OUTPUT_COPY, EARLY_COPY, LATE_COPY, PAIR_COPIES, ALL_COPIES = PAIR_COPIES + PAIR_CHUNKS };
__shared__ u64 barriers[ALL_COPIES];

template <int COUNT> DEVICE SharedRow<COUNT>& input() { return *(SharedRow<COUNT>*)inputs; }

// Whether a layer's weight lies in the first of its two stacks, and its place in the one that has it.
struct Place {
    bool is_first;
    int at;
};
template <u64... MASKS> DEVICE Place place_of(int layer) {
    constexpr u64 masks[] = {MASKS...};
    int count = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < (int)sizeof...(MASKS); i++) {
        int below = min(max(layer - 64 * i, 0), 64);
        count += __popcll(below == 64 ? masks[i] : masks[i] & ((1ull << below) - 1));
        found |= layer >> 6 == i && (masks[i] >> (layer & 63) & 1);
    }
    return {found, found ? count : layer - count};
}

// --- Words.

// Four codes, none of which is -128.
constexpr u32 CODES_MARK = 0x80808080u;
DEVICE void put_four_codes(u32* word, u32 codes) { write_word(word, max(codes ^ CODES_MARK, 1u)); }

// Turn t of a warp's segments of COUNT, 8 numbers a lane, when all are there.
template <int COUNT, int TURNS> DEVICE void take(float (&v)[TURNS][8], const u32* words) {
    int lane = threadIdx.x & 31;
    u32 looks = 0;
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
        if (is_missing) look_again(looks);
    }
}

// A row of COUNT segments that has no norm, when all is there, rounded.
template <int COUNT> DEVICE void take_row(const u32* words) {
    constexpr int TURNS = Norm<COUNT * SEGMENT>::TURNS;
    float v[TURNS][8];
    if ((threadIdx.x >> 5) >= COUNT) return;
    take<COUNT>(v, words);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = Norm<COUNT * SEGMENT>::segment(i);
        if (segment < COUNT) put_segment(input<COUNT>(), segment, v[i]);
    }
}

// The mixed row, when all is there.
DEVICE void take_mixed(const u32* words) {
    constexpr int CODES = MIXED / 16, SCALES = MIXED / 64;  // pieces of 16 bytes
#pragma unroll 1
    for (int i = threadIdx.x; i < CODES + SCALES; i += THREADS) {
        u32 looks = 0;
        uint4 f = read_words(words + MIX + 4 * i);
        while (min(min(f.x, f.y), min(f.z, f.w)) == 0) {
            look_again(looks);
            f = read_words(words + MIX + 4 * i);
        }
        if (i < CODES) {
            uint4 codes = make_uint4(f.x ^ CODES_MARK, f.y ^ CODES_MARK, f.z ^ CODES_MARK, f.w ^ CODES_MARK);
            *(uint4*)(input<MIXED_SEGMENTS>().codes_of(i / 16) + i % 16 * 16) = codes;
        } else {
            float2* to = input<MIXED_SEGMENTS>().scales_of((i - CODES) / 4) + (i - CODES) % 4 * 2;
            to[0] = make_float2(number_of(f.x), number_of(f.y)), to[1] = make_float2(number_of(f.z), number_of(f.w));
        }
    }
    __syncwarp();
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

// By one warp, when they are there: the logits times r as words that are larger for larger ones, 0 past the last.
constexpr int FOURS = (MATRICES + 127) / 128;
__shared__ uint4 ordered_logits[32 * FOURS];
DEVICE void take_logits(const u32* words, float r) {
    constexpr int LAST = (MATRICES - 1) / 4;
    u32 looks = 0;
    bool is_missing = true;
    while (is_missing) {
        is_missing = false;
#pragma unroll
        for (int k = 0; k < FOURS; k++) {
            int four = (int)(threadIdx.x & 31) * FOURS + k;
            uint4 found = read_words(words + 4 * min(four, LAST));
            u32 each[4] = {found.x, found.y, found.z, found.w}, ordered[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool is_expert = MATRICES == 128 * FOURS || 4 * four + i < MATRICES;
                is_missing |= is_expert && each[i] == 0;
                ordered[i] = is_expert ? max(ordered_word(number_of(each[i]) * r), 1u) : 0u;
            }
            ordered_logits[four] = make_uint4(ordered[0], ordered[1], ordered[2], ordered[3]);
        }
        if (is_missing) look_again(looks);
    }
}

// By each warp: the experts with the highest logits, ties to the lower id, and their softmax. `chosen` is told of
// the j-th one's id as soon as it is known. One warp looks for the logits: were it all, they would wait for each other.
template <class Chosen> DEVICE Choice choose_experts(const u32* words, float r, Chosen chosen) {
    int lane = threadIdx.x & 31;
    if ((threadIdx.x >> 5) == WARPS - 1) take_logits(words, r);
    fence_bulk();
    __syncthreads();
    Ranked<4 * FOURS> ranked;
#pragma unroll
    for (int k = 0; k < FOURS; k++) {
        uint4 four = ordered_logits[lane * FOURS + k];
        ranked.words[4 * k] = four.x, ranked.words[4 * k + 1] = four.y, ranked.words[4 * k + 2] = four.z, ranked.words[4 * k + 3] = four.w;
    }
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
DEVICE float multiply_output(u32 parity) {
    wait_phase(barriers + OUTPUT_COPY, parity);
    wait_copies<0>();
    __syncthreads();
    multiply_rows<FORMAT_0, Out>(sums, shared + AT_OUTPUT, input<MIXED_SEGMENTS>());
    __syncthreads();
    return threadIdx.x < ROWS ? total<Out>(sums, threadIdx.x) : 0.f;
}

// The row after attention, times its norm's weights; the logits of this block's experts. All threads have the sums.
DEVICE void put_logits(RowNorm& norm, const Logits& logits, u32* words) {
    if ((threadIdx.x >> 5) < SEGMENTS) {
        take<SEGMENTS>(norm.v, words + AFTER);
        norm.put_squares(segment_sums);
        norm.multiply();
        logits.put_segments(norm.v);
    }
    __syncthreads();
    if ((threadIdx.x >> 5) == WARPS - 1) Logits::put(words + LOGITS);
}

// --- Gate and up.

struct Pairs {  // this block's share: some rows of one of the chosen experts
    static constexpr int UNITS = PAIR_ROWS / UNIT;
    int j, first;
    Weight gate, up;

    METHOD Pairs(const Weight& gate_, const Weight& up_)
        : j(min((int)blockIdx.x / EXPERT_BLOCKS, ACTIVE - 1)), first((int)blockIdx.x % EXPERT_BLOCKS * PAIR_CHUNKS * PAIR_ROWS),
          gate(gate_), up(up_) {}
    METHOD int row(int chunk) const { return min(first + chunk * PAIR_ROWS, INNER - PAIR_ROWS); }
    METHOD void start(u32 matrix) const {
#pragma unroll 1
        for (int c = 0; c < PAIR_CHUNKS; c++) {
            u8* to = shared + c * CHUNK_SIZE;
            u32 from = matrix * INNER + row(c);
            u64* barrier = barriers + PAIR_COPIES + c;
            // codes of gate, of up, scales of gate, of up
#pragma unroll 1
            for (int task = threadIdx.x >> 5; task < 4 * UNITS; task += WARPS) {
                int unit = task % (2 * UNITS), at = unit % UNITS * UNIT;
                if (task == 0 && is_bulk_copier()) expect_bulk(barrier, PAIR_ROWS * (ROW_BYTES<FORMAT_1, Gate> + ROW_BYTES<FORMAT_2, Up>));
                bool is_codes = task < 2 * UNITS, is_up = unit >= UNITS;
                if (IS_SAME<FORMAT_1, FORMAT_2> || !is_up)
                    start_unit<FORMAT_1, Gate>(is_codes, to + (is_up ? Gate::SIZE : 0), choose(is_up, up, gate), from + at, at, barrier);
                else
                    start_unit<FORMAT_2, Up>(is_codes, to + Gate::SIZE, up, from + at, at, barrier);
            }
            commit_copies();
        }
    }
    template <class F, class Rows>
    METHOD static void start_unit(bool is_codes, u8* to, const Weight& w, u32 row, int at, u64* barrier) {
        if (is_codes)
            start_codes<F, Rows, UNIT>(to, w, row, at, barrier);
        else
            start_scales<F, Rows, UNIT>(to, w, row, at);
    }
    // `later` starts one group of copies more, when the first chunk is there: these are needed before.
    template <class Later> METHOD void multiply(u32 parity, Later later) const {
#pragma unroll 1
        for (int c = 0; c < PAIR_CHUNKS; c++) {
            wait_phase(barriers + PAIR_COPIES + c, parity);
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
            const float* chunk = sums + c * CHUNK_TASKS;
            put_number(words + j * INNER + row(c) + r, swiglu(total<Gate>(chunk, r), total<Gate>(chunk + Gate::TASKS, r)));
        }
    }
};

// --- Down.

DEVICE u8* place_of_down(int j) { return shared + (j < EARLY ? AT_EARLY + j * DOWN_SIZE : AT_LATE + (j - EARLY) * DOWN_SIZE); }

struct Experts {  // whose down is added up
    Place place;
    Weight down;
    int row;  // the block's first

    METHOD Experts(int layer, int row_, const Weight& first, const Weight& second)
        : place(place_of<STACK_DOWN>(layer)), down(choose(place.is_first, first, second)), row(row_) {}
    template <class Work> METHOD void with(Work work) const { with_format<0, 0, FORMAT_3, FORMAT_7>(!place.is_first, work); }
    // The copies of experts begin .. end - 1 of the chosen ones.
    METHOD void start(const Choice& choice, int begin, int end, u64* barrier) const {
        auto first = [&](int j) { return (u32)(place.at * MATRICES + __shfl_sync(ALL_LANES, choice.id, j)) * K + row; };
        with([&](auto tag) {
            using F = typename decltype(tag)::F;
            static_assert(ROWS % UNIT == 0 && PAIR_ROWS % UNIT == 0, "rows are swapped in groups of 8");
            int warp = threadIdx.x >> 5;
            if (warp == 0 && is_bulk_copier()) expect_bulk(barrier, (end - begin) * ROWS * ROW_BYTES<F, Down<F>>);
#pragma unroll 1
            for (int j = begin + warp; j < end; j += WARPS) {
                start_codes<F, Down<F>, ROWS>(place_of_down(j), down, first(j), 0, barrier);
                start_scales<F, Down<F>, ROWS>(place_of_down(j), down, first(j), 0);
            }
        });
        commit_copies();
    }
    // The weighted sum of this thread's row of all experts.
    METHOD float multiply(const Choice& choice) const {
        with([&](auto tag) {
            using F = typename decltype(tag)::F;
            multiply_down<F, Down<F>>(sums, [](int j) { return (const u8*)place_of_down(j); }, input<HIDDEN_SEGMENTS>());
        });
        float shares[ACTIVE];
#pragma unroll
        for (int j = 0; j < ACTIVE; j++) shares[j] = __shfl_sync(ALL_LANES, choice.share, j);
        fence_bulk();
        __syncthreads();
        return threadIdx.x < ROWS ? sum_of_experts<Down<FORMAT_3>>(sums, shares, threadIdx.x) : 0.f;
    }
};

// --- q, k and v.

struct Projection {  // this block's rows of one of the three
    int matrix, row, out;

    METHOD Projection() {
        constexpr int Q = (QUERY_ROWS + QKV_ROWS - 1) / QKV_ROWS, OTHER = (KEY_ROWS + QKV_ROWS - 1) / QKV_ROWS;
        int block = min(kept(blockIdx.x), Q + 2 * OTHER - 1);  // not kept from layer to layer: registers
        matrix = block < Q ? 0 : block < Q + OTHER ? 1 : 2;
        row = (block - (matrix == 0 ? 0 : Q + (matrix - 1) * OTHER)) * QKV_ROWS;
        row = min(row, num_rows() - QKV_ROWS);
        out = row + (matrix == 0 ? 0 : QUERY_ROWS + (matrix - 1) * KEY_ROWS);
    }
    METHOD int num_rows() const { return matrix == 0 ? QUERY_ROWS : KEY_ROWS; }
    template <class Work> METHOD void with(Place place, Work work) const {
        with_format<0, 0, FORMAT_4, FORMAT_5, FORMAT_6, FORMAT_8, FORMAT_9, FORMAT_10>(place.is_first ? matrix : matrix + 3, work);
    }
    // `all`: q, k and v of the first stack and of the second.
    METHOD void start(int layer, const Weight (&all)[2][3]) const {
        Place place = place_of<STACK_QKV>(layer);
        Weight w = choose(place.is_first, of_matrix(all[0]), of_matrix(all[1]));
        with(place, [&](auto tag) {
            using F = typename decltype(tag)::F;
            start_rows<F, Share<F>>(shared, w, place.at * num_rows() + row, barriers + QKV_COPY);
        });
    }
    METHOD Weight of_matrix(const Weight (&all)[3]) const { return choose(matrix == 0, all[0], choose(matrix == 1, all[1], all[2])); }
    // Of the row, whose norm this is; 3 groups of copies that began later may be on their way.
    METHOD void multiply(RowNorm& norm, int layer, u32* words) const {
        norm.put_squares(segment_sums);
        norm.multiply();
        norm.put_codes(input<SEGMENTS>());
        wait_phase(barriers + QKV_COPY, layer & 1);
        wait_copies<3>();
        __syncthreads();
        norm.put_scales(input<SEGMENTS>(), inverse_rms<K>(segment_sums, EPS));
        __syncthreads();
        with(place_of<STACK_QKV>(layer), [&](auto tag) {
            using F = typename decltype(tag)::F;
            multiply_rows<F, Share<F>>(sums, shared, input<SEGMENTS>());
        });
        if (LATE_OUTPUT) fence_bulk();
        __syncthreads();
        if (threadIdx.x < QKV_ROWS) put_number(words + out + threadIdx.x, total<Share<FORMAT_4>>(sums, threadIdx.x));
    }
};

// --- Attention.

struct Task {  // this block's segments, of one key head
    Token token;
    int first, end, page, num_parts;
    bool single;  // a part is a segment, not a run

    METHOD Task(int position, const int* table) {
        int segments = position / KEYS + 1, nth = (int)blockIdx.x / NUM_KV_HEADS;
        single = segments <= 2 * HEAD_BLOCKS;
        int length = single ? 1 : RUN;
        num_parts = (segments + length - 1) / length;
        int blocks = min(num_parts, HEAD_BLOCKS);
        bool has_some = nth < blocks;
        first = has_some ? nth * num_parts / blocks * length : 0;
        end = has_some ? min((nth + 1) * num_parts / blocks * length, segments) : 0;
        token = {0, (int)blockIdx.x % NUM_KV_HEADS, position, table};
        page = page_of(token, first);
    }
    METHOD bool is_end_of_part(int segment) const { return single || segment % RUN == 0 || segment == end; }
    METHOD int part_before(int segment) const { return single ? segment - 1 : (segment - 1) / RUN; }
    // The first segment, of earlier steps' keys and values, to the second and third buffer: two groups of copies.
    METHOD void start(DecodeShared& s, const u16* keys, const u16* values) const {
        int end_here = (threadIdx.x >> 5) < ATTENDING ? end : 0;
        copy_segment(s, token, keys, values, first, end_here, 1, page);
    }
};

// This lane's numbers of a head, when they are there.
DEVICE Head take_head(const u32* words) {
    Head head;
    u32 looks = 0;
    bool is_missing = true;
    while (is_missing) {
        u32 found[2][PAIRS];
#pragma unroll
        for (int i = 0; i < 2 * PAIRS; i++) found[i / PAIRS][i % PAIRS] = read_word(words + i / PAIRS * (H / 2) + i % PAIRS);
        is_missing = false;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            is_missing |= min(found[0][i], found[1][i]) == 0;
            head.low.v[i] = number_of(found[0][i]), head.high.v[i] = number_of(found[1][i]);
        }
        if (is_missing) look_again(looks);
    }
    __syncwarp();
    return head;
}

// The queries of this key head; if wanted the token's own key and value.
DEVICE void take_heads(DecodeShared& s, const Task& task, const float* q_norm, const float* k_norm, const float* cosines,
                       const float* sines, const u32* words) {
    int kv_head = task.token.kv_head, i = PAIRS * (threadIdx.x & 31);
    Angles angles = load_angles(cosines, sines, task.token.position);
#pragma unroll 1
    for (int head = threadIdx.x >> 5; head < (KEYS * task.end > task.token.position ? G + 2 : G); head += WARPS) {
        Head norm = load_head(head < G ? q_norm : k_norm);
        const u32* from = words + (head < G ? kv_head * G + head : NUM_HEADS + (head - G) * NUM_KV_HEADS + kv_head) * H + i;
        Head h = take_head(from);
        if (head <= G) norm_and_rotate(h, norm, angles);
        put_head(s, head, h);
    }
}

DEVICE u64 tagged(float v, int layer) { return (u64)(u32)(layer + 1) << 32 | __float_as_uint(v); }

// The block's segments: their parts to where all find them, the token's own key and value to their page.
DEVICE void attend(DecodeShared& s, const Task& task, u16* keys, u16* values, int layer, u64* parts) {
    int segment = task.first, place = 1, page = task.page, next_page = page_of(task.token, segment + 1);
    bool attends = (threadIdx.x >> 5) < ATTENDING;
    Running run = no_segment(), next = {};
    __syncthreads();
#pragma unroll 1
    while (segment < task.end) {
        int known = task.token.position - KEYS * segment;
        u8 *own_keys = s.buffers[place], *own_values = s.buffers[around(place + 1)];
        float scores[2][4] = {};
        if (attends) {
            wait_copies<1>();
            insert_token(own_keys, keys, s.fresh, task.token, known, page);
            score_segment(s, own_keys, min(known + 1, KEYS), scores);
        }
        __syncthreads();
        segment++, place = around(place + 2);
        if (attends) {
            copy_segment(s, task.token, keys, values, segment, task.end, place, next_page);
            next = {};
            share_segment(s, scores, next.highest);
            wait_copies<2>();
            insert_token(own_values, values, s.fresh + ROW, task.token, known, page);
        }
        __syncthreads();
        page = next_page, next_page = page_of(task.token, segment + 1);
        if (!attends) continue;
        mix_segment(s, own_values, next);
        merge_rows(run, next);
        if (!task.is_end_of_part(segment)) continue;
        u64* part = parts + (size_t)(task.token.kv_head * MOST_PARTS + task.part_before(segment)) * PART_FLOATS;
        put_rows(run, [&](int at, float a, float b) { write_long_words(part + at, tagged(a, layer), tagged(b, layer)); });
        run = no_segment();
    }
}

// 4 numbers of a head from `from` on, and the highest score and the sum at `rest`, when they are this layer's.
DEVICE Mixed take_part(const u64* from, const u64* rest, int layer) {
    u64 each[6];
    u32 looks = 0;
    bool is_missing = true;
    while (is_missing) {
        is_missing = false;
#pragma unroll
        for (int i = 0; i < 3; i++) {
            ulonglong2 two = read_long_words(i < 2 ? from + 2 * i : rest);
            each[2 * i] = two.x, each[2 * i + 1] = two.y;
        }
#pragma unroll
        for (int i = 0; i < 6; i++) is_missing |= (int)(each[i] >> 32) != layer + 1;
        if (is_missing) look_again(looks);
    }
    float v[6];
#pragma unroll
    for (int i = 0; i < 6; i++) v[i] = __uint_as_float((u32)each[i]);
    return {make_float4(v[0], v[1], v[2], v[3]), v[4], v[5]};
}

constexpr int LANES = GROUP / 4, AT_ONCE = WARPS * 32 / LANES;  // of a part's 32 numbers, and parts that are taken at once
struct Piece {
    float4 mix[LANES];
    float2 rest;
    float2 unused;
};
static_assert(AT_ONCE * sizeof(Piece) <= BUFFER && AT_ONCE % RUN == 0, "pieces lie where values were");

// A group of 32 numbers of the mixed row, 4 in each of 8 neighbouring lanes, rounded.
DEVICE void put_group(u32* words, int group, const float (&v)[4]) {
    u32 codes[1];
    float scale;
    int sum, lane = threadIdx.x & 31;
    round_group(v, codes, scale, sum);
    if (lane < LANES) put_four_codes(words + MIX + group * LANES + lane, codes[0]);
    if (lane < 2) put_number(words + MIX_SCALES + 2 * group + lane, lane == 0 ? scale : scale * (float)sum);
}

// This block's groups of 32 numbers of the mixed row: parts ascending, by one warp.
DEVICE void merge_parts(Piece* pieces, const Task& task, int layer, const u64* parts, u32* words) {
    int item = threadIdx.x % LANES, place = threadIdx.x / LANES;
#pragma unroll 1
    for (int group = blockIdx.x; group < MIXED / GROUP; group += gridDim.x) {
        int head = group * GROUP / H;
        const u64* from = parts + (size_t)(head / G) * MOST_PARTS * PART_FLOATS + head % G * ROW_FLOATS;
        Mixed all = no_part();
#pragma unroll 1
        for (int first = 0; first < task.num_parts; first += AT_ONCE) {
            __syncthreads();  // what lay here has been used
            if (first + place < task.num_parts) {
                const u64* part = from + (size_t)(first + place) * PART_FLOATS;
                Mixed one = take_part(part + group * GROUP % H + 4 * item, part + H, layer);
                pieces[place].mix[item] = one.mix;
                if (item == 0) pieces[place].rest = make_float2(one.highest, one.sum);
            }
            __syncthreads();
            if (threadIdx.x >= 32) continue;
#pragma unroll 1
            for (int i = 0; i < min(AT_ONCE, task.num_parts - first); i += RUN) {
                Mixed four[RUN];
#pragma unroll
                for (int j = 0; j < RUN; j++) {
                    const Piece& piece = pieces[min(i + j, task.num_parts - first - 1)];
                    four[j] = {piece.mix[item], piece.rest.x, piece.rest.y};
                }
                merge_four(all, four, task.num_parts - first - i, task.single);
            }
        }
        if (threadIdx.x >= 32) continue;
        float share = __fdiv_rn(1.f, all.sum);
        put_group(words, group, {all.mix.x * share, all.mix.y * share, all.mix.z * share, all.mix.w * share});
    }
}

KERNEL(THREADS, 1)
decode_row(const float* x, const int* active, const int* positions, const int* tables, const int* count,
           const float* norms, const float* q_norms, const float* k_norms, const float* cosines, const float* sines,
           const float* expert_norms, const float* router, WEIGHT(0), WEIGHT(1), WEIGHT(2), WEIGHT(3), WEIGHT(4), WEIGHT(5),
           WEIGHT(6), WEIGHT(7), WEIGHT(8), WEIGHT(9), WEIGHT(10), const u16*, const u16*, const u32*, float* out, u16* keys, u16* values, u32* exchange) {
    if (__ldg(count) == 0) return;
    int slot = __ldg(active), first = min((int)blockIdx.x * ROWS, K - ROWS), mine = first + min((int)threadIdx.x, ROWS - 1);
    DecodeShared& s = *(DecodeShared*)(shared + AT_ATTENTION);
    u64* parts = (u64*)(exchange + (size_t)NUM_LAYERS * WORDS);
    Task task(__ldg(positions + slot), tables + slot * TABLE_LENGTH);
    Weight qkv[2][3] = {{GIVEN(4), GIVEN(5), GIVEN(6)}, {GIVEN(8), GIVEN(9), GIVEN(10)}};
    auto start_output = [&](int layer) {
        start_rows<FORMAT_0, Out>(shared + AT_OUTPUT, GIVEN(0), layer * K + first, barriers + OUTPUT_COPY);
        commit_copies();
    };
    auto start_rest = [&](int layer) {  // behind q, k and v: three groups of copies
        if (LATE_OUTPUT)
            commit_copies();
        else
            start_output(layer);
        task.start(s, keys + layer_start(layer), values + layer_start(layer));
    };

    if (threadIdx.x < ALL_COPIES) init_phases(barriers + threadIdx.x, 1);
    fence_bulk();
    __syncthreads();
    Projection().start(0, qkv);
    commit_copies();
    start_rest(0);
    float before = x[mine];
    RowNorm norm;
    norm.load(norm.w, norms);
    norm.load(norm.v, x);
#pragma unroll 1
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        u32* words = exchange + (size_t)layer * WORDS;
        if (layer > 0 && (threadIdx.x >> 5) < SEGMENTS) take<SEGMENTS>(norm.v, words - WORDS + RESULT);
        Projection().multiply(norm, layer, words);

        if (LATE_OUTPUT) start_output(layer);
        norm.load(norm.w, expert_norms + (size_t)layer * K);
        Logits logits(router + (size_t)layer * MATRICES * K);
        if (task.first < task.end) take_heads(s, task, q_norms + layer * H, k_norms + layer * H, cosines, sines, words);
        attend(s, task, keys + layer_start(layer), values + layer_start(layer), layer, parts);
        merge_parts((Piece*)s.buffers[1], task, layer, parts, words);
        take_mixed(words);
        before = before + multiply_output(layer & 1);
        if (threadIdx.x < ROWS) put_number(words + AFTER + mine, before);
        put_logits(norm, logits, words);
        float r = inverse_rms<K>(segment_sums, EPS);
        norm.put_codes(input<SEGMENTS>());
        norm.put_scales(input<SEGMENTS>(), r);
        Pairs pairs(GIVEN(1), GIVEN(2));
        Choice choice = choose_experts(words + LOGITS, r, [&](int j, int id) {
            if (j == pairs.j) pairs.start(layer * MATRICES + id);
        });
        Experts experts(layer, first, GIVEN(3), GIVEN(7));
        pairs.multiply(layer & 1, [&]() { experts.start(choice, 0, EARLY, barriers + EARLY_COPY); });
        fence_bulk();
        __syncthreads();
        pairs.put(words + HIDDEN);

        bool is_last = layer == NUM_LAYERS - 1;
        experts.start(choice, EARLY, ACTIVE, barriers + LATE_COPY);
        if (!is_last) Projection().start(layer + 1, qkv);
        commit_copies();
        if (!is_last) norm.load(norm.w, norms + (size_t)(layer + 1) * K);
        take_row<HIDDEN_SEGMENTS>(words + HIDDEN);
        wait_phase(barriers + EARLY_COPY, layer & 1);
        wait_phase(barriers + LATE_COPY, layer & 1);
        wait_copies<1>();  // all but q, k and v
        __syncthreads();
        before = before + experts.multiply(choice);
        if (threadIdx.x < ROWS) put_number(words + RESULT + mine, before);
        if (!is_last) start_rest(layer + 1);
    }
    if (threadIdx.x < ROWS) out[mine] = before;
}

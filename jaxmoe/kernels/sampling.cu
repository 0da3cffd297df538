// Choosing the next token: one block a row, everything in it, so that a decode step has no part on the host.
//
// Whatever the order of the threads, a row's result is the same: maxima carry their ids, and what is summed are
// integers (counts, or shares in units of 2^-40). Thresholds are found digit by digit, never by sorting.
//
// A row is read as strips of four logits. The first pass finds each thread's own best. Few more than k logits
// reach the k-th largest of these bests, as a rule: a second pass lists those in shared memory, and the rest of
// the work is on the list. Where it cannot hold them all, or does not weigh enough for top_p, the same work is
// done on the whole row.
#include "common.cuh"

constexpr int THREADS = 1024;
constexpr int STRIPS = (V + 3) / 4;
constexpr int MAX_LISTED = 4096;
constexpr int NUM_BINS = 256;
// Of 1024 groups' maxima, the 900th largest is below about 2,150 logits: a list's half.
constexpr int LISTED_RANK = 900;
constexpr float ONE = 1099511627776.f;    // 2^40: a share of 1 as an integer
constexpr float NEGLIGIBLE = -29.f;       // exp of less rounds to no unit
constexpr float HIGHEST_GUMBEL = 16.f;    // above -log(-log(1 - 2^-23)), by more than sums round
#define LOWEST __uint_as_float(0xff800000u)  // -inf

struct Work {
    float values[MAX_LISTED];
    int ids[MAX_LISTED];
    u32 low[NUM_BINS], high[NUM_BINS];  // of 64-bit sums
    u64 partial[32];
    u64 above;
    u32 prefix;
    int num_listed;
};

// One row's parameters; `key` is the seed folded with the step.
struct Params {
    float temperature, top_p, min_p;
    int top_k;
    u32 key[2];
};

// The best of some logits; id V: there is none.
struct Peak {
    float value;
    int id;
};

// Integers in the order of the numbers.
DEVICE u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float unordered(u32 order) { return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order); }

// Larger is better: by value, zeros being equal, then by the lower id.
DEVICE u64 place(float value, int id) { return (u64)ordered(value + 0.f) << 32 | ~(u32)id; }
DEVICE int id_of(u64 place) { return (int)~(u32)place; }
DEVICE float value_of(u64 place) { return unordered((u32)(place >> 32)); }

DEVICE u64 units(float share) { return (u64)(share * ONE); }

struct Larger {
    __device__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};
struct Sum {
    __device__ u64 operator()(u64 a, u64 b) const { return a + b; }
};

template <class Join> DEVICE u64 joined_lanes(u64 v, Join join) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        u32 low = __shfl_xor_sync(ALL_LANES, (u32)v, offset);
        u32 high = __shfl_xor_sync(ALL_LANES, (u32)(v >> 32), offset);
        v = join(v, (u64)high << 32 | low);
    }
    return v;
}

// Over all threads of the block, in all of them.
template <class Join> DEVICE u64 joined(Work& work, u64 v, Join join) {
    v = joined_lanes(v, join);
    if (threadIdx.x % 32 == 0) work.partial[threadIdx.x / 32] = v;
    __syncthreads();
    v = joined_lanes(work.partial[threadIdx.x % 32], join);
    __syncthreads();
    return v;
}

// Four logits; -inf past the row's end.
DEVICE float4 load_strip(const float* values, int strip) {
    if (strip >= STRIPS) return make_float4(LOWEST, LOWEST, LOWEST, LOWEST);
    if (V % 4 == 0) return ((const float4*)values)[strip];
    const float* p = values + 4 * strip;
    int left = V - 4 * strip;
    return make_float4(p[0], left > 1 ? p[1] : LOWEST, left > 2 ? p[2] : LOWEST, left > 3 ? p[3] : LOWEST);
}

DEVICE float best_of(float4 x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }

// visit(strip, id of its first logit) for the thread's strips, DEEP of which are loaded at a time.
template <int DEEP, class Visit> DEVICE void each_strip(const float* values, Visit visit) {
    for (int first = threadIdx.x; first < STRIPS; first += DEEP * THREADS) {
        float4 strips[DEEP];
#pragma unroll
        for (int i = 0; i < DEEP; i++) strips[i] = load_strip(values, first + i * THREADS);
#pragma unroll
        for (int i = 0; i < DEEP; i++) visit(strips[i], 4 * (first + i * THREADS));
    }
}

// visit(value, id) for the four of a strip that are in the row.
template <class Visit> DEVICE void each_of(float4 x, int id, Visit visit) {
    if (id < V) visit(x.x, id);
    if (id + 1 < V) visit(x.y, id + 1);
    if (id + 2 < V) visit(x.z, id + 2);
    if (id + 3 < V) visit(x.w, id + 3);
}

// The thread's best logit, the first of equals.
DEVICE Peak own_peak(const float* values) {
    float best = LOWEST;
    int first = V;
    each_strip<8>(values, [&](float4 x, int id) {
        float value = best_of(x);
        if (value > best) best = value, first = id;
    });
    if (first == V) return Peak{LOWEST, V};
    float4 x = load_strip(values, first / 4);
    return Peak{best, first + (x.x == best ? 0 : x.y == best ? 1 : x.z == best ? 2 : 3)};
}

// Exact in any order: the carry is what the low word's old value tells.
DEVICE void add_to_bin(Work& work, u32 bin, u64 weight) {
    u32 low = (u32)weight, high = (u32)(weight >> 32);
    u32 old = atomicAdd(&work.low[bin], low);
    high += old + low < old;
    if (high) atomicAdd(&work.high[bin], high);
}

// One digit of `threshold`, by one warp: the largest bin that with all above it has `wanted`, else bin 0.
DEVICE void choose_bin(Work& work, u32 prefix, u64 above, int shift, u64 wanted) {
    int lane = threadIdx.x, highest = NUM_BINS - 1 - 8 * lane;
    u64 weights[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        weights[i] = (u64)work.high[highest - i] << 32 | work.low[highest - i];
        sum += weights[i];
    }
    u64 before = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        u32 low = __shfl_up_sync(ALL_LANES, (u32)before, offset);
        u32 high = __shfl_up_sync(ALL_LANES, (u32)(before >> 32), offset);
        if (lane >= offset) before += (u64)high << 32 | low;
    }
    u64 running = above + before - sum;
    int enough = __ballot_sync(ALL_LANES, running + sum >= wanted);
    if (lane != (enough ? __ffs(enough) - 1 : 31)) return;
    int i = 0;
    while (i < 7 && running + weights[i] < wanted) running += weights[i++];
    work.above = running;
    work.prefix = prefix | (u32)(highest - i) << shift;
}

// The largest key such that the keys from it up weigh `wanted` or more; 0 where all of them do not.
// each(visit) calls visit(key, weight) for the thread's keys.
template <class Each> DEVICE u32 threshold(Work& work, u64 wanted, Each each) {
    u32 prefix = 0;
    u64 above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < NUM_BINS) work.low[threadIdx.x] = work.high[threadIdx.x] = 0;
        __syncthreads();
        each([&](u32 key, u64 weight) {
            if ((u64)(key ^ prefix) >> (shift + 8) == 0) add_to_bin(work, key >> shift & 255, weight);
        });
        __syncthreads();
        if (threadIdx.x < 32) choose_bin(work, prefix, above, shift, wanted);
        __syncthreads();
        prefix = work.prefix, above = work.above;
    }
    return prefix;
}

// A score that `rank` of the row's reach, by the threads' own bests; -inf where there are too few of them.
template <class Score> DEVICE float reached_by(Work& work, int rank, Peak mine, Score score) {
    u32 order = threshold(work, rank, [&](auto visit) {
        if (mine.id < V) visit(ordered(score(mine.value)), (u64)1);
    });
    return order ? unordered(order) : LOWEST;
}

DEVICE void start_list(Work& work) {
    if (threadIdx.x == 0) work.num_listed = 0;
    __syncthreads();
}

// Append those of a strip that score `cut` or more; `score` never falls where logits rise.
template <class Score> DEVICE void list_strip(Work& work, float4 x, int id, float cut, Score score) {
    if (!(score(best_of(x)) >= cut)) return;
    each_of(x, id, [&](float value, int id) {
        float found = score(value);
        if (!(found >= cut)) return;
        int i = atomicAdd(&work.num_listed, 1);
        if (i < MAX_LISTED) work.values[i] = found, work.ids[i] = id;
    });
}

template <class Visit> DEVICE void each_listed(Work& work, Visit visit) {
    for (int i = threadIdx.x; i < work.num_listed; i += THREADS) visit(work.values[i], work.ids[i]);
}

// exp(score) of a strip's four, in units, added in a fixed order.
template <class Score> DEVICE u64 units_of(float4 x, Score score) {
    if (!(score(best_of(x)) >= NEGLIGIBLE)) return 0;
    return units((expf(score(x.x)) + expf(score(x.y))) + (expf(score(x.z)) + expf(score(x.w))));
}

template <int R> DEVICE void mix(u32 (&x)[2]) {
    x[0] += x[1];
    x[1] = (x[1] << R | x[1] >> (32 - R)) ^ x[0];
}

// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; 20 rounds.
DEVICE void threefry(u32 (&x)[2], const u32 (&key)[2]) {
    u32 keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bdau};
    x[0] += keys[0], x[1] += keys[1];
#pragma unroll
    for (u32 i = 0; i < 5; i++) {
        if (i % 2 == 0) mix<13>(x), mix<15>(x), mix<26>(x), mix<6>(x);
        if (i % 2 == 1) mix<17>(x), mix<29>(x), mix<16>(x), mix<24>(x);
        x[0] += keys[(i + 1) % 3], x[1] += keys[(i + 2) % 3] + i + 1;
    }
}

// What jax.random.gumbel gives at index `id`.
DEVICE float gumbel(const Params& params, int id) {
    u32 x[2] = {0, (u32)id};
    threefry(x, params.key);
    float uniform = __uint_as_float((x[0] ^ x[1]) >> 9 | 0x3f800000u) - 1.f;
    return -logf(-logf(fmaxf(uniform, 1.17549435e-38f)));
}

// The id drawn from what `each` visits, (score, id), after the filters; `total` is the units of the row's shares
// where they are known, `bound` what the best is known to reach.
template <class Each>
DEVICE int drawn_from(Work& work, const Params& params, u64 total, float bound, Each each) {
    u32 lowest = 0, lowest_share = 0;
    if (params.top_k) {
        lowest = threshold(work, params.top_k, [&](auto visit) {
            each([&](float score, int) { visit(ordered(score), (u64)1); });
        });
    }
    if (params.top_p < 1.f) {
        if (!total) {
            each([&](float score, int) { total += ordered(score) >= lowest ? units(expf(score)) : 0; });
            total = joined(work, total, Sum());
        }
        u64 wanted = (u64)((double)params.top_p * (double)total);
        lowest_share = threshold(work, wanted, [&](auto visit) {
            each([&](float score, int) {
                float share = expf(score);
                if (ordered(score) >= lowest) visit(ordered(share), units(share));
            });
        });
    }
    u64 best = 0;
    each([&](float score, int id) {
        if (!(score + HIGHEST_GUMBEL >= bound) || ordered(score) < lowest) return;
        float share = expf(score);
        bool kept = (ordered(share) >= lowest_share && share >= params.min_p) || share >= 1.f;
        if (!kept) return;
        float value = score + gumbel(params, id);
        u64 found = place(value, id);
        bound = fmaxf(bound, value);
        best = best > found ? best : found;
    });
    return id_of(joined(work, best, Larger()));
}

// What the best of all threads' own logits reaches: no other wins that could not reach it.
template <class Score> DEVICE float reached(Work& work, const Params& params, Peak mine, Score score) {
    float value = LOWEST;
    if (mine.id < V && expf(score(mine.value)) >= params.min_p) value = score(mine.value) + gumbel(params, mine.id);
    return value_of(joined(work, place(value, 0), Larger()));
}

// A random id after temperature, top_k, top_p and min_p, by the Gumbel-max trick.
DEVICE int draw(Work& work, const Params& params, const float* values, Peak mine, float highest) {
    auto score = [&](float x) { return __fdiv_rn(x - highest, params.temperature); };
    bool by_share = params.top_p < 1.f && !params.top_k;
    float cut, bound = LOWEST;
    if (params.top_k || by_share) {
        cut = reached_by(work, params.top_k ? params.top_k : LISTED_RANK, mine, score);
    } else {
        bound = reached(work, params, mine, score);
        cut = fmaxf(bound - HIGHEST_GUMBEL, params.min_p > 0.f ? logf(params.min_p) - 1e-3f : LOWEST);
    }
    start_list(work);
    u64 total = 0;
    each_strip<4>(values, [&](float4 x, int id) {
        list_strip(work, x, id, cut, score);
        if (by_share) total += units_of(x, score);
    });
    total = joined(work, total, Sum());
    bool listed = work.num_listed <= MAX_LISTED;
    if (listed && by_share) {
        u64 sum = 0;
        each_listed(work, [&](float score, int) { sum += units(expf(score)); });
        listed = joined(work, sum, Sum()) >= (u64)((double)params.top_p * (double)total);
    }
    if (listed) {
        return drawn_from(work, params, total, bound, [&](auto visit) { each_listed(work, visit); });
    }
    return drawn_from(work, params, total, bound, [&](auto visit) {
        each_strip<1>(values, [&](float4 x, int id) {
            each_of(x, id, [&](float value, int id) { visit(score(value), id); });
        });
    });
}

// The NUM_TOP best of the row, one pass for each: only where equals overflow the list.
template <class Score> DEVICE void top_of_row(Work& work, const float* values, Score score, int* top_ids, float* top) {
    u64 last = ~(u64)0;
    for (int rank = 0; rank < (NUM_TOP < V ? NUM_TOP : V); rank++) {
        u64 best = 0;
        each_strip<1>(values, [&](float4 x, int id) {
            each_of(x, id, [&](float value, int id) {
                u64 found = place(score(value), id);
                if (found < last && found > best) best = found;
            });
        });
        last = joined(work, best, Larger());
        if (threadIdx.x == 0 && last) top_ids[rank] = id_of(last), top[rank] = value_of(last);
    }
}

// The NUM_TOP best of the list, each put where the number of better ones says.
DEVICE void top_of_list(Work& work, int* top_ids, float* top) {
    int num = work.num_listed;
    each_listed(work, [&](float value, int id) {
        u64 mine = place(value, id);
        int rank = 0;
        for (int i = 0; i < num; i++) rank += place(work.values[i], work.ids[i]) > mine;
        if (rank < NUM_TOP) top_ids[rank] = id, top[rank] = value;
    });
}

// Logprobs over the row as the model gave it: of `token_id`, and the NUM_TOP best.
DEVICE void write_logprobs(
    Work& work, const float* logits, Peak mine, float highest, int token_id, float* logprob, int* top_ids, float* top
) {
    u64 total = 0;
    each_strip<4>(logits, [&](float4 x, int) { total += units_of(x, [&](float x) { return x - highest; }); });
    total = joined(work, total, Sum());
    float log_total = logf((float)((double)total / (double)ONE));
    auto score = [&](float x) { return (x - highest) - log_total; };
    float cut = reached_by(work, NUM_TOP, mine, score);
    start_list(work);
    each_strip<4>(logits, [&](float4 x, int id) { list_strip(work, x, id, cut, score); });
    if (threadIdx.x < NUM_TOP) top_ids[threadIdx.x] = 0, top[threadIdx.x] = LOWEST;
    if (threadIdx.x == 0) *logprob = score(logits[token_id]);
    __syncthreads();
    if (work.num_listed <= MAX_LISTED) return top_of_list(work, top_ids, top);
    top_of_row(work, logits, score, top_ids, top);
}

// One row's penalties and what they look at; null: not looked at.
struct Penalties {
    float frequency, presence, repetition;
    const int* counts;
    const u8* in_prompt;
    const float* bias;
};

// Logits after the penalties and the bias. Source: as jaxmoe/sampling.py.
DEVICE void penalise(const float* logits, const Penalties& penalties, float* adjusted) {
#pragma unroll 4
    for (int id = threadIdx.x; id < V; id += THREADS) {
        float x = logits[id];
        int count = penalties.counts ? penalties.counts[id] : 0;
        if (penalties.in_prompt && (count > 0 || penalties.in_prompt[id]))
            x = x > 0.f ? __fdiv_rn(x, penalties.repetition) : x * penalties.repetition;
        x = x - penalties.frequency * (float)count;
        x = x - (count > 0 ? penalties.presence : 0.f);
        adjusted[id] = penalties.bias ? x + penalties.bias[id] : x;
    }
    __syncthreads();
}

// The arrays of SamplingRow [slots] and [slots, V], then the slot of each row and the number of rows. History and
// what is fed next are in place; `adjusted` [rows, V] is room for rows with penalties.
KERNEL(THREADS, 1)
sample(
    const float* logits, const int*, const int*, const float* temperature, const float* top_p, const float* min_p,
    const float* frequency_penalty, const float* presence_penalty, const float* repetition_penalty, const int* top_k,
    const u32* seed, const int*, const float* bias, const int*, const u8* in_prompt, const u8* wants_logprobs,
    const u8* has_bias, const int* active, const int* count, int* token_ids, int* positions, int* counts, int* step,
    int* sampled, float* logprob, int* top_ids, float* top_logprobs, float* adjusted
) {
    __shared__ Work work;
    int row = blockIdx.x;
    if (row >= count[0]) return;
    int slot = active[row];
    const float *own = logits + (u64)row * V, *values = own;
    int* own_counts = counts + (u64)slot * V;
    Penalties penalties = {frequency_penalty[slot], presence_penalty[slot], repetition_penalty[slot], 0, 0, 0};
    bool repeated = penalties.repetition != 1.f;
    if (repeated || penalties.frequency != 0.f || penalties.presence != 0.f) penalties.counts = own_counts;
    if (repeated) penalties.in_prompt = in_prompt + (u64)slot * V;
    if (has_bias[slot]) penalties.bias = bias + (u64)slot * V;
    bool penalised = penalties.counts || penalties.bias;
    if (penalised) {
        penalise(own, penalties, adjusted + (u64)row * V);
        values = adjusted + (u64)row * V;
    }
    Peak mine = own_peak(values);
    u64 best = joined(work, place(mine.value, mine.id), Larger());
    int token_id = id_of(best);
    Params params = {temperature[slot], top_p[slot], min_p[slot], top_k[slot], {0, (u32)step[slot]}};
    if (params.temperature > 0.f) {
        u32 own_seed[2] = {seed[2 * slot], seed[2 * slot + 1]};
        threefry(params.key, own_seed);
        if (params.top_k < 0 || params.top_k >= V) params.top_k = 0;
        token_id = draw(work, params, values, mine, value_of(best));
    }
    // where no logit is a number
    if ((u32)token_id >= V) token_id = 0;
    int* own_ids = top_ids + row * NUM_TOP;
    float* own_top = top_logprobs + row * NUM_TOP;
    if (wants_logprobs[slot]) {
        if (penalised) mine = own_peak(own), best = joined(work, place(mine.value, mine.id), Larger());
        write_logprobs(work, own, mine, value_of(best), token_id, logprob + row, own_ids, own_top);
    } else {
        if (threadIdx.x < NUM_TOP) own_ids[threadIdx.x] = 0, own_top[threadIdx.x] = 0.f;
        if (threadIdx.x == 0) logprob[row] = 0.f;
    }
    if (threadIdx.x == 0) {
        sampled[row] = token_ids[slot] = token_id;
        positions[slot]++, step[slot]++, own_counts[token_id]++;
    }
}

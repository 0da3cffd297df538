// How experts are chosen of a token's logits by one warp.
#pragma once
#include "common.cuh"

constexpr int CHAINS = 16;  // of a logit's segment: README.md says which columns each has
constexpr float LOG2_E = 1.44269504088896341f;

// Ascending.
DEVICE float sum_of_chains(const float4* chains) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHAINS / 4; i++) {
        float4 v = chains[i];
        sum = sum + v.x + v.y + v.z + v.w;
    }
    return sum;
}

// Larger floats have larger words.
DEVICE u32 ordered_word(float v) {
    u32 bits = __float_as_uint(v + 0.f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of_word(u32 word) { return __uint_as_float(word >> 31 ? word & 0x7fffffffu : ~word); }

// A lane's words and their experts' ids, when sorted the highest word first (ties: the lowest id). 0 is below any logit.
template <int PER_LANE> struct Ranked {
    u32 words[PER_LANE];
    int ids[PER_LANE];

    METHOD void sort() {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) ids[k] = (int)(threadIdx.x & 31) * PER_LANE + k;
#pragma unroll
        for (int end = PER_LANE - 1; end > 0; end--)
#pragma unroll
            for (int k = 0; k < end; k++) order(k);
    }
    METHOD void order(int k) {
        u32 word = words[k];
        int id = ids[k];
        bool is_higher = words[k + 1] > word;
        words[k] = is_higher ? words[k + 1] : word, words[k + 1] = is_higher ? word : words[k + 1];
        ids[k] = is_higher ? ids[k + 1] : id, ids[k + 1] = is_higher ? id : ids[k + 1];
    }
    // The highest word of all lanes goes; its expert's id. Ties: the lowest lane's.
    METHOD int take(u32& best) {
        best = highest_of_lanes(words[0]);
        int owner = __ffs((int)__ballot_sync(ALL_LANES, words[0] == best)) - 1;
        int id = __shfl_sync(ALL_LANES, ids[0], owner);
        bool is_mine = (int)(threadIdx.x & 31) == owner;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            words[k] = !is_mine ? words[k] : k + 1 < PER_LANE ? words[min(k + 1, PER_LANE - 1)] : 0u;
            ids[k] = is_mine ? ids[min(k + 1, PER_LANE - 1)] : ids[k];
        }
        return id;
    }
};

// The softmax of COUNT logits, the highest first: lane j, whose word is of the j-th, gets its share.
template <int COUNT> DEVICE float share_of(u32 word) {
    float logit = float_of_word(word);
    float share = exp2_fast((logit - __shfl_sync(ALL_LANES, logit, 0)) * LOG2_E);
    float all = __shfl_sync(ALL_LANES, share, 0);
#pragma unroll
    for (int j = 1; j < COUNT; j++) all = all + __shfl_sync(ALL_LANES, share, j);
    return __fdiv_rn(share, all);
}

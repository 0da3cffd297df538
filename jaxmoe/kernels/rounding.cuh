// A row's norm, rounded to int8, by a block: each of WARPS warps has its segments of the row, so that a row's bits do not
// depend on others.
#pragma once
#include "common.cuh"

// What a lane keeps of its segments until the whole row's squares are known.
template <int WIDTH, int WARPS> struct Rounding {
    static constexpr int SEGMENTS = WIDTH / SEGMENT, TURNS = (SEGMENTS + WARPS - 1) / WARPS;
    float scale[TURNS];
    int sum[TURNS];

    METHOD static int segment(int turn) { return (int)threadIdx.x / 32 + turn * WARPS; }
    METHOD void round(const float (&v)[8], const float (&g)[8], int turn, float* segment_sums, uint2* codes, bool is_real) {
        int lane = threadIdx.x % 32;
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = v[i] * g[i];
        uint2 words;
        quantise(y, words, scale[turn], sum[turn]);
        float squares = sum_of_squares(v);
        if (lane == 0) segment_sums[segment(turn)] = squares;
        if (is_real) codes[segment(turn) * 32 + lane] = words;
    }
    METHOD void write_scales(const float* segment_sums, float eps, float2* scales, bool is_real) const {
        int lane = threadIdx.x % 32;
        __syncthreads();
        float inverse = inverse_rms<WIDTH>(segment_sums, eps);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            float s = scale[turn] * inverse;
            if (segment(turn) < SEGMENTS && is_real && lane % 4 == 0)
                scales[segment(turn) * (SEGMENT / GROUP) + lane / 4] = make_float2(s, s * (float)sum[turn]);
        }
    }
    // All of a row in global memory.
    METHOD void norm(const float* x, const float* g, float eps, float* segment_sums, u8* codes, float* scales, bool is_real) {
        float v[TURNS][8], weight[TURNS][8];
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int column = (segment(turn) < SEGMENTS ? segment(turn) : 0) * SEGMENT + (int)threadIdx.x % 32 * 8;
            load8(v[turn], x + column);
            load8(weight[turn], g + column);
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++)
            if (segment(turn) < SEGMENTS) round(v[turn], weight[turn], turn, segment_sums, (uint2*)codes, is_real);
        write_scales(segment_sums, eps, (float2*)scales, is_real);
    }
};

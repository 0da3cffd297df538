// What is done to whole rows: the norm, rounded to int8, and the sum of a row's experts with the next norm.
// A block owns a row and each warp its segments of it, so a row's bits do not depend on the others. Macros: D;
// NORMS: rows of the norm weights, of which the launch number picks one; EPS; MANY_ROWS: 1 where blocks past
// the last row should end at once, 0 where reading `count` first would cost more than their work; A: combine.
#include "common.cuh"

constexpr int SEGMENTS = D / SEGMENT;
constexpr int WARPS = SEGMENTS < 8 ? SEGMENTS : 8;
constexpr int TURNS = (SEGMENTS + WARPS - 1) / WARPS;  // segments of a warp: its own, WARPS more, ...

// What a lane keeps of its segments until the whole row's squares are known.
struct Rounded {
    float scale[TURNS];
    int sum[TURNS];
};

DEVICE void round_segment(const float (&v)[8], const float (&g)[8], int turn, Rounded& rounded, float* segment_sums,
                          uint2* codes, bool is_real) {
    int lane = threadIdx.x % 32, segment = threadIdx.x / 32 + turn * WARPS;
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = v[i] * g[i];
    uint2 words;
    quantise(y, words, rounded.scale[turn], rounded.sum[turn]);
    float squares = sum_of_squares(v);
    if (lane == 0) segment_sums[segment] = squares;
    if (is_real) codes[segment * 32 + lane] = words;
}

DEVICE void write_scales(const Rounded& rounded, const float* segment_sums, float2* scales, bool is_real) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    float inverse = inverse_rms<D>(segment_sums, EPS);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int segment = warp + turn * WARPS;
        float scale = rounded.scale[turn] * inverse;
        if (segment < SEGMENTS && is_real && lane % 4 == 0)
            scales[segment * (SEGMENT / GROUP) + lane / 4] = make_float2(scale, scale * (float)rounded.sum[turn]);
    }
}

#ifndef A
KERNEL(WARPS * 32, 1)
norm_quantise(const float* x, const float* norm, const int* count, u8* codes, float* scales) {
    __shared__ float segment_sums[SEGMENTS];
    const size_t row = blockIdx.x;
    if (MANY_ROWS && (int)row >= *count) return;
    const float* g = norm + (size_t)launch_number<SHARED_SIZE>() * D;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bool is_real = (int)row < *count;
    float v[TURNS][8], weight[TURNS][8];
    Rounded rounded;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int segment = warp + turn * WARPS, column = (segment < SEGMENTS ? segment : 0) * SEGMENT + lane * 8;
        load8(v[turn], x + row * D + column);
        load8(weight[turn], g + column);
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
        if (warp + turn * WARPS < SEGMENTS)
            round_segment(v[turn], weight[turn], turn, rounded, segment_sums, (uint2*)(codes + row * D), is_real);
    write_scales(rounded, segment_sums, (float2*)scales + row * (D / GROUP), is_real);
}
#else
KERNEL(WARPS * 32, 1)
combine(const float* x, const float* y, const float* weights, const float* norm, const int* count, float* out,
        u8* codes, float* scales) {
    __shared__ float segment_sums[SEGMENTS];
    const size_t row = blockIdx.x;
    if (MANY_ROWS && (int)row >= *count) return;
    const float* g = norm + (size_t)launch_number<SHARED_SIZE>() * D;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bool is_real = (int)row < *count;
    float share[A];
#pragma unroll
    for (int j = 0; j < A; j++) share[j] = weights[row * A + j];
    Rounded rounded;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int segment = warp + turn * WARPS, column = segment * SEGMENT + lane * 8;
        if (segment >= SEGMENTS) break;
        float v[8], weight[8], terms[A][8];
        load8(v, x + row * D + column);
        load8(weight, g + column);
#pragma unroll
        for (int j = 0; j < A; j++) load8(terms[j], y + (row * A + j) * D + column);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float total = share[0] * terms[0][i];
#pragma unroll
            for (int j = 1; j < A; j++) total = fmaf(share[j], terms[j][i], total);
            v[i] = v[i] + total;
        }
        if (is_real) {
            float4* to = (float4*)(out + row * D + column);
            to[0] = make_float4(v[0], v[1], v[2], v[3]);
            to[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
        round_segment(v, weight, turn, rounded, segment_sums, (uint2*)(codes + row * D), is_real);
    }
    write_scales(rounded, segment_sums, (float2*)scales + row * (D / GROUP), is_real);
}
#endif

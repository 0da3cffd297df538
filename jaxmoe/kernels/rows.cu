// What is done to whole rows: the norm, rounded to int8, and the sum of a row's experts with the next norm.
// A block owns a row and each warp its segments of it, so a row's bits do not depend on the others. Macros: D;
// NORMS: rows of the norm weights, of which the launch number picks one; EPS; MANY_ROWS: 1 where blocks past
// the last row should end at once, 0 where reading `count` first would cost more than their work; A: combine.
#include "rounding.cuh"

constexpr int SEGMENTS = D / SEGMENT, WARPS = SEGMENTS < 8 ? SEGMENTS : 8;
using RowRounding = Rounding<D, WARPS>;

#ifndef A
KERNEL(WARPS * 32, 1)
norm_quantise(const float* x, const float* norm, const int* count, u8* codes, float* scales) {
    __shared__ float segment_sums[SEGMENTS];
    const size_t row = blockIdx.x;
    if (MANY_ROWS && (int)row >= *count) return;
    RowRounding rounding;
    rounding.norm(x + row * D, norm + (size_t)launch_number<SHARED_SIZE>() * D, EPS, segment_sums, codes + row * D,
                  scales + row * (D / GROUP * 2), (int)row < *count);
}
#else
KERNEL(WARPS * 32, 1)
combine(const float* x, const float* y, const float* weights, const float* norm, const int* count, float* out,
        u8* codes, float* scales) {
    __shared__ float segment_sums[SEGMENTS];
    const size_t row = blockIdx.x;
    if (MANY_ROWS && (int)row >= *count) return;
    const float* g = norm + (size_t)launch_number<SHARED_SIZE>() * D;
    int lane = threadIdx.x % 32;
    bool is_real = (int)row < *count;
    float share[A];
#pragma unroll
    for (int j = 0; j < A; j++) share[j] = weights[row * A + j];
    RowRounding rounding;
#pragma unroll
    for (int turn = 0; turn < RowRounding::TURNS; turn++) {
        int segment = RowRounding::segment(turn), column = segment * SEGMENT + lane * 8;
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
        rounding.round(v, weight, turn, segment_sums, (uint2*)(codes + row * D), is_real);
    }
    rounding.write_scales(segment_sums, EPS, (float2*)scales + row * (D / GROUP), is_real);
}
#endif

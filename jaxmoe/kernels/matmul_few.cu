// Products of few rows: a warp takes 16 rows of a weight and one segment, so that all of a block's weights are on
// their way at once; the segments meet in shared memory. COLUMN_TILES tiles of 8 rows of the step are multiplied together.
#include "weights.cuh"

extern __shared__ __align__(16) u8 shared[];

// --- Few columns: a warp takes 16 rows of one segment, so that all of a block's weights are on their way at
// once; the segments meet in shared memory.

template <class F> struct Unit {
    Codes<F> codes[F::WORDS];
    Scales<F> scales;

    METHOD void read(const Weight& w, size_t first_row, int segment) {
        int lane = threadIdx.x & 31;
        size_t row = first_row + (lane >> 2);
        constexpr size_t stride = (size_t)K * F::BITS / 8;
        const u8* p = w.codes + row * stride + segment * F::BYTES + (lane & 3) * F::WORD;
#pragma unroll
        for (int i = 0; i < F::WORDS; i++) codes[i].template read<true>(p + i * 4 * F::WORD, stride);
        scales.read(w, row, segment);
    }
    template <int TILES, class Inputs> METHOD void multiply(float (&sums)[TILES][4], const Inputs& inputs, int segment) const {
#pragma unroll
        for (int n = 0; n < TILES; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
#pragma unroll
        for (int block = 0; block < 8; block++) {
            Block<F> weights(codes[block / F::BLOCKS_A_WORD], scales, block);
#pragma unroll
            for (int n = 0; n < TILES; n++)
                weights.add(sums[n], inputs.codes(n, segment, block), inputs.scales(n, segment, block));
        }
    }
};
// Rows of inputs in global memory; lane l reads the codes of its column l/4 and the scales of two columns.
template <int TILES, int INPUTS> struct GlobalRows {
    const u8* codes_[TILES];
    const float2 *first[TILES], *second[TILES];
    METHOD uint2 codes(int n, int segment, int block) const {
        return *(const uint2*)(codes_[n] + segment * SEGMENT + block * 32);
    }
    METHOD float4 scales(int n, int segment, int block) const {
        float2 a = first[n][segment * 8 + block], b = second[n][segment * 8 + block];
        return make_float4(a.x, a.y, b.x, b.y);
    }
    template <class Row> METHOD void at(const i8* codes, const float* scales, Row row) {  // row(column) -> row of the inputs
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            codes_[n] = (const u8*)codes + (size_t)row(8 * n + (lane >> 2)) * INPUTS + (lane & 3) * 8;
            first[n] = (const float2*)scales + (size_t)row(8 * n + 2 * (lane & 3)) * (INPUTS / 32);
            second[n] = (const float2*)scales + (size_t)row(8 * n + 2 * (lane & 3) + 1) * (INPUTS / 32);
        }
    }
};
// The sums of a unit [16, COLUMNS] in shared memory; a column more keeps the banks apart.
template <int COLUMNS> struct Partial {
    float sums[16][COLUMNS + 1];
    template <int TILES> METHOD void put(const float (&from)[TILES][4]) {
        int lane = threadIdx.x & 31, row = lane >> 2, column = 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[row + 8 * (e >> 1)][8 * n + column + (e & 1)] = from[n][e];
    }
};
template <int COUNT, int COLUMNS> DEVICE float total(const Partial<COLUMNS>* parts, int row, int column) {
    float sum = parts[0].sums[row][column];
#pragma unroll
    for (int i = 1; i < COUNT; i++) sum = sum + parts[i].sums[row][column];
    return sum;
}

constexpr int TILES = COLUMN_TILES, COLUMNS = 8 * TILES;
constexpr int WARPS = THREADS / 32;

#ifdef DENSE
constexpr int UNITS = SEGMENTS, TURNS = (UNITS + WARPS - 1) / WARPS;
constexpr int ALL_ROWS = ROWS_0 + ROWS_1 + ROWS_2;

template <class F>
DEVICE void dense(const Weight& w, int rows, int row, int out_row,
                  const i8* codes, const float* scales,
                  const float* residual, const int* count, float* out) {
    int warp = threadIdx.x >> 5, num_columns = count[0];
    Unit<F> units[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment < SEGMENTS) units[i].read(w, (size_t)stack_index() * rows + row, segment);
    }
    auto* parts = (Partial<COLUMNS>*)shared;
    static_assert(sizeof(Partial<COLUMNS>) * SEGMENTS <= SHARED_SIZE, "a partial sum a segment must fit");
    GlobalRows<TILES, K> inputs;
    inputs.at(codes, scales, [](int column) { return min((int)blockIdx.x * COLUMNS + column, NUM_ROWS - 1); });
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int segment = warp + i * WARPS;
        if (segment >= SEGMENTS) break;
        float sums[TILES][4];
        units[i].template multiply<TILES>(sums, inputs, segment);
        parts[segment].put(sums);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * COLUMNS; i += THREADS) {
        int column = blockIdx.x * COLUMNS + i / 16, r = i % 16;
        if (column >= num_columns) break;
        size_t at = (size_t)column * ALL_ROWS + out_row + r;
        float sum = total<SEGMENTS>(parts, r, i / 16);
#ifdef RESIDUAL
        sum = residual[at] + sum;
#endif
        out[at] = sum;
    }
}

KERNEL(THREADS, BLOCKS_AN_SM) NAME(
    const i8* codes, const float* scales,
    WEIGHT(0),
#if ROWS_1
    WEIGHT(1), WEIGHT(2),
#endif
#ifdef RESIDUAL
    const float* residual,
#else
#define residual nullptr
#endif
    const int* count, float* out) {
    int row = blockIdx.y * 16;
    if (row < ROWS_0) {
        dense<FORMAT_0>(GIVEN(0), ROWS_0, row, row, codes, scales, residual, count, out);
        return;
    }
#if ROWS_1
    if (row < ROWS_0 + ROWS_1)
        dense<FORMAT_1>(GIVEN(1), ROWS_1, row - ROWS_0, row, codes, scales, residual, count, out);
    else
        dense<FORMAT_2>(GIVEN(2), ROWS_2, row - ROWS_0 - ROWS_1, row, codes, scales, residual, count, out);
#endif
}
#endif  // DENSE

#ifdef GATE_UP
// h = silu(gate) * up for 32 of the F rows and a tile of pairs, rounded. Units are (gate or up, 16 rows, segment),
// in turns: while one is multiplied the next one's weights are on their way.
constexpr int UNITS = 2 * SEGMENTS, TURNS = (UNITS + WARPS - 1) / WARPS;

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), WEIGHT(1), i8* out_codes, float* out_scales) {
    if (blockIdx.y >= num_tiles[0]) return;
    PairTile tile(pairs, tiles);
    int warp = threadIdx.x >> 5, first = blockIdx.x * 32, num_columns = tile.count;
    size_t row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    __shared__ Partial<COLUMNS> gate_parts[UNITS], up_parts[UNITS];
    __shared__ float h[COLUMNS * H_STRIDE];
    Unit<FORMAT_0> gate;
    Unit<FORMAT_1> up;
    auto at = [&](int unit) { return row + 16 * (unit / SEGMENTS); };
    if (warp < UNITS) gate.read(GIVEN(0), at(warp), warp % SEGMENTS);
    GlobalRows<TILES, K> inputs;
    inputs.at(codes, scales, [&](int column) { return tile.pair(column) / ACTIVE; });
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS, next = unit + WARPS;
        if (unit >= UNITS) break;
        up.read(GIVEN(1), at(unit), unit % SEGMENTS);
        float sums[TILES][4];
        gate.template multiply<TILES>(sums, inputs, unit % SEGMENTS);
        gate_parts[unit].put(sums);
        if (i + 1 < TURNS && next < UNITS) gate.read(GIVEN(0), at(next), next % SEGMENTS);
        up.template multiply<TILES>(sums, inputs, unit % SEGMENTS);
        up_parts[unit].put(sums);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * num_columns; i += THREADS) {
        int column = i / 32, r = i % 32, part = r / 16 * SEGMENTS;
        float gate_sum = total<SEGMENTS>(gate_parts + part, r % 16, column);
        float up_sum = total<SEGMENTS>(up_parts + part, r % 16, column);
        h[column * H_STRIDE + r] = swiglu(gate_sum, up_sum);
    }
    __syncthreads();
    put_hidden(h, num_columns, ROWS_0, first, out_codes, out_scales, [&](int column) { return tile.pair(column); });
}
#endif  // GATE_UP

#ifdef DOWN
// y of each pair of a tile, 16 * ROW_TILES rows a block.
constexpr int UNITS = ROW_TILES * SEGMENTS, TURNS = (UNITS + WARPS - 1) / WARPS;

KERNEL(THREADS, BLOCKS_AN_SM) NAME(const i8* codes, const float* scales, const int* pairs, const int* tiles, const int* num_tiles,
                        WEIGHT(0), float* out) {
    if (blockIdx.y >= num_tiles[0]) return;
    PairTile tile(pairs, tiles);
    int warp = threadIdx.x >> 5, first = blockIdx.x * 16 * ROW_TILES;
    size_t matrix_row = ((size_t)stack_index() * MATRICES + tile.expert) * ROWS_0 + first;
    Unit<FORMAT_0> units[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS;
        if (unit >= UNITS) break;
        units[i].read(GIVEN(0), matrix_row + 16 * (unit / SEGMENTS), unit % SEGMENTS);
    }
    __shared__ Partial<COLUMNS> parts[UNITS];
    GlobalRows<TILES, K> inputs;
    inputs.at(codes, scales, [&](int column) { return tile.pair(column); });
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        int unit = warp + i * WARPS;
        if (unit >= UNITS) break;
        float sums[TILES][4];
        units[i].template multiply<TILES>(sums, inputs, unit % SEGMENTS);
        parts[unit].put(sums);
    }
    __syncthreads();
    constexpr int ROWS = 16 * ROW_TILES;
    for (int i = threadIdx.x; i < ROWS * tile.count; i += THREADS) {
        int column = i / ROWS, r = i % ROWS;
        out[(size_t)tile.pair(column) * ROWS_0 + first + r] = total<SEGMENTS>(parts + r / 16 * SEGMENTS, r % 16, column);
    }
}
#endif

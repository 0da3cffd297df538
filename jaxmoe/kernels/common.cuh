// What every kernel shares: the few instructions CUDA C++ has no word for, and the sums whose order is fixed.
// README.md beside this file gives the orders. Compiled by NVRTC without any header; `EMULATED` is the architecture where
// the tests compile the same source for the CPU, which then brings its own versions of the first part.
#pragma once

#ifdef EMULATED
#define ARCH EMULATED
#else
#define ARCH __CUDA_ARCH__
#endif

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__

constexpr int SEGMENT = 256;  // inputs of a product that are summed before the next segment begins
constexpr int GROUP = 32;     // activations that share a scale
constexpr u32 ALL_LANES = 0xffffffffu;

#ifndef EMULATED
DEVICE u32 dynamic_shared_size() {
    u32 size;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(size));
    return size;
}
DEVICE float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
DEVICE u16 float_to_bfloat16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
// Two numbers as halves of a word: `low` in the low half.
DEVICE u32 pack_bfloat16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
DEVICE u32 pack_half(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
// d = a * b + c for tiles [16, 32] x [32, 8] of int8. Lane l holds of a rows l/4 and l/4 + 8 (a[0], a[2] and
// a[1], a[3]), of b column l/4, of c and d rows l/4 (0, 1) and l/4 + 8 (2, 3), columns 2 * (l%4) and the next.
DEVICE void mma_int8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int c) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c));
}
// The same with unsigned codes in a.
DEVICE void mma_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int c) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c));
}
// The same as mma_int8 for 16 inputs: lanes hold a[0], a[1] and b[0] of it.
DEVICE void mma_int8(int (&d)[4], u32 a0, u32 a1, u32 b0, int c) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%7,%7,%7,%7};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b0), "r"(c));
}
// d += a * b for tiles [16, 16] x [16, 8]; words hold two neighbours of k.
DEVICE void mma_bfloat16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_half(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8x8 matrices of 16-bit numbers from shared memory, transposed; lane l gives row l%8 of matrix l/8.
DEVICE void load_transposed(u32 (&r)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// Four matrices of 8 rows of 16 bytes from shared memory: lane l gives row l%8 of matrix l/8 and gets of each
// matrix bytes 4 * (l%4) .. + 3 of row l/4, as mma_int8 wants them.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// A place in shared memory, as functions that are called are told it.
typedef u32 SharedPlace;
DEVICE SharedPlace place_in_shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE const u8* in_shared(SharedPlace place) { return (const u8*)__cvta_shared_to_generic(place); }
// A place whose address has some bits flipped; and load_matrices from `offset` bytes behind one.
DEVICE SharedPlace flipped(SharedPlace place, u32 bits) { return place ^ bits; }
DEVICE void load_matrices(u32 (&r)[4], SharedPlace row, int offset = 0) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row + offset)
                 : "memory");
}
// 16 bytes from global to shared memory in the background; zeros where not `wanted`.
DEVICE void copy_async(void* shared, const void* global, bool wanted = true) {
    u32 address = (u32)__cvta_generic_to_shared(shared), size = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(size) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
// A barrier of phases: one ends when so many threads have arrived, with parity 0 and 1 in turn.
DEVICE void init_phases(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"((u32)__cvta_generic_to_shared(barrier)), "r"(arrivals) : "memory");
}
DEVICE void arrive(u64* barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}
// Once what this thread copies in the background is there. What it wrote itself is not published by it.
DEVICE void arrive_with_copies(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
}
DEVICE bool is_phase_over(u64* barrier, u32 parity) {
    u32 address = (u32)__cvta_generic_to_shared(barrier), is_over;
#if ARCH >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
#endif
                 : "=r"(is_over)
                 : "r"(address), "r"(parity)
                 : "memory");
    return is_over;
}
#if ARCH >= 900
// Before bulk copies, by all threads: what they wrote to shared memory lies there before.
DEVICE void fence_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Arrives, and says how many bytes of bulk copies the phase also waits for.
DEVICE void expect_bulk(u64* barrier, u32 size) {
    u32 address = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(size) : "memory");
}
// Whether this is the lane elected to act for its warp; all 32 must ask together. The assembler then makes no loop over lanes.
DEVICE bool is_bulk_copier() {
    u32 is_one;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(is_one));
    return is_one;
}
constexpr int BULK_COPIERS = 1;  // lanes of a warp that are worth sharing a copy
// `size` bytes, all multiples of 16, from global to shared memory in the background. Most are weights, read once a step: they
// leave the L2 cache before what kernels hand each other.
DEVICE void copy_bulk(void* shared, const void* global, u32 size, u64* barrier, int = 0, int = 1) {
    u32 to = (u32)__cvta_generic_to_shared(shared), by = (u32)__cvta_generic_to_shared(barrier);
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(global), "r"(size), "r"(by), "l"(policy)
                 : "memory");
}
// The same to both blocks of a cluster of two, at the same place and with the same barrier there.
template <int X, int Y> DEVICE void copy_bulk_to_both(void* shared, const void* global, u32 size, u64* barrier) {
    u32 to = (u32)__cvta_generic_to_shared(shared), by = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(global), "r"(size), "r"(by), "h"((u16)3)
                 : "memory");
}
// What the other blocks of the cluster must find of a barrier before their copies tell it.
DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// All threads of the X * Y blocks of a cluster meet, a warp's at once; what they wrote is not ordered by it.
template <int X, int Y> DEVICE void arrive_in_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
template <int X, int Y> DEVICE void wait_in_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// `size` bytes to the same place in shared memory of the cluster's block that is next in x, whose barrier is told.
DEVICE void copy_bulk_to_next(void* shared, u32 size, u64* barrier) {
    u32 here = (u32)__cvta_generic_to_shared(shared), by = (u32)__cvta_generic_to_shared(barrier), rank, there, by_there;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank + 1));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(by_there) : "r"(by), "r"(rank + 1));
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there), "r"(here), "r"(size),
                 "r"(by_there)
                 : "memory");
}
#define CLUSTER(x, y) __cluster_dims__(x, y, 1)
constexpr bool HAS_CLUSTERS = true;
#endif
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE u32 highest_of_lanes(u32 v) {
    u32 highest;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(highest) : "r"(v));
    return highest;
}
// Adds and returns what was there. What this thread, and its block before a barrier, wrote is seen by whoever adds
// later, and it sees what they wrote who added before.
DEVICE int add_in_order(int* counter, int number) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(number)
                 : "memory");
    return before;
}
// The same without an answer: who sees the sum by wait_for sees what was written before.
DEVICE void add_after(int* counter, int number) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(number) : "memory");
}
DEVICE int read_after(const int* counter) {
    int number;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(number) : "l"(counter) : "memory");
    return number;
}
// Words that blocks of one launch hand each other, each on its own: what another block wrote is seen at some time.
DEVICE uint4 read_words(const u32* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
DEVICE u32 read_word(const u32* p) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(p) : "memory");
    return word;
}
// Two at once, each of which is whole.
DEVICE ulonglong2 read_long_words(const u64* p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}
DEVICE void write_long_words(u64* p, u64 a, u64 b) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1,%2};" ::"l"(p), "l"(a), "l"(b) : "memory");
}
DEVICE void write_word(u32* p, u32 word) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory"); }
DEVICE void let_others_run() {}  // between two looks at such words
// sum + the products of four unsigned and four signed bytes.
DEVICE int dot_of_bytes(u32 a, u32 b, int sum) {
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}
#else
typedef const void* SharedPlace;
DEVICE SharedPlace place_in_shared(const void* p) { return p; }
DEVICE const u8* in_shared(SharedPlace place) { return (const u8*)place; }
DEVICE void mma_int8(int (&d)[4], u32 a0, u32 a1, u32 b0, int c) { mma_int8(d, a0, a1, 0, 0, b0, 0, c); }
DEVICE SharedPlace flipped(SharedPlace place, u32 bits) { return (const void*)((u64)place ^ bits); }
DEVICE void load_matrices(u32 (&r)[4], const void* row, int offset = 0) {
    row = (const u8*)row + offset;
    int lane = threadIdx.x & 31;
    for (int i = 0; i < 4; i++) {
        u32 other = __shfl_sync(ALL_LANES, (u32)(u64)row, 8 * i + lane / 4);
        r[i] = ((const u32*)((const u8*)row + (int)(other - (u32)(u64)row)))[lane % 4];
    }
}
DEVICE u32 highest_of_lanes(u32 v) {
    for (int offset = 16; offset; offset >>= 1) v = max(v, __shfl_xor_sync(ALL_LANES, v, offset));
    return v;
}
DEVICE int add_in_order(int* counter, int number) { return atomicAdd(counter, number); }
DEVICE void add_after(int* counter, int number) { atomicAdd(counter, number); }
DEVICE int read_after(const int* counter) { return *counter; }
DEVICE uint4 read_words(const u32* p) { return *(const uint4*)p; }
DEVICE u32 read_word(const u32* p) { return *p; }
DEVICE ulonglong2 read_long_words(const u64* p) { return *(const ulonglong2*)p; }
DEVICE void write_word(u32* p, u32 word) { *p = word; }
DEVICE void write_long_words(u64* p, u64 a, u64 b) { *(ulonglong2*)p = make_ulonglong2(a, b); }
DEVICE int dot_of_bytes(u32 a, u32 b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int)(a >> i & 255) * (i8)(b >> i);
    return sum;
}
#endif

#if ARCH < 900
// Older GPUs have no bulk copies: pieces of 16 bytes by one thread or shared by `lanes`, whose own
// wait_copies or arrive_with_copies waits for them. They have no clusters either.
constexpr int BULK_COPIERS = 32;
DEVICE bool is_bulk_copier() { return true; }
DEVICE void fence_bulk() {}
DEVICE void expect_bulk(u64* barrier, u32) {  // all lanes that copy may say it, the first one arrives
    if ((threadIdx.x & 31) == 0) arrive(barrier);
}
DEVICE void copy_bulk(void* shared, const void* global, u32 size, u64*, int lane = 0, int lanes = 1) {
#pragma unroll 4
    for (u32 i = lane * 16; i < size; i += lanes * 16) copy_async((u8*)shared + i, (const u8*)global + i);
}
DEVICE void fence_barriers() {}
template <int X, int Y> DEVICE void copy_bulk_to_both(void*, const void*, u32, u64*) {}
template <int X, int Y> DEVICE void arrive_in_cluster() {}
template <int X, int Y> DEVICE void wait_in_cluster() {}
DEVICE void copy_bulk_to_next(void*, u32, u64*) {}
#define CLUSTER(x, y)
constexpr bool HAS_CLUSTERS = false;
#endif

// Between two looks at what another block writes. Where it never does, the launch ends with an error after
// a second or some.
DEVICE void look_again(u32& looks) {
    constexpr u32 MOST_LOOKS = 1u << 24;
    if (++looks == MOST_LOOKS) __trap();
    let_others_run();
}
// Numbers as words that are 0 until the number is there. None that is computed has all bits set; if one had, it would come
// as another NaN.
DEVICE void put_number(u32* word, float v) { write_word(word, max(~__float_as_uint(v), 1u)); }
DEVICE float number_of(u32 word) { return __uint_as_float(~word); }

// Until other blocks of the launch have made a counter so high.
DEVICE void wait_for(const int* counter, int number) {
    u32 looks = 0;
    while (read_after(counter) < number) look_again(looks);
    __syncwarp();
}

// Until the phase with this parity is over; by whole warps, whose lanes may see it at different times.
DEVICE void wait_phase(u64* barrier, u32 parity) {
    u32 looks = 0;
    while (!is_phase_over(barrier, parity)) {
        if (ARCH < 900) __nanosleep(100);  // a newer GPU's look waits by itself
        look_again(looks);
    }
    __syncwarp();
}

DEVICE float sum_of_lanes(float v) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(ALL_LANES, v, offset);
    return v;
}

// A kernel's launch numbers (layer, index in a stack): no operand, which would be one more read to wait for,
// but the size of the dynamic shared memory beyond FIXED bytes.
template <int FIXED> DEVICE int launch_number() { return (int)dynamic_shared_size() - FIXED; }

// Each lane's 8 numbers of a segment of 256: the sum of squares, the same in all lanes.
DEVICE float sum_of_squares(const float (&v)[8]) {
    float sum = v[0] * v[0];
#pragma unroll
    for (int i = 1; i < 8; i++) sum = fmaf(v[i], v[i], sum);
    return sum_of_lanes(sum);
}

// Round 32 numbers, NUM in each of 32 / NUM neighbouring lanes, to int8: the lane's codes, the scale and the sum of the
// 32 codes. code = round(v * (127 / max)), half to even; scale = max / 127.
template <int NUM> DEVICE void round_group(const float (&v)[NUM], u32 (&codes)[(NUM + 3) / 4], float& scale, int& sum) {
    float highest = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < NUM; i++) highest = fmaxf(highest, fabsf(v[i]));
#pragma unroll
    for (int lanes = 1; lanes < 32 / NUM; lanes *= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, lanes));
    float inverse = highest > 0 ? __fdiv_rn(127.f, highest) : 0.f;
    sum = 0;
#pragma unroll
    for (int i = 0; i < NUM; i++) {
        int code = __float2int_rn(v[i] * inverse);
        sum += code;
        codes[i >> 2] = (i & 3 ? codes[i >> 2] : 0u) | (u32)(code & 255) << (8 * (i & 3));
    }
#pragma unroll
    for (int lanes = 1; lanes < 32 / NUM; lanes *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    scale = highest * (1.f / 127.f);
}
DEVICE void quantise(const float (&v)[8], uint2& codes, float& scale, int& sum) {
    u32 words[2];
    round_group(v, words, scale, sum);
    codes = make_uint2(words[0], words[1]);
}

DEVICE void load8(float (&v)[8], const float* p) {
    float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// 1 / rms of a row of WIDTH numbers from the sums of squares of its segments, which are added ascending.
template <int WIDTH> DEVICE float inverse_rms(const float* segment_sums, float eps) {
    float sum = segment_sums[0];
#pragma unroll
    for (int i = 1; i < WIDTH / SEGMENT; i++) sum += segment_sums[i];
    return __fdiv_rn(1.f, __fsqrt_rn(sum * (1.f / WIDTH) + eps));
}

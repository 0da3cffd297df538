// What the kernels need of CUDA, on a CPU: each block's threads are fibers of one thread, which give way to each
// other only where a kernel waits (barriers and warp operations). Blocks run one after another, and by turns where
// one waits for others (let_others_run). emulator.py compiles a kernel behind this file.
#pragma once
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

// ---------------------------------------------------------------- words of the language
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// All of .bss is shared memory: it is filled with 0xFF before each block. `used` keeps the compiler from reasoning
// about who writes it.
#define __shared__ static __attribute__((used))
// The emulator's own variables must stay out of .bss.
#define EMULATOR_STATE static __attribute__((section("emulator_state")))

// One macro a vector type: the alignment is what a GPU demands.
#define EMULATOR_VECTORS(type, name, align2, align4)                                                              \
    struct alignas(sizeof(type)) name##1 { type x; };                                                            \
    struct alignas(align2) name##2 { type x, y; };                                                                \
    struct name##3 { type x, y, z; };                                                                             \
    struct alignas(align4) name##4 { type x, y, z, w; };                                                          \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                       \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                            \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned int, uint, 8, 16)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(double, double, 16, 16)
typedef uint3 dim3;

EMULATOR_STATE uint3 threadIdx = {0, 0, 0};
EMULATOR_STATE uint3 blockIdx = {0, 0, 0};
EMULATOR_STATE dim3 blockDim = {0, 0, 0};
EMULATOR_STATE dim3 gridDim = {0, 0, 0};
static const int warpSize = 32;

// ---------------------------------------------------------------- fibers
extern "C" {
// The kernel, with its parameters as pointers; both are written behind the kernel's source.
void emulated_kernel(void** parameters);
extern const int emulated_num_parameters, emulated_max_threads;
// Hidden: those of this library, not of the program that loads it.
__attribute__((visibility("hidden"))) extern char __bss_start[], _end[];
#define EMULATOR_SHARED_LIMIT (256 * 1024)
__attribute__((aligned(1024), used)) unsigned char emulator_dynamic_shared[EMULATOR_SHARED_LIMIT];
// Saves what the caller must find again on its stack, leaves the stack's top in *from and goes on at `to`.
void emulator_switch(void** from, void* to);
}
asm(R"(
    .pushsection .text
    .p2align 4
    .globl emulator_switch
    .hidden emulator_switch
    .type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
    .size emulator_switch, .-emulator_switch
    .popsection
)");

namespace emulator {

enum Wait { RUNNING, BARRIER, SHUFFLE, VOTE, SYNCWARP, MMA, LDMATRIX, PHASE, BLOCKS, RETURNED };
static const char* const WAIT_NAMES[] = {"nothing", "__syncthreads",   "a shuffle",    "a vote", "__syncwarp",
                                         "a mma",   "load_transposed", "a phase", "other blocks", "its end"};
static const int MAX_THREADS = 1024;
static const size_t STACK_SIZE = 128 * 1024 + 320;  // not a power of two: the tops must not share a cache set

struct Copy {
    void* to;
    const void* from;  // null: zeros
    int group;
};

struct Fiber {
    void* stack;
    int index, warp, lane;
    int parity;  // which half of the warp's slots its next operation uses
    Wait wait;
    int line;
    const char* file;
    int groups;              // committed
    int arrivals;            // at its cluster's barrier
    const uint64_t* phases;  // that it waits at
    std::vector<Copy> copies;
};

struct Mail {  // a bulk copy on its way to a block's shared memory
    void* to;
    const uint64_t* barrier;
    std::vector<char> bytes;
};
struct Traffic {  // one a block; `arrived` counts in the first of a cluster
    long arrived = 0;
    std::vector<Mail> mail;
    std::vector<uint64_t*> barriers;
};

struct Warp {
    uint32_t all, ready, waiting;
    Wait kind;
    // two sets: a lane can be one operation ahead of another
    uint32_t slots[2][32][8];
    int tile[2][16][8];
    double float_tile[2][16][8];
};

struct Array {
    const void* source;  // an input's bytes; null for an output that starts as poison
    void* result;        // where an output's bytes go; null for an input
    uint64_t size;
    int32_t same_as;  // the input whose memory this output shares, or -1
    int32_t unused;
};

struct Launch {
    int32_t grid[3];
    int32_t threads, shared_size, number, reversed, num_arrays;
    const Array* arrays;
    char* stacks;
    char* message;
    uint64_t message_size;
    uint64_t num_stacks;
    uint64_t code_address;  // out: where it failed, relative to the library; 0 unknown
};

// A block that waits for others, as it was left.
struct Block {
    long number;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<char> shared;
    int num_at_barrier, num_returned;

    explicit Block(int num_threads) : fibers(num_threads), warps((num_threads + 31) / 32) {}
};

EMULATOR_STATE Fiber* fibers = nullptr;
EMULATOR_STATE Warp* warps = nullptr;
EMULATOR_STATE Fiber* running = nullptr;
EMULATOR_STATE void* main_stack = nullptr;
EMULATOR_STATE void* abandoned = nullptr;
EMULATOR_STATE void** parameters = nullptr;
EMULATOR_STATE Launch* launch = nullptr;
EMULATOR_STATE uint32_t ready_warps = 0;
EMULATOR_STATE int num_threads = 0, num_at_barrier = 0, num_returned = 0, num_at_blocks = 0;
EMULATOR_STATE int num_steps = 0;  // that blocks made beside waiting for each other
EMULATOR_STATE std::vector<Traffic>* traffic = nullptr;
EMULATOR_STATE bool failed = false;
EMULATOR_STATE pthread_t runner = 0;
EMULATOR_STATE char* fault_address = nullptr;
EMULATOR_STATE bool fault_writes = false;

// What went wrong goes to the message, and the whole launch ends.
[[noreturn]] static void leave() {
    failed = true;
    emulator_switch(&abandoned, main_stack);
    __builtin_unreachable();
}
static size_t say(const char* format, ...) __attribute__((format(printf, 1, 2)));
static size_t say(const char* format, ...) {
    size_t length = strlen(launch->message);
    va_list values;
    va_start(values, format);
    vsnprintf(launch->message + length, launch->message_size - length, format, values);
    va_end(values);
    return length;
}
static void say_where() {
    say("thread %u of block (%u, %u, %u): ", threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
}
static const char* base_name(const char* path) {
    const char* slash = path ? strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
}
#define EMULATOR_FAIL(...) (emulator::say_where(), emulator::say(__VA_ARGS__), emulator::leave())

// Every thread waits or has returned, and nothing can go on.
static void say_stuck() {
    say("deadlock in block (%u, %u, %u):", blockIdx.x, blockIdx.y, blockIdx.z);
    const char* separator = " ";
    std::vector<bool> told(num_threads, false);
    for (int i = 0; i < num_threads; i++) {
        if (told[i]) continue;
        int count = 0;
        for (int j = i; j < num_threads; j++) {
            bool same = fibers[j].wait == fibers[i].wait;
            if (same && fibers[i].wait != RETURNED) same = fibers[j].line == fibers[i].line;
            if (same) told[j] = true, count++;
        }
        if (fibers[i].wait == RETURNED)
            say("%s%d threads returned (the first is thread %d)", separator, count, i);
        else
            say("%s%d threads wait at %s in %s:%d (the first is thread %d)", separator, count,
                WAIT_NAMES[fibers[i].wait], base_name(fibers[i].file), fibers[i].line, i);
        separator = "; ";
    }
}
[[noreturn]] static void stuck() {
    say_stuck();
    leave();
}

static inline int pick(uint32_t mask) {
    return launch->reversed ? 31 - __builtin_clz(mask) : __builtin_ctz(mask);
}
static void run_next() {
    Fiber& from = *running;
    int w = from.warp;
    if (!warps[w].ready) {
        if (!ready_warps && num_at_blocks) {
            emulator_switch(&from.stack, main_stack);
            return;
        }
        if (!ready_warps) stuck();
        w = pick(ready_warps);
    }
    int lane = pick(warps[w].ready);
    warps[w].ready &= ~(1u << lane);
    if (!warps[w].ready) ready_warps &= ~(1u << w);
    running = &fibers[w * 32 + lane];
    running->wait = RUNNING;
    threadIdx.x = running->index;
    emulator_switch(&from.stack, running->stack);
}

// The barrier opens once every thread waits there or has returned.
static void open_barrier() {
    if (!num_at_barrier || num_at_barrier + num_returned < num_threads) return;
    num_at_barrier = 0;
    for (int i = 0; i < num_threads; i++)
        if (fibers[i].wait == BARRIER && &fibers[i] != running) {
            warps[i / 32].ready |= 1u << (i % 32);
            ready_warps |= 1u << (i / 32);
        }
    if (running->wait == BARRIER) running->wait = RUNNING;
}
__attribute__((noinline)) static void barrier(int line, const char* file) {
    running->wait = BARRIER, running->line = line, running->file = file;
    num_at_barrier++, num_steps++;
    open_barrier();
    if (running->wait == BARRIER) run_next();
}

// A barrier of phases: how many have to arrive, how many still have to, the phase, and the bytes that still have to come.
struct Phases {
    uint16_t all, left : 15, phase : 1;
    int32_t bytes;
};
static Traffic& traffic_of(unsigned x, unsigned y) { return traffic->at(((size_t)blockIdx.z * gridDim.y + y) * gridDim.x + x); }
static void init_phases(uint64_t* p, int arrivals) {
    *(Phases*)p = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0};
    traffic_of(blockIdx.x, blockIdx.y).barriers.push_back(p);
}
static void wake(const uint64_t* p) {
    for (int i = 0; i < num_threads; i++)
        if (fibers[i].wait == PHASE && fibers[i].phases == p) warps[i / 32].ready |= 1u << (i % 32), ready_warps |= 1u << (i / 32);
}
static void end_phase_if_over(uint64_t* p) {
    Phases& phases = *(Phases*)p;
    num_steps++;
    if (phases.left || phases.bytes > 0) return;
    if (phases.bytes) EMULATOR_FAIL("%d bytes more than a phase expects were copied", -phases.bytes);
    phases.left = phases.all, phases.phase ^= 1;
    wake(p);
}
static void arrive(uint64_t* p, int bytes, int line, const char* file) {
    Phases& phases = *(Phases*)p;
    if (!phases.left) EMULATOR_FAIL("an arrival too many in %s:%d", base_name(file), line);
    phases.left--, phases.bytes += bytes;
    end_phase_if_over(p);
}
// What is on its way to the barrier's block comes.
static void receive(uint64_t* p) {
    std::vector<Mail>& all = traffic_of(blockIdx.x, blockIdx.y).mail;
    std::vector<Mail> mail, others;
    for (Mail& one : all) (one.barrier == p ? mail : others).push_back(std::move(one));
    all = std::move(others);
    for (const Mail& one : mail) memcpy(one.to, one.bytes.data(), one.bytes.size()), ((Phases*)p)->bytes -= (int)one.bytes.size();
    if (!mail.empty()) end_phase_if_over(p);
}
__attribute__((noinline)) static void wait_for_blocks(int line, const char* file);
__attribute__((noinline)) static void wait_phase(uint64_t* p, uint32_t parity, int line, const char* file) {
    while (((Phases*)p)->phase == parity) {
        receive(p);
        if (((Phases*)p)->phase != parity) break;
        if (running->arrivals) {  // the other block of the cluster may copy here
            wait_for_blocks(line, file);
        } else {
            running->wait = PHASE, running->phases = p, running->line = line, running->file = file;
            run_next();
        }
    }
}

// The thread looks again when other blocks have run.
__attribute__((noinline)) static void wait_for_blocks(int line, const char* file) {
    running->wait = BLOCKS, running->line = line, running->file = file;
    num_at_blocks++;
    run_next();
}

// A warp operation: the last lane to come does `finish` for all.
template <class Finish> static inline void meet(Wait kind, int line, const char* file, Finish finish) {
    Fiber& me = *running;
    Warp& warp = warps[me.warp];
    me.line = line, me.file = file;
    num_steps++;
    if (warp.waiting && warp.kind != kind)
        EMULATOR_FAIL("is at %s in %s:%d while other lanes of its warp wait at %s", WAIT_NAMES[kind],
                      base_name(file), line, WAIT_NAMES[warp.kind]);
    warp.kind = kind;
    warp.waiting |= 1u << me.lane;
    me.parity ^= 1;
    if (warp.waiting == warp.all) {
        finish(warp, me.parity ^ 1);
        warp.waiting = 0;
        warp.ready = warp.all & ~(1u << me.lane);
        if (warp.ready) ready_warps |= 1u << me.warp;
    } else {
        me.wait = kind;
        run_next();
    }
}
struct Nothing {
    void operator()(Warp&, int) const {}
};
static inline uint32_t* slot() { return warps[running->warp].slots[running->parity][running->lane]; }

static void check_mask(uint32_t mask, int line, const char* file) {
    uint32_t all = warps[running->warp].all;
    if ((mask & all) != all)
        EMULATOR_FAIL("a mask of %08x in %s:%d: only all lanes at once are emulated", mask, base_name(file), line);
}
template <class T> static inline T exchange(T value, int source, int line, const char* file) {
    static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "shuffles take numbers");
    memcpy(slot(), &value, sizeof(T));
    int parity = running->parity;
    meet(SHUFFLE, line, file, Nothing());
    Warp& warp = warps[running->warp];
    if (!(warp.all >> source & 1)) source = running->lane;
    memcpy(&value, warp.slots[parity][source], sizeof(T));
    return value;
}
__attribute__((noinline)) static uint32_t vote(bool value, int line, const char* file) {
    *slot() = value;
    int parity = running->parity;
    meet(VOTE, line, file, [](Warp& warp, int half) {
        uint32_t mask = 0;
        for (int i = 0; i < 32; i++) mask |= (warp.all >> i & 1 & warp.slots[half][i][0]) << i;
        warp.tile[half][0][0] = (int)mask;
    });
    return (uint32_t)warps[running->warp].tile[parity][0][0];
}

static bool is_shared(const void* address, size_t size) {
    const char* p = (const char*)address;
    const char* dynamic = (const char*)emulator_dynamic_shared;
    if (p >= dynamic && p < dynamic + EMULATOR_SHARED_LIMIT) return p + size <= dynamic + launch->shared_size;
    return p >= __bss_start && p + size <= _end;
}
static void complete(Fiber& me, int up_to) {
    size_t kept = 0;
    for (const Copy& copy : me.copies) {
        if (copy.group >= up_to)
            me.copies[kept++] = copy;
        else if (copy.from)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
    }
    me.copies.resize(kept);
}

// ---------------------------------------------------------------- a launch
static void fiber_main() {
    emulated_kernel(parameters);
    running->wait = RETURNED;
    num_returned++;
    if (num_returned == num_threads) emulator_switch(&abandoned, main_stack);
    open_barrier();
    run_next();
}
static void prepare_fiber(int i, int place) {
    Fiber& fiber = fibers[i];
    fiber.index = i, fiber.warp = i / 32, fiber.lane = i % 32;
    fiber.parity = 0, fiber.wait = RUNNING, fiber.groups = 0, fiber.arrivals = 0;
    fiber.copies.clear();
    void** top = (void**)((uintptr_t)(launch->stacks + ((long)place * num_threads + i + 1) * STACK_SIZE - 64) & ~(uintptr_t)15);
    *--top = nullptr;  // where fiber_main would return to
    *--top = (void*)fiber_main;
    for (int j = 0; j < 6; j++) *--top = nullptr;
    fiber.stack = top;
}
// Shared memory lies in three pieces: before the dynamic part, that part with its guard, behind it.
struct Piece {
    char* start;
    size_t size;
};
static std::vector<Piece> shared_pieces() {
    char* dynamic = (char*)emulator_dynamic_shared;
    char* behind = dynamic + EMULATOR_SHARED_LIMIT;
    return {{__bss_start, size_t(dynamic - __bss_start)}, {dynamic, size_t(launch->shared_size + 1024)}, {behind, size_t(_end - behind)}};
}
static void check_shared_guard() {
    const unsigned char* guard = emulator_dynamic_shared + launch->shared_size;
    for (int i = 0; i < 1024; i++)
        if (guard[i] != 0xFF && !failed) {
            say("block (%u, %u, %u) wrote byte %d of its %d bytes of dynamic shared memory", blockIdx.x, blockIdx.y,
                blockIdx.z, launch->shared_size + i, launch->shared_size);
            failed = true;
        }
}
static void check_barriers() {
    for (const uint64_t* p : traffic_of(blockIdx.x, blockIdx.y).barriers) {
        const Phases& phases = *(const Phases*)p;
        if (failed || (phases.left == phases.all && !phases.bytes)) continue;
        say("block (%u, %u, %u) left a phase with %d of %d arrivals and %d bytes to come", blockIdx.x, blockIdx.y, blockIdx.z,
            phases.left, phases.all, phases.bytes);
        failed = true;
    }
}
static void check_mail() {
    for (const Traffic& one : *traffic)
        if (!failed && !one.mail.empty()) say("%d bytes were copied that no thread waited for", (int)one.mail[0].bytes.size()), failed = true;
}
static void set_block(Block& block) {
    long x = launch->grid[0], y = launch->grid[1], number = block.number;
    blockIdx = {(unsigned)(number % x), (unsigned)(number / x % y), (unsigned)(number / x / y)};
    fibers = block.fibers.data(), warps = block.warps.data();
}
static void begin_block(Block& block, int place) {
    set_block(block);
    num_at_barrier = num_returned = num_at_blocks = 0;
    ready_warps = 0;
    for (const Piece& piece : shared_pieces()) memset(piece.start, 0xFF, piece.size);
    for (int i = 0; i < num_threads; i++) prepare_fiber(i, place);
    for (int w = 0; w * 32 < num_threads; w++) {
        int lanes = num_threads - w * 32;
        warps[w].all = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
        warps[w].ready = warps[w].all;
        warps[w].waiting = 0;
        ready_warps |= 1u << w;
    }
}
// Runs the block until it ends or waits for others; whether it has ended.
static bool run_block() {
    Fiber outside = {};
    outside.warp = pick(ready_warps);
    int lane = pick(warps[outside.warp].ready);
    warps[outside.warp].ready &= ~(1u << lane);
    if (!warps[outside.warp].ready) ready_warps &= ~(1u << outside.warp);
    running = &fibers[outside.warp * 32 + lane];
    running->wait = RUNNING;
    threadIdx.x = running->index;
    emulator_switch(&main_stack, running->stack);
    if (failed || num_returned < num_threads) return false;
    check_shared_guard();
    check_barriers();
    return true;
}
static void leave_block(Block& block) {
    block.num_at_barrier = num_at_barrier, block.num_returned = num_returned;
    block.shared.clear();
    for (const Piece& piece : shared_pieces()) block.shared.insert(block.shared.end(), piece.start, piece.start + piece.size);
}
static void enter_block(Block& block) {
    set_block(block);
    num_at_barrier = block.num_at_barrier, num_returned = block.num_returned, num_at_blocks = 0;
    const char* from = block.shared.data();
    for (const Piece& piece : shared_pieces()) memcpy(piece.start, from, piece.size), from += piece.size;
    ready_warps = 0;
    for (int i = 0; i < num_threads; i++)
        if (fibers[i].wait == BLOCKS) warps[i / 32].ready |= 1u << (i % 32), ready_warps |= 1u << (i / 32);
}
// Lets the waiting blocks go on, each in turn, until all have ended.
static void run_waiting(std::vector<std::unique_ptr<Block>> waiting) {
    static const int MOST_IDLE_TURNS = 8;
    for (int idle = 0; !waiting.empty(); idle++) {
        int before = num_steps;
        std::vector<std::unique_ptr<Block>> still;
        for (std::unique_ptr<Block>& block : waiting) {
            enter_block(*block);
            if (run_block()) {
                num_steps++;
                continue;
            }
            if (failed) return;
            leave_block(*block);
            still.push_back(std::move(block));
        }
        waiting = std::move(still);
        if (num_steps != before) idle = 0;
        if (idle > MOST_IDLE_TURNS) {
            say_stuck();
            failed = true;
            return;
        }
    }
}
// One block after the other; those that wait for others go on by turns. When there is room for but one more, blocks come
// from the grid's other end: they may be what is waited for.
static void run_grid() {
    long count = (long)launch->grid[0] * launch->grid[1] * launch->grid[2];
    std::vector<std::unique_ptr<Block>> waiting;
    std::unique_ptr<Block> block;
    for (long first = 0, last = count - 1; first <= last && !failed;) {
        bool is_full = (waiting.size() + 2) * num_threads > launch->num_stacks;
        if ((waiting.size() + 1) * num_threads > launch->num_stacks) {
            say("%d blocks wait for others: more than are emulated", (int)waiting.size());
            failed = true;
            return;
        }
        if (!block) block.reset(new Block(num_threads));
        block->number = (launch->reversed != 0) != is_full ? last-- : first++;
        begin_block(*block, (int)waiting.size());
        if (run_block() || failed) continue;
        leave_block(*block);
        waiting.push_back(std::move(block));
    }
    if (!failed) run_waiting(std::move(waiting));
}

// Each array lies at the end of pages of its own, between pages that cannot be touched.
static const uint64_t PAGE = 4096;
struct Memory {
    char* base;
    char* start;  // of the array
    uint64_t pages;
};
static uint64_t padded(uint64_t size) { return (size + 255) / 256 * 256; }
static Memory reserve(const Array& array) {
    Memory memory;
    memory.pages = (padded(array.size) + PAGE - 1) / PAGE + (array.size == 0);
    memory.base = (char*)mmap(nullptr, (memory.pages + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* first = memory.base + PAGE;
    mprotect(first, memory.pages * PAGE, PROT_READ | PROT_WRITE);
    memory.start = first + memory.pages * PAGE - padded(array.size);
    memset(first, 0xFF, memory.start - first);
    memset(memory.start + array.size, 0xFF, padded(array.size) - array.size);
    if (array.source)
        memcpy(memory.start, array.source, array.size);
    else
        memset(memory.start, 0xFF, array.size);
    return memory;
}
static void say_array(int index) {
    int num_inputs = 0;
    while (num_inputs < launch->num_arrays && !launch->arrays[num_inputs].result) num_inputs++;
    if (index < num_inputs)
        say("input %d (%lu bytes)", index, (unsigned long)launch->arrays[index].size);
    else
        say("output %d (%lu bytes)", index - num_inputs, (unsigned long)launch->arrays[index].size);
}
static void check_guards(const std::vector<Memory>& memories) {
    for (size_t i = 0; i < memories.size() && !failed; i++) {
        const Memory& memory = memories[i];
        if (!memory.base) continue;
        long size = launch->arrays[i].size, begin = memory.base + PAGE - memory.start;
        for (long at = begin; at < (long)padded(size) && !failed; at++) {
            if ((at >= 0 && at < size) || (unsigned char)memory.start[at] == 0xFF) continue;
            say("something was written at byte %ld of ", at);
            say_array(i);
            failed = true;
        }
    }
}
static void say_fault(const std::vector<Memory>& memories) {
    say_where();
    say("%s ", fault_writes ? "writes" : "reads");
    for (size_t i = 0; i < memories.size(); i++) {
        const Memory& memory = memories[i];
        if (!memory.base || fault_address < memory.base || fault_address >= memory.base + (memory.pages + 2) * PAGE)
            continue;
        say("byte %ld of ", (long)(fault_address - memory.start));
        say_array(i);
        return;
    }
    say("address %p, which is in no array", (void*)fault_address);
}
static void on_fault(int signal_number, siginfo_t* details, void* context) {
    if (!pthread_equal(runner, pthread_self()) || !launch) {
        signal(signal_number, SIG_DFL);
        return;
    }
    const greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    fault_address = (char*)details->si_addr;
    fault_writes = registers[REG_ERR] & 2;
    launch->code_address = registers[REG_RIP];
    leave();
}
static void with_fault_handler(void (*work)()) {
    static const size_t size = 64 * 1024;
    stack_t ours = {}, theirs = {};
    ours.ss_sp = malloc(size), ours.ss_size = size;
    struct sigaction action = {}, old_segv, old_bus;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    runner = pthread_self();
    sigaltstack(&ours, &theirs);
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    work();
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&theirs, nullptr);
    free(ours.ss_sp);
}
static bool check_launch() {
    const Launch& l = *launch;
    if (l.threads < 1 || l.threads > MAX_THREADS)
        say("%d threads a block, must be 1 to %d", l.threads, MAX_THREADS);
    else if (emulated_max_threads && l.threads > emulated_max_threads)
        say("%d threads a block, but the kernel's bound is %d", l.threads, emulated_max_threads);
    else if (l.num_arrays != emulated_num_parameters)
        say("%d arrays, but the kernel has %d parameters", l.num_arrays, emulated_num_parameters);
    else if (l.shared_size < 0 || l.number < 0 || l.shared_size + l.number > 232448)
        say("%d + %d bytes of dynamic shared memory, must be 0 to 232448", l.shared_size, l.number);
    else if (l.grid[0] < 1 || l.grid[1] < 1 || l.grid[2] < 1 || l.grid[1] > 65535 || l.grid[2] > 65535)
        say("a grid of (%d, %d, %d)", l.grid[0], l.grid[1], l.grid[2]);
    else
        return true;
    return false;
}
static void begin(Launch* now) {
    launch = now;
    launch->message[0] = 0;
    launch->code_address = 0;
    failed = false, fault_address = nullptr;
    num_threads = launch->threads;
    blockDim = {(unsigned)num_threads, 1, 1};
    gridDim = {(unsigned)launch->grid[0], (unsigned)launch->grid[1], (unsigned)launch->grid[2]};
}
static bool run(Launch* now) {
    begin(now);
    if (!check_launch()) return false;
    std::vector<Memory> memories;
    std::vector<void*> pointers;
    for (int i = 0; i < launch->num_arrays; i++) {
        const Array& array = launch->arrays[i];
        memories.push_back(array.same_as >= 0 ? Memory{nullptr, memories[array.same_as].start, 0} : reserve(array));
        pointers.push_back(memories[i].start);
    }
    for (int i = 0; i < launch->num_arrays; i++) {  // an input that no output shares may only be read
        bool written = launch->arrays[i].result;
        for (int j = 0; j < launch->num_arrays; j++) written |= launch->arrays[j].same_as == i;
        if (!written) mprotect(memories[i].base + PAGE, memories[i].pages * PAGE, PROT_READ);
    }
    parameters = pointers.data();
    std::vector<Traffic> all_traffic((size_t)launch->grid[0] * launch->grid[1] * launch->grid[2]);
    traffic = &all_traffic;
    with_fault_handler(run_grid);
    if (!failed) check_mail();
    if (fault_address || launch->code_address) say_fault(memories);
    if (!failed) check_guards(memories);
    for (size_t i = 0; i < memories.size(); i++) {
        const Array& array = launch->arrays[i];
        if (array.result && !failed) memcpy(array.result, memories[i].start, array.size);
    }
    for (const Memory& memory : memories)
        if (memory.base) munmap(memory.base, (memory.pages + 2) * PAGE);
    if (launch->code_address) launch->code_address -= (uint64_t)__bss_start;
    return !failed;
}
template <class... P, size_t... I>
static void call_with(void (*kernel)(P...), void** pointers, std::index_sequence<I...>) {
    static_assert((std::is_pointer<P>::value && ...), "a kernel's parameters are pointers");
    kernel((P)pointers[I]...);
}
template <class... P> static void call(void (*kernel)(P...), void** pointers) {
    call_with(kernel, pointers, std::index_sequence_for<P...>());
}
template <class... P> constexpr int num_parameters(void (*)(P...)) { return sizeof...(P); }
}  // namespace emulator

extern "C" {
__attribute__((visibility("default"))) int emulator_run(emulator::Launch* launch) { return emulator::run(launch); }
// For the address of a fault: where .bss begins in memory.
struct EmulatorPlace { const char* file; uint32_t line, column; };
struct EmulatorMismatch { EmulatorPlace place; void* type; unsigned char log_alignment, kind; };
// The compiler's checks call these.
__attribute__((used)) void __ubsan_handle_type_mismatch_v1_abort(EmulatorMismatch* check, uintptr_t address) {
    EMULATOR_FAIL("%s:%u: an access through %p, which is not a multiple of %d", emulator::base_name(check->place.file),
                  check->place.line, (void*)address, 1 << check->log_alignment);
}
__attribute__((used)) void __ubsan_handle_out_of_bounds_abort(EmulatorPlace* place, uintptr_t index) {
    EMULATOR_FAIL("%s:%u: index %ld is outside of its array", emulator::base_name(place->file), place->line, (long)index);
}
__attribute__((used)) void __ubsan_handle_shift_out_of_bounds_abort(EmulatorPlace* place, uintptr_t, uintptr_t by) {
    EMULATOR_FAIL("%s:%u: a shift by %ld", emulator::base_name(place->file), place->line, (long)by);
}
__attribute__((used)) void __ubsan_handle_divrem_overflow_abort(EmulatorPlace* place, uintptr_t, uintptr_t) {
    EMULATOR_FAIL("%s:%u: a division by zero", emulator::base_name(place->file), place->line);
}
}

// ---------------------------------------------------------------- built-in functions
#define EMULATOR_CALLER int line = __builtin_LINE(), const char* file = __builtin_FILE()
static inline void __syncthreads(EMULATOR_CALLER) { emulator::barrier(line, file); }
static inline void __syncwarp(uint32_t mask = 0xffffffffu, EMULATOR_CALLER) {
    emulator::check_mask(mask, line, file);
    emulator::meet(emulator::SYNCWARP, line, file, emulator::Nothing());
}
template <class T>
static inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMULATOR_CALLER) {
    emulator::check_mask(mask, line, file);
    int lane = emulator::running->lane;
    return emulator::exchange(value, (lane & ~(width - 1)) | (source & (width - 1)), line, file);
}
template <class T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int other, int width = 32, EMULATOR_CALLER) {
    emulator::check_mask(mask, line, file);
    int lane = emulator::running->lane, source = (lane ^ other) & 31;
    return emulator::exchange(value, source > (lane | (width - 1)) ? lane : source, line, file);
}
template <class T>
static inline T __shfl_up_sync(uint32_t mask, T value, uint32_t delta, int width = 32, EMULATOR_CALLER) {
    emulator::check_mask(mask, line, file);
    int lane = emulator::running->lane, source = lane - (int)delta;
    return emulator::exchange(value, source < (lane & ~(width - 1)) ? lane : source, line, file);
}
template <class T>
static inline T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, int width = 32, EMULATOR_CALLER) {
    emulator::check_mask(mask, line, file);
    int lane = emulator::running->lane, source = lane + (int)delta;
    return emulator::exchange(value, source > (lane | (width - 1)) ? lane : source, line, file);
}
static inline uint32_t __ballot_sync(uint32_t mask, bool value, EMULATOR_CALLER) {
    emulator::check_mask(mask, line, file);
    return emulator::vote(value, line, file);
}
static inline int __any_sync(uint32_t mask, bool value, EMULATOR_CALLER) {
    return __ballot_sync(mask, value, line, file) != 0;
}
static inline int __all_sync(uint32_t mask, bool value, EMULATOR_CALLER) {
    return __ballot_sync(mask, !value, line, file) == 0;
}

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void __nanosleep(unsigned) {}
[[noreturn]] static inline void __trap(EMULATOR_CALLER) {
    EMULATOR_FAIL("__trap in %s:%d", emulator::base_name(file), line);
}
static inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }

template <class T> using EmulatorSame = typename std::enable_if<true, T>::type;
#define EMULATOR_ATOMIC(name, expression)                                                                         \
    template <class T> static inline T name(T* p, EmulatorSame<T> v) {                                            \
        T old = *p;                                                                                               \
        *p = expression;                                                                                          \
        return old;                                                                                               \
    }
EMULATOR_ATOMIC(atomicAdd, (T)(old + v))
EMULATOR_ATOMIC(atomicSub, (T)(old - v))
EMULATOR_ATOMIC(atomicMax, old > v ? old : v)
EMULATOR_ATOMIC(atomicMin, old < v ? old : v)
EMULATOR_ATOMIC(atomicExch, v)
EMULATOR_ATOMIC(atomicOr, old | v)
EMULATOR_ATOMIC(atomicAnd, old & v)
EMULATOR_ATOMIC(atomicXor, old ^ v)
EMULATOR_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T> static inline T atomicCAS(T* p, EmulatorSame<T> compare, EmulatorSame<T> v) {
    T old = *p;
    if (old == compare) *p = v;
    return old;
}

template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline T __ldca(const T* p) { return *p; }
template <class T> static inline T __ldcv(const T* p) { return *p; }
template <class T> static inline void __stcg(T* p, EmulatorSame<T> v) { *p = v; }
template <class T> static inline void __stcs(T* p, EmulatorSame<T> v) { *p = v; }
template <class T> static inline void __stwt(T* p, EmulatorSame<T> v) { *p = v; }

static inline int __float_as_int(float v) { int bits; memcpy(&bits, &v, 4); return bits; }
static inline uint32_t __float_as_uint(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
static inline float __int_as_float(int bits) { float v; memcpy(&v, &bits, 4); return v; }
static inline float __uint_as_float(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
static inline int emulator_to_int(float v) {  // as a GPU: to the nearest that there is
    if (v != v) return 0;
    return v >= 2147483648.f ? 2147483647 : v <= -2147483648.f ? -2147483647 - 1 : (int)v;
}
static inline int __float2int_rn(float v) { return emulator_to_int(rintf(v)); }
static inline int __float2int_rz(float v) { return emulator_to_int(truncf(v)); }
static inline int __float2int_rd(float v) { return emulator_to_int(floorf(v)); }
static inline int __float2int_ru(float v) { return emulator_to_int(ceilf(v)); }
static inline float __int2float_rn(int v) { return (float)v; }
static inline float __uint2float_rn(uint32_t v) { return (float)v; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float v) { return sqrtf(v); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __frcp_rn(float v) { return 1.f / v; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
#define __expf expf
#define __logf logf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
static inline float __saturatef(float v) { return v > 0.f ? (v < 1.f ? v : 1.f) : 0.f; }
static inline int __popc(uint32_t v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
static inline uint32_t __brev(uint32_t v) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
static inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t n) {
    return (uint32_t)((((uint64_t)high << 32 | low) << (n & 31)) >> 32);
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t n) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (n & 31));
}
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t choice = selector >> (4 * i) & 15, byte = bytes >> (8 * (choice & 7)) & 255;
        r |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return r;
}
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> (8 * i)) * (int8_t)(b >> (8 * i));
    return c;
}
static inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; i++) c += (uint32_t)(uint8_t)(a >> (8 * i)) * (uint8_t)(b >> (8 * i));
    return c;
}
#define EMULATOR_MIN_MAX(type, a, b)                                                                              \
    static inline type min(a x, b y) { return (type)x < (type)y ? (type)x : (type)y; }                            \
    static inline type max(a x, b y) { return (type)x > (type)y ? (type)x : (type)y; }
EMULATOR_MIN_MAX(int, int, int)
EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EMULATOR_MIN_MAX(unsigned, int, unsigned)
EMULATOR_MIN_MAX(unsigned, unsigned, int)
EMULATOR_MIN_MAX(long, long, long)
EMULATOR_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATOR_MIN_MAX(long long, long long, long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }
static inline double min(double x, double y) { return fmin(x, y); }
static inline double max(double x, double y) { return fmax(x, y); }

// ---------------------------------------------------------------- what common.cuh has as assembly
static inline void let_others_run(EMULATOR_CALLER) { emulator::wait_for_blocks(line, file); }
static inline void init_phases(unsigned long long* p, int arrivals) { emulator::init_phases((uint64_t*)p, arrivals); }
static inline void arrive(unsigned long long* p, EMULATOR_CALLER) { emulator::arrive((uint64_t*)p, 0, line, file); }
static inline void arrive_with_copies(unsigned long long* p, EMULATOR_CALLER) {
    emulator::complete(*emulator::running, emulator::running->groups + 1);
    emulator::arrive((uint64_t*)p, 0, line, file);
}
// The look waits until it is.
static inline bool is_phase_over(unsigned long long* p, unsigned parity, EMULATOR_CALLER) {
    emulator::wait_phase((uint64_t*)p, parity, line, file);
    return true;
}
#if EMULATED >= 900
// Bulk copies, and clusters of X * Y blocks, two at most. What is copied lies there when it has been waited for.
constexpr int BULK_COPIERS = 1;
constexpr bool HAS_CLUSTERS = true;
#define CLUSTER(x, y)
namespace emulator {
template <int X, int Y> static inline Traffic& first_of_cluster() {
    if (gridDim.x % X || gridDim.y % Y) EMULATOR_FAIL("a grid that is not made of whole clusters");
    return traffic_of(blockIdx.x / X * X, blockIdx.y / Y * Y);
}
static inline void send(Traffic& to, void* shared, const void* bytes, size_t size, const void* barrier, int line, const char* file) {
    if (((uintptr_t)shared & 15) || ((uintptr_t)bytes & 15) || size % 16 || !is_shared(shared, size))
        EMULATOR_FAIL("a bulk copy in %s:%d takes aligned bytes to shared memory", base_name(file), line);
    to.mail.push_back({shared, (const uint64_t*)barrier, std::vector<char>((const char*)bytes, (const char*)bytes + size)});
    num_steps++;
    if (&to != &traffic_of(blockIdx.x, blockIdx.y)) return;
    memset(shared, 0xFF, size);
    wake((const uint64_t*)barrier);
}
}  // namespace emulator
static inline bool is_bulk_copier(EMULATOR_CALLER) {
    __syncwarp(0xffffffffu, line, file);
    return emulator::running->lane == (emulator::launch->reversed ? 31 : 0);
}
static inline void fence_bulk() {}
static inline void fence_barriers() {}
static inline void expect_bulk(unsigned long long* p, uint32_t size, EMULATOR_CALLER) { emulator::arrive((uint64_t*)p, (int)size, line, file); }
static inline void copy_bulk(void* shared, const void* global, uint32_t size, unsigned long long* barrier, int = 0, int = 1, EMULATOR_CALLER) {
    emulator::send(emulator::traffic_of(blockIdx.x, blockIdx.y), shared, global, size, barrier, line, file);
}
template <int X, int Y> static inline void arrive_in_cluster(EMULATOR_CALLER) {
    __syncwarp(0xffffffffu, line, file);
    emulator::first_of_cluster<X, Y>().arrived++, emulator::running->arrivals++, emulator::num_steps++;
}
template <int X, int Y> static inline void wait_in_cluster(EMULATOR_CALLER) {
    __syncwarp(0xffffffffu, line, file);
    while (emulator::first_of_cluster<X, Y>().arrived < (long)emulator::running->arrivals * X * Y * emulator::num_threads)
        emulator::wait_for_blocks(line, file);
}
template <int X, int Y> static inline void copy_bulk_to_both(void* shared, const void* global, uint32_t size, unsigned long long* barrier, EMULATOR_CALLER) {
    emulator::send(emulator::traffic_of(blockIdx.x, blockIdx.y), shared, global, size, barrier, line, file);
    emulator::send(emulator::traffic_of(blockIdx.x ^ (X - 1), blockIdx.y ^ (Y - 1)), shared, global, size, barrier, line, file);
}
static inline void copy_bulk_to_next(void* shared, uint32_t size, unsigned long long* barrier, EMULATOR_CALLER) {
    emulator::send(emulator::traffic_of(blockIdx.x + 1, blockIdx.y), shared, shared, size, barrier, line, file);
}
#endif
static inline uint32_t dynamic_shared_size() { return emulator::launch->shared_size + emulator::launch->number; }
static inline float half_to_float(unsigned short bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    float v = (float)fraction * 0x1p-24f;
    return sign ? -v : v;
}
static inline unsigned short emulator_to_half(float value) {  // to the nearest, ties to even
    uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return 0x7fff;
    if (rest >= 0x477ff000) return (unsigned short)(sign | 0x7c00);
    if (rest < 0x38800000)  // below the smallest normal half: a multiple of 2^-24
        return (unsigned short)(sign | (uint32_t)rintf(__uint_as_float(rest) * 0x1p24f));
    rest += 0xfff + (rest >> 13 & 1);
    return (unsigned short)(sign | ((rest >> 13) - (112 << 10)));
}
static inline unsigned short float_to_bfloat16(float value) {
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline uint32_t pack_bfloat16(float low, float high) {
    return float_to_bfloat16(low) | (uint32_t)float_to_bfloat16(high) << 16;
}
static inline uint32_t pack_half(float low, float high) {
    return emulator_to_half(low) | (uint32_t)emulator_to_half(high) << 16;
}

namespace emulator {
typedef int Ints __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
template <class Code> static void multiply_codes(Warp& warp, int half) {
    static const int M = 16, K = 32;
    int a[M][K];
    Ints b[K];
    for (int lane = 0; lane < 32; lane++) {
        const Code* rows = (const Code*)warp.slots[half][lane];
        const int8_t* codes = (const int8_t*)rows;
        int row = lane / 4, k = lane % 4 * 4;
        for (int i = 0; i < 4; i++) {
            a[row][k + i] = rows[i], a[row + 8][k + i] = rows[4 + i];
            a[row][k + 16 + i] = rows[8 + i], a[row + 8][k + 16 + i] = rows[12 + i];
            b[k + i][row] = codes[16 + i], b[k + 16 + i][row] = codes[20 + i];
        }
    }
    for (int i = 0; i < M; i++) {
        Ints sum = {};
        for (int k = 0; k < K; k++) sum += a[i][k] * b[k];
        memcpy(warp.tile[half][i], &sum, sizeof(sum));
    }
}
struct Bfloat16 {
    static float read(uint32_t bits) { return __uint_as_float(bits << 16); }
};
struct Half {
    static float read(uint32_t bits) { return half_to_float((unsigned short)bits); }
};
// Sums over ascending k in double, where all of it is as good as exact.
template <class Format> static void multiply_floats(Warp& warp, int half) {
    static const int M = 16, K = 16;
    double a[M][K];
    Doubles b[K];
    for (int lane = 0; lane < 32; lane++) {
        const uint32_t* words = warp.slots[half][lane];
        for (int i = 0; i < 2; i++) {
            int row = lane / 4, k = lane % 4 * 2 + i;
            float v[6];
            for (int j = 0; j < 6; j++) v[j] = Format::read(words[j] >> (16 * i) & 0xffff);
            a[row][k] = v[0], a[row + 8][k] = v[1], a[row][k + 8] = v[2], a[row + 8][k + 8] = v[3];
            b[k][row] = v[4], b[k + 8][row] = v[5];
        }
    }
    for (int i = 0; i < M; i++) {
        Doubles sum = {};
        for (int k = 0; k < K; k++) sum += a[i][k] * b[k];
        memcpy(warp.float_tile[half][i], &sum, sizeof(sum));
    }
}
static inline int give(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    uint32_t* words = slot();
    words[0] = a0, words[1] = a1, words[2] = a2, words[3] = a3, words[4] = b0, words[5] = b1;
    return running->parity;
}
template <class Format> static inline void mma_floats(float (&d)[4], int parity, int line, const char* file) {
    meet(MMA, line, file, multiply_floats<Format>);
    int row = running->lane / 4, column = running->lane % 4 * 2;
    for (int i = 0; i < 4; i++)
        d[i] = (float)((double)d[i] + warps[running->warp].float_tile[parity][row + i / 2 * 8][column + i % 2]);
}
}  // namespace emulator
namespace emulator {
template <class Code>
static inline void mma_codes(int (&d)[4], int parity, int c, int line, const char* file) {
    meet(MMA, line, file, multiply_codes<Code>);
    int lane = running->lane, row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; i++) d[i] = c + warps[running->warp].tile[parity][row + i / 2 * 8][column + i % 2];
}
}  // namespace emulator
static inline void mma_int8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                            int c, EMULATOR_CALLER) {
    emulator::mma_codes<int8_t>(d, emulator::give(a0, a1, a2, a3, b0, b1), c, line, file);
}
static inline void mma_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                             int c, EMULATOR_CALLER) {
    emulator::mma_codes<uint8_t>(d, emulator::give(a0, a1, a2, a3, b0, b1), c, line, file);
}
static inline void mma_bfloat16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1, EMULATOR_CALLER) {
    emulator::mma_floats<emulator::Bfloat16>(d, emulator::give(a0, a1, a2, a3, b0, b1), line, file);
}
static inline void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                            EMULATOR_CALLER) {
    emulator::mma_floats<emulator::Half>(d, emulator::give(a0, a1, a2, a3, b0, b1), line, file);
}
static inline void load_transposed(uint32_t (&r)[4], const void* row, EMULATOR_CALLER) {
    if (((uintptr_t)row & 15) || !emulator::is_shared(row, 16))
        EMULATOR_FAIL("load_transposed in %s:%d takes 16 aligned bytes of shared memory", emulator::base_name(file), line);
    memcpy(emulator::slot(), row, 16);
    int parity = emulator::running->parity, lane = emulator::running->lane;
    emulator::meet(emulator::LDMATRIX, line, file, emulator::Nothing());
    for (int i = 0; i < 4; i++) {
        r[i] = 0;
        for (int j = 0; j < 2; j++) {
            const uint32_t* words = emulator::warps[emulator::running->warp].slots[parity][8 * i + lane % 4 * 2 + j];
            r[i] |= (words[lane / 8] >> (16 * (lane / 4 % 2)) & 0xffff) << (16 * j);
        }
    }
}
// The bytes come when they are waited for; until then there is poison.
static inline void copy_async(void* shared, const void* global, bool wanted = true, EMULATOR_CALLER) {
    if (((uintptr_t)shared & 15) || !emulator::is_shared(shared, 16))
        EMULATOR_FAIL("copy_async in %s:%d must write 16 aligned bytes of shared memory", emulator::base_name(file), line);
    if (wanted && (((uintptr_t)global & 15) || emulator::is_shared(global, 16)))
        EMULATOR_FAIL("copy_async in %s:%d must read 16 aligned bytes of an array", emulator::base_name(file), line);
    emulator::Fiber& me = *emulator::running;
    memset(shared, 0xFF, 16);
    if (wanted) (void)*(const volatile char*)global;  // out of bounds shows here
    me.copies.push_back({shared, wanted ? global : nullptr, me.groups});
}
static inline void commit_copies() { emulator::running->groups++; }
template <int PENDING> static inline void wait_copies() {
    emulator::complete(*emulator::running, emulator::running->groups - PENDING);
}
static inline float exp2_fast(float x) {
    float y = exp2f(fabsf(x) < 0x1p-126f ? 0.f : x);
    return y < 0x1p-126f ? 0.f : y;
}

// A CPU in place of a GPU, slowly and strictly: with this header in place of hardware.h g++ compiles attention.cu as
// C++, and attention.py --emulate and the tests run it, block by block. Apache License 2.0.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it meets an operation of its warp or a
// barrier of the block; once all 32 lanes are there the operation is carried out on what they brought, after the PTX
// ISA: the layouts of matrix fragments, the addresses of ldmatrix. In which order warps and lanes run is the caller's
// choice (see emulate_order), for a correct kernel gives the same bits in any. Copies by cp.async arrive as early or as
// late as the hardware may deliver them. What is reported, as the error of the launch:
//
//     reads and writes of global memory outside the tensors of the call, of shared memory outside the block's share
//     reads of shared memory that nobody wrote, or whose copy was not waited for
//     races: two threads at one word of shared memory, one of them writing, with no barrier in between
//     lanes of a warp that meet different operations, threads missing at a barrier, copies never waited for
//     bank conflicts of ldmatrix
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Index { unsigned x; };
static Index threadIdx, blockIdx;
struct float2 { float x, y; };
struct uint4 { uint32_t x, y, z, w; };
template <class V> static V min(V a, V b) { return b < a ? b : a; }

namespace emulate {

typedef void (*Operation)(void** lanes);  // what 32 lanes do together; each brings one structure

struct Copy { uint32_t shared; const void* global; int bytes; bool valid; };

struct Fiber {
    ucontext_t start;
    jmp_buf here;
    bool started;
    Operation operation;
    void* brought;
    std::vector<char> stack = std::vector<char>(1 << 16);
    std::vector<Copy> copies;  // under way
};

struct Access { int phase = 0, step = 0, warp = 0, lane = 0; };  // phase 0: never. warp, lane -1: several
struct Word { Access written, read; bool arriving = false; };  // of shared memory

enum Order { FORWARD, REVERSED, RANDOM };
static Order order = FORWARD;
static std::mt19937 chance;
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int current, phase;                 // the running thread; barriers of the block so far
static std::vector<int> steps;             // of each warp: its __syncwarp so far
alignas(1024) static unsigned char memory[1 << 18];
static std::vector<Word> words;
static std::vector<std::pair<const char*, size_t>> tensors;
static std::function<void()> body;
static std::string failure;

static void finished(void**) {}
static void barrier(void**) {}
static void warp_barrier(void**) { steps[current / 32]++; }

static void leave() { if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1); }

[[noreturn]] static void fail(const std::string& what) {
    failure = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) + ")";
    _longjmp(scheduler, 1);
}

static void meet(Operation operation, void* brought = nullptr) {
    fibers[current].operation = operation;
    fibers[current].brought = brought;
    leave();
}

static void check_global(const void* pointer, size_t bytes) {
    const char* p = static_cast<const char*>(pointer);
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned global memory");
    for (auto& [start, size] : tensors)
        if (start <= p && p + bytes <= start + size) return;
    fail("global memory outside the tensors");
}

// Has another thread been here, with no barrier since?
static bool races(const Access& a) {
    const int warp = current / 32;
    return a.phase == phase && (a.warp != warp || (a.lane != current % 32 && a.step == steps[warp]));
}

static void check_shared(uint32_t address, uint32_t bytes, bool write) {
    if (address % bytes || address + bytes > words.size() * 4) fail("shared memory misaligned or outside");
    for (uint32_t i = address / 4; i < (address + bytes) / 4; i++) {
        Word& word = words[i];
        if (word.arriving) fail("shared memory used before its copy was waited for");
        if (!write && !word.written.phase) fail("shared memory read that was never written");
        if (races(word.written)) fail("race: shared memory just written by another thread");
        if (write && races(word.read)) fail("race: shared memory written that another thread just read");
        const Access now{phase, steps[current / 32], current / 32, current % 32};
        Access& last = write ? word.written : word.read;
        const bool same = !write && last.phase == phase;
        last = {phase, now.step, same && last.warp != now.warp ? -1 : now.warp,
                same && last.step == now.step && last.lane != now.lane ? -1 : now.lane};
    }
}

static void deliver(const Copy& copy) {
    if (copy.valid) memcpy(memory + copy.shared, copy.global, copy.bytes);
    else memset(memory + copy.shared, 0, copy.bytes);
}

// Runs all lanes of a warp to their next operation and performs it. Only whole warps meet, as ".aligned" demands.
static Operation advance(int warp) {
    int lanes[32];
    void* brought[32];
    for (int i = 0; i < 32; i++) lanes[i] = order == REVERSED ? 31 - i : i;
    if (order == RANDOM) std::shuffle(lanes, lanes + 32, chance);
    for (int lane : lanes) {
        current = threadIdx.x = warp * 32 + lane;
        Fiber& fiber = fibers[current];
        if (!_setjmp(scheduler)) {
            if (fiber.started) _longjmp(fiber.here, 1);
            fiber.started = true;
            setcontext(&fiber.start);
        }
        if (!failure.empty()) return finished;
        brought[lane] = fiber.brought;
        if (fiber.operation != fibers[warp * 32 + lanes[0]].operation) {
            failure = "lanes of warp " + std::to_string(warp) + " meet different operations";
            return finished;
        }
    }
    if (!_setjmp(scheduler)) fibers[current].operation(brought);
    return fibers[current].operation;
}

static void run_block(int threads) {
    const int warps = threads / 32;
    steps.assign(warps, 0);
    words.assign(words.size(), Word());
    phase = 1;
    for (Fiber& fiber : fibers) {
        fiber.started = false;
        fiber.copies.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.start, [] {
            body();
            if (!fibers[current].copies.empty()) fail("a copy was never waited for");
            meet(finished);
        }, 0);
    }
    std::vector<int> ready;
    for (int finishers = 0; finishers < warps;) {  // from one barrier to the next, each warp as far as it gets
        if (finishers) { failure = "threads end while others wait at a barrier"; return; }
        for (int i = 0; i < warps; i++) ready.push_back(order == REVERSED ? i : warps - 1 - i);
        while (!ready.empty()) {
            if (order == RANDOM) std::swap(ready[chance() % ready.size()], ready.back());
            const Operation met = advance(ready.back());
            if (!failure.empty()) return;
            finishers += met == finished;
            if (met == finished || met == barrier) ready.pop_back();
        }
        phase++;
    }
}

static float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

struct Matrices {  // ldmatrix.x4
    uint32_t address, *result;
    template <bool TRANSPOSED> static void run(void** lanes) {
        for (int m = 0; m < 4; m++) {
            uint16_t matrix[8][8];
            uint32_t banks = 0;
            for (int row = 0; row < 8; row++) {
                const uint32_t address = static_cast<Matrices*>(lanes[8 * m + row])->address;
                current = current / 32 * 32 + 8 * m + row;
                check_shared(address, 16, false);
                memcpy(matrix[row], memory + address, 16);
                banks |= 1u << address / 16 % 8;
            }
            if (banks != 255) fail("bank conflict of ldmatrix");
            for (int i = 0; i < 32; i++) {
                const int g = i / 4, t = i % 4 * 2;
                const uint16_t low = TRANSPOSED ? matrix[t][g] : matrix[g][t];
                const uint16_t high = TRANSPOSED ? matrix[t + 1][g] : matrix[g][t + 1];
                static_cast<Matrices*>(lanes[i])->result[m] = low | uint32_t(high) << 16;
            }
        }
    }
};

template <class E> struct Mma {  // mma.m16n8k16
    float* c; const uint32_t *a, *b;
    static void run(void** lanes) {
        float a[16][16], b[8][16];  // b as its columns
        for (int i = 0; i < 32; i++) {
            const Mma& lane = *static_cast<Mma*>(lanes[i]);
            const int g = i / 4, t = i % 4 * 2;
            for (int r = 0; r < 4; r++)
                for (int h = 0; h < 2; h++)
                    a[g + r % 2 * 8][t + r / 2 * 8 + h] = h ? E::high(lane.a[r]) : E::low(lane.a[r]);
            for (int r = 0; r < 2; r++) b[g][t + 8 * r] = E::low(lane.b[r]), b[g][t + 8 * r + 1] = E::high(lane.b[r]);
        }
        for (int i = 0; i < 32; i++)
            for (int r = 0; r < 4; r++) {
                const float *row = a[i / 4 + r / 2 * 8], *column = b[i % 4 * 2 + r % 2];
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += row[k] * column[k];
                static_cast<Mma*>(lanes[i])->c[r] += sum;
            }
    }
};

struct Shuffle { float value, result; int mask; };
static void shuffle(void** lanes) {
    for (int i = 0; i < 32; i++) {
        Shuffle& lane = *static_cast<Shuffle*>(lanes[i]);
        lane.result = static_cast<Shuffle*>(lanes[i ^ lane.mask])->value;
    }
}

}  // namespace emulate

// ---------------------------------------------------------------------------------------------------------------------
// The functions of hardware.h once more

static uint32_t shared_memory() { return 0; }

template <class V> static V load(const void* global) {
    emulate::check_global(global, sizeof(V));
    return *static_cast<const V*>(global);
}
template <class V> static void store(void* global, V value) {
    emulate::check_global(global, sizeof(V));
    *static_cast<V*>(global) = value;
}
template <class V> static V load_shared(uint32_t shared) {
    emulate::check_shared(shared, sizeof(V), false);
    V value;
    memcpy(&value, emulate::memory + shared, sizeof(V));
    return value;
}
template <class V> static void store_shared(uint32_t shared, V value) {
    emulate::check_shared(shared, sizeof(V), true);
    memcpy(emulate::memory + shared, &value, sizeof(V));
}

template <int BYTES> static void copy_async(uint32_t shared, const void* global, bool valid) {
    using namespace emulate;
    if (valid) check_global(global, BYTES);
    check_shared(shared, BYTES, true);
    for (uint32_t i = shared / 4; i < (shared + BYTES) / 4; i++) words[i].arriving = true;
    fibers[current].copies.push_back({shared, global, BYTES, valid});
    if (order == REVERSED || (order == RANDOM && chance() % 2)) deliver(fibers[current].copies.back());
}

static void copy_wait() {
    using namespace emulate;
    for (const Copy& copy : fibers[current].copies) {
        deliver(copy);
        for (uint32_t i = copy.shared / 4; i < (copy.shared + copy.bytes) / 4; i++) words[i].arriving = false;
        check_shared(copy.shared, copy.bytes, true);
    }
    fibers[current].copies.clear();
}

template <bool TRANSPOSED> static void load_matrices(uint32_t (&r)[4], uint32_t row) {
    emulate::Matrices lane{row, r};
    emulate::meet(emulate::Matrices::run<TRANSPOSED>, &lane);
}

template <class E> struct Element {
    static uint32_t pack(float low, float high) { return E::narrow(low) | uint32_t(E::narrow(high)) << 16; }
    static float low(uint32_t pair) { return E::widen(pair & 0xffff); }
    static float high(uint32_t pair) { return E::widen(pair >> 16); }
    static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        const uint32_t b[2] = {b0, b1};
        emulate::Mma<E> lane{c, a, b};
        emulate::meet(emulate::Mma<E>::run, &lane);
    }
};

struct BFloat16 : Element<BFloat16> {
    static float widen(uint32_t x) { return emulate::from_bits(x << 16); }
    static uint16_t narrow(float x) {  // to the nearest, ties to even
        const uint32_t bits = emulate::to_bits(x);
        return isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};

struct Float16 : Element<Float16> {
    static float widen(uint32_t x) {
        const float size = (x & 0x7c00) == 0x7c00 ? emulate::from_bits(0x7f800000 | (x & 0x3ff) << 13)
                                                  : emulate::from_bits((x & 0x7fff) << 13) * 0x1p112f;
        return x & 0x8000 ? -size : size;
    }
    static uint16_t narrow(float x) {
        const uint32_t sign = emulate::to_bits(x) >> 16 & 0x8000, size = emulate::to_bits(x) & 0x7fffffff;
        if (isnan(x)) return 0x7fff;
        if (size >= 0x477ff000) return sign | 0x7c00;  // infinity
        if (size < 0x38800000)                         // subnormal: units of 2^-24, those of the float 0.5 + size
            return sign | (emulate::to_bits(emulate::from_bits(size) + 0.5f) - 0x3f000000);
        return sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    }
};

static float exp2_fast(float x) { return exp2f(x); }
static float log2_fast(float x) { return log2f(x); }
static float shuffle_xor(float x, int mask) {
    emulate::Shuffle lane{x, 0, mask};
    emulate::meet(emulate::shuffle, &lane);
    return lane.result;
}
static void sync_block() { emulate::meet(emulate::barrier); }
static void sync_warp() { emulate::meet(emulate::warp_barrier); }
static int anew(int x) { return x; }

template <class... P, class... A>
static int launch(void (*kernel)(P...), int blocks, int threads, int bytes, void*, A... arguments) {
    using namespace emulate;
    failure.clear();
    body = [&] { kernel(arguments...); };
    fibers.resize(threads);
    words.resize(bytes / 4);
    for (blockIdx.x = 0; int(blockIdx.x) < blocks && failure.empty(); blockIdx.x++) run_block(threads);
    return failure.empty() ? 0 : 1;
}

extern "C" const char* attention_error(int) { return emulate::failure.c_str(); }
extern "C" void emulate_order(int order, int seed) {  // 0 forward, 1 reversed, 2 random
    emulate::order = emulate::Order(order);
    emulate::chance.seed(seed);
}
// The tensors of the next call; a size of 0 forgets all before.
extern "C" void emulate_tensor(const void* start, int64_t bytes) {
    if (!bytes) emulate::tensors.clear();
    else emulate::tensors.push_back({static_cast<const char*>(start), size_t(bytes)});
}

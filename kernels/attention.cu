// Self-attention of packed crops, forward and backward, in memory linear in the number of tokens. attention.py builds
// and calls it; any GPU of compute capability 8.0 or more. Apache License 2.0.
//
// The input is the output of the qkv layer of a vision transformer, (T, 3, H, D): T tokens of all images in sequence,
// H heads of width D. Images come in runs of equal length N, such as 128 global crops of 197 tokens followed by 512
// local crops of 37. Each (image, head) is a problem of its own, for which FlashAttention (Dao et al. 2022, arXiv
// 2205.14135) and FlashAttention-2 (Dao 2023, arXiv 2307.08691) showed how never to store the (N, N) matrices:
//
//     S = scale Q K^T    P = softmax(S)    O = P V           forward; kept for later: O and L = log(sum(exp(S))), (N)
//     P = exp(S - L)     dV = P^T dO       dP = dO V^T       backward, S recomputed
//     delta = rowsum(dO * O)               dS = P * (dP - delta)
//     dQ = scale dS K    dK = scale dS^T Q
//
// Forward (FlashAttention-2, algorithm 1). A warp owns 16 queries and walks over the keys 64 at a time with an online
// softmax; 8 warps share the keys in shared memory. Where N <= 64, as with local crops, that would leave most of a
// block without work, so a block takes several heads then: ceil(N / 16) warps for each, all keys in one step. One
// launch serves all runs.
//
// Backward (algorithm 2, with another division of work). A warp owns 32 *keys* (16 where N <= 64) and walks over the
// queries 64 at a time, so that dK and dV gather in its registers. Up to N = 272 one block has all keys of an image, so
// that each 64 queries meet them all at once: the warps exchange dS through shared memory, and dQ is complete too. No
// atomics, hence the same bits in every run, and five products, the least possible. Longer images loop over blocks of
// 272 keys, adding up dQ in float32. Two launches: one for N <= 64, whose blocks are so small that four fit a
// multiprocessor and hide each other's waiting for memory, one for the rest.
//
// Matrices in shared memory have rows of D numbers of 16 bits, in swizzled 16-byte chunks, see chunk_at(). Products are
// tensor core instructions, whose operands ("fragments") lie across the 32 lanes of a warp in the layouts of the PTX
// ISA, section "Matrix Fragments for mma.m16n8k16". With g = lane / 4 and t = lane % 4, a lane holds of
//
//     the result C (16, 8):    c0 c1 = row g, columns 2t 2t+1     c2 c3 = row g + 8
//     operand A (16, 16):      a0 = row g, columns 2t 2t+1        a1 = row g + 8      a2 a3 = the same, columns + 8
//     operand B (16, 8):       b0 = rows 2t 2t+1, column g        b1 = rows + 8
//
// so two neighboring results, rounded to 16 bits, are an operand A: P goes from one product to the next in registers.
//
// Everything that only a GPU can do is in hardware.h. emulate.h has the same functions for a CPU, down to the layouts
// above: g++ compiles this very file, and the tests check every index, mask and barrier without a GPU.
#include <stdint.h>

#ifndef HEAD_DIM
#define HEAD_DIM 64  // D: 32, 64 or 128; a compiled library knows one
#endif
#ifndef LONG_WARPS
#define LONG_WARPS 8  // of a backward block; 4 where a block can have less than 160 KB of shared memory
#endif

#ifdef __CUDACC__
#include "hardware.h"
#else
#include "emulate.h"
#endif

typedef uint16_t Bits;  // a bf16 or fp16 number: which of the two, only the types BFloat16 and Float16 know

// ---------------------------------------------------------------------------------------------------------------------
// Which block does what

constexpr int D = HEAD_DIM;
constexpr int ROW = 2 * D, CHUNKS = D / 8;    // bytes and 16-byte chunks of a row
constexpr int TILE = 64;                      // keys of a step of the forward, queries of a step of the backward
constexpr int MAX_RUNS = 16;
constexpr int FORWARD_WARPS = 8, FORWARD_BYTES = ROW * (16 * FORWARD_WARPS + 4 * TILE);
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
static_assert(D == 32 || D == 64 || D == 128, "the head dimension is 32, 64 or 128");

struct Run {
    int batch, length, first_token, first_block;
};

struct Work {  // travels as a kernel argument: no copy to the device, nothing to wait for
    Run runs[MAX_RUNS];
    int count, heads, tokens;
    float scale;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Layout {  // of a run in the forward
    int group;         // warps that share one (image, head)
    int slots;         // such groups in a block
    int query_blocks;  // blocks that share one (image, head)
    __host__ __device__ explicit Layout(int length) {
        const int tiles = ceil_div(length, 16);
        group = length <= TILE ? tiles : FORWARD_WARPS;
        slots = FORWARD_WARPS / group;
        query_blocks = ceil_div(tiles, FORWARD_WARPS);
    }
};

__device__ inline const Run& find_run(const Work& work) {
    int i = 0;
    while (i + 1 < work.count && int(blockIdx.x) >= work.runs[i + 1].first_block) i++;
    return work.runs[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles in shared memory and fragments in registers

// A tile has rows of WIDTH 16-byte chunks. Chunk c of row r lies in place c ^ swizzle(r) of the row, so that the eight
// chunks which a fragment's load or store touches at once, one of each of eight rows, lie in different banks.
template <int WIDTH> __device__ inline int swizzle(int row) { return WIDTH >= 8 ? row & 7 : row >> 1 & 3; }

template <int WIDTH = CHUNKS>
__device__ inline uint32_t chunk_at(uint32_t tile, int row, int chunk) {
    return tile + 16 * (row * WIDTH + (chunk ^ swizzle<WIDTH>(row)));
}

// Rows [0, rows) of a matrix in global memory, `stride` numbers apart, to a tile; from row `valid` on zeros. All
// `threads` threads of a group take part.
__device__ inline void load_tile(uint32_t tile, const Bits* source, int stride, int valid, int rows, int thread,
                                 int threads) {
#pragma unroll 1
    for (int i = thread; i < rows * CHUNKS; i += threads) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        copy_async<16>(chunk_at(tile, row, chunk), source + (row < valid ? row * stride + chunk * 8 : 0), row < valid);
    }
}

// The inverse, by one warp.
template <int ROWS>
__device__ inline void store_tile(Bits* target, uint32_t tile, int stride, int valid, int lane) {
#pragma unroll
    for (int i = lane; i < ROWS * CHUNKS; i += 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        if (row < valid) store(target + row * stride + chunk * 8, load_shared<uint4>(chunk_at(tile, row, chunk)));
    }
}

// The (16, 16) block from an even chunk of a tile's first rows, as operand A, or with TRANSPOSED as operand B (k = row,
// n = column) of two products: r0 r1 and r2 r3. As `chunk` is a constant, its exclusive or is all that is left to do.
template <bool TRANSPOSED, int WIDTH = CHUNKS>
__device__ inline void load_rows_first(uint32_t (&r)[4], uint32_t tile, int chunk, int lane) {
    load_matrices<TRANSPOSED>(r, chunk_at<WIDTH>(tile, lane % 16, lane / 16) ^ 16 * chunk);
}

// The same block as operand B of the transposed matrix (n = row, k = column) of two products, or with TRANSPOSED as
// operand A of it (m = column).
template <bool TRANSPOSED, int WIDTH = CHUNKS>
__device__ inline void load_columns_first(uint32_t (&r)[4], uint32_t tile, int chunk, int lane) {
    load_matrices<TRANSPOSED>(r, chunk_at<WIDTH>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2) ^ 16 * chunk);
}

// Rounds results (16, 8 N), times one factor for the rows g and one for g + 8, into a tile from chunk `first` on.
template <class E, int N, int WIDTH = CHUNKS>
__device__ inline void put_fragments(uint32_t tile, const float (&c)[N][4], int first, float factor0, float factor1,
                                     int lane) {
    const uint32_t corner = chunk_at<WIDTH>(tile, lane / 4, 0) + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const uint32_t to = corner ^ 16 * (first + n);
        store_shared(to, E::pack(c[n][0] * factor0, c[n][1] * factor0));
        store_shared(to + 8 * 16 * WIDTH, E::pack(c[n][2] * factor1, c[n][3] * factor1));
    }
}

// The same straight to global memory, rows `stride` numbers apart.
template <class E, int N>
__device__ inline void store_fragments(Bits* target, const float (&c)[N][4], int stride, float factor, int valid,
                                       int lane) {
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
        const int row = lane / 4 + i % 2 * 8;
        const float* pair = &c[i / 2][i % 2 * 2];
        if (row < valid)
            store(target + row * stride + i / 2 * 8 + lane % 4 * 2, E::pack(pair[0] * factor, pair[1] * factor));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// What a warp knows of its 16 queries. A lane has rows g and g + 8, each shared with the three others of its quad.
struct Softmax {
    float out[CHUNKS][4] = {};               // sum of exp(S - top) V so far
    float top[2] = {-INFINITY, -INFINITY};   // largest S so far
    float sum[2] = {};                       // this lane's part of the sum of exp(S - top)
};

// Takes up to 64 more keys into account, of which `valid` exist. scale2 is scale * log2(e): powers of two are cheaper.
template <class E>
__device__ __forceinline__ void attend(Softmax& state, const uint32_t (&q)[D / 16][4], uint32_t keys,
                                       uint32_t values, int valid, float scale2, int lane) {
    float s[TILE / 8][4] = {};
#pragma unroll
    for (int g = 0; g < TILE / 16; g++)
        if (g * 16 < valid)
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t b[4];
                load_columns_first<false>(b, keys + g * 16 * ROW, 2 * d, lane);
                E::mma(s[2 * g], q[d], b[0], b[1]);
                E::mma(s[2 * g + 1], q[d], b[2], b[3]);
            }
    if (valid < TILE)
#pragma unroll
        for (int i = 0; i < TILE / 2; i++)
            if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid) s[i / 4][i % 4] = -INFINITY;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = state.top[r];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        const float shrink = exp2_fast((state.top[r] - top) * scale2), shift = top * scale2;
        state.top[r] = top;
        state.sum[r] *= shrink;
#pragma unroll
        for (int i = 0; i < CHUNKS * 2; i++) state.out[i / 2][2 * r + i % 2] *= shrink;
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            float& x = s[i / 2][2 * r + i % 2];
            x = exp2_fast(x * scale2 - shift);
            state.sum[r] += x;
        }
    }
#pragma unroll
    for (int g = 0; g < TILE / 16; g++)
        if (g * 16 < valid) {
            uint32_t p[4];
#pragma unroll
            for (int i = 0; i < 4; i++) p[i] = E::pack(s[2 * g + i / 2][i % 2 * 2], s[2 * g + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t b[4];
                load_rows_first<true>(b, values + g * 16 * ROW, 2 * d, lane);
                E::mma(state.out[2 * d], p, b[0], b[1]);
                E::mma(state.out[2 * d + 1], p, b[2], b[3]);
            }
        }
}

// qkv (T, 3, H, D) -> out (T, H, D), lse (H, T) = log(sum(exp(S))).
template <class E>
__global__ void __launch_bounds__(32 * FORWARD_WARPS, D <= 64 ? 2 : 1)
    forward_kernel(const __grid_constant__ Work work, const Bits* qkv, Bits* out, float* lse) {
    const uint32_t queries = shared_memory();                  // (128, D)
    const uint32_t keys = queries + 16 * FORWARD_WARPS * ROW;  // (2, 64, D): of this step and of the next, or,
    const uint32_t values = keys + 2 * TILE * ROW;             // of short images, (slots, 16 group, D)
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Run& run = find_run(work);
    const Layout layout(run.length);
    const int slot = warp / layout.group, block = blockIdx.x - run.first_block;
    const int pair = block / layout.query_blocks * layout.slots + slot;  // (image, head)
    const bool present = slot < layout.slots && pair < run.batch * work.heads;
    const int token = run.first_token + pair / work.heads * run.length;
    const int stride = 3 * work.heads * D, padded = ceil_div(run.length, 16) * 16;
    const int head = pair % work.heads, width = work.heads * D;
    const Bits* const source = qkv + int64_t(token) * stride + head * D;
    const int block_query = block % layout.query_blocks * 16 * FORWARD_WARPS;
    const int threads = layout.group * 32, thread = threadIdx.x - slot * threads, slot_row = slot * layout.group * 16;

    auto load_keys = [&](int step) {
        const int first = step * TILE, rows = min(TILE, padded - first), row = slot_row + step % 2 * TILE;
        const Bits* const from = source + width + first * stride;
        load_tile(keys + row * ROW, from, stride, run.length - first, rows, thread, threads);
        load_tile(values + row * ROW, from + width, stride, run.length - first, rows, thread, threads);
    };
    if (present) {
        load_tile(queries + slot_row * ROW, source + block_query * stride, stride, run.length - block_query,
                  layout.group * 16, thread, threads);
        load_keys(0);
    }

    const int query = block_query + thread / 32 * 16;  // this warp's first
    const bool busy = present && query < run.length;
    Softmax state;
    uint32_t q[D / 16][4];
    for (int step = 0; step < ceil_div(run.length, TILE); step++) {
        copy_wait();
        sync_block();  // the step's keys have arrived, and nobody reads the former ones any more
        if (present && (step + 1) * TILE < run.length) load_keys(step + 1);
        if (!busy) continue;
        if (step == 0)
#pragma unroll
            for (int d = 0; d < D / 16; d++) load_rows_first<false>(q[d], queries + warp * 16 * ROW, 2 * d, lane);
        const int row = slot_row + step % 2 * TILE;
        attend<E>(state, q, keys + row * ROW, values + row * ROW, min(TILE, run.length - step * TILE),
                  work.scale * LOG2E, lane);
    }
    if (!busy) return;

    const int valid = run.length - query;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = state.sum[r];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        inverse[r] = 1 / sum;
        const int row = lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < valid)
            store(lse + int64_t(head) * work.tokens + token + query + row,
                  state.top[r] * work.scale + log2_fast(sum) * LN2);
    }
    sync_warp();  // all lanes have their queries in registers: the space is free
    put_fragments<E>(queries + warp * 16 * ROW, state.out, 0, inverse[0], inverse[1], lane);
    sync_warp();
    store_tile<16>(out + int64_t(token + query) * width + head * D, queries + warp * 16 * ROW, width, valid, lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// The two sizes of the backward: warps of a block, keys of a warp in units of 16, queries taken at once.
template <int WARPS_, int KEY_TILES_, int QUERIES_, int BLOCKS_>
struct Shape {
    static constexpr int WARPS = WARPS_, KEY_TILES = KEY_TILES_, QUERIES = QUERIES_, BLOCKS = BLOCKS_;
    static constexpr int OWNED = 16 * WARPS * KEY_TILES;    // keys of a block that have a warp
    static constexpr bool SMALL = OWNED <= TILE;            // one step does it all: needs no second buffer
    static constexpr int SHARED = SMALL ? 0 : 16;           // further keys, see shared_scores()
    static constexpr int KEYS = OWNED + SHARED;
    static constexpr int UNITS = 2 * CHUNKS / WARPS;        // a warp's (16, 8) blocks of the shared keys' dK and dV
    static constexpr int STAGES = SMALL ? 1 : 2;
    static constexpr int PARTS = WARPS >= 8 ? 2 : 1;        // the columns of dQ that a warp computes: D / PARTS
    static constexpr int BYTES = 2 * ROW * (KEYS + STAGES * TILE) + (KEYS + SHARED) * 2 * TILE + STAGES * 2 * 4 * TILE;
};
using SmallShape = Shape<4, 1, 16, D <= 64 ? 4 : 2>;
using LargeShape = Shape<LONG_WARPS, D <= 64 ? 2 : 1, 32, 1>;

// c (16 K, Q) = a (16 K, D) b^T, with b (Q, D)
template <class E, int K, int Q>
__device__ __forceinline__ void multiply_transposed(float (&c)[K][Q / 8][4], uint32_t a, uint32_t b, int lane) {
#pragma unroll
    for (int i = 0; i < K * Q / 2; i++) c[i / (Q / 2)][i / 4 % (Q / 8)][i % 4] = 0;
#pragma unroll 2  // in full it would take more registers than there are
    for (int d = 0; d < D / 16; d++) {
        uint32_t rows[K][4], columns[4];
#pragma unroll
        for (int k = 0; k < K; k++) load_rows_first<false>(rows[k], a + k * 16 * ROW, 2 * d, lane);
#pragma unroll
        for (int n = 0; n < Q / 16; n++) {
            load_columns_first<false>(columns, b + n * 16 * ROW, 2 * d, lane);
#pragma unroll
            for (int k = 0; k < K; k++) {
                E::mma(c[k][2 * n], rows[k], columns[0], columns[1]);
                E::mma(c[k][2 * n + 1], rows[k], columns[2], columns[3]);
            }
        }
    }
}

// c (16 K, D) += a (16 K, Q) b, with b (Q, D); a comes as results of a product and is rounded to 16 bits.
template <class E, int K, int Q>
__device__ __forceinline__ void accumulate(float (&c)[K][CHUNKS][4], const float (&a)[K][Q / 8][4], uint32_t b,
                                           int lane) {
#pragma unroll
    for (int n = 0; n < Q / 16; n++) {
        uint32_t rows[K][4], columns[4];
#pragma unroll
        for (int i = 0; i < K * 4; i++) {
            const float* pair = &a[i / 4][2 * n + i % 4 / 2][i % 2 * 2];
            rows[i / 4][i % 4] = E::pack(pair[0], pair[1]);
        }
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            load_rows_first<true>(columns, b + n * 16 * ROW, 2 * d, lane);
#pragma unroll
            for (int k = 0; k < K; k++) {
                E::mma(c[k][2 * d], rows[k], columns[0], columns[1]);
                E::mma(c[k][2 * d + 1], rows[k], columns[2], columns[3]);
            }
        }
    }
}

// One warp's keys, `valid` of which exist, against up to 64 queries: adds to dk and dv, and leaves dS^T in its rows of
// `exchange` (KEYS, 64). Rows that queries and grads have beyond the last query are zero, and so is what they add.
template <class E, class S>
__device__ __forceinline__ void key_products(float (&dk)[S::KEY_TILES][CHUNKS][4], float (&dv)[S::KEY_TILES][CHUNKS][4],
                                             uint32_t keys, uint32_t values, uint32_t queries, uint32_t grads,
                                             uint32_t lse, uint32_t delta, uint32_t exchange, int valid,
                                             int query_count, float scale2, int lane) {
    constexpr int K = S::KEY_TILES, Q = S::QUERIES;
#pragma unroll 1
    for (int first = 0; first < query_count; first += Q) {
        const uint32_t columns = 4 * (first + lane % 4 * 2);  // of this lane: entries of lse and delta
        float p[K][Q / 8][4], ds[K][Q / 8][4];
        multiply_transposed<E, K, Q>(p, keys, queries + first * ROW, lane);  // S^T
#pragma unroll
        for (int n = 0; n < Q / 8; n++) {
            const float2 shift = load_shared<float2>(lse + columns + 32 * n);
#pragma unroll
            for (int i = 0; i < K * 4; i++) {
                float& x = p[i / 4][n][i % 4];
                x = exp2_fast(x * scale2 - (i % 2 ? shift.y : shift.x) * LOG2E);
                if (i / 2 * 8 + lane / 4 >= valid) x = 0;
            }
        }
        accumulate<E, K, Q>(dv, p, grads + first * ROW, lane);
        multiply_transposed<E, K, Q>(ds, values, grads + first * ROW, lane);  // dP^T
#pragma unroll
        for (int n = 0; n < Q / 8; n++) {
            const float2 mean = load_shared<float2>(delta + columns + 32 * n);
#pragma unroll
            for (int i = 0; i < K * 4; i++)
                ds[i / 4][n][i % 4] = p[i / 4][n][i % 4] * (ds[i / 4][n][i % 4] - (i % 2 ? mean.y : mean.x));
        }
#pragma unroll
        for (int k = 0; k < K; k++)
            put_fragments<E, Q / 8, TILE / 8>(exchange + k * 16 * 2 * TILE, ds[k], first / 8, 1, 1, lane);
        accumulate<E, K, Q>(dk, ds, queries + first * ROW, lane);
    }
}

template <class E> __device__ inline float pair_product(uint32_t a, uint32_t b) {
    return E::low(a) * E::low(b) + E::high(a) * E::high(b);
}

// out, grad (N, D) of one (image, head) -> put(row, delta) for all rows, 0 for those that
// fill up a multiple of 16. All threads of the block.
template <class E, class S, class F>
__device__ __forceinline__ void row_sums(const Bits* out, const Bits* grad, int stride, int length, F put) {
    constexpr int ROWS = 32 * S::WARPS / CHUNKS;  // at once, CHUNKS neighboring lanes for each
    for (int first = 0; first < ceil_div(length, 16) * 16; first += ROWS) {
        const int row = first + threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        float sum = 0;
        if (row < length) {
            const uint4 a = load<uint4>(out + row * stride + chunk * 8);
            const uint4 b = load<uint4>(grad + row * stride + chunk * 8);
            sum = pair_product<E>(a.x, b.x) + pair_product<E>(a.y, b.y) + pair_product<E>(a.z, b.z) +
                  pair_product<E>(a.w, b.w);
        }
#pragma unroll
        for (int mask = 1; mask < CHUNKS; mask *= 2) sum += shuffle_xor(sum, mask);
        if (chunk == 0) put(row, sum);
    }
}

// The S::SHARED keys that no warp owns. With 8 warps they are the keys 256 to 271: 16 x 16 patches and CLS make 257
// tokens, and for that one all queries would have to pass by again. Here every warp takes 8 of the 64 queries and
// leaves P^T and dS^T, each (16, 64), for all.
template <class E, class S>
__device__ __forceinline__ void shared_scores(uint32_t weights, uint32_t exchange, uint32_t keys, uint32_t values,
                                              uint32_t queries, uint32_t grads, uint32_t lse, uint32_t delta, int valid,
                                              int query_count, float scale2, int warp, int lane) {
    for (int n = warp; n < TILE / 8; n += S::WARPS) {
        if (n * 8 >= ceil_div(query_count, S::QUERIES) * S::QUERIES) return;
        float p[1][4] = {}, ds[1][4] = {};
#pragma unroll
        for (int d = 0; d < D / 32; d++) {
            uint32_t rows[4], columns[4];
            const uint32_t place = chunk_at(n * 8 * ROW, lane % 8, lane / 8) ^ 64 * d;
            load_matrices<false>(columns, queries + place);
            load_rows_first<false>(rows, keys, 4 * d, lane);
            E::mma(p[0], rows, columns[0], columns[1]);
            load_rows_first<false>(rows, keys, 4 * d + 2, lane);
            E::mma(p[0], rows, columns[2], columns[3]);
            load_matrices<false>(columns, grads + place);
            load_rows_first<false>(rows, values, 4 * d, lane);
            E::mma(ds[0], rows, columns[0], columns[1]);
            load_rows_first<false>(rows, values, 4 * d + 2, lane);
            E::mma(ds[0], rows, columns[2], columns[3]);
        }
        const uint32_t column = 4 * (n * 8 + lane % 4 * 2);
        const float2 shift = load_shared<float2>(lse + column), mean = load_shared<float2>(delta + column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[0][i] = exp2_fast(p[0][i] * scale2 - (i % 2 ? shift.y : shift.x) * LOG2E);
            if (i / 2 * 8 + lane / 4 >= valid) p[0][i] = 0;
            ds[0][i] = p[0][i] * (ds[0][i] - (i % 2 ? mean.y : mean.x));
        }
        put_fragments<E, 1, TILE / 8>(weights, p, n, 1, 1, lane);
        put_fragments<E, 1, TILE / 8>(exchange, ds, n, 1, 1, lane);
    }
}

// Adds to the shared keys' dV = P^T dO and dK = dS^T Q, of which each warp has 8 columns at a time: unit u < D / 8 is
// column chunk u of dV, the units after it are dK.
template <class E, class S>
__device__ __forceinline__ void shared_products(float (&sums)[S::UNITS][1][4], uint32_t weights, uint32_t exchange,
                                                uint32_t queries, uint32_t grads, int query_count, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < S::UNITS; i++) {
        const int unit = warp + i * S::WARPS;
        const uint32_t left = unit < CHUNKS ? weights : exchange, right = unit < CHUNKS ? grads : queries;
#pragma unroll 1
        for (int first = 0; first < query_count; first += 32) {
            uint32_t rows[4], columns[4];
            load_matrices<true>(columns, chunk_at(right + first * ROW, lane, unit % CHUNKS));
            load_rows_first<false, TILE / 8>(rows, left, first / 8, lane);
            E::mma(sums[i][0], rows, columns[0], columns[1]);
            load_rows_first<false, TILE / 8>(rows, left, first / 8 + 2, lane);
            E::mma(sums[i][0], rows, columns[2], columns[3]);
        }
    }
}

// dq (16, D / PARTS) = dS K of 16 queries. With several blocks of keys the sum so far waits in `partial`, of which each
// thread reads what it has written; rows are `width` apart there, `stride` in `target`, the columns' place in dqkv.
template <class E, class S>
__device__ __forceinline__ void query_product(Bits* target, int stride, float* partial, int width, uint32_t exchange,
                                              uint32_t keys, int key_groups, int query, int part, int valid, bool first,
                                              bool last, float scale, int lane) {
    constexpr int N = CHUNKS / S::PARTS;
    float dq[N][4] = {};
    if (!first)
#pragma unroll
        for (int i = 0; i < 2 * N; i++) {
            const int row = lane / 4 + i % 2 * 8;
            if (row >= valid) continue;
            const float2 sum = load<float2>(partial + row * width + i / 2 * 8 + lane % 4 * 2);
            dq[i / 2][i % 2 * 2] = sum.x, dq[i / 2][i % 2 * 2 + 1] = sum.y;
        }
#pragma unroll(S::SMALL ? 1 : 4)
    for (int g = 0; g < key_groups; g++) {
        uint32_t rows[4], columns[4];
        load_columns_first<true, TILE / 8>(rows, exchange + g * 16 * 2 * TILE, query / 8, lane);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            load_rows_first<true>(columns, keys + g * 16 * ROW, part * N + 2 * n, lane);
            E::mma(dq[2 * n], rows, columns[0], columns[1]);
            E::mma(dq[2 * n + 1], rows, columns[2], columns[3]);
        }
    }
    if (last) return store_fragments<E>(target, dq, stride, scale, valid, lane);
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
        const int row = lane / 4 + i % 2 * 8;
        if (row < valid)
            store(partial + row * width + i / 2 * 8 + lane % 4 * 2,
                  float2{dq[i / 2][i % 2 * 2], dq[i / 2][i % 2 * 2 + 1]});
    }
}

// grad, out (T, H, D), qkv, dqkv (T, 3, H, D), lse (H, T); delta (H, T) and partial (T, H, D) are float32 scratch.
template <class E, class S>
__global__ void __launch_bounds__(32 * S::WARPS, S::BLOCKS)
    backward_kernel(const __grid_constant__ Work work, const Bits* grad, const Bits* qkv, const Bits* out,
                    const float* lse, float* delta, float* partial, Bits* dqkv) {
    constexpr int KEYS = S::KEYS, WARP_KEYS = 16 * S::KEY_TILES;
    const uint32_t keys = shared_memory();                         // (KEYS, D)
    const uint32_t values = keys + KEYS * ROW;                     // (KEYS, D)
    const uint32_t queries = values + KEYS * ROW;                  // (STAGES, 64, D)
    const uint32_t grads = queries + S::STAGES * TILE * ROW;       // (STAGES, 64, D)
    const uint32_t exchange = grads + S::STAGES * TILE * ROW;      // (KEYS, 64), dS^T
    const uint32_t weights = exchange + KEYS * 2 * TILE;           // (SHARED, 64), P^T of the shared keys
    const uint32_t row_lse = weights + S::SHARED * 2 * TILE;       // (STAGES, 64), float32
    const uint32_t row_delta = row_lse + S::STAGES * 4 * TILE;     // (STAGES, 64), float32
    const int thread = threadIdx.x, threads = 32 * S::WARPS, warp = thread / 32, lane = thread % 32;
    const Run& run = find_run(work);
    const int pair = blockIdx.x - run.first_block, length = S::SMALL ? min(run.length, TILE) : run.length;
    const int token = run.first_token + pair / work.heads * length, head = pair % work.heads;
    const int width = work.heads * D, stride = 3 * width;
    // where this image and head lie in (T, matrices, H, D), and in (H, T)
    auto place = [&](auto* base, int matrices, int matrix) {
        return base + (int64_t(anew(token)) * matrices + matrix) * width + head * D;
    };
    auto row_place = [&](auto* base) { return base + int64_t(head) * work.tokens + anew(token); };

    auto load_queries = [&](int step) {
        const int first = step * TILE, valid = length - first, stage = step % S::STAGES * TILE;
        const int rows = min(TILE, ceil_div(valid, S::QUERIES) * S::QUERIES);
        load_tile(queries + stage * ROW, place(qkv, 3, 0) + first * stride, stride, valid, rows, thread, threads);
        load_tile(grads + stage * ROW, place(grad, 1, 0) + first * width, width, valid, rows, thread, threads);
        if (thread < TILE) {
            const int row = thread < valid ? first + thread : 0;
            copy_async<4>(row_lse + 4 * (stage + thread), row_place(lse) + row, thread < valid);
            if (!S::SMALL) copy_async<4>(row_delta + 4 * (stage + thread), row_place(delta) + row, thread < valid);
        }
    };
    if (!S::SMALL) {
        row_sums<E, S>(place(out, 1, 0), place(grad, 1, 0), width, length, [&](int row, float sum) {
            if (row < length) store(row_place(delta) + row, sum);
        });
        sync_block();  // load_queries() reads them
    }
    const int steps = S::SMALL ? 1 : ceil_div(length, TILE), last_key = S::SMALL ? 0 : (length - 1) / KEYS * KEYS;
    for (int first_key = 0; first_key <= last_key; first_key += KEYS) {
        const int key_count = min(KEYS, length - first_key), valid = key_count - warp * WARP_KEYS;
        const int shared_valid = key_count - S::OWNED;
        const int rows = min(KEYS, ceil_div(key_count, WARP_KEYS) * WARP_KEYS);
        load_tile(keys, place(qkv, 3, 1) + first_key * stride, stride, key_count, rows, thread, threads);
        load_tile(values, place(qkv, 3, 2) + first_key * stride, stride, key_count, rows, thread, threads);
        load_queries(0);
        if (S::SMALL)  // while the copies are under way
            row_sums<E, S>(place(out, 1, 0), place(grad, 1, 0), width, length, [&](int row, float sum) {
                store_shared(row_delta + 4 * row, sum);
            });
        const uint32_t my_keys = keys + warp * WARP_KEYS * ROW;  // where dK and dV leave from, too
        const uint32_t my_values = values + warp * WARP_KEYS * ROW;
        float dk[S::KEY_TILES][CHUNKS][4] = {}, dv[S::KEY_TILES][CHUNKS][4] = {}, shared_sums[S::UNITS][1][4] = {};
        for (int step = 0; step < steps; step++) {
            const int first = step * TILE, count = min(TILE, length - first), stage = step % S::STAGES;
            const uint32_t q = queries + stage * TILE * ROW, g = grads + stage * TILE * ROW;
            const uint32_t l = row_lse + stage * 4 * TILE, m = row_delta + stage * 4 * TILE;
            copy_wait();
            sync_block();  // the step's queries have arrived, and nobody reads the former ones and their dS any more
            if (step + 1 < steps) load_queries(step + 1);
            if (valid > 0)
                key_products<E, S>(dk, dv, my_keys, my_values, q, g, l, m, exchange + warp * WARP_KEYS * 2 * TILE,
                                   valid, count, work.scale * LOG2E, lane);
            if (S::SHARED && shared_valid > 0)
                shared_scores<E, S>(weights, exchange + S::OWNED * 2 * TILE, keys + S::OWNED * ROW,
                                    values + S::OWNED * ROW, q, g, l, m, shared_valid, count, work.scale * LOG2E, warp,
                                    anew(lane));
            sync_block();  // dS is complete
            if (S::SHARED && shared_valid > 0)
                shared_products<E, S>(shared_sums, weights, exchange + S::OWNED * 2 * TILE, q, g, count, warp,
                                      anew(lane));
            const int query = warp % 4 * 16, row = first + query, part = warp / 4;
            if (part < S::PARTS && query < count)
                query_product<E, S>(place(dqkv, 3, 0) + row * stride + part * (D / S::PARTS), stride,
                                    place(partial, 1, 0) + row * width + part * (D / S::PARTS), width, exchange, keys,
                                    ceil_div(key_count, 16), query, part, count - query, first_key == 0,
                                    first_key == last_key, work.scale, anew(lane));
        }
        sync_block();  // nobody reads keys any more
        Bits* const target = place(dqkv, 3, 1) + first_key * stride;
        if (S::SHARED && shared_valid > 0)
#pragma unroll
            for (int i = 0; i < S::UNITS; i++) {
                const int unit = warp + i * S::WARPS;
                Bits* const to = target + S::OWNED * stride + (unit < CHUNKS ? width : 0) + unit % CHUNKS * 8;
                store_fragments<E>(to, shared_sums[i], stride, unit < CHUNKS ? 1 : work.scale, shared_valid, lane);
            }
        if (valid > 0) {
#pragma unroll
            for (int k = 0; k < S::KEY_TILES; k++) {
                put_fragments<E>(my_keys + k * 16 * ROW, dk[k], 0, work.scale, work.scale, lane);
                put_fragments<E>(my_values + k * 16 * ROW, dv[k], 0, 1, 1, lane);
            }
            sync_warp();
            Bits* const to = target + warp * WARP_KEYS * stride;
            store_tile<WARP_KEYS>(to, my_keys, stride, valid, anew(lane));
            store_tile<WARP_KEYS>(to + width, my_values, stride, valid, anew(lane));
        }
        if (first_key < last_key) sync_block();  // the next keys overwrite what others still copy
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What attention.py calls. `batches` and `lengths` describe the runs; 0 or the number of an error returns.

// Fills `work` with the runs of shortest <= length <= longest, of which one takes blocks_of(batch, length) blocks.
// Returns the number of all blocks.
template <class F>
static int plan(Work& work, const int* batches, const int* lengths, int runs, int heads, float scale, int shortest,
                int longest, F blocks_of) {
    int blocks = 0;
    work.count = work.tokens = 0;
    work.heads = heads;
    work.scale = scale;
    for (int i = 0; i < runs; i++) {
        if (batches[i] > 0 && shortest <= lengths[i] && lengths[i] <= longest) {
            work.runs[work.count++] = {batches[i], lengths[i], work.tokens, blocks};
            blocks += blocks_of(batches[i], lengths[i]);
        }
        work.tokens += batches[i] * lengths[i];
    }
    return blocks;
}

template <class E>
static int forward(const void* qkv, void* out, float* lse, const int* batches, const int* lengths, int runs, int heads,
                   float scale, void* stream) {
    Work work;
    const int blocks = plan(work, batches, lengths, runs, heads, scale, 1, INT32_MAX, [&](int batch, int length) {
        const Layout layout(length);
        return ceil_div(batch * heads, layout.slots) * layout.query_blocks;
    });
    return blocks ? launch(forward_kernel<E>, blocks, 32 * FORWARD_WARPS, FORWARD_BYTES, stream, work,
                           static_cast<const Bits*>(qkv), static_cast<Bits*>(out), lse) : 0;
}

// Scratch memory holds delta (H, T), then dQ so far, aligned, both float32.
static int64_t delta_size(int64_t tokens, int heads) { return (tokens * heads + 3) / 4 * 4; }

template <class E, class S>
static int backward(const void* grad, const void* qkv, const void* out, const float* lse, float* scratch, void* dqkv,
                    const int* batches, const int* lengths, int runs, int heads, float scale, int shortest, int longest,
                    void* stream) {
    Work work;
    const int blocks = plan(work, batches, lengths, runs, heads, scale, shortest, longest,
                            [&](int batch, int) { return batch * heads; });
    return blocks ? launch(backward_kernel<E, S>, blocks, 32 * S::WARPS, S::BYTES, stream, work,
                           static_cast<const Bits*>(grad), static_cast<const Bits*>(qkv), static_cast<const Bits*>(out),
                           lse, scratch, scratch + delta_size(work.tokens, heads), static_cast<Bits*>(dqkv)) : 0;
}

extern "C" int attention_forward(const void* qkv, void* out, float* lse, const int* batches, const int* lengths,
                                 int runs, int heads, float scale, int bf16, void* stream) {
    return (bf16 ? forward<BFloat16> : forward<Float16>)(qkv, out, lse, batches, lengths, runs, heads, scale, stream);
}

// float32 numbers of scratch memory that attention_backward needs for these runs
extern "C" int64_t attention_scratch(const int* batches, const int* lengths, int runs, int heads) {
    int64_t tokens = 0;
    int longest = 0;
    for (int i = 0; i < runs; i++) {
        tokens += batches[i] * lengths[i];
        longest = lengths[i] > longest ? lengths[i] : longest;
    }
    return delta_size(tokens, heads) + (longest > LargeShape::KEYS ? tokens * heads * D : 0);
}

extern "C" int attention_backward(const void* grad, const void* qkv, const void* out, const float* lse, float* scratch,
                                  void* dqkv, const int* batches, const int* lengths, int runs, int heads, float scale,
                                  int bf16, void* stream) {
    const auto large = bf16 ? backward<BFloat16, LargeShape> : backward<Float16, LargeShape>;
    const auto small = bf16 ? backward<BFloat16, SmallShape> : backward<Float16, SmallShape>;
    const int error = large(grad, qkv, out, lse, scratch, dqkv, batches, lengths, runs, heads, scale, TILE + 1,
                            INT32_MAX, stream);
    return error ? error : small(grad, qkv, out, lse, scratch, dqkv, batches, lengths, runs, heads, scale, 1, TILE,
                                 stream);
}

// Shared memory of a block in bytes: of the forward, of the backward for long and for short images.
extern "C" int attention_shared(int kernel) {
    return kernel == 0 ? FORWARD_BYTES : kernel == 1 ? LargeShape::BYTES : SmallShape::BYTES;
}

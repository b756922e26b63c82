// What only a GPU can do, wrapped into small functions: the kernels use these and no inline assembly. emulate.h has the
// same functions for a CPU. Instructions are those of the PTX ISA, all of compute capability 8.0. Apache License 2.0.
#include <stdint.h>

// Shared memory is known by 32-bit addresses in bytes, which cost half the registers of pointers.
__device__ inline uint32_t shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return uint32_t(__cvta_generic_to_shared(memory));
}

template <class V> __device__ inline V load(const void* global) { return *static_cast<const V*>(global); }
template <class V> __device__ inline void store(void* global, V value) { *static_cast<V*>(global) = value; }
template <class V> __device__ inline V load_shared(uint32_t shared) {
    return *static_cast<const V*>(__cvta_shared_to_generic(shared));
}
template <class V> __device__ inline void store_shared(uint32_t shared, V value) {
    *static_cast<V*>(__cvta_shared_to_generic(shared)) = value;
}

// Starts to copy BYTES (4 or 16) from global to shared memory, zeros where not `valid`.
template <int BYTES>
__device__ inline void copy_async(uint32_t shared, const void* global, bool valid) {
    if constexpr (BYTES == 16)  // not through L1: no other warp of the block reads the same
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
                     : "memory");
}

// The copies that this thread has started are done. Those of others: after a barrier that follows.
__device__ inline void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four (8, 8) matrices of 16-bit numbers: lane i passes the address of row i % 8 of matrix i / 8 and gets entries 2t
// and 2t+1 of row g of each, or with TRANSPOSED of column g.
template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// c += a b; pack() rounds two numbers to one register, low() and high() give them back.
#define ELEMENT_TYPE(NAME, PTX, WIDEN_LOW, WIDEN_HIGH)                                                                \
    struct NAME {                                                                                                     \
        __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                 \
            asm("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "      \
                "{%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                        \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                      \
        }                                                                                                             \
        __device__ static uint32_t pack(float low, float high) {                                                      \
            uint32_t pair;                                                                                            \
            asm("cvt.rn." PTX "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));                               \
            return pair;                                                                                              \
        }                                                                                                             \
        __device__ static float low(uint32_t pair) { WIDEN_LOW }                                                      \
        __device__ static float high(uint32_t pair) { WIDEN_HIGH }                                                    \
    };
#define WIDEN_HALF(BITS) float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(BITS))); return x;
ELEMENT_TYPE(BFloat16, "bf16", return __uint_as_float(pair << 16);, return __uint_as_float(pair & 0xffff0000u);)
ELEMENT_TYPE(Float16, "f16", WIDEN_HALF(pair), WIDEN_HALF(pair >> 16))

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float log2_fast(float x) { return __log2f(x); }
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

// x, hiding from the compiler that it is known: it would keep all addresses that follow from it in registers through
// the whole kernel.
__device__ inline int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Queues a kernel; 0 or the number of the error.
template <class... P, class... A>
int launch(void (*kernel)(P...), int blocks, int threads, int bytes, void* stream, A... arguments) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
        error = cudaGetLastError();
    }
    return int(error);
}

extern "C" const char* attention_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

// One function per PTX instruction that the kernels need by name. tests/test_cuda_ptx.py executes each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../dtype.h"

namespace lowbit::cuda::ptx {

// --- global memory, 16 aligned bytes if not said otherwise

// For data that is read once: past L1.
__device__ __forceinline__ uint4 load_global_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// For data that other warps read too: through L1.
__device__ __forceinline__ uint4 load_global_16_cached(const void* from) {
  uint4 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// 8 and 4 aligned bytes, likewise.
__device__ __forceinline__ uint2 load_global_8_cached(const void* from) {
  uint2 v;
  asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
__device__ __forceinline__ uint32_t load_global_4_cached(const void* from) {
  uint32_t v;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

// The 16 bytes where `wanted`; otherwise v stays as it is. (16 bytes, because nvcc makes a branch of two loads
// together.)
__device__ __forceinline__ void load_global_16_if(bool wanted, uint4& v, const void* from) {
  asm volatile(
      "{\n\t"
      ".reg .pred wanted;\n\t"
      "setp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n\t"
      "}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
}

// Lets the 32 bytes at `from` come into L2, for a load that follows much later.
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ void store_global_16(void* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// For what other blocks of this launch have written: past L1, which may hold an older value.
__device__ __forceinline__ float4 load_global_16_fresh(const void* from) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ float load_global_4_fresh(const void* from) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
}

// What *at was; then it is one more, or 0 again if it was `most`. Orders the GPU's memory: whoever sees the new value
// sees what was written before it, and reads after it see what the earlier ones had written.
__device__ __forceinline__ uint32_t increment_or_wrap(uint32_t* at, uint32_t most) {
  uint32_t v;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(v) : "l"(at), "r"(most) : "memory");
  return v;
}

// --- shared memory, by its 32-bit address

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// volatile: they stay behind the barrier before them. Only ptxas, which knows what they read, moves them.
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ float2 load_shared_8(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// --- asynchronous copies from global to shared memory (sm_80)

// 16 aligned bytes past L1, of which the first `valid` are read and the rest are zeros.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are pending; a barrier makes the others' data visible.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores (layout.h says which element is where)

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrix_4(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// c += a b in fp32 (sm_80).
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define LOWBIT_MMA(TYPE)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, Bf16>) {
    LOWBIT_MMA("bf16");
  } else {
    static_assert(std::is_same_v<T, Fp16>);
    LOWBIT_MMA("f16");
  }
#undef LOWBIT_MMA
}

// threadIdx.x and blockIdx.x, read at this point: nothing that is computed from them is kept in registers until then.
__device__ __forceinline__ int read_thread_index() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}
__device__ __forceinline__ unsigned read_block_index() {
  unsigned v;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(v));
  return v;
}
__device__ __forceinline__ unsigned read_block_index_z() {
  unsigned v;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(v));
  return v;
}

// --- lanes of a warp; all 32 take part

__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
  uint32_t v;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(v) : "r"(value), "r"(mask));
  return v;
}

__device__ __forceinline__ uint32_t shuffle(uint32_t value, int lane) {
  uint32_t v;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(v) : "r"(value), "r"(lane));
  return v;
}

// Lanes l and l ^ mask, of which the first has that bit clear: its `second` and the other's `first` change places.
__device__ __forceinline__ void swap_with_lane(uint32_t& first, uint32_t& second, int lane, int mask) {
  const bool is_upper = lane & mask;
  const uint32_t received = shuffle_xor(is_upper ? first : second, mask);
  first = is_upper ? received : first;
  second = is_upper ? second : received;
}

// The sum over aligned groups of kLanes lanes; each lane of a group gets it.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) value += __uint_as_float(shuffle_xor(__float_as_uint(value), mask));
  return value;
}

// What lane `lane` of the lane's quad (4 neighbours) has.
__device__ __forceinline__ uint32_t shuffle_quad(uint32_t value, int lane) {
  uint32_t v;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1c1f, 0xffffffff;" : "=r"(v) : "r"(value), "r"(lane));
  return v;
}

// --- bytes

// sum + factor times byte `b` of `word`, the lowest being number 0; factor: at most 255. It is one instruction,
// IDP, in the pipe of IMAD and about as fast: OpenCL-Benchmark's README measured 118 TOPS of it on a B200, 8 operations
// each, and 36.5 of IMAD, 2 each.
__device__ __forceinline__ uint32_t add_product_of_byte(uint32_t word, int b, uint32_t factor, uint32_t sum) {
  uint32_t v;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(v) : "r"(word), "r"(factor << 8 * b), "r"(sum));
  return v;
}

// Of two pairs of 16 bits, the low halves and the high ones, that of `first` below.
__device__ __forceinline__ uint32_t low_halves(uint32_t first, uint32_t second) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(v) : "r"(first), "r"(second));
  return v;
}
__device__ __forceinline__ uint32_t high_halves(uint32_t first, uint32_t second) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(v) : "r"(first), "r"(second));
  return v;
}

__device__ __forceinline__ int signed_byte(uint32_t word, int b) {
  int v;
  asm("bfe.s32 %0, %1, %2, 8;" : "=r"(v) : "r"(word), "r"(8 * b));
  return v;
}

// --- conversions, rounding to nearest even

__device__ __forceinline__ float widen(Fp16 value) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(value.bits));
  return v;
}

__device__ __forceinline__ Fp16 narrow_f16(float value) {
  Fp16 v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(value));
  return v;
}

#if __CUDA_ARCH__ >= 800

// Two at once, `low` in the low half.
__device__ __forceinline__ uint32_t narrow_f16x2(float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ __forceinline__ uint32_t narrow_bf16x2(float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

#else  // sm_75 has neither

__device__ __forceinline__ uint32_t narrow_f16x2(float low, float high) {
  return narrow_f16(low).bits | static_cast<uint32_t>(narrow_f16(high).bits) << 16;
}

__device__ __forceinline__ uint32_t narrow_bf16x2(float low, float high) {
  const auto rounded = [](float value) {
    const uint32_t bits = __float_as_uint(value);
    return value != value ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}

#endif

}  // namespace lowbit::cuda::ptx

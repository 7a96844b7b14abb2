// sm_90a: stmatrix, and wgmma on tiles in shared memory without swizzle, in the two ways A may come.
#include <cuda_bf16.h>
#include <stdint.h>

extern "C" __global__ void store_matrices(const uint32_t* x, uint32_t* y) {
  __shared__ __align__(16) uint16_t s[32 * 8];
  int lane = threadIdx.x;
  uint32_t address = __cvta_generic_to_shared(&s[lane * 8]);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(x[lane]),
               "r"(x[32 + lane]), "r"(x[64 + lane]), "r"(x[96 + lane]));
  __syncwarp();
  for (int i = 0; i < 4; i++) y[i * 32 + lane] = ((uint32_t*)s)[i * 32 + lane];
  __syncwarp();
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0],{%1,%2};" ::"r"(address), "r"(x[lane]),
               "r"(x[32 + lane]));
  __syncwarp();
  for (int i = 0; i < 2; i++) y[128 + i * 32 + lane] = ((uint32_t*)s)[i * 32 + lane];
}

// Descriptor of a tile of 8 x 8 core matrices (128 bytes each): bytes between them along k and along rows.
__device__ uint64_t descriptor(const void* tile, int along_k, int along_rows) {
  uint64_t start = __cvta_generic_to_shared(tile);
  return (start & 0x3FFFF) >> 4 | (uint64_t)(along_k >> 4) << 16 | (uint64_t)(along_rows >> 4) << 32;
}

// D[64, 8] = A[64, 16] B[8, 16]^T (+ D), row-major 16-bit operands.
template <bool kRegisters>
__device__ void multiply(const uint16_t* a, const uint16_t* b, float* d, int accumulate) {
  __shared__ __align__(128) uint16_t tile_a[64 * 16], tile_b[8 * 16];
  int t = threadIdx.x, warp = t / 32, group = t % 32 / 4, pair = t % 4 * 2;
  auto core = [](int row, int k) { return (row / 8 * 2 + k / 8) * 64 + row % 8 * 8 + k % 8; };
  for (int i = t; i < 64 * 16; i += 128) tile_a[core(i / 16, i % 16)] = a[i];
  tile_b[core(t / 16, t % 16)] = b[t];
  __syncthreads();
  float acc[4];
  for (int i = 0; i < 4; i++) acc[i] = d[(warp * 16 + group + i / 2 * 8) * 8 + pair + i % 2];
  uint64_t describe_b = descriptor(tile_b, 128, 256);
  asm volatile("wgmma.fence.sync.aligned;");
  if (kRegisters) {
    uint32_t r[4];
    for (int i = 0; i < 4; i++) r[i] = *(const uint32_t*)&a[(warp * 16 + group + i % 2 * 8) * 16 + pair + i / 2 * 8];
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %9, 0;"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3},{%4,%5,%6,%7},%8,p,1,1,0;}"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(describe_b), "r"(accumulate));
  } else {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %6, 0;"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3},%4,%5,p,1,1,0,0;}"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "l"(descriptor(tile_a, 128, 256)), "l"(describe_b), "r"(accumulate));
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; i++) d[(warp * 16 + group + i / 2 * 8) * 8 + pair + i % 2] = acc[i];
}

// D[64, 8] = A[64, 64] B[8, 64]^T with rows of 128 bytes, swizzled: the 16-byte units of row r are XORed with r % 8.
extern "C" __global__ void wgmma_swizzled(const uint16_t* a, const uint16_t* b, float* d) {
  __shared__ __align__(1024) uint16_t tile_a[64 * 64], tile_b[8 * 64];
  auto place = [](int i) { return i ^ (i / 64 % 8) * 8; };
  int t = threadIdx.x;
  for (int i = t; i < 64 * 64; i += 128) tile_a[place(i)] = a[i];
  for (int i = t; i < 8 * 64; i += 128) tile_b[place(i)] = b[i];
  __syncthreads();
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  uint64_t describe_a = descriptor(tile_a, 16, 1024) | kSwizzle128;
  uint64_t describe_b = descriptor(tile_b, 16, 1024) | kSwizzle128;
  float acc[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int k = 0; k < 64; k += 16) {  // 16 elements are 32 bytes, in a descriptor's units of 16 bytes 2
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3},%4,%5,1,1,1,0,0;"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "l"(describe_a + k / 8), "l"(describe_b + k / 8));
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; i++) d[(t / 32 * 16 + t % 32 / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = acc[i];
}

extern "C" __global__ void wgmma_shared(const uint16_t* a, const uint16_t* b, float* d, int accumulate) {
  multiply<false>(a, b, d, accumulate);
}
extern "C" __global__ void wgmma_registers(const uint16_t* a, const uint16_t* b, float* d, int accumulate) {
  multiply<true>(a, b, d, accumulate);
}

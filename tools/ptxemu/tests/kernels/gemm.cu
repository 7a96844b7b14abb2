// C[M, N] = A[M, K] B[K, N] by tiles of 64 x 64 x 32, four warps, two stages of cp.async, ldmatrix and mma.sync.
// The template parameters break it in one way each.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ void mma(const __half*, float* c, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ void mma(const __nv_bfloat16*, float* c, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool kTranspose>
__device__ void load_matrices(uint32_t* r, const void* p) {
  uint32_t address = __cvta_generic_to_shared(p);
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ void copy16(void* to, const void* from, bool valid) {
  uint32_t address = __cvta_generic_to_shared(to);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(address), "l"(from), "r"(bytes));
}

template <class T, int kPadding, int kGroupsLeft, bool kBarrierBefore, bool kBarrierAfter>
__device__ void gemm(const T* a, const T* b, float* c, int m, int n, int k) {
  constexpr int BM = 64, BN = 64, BK = 32;
  __shared__ __align__(16) T tile_a[2][BM][BK + kPadding];
  __shared__ __align__(16) T tile_b[2][BK][BN + kPadding];
  int t = threadIdx.x, lane = t & 31, warp_m = t / 64 * 32, warp_n = t / 32 % 2 * 32;
  int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  float acc[2][4][4] = {};
  auto load = [&](int stage, int k0) {
    for (int i = t; i < BM * BK / 8; i += 128) {
      int row = i / (BK / 8), col = i % (BK / 8) * 8;
      bool valid = m0 + row < m && k0 + col < k;
      copy16(&tile_a[stage][row][col], valid ? a + (size_t)(m0 + row) * k + k0 + col : a, valid);
    }
    for (int i = t; i < BK * BN / 8; i += 128) {
      int row = i / (BN / 8), col = i % (BN / 8) * 8;
      bool valid = k0 + row < k && n0 + col < n;
      copy16(&tile_b[stage][row][col], valid ? b + (size_t)(k0 + row) * n + n0 + col : b, valid);
    }
  };
  load(0, 0);
  asm volatile("cp.async.commit_group;");
  int tiles = (k + BK - 1) / BK;
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) load((tile + 1) & 1, (tile + 1) * BK);
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft));
    if (kBarrierBefore) __syncthreads();
    int stage = tile & 1;
    for (int kk = 0; kk < BK; kk += 16) {
      uint32_t fa[2][4], fb[2][4];
      for (int i = 0; i < 2; i++)
        load_matrices<false>(fa[i], &tile_a[stage][warp_m + i * 16 + lane % 16][kk + lane / 16 * 8]);
      for (int j = 0; j < 2; j++)
        load_matrices<true>(fb[j], &tile_b[stage][kk + lane % 16][warp_n + j * 16 + lane / 16 * 8]);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) mma(a, acc[i][j], fa[i], &fb[j / 2][j % 2 * 2]);
    }
    if (kBarrierAfter) __syncthreads();
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int half = 0; half < 2; half++) {
        int row = m0 + warp_m + i * 16 + lane / 4 + half * 8, col = n0 + warp_n + j * 8 + lane % 4 * 2;
        if (row < m && col < n)
          *(float2*)&c[(size_t)row * n + col] = make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
      }
}

#define KERNEL(name, T, ...)                                                               \
  extern "C" __global__ void name(const T* a, const T* b, float* c, int m, int n, int k) { \
    gemm<T, __VA_ARGS__>(a, b, c, m, n, k);                                                \
  }
KERNEL(gemm_f16, __half, 8, 1, true, true)
KERNEL(gemm_bf16, __nv_bfloat16, 8, 1, true, true)
KERNEL(gemm_with_conflicts, __half, 0, 1, true, true)
KERNEL(gemm_waits_too_little, __half, 8, 2, true, true)
KERNEL(gemm_no_barrier_before, __half, 8, 1, false, true)
KERNEL(gemm_no_barrier_after, __half, 8, 1, true, false)

// Kernels that execute each function of csrc/cuda/device/ptx.cuh, for tests/test_cuda_ptx.py. One warp each.
#include "cuda/device/arrival.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/layout.h"
#include "cuda/device/ptx.cuh"

using namespace lowbit;
using namespace lowbit::cuda;

extern "C" {

// out[i] = x[i], 16 bytes per lane.
__global__ void probe_global(const uint4* x, uint4* out) {
  ptx::prefetch_l2(x + threadIdx.x);
  ptx::store_global_16(out + threadIdx.x, ptx::load_global_16(x + threadIdx.x));
}

// The same by way of L1, and in every other lane only; each lane's number; sums over groups of lanes.
__global__ void probe_cached(const uint4* x, uint4* all, uint4* alternate, int* index, float* sums4, float* sums16) {
  const bool wanted = threadIdx.x % 2 == 0;
  uint4 v = {7, 7, 7, 7};
  ptx::load_global_16_if(wanted, v, wanted ? x + threadIdx.x : nullptr);
  all[threadIdx.x] = ptx::load_global_16_cached(x + threadIdx.x);
  alternate[threadIdx.x] = v;
  index[threadIdx.x] = ptx::read_thread_index();
  sums4[threadIdx.x] = ptx::sum_lanes<4>(static_cast<float>(threadIdx.x));
  sums16[threadIdx.x] = ptx::sum_lanes<16>(static_cast<float>(threadIdx.x));
}

// out[i] = x[i] by 8 and by 4 bytes; the low and the high halves of two words.
__global__ void probe_narrow_loads(const uint32_t* x, uint2* out8, uint32_t* out4, uint32_t* low, uint32_t* high) {
  const uint2 v = ptx::load_global_8_cached(x + 2 * threadIdx.x);
  out8[threadIdx.x] = v;
  out4[threadIdx.x] = ptx::load_global_4_cached(x + threadIdx.x);
  low[threadIdx.x] = ptx::low_halves(v.x, v.y);
  high[threadIdx.x] = ptx::high_halves(v.x, v.y);
}

// Two floats per lane, rounded and packed, then the first half widened.
__global__ void probe_conversions(const float2* x, uint32_t* bf16, uint32_t* f16, float* widened, uint16_t* single) {
  const float2 pair = x[threadIdx.x];
  bf16[threadIdx.x] = ptx::narrow_bf16x2(pair.x, pair.y);
  f16[threadIdx.x] = ptx::narrow_f16x2(pair.x, pair.y);
  widened[threadIdx.x] = ptx::widen(Fp16{static_cast<uint16_t>(f16[threadIdx.x])});
  single[threadIdx.x] = ptx::narrow_f16(pair.x).bits;
}

// Products with a word's bytes, these with signs, what the neighbour and the next lane have, and shared memory by
// address.
__global__ void probe_words(const uint32_t* x, uint32_t* products, int* signed_bytes, uint32_t* neighbours,
                            uint32_t* next, uint32_t* shared4, float2* shared8, uint32_t* in_quad, uint4* shared16) {
  __shared__ alignas(16) uint32_t words[4 * kWarpSize];
  const int lane = threadIdx.x;
  const uint32_t word = x[lane];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    products[4 * lane + b] = ptx::add_product_of_byte(word, b, 255 - b, 0xffffff00 + lane);
    signed_bytes[4 * lane + b] = ptx::signed_byte(word, b);
    in_quad[4 * lane + b] = ptx::shuffle_quad(word, b);
  }
  neighbours[lane] = ptx::shuffle_xor(word, 1);
  next[lane] = ptx::shuffle(word, lane + 1);
  words[lane] = word;
  words[lane + kWarpSize] = ~word;
  words[lane + 2 * kWarpSize] = word + 1;
  words[lane + 3 * kWarpSize] = word + 2;
  __syncthreads();
  shared4[lane] = ptx::load_shared_4(ptx::shared_address(words + lane));
  shared8[lane] = ptx::load_shared_8(ptx::shared_address(words + 2 * lane));
  shared16[lane] = ptx::load_shared_16(ptx::shared_address(words + 4 * lane));
}

// Words that change places between lanes; a prefetch changes nothing.
__global__ void probe_swap(const uint32_t* x, int mask, uint32_t* out) {
  uint32_t first = x[2 * threadIdx.x], second = x[2 * threadIdx.x + 1];
  ptx::prefetch_l2(x + threadIdx.x);
  ptx::swap_with_lane(first, second, threadIdx.x, mask);
  out[2 * threadIdx.x] = first;
  out[2 * threadIdx.x + 1] = second;
}

// Where each thread stands.
__global__ void probe_indices(int* threads, unsigned* blocks) {
  threads[blockIdx.x * kWarpSize + threadIdx.x] = ptx::read_thread_index();
  blocks[blockIdx.x * kWarpSize + threadIdx.x] = ptx::read_block_index();
}

// Blocks that each leave a part; which is the last, and the sum that it finds.
__global__ void probe_arrival(uint32_t* counter, float* parts, float* sums, int* is_last) {
  const int i = threadIdx.x;
  parts[blockIdx.x * blockDim.x + i] = static_cast<float>(blockIdx.x * blockDim.x + i);
  const bool last = is_last_to_arrive(counter, gridDim.x);
  is_last[blockIdx.x * blockDim.x + i] = last;
  if (!last) return;
  // What another thread of another block wrote.
  float sum = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block)
    sum += ptx::load_global_4_fresh(parts + block * blockDim.x + (blockDim.x - 1 - i)) +
           ptx::load_global_16_fresh(parts + block * blockDim.x + (blockDim.x - 1 - i) / 4 * 4).w;
  sums[i] = sum;
}

}  // extern "C"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// c[16, 8] = a[16, 16] b[16, 8], 16-bit operands row-major.
template <class T>
__device__ void probe_mma(const T* a, const T* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t a_registers[4], b_registers[2];
  float sums[4] = {};
  for (int i = 0; i < 8; i += 2) {
    const Position low = mma_a(lane, i), high = mma_a(lane, i + 1);
    a_registers[i / 2] = a[low.row * 16 + low.column].bits | a[high.row * 16 + high.column].bits << 16;
  }
  for (int i = 0; i < 4; i += 2) {
    const Position low = mma_b(lane, i), high = mma_b(lane, i + 1);
    b_registers[i / 2] = b[low.row * 8 + low.column].bits | b[high.row * 8 + high.column].bits << 16;
  }
  ptx::mma<T>(sums, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) {
    const Position at = mma_c(lane, i);
    c[at.row * 8 + at.column] = sums[i];
  }
}

extern "C" {

__global__ void probe_mma_bf16(const Bf16* a, const Bf16* b, float* c) { probe_mma(a, b, c); }
__global__ void probe_mma_f16(const Fp16* a, const Fp16* b, float* c) { probe_mma(a, b, c); }

// out[16, 16] = a[16, 16], by way of an asynchronous copy of which each row's last 16 bytes read only `valid` bytes,
// and ldmatrix.
__global__ void probe_ldmatrix(const uint16_t* a, int valid, uint16_t* out) {
  __shared__ alignas(16) uint16_t tile[16][16];
  const int lane = threadIdx.x, row = lane / 2, column = lane % 2 * 8;
  ptx::copy_async_16(ptx::shared_address(&tile[row][column]), a + row * 16 + column, column ? valid : 16);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncthreads();
  uint32_t fragment[4];
  ptx::load_matrix_4(fragment, ptx::shared_address(&tile[ldmatrix_a(lane).row][ldmatrix_a(lane).column]));
  for (int i = 0; i < 8; ++i) {
    const Position at = mma_a(lane, i);
    out[at.row * 16 + at.column] = static_cast<uint16_t>(fragment[i / 2] >> (i % 2 * 16));
  }
}

}  // extern "C"

#endif

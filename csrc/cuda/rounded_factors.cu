// rounded_factors: LoRA's two factors in the dtype of x, for torch's product after the weight was decoded.
//
// A few blocks of threads take one component of the rank, a column of each factor. Each of them finds the divisor of
// the whole column; then they share the writing.
#include "device/encode.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// This many blocks keep enough loads in flight where the rank is small; each block more would read all of low again.
constexpr int64_t kBlocks = 128;
constexpr int64_t kRowsPerThread = 4;
// Larger values of a component of low are divided, and up multiplied. fp16 ends just below 2^16.
constexpr float kLargest = 0x1p15f;

// The largest finite magnitude of a column of low, times scaling; by all threads of the block.
template <class Low>
__device__ float largest_finite(const Low* low, int64_t m, int64_t rank, float scaling) {
  __shared__ uint32_t largest_of[kWarps];
  Magnitude<float> largest;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < m; row += kThreads) {
    const float value = __fmul_rn(widen(low[row * rank]), scaling);
    largest.take(fabsf(value) < INFINITY ? value : 0.0f);
  }
  largest.reduce(kWarpSize);
  if (threadIdx.x % kWarpSize == 0) largest_of[threadIdx.x / kWarpSize] = largest.bits;
  __syncthreads();
#pragma unroll
  for (const uint32_t bits : largest_of) largest.bits = max(largest.bits, bits);
  return largest.value();
}

// up_row, up_component: strides of up and of up_out.
template <class Low, class Up, class Out>
__global__ void __launch_bounds__(kThreads)
    rounded_factors_kernel(const Low* __restrict__ low, const Up* __restrict__ up, float scaling, int64_t m, int64_t n,
                           int64_t rank, int64_t up_row, int64_t up_component, Out* __restrict__ low_out,
                           Out* __restrict__ up_out) {
  constexpr bool kMoves = std::is_same_v<Out, Fp16>;
  const int64_t component = blockIdx.x, up_first = component * up_component;
  float moved = 1.0f;
  if constexpr (kMoves) {
    const float largest = largest_finite(low + component, m, rank, scaling);
    // At most 2^15: a row far beyond fp16 would make up, which is below 2 in any LoRA, infinite for all rows.
    moved = fminf(fmaxf(__fmul_rn(largest, 1 / kLargest), fmaxf(fabsf(scaling), 1.0f)), kLargest);
  }
  const int64_t first_row = int64_t{blockIdx.y} * kThreads + threadIdx.x, step = int64_t{gridDim.y} * kThreads;
#pragma unroll 4
  for (int64_t row = first_row; row < m; row += step) {
    const int64_t at = row * rank + component;
    const float value = __fmul_rn(widen(low[at]), scaling);
    narrow(kMoves ? __fdiv_rn(value, moved) : value, low_out + at);
  }
#pragma unroll 4
  for (int64_t row = first_row; row < n; row += step) {
    const int64_t at = up_first + row * up_row;
    narrow(__fmul_rn(widen(up[at]), moved), up_out + at);
  }
}

template <class Low, class Up, class Out>
int launch(const RoundedFactorsArgs& args, Stream stream) {
  const int64_t shares = std::min(kBlocks / args.rank, ceil_div(args.n, kThreads * kRowsPerThread));
  const dim3 grid(static_cast<unsigned>(args.rank), static_cast<unsigned>(std::max<int64_t>(shares, 1)));
  rounded_factors_kernel<<<grid, kThreads, 0, stream>>>(
      static_cast<const Low*>(args.low), static_cast<const Up*>(args.up), args.scaling, args.m, args.n, args.rank,
      args.up_row_stride, args.up_component_stride, static_cast<Out*>(args.low_out), static_cast<Out*>(args.up_out));
  return cudaGetLastError();
}

}  // namespace

int rounded_factors(const RoundedFactorsArgs& args, Stream stream) {
  if (args.m == 0 || args.n == 0 || args.rank == 0) return cudaSuccess;
  return for_dtype(args.low_dtype, [&](auto low) {
    return for_dtype(args.up_dtype, [&](auto up) {
      return for_dtype(args.dtype,
                       [&](auto out) { return launch<decltype(low), decltype(up), decltype(out)>(args, stream); });
    });
  });
}

}  // namespace lowbit::cuda

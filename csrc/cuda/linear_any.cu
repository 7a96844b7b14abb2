// linear for whatever the fast kernels do not take: any shape and alignment, blocks that cross rows, int8. A warp takes
// a row of W, element by element, and up to 8 rows of x. Made to be right, not fast.
#include "decode.cuh"
#include "elements.cuh"
#include "kernels.h"
#include "launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRows = 8;  // of x

struct Weight {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* scale_codes;
  const float* group_scales;
  const float* offset;
  Format format;
  bool is_int8;
  int64_t block_size;

  __device__ float operator()(int64_t element) const {
    const int64_t block = element / block_size;
    if (is_int8) return __fmul_rn(__fmul_rn(static_cast<int8_t>(packed[element]), absmax[block]), kInt8Unit);
    const float scale =
        absmax ? absmax[block]
               : BlockScales<true>{nullptr, scale_codes, group_scales, offset}(static_cast<uint64_t>(block));
    return __fmul_rn(format.codebook[unpack(packed, element)], scale);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    linear_any_kernel(const __grid_constant__ Weight weight, const T* x, const float* bias, const float* t,
                      const float* lora_b, float scaling, int64_t m, int64_t n, int64_t k, int64_t rank, T* y) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize, first_m = int64_t{blockIdx.y} * kRows;
  if (row >= n) return;
  const int rows = static_cast<int>(min(m - first_m, int64_t{kRows}));
  float sums[kRows] = {};
  for (int64_t column = lane; column < k; column += kWarpSize) {
    const float value = weight(row * k + column);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) sums[i] = fmaf(value, widen(x[(first_m + i) * k + column]), sums[i]);
  }
  for (int64_t r = lane; r < rank; r += kWarpSize) {
    const float value = scaling * lora_b[row * rank + r];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) sums[i] = fmaf(value, t[(first_m + i) * rank + r], sums[i]);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float sum = ptx::sum_lanes<kWarpSize>(sums[i]);
    if (lane == 0 && i < rows) narrow(bias ? sum + bias[row] : sum, y + (first_m + i) * n + row);
  }
}

}  // namespace

int linear_any(const LinearArgs& args, Stream stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  const QuantizedWeight& weight = args.weight;
  const Weight any{weight.packed,       weight.absmax,    weight.scale_codes,
                   weight.group_scales, weight.offset,    weight.format ? *weight.format : Format{},
                   !weight.format,      weight.block_size};
  const dim3 grid(static_cast<unsigned>(ceil_div(args.n, kWarps)), static_cast<unsigned>(ceil_div(args.m, kRows)));
  return for_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    linear_any_kernel<<<grid, kThreads, 0, stream>>>(any, static_cast<const T*>(args.x), args.bias, args.t, args.lora_b,
                                                     args.scaling, args.m, args.n, args.k, args.t ? args.rank : 0,
                                                     static_cast<T*>(args.y));
    return cudaGetLastError();
  });
}

}  // namespace lowbit::cuda

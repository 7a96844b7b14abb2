// linear: calls the kernel that the plan names. This file has the one for what the fast kernels do not take: any shape
// and alignment, blocks that cross rows, int8. A warp takes a row of W, element by element, and up to 8 rows of x.
#include "device/launch.h"
#include "device/weight.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRows = 8;  // of x

template <class T, ScaleKind kKind>
__global__ void __launch_bounds__(kThreads)
    linear_any_kernel(const __grid_constant__ LinearArgs args, const __grid_constant__ Format format, int block_shift) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize, first_m = int64_t{blockIdx.y} * kRows;
  if (row >= args.n) return;
  const ElementReader<kKind> weight_of(args.weight, format, block_shift);
  const T* x = static_cast<const T*>(args.x) + first_m * args.k;
  const int rows = static_cast<int>(min(args.m - first_m, int64_t{kRows}));
  float sums[kRows] = {};
  for (int64_t column = lane; column < args.k; column += kWarpSize) {
    const float value = weight_of(row, row * args.k + column);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) sums[i] = fmaf(value, widen(x[i * args.k + column]), sums[i]);
  }
  for (int64_t r = lane; r < args.rank; r += kWarpSize) {
    const float value = args.scaling * args.lora_b[row * args.rank + r];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows) sums[i] = fmaf(value, args.t[(first_m + i) * args.rank + r], sums[i]);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float sum = ptx::sum_lanes<kWarpSize>(sums[i]);
    if (lane == 0 && i < rows)
      narrow(plus_bias(sum, args.bias, row), static_cast<T*>(args.y) + (first_m + i) * args.n + row);
  }
}

int linear_any(const LinearArgs& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.n, kWarps)), static_cast<unsigned>(ceil_div(args.m, kRows)));
  return for_dtype(args.dtype, [&](auto element) {
    return for_scale_kind(args.weight, [&](auto kind) {
      linear_any_kernel<decltype(element), kind.value>
          <<<grid, kThreads, 0, stream>>>(args, *args.weight.format, log2_of(args.weight.block_size));
      return cudaGetLastError();
    });
  });
}

}  // namespace

int linear(const LinearArgs& args, const Plan& plan, Stream stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  LinearArgs given = args;
  if (!given.t) given.rank = 0;
  if (plan.splits == 1) given.workspace = nullptr;
  switch (plan.path) {
    case Path::gemv_mma:
    case Path::gemv_fma:
      return linear_gemv(given, plan, stream);
    case Path::gemv_int8:
      return linear_gemv_int8(given, stream);
    case Path::gemm:
      return linear_gemm(given, plan, stream);
    case Path::linear_any:
      return linear_any(given, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lowbit::cuda

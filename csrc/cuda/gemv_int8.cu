// linear for a few rows of x and an int8 weight. A warp takes four rows of W, so that what it reads of x serves four
// times; each lane multiplies 16 consecutive weights of each.
#include "device/elements.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWeightRows = 4;

// Byte `b` of `word`, whose sign bits are flipped, as a float: the mantissa of 2^23 + byte. Two instructions at full
// rate; a conversion would be one at a quarter of it or less.
__device__ __forceinline__ float int8_value(uint32_t flipped, int b) {
  return __fsub_rn(__uint_as_float(__byte_perm(flipped, 0x4b000000, 0x7440 | b)), 8388608.0f + 128.0f);
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads)
    gemv_int8_kernel(const uint8_t* codes, const float* absmax, const T* x, Bias bias, const float* t,
                     const float* lora_b, float scaling, int64_t m, int64_t n, int64_t k, int64_t rank, T* y) {
  constexpr int kCount = kPerAccess<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_n = (int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize) * kWeightRows;
  const int64_t first_m = int64_t{blockIdx.y} * kRows;
  if (first_n >= n) return;
  // Rows past the last repeat the last row; their sums are not written.
  const auto row_of_w = [&](int row) { return min(first_n + row, n - 1); };
  const auto row_of_x = [&](int row) { return min(first_m + row, m - 1); };

  float sums[kWeightRows][kRows] = {};
  for (int64_t column = lane * kAccessBytes; column < k; column += kTileBytes) {
    uint4 weights[kWeightRows];
#pragma unroll
    for (int row = 0; row < kWeightRows; ++row) weights[row] = ptx::load_global_16(codes + row_of_w(row) * k + column);
#pragma unroll
    for (int first = 0; first < kAccessBytes; first += kCount) {
      float values[kRows][kCount];
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        widen<T>(ptx::load_global_16_cached(x + row_of_x(row) * k + column + first), values[row]);
#pragma unroll
      for (int row = 0; row < kWeightRows; ++row) {
        const uint32_t words[4] = {weights[row].x, weights[row].y, weights[row].z, weights[row].w};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float weight = int8_value(words[(first + i) / 4] ^ 0x80808080, (first + i) % 4);
#pragma unroll
          for (int m = 0; m < kRows; ++m) sums[row][m] = fmaf(weight, values[m][i], sums[row][m]);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kWeightRows; ++row) {
    const float scale = __fmul_rn(absmax[row_of_w(row)], kInt8Unit);
#pragma unroll
    for (int m = 0; m < kRows; ++m) sums[row][m] *= scale;
  }
  for (int64_t r = lane; r < rank; r += kWarpSize) {
#pragma unroll
    for (int row = 0; row < kWeightRows; ++row) {
      const float value = scaling * lora_b[row_of_w(row) * rank + r];
#pragma unroll
      for (int m = 0; m < kRows; ++m) sums[row][m] = fmaf(value, t[row_of_x(m) * rank + r], sums[row][m]);
    }
  }
#pragma unroll
  for (int row = 0; row < kWeightRows; ++row) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float sum = plus_bias(ptx::sum_lanes<kWarpSize>(sums[row][i]), bias, row_of_w(row));
      const int64_t at_m = first_m + i, at_n = first_n + row;
      if (lane == 0 && at_m < m && at_n < n) narrow(sum, y + at_m * n + at_n);
    }
  }
}

template <class T, int kRows>
int launch(const LinearArgs& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.n, kWarps * kWeightRows)),
                  static_cast<unsigned>(ceil_div(args.m, kRows)));
  gemv_int8_kernel<T, kRows><<<grid, kThreads, 0, stream>>>(
      args.weight.packed, args.weight.scales.values, static_cast<const T*>(args.x), args.bias, args.t, args.lora_b,
      args.scaling, args.m, args.n, args.k, args.rank, static_cast<T*>(args.y));
  return cudaGetLastError();
}

}  // namespace

int linear_gemv_int8(const LinearArgs& args, Stream stream) {
  return for_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    return args.m == 1 ? launch<T, 1>(args, stream) : launch<T, 4>(args, stream);
  });
}

}  // namespace lowbit::cuda

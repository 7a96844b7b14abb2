// linear_grad_input without tensor cores: fp32 grad, GPUs before sm_80, and what is not aligned.
#pragma once

#include "grad_input.cuh"

namespace lowbit::cuda {

template <class T, bool kDoubleQuant>
__global__ void __launch_bounds__(FmaTile::kThreads, 2)
    grad_input_fma_kernel(const __grid_constant__ GradInputProduct product, const __grid_constant__ Format format) {
  constexpr int kRows = FmaTile::kRows, kLaneColumns = FmaTile::kLaneColumns, kWarps = FmaTile::kWarps;
  constexpr int kStride = kWarpSize + 1;  // of the sums of a lane: no two lanes meet in a bank, whoever reads
  __shared__ PairTable table;
  __shared__ float sums_of_warps[kRows][kLaneColumns * kStride];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto tile = product.tile_of(blockIdx.x, kRows, FmaTile::kColumns);
  const ScaleReader<kDoubleQuant> scale_of(product.weight.scales);
  const int64_t rows = min(int64_t{kRows}, product.m - tile.row);
  const bool has_columns = tile.column + lane * kLaneColumns < product.k;
  const int depth = has_columns ? static_cast<int>(tile.end_row - tile.first_row) : 0;
  const T* grad_from = static_cast<const T*>(product.grad) + tile.row * product.n + tile.first_row + warp;
  int64_t element = (tile.first_row + warp) * product.k + tile.column + lane * kLaneColumns;

  table.fill(format);
  __syncthreads();
  const uint32_t lane_base = table.lane_base(lane);
  float sums[kRows][kLaneColumns] = {};
  for (int row = warp; row < depth; row += kWarps) {
    const uint4 bytes = ptx::load_global_16(product.weight.packed + element / 2);
    // The lane's columns lie in one block: both begin at multiples of 32.
    const float scale = scale_of(static_cast<uint64_t>(element) >> product.block_shift);
    float scaled_grad[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      scaled_grad[r] = r < rows ? __fmul_rn(widen(grad_from[r * product.n]), scale) : 0.0f;
    grad_from += kWarps;
    element += kWarps * product.k;
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int b = 0; b < kAccessBytes; ++b) {
      const float2 pair = PairTable::decode(words[b / 4], b % 4, lane_base);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r][2 * b] = fmaf(scaled_grad[r], pair.x, sums[r][2 * b]);
        sums[r][2 * b + 1] = fmaf(scaled_grad[r], pair.y, sums[r][2 * b + 1]);
      }
    }
  }

  // The warps add up in their order, so that the sum is always the same.
  for (int adding = 0; adding < kWarps; ++adding) {
    if (warp == adding) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          float& sum = sums_of_warps[r][i * kStride + lane];
          sum = adding ? sum + sums[r][i] : sums[r][i];
        }
    }
    __syncthreads();
  }
  for (int r = 0; r < rows; ++r)
    for (int column = threadIdx.x; column < min(int64_t{FmaTile::kColumns}, product.k - tile.column);
         column += FmaTile::kThreads)
      tile.out[r * product.k + column] = sums_of_warps[r][column % kLaneColumns * kStride + column / kLaneColumns];
}

template <class T, ScaleKind kKind>
__global__ void __launch_bounds__(ElementTile::kThreads)
    grad_input_element_kernel(const __grid_constant__ GradInputProduct product, const __grid_constant__ Format format) {
  constexpr int kRows = ElementTile::kRows;
  const auto tile = product.tile_of(blockIdx.x, kRows, ElementTile::kColumns);
  const T* grad = static_cast<const T*>(product.grad) + tile.row * product.n;
  const int64_t rows = min(int64_t{kRows}, product.m - tile.row);
  const int64_t column = tile.column + threadIdx.x;
  const ElementReader<kKind> weight_of(product.weight, format, product.block_shift);
  if (column >= product.k) return;

  float sums[kRows] = {};
  for (int64_t row = tile.first_row; row < tile.end_row; ++row) {
    const float weight = weight_of(row, row * product.k + column);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) sums[r] = fmaf(widen(grad[r * product.n + row]), weight, sums[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < rows) tile.out[r * product.k + threadIdx.x] = sums[r];
}

}  // namespace lowbit::cuda

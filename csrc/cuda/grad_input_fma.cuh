// linear_grad_input without tensor cores: fp32 grad, GPUs before sm_80, and what is not aligned.
#pragma once

#include "grad_input.cuh"

namespace lowbit::cuda {

template <class T, bool kDoubleQuant>
__global__ void __launch_bounds__(FmaTile::kThreads, 2)
    grad_input_fma_kernel(const __grid_constant__ GradInputProduct product, const __grid_constant__ Format format) {
  constexpr int kRows = FmaTile::kRows, kLaneColumns = FmaTile::kLaneColumns, kWarps = FmaTile::kWarps;
  constexpr int kColumnLanes = FmaTile::kColumnLanes, kStepRows = kWarps * FmaTile::kWarpRows;
  constexpr int kStride = FmaTile::kSumStride;
  __shared__ PairTable table;
  __shared__ float sums_of_warps[kRows][kLaneColumns * kStride];
  static_assert(sizeof(table) + sizeof(sums_of_warps) == FmaTile::kSharedBytes);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto tile = product.tile_of(blockIdx.x, kRows, FmaTile::kColumns);
  const ScaleReader<kDoubleQuant> scale_of(product.weight.scales);
  const int64_t rows = min(int64_t{kRows}, product.m - tile.row);
  const int first_row = warp * FmaTile::kWarpRows + lane / kColumnLanes;  // of a step
  const int64_t column = tile.column + lane % kColumnLanes * kLaneColumns;
  const int depth = column < product.k ? static_cast<int>(tile.end_row - tile.first_row) : 0;
  const T* grad_from = static_cast<const T*>(product.grad) + tile.row * product.n + tile.first_row + first_row;
  int64_t element = (tile.first_row + first_row) * product.k + column;

  table.fill(format);
  __syncthreads();
  const uint32_t lane_base = table.lane_base(lane);
  float sums[kRows][kLaneColumns] = {};
  for (int row = first_row; row < depth; row += kStepRows) {
    const uint4 bytes = ptx::load_global_16(product.weight.packed + element / 2);
    // The lane's columns lie in one block: both begin at multiples of 32.
    const float scale = scale_of(static_cast<uint64_t>(element) >> product.block_shift);
    float scaled_grad[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      scaled_grad[r] = r < rows ? __fmul_rn(widen(grad_from[r * product.n]), scale) : 0.0f;
    grad_from += kStepRows;
    element += kStepRows * product.k;
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

  // LoRA: lora_a's rows are dealt out to the splits, and there as W's are.
  const float* grad_t = product.grad_t + tile.row * product.rank;
  for (int64_t row = int64_t{first_row} * product.splits + tile.split; column < product.k && row < product.rank;
       row += int64_t{kStepRows} * product.splits) {
    const float* from = product.lora_a + row * product.k + column;
    float factors[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) factors[r] = r < rows ? grad_t[r * product.rank + row] : 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r][i] = fmaf(factors[r], from[i], sums[r][i]);
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
  store_tile<T, kRows, FmaTile::kColumns, 1>(product, tile, [&](int row, int column, float (&sum)[1]) {
    const float* from = &sums_of_warps[row][column % kLaneColumns * kStride + column / kLaneColumns];
    sum[0] = from[0];
    for (int i = 1; i < FmaTile::kWarpRows; ++i) sum[0] += from[i * kColumnLanes];
  });
}

template <class T, ScaleKind kKind>
__global__ void __launch_bounds__(ElementTile::kThreads)
    grad_input_element_kernel(const __grid_constant__ GradInputProduct product, const __grid_constant__ Format format) {
  constexpr int kRows = ElementTile::kRows;
  __shared__ float sums_of_threads[kRows][ElementTile::kThreads];
  static_assert(sizeof(sums_of_threads) == ElementTile::kSharedBytes);
  const auto tile = product.tile_of(blockIdx.x, kRows, ElementTile::kColumns);
  const int64_t rows = min(int64_t{kRows}, product.m - tile.row);
  const int64_t column = tile.column + threadIdx.x;
  const ElementReader<kKind> weight_of(product.weight, format, product.block_shift);

  float sums[kRows] = {};
  // Adds `value` times one column of grad or grad_t, whose rows have `length` elements.
  const auto add = [&](float value, const auto* column_of_grad, int64_t length) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) sums[r] = fmaf(widen(column_of_grad[r * length]), value, sums[r]);
  };
  if (column < product.k) {
    const T* grad = static_cast<const T*>(product.grad) + tile.row * product.n;
    for (int64_t row = tile.first_row; row < tile.end_row; ++row)
      add(weight_of(row, row * product.k + column), grad + row, product.n);
    const float* grad_t = product.grad_t + tile.row * product.rank;
#pragma unroll 1  // unrolled, it makes ptxas spill
    for (int64_t row = tile.split; row < product.rank; row += product.splits)
      add(product.lora_a[row * product.k + column], grad_t + row, product.rank);
  }
  // (Each thread reads what it writes; registers have no numbers that a loop can count.)
  for (int r = 0; r < kRows; ++r) sums_of_threads[r][threadIdx.x] = sums[r];
  store_tile<T, kRows, ElementTile::kColumns, 1>(
      product, tile, [&](int row, int at, float (&sum)[1]) { sum[0] = sums_of_threads[row][at]; });
}

}  // namespace lowbit::cuda

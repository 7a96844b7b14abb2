// The second pass of a product whose contraction several blocks of threads have shared.
#pragma once

#include "elements.cuh"
#include "launch.h"

namespace lowbit::cuda {

constexpr int kSplitSumThreads = 256;

// out[rows, columns] = the sum of partial[splits, rows, columns] in their order, so that it is always the same,
// + bias[columns] + low[rows, rank] up[rank, columns]
struct SplitSum {
  const float* partial;
  int64_t splits, rows, columns;
  const float* bias = nullptr;  // or null
  const float* low = nullptr;   // with up; not read where rank is 0
  const float* up = nullptr;
  int64_t rank = 0;
};

template <class T>
__global__ void __launch_bounds__(kSplitSumThreads) split_sum_kernel(const __grid_constant__ SplitSum args, T* out) {
  const int64_t column_tiles = ceil_div(args.columns, kSplitSumThreads);
  for (int64_t tile = blockIdx.x; tile < args.rows * column_tiles; tile += gridDim.x) {
    const int64_t row = tile / column_tiles, column = tile % column_tiles * kSplitSumThreads + threadIdx.x;
    if (column >= args.columns) continue;
    const int64_t at = row * args.columns + column;
    float sum = 0.0f;
    for (int64_t split = 0; split < args.splits; ++split) sum += args.partial[split * args.rows * args.columns + at];
    for (int64_t r = 0; r < args.rank; ++r)
      sum = fmaf(args.low[row * args.rank + r], args.up[r * args.columns + column], sum);
    narrow(args.bias ? sum + args.bias[column] : sum, out + at);
  }
}

template <class T>
int sum_splits(const SplitSum& args, void* out, Stream stream) {
  const int64_t tiles = args.rows * ceil_div(args.columns, kSplitSumThreads);
  split_sum_kernel<<<grid_for(tiles, 1, 8), kSplitSumThreads, 0, stream>>>(args, static_cast<T*>(out));
  return cudaGetLastError();
}

}  // namespace lowbit::cuda

// What follows the sums of a product of many rows: LoRA in fp32, the bias, and rounding to the output's type.
#pragma once

#include "gemm.h"
#include "support.h"

namespace lowbit::cpu {

// sums[rows, strips * kStrip] += low[rows, rank] B in fp32; fill(r0, depth, tile) writes rows [r0, r0 + depth) of B,
// strip s at tile + s * kDepth * kStrip.
template <class Isa, class Fill>
void add_low_rank(const float* low, int64_t rows, int64_t rank, int64_t strips, const Fill& fill, float* tile,
                  float* sums) {
  using Product = Fp32Product<Isa>;
  const int64_t width = strips * kStrip<Isa>;
  float panel[Isa::kRows * Product::kStride];
  for (int64_t r0 = 0; r0 < rank; r0 += kDepth) {
    const int64_t depth = std::min(kDepth, rank - r0);
    fill(r0, depth, tile);
    for (int64_t row = 0; row < rows; row += Isa::kRows) {
      const int64_t count = std::min<int64_t>(Isa::kRows, rows - row);
      for (int64_t i = 0; i < count; ++i) std::copy_n(low + (row + i) * rank + r0, depth, panel + i * Product::kStride);
      for (int64_t s = 0; s < strips; ++s)
        micro_rows<Isa, Product>(count, panel, panel, tile + s * kDepth * kStrip<Isa>, depth,
                                 sums + row * width + s * kStrip<Isa>, width);
    }
  }
}

// Rows [m0, m0 + m) of y in the `strips` strips from column n0 on, from their sums [m][strips * kStrip] of x W^T.
template <class Isa>
void finish_linear(const LinearArgs& args, int64_t m0, int64_t m, int64_t n0, int64_t strips, float* tile,
                   float* sums) {
  const int64_t width = strips * kStrip<Isa>, n = std::min(width, args.n - n0);
  const auto copy_lora_b = [&](int64_t r0, int64_t depth, float* to) {
    for (int64_t s = 0; s < strips; ++s) {
      for (int64_t j = 0; j < kStrip<Isa>; ++j) {
        const float* row = args.lora_b + std::min(n0 + s * kStrip<Isa> + j, args.n - 1) * args.rank + r0;
        for (int64_t r = 0; r < depth; ++r) to[(s * kDepth + r) * kStrip<Isa> + j] = row[r];
      }
    }
  };
  if (args.t) add_low_rank<Isa>(args.t + m0 * args.rank, m, args.rank, strips, copy_lora_b, tile, sums);
  float* const bias = tile;  // which is free again
  if (args.bias) load_bias<Isa>(args.bias, n0, n, bias);
  for_dtype(args.dtype, [&]<class T>(T) {
    for (int64_t i = 0; i < m; ++i) {
      float* row = sums + i * width;
      for (int64_t j = 0; args.bias && j < n; ++j) row[j] += bias[j];
      store_row<Isa>(row, n, static_cast<T*>(args.y) + (m0 + i) * args.n + n0);
    }
  });
}

// The same for grad_x, its columns from k0 on, and the sums of grad W.
template <class Isa>
void finish_grad_input(const LinearGradInputArgs& args, int64_t m0, int64_t m, int64_t k0, int64_t strips, float* tile,
                       float* sums) {
  const int64_t width = strips * kStrip<Isa>, k = std::min(width, args.k - k0);
  const auto copy_lora_a = [&](int64_t r0, int64_t depth, float* to) {
    for (int64_t column = 0; column < k; column += kStrip<Isa>) {
      for (int64_t r = 0; r < depth; ++r)
        std::copy_n(args.lora_a + (r0 + r) * args.k + k0 + column, std::min(kStrip<Isa>, k - column),
                    to + column * kDepth + r * kStrip<Isa>);
    }
  };
  if (args.grad_t) add_low_rank<Isa>(args.grad_t + m0 * args.rank, m, args.rank, strips, copy_lora_a, tile, sums);
  for_dtype(args.dtype, [&]<class T>(T) {
    for (int64_t i = 0; i < m; ++i)
      store_row<Isa>(sums + i * width, k, static_cast<T*>(args.grad_x) + (m0 + i) * args.k + k0);
  });
}

}  // namespace lowbit::cpu

// linear: y = x W^T (+ LoRA + bias), and linear_grad_input: grad_x = grad W, on a quantized W.
// Few rows go through gemv.h; the rest through gemm.h, for which this file decodes the tiles of W.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "dequantize.h"
#include "gemm.h"
#include "gemv.h"
#include "kernels.h"
#include "support.h"

namespace lowbit::cpu {

// Decodes W^T for accumulate(): rows [k0, k0 + depth) of it are columns of W, the strips rows of W from `first_row` on.
template <class Isa>
class TransposedTiles {
 public:
  TransposedTiles(const QuantizedWeight& weight, int64_t n, int64_t k) : weight_(weight), n_(n), k_(k) {
    if (weight.format) decode_.emplace(*weight.format);
  }

  void fill(int64_t first_row, int64_t strips, int64_t k0, int64_t depth, float* tile) const {
    // Lanes past the last row repeat it: they are computed and not stored.
    for (int64_t group = 0; group < 2 * strips; ++group) {
      float* to = tile + group / 2 * kDepth * kStrip<Isa> + group % 2 * Isa::kLanes;
      const int64_t row = first_row + group * Isa::kLanes;
      if (row >= n_) break;
      if (weight_.format && k_ % 64 == 0) {
        fill_chunks(row, k0, depth, to);
      } else {
        fill_rows(row, k0, depth, to);
      }
    }
  }

 private:
  // kLanes rows, 64 columns at a time: codes are transposed in registers before they are looked up.
  void fill_chunks(int64_t row, int64_t k0, int64_t depth, float* to) const {
    const int shift = block_shift(weight_);
    const uint8_t* rows[Isa::kLanes];
    // Scale of each half chunk, by lane; a block of 64 or more elements has the same for both halves.
    float scales[kDepth / 32][Isa::kLanes];
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) {
      const int64_t element = std::min(row + lane, n_ - 1) * k_ + k0, first_block = element >> shift;
      rows[lane] = weight_.packed + element / 2;
      float decoded[kDepth / kMinBlockSize + 1];
      decode_scales<Isa>(weight_, first_block, ((element + depth - 1) >> shift) - first_block + 1, decoded);
      for (int64_t half = 0; half < depth / 32; ++half)
        scales[half][lane] = decoded[((element + 32 * half) >> shift) - first_block];
    }
    for (int64_t half = 0; half < depth / 32; ++half, to += 32 * kStrip<Isa>)
      decode_->columns(rows, 16 * half, Isa::load(scales[half]), to, kStrip<Isa>);
  }

  // Any k, any codes: row by row.
  void fill_rows(int64_t row, int64_t k0, int64_t depth, float* to) const {
    float decoded[kDepth];
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) {
      const int64_t source = std::min(row + lane, n_ - 1);
      decode_elements<Isa>(weight_, decode_, source * k_ + k0, depth, decoded);
      for (int64_t k = 0; k < depth; ++k) to[k * kStrip<Isa> + lane] = decoded[k];
    }
  }

  const QuantizedWeight& weight_;
  int64_t n_, k_;
  std::optional<typename Isa::Decoder> decode_;
};

template <class Isa>
void linear_gemm(const LinearArgs& args, const ParallelFor& parallel_for) {
  const Panels<Isa> x(args.x, args.dtype, args.m, args.k, parallel_for);
  const Panels<Isa> t(args.t, Dtype::f32, args.m, args.rank, parallel_for);
  const Tasks tasks(x.count, ceil_div(args.n, kStrip<Isa>), Isa::kRows, 1, parallel_for.threads);
  parallel_for(tasks.count, 1, [&](int64_t begin, int64_t end) {
    const TransposedTiles<Isa> weight(args.weight, args.n, args.k);
    const Scratch tile(tasks.strips_per_task() * kDepth * kStrip<Isa>);
    const Scratch sums(tasks.panels_per_task() * Isa::kRows * tasks.strips_per_task() * kStrip<Isa>);
    for (int64_t i = begin; i < end; ++i) {
      const Task task = tasks[i];
      const int64_t m0 = x.first_row(task.panel_begin), m1 = x.first_row(task.panel_end);
      const int64_t n0 = task.strip_begin * kStrip<Isa>, width = task.strips * kStrip<Isa>;
      const int64_t n = std::min(width, args.n - n0);
      std::fill_n(sums.data(), (m1 - m0) * width, 0.0f);
      const auto decode_weight = [&](int64_t k0, int64_t depth, float* to) {
        weight.fill(n0, task.strips, k0, depth, to);
      };
      // LoRA: `rank` more columns of the contraction, into the same sums.
      const auto copy_lora_b = [&](int64_t r0, int64_t depth, float* to) {
        for (int64_t s = 0; s < task.strips; ++s) {
          for (int64_t j = 0; j < kStrip<Isa>; ++j) {
            const float* row = args.lora_b + std::min(n0 + s * kStrip<Isa> + j, args.n - 1) * args.rank + r0;
            for (int64_t r = 0; r < depth; ++r) to[(s * kDepth + r) * kStrip<Isa> + j] = row[r];
          }
        }
      };
      accumulate<Isa>(x, task, decode_weight, tile.data(), sums.data());
      accumulate<Isa>(t, task, copy_lora_b, tile.data(), sums.data());
      for_dtype(args.dtype, [&](auto* typed) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        for (int64_t m = m0; m < m1; ++m) {
          float* row = sums.data() + (m - m0) * width;
          for (int64_t j = 0; args.bias && j < n; ++j) row[j] += args.bias[n0 + j];
          store_row<Isa>(row, n, static_cast<T*>(args.y) + m * args.n + n0);
        }
      });
    }
  });
}

template <class Isa, int M, class T>
void linear_gemv(const LinearArgs& args, const ParallelFor& parallel_for) {
  if constexpr (M > 0) {
    if (args.m != M) return linear_gemv<Isa, M - 1, T>(args, parallel_for);
    if (!args.weight.format) return gemv_int8<Isa, M, T>(args, parallel_for);
    using Decoder = typename Isa::template GemvDecoder<T, M>;
    gemv<Isa, Decoder, M, T>(args, parallel_for);
  }
}

template <class Isa>
void linear(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.n == 0) return;
  // Chunks of 64 along k have to start where chunks of the flat 4-bit weight do.
  const bool whole_chunks = !args.weight.format || args.k % 64 == 0;
  if (args.m > kGemvMaxRows || args.k == 0 || !whole_chunks) return linear_gemm<Isa>(args, parallel_for);
  for_dtype(args.dtype, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    linear_gemv<Isa, kGemvMaxRows, T>(args, parallel_for);
  });
}

// The strips are columns of W here, decoded in their natural order: no transposition.
template <class Isa>
void linear_grad_input(const LinearGradInputArgs& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.k == 0) return;
  const Panels<Isa> grad(args.grad, args.dtype, args.m, args.n, parallel_for);
  // Whole cache lines of packed weight (128 elements) to a task.
  const Tasks tasks(grad.count, ceil_div(args.k, kStrip<Isa>), Isa::kRows, 128 / kStrip<Isa>, parallel_for.threads);
  parallel_for(tasks.count, 1, [&](int64_t begin, int64_t end) {
    std::optional<typename Isa::Decoder> decode;
    if (args.weight.format) decode.emplace(*args.weight.format);
    const Scratch tile(tasks.strips_per_task() * kDepth * kStrip<Isa>);
    const Scratch sums(tasks.panels_per_task() * Isa::kRows * tasks.strips_per_task() * kStrip<Isa>);
    const Scratch decoded(tasks.strips_per_task() * kStrip<Isa>);
    for (int64_t i = begin; i < end; ++i) {
      const Task task = tasks[i];
      const int64_t m0 = grad.first_row(task.panel_begin), m1 = grad.first_row(task.panel_end);
      const int64_t k0 = task.strip_begin * kStrip<Isa>, width = task.strips * kStrip<Isa>;
      const int64_t k = std::min(width, args.k - k0);
      std::fill_n(sums.data(), (m1 - m0) * width, 0.0f);
      const auto decode_rows = [&](int64_t n0, int64_t depth, float* to) {
        for (int64_t n = 0; n < depth; ++n) {
          decode_elements<Isa>(args.weight, decode, (n0 + n) * args.k + k0, k, decoded.data());
          for (int64_t s = 0; s < task.strips; ++s)
            std::copy_n(decoded.data() + s * kStrip<Isa>, kStrip<Isa>, to + (s * kDepth + n) * kStrip<Isa>);
        }
      };
      accumulate<Isa>(grad, task, decode_rows, tile.data(), sums.data());
      for_dtype(args.dtype, [&](auto* typed) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        for (int64_t m = m0; m < m1; ++m)
          store_row<Isa>(sums.data() + (m - m0) * width, k, static_cast<T*>(args.grad_x) + m * args.k + k0);
      });
    }
  });
}

}  // namespace lowbit::cpu

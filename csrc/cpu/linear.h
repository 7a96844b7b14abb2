// linear: y = x W^T (+ LoRA + bias), and linear_grad_input: grad_x = grad W (+ LoRA), on a quantized W.
// Few rows go through few_rows.h or gemv.h; the rest through gemm.h, for which this file decodes the tiles of W, or
// bf16_gemm.h.
#pragma once

#include "bf16_gemm.h"
#include "dequantize.h"
#include "epilogue.h"
#include "few_rows.h"
#include "gemm.h"
#include "gemv.h"
#include "support.h"

namespace lowbit::cpu {

// Decodes W^T for accumulate(): rows [k0, k0 + depth) of it are columns of W, the strips rows of W.
template <class Isa>
class TransposedTiles {
 public:
  TransposedTiles(const LinearArgs& args, int64_t max_strips)
      : weight_(args.weight),
        n_(args.n),
        k_(args.k),
        rows_before_(args.first_row),
        whole_chunks_(args.weight.format->bits == 4 && args.k % 64 == 0) {
    if (weight_.format->bits == 4) decode_.emplace(*weight_.format);
    if (whole_chunks_) {
      shift_ = block_shift(weight_);
      scales_stride_ = (k_ >> shift_) + 2;
      scales_.resize(static_cast<size_t>(max_strips * kStrip<Isa> * scales_stride_));
    }
  }

  // The strips from `first_row` on are next: decodes their scales.
  void start(int64_t first_row, int64_t strips) {
    first_row_ = rows_before_ + first_row;
    rows_ = std::min(strips * kStrip<Isa>, n_ - first_row);
    for (int64_t i = 0; whole_chunks_ && i < rows_; ++i) {
      const int64_t begin = (first_row_ + i) * k_, first_block = begin >> shift_;
      decode_scales<Isa>(weight_, first_block, ((begin + k_ - 1) >> shift_) - first_block + 1,
                         scales_.data() + i * scales_stride_);
    }
  }

  void fill(int64_t k0, int64_t depth, float* tile) const {
    for (int64_t row = 0; row < rows_; row += Isa::kLanes) {
      float* to = tile + row / kStrip<Isa> * kDepth * kStrip<Isa> + row % kStrip<Isa>;
      if (whole_chunks_) {
        fill_chunks(row, k0, depth, to);
      } else {
        fill_rows(row, k0, depth, to);
      }
    }
  }

 private:
  // kLanes rows, 32 columns at a time: codes are transposed in registers before they are looked up. Lanes past the
  // last row repeat it: they are computed and not stored.
  void fill_chunks(int64_t row, int64_t k0, int64_t depth, float* to) const {
    const uint8_t* codes[Isa::kLanes];
    const float* scales[Isa::kLanes];
    int64_t element[Isa::kLanes];  // from the start of the row's first block
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) {
      const int64_t i = std::min(row + lane, rows_ - 1), begin = (first_row_ + i) * k_;
      codes[lane] = weight_.packed + (begin + k0) / 2;
      scales[lane] = scales_.data() + i * scales_stride_;
      element[lane] = (begin & (weight_.block_size - 1)) + k0;
      // The next tile's codes are fetched meanwhile: a row's are too few for the hardware's prefetcher.
      for (int64_t ahead = depth; ahead < 2 * depth; ahead += 128) __builtin_prefetch(codes[lane] + ahead / 2);
    }
    for (int64_t k = 0; k < depth; k += 32, to += 32 * kStrip<Isa>) {
      float scale[Isa::kLanes];
      for (int64_t lane = 0; lane < Isa::kLanes; ++lane) scale[lane] = scales[lane][(element[lane] + k) >> shift_];
      decode_->columns(codes, k / 2, Isa::load(scale), to, kStrip<Isa>);
    }
  }

  // Any k, any codes: row by row.
  void fill_rows(int64_t row, int64_t k0, int64_t depth, float* to) const {
    float decoded[kDepth];
    for (int64_t lane = 0; lane < std::min(Isa::kLanes, rows_ - row); ++lane) {
      decode_elements<Isa>(weight_, decode_, (first_row_ + row + lane) * k_ + k0, depth, decoded);
      for (int64_t k = 0; k < depth; ++k) to[k * kStrip<Isa> + lane] = decoded[k];
    }
  }

  const QuantizedWeight& weight_;
  const int64_t n_, k_, rows_before_;
  const bool whole_chunks_;
  std::optional<typename Isa::Decoder> decode_;
  int shift_ = 0;
  int64_t first_row_ = 0, rows_ = 0, scales_stride_ = 0;
  std::vector<float> scales_;
};

template <class Isa>
void linear_gemm(const LinearArgs& args, const ParallelFor& parallel_for) {
  const Panels<Isa> x(args.x, args.dtype, args.m, args.k, parallel_for);
  const Tasks tasks(x.count, Isa::kRows, ceil_div(args.n, kStrip<Isa>), 1, 4, parallel_for.threads);
  parallel_for(tasks.count, 1, [&](int64_t begin, int64_t end) {
    TransposedTiles<Isa> weight(args, tasks.strips_per_task());
    const Scratch tile(tasks.strips_per_task() * kDepth * kStrip<Isa>);
    const Scratch sums(tasks.panels_per_task() * Isa::kRows * tasks.strips_per_task() * kStrip<Isa>);
    for (int64_t i = begin; i < end; ++i) {
      const Task task = tasks[i];
      const int64_t m0 = x.first_row(task.panel_begin), m = x.first_row(task.panel_end) - m0;
      const int64_t n0 = task.strip_begin * kStrip<Isa>;
      std::fill_n(sums.data(), m * task.strips * kStrip<Isa>, 0.0f);
      weight.start(n0, task.strips);
      const auto decode_weight = [&](int64_t k0, int64_t depth, float* to) { weight.fill(k0, depth, to); };
      accumulate<Isa>(x, task, decode_weight, tile.data(), sums.data());
      finish_linear<Isa>(args, m0, m, n0, task.strips, tile.data(), sums.data());
    }
  });
}

// Calls body(args) with t multiplied by its scaling.
template <class Isa, class Body>
void with_scaled_t(const LinearArgs& args, const Body& body) {
  if (!args.t || args.scaling == 1.0f) return body(args);
  const Scratch scaled(args.m * args.rank);
  for (int64_t i = 0; i < args.m * args.rank; ++i) scaled.data()[i] = args.t[i] * args.scaling;
  LinearArgs scaled_args = args;
  scaled_args.t = scaled.data();
  body(scaled_args);
}

template <class Isa>
void scaled_linear(const LinearArgs& args, const ParallelFor& parallel_for) {
  if constexpr (kHasFewRows<Isa>) {
    if (is_few_rows(args, args.dtype == Dtype::bf16 ? Isa::kFewBf16Rows : kFewRows))
      return few_rows<Isa>(args, parallel_for);
  }
  // Chunks of 64 along k have to start where chunks of the flat 4-bit weight do.
  const bool whole_chunks = args.weight.format->bits == 8 || args.k % 64 == 0;
  if (args.m > kGemvMaxRows || args.k == 0 || !whole_chunks) {
    return for_row_blocks(args.m, [&](int64_t m0, int64_t m) {
      const LinearArgs block = rows_of(args, m0, m);
      if constexpr (MultipliesPairs<Isa>) {
        if (args.dtype == Dtype::bf16) return linear_bf16_gemm<Isa>(block, parallel_for);
      }
      linear_gemm<Isa>(block, parallel_for);
    });
  }
  for_dtype(args.dtype, [&]<class T>(T) {
    for_few_rows(args.m, [&]<int M>(std::integral_constant<int, M>) {
      if (args.weight.format->bits == 8) return gemv_int8<Isa, M, T>(args, parallel_for);
      if constexpr (!kHasFewRows<Isa>) gemv<Isa, typename Isa::template GemvDecoder<T, M>, M, T>(args, parallel_for);
    });
  });
}

template <class Isa>
void linear(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.n == 0) return;
  with_scaled_t<Isa>(args, [&](const LinearArgs& scaled) { scaled_linear<Isa>(scaled, parallel_for); });
}

// Decodes W for accumulate(): the strips are columns of it, in their natural order. Writes rows [n0, n0 + depth) of the
// strips that begin at column k0, `columns` of them that exist.
template <class Isa>
void fill_natural(const QuantizedWeight& weight, const std::optional<typename Isa::Decoder>& decode, int64_t k,
                  int64_t k0, int64_t columns, int64_t n0, int64_t depth, float* tile) {
  const bool whole_chunks = weight.format->bits == 4 && k % 64 == 0;
  const int shift = block_shift(weight);
  const BlockScales<Isa> scale_of(weight);
  for (int64_t n = 0; n < depth; ++n) {
    const int64_t begin = (n0 + n) * k + k0;
    const auto to = [&](int64_t column) {
      return tile + (column / kStrip<Isa> * kDepth + n) * kStrip<Isa> + column % kStrip<Isa>;
    };
    if (!whole_chunks) {
      float decoded[kStrip<Isa>] = {};
      for (int64_t column = 0; column < columns; column += kStrip<Isa>) {
        decode_elements<Isa>(weight, decode, begin + column, std::min(kStrip<Isa>, columns - column), decoded);
        std::copy_n(decoded, kStrip<Isa>, to(column));
      }
      continue;
    }
    constexpr int64_t kAhead =
        8;  // rows; a row has one or two lines of the tile, too few for the hardware's prefetcher
    for (int64_t column = 0; n + kAhead < depth && column < columns; column += 128)
      __builtin_prefetch(weight.packed + (begin + kAhead * k + column) / 2);
    for (int64_t column = 0; column < columns; column += 64) {
      const int64_t element = begin + column;
      const float low = scale_of(element >> shift);
      const float high = shift == 5 ? scale_of((element + 32) >> shift) : low;
      typename Isa::Vec values[64 / Isa::kLanes];
      decode->natural(weight.packed + element / 2, low, high, values);
      for (int64_t v = 0; v < 64 / Isa::kLanes; ++v) Isa::store(to(column + v * Isa::kLanes), values[v]);
    }
  }
}

template <class Isa>
void grad_input_gemm(const LinearGradInputArgs& args, const ParallelFor& parallel_for) {
  const Panels<Isa> grad(args.grad, args.dtype, args.m, args.n, parallel_for);
  // Whole cache lines of packed weight to a task: 128 columns, or 256.
  const Tasks tasks(grad.count, Isa::kRows, ceil_div(args.k, kStrip<Isa>), 128 / kStrip<Isa>, 256 / kStrip<Isa>,
                    parallel_for.threads);
  parallel_for(tasks.count, 1, [&](int64_t begin, int64_t end) {
    std::optional<typename Isa::Decoder> decode;
    if (args.weight.format->bits == 4) decode.emplace(*args.weight.format);
    const Scratch tile(tasks.strips_per_task() * kDepth * kStrip<Isa>);
    const Scratch sums(tasks.panels_per_task() * Isa::kRows * tasks.strips_per_task() * kStrip<Isa>);
    for (int64_t i = begin; i < end; ++i) {
      const Task task = tasks[i];
      const int64_t m0 = grad.first_row(task.panel_begin), m = grad.first_row(task.panel_end) - m0;
      const int64_t k0 = task.strip_begin * kStrip<Isa>, width = task.strips * kStrip<Isa>;
      const int64_t k = std::min(width, args.k - k0);
      std::fill_n(sums.data(), m * width, 0.0f);
      const auto decode_weight = [&](int64_t n0, int64_t depth, float* to) {
        fill_natural<Isa>(args.weight, decode, args.k, k0, k, args.first_row + n0, depth, to);
      };
      accumulate<Isa>(grad, task, decode_weight, tile.data(), sums.data());
      finish_grad_input<Isa>(args, m0, m, k0, task.strips, tile.data(), sums.data());
    }
  });
}

template <class Isa>
void linear_grad_input(const LinearGradInputArgs& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.k == 0) return;
  if (args.m <= kGemvMaxRows && args.weight.format->bits == 4 && args.k % 64 == 0) {
    return for_dtype(args.dtype, [&]<class T>(T) {
      for_few_rows(args.m, [&](auto rows) { gemv_grad_input<Isa, rows, T>(args, parallel_for); });
    });
  }
  for_row_blocks(args.m, [&](int64_t m0, int64_t m) {
    const LinearGradInputArgs block = rows_of(args, m0, m);
    if constexpr (MultipliesPairs<Isa>) {
      if (args.dtype == Dtype::bf16) return grad_input_bf16_gemm<Isa>(block, parallel_for);
    }
    grad_input_gemm<Isa>(block, parallel_for);
  });
}

}  // namespace lowbit::cpu

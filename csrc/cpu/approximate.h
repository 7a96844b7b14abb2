// linear_approximate: y = x W^T in int8, for inference. Activations are rounded to int8 with one scale per 64 of a row,
// the codebook to multiples of 1 / 127; products are summed as integers, then scaled and summed in fp32.
// Rounding errs by up to 1 / 254 of the largest activation of each 64, and of each block's scale.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "dequantize.h"
#include "gemv.h"
#include "kernels.h"
#include "linear.h"
#include "support.h"

namespace lowbit::cpu {

constexpr int64_t kApproximateChunk = 64;

// x [rows, k] rounded to int8: of each chunk the even elements, then the odd ones; scales [rows, k / 64].
struct Int8Activations {
  template <class T>
  Int8Activations(const T* x, int64_t rows, int64_t k)
      : values(static_cast<size_t>(rows * k)), scales(static_cast<size_t>(rows * k / kApproximateChunk)) {
    for (int64_t chunk = 0; chunk < rows * k / kApproximateChunk; ++chunk) {
      const T* from = x + chunk * kApproximateChunk;
      int8_t* to = values.data() + chunk * kApproximateChunk;
      float largest = 0;
      for (int64_t i = 0; i < kApproximateChunk; ++i) largest = std::max(largest, std::fabs(to_float(from[i])));
      // std::max passes over NaN; the sum does not, and makes the chunk's scale, and so y, NaN. Inf does the same.
      float not_finite = 0;
      for (int64_t i = 0; i < kApproximateChunk; ++i) not_finite += to_float(from[i]) * 0.0f;
      // Activations below 3.7e-37, whose inverse scale would be infinite, count as zero.
      const float inverse = 127 / largest;
      const bool in_range = not_finite == 0 && inverse <= std::numeric_limits<float>::max();
      scales[static_cast<size_t>(chunk)] = in_range ? largest / 127 : not_finite;
      for (int64_t i = 0; i < kApproximateChunk; ++i) {
        const float rounded = in_range ? std::nearbyint(to_float(from[i]) * inverse) : 0.0f;
        to[i / 2 + i % 2 * 32] = static_cast<int8_t>(std::clamp(rounded, -127.0f, 127.0f));
      }
    }
  }
  std::vector<int8_t> values;
  std::vector<float> scales;
};

template <class Isa, int M, class T>
void approximate_rows(const LinearArgs& args, const T* x, T* y, const float* t, const ParallelFor& parallel_for) {
  using Vec = typename Isa::Vec;
  const Int8Activations activations(x, M, args.k);
  const int64_t k = args.k, chunks = k / kApproximateChunk;
  const int shift = block_shift(args.weight);
  LinearArgs rows = args;
  rows.t = t;
  rows.y = y;
  parallel_for(args.n, ceil_div(16384, k), [&](int64_t begin, int64_t end) {
    const typename Isa::Int8Dot dot(*args.weight.format);
    std::vector<float> scales(static_cast<size_t>((k >> shift) + 2));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first_block = (n * k) >> shift;
      decode_scales<Isa>(args.weight, first_block, ((n * k + k - 1) >> shift) - first_block + 1, scales.data());
      Vec total[M];
      for (auto& sum : total) sum = Isa::zero();
      // scale_of_chunk(c, m): the weight's scale times the activations'.
      const auto accumulate = [&](const auto& scale_of_chunk) {
        const uint8_t* packed = args.weight.packed + n * k / 2;
        const int8_t* x_chunk = activations.values.data();
        for (int64_t c = 0; c < chunks; ++c, packed += kApproximateChunk / 2, x_chunk += kApproximateChunk) {
          __builtin_prefetch(packed + kGemvAhead);
          Vec sums[M];
          dot(packed, x_chunk, k, sums);
          for (int m = 0; m < M; ++m) total[m] = Isa::fma(sums[m], scale_of_chunk(c, m), total[m]);
        }
      };
      const float* x_scales = activations.scales.data();
      if (args.weight.block_size == kApproximateChunk) {
        accumulate([&](int64_t c, int m) { return Isa::broadcast(scales[c] * x_scales[m * chunks + c]); });
      } else {
        const auto scale_at = [&](int64_t element) { return scales[((n * k + element) >> shift) - first_block]; };
        accumulate([&](int64_t c, int m) {
          const Vec scale = Isa::halves(scale_at(c * kApproximateChunk), scale_at(c * kApproximateChunk + 32));
          return Isa::mul(scale, Isa::broadcast(x_scales[m * chunks + c]));
        });
      }
      float sums[M];
      for (int m = 0; m < M; ++m) sums[m] = Isa::sum(total[m]) * (1.0f / 127);
      store_outputs<M, T>(rows, n, sums);
    }
  });
}

template <class Isa>
void linear_approximate(const LinearArgs& args, const ParallelFor& parallel_for) {
  // Where the format or a ragged k leaves nothing to approximate with, the exact product serves.
  if (!args.weight.format || args.k % kApproximateChunk || args.k == 0) return linear<Isa>(args, parallel_for);
  for_dtype(args.dtype, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    const T* x = static_cast<const T*>(args.x);
    T* y = static_cast<T*>(args.y);
    const auto rows = [&](auto count, int64_t m) {
      const float* t = args.t ? args.t + m * args.rank : nullptr;
      approximate_rows<Isa, count, T>(args, x + m * args.k, y + m * args.n, t, parallel_for);
    };
    int64_t m = 0;
    for (; m + 4 <= args.m; m += 4) rows(std::integral_constant<int, 4>(), m);
    for (; m < args.m; ++m) rows(std::integral_constant<int, 1>(), m);
  });
}

}  // namespace lowbit::cpu

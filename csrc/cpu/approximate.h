// linear_approximate: y = x W^T in int8, for inference. Activations are rounded to int8 with one scale per 64 of a row,
// the codebook to multiples of 1 / 127; products are summed as integers, then scaled and summed in fp32.
// Rounding errs by up to 1 / 254 of the largest activation of each 64, and of each block's scale.
#pragma once

#include "activations.h"
#include "dequantize.h"
#include "gemv.h"
#include "linear.h"
#include "support.h"

namespace lowbit::cpu {

constexpr int64_t kApproximateAhead = 8192;  // bytes: the hardware's prefetcher stops at each page

// x [rows, k] in int8; scales [rows, k / 64].
template <class Isa>
struct Int8Activations {
  template <class T>
  Int8Activations(const T* x, int64_t rows, int64_t k)
      : scales(static_cast<size_t>(rows * k / kApproximateChunk)), storage_(ceil_div(rows * k, 4)) {
    int8_t* to = reinterpret_cast<int8_t*>(storage_.data());
    for (size_t chunk = 0; chunk < scales.size(); ++chunk, x += kApproximateChunk, to += kApproximateChunk)
      scales[chunk] = encode_activations<Isa>(x, to);
  }
  const int8_t* values() const { return reinterpret_cast<const int8_t*>(storage_.data()); }
  std::vector<float> scales;

 private:
  Scratch storage_;
};

template <class Isa, int M, class T>
void approximate_rows(const LinearArgs& args, const ParallelFor& parallel_for) {
  using Vec = typename Isa::Vec;
  const Int8Activations<Isa> activations(static_cast<const T*>(args.x), M, args.k);
  const int64_t k = args.k, chunks = k / kApproximateChunk;
  parallel_for(args.n, ceil_div(16384, k), [&](int64_t begin, int64_t end) {
    const typename Isa::Int8Dot dot(*args.weight.format);
    with_chunk_scales<Isa, kApproximateChunk>(args.weight, true, [&](const auto& scale_of_chunk) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t row = (args.first_row + n) * k;
        const uint8_t* packed = args.weight.packed + row / 2;
        const int8_t* x_chunk = activations.values();
        const float* x_scales = activations.scales.data();
        Vec total[M];
        for (auto& sum : total) sum = Isa::zero();
        for (int64_t c = 0; c < chunks; ++c, packed += kApproximateChunk / 2, x_chunk += kApproximateChunk) {
          __builtin_prefetch(packed + kApproximateAhead);
          Vec products[M];
          dot(packed, x_chunk, k, products);
          const Vec scale = scale_of_chunk(row + c * kApproximateChunk);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m)
            total[m] = Isa::fma(products[m], Isa::mul(scale, Isa::broadcast(x_scales[m * chunks + c])), total[m]);
        }
        float sums[M];
        for (int m = 0; m < M; ++m) sums[m] = Isa::sum(total[m]) * (1.0f / 127);
        store_outputs<M, T>(args, n, sums);
      }
    });
  });
}

// The product of few rows by instructions for int8.
template <class Isa>
void few_rows_int8(const LinearArgs& args, const ParallelFor& parallel_for) {
  with_scaled_t<Isa>(args, [&](const LinearArgs& scaled) {
    for_dtype(args.dtype, [&]<class T>(T) { few_rows_with<Isa, T, Isa::template Int8Chunk>(scaled, parallel_for); });
  });
}

template <class Isa>
void linear_approximate(const LinearArgs& args, const ParallelFor& parallel_for) {
  if constexpr (kHasFewRows<Isa>) {
    // The exact product of more rows is faster, and without instructions for int8 that of any number of rows.
    if constexpr (requires { typename Isa::template Int8Chunk<false>; }) {
      if (args.m > 0 && is_few_rows(args, args.dtype == Dtype::bf16 ? Isa::kInt8Bf16Rows : kFewRows))
        return few_rows_int8<Isa>(args, parallel_for);
    }
    return linear<Isa>(args, parallel_for);
  } else {
    // Where the format or a ragged k leaves nothing to approximate with, the exact product serves.
    if (args.weight.format->bits != 4 || args.k % kApproximateChunk || args.k == 0)
      return linear<Isa>(args, parallel_for);
    with_scaled_t<Isa>(args, [&](const LinearArgs& scaled) {
      for_dtype(args.dtype, [&]<class T>(T) {
        int64_t m = 0;
        for (; m + 4 <= args.m; m += 4) approximate_rows<Isa, 4, T>(rows_of(scaled, m, 4), parallel_for);
        for (; m < args.m; ++m) approximate_rows<Isa, 1, T>(rows_of(scaled, m, 1), parallel_for);
      });
    });
  }
}

}  // namespace lowbit::cpu

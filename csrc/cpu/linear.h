// linear: y = x W^T (+ LoRA + bias), and linear_grad_input: grad_x = grad W, on a 4-bit W.
//
// Three inner loops, all accumulating in fp32:
//   gemv   few rows of x: weights go from nibbles to registers to the sum, never to memory
//   dot    y tile = x rows . W rows, both contiguous along k: 4 x 3 sums, eight k lanes each
//   outer  grad_x tile += grad column x W row: 6 x 16 sums, eight columns of W to a register
// For the last two a tile of W is decoded to fp32 once and stays in the L2 cache. Every output element is summed by
// one thread in a fixed order: results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dequantize.h"
#include "kernels.h"

namespace lowbit::cpu {

// static, here and below: each instruction set keeps its own copy. Of an inline function the linker keeps one for all,
// which could be the one compiled for AVX2.
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kGemvMaxRows = 3;
constexpr int64_t kTileK = 512;       // 4 rows of x: 8 KB, in L1
constexpr int64_t kTileN = 96;        // rows of W decoded at once: 96 x 512 floats, 192 KB, in L2
constexpr int64_t kPanelM = 1024;     // rows of x that one decoded tile serves, bounds the scratch for sums
constexpr int64_t kOuterTileK = 128;  // columns of grad_x per task
constexpr int64_t kOuterTileN = 256;  // rows of W decoded at once: 256 x 128 floats, 128 KB, in L2
constexpr int64_t kStrip = 16;        // columns of an outer micro tile

template <class Function>
void for_dtype(Dtype dtype, const Function& function) {
  if (dtype == Dtype::f32) function(static_cast<const float*>(nullptr));
  if (dtype == Dtype::bf16) function(static_cast<const Bf16*>(nullptr));
  if (dtype == Dtype::f16) function(static_cast<const Fp16*>(nullptr));
}

// fp32 rows [rows, stride] with stride % 8 == 0 and zeros past `columns`: the input itself where it is that already.
template <class Isa>
class FloatRows {
 public:
  FloatRows(const void* data, Dtype dtype, int64_t rows, int64_t columns, const ParallelFor& parallel_for)
      : stride_(round_up(columns, 8)), data_(static_cast<const float*>(data)) {
    if (dtype == Dtype::f32 && stride_ == columns) return;
    storage_.resize(static_cast<size_t>(rows * stride_));
    data_ = storage_.data();
    for_dtype(dtype, [&](auto* typed) {
      const auto* from = static_cast<decltype(typed)>(data);
      parallel_for(rows, ceil_div(65536, stride_ + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const auto* source = from + row * columns;
          float* target = storage_.data() + row * stride_;
          int64_t i = 0;
          for (; i + 8 <= columns; i += 8) Isa::store(target + i, Isa::load(source + i));
          for (; i < columns; ++i) target[i] = to_float(source[i]);
        }
      });
    });
  }
  const float* row(int64_t i) const { return data_ + i * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  const float* data_;
  std::vector<float> storage_;
};

// ---- gemv: up to three rows of x -----------------------------------------------------------------------------------

// x in the lane order that Decoder yields weights in; see isa_scalar.h.
static inline std::vector<float> permute_to_lane_order(const float* x, int64_t rows, int64_t k) {
  std::vector<float> permuted(static_cast<size_t>(rows * k));
  for (int64_t chunk = 0; chunk < rows * k; chunk += 64) {
    for (int64_t v = 0; v < 8; ++v) {
      std::copy_n(x + chunk + 4 * v, 4, permuted.data() + chunk + 8 * v);
      std::copy_n(x + chunk + 32 + 4 * v, 4, permuted.data() + chunk + 8 * v + 4);
    }
  }
  return permuted;
}

// sums[M] = x[M, k] . W row; the weights stay unscaled until a chunk of 64 is summed.
template <class Isa, int M>
void gemv_row(const QuantizedWeight& weight, const typename Isa::Decoder& decode, const float* x, int64_t n, int64_t k,
              float* scales, float* sums) {
  using Vec = typename Isa::Vec;
  const uint8_t* packed = weight.packed + n * k / 2;
  // With block_size > k a block may span rows: its index still follows from the flat one.
  const int64_t first_block = n * k / weight.block_size;
  decode_scales<Isa>(weight, first_block, (n * k + k - 1) / weight.block_size - first_block + 1, scales);
  Vec total[M];
  for (auto& sum : total) sum = Isa::zero();
  for (int64_t chunk = 0; chunk < k; chunk += 64) {
    Vec values[8];
    decode(packed + chunk / 2, values);
    const int64_t element = n * k + chunk;
    const Vec scale = Isa::pair(scales[element / weight.block_size - first_block],
                                scales[(element + 32) / weight.block_size - first_block]);
    for (int m = 0; m < M; ++m) {
      const float* xm = x + m * k + chunk;
      Vec even = Isa::mul(values[0], Isa::load(xm)), odd = Isa::mul(values[1], Isa::load(xm + 8));
      for (int v = 2; v < 8; v += 2) {
        even = Isa::fma(values[v], Isa::load(xm + 8 * v), even);
        odd = Isa::fma(values[v + 1], Isa::load(xm + 8 * v + 8), odd);
      }
      total[m] = Isa::fma(Isa::add(even, odd), scale, total[m]);
    }
  }
  for (int m = 0; m < M; ++m) sums[m] = Isa::sum(total[m]);
}

template <class Isa, int M, class T>
void gemv(const LinearArgs& args, const float* x, const ParallelFor& parallel_for) {
  const std::vector<float> permuted = permute_to_lane_order(x, M, args.k);
  T* y = static_cast<T*>(args.y);
  parallel_for(args.n, ceil_div(16384, args.k), [&](int64_t begin, int64_t end) {
    const typename Isa::Decoder decode(*args.weight.format);
    std::vector<float> scales(static_cast<size_t>(args.k / args.weight.block_size + 2));
    for (int64_t n = begin; n < end; ++n) {
      float sums[M];
      gemv_row<Isa, M>(args.weight, decode, permuted.data(), n, args.k, scales.data(), sums);
      for (int m = 0; m < M; ++m) {
        for (int64_t r = 0; r < args.rank; ++r) sums[m] += args.t[m * args.rank + r] * args.lora_b[n * args.rank + r];
        from_float(args.bias ? sums[m] + args.bias[n] : sums[m], y + m * args.n + n);
      }
    }
  });
}

// ---- dot: tiles of y -----------------------------------------------------------------------------------------------

// sums[i * stride + j] += a_i . b_j over `depth` (a multiple of 8), for I rows of a and J rows of b.
template <class Isa, int I, int J>
void dot_micro(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* sums,
               int64_t stride) {
  typename Isa::Vec acc[I][J];
  for (auto& row : acc)
    for (auto& sum : row) sum = Isa::zero();
  for (int64_t k = 0; k < depth; k += 8) {
    typename Isa::Vec b_k[J];
    for (int j = 0; j < J; ++j) b_k[j] = Isa::load(b + j * b_stride + k);
    for (int i = 0; i < I; ++i) {
      const auto a_k = Isa::load(a + i * a_stride + k);
      for (int j = 0; j < J; ++j) acc[i][j] = Isa::fma(a_k, b_k[j], acc[i][j]);
    }
  }
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) sums[i * stride + j] += Isa::sum(acc[i][j]);
}

template <class Isa, int I>
void dot_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, int64_t depth,
              float* sums) {
  int64_t j = 0;
  for (; j + 3 <= n; j += 3) dot_micro<Isa, I, 3>(a, a_stride, b + j * b_stride, b_stride, depth, sums + j, kTileN);
  for (; j < n; ++j) dot_micro<Isa, I, 1>(a, a_stride, b + j * b_stride, b_stride, depth, sums + j, kTileN);
}

// sums[m, kTileN] += a[m, depth] . b[n, depth]^T
template <class Isa>
void dot_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t m, int64_t n, int64_t depth,
              float* sums) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) dot_rows<Isa, 4>(a + i * a_stride, a_stride, b, b_stride, n, depth, sums + i * kTileN);
  for (; i < m; ++i) dot_rows<Isa, 1>(a + i * a_stride, a_stride, b, b_stride, n, depth, sums + i * kTileN);
}

template <class Isa>
void linear(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.n == 0) return;
  const FloatRows<Isa> x(args.x, args.dtype, args.m, args.k, parallel_for);
  // Chunks of 64 along k have to start where chunks of the flat weight do.
  if (args.m <= kGemvMaxRows && args.k > 0 && args.k % 64 == 0) {
    for_dtype(args.dtype, [&](auto* typed) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
      if (args.m == 1) gemv<Isa, 1, T>(args, x.row(0), parallel_for);
      if (args.m == 2) gemv<Isa, 2, T>(args, x.row(0), parallel_for);
      if (args.m == 3) gemv<Isa, 3, T>(args, x.row(0), parallel_for);
    });
    return;
  }
  const FloatRows<Isa> t(args.t, Dtype::f32, args.m, args.rank, parallel_for);
  const FloatRows<Isa> lora_b(args.lora_b, Dtype::f32, args.n, args.rank, parallel_for);
  // Small weights get narrower tiles, so that there are enough of them to share out; still multiples of 3.
  const int64_t tile_n = std::clamp<int64_t>(args.n / 16 / 3 * 3, 24, kTileN);
  parallel_for(ceil_div(args.n, tile_n), 1, [&](int64_t begin, int64_t end) {
    const typename Isa::Decoder decode(*args.weight.format);
    std::vector<float> tile(static_cast<size_t>(tile_n * kTileK));
    std::vector<float> sums(static_cast<size_t>(std::min(args.m, kPanelM) * kTileN));
    for (int64_t n0 = begin * tile_n; n0 < std::min(end * tile_n, args.n); n0 += tile_n) {
      const int64_t n = std::min(tile_n, args.n - n0);
      for (int64_t m0 = 0; m0 < args.m; m0 += kPanelM) {
        const int64_t m = std::min(kPanelM, args.m - m0);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t k0 = 0; k0 < args.k; k0 += kTileK) {
          const int64_t k = std::min(kTileK, args.k - k0), depth = round_up(k, 8);
          for (int64_t j = 0; j < n; ++j) {
            float* row = tile.data() + j * depth;
            decode_range<Isa>(args.weight, decode, (n0 + j) * args.k + k0, k, row);
            std::fill(row + k, row + depth, 0.0f);
          }
          dot_tile<Isa>(x.row(m0) + k0, x.stride(), tile.data(), depth, m, n, depth, sums.data());
        }
        // The LoRA columns of the contraction, into the same sums.
        if (args.rank) {
          dot_tile<Isa>(t.row(m0), t.stride(), lora_b.row(n0), lora_b.stride(), m, n, t.stride(), sums.data());
        }
        for_dtype(args.dtype, [&](auto* typed) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
          for (int64_t i = 0; i < m; ++i) {
            float* row = sums.data() + i * kTileN;
            for (int64_t j = 0; args.bias && j < n; ++j) row[j] += args.bias[n0 + j];
            store_row<Isa>(row, n, static_cast<T*>(args.y) + (m0 + i) * args.n + n0);
          }
        });
      }
    }
  });
}

// ---- outer: tiles of grad_x ----------------------------------------------------------------------------------------

// sums[I rows, 16 of kOuterTileK] += a[I, depth] b[depth, 16]
template <class Isa, int I>
void outer_micro(const float* a, int64_t a_stride, const float* b, int64_t depth, float* sums) {
  typename Isa::Vec acc[I][2];
  for (int i = 0; i < I; ++i)
    for (int half = 0; half < 2; ++half) acc[i][half] = Isa::load(sums + i * kOuterTileK + 8 * half);
  for (int64_t n = 0; n < depth; ++n) {
    const auto low = Isa::load(b + n * kStrip), high = Isa::load(b + n * kStrip + 8);
    for (int i = 0; i < I; ++i) {
      const auto a_n = Isa::broadcast(a[i * a_stride + n]);
      acc[i][0] = Isa::fma(a_n, low, acc[i][0]);
      acc[i][1] = Isa::fma(a_n, high, acc[i][1]);
    }
  }
  for (int i = 0; i < I; ++i)
    for (int half = 0; half < 2; ++half) Isa::store(sums + i * kOuterTileK + 8 * half, acc[i][half]);
}

template <class Isa>
void linear_grad_input(const LinearGradInputArgs& args, const ParallelFor& parallel_for) {
  if (args.m == 0 || args.k == 0) return;
  const FloatRows<Isa> grad(args.grad, args.dtype, args.m, args.n, parallel_for);
  parallel_for(ceil_div(args.k, kOuterTileK), 1, [&](int64_t begin, int64_t end) {
    const typename Isa::Decoder decode(*args.weight.format);
    std::vector<float> strips(static_cast<size_t>(kOuterTileN * kOuterTileK));  // [strip][n][16]
    std::vector<float> sums(static_cast<size_t>(std::min(args.m, kPanelM) * kOuterTileK));
    for (int64_t k0 = begin * kOuterTileK; k0 < std::min(end * kOuterTileK, args.k); k0 += kOuterTileK) {
      const int64_t k = std::min(kOuterTileK, args.k - k0);
      for (int64_t m0 = 0; m0 < args.m; m0 += kPanelM) {
        const int64_t m = std::min(kPanelM, args.m - m0);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t n0 = 0; n0 < args.n; n0 += kOuterTileN) {
          const int64_t n = std::min(kOuterTileN, args.n - n0);
          for (int64_t j = 0; j < n; ++j) {
            float row[kOuterTileK] = {};
            decode_range<Isa>(args.weight, decode, (n0 + j) * args.k + k0, k, row);
            for (int64_t column = 0; column < kOuterTileK; column += kStrip)
              std::copy_n(row + column, kStrip, strips.data() + column * kOuterTileN + j * kStrip);
          }
          for (int64_t column = 0; column < k; column += kStrip) {
            const float* strip = strips.data() + column * kOuterTileN;
            int64_t i = 0;
            for (; i + 6 <= m; i += 6)
              outer_micro<Isa, 6>(grad.row(m0 + i) + n0, grad.stride(), strip, n, &sums[i * kOuterTileK + column]);
            for (; i < m; ++i)
              outer_micro<Isa, 1>(grad.row(m0 + i) + n0, grad.stride(), strip, n, &sums[i * kOuterTileK + column]);
          }
        }
        for_dtype(args.dtype, [&](auto* typed) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
          for (int64_t i = 0; i < m; ++i)
            store_row<Isa>(&sums[i * kOuterTileK], k, static_cast<T*>(args.grad_x) + (m0 + i) * args.k + k0);
        });
      }
    }
  });
}

}  // namespace lowbit::cpu

// gemv: y = x W^T for up to four rows of x. Weights go from codes to registers to the sum, never to memory, so that
// reading them is what it costs: lanes run along k, one row of W at a time.
#pragma once

#include <array>
#include <vector>

#include "dequantize.h"
#include "kernels.h"
#include "support.h"

namespace lowbit::cpu {

constexpr int64_t kGemvMaxRows = 4;
constexpr int64_t kGemvAhead = 2048;  // bytes: the hardware's prefetcher stops at each page; a quarter faster
constexpr int64_t kGemvDepth = 4096;  // 16 KB of x: half of the L1 cache

// Adds LoRA and bias to the sums of output n and stores them; t is [M, rank], y [M, n].
template <int M, class T>
void store_outputs(const LinearArgs& args, int64_t n, float* sums) {
  T* y = static_cast<T*>(args.y);
  for (int m = 0; m < M; ++m) {
    for (int64_t r = 0; r < args.rank; ++r) sums[m] += args.t[m * args.rank + r] * args.lora_b[n * args.rank + r];
    from_float(args.bias ? sums[m] + args.bias[n] : sums[m], y + m * args.n + n);
  }
}

// x [M, k] as fp32 [chunk][M][kChunk], each chunk in the lane order of Decoder, zeros past k.
template <class Decoder, int M, class T>
std::vector<float> permute_to_lane_order(const T* x, int64_t k) {
  constexpr int64_t kChunk = Decoder::kChunk;
  constexpr auto order = [] {
    std::array<uint8_t, kChunk> elements{};
    for (int64_t i = 0; i < kChunk; ++i) elements[static_cast<size_t>(i)] = static_cast<uint8_t>(Decoder::element(i));
    return elements;
  }();
  std::vector<float> permuted(static_cast<size_t>(M * round_up(k, kChunk)));
  float* to = permuted.data();
  for (int64_t chunk = 0; chunk < k; chunk += kChunk) {
    for (int64_t m = 0; m < M; ++m, to += kChunk) {
      for (int64_t i = 0; i < kChunk; ++i) {
        const int64_t element = chunk + order[static_cast<size_t>(i)];
        if (element < k) to[i] = to_float(x[m * k + element]);
      }
    }
  }
  return permuted;
}

// totals[M] += x[M, k0:k0+depth] . W[n, k0:k0+depth], by lanes; x points to column k0. k0 and k are multiples of 64.
template <class Isa, class Decoder, int M>
void gemv_row(const QuantizedWeight& weight, const Decoder& decode, const float* x, int64_t n, int64_t k, int64_t k0,
              int64_t depth, typename Isa::Vec* totals) {
  using Vec = typename Isa::Vec;
  constexpr int64_t kChunk = Decoder::kChunk;
  const int shift = block_shift(weight);
  const int64_t begin = n * k + k0;
  const uint8_t* packed = weight.packed + begin / 2;
  // Where block_size does not divide k a block spans rows: its index follows from the flat one.
  const int64_t first_block = begin >> shift;
  const int64_t blocks = ((begin + depth - 1) >> shift) - first_block + 1;
  float scales[kGemvDepth / kMinBlockSize + 2];
  decode_scales<Isa>(weight, first_block, blocks, scales);
  scales[blocks] = 0;
  Vec total[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) total[m] = totals[m];
  const auto accumulate = [&](const uint8_t* codes, const Vec& scale, const float* x_chunk) {
    Vec values[8];
    decode(codes, values);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float* xm = x_chunk + m * kChunk;
      Vec even = Isa::mul(values[0], Isa::load(xm)), odd = Isa::mul(values[1], Isa::load(xm + Isa::kLanes));
#pragma GCC unroll 4
      for (int v = 2; v < 8; v += 2) {
        even = Isa::fma(values[v], Isa::load(xm + v * Isa::kLanes), even);
        odd = Isa::fma(values[v + 1], Isa::load(xm + (v + 1) * Isa::kLanes), odd);
      }
      // One product with the scale for the sums of eight vectors.
      total[m] = Isa::fma(Isa::add(even, odd), scale, total[m]);
    }
  };
  const auto accumulate_all = [&](const auto& scale_of_chunk) {
    int64_t chunk = 0;
    for (; chunk + kChunk <= depth; chunk += kChunk) {
      __builtin_prefetch(packed + chunk / 2 + kGemvAhead);
      accumulate(packed + chunk / 2, scale_of_chunk(chunk), x + chunk * M);
    }
    if (chunk < depth) {  // half a chunk of 128
      uint8_t tail[kChunk / 2] = {};
      std::memcpy(tail, packed + chunk / 2, static_cast<size_t>(depth - chunk) / 2);
      accumulate(tail, scale_of_chunk(chunk), x + chunk * M);
    }
  };
  if (weight.block_size == 64) {
    accumulate_all([&](int64_t chunk) { return Isa::chunk_scale_64(scales + chunk / 64); });
  } else {
    accumulate_all([&](int64_t chunk) {
      return Isa::chunk_scale(
          [&](int64_t element) { return element < depth ? scales[((begin + element) >> shift) - first_block] : 0.0f; },
          chunk);
    });
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) totals[m] = total[m];
}

template <class Isa, class Decoder, int M, class T>
void gemv(const LinearArgs& args, const ParallelFor& parallel_for) {
  // As much of x as stays in the L1 cache, M x kDepth floats, meets kRowBlock rows of W before the next piece does.
  constexpr int64_t kDepth = kGemvDepth / M / 128 * 128, kRowBlock = 16;
  const int64_t n_end = args.n, k = args.k;
  const std::vector<float> x = permute_to_lane_order<Decoder, M>(static_cast<const T*>(args.x), k);
  parallel_for(ceil_div(n_end, kRowBlock), ceil_div(16384, k * kRowBlock), [&](int64_t begin, int64_t end) {
    const Decoder decode(*args.weight.format);
    for (int64_t n0 = begin * kRowBlock; n0 < std::min(end * kRowBlock, n_end); n0 += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, n_end - n0);
      typename Isa::Vec totals[kRowBlock][M];
      for (auto& row : totals)
        for (auto& total : row) total = Isa::zero();
      for (int64_t k0 = 0; k0 < k; k0 += kDepth)
        for (int64_t i = 0; i < rows; ++i)
          gemv_row<Isa, Decoder, M>(args.weight, decode, x.data() + k0 * M, n0 + i, k, k0, std::min(kDepth, k - k0),
                                    totals[i]);
      for (int64_t i = 0; i < rows; ++i) {
        float sums[M];
        for (int m = 0; m < M; ++m) sums[m] = Isa::sum(totals[i][m]);
        store_outputs<M, T>(args, n0 + i, sums);
      }
    }
  });
}

// The same for int8 codes, whose scale belongs to the whole row; any k.
template <class Isa, int M, class T>
void gemv_int8(const LinearArgs& args, const ParallelFor& parallel_for) {
  using Vec = typename Isa::Vec;
  const T* x = static_cast<const T*>(args.x);
  const int64_t k = args.k, whole = k / Isa::kLanes * Isa::kLanes;
  parallel_for(args.n, ceil_div(16384, k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(args.weight.packed) + n * k;
      Vec total[M];
      for (auto& sum : total) sum = Isa::zero();
      for (int64_t i = 0; i < whole; i += Isa::kLanes) {
        const Vec value = Isa::load(codes + i);
        for (int m = 0; m < M; ++m) total[m] = Isa::fma(value, Isa::load(x + m * k + i), total[m]);
      }
      float sums[M];
      for (int m = 0; m < M; ++m) {
        sums[m] = Isa::sum(total[m]);
        for (int64_t i = whole; i < k; ++i) sums[m] += static_cast<float>(codes[i]) * to_float(x[m * k + i]);
        sums[m] *= args.weight.absmax[n] * kInt8Unit;
      }
      store_outputs<M, T>(args, n, sums);
    }
  });
}

}  // namespace lowbit::cpu

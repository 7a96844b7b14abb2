// gemv: y = x W^T for up to four rows of x, and grad_x = grad W for as few. Weights are decoded into registers and
// never stored, so that reading their codes is the cost. Lanes run along k, one row of W at a time.
#pragma once

#include "dequantize.h"
#include "support.h"

namespace lowbit::cpu {

constexpr int kGemvMaxRows = 4;
constexpr int64_t kGemvDepth = 4096;  // 16 KB of x: half of the L1 cache

// function(rows as a constant), for 1 to kGemvMaxRows rows.
template <int M = kGemvMaxRows, class Function>
void for_few_rows(int64_t rows, const Function& function) {
  if (rows == M) return function(std::integral_constant<int, M>());
  if constexpr (M > 1) for_few_rows<M - 1>(rows, function);
}

// Adds LoRA and bias to the sums of output n and stores them; t is [M, rank], y [M, n].
template <int M, class T>
static void store_outputs(const LinearArgs& args, int64_t n, float* sums) {
  T* y = static_cast<T*>(args.y);
  for (int m = 0; m < M; ++m) {
    for (int64_t r = 0; r < args.rank; ++r) sums[m] += args.t[m * args.rank + r] * args.lora_b[n * args.rank + r];
    from_float(args.bias ? sums[m] + bias_of(args.bias, n) : sums[m], y + m * args.n + n);
  }
}

// x [M, k] as fp32 [chunk][M][kChunk], each chunk in the lane order of Decoder, zeros past k.
template <class Decoder, int M, class T>
Scratch permute_to_lane_order(const T* x, int64_t k) {
  constexpr int64_t kChunk = Decoder::kChunk;
  constexpr auto order = [] {
    std::array<uint8_t, kChunk> elements{};
    for (int64_t i = 0; i < kChunk; ++i) elements[static_cast<size_t>(i)] = static_cast<uint8_t>(Decoder::element(i));
    return elements;
  }();
  Scratch permuted(M * round_up(k, kChunk));
  float* to = permuted.data();
  for (int64_t chunk = 0; chunk < k; chunk += kChunk) {
    for (int64_t m = 0; m < M; ++m, to += kChunk) {
      const T* from = x + m * k + chunk;
      if (chunk + kChunk <= k) {
        for (int64_t i = 0; i < kChunk; ++i) to[i] = to_float(from[order[static_cast<size_t>(i)]]);
      } else {
        for (int64_t i = 0; i < kChunk; ++i) {
          const int64_t element = order[static_cast<size_t>(i)];
          to[i] = chunk + element < k ? to_float(from[element]) : 0.0f;
        }
      }
    }
  }
  return permuted;
}

// Calls body(scale_of_chunk), where scale_of_chunk(element) decodes the scales of the kChunk elements of a 4-bit weight
// from the flat index `element` on, by lanes of a Decoder: beside the products rather than before them, since
// arithmetic for one scale in 64 weights fits into the gaps of theirs. Chunks begin at multiples of 64; `aligned`: at
// multiples of kChunk.
template <class Isa, int64_t kChunk, class Body>
void with_chunk_scales(const QuantizedWeight& weight, bool aligned, const Body& body) {
  const uint64_t shift = static_cast<uint64_t>(block_shift(weight));
  const auto block_of = [shift](int64_t element) { return static_cast<uint64_t>(element) >> shift; };
  const uint64_t last_block = block_of(weight.numel - 1);
  const BlockScales<Isa> scale_of(weight);
  const auto by_blocks = [&](const auto& scale_of_block) {
    if (weight.block_size >= kChunk && aligned)
      return body([&](int64_t element) { return scale_of_block(block_of(element)); });
    // Blocks of half a chunk, or chunks of 128 that begin in the middle of one, where larger blocks may end halfway.
    if (weight.block_size * 2 >= kChunk)
      return body([&](int64_t element) {
        // The second half of a last chunk of 128 may not exist.
        const uint64_t second = std::min(block_of(element + kChunk / 2), last_block);
        return Isa::join(scale_of_block(block_of(element)), scale_of_block(second));
      });
    if constexpr (kChunk == 4 * kMinBlockSize)
      return body([&](int64_t element) {
        const auto quarter = [&](uint64_t i) {
          return scale_of(static_cast<int64_t>(std::min(block_of(element) + i, last_block)));
        };
        return Isa::quarters(quarter(0), quarter(1), quarter(2), quarter(3));
      });
  };
  const Scales& scales = weight.scales;
  if (scales.kind == ScaleKind::block)
    return by_blocks([values = scales.values](uint64_t block) { return Isa::broadcast(values[block]); });
  by_blocks([codes = scales.codes, group_scales = scales.group_scales,
             offset = Isa::broadcast(*scales.offset)](uint64_t block) {
    return Isa::scale(kScaleMap.entries + codes[block], group_scales + block / kGroupSize, offset);
  });
}

// totals[R][M] += x[M, depth] . W[R rows, depth] by lanes, where the rows (of the flat W) begin at `begin` and every
// `stride` elements after; fetches what lies `ahead` bytes on. begin, stride and depth are multiples of 64.
template <class Isa, class Decoder, int M, int R>
void gemv_rows(const QuantizedWeight& weight, const Decoder& decode, const float* x, int64_t begin, int64_t stride,
               int64_t depth, int64_t ahead, typename Isa::Vec (*totals)[M]) {
  using Vec = typename Isa::Vec;
  constexpr int64_t kChunk = Decoder::kChunk;
  const uint8_t* packed = weight.packed + begin / 2;
  Vec total[R][M];
#pragma GCC unroll 4
  for (int i = 0; i < R * M; ++i) total[i / M][i % M] = totals[i / M][i % M];
  const auto accumulate = [&](const uint8_t* codes, const Vec& scale, const float* x_chunk, Vec(&sums)[M]) {
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
      sums[m] = Isa::fma(Isa::add(even, odd), scale, sums[m]);
    }
  };
  const bool aligned = begin % kChunk == 0 && stride % kChunk == 0;
  with_chunk_scales<Isa, kChunk>(weight, aligned, [&](const auto& scale_of_chunk) {
    int64_t element = begin;
    for (; element + kChunk <= begin + depth; element += kChunk, packed += kChunk / 2, x += kChunk * M) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const uint8_t* codes = packed + r * (stride / 2);
        __builtin_prefetch(codes + ahead);
        accumulate(codes, scale_of_chunk(element + r * stride), x, total[r]);
      }
    }
    if (element < begin + depth) {  // half a chunk of 128
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        uint8_t tail[kChunk / 2] = {};
        std::memcpy(tail, packed + r * (stride / 2), kChunk / 4);
        accumulate(tail, scale_of_chunk(element + r * stride), x, total[r]);
      }
    }
  });
#pragma GCC unroll 4
  for (int i = 0; i < R * M; ++i) totals[i / M][i % M] = total[i / M][i % M];
}

template <class Isa, class Decoder, int M, class T>
void gemv(const LinearArgs& args, const ParallelFor& parallel_for) {
  // As much of x as stays in the L1 cache, M x kDepth floats, meets kRowBlock rows of W before the next piece does.
  // The rows after those are fetched meanwhile: the hardware's prefetcher stops at each page (a quarter slower).
  constexpr int64_t kDepth = kGemvDepth / M / 128 * 128, kRowBlock = 4;
  // Rows of W in one loop. Two for one row of x leave the loop half as often (3%); for more rows registers are too few.
  constexpr int kTogether = M == 1 ? 2 : 1;
  const int64_t n_end = args.n, k = args.k;
  const Scratch x = permute_to_lane_order<Decoder, M>(static_cast<const T*>(args.x), k);
  parallel_for(ceil_div(n_end, kRowBlock), ceil_div(16384, k * kRowBlock), [&](int64_t begin, int64_t end) {
    const Decoder decode(*args.weight.format);
    for (int64_t n0 = begin * kRowBlock; n0 < std::min(end * kRowBlock, n_end); n0 += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, n_end - n0);
      typename Isa::Vec totals[kRowBlock][M];
      for (auto& row : totals)
        for (auto& total : row) total = Isa::zero();
      for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
        for (int64_t i = 0; i < rows; i += kTogether) {
          const int64_t stride = i + kTogether <= rows ? k : 0;  // a row left alone goes with itself
          gemv_rows<Isa, Decoder, M, kTogether>(args.weight, decode, x.data() + k0 * M,
                                                (args.first_row + n0 + i) * k + k0, stride, std::min(kDepth, k - k0),
                                                kRowBlock * k / 2, totals + i);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        float sums[M];
        for (int m = 0; m < M; ++m) sums[m] = Isa::sum(totals[i][m]);
        store_outputs<M, T>(args, n0 + i, sums);
      }
    }
  });
}

// gemv for int8 codes, whose scale belongs to the whole row; any k.
template <class Isa, int M, class T>
void gemv_int8(const LinearArgs& args, const ParallelFor& parallel_for) {
  using Vec = typename Isa::Vec;
  const T* x = static_cast<const T*>(args.x);
  const int64_t k = args.k, whole = k / Isa::kLanes * Isa::kLanes;
  parallel_for(args.n, ceil_div(16384, k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(args.weight.packed) + (args.first_row + n) * k;
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
        sums[m] *= args.weight.scales.values[args.first_row + n] * kInt8Unit;
      }
      store_outputs<M, T>(args, n, sums);
    }
  });
}

// sums[m * width + i] += factors[m * stride] * (element i of 64 decoded ones)
template <class Isa, int M>
void add_chunk(const typename Isa::Decoder& decode, const uint8_t* packed, float low, float high, const float* factors,
               int64_t stride, float* sums, int64_t width) {
  constexpr int64_t kVecs = 64 / Isa::kLanes;
  typename Isa::Vec values[kVecs];
  decode.natural(packed, low, high, values);
  for (int m = 0; m < M; ++m) {
    const auto factor = Isa::broadcast(factors[m * stride]);
    float* to = sums + m * width;
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVecs; ++v)
      Isa::store(to + v * Isa::kLanes, Isa::fma(values[v], factor, Isa::load(to + v * Isa::kLanes)));
  }
}

// sums += factor * values
template <class Isa>
void add_scaled(const float* values, float factor, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i += Isa::kLanes)
    Isa::store(sums + i, Isa::fma(Isa::broadcast(factor), Isa::load(values + i), Isa::load(sums + i)));
}

// grad_x = grad W (+ LoRA) for up to four rows of grad: a task owns columns of W, whose sums stay in the L1 cache while
// it goes through the rows. k is a multiple of 64.
template <class Isa, int M, class T>
void gemv_grad_input(const LinearGradInputArgs& args, const ParallelFor& parallel_for) {
  constexpr int64_t kMaxColumns = 1024;
  constexpr int64_t kAhead = 4;  // rows; a task's part of one is too short for the hardware's prefetcher
  const int64_t n_end = args.n, k = args.k;
  const int64_t columns = std::clamp<int64_t>(round_up(ceil_div(k, 4 * parallel_for.threads), 128), 128, kMaxColumns);
  const int shift = block_shift(args.weight);
  const BlockScales<Isa> scale_of(args.weight);
  const Scratch grad(M * n_end);
  load_row<Isa>(static_cast<const T*>(args.grad), M * n_end, grad.data());
  parallel_for(ceil_div(k, columns), 1, [&](int64_t begin, int64_t end) {
    const typename Isa::Decoder decode(*args.weight.format);
    const Scratch storage(M * kMaxColumns);
    float* sums = storage.data();
    for (int64_t k0 = begin * columns; k0 < std::min(end * columns, k); k0 += columns) {
      const int64_t width = std::min(columns, k - k0);
      std::fill_n(sums, M * width, 0.0f);
      for (int64_t n = 0; n < n_end; ++n) {
        const int64_t row = (args.first_row + n) * k + k0;
        for (int64_t column = 0; n + kAhead < n_end && column < width; column += 128)
          __builtin_prefetch(args.weight.packed + (row + kAhead * k + column) / 2);
        for (int64_t column = 0; column < width; column += 64) {
          const int64_t element = row + column;
          const float low = scale_of(element >> shift);
          const float high = shift == 5 ? scale_of((element + 32) >> shift) : low;
          add_chunk<Isa, M>(decode, args.weight.packed + element / 2, low, high, grad.data() + n, n_end, sums + column,
                            width);
        }
      }
      for (int64_t m = 0; m < M; ++m)
        for (int64_t r = 0; r < args.rank; ++r)
          add_scaled<Isa>(args.lora_a + r * k + k0, args.grad_t[m * args.rank + r], width, sums + m * width);
      for (int64_t m = 0; m < M; ++m)
        store_row<Isa>(sums + m * width, width, static_cast<T*>(args.grad_x) + m * k + k0);
    }
  });
}

}  // namespace lowbit::cpu

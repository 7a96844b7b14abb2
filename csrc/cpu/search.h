// search_scales: per block the signed scale that minimises the squared error; encode: codes for given scales.
//
// Candidates are the block's absmax times kScaleFactors. Errors are summed in fp32 in an order that every instruction
// set keeps (sixteen partial sums, then a tree; no FMA), so that all choose the same scale, bit for bit.
#pragma once

#include "support.h"

namespace lowbit::cpu {

// Sum of the squared errors of v[count] (a multiple of 16) decoded with `factor`, weighted by h where that is given.
template <class Isa, bool kWeighted>
float squared_error(const typename Isa::Nearest& nearest, const float* v, const float* h, int64_t count, float factor) {
  using Vec = typename Isa::Vec;
  constexpr int64_t kVecs = 16 / Isa::kLanes;
  const Vec scale = Isa::broadcast(factor), inverse = Isa::broadcast(1.0f / factor);
  Vec sums[kVecs];
  for (auto& sum : sums) sum = Isa::zero();
  for (int64_t i = 0; i < count; i += 16) {
    for (int64_t j = 0; j < kVecs; ++j) {
      const Vec value = Isa::load(v + i + j * Isa::kLanes);
      const Vec error = Isa::sub(value, Isa::mul(nearest(Isa::mul(value, inverse)), scale));
      Vec square = Isa::mul(error, error);
      if constexpr (kWeighted) square = Isa::mul(square, Isa::load(h + i + j * Isa::kLanes));
      sums[j] = Isa::add(sums[j], square);
    }
  }
  if constexpr (kVecs == 2) return Isa::sum(Isa::add(sums[0], sums[1]));
  return Isa::sum(sums[0]);
}

// The factor with the smallest error, the first of equal ones.
template <class Isa, bool kWeighted>
float best_factor(const typename Isa::Nearest& nearest, const float* v, const float* h, int64_t count) {
  float best = 1.0f, least = std::numeric_limits<float>::infinity();
  for (const float factor : kScaleFactors.values) {
    const float error = squared_error<Isa, kWeighted>(nearest, v, h, count, factor);
    if (error < least) {
      least = error;
      best = factor;
    }
  }
  return best;
}

template <class Isa, class T>
void search_blocks(const SearchScalesArgs& args, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.weight);
  const typename Isa::Nearest nearest(*args.format);
  // A short last block is filled up with zeros, which add no error.
  std::vector<float> v(static_cast<size_t>(args.block_size)), h(v.size());
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_size, count = std::min(args.block_size, args.numel - first);
    const float absmax = float_of(Isa::absmax_bits(weight + first, count));
    // Outside of this range a factor or an inverse would leave fp32; NaN and inf stay, for the caller to find.
    if (!(absmax >= kTinyAbsmax && absmax <= kLargestSearched)) {
      args.scales[block] = absmax;
      continue;
    }
    const float inverse = 1.0f / absmax;
    for (int64_t i = 0; i < count; ++i) v[static_cast<size_t>(i)] = to_float(weight[first + i]) * inverse;
    std::fill(v.begin() + count, v.end(), 0.0f);
    bool weighted = false;
    if (args.importance) {
      for (int64_t i = 0, column = first % args.columns; i < count; ++i, ++column) {
        if (column == args.columns) column = 0;
        h[static_cast<size_t>(i)] = args.importance[column];
        weighted |= args.importance[column] > 0;
      }
      std::fill(h.begin() + count, h.end(), 0.0f);
    }
    args.scales[block] = absmax * (weighted ? best_factor<Isa, true>(nearest, v.data(), h.data(), args.block_size)
                                            : best_factor<Isa, false>(nearest, v.data(), nullptr, args.block_size));
  }
}

template <class Isa>
void search_scales(const SearchScalesArgs& args, const ParallelFor& parallel_for) {
  parallel_for(ceil_div(args.numel, args.block_size), std::max<int64_t>(1, 2048 / args.block_size),
               [&](int64_t begin, int64_t end) {
                 for_dtype(args.dtype, [&]<class T>(T) { search_blocks<Isa, T>(args, begin, end); });
               });
}

template <class Isa, class T>
void encode_blocks(const EncodeArgs& args, int64_t begin, int64_t end) {
  const Format& format = *args.format;
  const typename Isa::Encoder encode(format);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_size, count = std::min(args.block_size, args.numel - first);
    const T* values = static_cast<const T*>(args.weight) + first;
    uint8_t* packed = args.packed + first / 2;
    const float scale = args.scales[block];
    // A scale whose inverse would overflow decodes everything to nearly zero, so every element gets the code of zero.
    const float inverse = scale >= kTinyAbsmax || scale <= -kTinyAbsmax ? 1.0f / scale : 0.0f;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) encode(values + i, inverse, packed + i / 2);
    const auto code = [&](int64_t j) {
      return j < count ? encode_one(format, to_float(values[j]) * inverse) : format.zero_code;
    };
    for (; i < count; i += 2) packed[i / 2] = pack(code(i), code(i + 1));
  }
}

template <class Isa>
void encode(const EncodeArgs& args, const ParallelFor& parallel_for) {
  parallel_for(ceil_div(args.numel, args.block_size), std::max<int64_t>(1, 16384 / args.block_size),
               [&](int64_t begin, int64_t end) {
                 for_dtype(args.dtype, [&]<class T>(T) { encode_blocks<Isa, T>(args, begin, end); });
               });
}

}  // namespace lowbit::cpu

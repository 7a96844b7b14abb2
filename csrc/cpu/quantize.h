// quantize: absmax scales and 4-bit codes of a float weight; quantize_scales: the scales in 8 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace lowbit::cpu {

constexpr int64_t kQuantizeAhead = 4096;  // bytes: the hardware's prefetcher stops at each page

template <class Isa, class T>
void quantize_blocks(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.weight);
  const Format& format = *args.format;
  const typename Isa::Encoder encode(format);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_size;
    const int64_t count = std::min(args.block_size, args.numel - first);
    const T* values = weight + first;
    uint8_t* packed = args.packed + first / 2;
    const float absmax = float_of(Isa::absmax_bits(values, count));
    if (count == args.block_size) {
      args.absmax[block] = absmax;
      const float inverse = 1.0f / std::max(absmax, kTinyAbsmax);
      for (int64_t i = 0; i < count; i += 32) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kQuantizeAhead);
        __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kQuantizeAhead + 64);
        encode(values + i, inverse, packed + i / 2);
      }
      continue;
    }
    // The short last block divides by absmax, where full ones multiply by its reciprocal (the format says so).
    const float divisor = absmax < kTinyAbsmax ? kTinyAbsmax : absmax;  // NaN stays
    args.absmax[block] = divisor;
    const auto code = [&](int64_t i) {
      if (i >= count) return format.zero_code;
      return encode_one(format, to_float(values[i]) / divisor);
    };
    for (int64_t i = 0; i < count; i += 2) packed[i / 2] = pack(code(i), code(i + 1));
  }
}

template <class Isa>
void quantize(const QuantizeArgs& args, const ParallelFor& parallel_for) {
  const int64_t blocks = (args.numel + args.block_size - 1) / args.block_size;
  parallel_for(blocks, std::max<int64_t>(1, 16384 / args.block_size), [&](int64_t begin, int64_t end) {
    if (args.dtype == Dtype::f32) quantize_blocks<Isa, float>(args, begin, end);
    if (args.dtype == Dtype::bf16) quantize_blocks<Isa, Bf16>(args, begin, end);
    if (args.dtype == Dtype::f16) quantize_blocks<Isa, Fp16>(args, begin, end);
  });
}

// The code of each position.
static inline const std::vector<uint8_t>& scale_code_table() {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> codes(kScalePositions);
    int code = 0;
    for (int64_t i = 0; i < kScalePositions; ++i) {
      while (code < 255 && i >= kScaleBoundaries.first_above[code]) ++code;
      codes[i] = static_cast<uint8_t>(code);
    }
    return codes;
  }();
  return table;
}

template <class Isa>
void quantize_scales(const QuantizeScalesArgs& args, const ParallelFor& parallel_for) {
  const uint8_t* table = scale_code_table().data();
  const int64_t groups = (args.blocks + kGroupSize - 1) / kGroupSize;
  parallel_for(groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kGroupSize;
      const int64_t count = std::min(kGroupSize, args.blocks - first);
      float values[kGroupSize];
      for (int64_t i = 0; i < count; ++i) values[i] = args.absmax[first + i] - args.offset;
      const float group_scale = float_of(Isa::absmax_bits(values, count));
      args.group_scales[group] = group_scale;
      if (group_scale == 0.0f) {
        std::memset(args.codes + first, 0, static_cast<size_t>(count));
        continue;
      }
      const float inverse = 1.0f / group_scale;
      for (int64_t i = 0; i < count; ++i) {
        // In this order NaN becomes -1: whatever comes in, the index is within the table.
        const float x = std::min(std::max(-1.0f, values[i] * inverse), 1.0f);
        args.codes[first + i] = table[static_cast<int32_t>((x + 1.0f) * 32767.5f + 0.5f)];
      }
    }
  });
}

}  // namespace lowbit::cpu

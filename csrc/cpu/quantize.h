// quantize: absmax scales and 4-bit codes of a float weight; quantize_scales: the scales in 8 bits.
#pragma once

#include "int8.h"
#include "support.h"

namespace lowbit::cpu {

constexpr int64_t kQuantizeAhead = 8192;  // bytes: the hardware's prefetcher stops at each page

// The codes of a full block.
template <class Isa, class T>
void encode_block(const typename Isa::Encoder& encode, const T* values, int64_t count, float absmax, uint8_t* packed) {
  const float inverse = 1.0f / std::max(absmax, kTinyAbsmax);
  for (int64_t i = 0; i < count; i += 32) {
    __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kQuantizeAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kQuantizeAhead + 64);
    encode(values + i, inverse, packed + i / 2);
  }
}

// The short last block divides by absmax, where full ones multiply by its reciprocal (the format says so).
template <class T>
static void encode_short_block(const Format& format, const T* values, int64_t count, float absmax, uint8_t* packed) {
  const auto code = [&](int64_t i) {
    if (i >= count) return format.zero_code;
    return encode_one(format, to_float(values[i]) / absmax);
  };
  for (int64_t i = 0; i < count; i += 2) packed[i / 2] = pack(code(i), code(i + 1));
}

template <class Isa, class T>
void quantize_blocks(const QuantizeArgs& args, int64_t begin, int64_t end) {
  // A few blocks get their scales first, then their codes: within a block scale, reciprocal and codes wait for each
  // other, but those of different blocks do not.
  constexpr int64_t kBatchElements = 1024;
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t size = args.block_size, full_blocks = args.numel / size;
  const int64_t batch = std::max<int64_t>(1, kBatchElements / size);
  const typename Isa::Encoder encode(*args.format);
  for (int64_t first = begin; first < std::min(end, full_blocks); first += batch) {
    const int64_t last = std::min(first + batch, std::min(end, full_blocks));
    for (int64_t block = first; block < last; ++block) {
      const T* values = weight + block * size;
      args.absmax[block] = float_of(Isa::absmax_bits(values, size));
    }
    for (int64_t block = first; block < last; ++block)
      encode_block<Isa>(encode, weight + block * size, size, args.absmax[block], args.packed + block * size / 2);
  }
  if (end > full_blocks) {
    const int64_t count = args.numel - full_blocks * size;
    const T* values = weight + full_blocks * size;
    const float absmax = float_of(Isa::absmax_bits(values, count));
    args.absmax[full_blocks] = absmax < kTinyAbsmax ? kTinyAbsmax : absmax;  // NaN stays
    encode_short_block(*args.format, values, count, args.absmax[full_blocks], args.packed + full_blocks * size / 2);
  }
}

template <class Isa>
void quantize(const QuantizeArgs& args, const ParallelFor& parallel_for) {
  parallel_for(args.blocks, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.block_size)),
               [&](int64_t begin, int64_t end) {
                 for_dtype(args.dtype, [&]<class T>(T) {
                   if (args.format->has_row_scales) {
                     quantize_int8_rows<Isa, T>(args, begin, end);
                   } else {
                     quantize_blocks<Isa, T>(args, begin, end);
                   }
                 });
               });
}

// The code of each of kScalePositions.
static inline std::vector<uint8_t> codes_of_positions(const uint16_t (&first_above)[255]) {
  std::vector<uint8_t> codes(kScalePositions);
  int code = 0;
  for (int64_t i = 0; i < kScalePositions; ++i) {
    while (code < 255 && i >= first_above[code]) ++code;
    codes[i] = static_cast<uint8_t>(code);
  }
  return codes;
}

static inline const std::vector<uint8_t>& scale_code_table() {
  static const std::vector<uint8_t> table = codes_of_positions(kScaleBoundaries.first_above);
  return table;
}

template <class Isa>
void quantize_scales(const QuantizeScalesArgs& args, const ParallelFor& parallel_for) {
  const uint8_t* table = scale_code_table().data();
  const float offset = *args.offset;
  const int64_t groups = ceil_div(args.blocks, kGroupSize);
  parallel_for(groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kGroupSize;
      const int64_t count = std::min(kGroupSize, args.blocks - first);
      float values[kGroupSize];
      for (int64_t i = 0; i < count; ++i) values[i] = args.absmax[first + i] - offset;
      const float group_scale = float_of(Isa::absmax_bits(values, count));
      args.group_scales[group] = group_scale;
      if (group_scale == 0.0f) {
        std::memset(args.codes + first, 0, static_cast<size_t>(count));
        continue;
      }
      const float inverse = 1.0f / group_scale;
      // The compiler vectorizes this because it is apart from the look-ups and clamps integers (floats from zero up are
      // ordered as their bits). The index is within the table for any input, NaN too.
      int32_t positions[kGroupSize];
      constexpr int32_t kLast = 0x477fff80;  // 65535.5
      for (int64_t i = 0; i < count; ++i) {
        const float position = (values[i] * inverse + 1.0f) * 32767.5f + 0.5f;
        const int32_t bits = std::min(std::max(static_cast<int32_t>(bits_of(position)), 0), kLast);
        positions[i] = static_cast<int32_t>(float_of(static_cast<uint32_t>(bits)));
      }
      for (int64_t i = 0; i < count; ++i) args.codes[first + i] = table[positions[i]];
    }
  });
}

}  // namespace lowbit::cpu

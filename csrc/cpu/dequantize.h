// dequantize: the decoded weight; decode_range: the piece of it that the products ask for.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "kernels.h"
#include "support.h"

namespace lowbit::cpu {

// The decoded scales of blocks [first, first + count).
template <class Isa>
void decode_scales(const QuantizedWeight& weight, int64_t first, int64_t count, float* scales) {
  if (weight.absmax) {
    std::copy_n(weight.absmax + first, count, scales);
    return;
  }
  while (count > 0) {
    const int64_t group = first / kGroupSize;
    const int64_t in_group = std::min(count, (group + 1) * kGroupSize - first);
    Isa::decode_scales(weight.scale_codes + first, in_group, weight.group_scales[group], weight.offset, scales);
    first += in_group;
    scales += in_group;
    count -= in_group;
  }
}

// Decodes elements [begin, begin + count) of the flattened weight to fp32. Any begin: work goes in chunks of 64
// elements aligned on the flat index, which no block boundary cuts except in the middle (block size 32).
template <class Isa>
void decode_range(const QuantizedWeight& weight, const typename Isa::Decoder& decode, int64_t begin, int64_t count,
                  float* out) {
  constexpr int64_t kChunk = 64, kChunksPerBatch = 64;
  const int64_t end = begin + count;
  const int64_t last_block = (weight.numel - 1) / weight.block_size;
  float scales[2 * kChunksPerBatch];
  for (int64_t batch = begin / kChunk; batch * kChunk < end; batch += kChunksPerBatch) {
    const int64_t batch_end = std::min(end, (batch + kChunksPerBatch) * kChunk);
    const int64_t first_block = std::max(begin, batch * kChunk) / weight.block_size;
    decode_scales<Isa>(weight, first_block, (batch_end - 1) / weight.block_size - first_block + 1, scales);
    for (int64_t start = batch * kChunk; start < batch_end; start += kChunk) {
      const int64_t low_block = std::max(start / weight.block_size, first_block);
      const int64_t high_block = std::min((start + 32) / weight.block_size, last_block);
      const int64_t decoded_high = std::min(high_block, (batch_end - 1) / weight.block_size);
      uint8_t tail[kChunk / 2] = {};
      const uint8_t* packed = weight.packed + start / 2;
      if (start + kChunk > weight.numel) {
        std::memcpy(tail, packed, static_cast<size_t>((weight.numel - start + 1) / 2));
        packed = tail;
      }
      typename Isa::Vec values[kChunk / Isa::kLanes];
      decode.natural(packed, scales[low_block - first_block], scales[std::max(decoded_high, low_block) - first_block],
                     values);

      const bool whole = begin <= start && start + kChunk <= end;
      float partial[kChunk];
      float* to = whole ? out + (start - begin) : partial;
      for (int64_t v = 0; v < kChunk / Isa::kLanes; ++v) Isa::store(to + v * Isa::kLanes, values[v]);
      if (!whole) {
        const int64_t from = std::max(begin, start), until = std::min(end, start + kChunk);
        std::copy(partial + (from - start), partial + (until - start), out + (from - begin));
      }
    }
  }
}

// The same for int8 codes, which have one scale per row.
template <class Isa>
void decode_range_int8(const QuantizedWeight& weight, int64_t begin, int64_t count, float* out) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(weight.packed);
  for (int64_t i = begin; i < begin + count;) {
    const int64_t row = i / weight.block_size, end = std::min(begin + count, (row + 1) * weight.block_size);
    const auto absmax = Isa::broadcast(weight.absmax[row]), unit = Isa::broadcast(kInt8Unit);
    for (; i + Isa::kLanes <= end; i += Isa::kLanes, out += Isa::kLanes)
      Isa::store(out, Isa::mul(Isa::mul(Isa::load(codes + i), absmax), unit));
    for (; i < end; ++i) *out++ = static_cast<float>(codes[i]) * weight.absmax[row] * kInt8Unit;
  }
}

// Either; `decode` is empty for int8 codes.
template <class Isa>
void decode_elements(const QuantizedWeight& weight, const std::optional<typename Isa::Decoder>& decode, int64_t begin,
                     int64_t count, float* out) {
  if (decode) {
    decode_range<Isa>(weight, *decode, begin, count, out);
  } else {
    decode_range_int8<Isa>(weight, begin, count, out);
  }
}

template <class Isa, class T>
void dequantize_range(const DequantizeArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 2048;  // fp32 piece that stays in the L1 cache
  std::optional<typename Isa::Decoder> decode;
  if (args.weight.format) decode.emplace(*args.weight.format);
  T* out = static_cast<T*>(args.out);
  float piece[kPiece];
  for (int64_t start = begin; start < end; start += kPiece) {
    const int64_t count = std::min(kPiece, end - start);
    decode_elements<Isa>(args.weight, decode, start, count, piece);
    store_row<Isa>(piece, count, out + start);
  }
}

template <class Isa>
void dequantize(const DequantizeArgs& args, const ParallelFor& parallel_for) {
  constexpr int64_t kUnit = 4096;
  const int64_t numel = args.weight.numel;
  parallel_for((numel + kUnit - 1) / kUnit, 8, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kUnit, end = std::min(last * kUnit, numel);
    if (args.dtype == Dtype::f32) dequantize_range<Isa, float>(args, begin, end);
    if (args.dtype == Dtype::bf16) dequantize_range<Isa, Bf16>(args, begin, end);
    if (args.dtype == Dtype::f16) dequantize_range<Isa, Fp16>(args, begin, end);
  });
}

}  // namespace lowbit::cpu

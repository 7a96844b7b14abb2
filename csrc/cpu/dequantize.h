// dequantize: the decoded weight; decode_elements: the piece of it that the products ask for.
#pragma once

#include "support.h"

namespace lowbit::cpu {

// The decoded scales of blocks [first, first + count).
template <class Isa>
void decode_scales(const QuantizedWeight& weight, int64_t first, int64_t count, float* scales) {
  const Scales& stored = weight.scales;
  if (stored.kind != ScaleKind::double_quant) {
    std::copy_n(stored.values + first, count, scales);
    return;
  }
  while (count > 0) {
    const int64_t group = first / kGroupSize;
    const int64_t in_group = std::min(count, (group + 1) * kGroupSize - first);
    Isa::decode_scales(stored.codes + first, in_group, stored.group_scales[group], *stored.offset, scales);
    first += in_group;
    scales += in_group;
    count -= in_group;
  }
}

// Decodes elements [begin, begin + count) of the flattened weight to T. `begin` may be anything: the work is done in
// chunks of 64 elements aligned on the flat index, which block boundaries cut in the middle only (block size 32).
template <class Isa, class T>
void decode_range(const QuantizedWeight& weight, const typename Isa::Decoder& decode, int64_t begin, int64_t count,
                  T* out) {
  constexpr int64_t kChunk = 64, kChunksPerBatch = 64;
  const int shift = block_shift(weight);
  const int64_t end = begin + count;
  float scales[2 * kChunksPerBatch];
  for (int64_t batch = begin / kChunk; batch * kChunk < end; batch += kChunksPerBatch) {
    const int64_t batch_end = std::min(end, (batch + kChunksPerBatch) * kChunk);
    const int64_t first_block = std::max(begin, batch * kChunk) >> shift, last_block = (batch_end - 1) >> shift;
    decode_scales<Isa>(weight, first_block, last_block - first_block + 1, scales);
    // A chunk may begin or end outside of the range, where blocks have no decoded scale.
    const auto scale_at = [&](int64_t element) {
      return scales[std::clamp(element >> shift, first_block, last_block) - first_block];
    };
    for (int64_t start = batch * kChunk; start < batch_end; start += kChunk) {
      uint8_t tail[kChunk / 2] = {};
      const uint8_t* packed = weight.packed + start / 2;
      if (start + kChunk > weight.numel) {
        std::memcpy(tail, packed, static_cast<size_t>((weight.numel - start + 1) / 2));
        packed = tail;
      }
      if (begin <= start && start + kChunk <= end) {
        decode.natural(packed, scale_at(start), scale_at(start + 32), out + (start - begin));
      } else {
        T partial[kChunk];
        decode.natural(packed, scale_at(start), scale_at(start + 32), partial);
        const int64_t from = std::max(begin, start), until = std::min(end, start + kChunk);
        std::copy(partial + (from - start), partial + (until - start), out + (from - begin));
      }
    }
  }
}

// The same for int8 codes, which have one scale per row.
template <class Isa, class T>
void decode_range_int8(const QuantizedWeight& weight, int64_t begin, int64_t count, T* out) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(weight.packed);
  for (int64_t i = begin; i < begin + count;) {
    const int64_t row = i / weight.block_size, end = std::min(begin + count, (row + 1) * weight.block_size);
    const auto absmax = Isa::broadcast(weight.scales.values[row]), unit = Isa::broadcast(kInt8Unit);
    for (; i + Isa::kLanes <= end; i += Isa::kLanes, out += Isa::kLanes)
      Isa::store(out, Isa::mul(Isa::mul(Isa::load(codes + i), absmax), unit));
    for (; i < end; ++i, ++out) from_float(static_cast<float>(codes[i]) * weight.scales.values[row] * kInt8Unit, out);
  }
}

// Any format; `decode` is empty for int8 codes.
template <class Isa, class T>
void decode_elements(const QuantizedWeight& weight, const std::optional<typename Isa::Decoder>& decode, int64_t begin,
                     int64_t count, T* out) {
  if (decode) {
    decode_range<Isa>(weight, *decode, begin, count, out);
  } else {
    decode_range_int8<Isa>(weight, begin, count, out);
  }
}

// Results of at least this size are stored past the caches: most of one would not stay in them, and a store through
// them reads memory before it writes it (a fifth slower on 4096 x 14336).
constexpr int64_t kStreamBytes = 32 << 20;

// Elements [begin, end) of the weight, begin being a multiple of 4096.
template <class Isa, class T>
void dequantize_range(const QuantizedWeight& weight, int64_t begin, int64_t end, bool stream, T* out) {
  constexpr int64_t kPiece = 2048;
  std::optional<typename Isa::Decoder> decode;
  if (weight.format->bits == 4) decode.emplace(*weight.format);
  if (stream) {
    const Scratch storage(kPiece);
    T* piece = reinterpret_cast<T*>(storage.data());
    for (; begin + kPiece <= end; begin += kPiece) {
      decode_elements<Isa>(weight, decode, begin, kPiece, piece);
      Isa::stream(reinterpret_cast<const char*>(piece), kPiece * static_cast<int64_t>(sizeof(T)),
                  reinterpret_cast<char*>(out + begin));
    }
    Isa::finish_streams();
  }
  decode_elements<Isa>(weight, decode, begin, end - begin, out + begin);
}

template <class Isa>
void dequantize(const DequantizeArgs& args, const ParallelFor& parallel_for) {
  constexpr int64_t kUnit = 4096;
  const int64_t numel = args.weight.numel;
  for_dtype(args.dtype, [&]<class T>(T) {
    T* out = static_cast<T*>(args.out);
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
    const bool stream = aligned && numel * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    parallel_for(ceil_div(numel, kUnit), 8, [&](int64_t first, int64_t last) {
      dequantize_range<Isa>(args.weight, first * kUnit, std::min(last * kUnit, numel), stream, out);
    });
  });
}

}  // namespace lowbit::cpu

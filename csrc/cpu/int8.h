// int8 weights, one scale per row: quantize_int8, dequantize_int8, and the decoded pieces that products ask for.
//
// The inner loops are plain ones that compilers turn into vector code; products round apart (no FMA), as the format
// says.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "dequantize.h"
#include "kernels.h"

namespace lowbit::cpu {

// static, here and below: each instruction set keeps its own copy (linear.h says why).
//
// codes[i] = round_to_even(values[i] * scale), for |values[i] * scale| < 2^22. Adding 1.5 * 2^23 leaves no bits for a
// fraction: the sum is rounded to the integer, whose two's complement stands in its lowest bits. Whatever comes in, NaN
// too, is some code.
static inline void encode_int8(const float* values, int64_t count, float scale, int8_t* codes) {
  constexpr float kRound = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(bits_of(values[i] * scale + kRound));
}

// out[i] = fl(fl(codes[i] * absmax) * fl(1 / 127))
static inline void decode_int8(const int8_t* codes, int64_t count, float absmax, float* out) {
  constexpr float kReciprocal = 1.0f / 127.0f;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i]) * absmax * kReciprocal;
}

// Decodes elements [begin, begin + count) of the flattened weight, which may cross rows, to fp32.
static inline void decode_int8_range(const QuantizedWeight& weight, int64_t begin, int64_t count, float* out) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(weight.packed);
  for (const int64_t end = begin + count; begin < end;) {
    const int64_t row = begin / weight.block_size;
    const int64_t in_row = std::min(end, (row + 1) * weight.block_size) - begin;
    decode_int8(codes + begin, in_row, weight.absmax[row], out);
    begin += in_row;
    out += in_row;
  }
}

template <class Isa, class From, class To>
void convert_floats(const From* from, int64_t count, To* to) {
  constexpr int64_t kLanes = sizeof(typename Isa::Vec) / sizeof(float);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Isa::store(to + i, Isa::load(from + i));
  for (; i < count; ++i) from_float(to_float(from[i]), to + i);
}

constexpr int64_t kInt8Piece = 2048;  // 8 KB in fp32, in the L1 cache

template <class Isa, class T>
void quantize_int8_rows(const QuantizeInt8Args& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(args.weight) + row * args.columns;
    int8_t* codes = args.codes + row * args.columns;
    const float absmax = float_of(Isa::absmax_bits(values, args.columns));
    args.absmax[row] = absmax;
    // Infinite for a row of zeros (and below 3.7e-37), NaN for one with NaN.
    const float exact = 1.0f / absmax * 127.0f;
    const float scale = exact <= std::numeric_limits<float>::max() ? exact : 0.0f;
    for (int64_t start = 0; start < args.columns; start += kInt8Piece) {
      const int64_t count = std::min(kInt8Piece, args.columns - start);
      if constexpr (std::is_same_v<T, float>) {
        encode_int8(values + start, count, scale, codes + start);
      } else {
        float piece[kInt8Piece];
        convert_floats<Isa>(values + start, count, piece);
        encode_int8(piece, count, scale, codes + start);
      }
    }
  }
}

template <class Isa>
void quantize_int8(const QuantizeInt8Args& args, const ParallelFor& parallel_for) {
  parallel_for(args.rows, 1 + 16384 / (args.columns + 1), [&](int64_t begin, int64_t end) {
    if (args.dtype == Dtype::f32) quantize_int8_rows<Isa, float>(args, begin, end);
    if (args.dtype == Dtype::bf16) quantize_int8_rows<Isa, Bf16>(args, begin, end);
    if (args.dtype == Dtype::f16) quantize_int8_rows<Isa, Fp16>(args, begin, end);
  });
}

template <class Isa, class T>
void dequantize_int8_range(const DequantizeArgs& args, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(args.out);
  if constexpr (std::is_same_v<T, float>) {
    decode_int8_range(args.weight, begin, end - begin, out + begin);
  } else {
    float piece[kInt8Piece];
    for (int64_t start = begin; start < end; start += kInt8Piece) {
      const int64_t count = std::min(kInt8Piece, end - start);
      decode_int8_range(args.weight, start, count, piece);
      convert_floats<Isa>(piece, count, out + start);
    }
  }
}

template <class Isa>
void dequantize_int8(const DequantizeArgs& args, const ParallelFor& parallel_for) {
  constexpr int64_t kUnit = 4096;
  const int64_t numel = args.weight.numel;
  parallel_for((numel + kUnit - 1) / kUnit, 8, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kUnit, end = std::min(last * kUnit, numel);
    if (args.dtype == Dtype::f32) dequantize_int8_range<Isa, float>(args, begin, end);
    if (args.dtype == Dtype::bf16) dequantize_int8_range<Isa, Bf16>(args, begin, end);
    if (args.dtype == Dtype::f16) dequantize_int8_range<Isa, Fp16>(args, begin, end);
  });
}

// dequantize for every format, for the table of kernels.
template <class Isa>
void dequantize_any(const DequantizeArgs& args, const ParallelFor& parallel_for) {
  if (args.weight.format) {
    dequantize<Isa>(args, parallel_for);
  } else {
    dequantize_int8<Isa>(args, parallel_for);
  }
}

}  // namespace lowbit::cpu

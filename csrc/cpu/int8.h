// The part of quantize that makes int8 codes with one scale per row. (dequantize.h and linear.h read them.)
#pragma once

#include "support.h"

namespace lowbit::cpu {

// codes[i] = round_to_even(values[i] * scale), for |values[i] * scale| < 2^22. Adding 1.5 * 2^23 leaves no bits for a
// fraction: the sum is rounded to the integer, whose two's complement is in the lowest bits. Any input gives some code,
// NaN too.
static inline void encode_int8(const float* values, int64_t count, float scale, int8_t* codes) {
  constexpr float kRound = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(bits_of(values[i] * scale + kRound));
}

constexpr int64_t kInt8Piece = 2048;  // 8 KB in fp32, in the L1 cache

template <class Isa, class T>
void quantize_int8_rows(const QuantizeArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(args.weight) + row * args.block_size;
    int8_t* codes = reinterpret_cast<int8_t*>(args.packed) + row * args.block_size;
    const float absmax = float_of(Isa::absmax_bits(values, args.block_size));
    args.absmax[row] = absmax;
    // Infinite for a row of zeros (and below 3.7e-37), NaN for one with NaN.
    const float exact = 1.0f / absmax * 127.0f;
    const float scale = exact <= std::numeric_limits<float>::max() ? exact : 0.0f;
    for (int64_t start = 0; start < args.block_size; start += kInt8Piece) {
      const int64_t count = std::min(kInt8Piece, args.block_size - start);
      if constexpr (std::is_same_v<T, float>) {
        encode_int8(values + start, count, scale, codes + start);
      } else {
        float piece[kInt8Piece];
        load_row<Isa>(values + start, count, piece);
        encode_int8(piece, count, scale, codes + start);
      }
    }
  }
}

}  // namespace lowbit::cpu

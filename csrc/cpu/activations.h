// Activations in int8, for the approximate product.
#pragma once

#include "int8.h"
#include "support.h"

namespace lowbit::cpu {

constexpr int64_t kApproximateChunk = 64;

// The chunk of x at `from` in int8, its even elements before the odd ones; returns their scale.
template <class Isa, class T>
float encode_activations(const T* from, int8_t* to) {
  float values[kApproximateChunk];
  int8_t codes[kApproximateChunk];
  for (int64_t i = 0; i < kApproximateChunk; i += Isa::kLanes) Isa::store(values + i, Isa::load(from + i));
  const float largest = float_of(Isa::absmax_bits(values, kApproximateChunk));
  // NaN and inf make the chunk's scale, and so y, NaN. Activations below 3.7e-37, whose inverse scale would be
  // infinite, count as zero.
  const float inverse = 127 / largest;
  const bool in_range = largest <= std::numeric_limits<float>::max() && inverse <= std::numeric_limits<float>::max();
  encode_int8(values, kApproximateChunk, in_range ? inverse : 0.0f, codes);
  for (int64_t i = 0; i < kApproximateChunk / 2; ++i) {
    to[i] = codes[2 * i];
    to[i + kApproximateChunk / 2] = codes[2 * i + 1];
  }
  return in_range ? largest / 127 : largest * 0.0f;
}

}  // namespace lowbit::cpu

// Scalar conversions between fp32 and the two 16-bit floats; all round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dtype.h"

namespace lowbit {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return float_of(uint32_t{value.bits} << 16); }
inline float to_float(Fp16 value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  // After the shift the exponent is 112 too small; the product repairs it, for subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of((127 + 112) << 23)));
}

inline void from_float(float value, float* out) { *out = value; }
inline void from_float(float value, Bf16* out) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40);  // keep a NaN a NaN
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
inline void from_float(float value, Fp16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal in fp16: adding 0.5 leaves its rounded bits at the bottom
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace lowbit

// The vector primitives of the kernels in portable C++: eight floats in an array, for every compiler and CPU.
// isa_avx2.h has the same names; the operations (quantize.h, dequantize.h, linear.h) are templates over either.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../nf4.h"
#include "half.h"

namespace lowbit::cpu {

struct Scalar {
  struct Vec {
    float lane[8];
  };
  static constexpr const char* name = "scalar";

  static Vec zero() { return broadcast(0.0f); }
  static Vec broadcast(float value) { return pair(value, value); }
  static Vec pair(float low_half, float high_half) {
    return {{low_half, low_half, low_half, low_half, high_half, high_half, high_half, high_half}};
  }
  static Vec add(Vec a, const Vec& b) {
    for (int i = 0; i < 8; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vec mul(Vec a, const Vec& b) {
    for (int i = 0; i < 8; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Vec fma(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < 8; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float sum(const Vec& a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[1] + a.lane[5])) + ((a.lane[2] + a.lane[6]) + (a.lane[3] + a.lane[7]));
  }
  template <class T>
  static Vec load(const T* from) {
    Vec v;
    for (int i = 0; i < 8; ++i) v.lane[i] = to_float(from[i]);
    return v;
  }
  template <class T>
  static void store(T* to, const Vec& v) {
    for (int i = 0; i < 8; ++i) from_float(v.lane[i], to + i);
  }

  // The 64 codebook values of 32 packed bytes, in lane order: vector v holds elements 4v..4v+3 and 32+4v..32+4v+3.
  struct Decoder {
    explicit Decoder(const Format& format) : codebook(format.codebook) {}
    const float* codebook;
    void operator()(const uint8_t* packed, Vec (&values)[8]) const {
      for (int v = 0; v < 8; ++v) {
        for (int i = 0; i < 4; ++i) {
          values[v].lane[i] = codebook[unpack(packed, 4 * v + i)];
          values[v].lane[4 + i] = codebook[unpack(packed, 32 + 4 * v + i)];
        }
      }
    }
  };
  // The elements of vectors 2u and 2u+1 in lane order: elements 8u..8u+7 and 32+8u..32+8u+7.
  static void to_natural_order(const Vec& a, const Vec& b, float* low, float* high) {
    std::copy_n(a.lane, 4, low);
    std::copy_n(b.lane, 4, low + 4);
    std::copy_n(a.lane + 4, 4, high);
    std::copy_n(b.lane + 4, 4, high + 4);
  }

  // scales[i] = fl(fl(map[codes[i]] * group_scale) + offset)
  static void decode_scales(const uint8_t* codes, int64_t count, float group_scale, float offset, float* scales) {
    for (int64_t i = 0; i < count; ++i) scales[i] = kScaleMap.entries[codes[i]] * group_scale + offset;
  }

  // The largest magnitude as bits: integers order as the floats do, and NaN comes out on top.
  template <class T>
  static uint32_t absmax_bits(const T* values, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, bits_of(to_float(values[i])) & 0x7fffffff);
    return most;
  }

  // Codes of 32 elements times `inverse`, packed to 16 bytes.
  struct Encoder {
    explicit Encoder(const Format& format) : format(format) {}
    const Format& format;
    uint8_t code(float x) const {
      int rank = 0;
      for (int i = 0; i < 15; ++i) rank += x > format.thresholds[i];
      return format.code_of_rank[rank];
    }
    template <class T>
    void operator()(const T* values, float inverse, uint8_t* packed) const {
      for (int i = 0; i < 16; ++i)
        packed[i] = pack(code(to_float(values[2 * i]) * inverse), code(to_float(values[2 * i + 1]) * inverse));
    }
  };
};

}  // namespace lowbit::cpu

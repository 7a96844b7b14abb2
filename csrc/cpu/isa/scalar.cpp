// The vector primitives of the kernels in portable C++: eight floats in an array, for every compiler and CPU.
// avx2.cpp has the same names; the operations (quantize.h, dequantize.h, linear.h) are templates over either.
#include "../operations.h"

namespace lowbit::cpu {

struct Scalar {
  struct Vec {
    float lane[8];
  };
  static constexpr const char* name = "scalar";
  static constexpr int64_t kLanes = 8;
  static constexpr int kRows = 4;  // rows of a micro kernel of gemm.h

  static Vec zero() { return broadcast(0.0f); }
  static Vec broadcast(float value) { return {{value, value, value, value, value, value, value, value}}; }
  static Vec add(Vec a, const Vec& b) {
    for (int i = 0; i < 8; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vec mul(Vec a, const Vec& b) {
    for (int i = 0; i < 8; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Vec sub(Vec a, const Vec& b) {
    for (int i = 0; i < 8; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Vec fma(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < 8; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  // The same sum rounded once, as every other instruction set's fma is; without the instruction it is slow.
  static Vec fused(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < 8; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
  }
  static Vec div(Vec a, const Vec& b) {
    for (int i = 0; i < 8; ++i) a.lane[i] /= b.lane[i];
    return a;
  }
  static Vec sqrt(Vec a) {
    for (float& lane : a.lane) lane = std::sqrt(lane);
    return a;
  }
  // 1, -1 or 0.
  static Vec sign(Vec a) {
    for (float& lane : a.lane) lane = static_cast<float>((lane > 0.0f) - (lane < 0.0f));
    return a;
  }
  static float sum(const Vec& a) {
    // Every instruction set adds in this order: each lane and the one half the lanes further on, again and again.
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
  }
  // Lanes of x where a < b, of y elsewhere (a NaN is not less).
  static Vec select_less(const Vec& a, const Vec& b, const Vec& x, Vec y) {
    for (int i = 0; i < 8; ++i) y.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i];
    return y;
  }
  // Whether a lane is not zero (a NaN is not).
  static bool any(const Vec& a) {
    return std::any_of(a.lane, a.lane + 8, [](float lane) { return lane != 0.0f; });
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

  // Copies `bytes` (a multiple of 64), past the caches where the CPU can; both addresses are multiples of 64.
  static void stream(const char* from, int64_t bytes, char* to) { std::memcpy(to, from, static_cast<size_t>(bytes)); }
  // Makes what went past the caches visible to other threads.
  static void finish_streams() {}

  // Codebook values of packed codes.
  struct Decoder {
    static constexpr int64_t kChunk = 8 * kLanes;
    explicit Decoder(const Format& format) : codebook(format.codebook) {}
    const float* codebook;

    // kChunk elements in an order of its own: values[v] lane l is element(kLanes * v + l). The first half of the lanes
    // holds the first half of the chunk.
    void operator()(const uint8_t* packed, Vec (&values)[8]) const {
      for (int64_t i = 0; i < kChunk; ++i) values[i / kLanes].lane[i % kLanes] = codebook[unpack(packed, element(i))];
    }
    static constexpr int64_t element(int64_t i) {
      const int64_t v = i / kLanes, lane = i % kLanes;
      return lane < 4 ? 4 * v + lane : 32 + 4 * v + lane - 4;
    }

    // 64 elements in their natural order, times `low` (the first 32) or `high`.
    void natural(const uint8_t* packed, float low, float high, Vec (&values)[64 / kLanes]) const {
      for (int64_t i = 0; i < 64; ++i)
        values[i / kLanes].lane[i % kLanes] = codebook[unpack(packed, i)] * (i < 32 ? low : high);
    }

    // The same, rounded to T.
    template <class T>
    void natural(const uint8_t* packed, float low, float high, T* out) const {
      for (int64_t i = 0; i < 64; ++i) from_float(codebook[unpack(packed, i)] * (i < 32 ? low : high), out + i);
    }

    // 32 elements of kLanes rows, 16 bytes each at rows[lane] + offset, times the row's scale:
    // out[element * stride + lane].
    void columns(const uint8_t* const (&rows)[kLanes], int64_t offset, const Vec& scale, float* out,
                 int64_t stride) const {
      for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int64_t i = 0; i < 32; ++i)
          out[i * stride + lane] = codebook[unpack(rows[lane] + offset, i)] * scale.lane[lane];
    }
  };
  // What gemv decodes with, for M rows of x in T.
  template <class T, int M>
  using GemvDecoder = Decoder;

  // The lower half of the lanes of one, the upper half of the other.
  static Vec join(Vec low_half, const Vec& high_half) {
    std::copy_n(high_half.lane + 4, 4, low_half.lane + 4);
    return low_half;
  }
  // A double-quantized scale in every lane: fl(fl(entry * group_scale) + offset).
  static Vec scale(const float* entry, const float* group_scale, const Vec& offset) {
    return add(broadcast(*entry * *group_scale), offset);
  }

  // Integer sums of 64 weights times x in int8 (even elements, then odd ones), as floats: some lanes of the lower half
  // add up to the first 32 elements' sum, those of the upper half to the other's.
  struct Int8Dot {
    explicit Int8Dot(const Format& format) {
      for (int code = 0; code < 16; ++code) codebook[code] = int8_codebook(format, code);
    }
    int8_t codebook[16];

    template <int M>
    void operator()(const uint8_t* packed, const int8_t* x, int64_t x_stride, Vec (&sums)[M]) const {
      for (int m = 0; m < M; ++m) {
        int32_t lane[kLanes] = {};
        for (int64_t byte = 0; byte < 32; ++byte) {
          const int8_t* pair = x + m * x_stride + byte;
          lane[byte / 4] += codebook[packed[byte] >> 4] * pair[0] + codebook[packed[byte] & 15] * pair[32];
        }
        for (int64_t i = 0; i < kLanes; ++i) sums[m].lane[i] = static_cast<float>(lane[i]);
      }
    }
  };

  // scales[i] = fl(fl(map[codes[i]] * group_scale) + offset)
  static void decode_scales(const uint8_t* codes, int64_t count, float group_scale, float offset, float* scales) {
    for (int64_t i = 0; i < count; ++i) scales[i] = kScaleMap.entries[codes[i]] * group_scale + offset;
  }

  // Entries of a map of 256.
  static Vec look_up(const float* map, const uint8_t* codes) {
    Vec v;
    for (int i = 0; i < 8; ++i) v.lane[i] = map[codes[i]];
    return v;
  }
  // The nearest of kScalePositions to each lane, clamped to [-1, 1]. NaN counts as -1.
  static void store_positions(const Vec& v, int32_t* positions) {
    for (int i = 0; i < 8; ++i) {
      const float above = v.lane[i] > -1.0f ? v.lane[i] : -1.0f, clamped = above < 1.0f ? above : 1.0f;
      positions[i] = static_cast<int32_t>((clamped + 1.0f) * 32767.5f + 0.5f);
    }
  }

  // Sums in fp64 of the squares of each lane, which are exact there.
  struct Squares {
    double lane[8] = {};
    void add(const Vec& v) {
      for (int i = 0; i < 8; ++i) lane[i] += double{v.lane[i]} * v.lane[i];
    }
    void store(double* to) const { std::copy_n(lane, 8, to); }
  };

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
    template <class T>
    void operator()(const T* values, float inverse, uint8_t* packed) const {
      for (int i = 0; i < 16; ++i)
        packed[i] = pack(encode_one(format, to_float(values[2 * i]) * inverse),
                         encode_one(format, to_float(values[2 * i + 1]) * inverse));
    }
  };

  // The codebook value nearest to each lane.
  struct Nearest {
    explicit Nearest(const Format& format) : format(format) {}
    const Format& format;
    Vec operator()(Vec x) const {
      for (float& lane : x.lane) lane = format.codebook[encode_one(format, lane)];
      return x;
    }
  };
};

const Kernels kScalarKernels = kernels_of<Scalar>();

}  // namespace lowbit::cpu

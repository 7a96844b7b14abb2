#if defined(__aarch64__)

// The vector primitives of the kernels in NEON (any 64-bit ARM); scalar.cpp has the same names and says what each
// does. A Vec of eight lanes is two registers of four.
#include <arm_neon.h>

#include "../operations.h"

namespace lowbit::cpu {

struct Neon {
  struct Vec {
    float32x4_t low, high;
  };
  static constexpr const char* name = "neon";
  static constexpr int64_t kLanes = 8;
  static constexpr int kRows = 6;  // 24 registers of sums, four of weights and a broadcast: 29 of 32

  static Vec zero() { return broadcast(0.0f); }
  static Vec broadcast(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static Vec sub(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  static Vec mul(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
  static Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec div(Vec a, Vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
  static Vec sqrt(Vec a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
  static Vec sign(Vec a) { return {sign(a.low), sign(a.high)}; }
  static float sum(Vec a) {
    const float32x4_t four = vaddq_f32(a.low, a.high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return {vbslq_f32(vcltq_f32(a.low, b.low), x.low, y.low), vbslq_f32(vcltq_f32(a.high, b.high), x.high, y.high)};
  }
  static bool any(Vec a) { return vminvq_u32(vandq_u32(vceqzq_f32(a.low), vceqzq_f32(a.high))) == 0; }

  static Vec load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static Vec load(const Bf16* from) {
    const uint16x8_t bits = vld1q_u16(&from->bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16))};
  }
  static Vec load(const Fp16* from) {
    const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&from->bits));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
  }
  static Vec load(const int8_t* from) {
    const int16x8_t wide = vmovl_s8(vld1_s8(from));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
  }
  static void store(float* to, Vec v) {
    vst1q_f32(to, v.low);
    vst1q_f32(to + 4, v.high);
  }
  static void store(Bf16* to, Vec v) { vst1q_u16(&to->bits, vcombine_u16(bf16_bits(v.low), bf16_bits(v.high))); }
  static void store(Fp16* to, Vec v) {
    vst1q_u16(&to->bits, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(v.low), vcvt_f16_f32(v.high))));
  }
  // NEON has no store that goes past the caches.
  static void stream(const char* from, int64_t bytes, char* to) { std::memcpy(to, from, static_cast<size_t>(bytes)); }
  static void finish_streams() {}

  // As in AVX2: a table look-up for each byte of the fp32 codebook, of which the results interleave to whole floats.
  struct Decoder {
    static constexpr int64_t kChunk = 64;
    explicit Decoder(const Format& format) {
      for (int byte = 0; byte < 4; ++byte) {
        uint8_t table[16];
        for (int code = 0; code < 16; ++code)
          table[code] = static_cast<uint8_t>(bits_of(format.codebook[code]) >> 8 * byte);
        planes[byte] = vld1q_u8(table);
      }
    }
    uint8x16_t planes[4];

    void operator()(const uint8_t* packed, Vec (&values)[8]) const {
      const uint8x16_t low = vld1q_u8(packed), high = vld1q_u8(packed + 16);
      float32x4_t low_even[4], low_odd[4], high_even[4], high_odd[4];
      look_up(even_codes(low), low_even);
      look_up(odd_codes(low), low_odd);
      look_up(even_codes(high), high_even);
      look_up(odd_codes(high), high_odd);
      for (int v = 0; v < 4; ++v) {
        values[v] = {low_even[v], high_even[v]};
        values[4 + v] = {low_odd[v], high_odd[v]};
      }
    }
    static constexpr int64_t element(int64_t i) {
      const int64_t half = i / 32, byte = i % 32 / 8 * 4 + i % 4 + i % 8 / 4 * 16;
      return 2 * byte + half;
    }

    void natural(const uint8_t* packed, float low, float high, Vec (&values)[8]) const {
      for (int half = 0; half < 2; ++half) {
        const uint8x16_t bytes = vld1q_u8(packed + 16 * half);
        const uint8x16_t even = even_codes(bytes), odd = odd_codes(bytes);
        const Vec scale = broadcast(half ? high : low);
        float32x4_t in_order[8];
        look_up(vzip1q_u8(even, odd), in_order);
        look_up(vzip2q_u8(even, odd), in_order + 4);
        for (int v = 0; v < 4; ++v) values[4 * half + v] = mul({in_order[2 * v], in_order[2 * v + 1]}, scale);
      }
    }
    template <class T>
    void natural(const uint8_t* packed, float low, float high, T* out) const {
      Vec values[8];
      natural(packed, low, high, values);
      for (int v = 0; v < 8; ++v) store(out + 8 * v, values[v]);
    }

    void columns(const uint8_t* const (&rows)[kLanes], int64_t offset, Vec scale, float* out, int64_t stride) const {
      four_columns(rows, offset, scale.low, out, stride);
      four_columns(rows + 4, offset, scale.high, out + 4, stride);
    }

   private:
    // columns() of four rows.
    void four_columns(const uint8_t* const* rows, int64_t offset, float32x4_t scale, float* out, int64_t stride) const {
      const auto row = [&](int i) { return vreinterpretq_u32_u8(vld1q_u8(rows[i] + offset)); };
      const uint32x4_t low02 = vzip1q_u32(row(0), row(2)), high02 = vzip2q_u32(row(0), row(2));
      const uint32x4_t low13 = vzip1q_u32(row(1), row(3)), high13 = vzip2q_u32(row(1), row(3));
      const uint32x4_t dwords[4] = {vzip1q_u32(low02, low13), vzip2q_u32(low02, low13), vzip1q_u32(high02, high13),
                                    vzip2q_u32(high02, high13)};
      // Byte b of four bytes of every row, in the order of the rows.
      static constexpr uint8_t kByByte[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
      const uint8x16_t by_byte = vld1q_u8(kByByte);
      for (int d = 0; d < 4; ++d) {
        const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u32(dwords[d]), by_byte);
        float32x4_t even[4], odd[4];
        look_up(even_codes(bytes), even);
        look_up(odd_codes(bytes), odd);
        for (int b = 0; b < 4; ++b) {
          vst1q_f32(out + (8 * d + 2 * b) * stride, vmulq_f32(even[b], scale));
          vst1q_f32(out + (8 * d + 2 * b + 1) * stride, vmulq_f32(odd[b], scale));
        }
      }
    }
    // values[v]: the codes in bytes 4v to 4v + 3.
    void look_up(uint8x16_t codes, float32x4_t* values) const {
      const uint8x16_t byte0 = vqtbl1q_u8(planes[0], codes), byte1 = vqtbl1q_u8(planes[1], codes);
      const uint8x16_t byte2 = vqtbl1q_u8(planes[2], codes), byte3 = vqtbl1q_u8(planes[3], codes);
      const uint16x8_t low_a = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1));
      const uint16x8_t high_a = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3));
      const uint16x8_t low_b = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
      const uint16x8_t high_b = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
      values[0] = vreinterpretq_f32_u16(vzip1q_u16(low_a, high_a));
      values[1] = vreinterpretq_f32_u16(vzip2q_u16(low_a, high_a));
      values[2] = vreinterpretq_f32_u16(vzip1q_u16(low_b, high_b));
      values[3] = vreinterpretq_f32_u16(vzip2q_u16(low_b, high_b));
    }
  };
  template <class T, int M>
  using GemvDecoder = Decoder;

  static Vec join(Vec low_half, Vec high_half) { return {low_half.low, high_half.high}; }
  static Vec scale(const float* entry, const float* group_scale, Vec offset) {
    return add(mul(broadcast(*entry), broadcast(*group_scale)), offset);
  }

  struct Int8Dot {
    explicit Int8Dot(const Format& format) {
      int8_t table[16];
      for (int code = 0; code < 16; ++code) table[code] = int8_codebook(format, code);
      codebook = vld1q_s8(table);
    }
    int8x16_t codebook;

    template <int M>
    void operator()(const uint8_t* packed, const int8_t* x, int64_t x_stride, Vec (&sums)[M]) const {
      for (int m = 0; m < M; ++m) {
        const int8_t* from = x + m * x_stride;
        sums[m] = {half(vld1q_u8(packed), from), half(vld1q_u8(packed + 16), from + 16)};
      }
    }

   private:
    // Of 32 elements, the even ones of x at `x` and the odd ones 32 bytes on.
    float32x4_t half(uint8x16_t bytes, const int8_t* x) const {
      const int8x16_t even = vqtbl1q_s8(codebook, even_codes(bytes)), odd = vqtbl1q_s8(codebook, odd_codes(bytes));
      const int8x16_t x_even = vld1q_s8(x), x_odd = vld1q_s8(x + 32);
      int32x4_t sum = vpaddlq_s16(vmull_s8(vget_low_s8(even), vget_low_s8(x_even)));
      sum = vpadalq_s16(sum, vmull_high_s8(even, x_even));
      sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(odd), vget_low_s8(x_odd)));
      return vcvtq_f32_s32(vpadalq_s16(sum, vmull_high_s8(odd, x_odd)));
    }
  };

  static void decode_scales(const uint8_t* codes, int64_t count, float group_scale, float offset, float* scales) {
    for (int64_t i = 0; i < count; ++i) scales[i] = kScaleMap.entries[codes[i]] * group_scale + offset;
  }

  static Vec look_up(const float* map, const uint8_t* codes) {
    float entries[8];
    for (int i = 0; i < 8; ++i) entries[i] = map[codes[i]];
    return load(entries);
  }
  static void store_positions(Vec v, int32_t* to) {
    vst1q_s32(to, positions(v.low));
    vst1q_s32(to + 4, positions(v.high));
  }

  struct Squares {
    float64x2_t sums[4] = {vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0)};
    void add(Vec v) {
      const float64x2_t wide[4] = {vcvt_f64_f32(vget_low_f32(v.low)), vcvt_high_f64_f32(v.low),
                                   vcvt_f64_f32(vget_low_f32(v.high)), vcvt_high_f64_f32(v.high)};
      for (int i = 0; i < 4; ++i) sums[i] = vfmaq_f64(sums[i], wide[i], wide[i]);
    }
    void store(double* to) const {
      for (int i = 0; i < 4; ++i) vst1q_f64(to + 2 * i, sums[i]);
    }
  };

  template <class T>
  static uint32_t absmax_bits(const T* values, int64_t count) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t most = vdupq_n_u32(0);
    const int64_t whole = count & ~int64_t{7};
    for (int64_t i = 0; i < whole; i += 8) {
      const Vec v = load(values + i);
      most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(v.low), magnitude));
      most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(v.high), magnitude));
    }
    uint32_t result = vmaxvq_u32(most);
    for (int64_t i = whole; i < count; ++i) result = std::max(result, bits_of(to_float(values[i])) & 0x7fffffff);
    return result;
  }

  struct Encoder {
    explicit Encoder(const Format& format) : format(format), code_of_rank(vld1q_u8(format.code_of_rank)) {}
    const Format& format;
    uint8x16_t code_of_rank;

    template <class T>
    void operator()(const T* values, float inverse, uint8_t* packed) const {
      const Vec scale = broadcast(inverse);
      const auto ranks_of_8 = [&](int i) {
        const Vec x = mul(load(values + i), scale);
        return vmovn_u16(vcombine_u16(vmovn_u32(rank(x.low)), vmovn_u32(rank(x.high))));
      };
      const uint8x16_t first = vqtbl1q_u8(code_of_rank, vcombine_u8(ranks_of_8(0), ranks_of_8(8)));
      const uint8x16_t second = vqtbl1q_u8(code_of_rank, vcombine_u8(ranks_of_8(16), ranks_of_8(24)));
      vst1q_u8(packed, vorrq_u8(vshlq_n_u8(vuzp1q_u8(first, second), 4), vuzp2q_u8(first, second)));
    }
    // The number of thresholds below each lane: a comparison gives -1 where true.
    uint32x4_t rank(float32x4_t x) const {
      uint32x4_t rank = vdupq_n_u32(0);
      for (const float threshold : format.thresholds) rank = vsubq_u32(rank, vcgtq_f32(x, vdupq_n_f32(threshold)));
      return rank;
    }
  };

  struct Nearest {
    explicit Nearest(const Format& format) : encoder(format) {
      for (int rank = 0; rank < 16; ++rank) sorted[rank] = format.codebook[format.code_of_rank[rank]];
    }
    Encoder encoder;
    float sorted[16];
    Vec operator()(Vec x) const { return {values(encoder.rank(x.low)), values(encoder.rank(x.high))}; }

   private:
    float32x4_t values(uint32x4_t rank) const {
      const float in_order[4] = {sorted[vgetq_lane_u32(rank, 0)], sorted[vgetq_lane_u32(rank, 1)],
                                 sorted[vgetq_lane_u32(rank, 2)], sorted[vgetq_lane_u32(rank, 3)]};
      return vld1q_f32(in_order);
    }
  };

 private:
  static uint8x16_t even_codes(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }
  static uint8x16_t odd_codes(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }

  static float32x4_t sign(float32x4_t a) {
    const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    return vsubq_f32(vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(a), one)),
                     vreinterpretq_f32_u32(vandq_u32(vcltzq_f32(a), one)));
  }
  static int32x4_t positions(float32x4_t v) {
    // Of NaN and a number vmaxnmq gives the number.
    const float32x4_t clamped = vminq_f32(vmaxnmq_f32(v, vdupq_n_f32(-1.0f)), vdupq_n_f32(1.0f));
    const float32x4_t scaled = vmulq_f32(vaddq_f32(clamped, vdupq_n_f32(1.0f)), vdupq_n_f32(32767.5f));
    return vcvtq_s32_f32(vaddq_f32(scaled, vdupq_n_f32(0.5f)));
  }

  // v rounded to bf16; a NaN stays one.
  static uint16x4_t bf16_bits(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), is_number = vceqq_f32(v, v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(is_number, rounded, quiet), 16);
  }
};

const Kernels kNeonKernels = kernels_of<Neon>();

}  // namespace lowbit::cpu

#endif  // __aarch64__

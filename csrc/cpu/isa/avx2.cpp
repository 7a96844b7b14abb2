#if defined(__x86_64__)

// The vector primitives of the kernels in AVX2, FMA and F16C; scalar.cpp has the same names and says what each does.
#include <immintrin.h>

#include "../kernels.h"
#include "../standard.h"

// Everything below, the operations too, is compiled for AVX2. Standard headers come first: an inline function of theirs
// compiled here could otherwise be the copy that the linker keeps.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../operations.h"

namespace lowbit::cpu {

struct Avx2 {
  using Vec = __m256;
  static constexpr const char* name = "avx2";
  static constexpr int64_t kLanes = 8;
  static constexpr int kRows = 6;  // 12 sums, two vectors of weights and a broadcast: 15 of 16 registers

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec broadcast(float value) { return _mm256_set1_ps(value); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
  static Vec sign(Vec a) {
    const Vec is_positive = _mm256_cmp_ps(a, zero(), _CMP_GT_OQ), is_negative = _mm256_cmp_ps(a, zero(), _CMP_LT_OQ);
    return sub(_mm256_and_ps(is_positive, broadcast(1.0f)), _mm256_and_ps(is_negative, broadcast(1.0f)));
  }
  static float sum(Vec a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static bool any(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, zero(), _CMP_NEQ_UQ)) != 0; }

  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec load(const Bf16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vec load(const Fp16* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static Vec load(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
  static void store(Bf16* to, Vec v) {
    const __m256i bits = bf16_bits(v);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(halves));
  }
  static void store(Fp16* to, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void stream(const char* from, int64_t bytes, char* to) {
    for (int64_t i = 0; i < bytes; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
  static void finish_streams() { _mm_sfence(); }

  // pshufb looks up 32 bytes at once but only in 16-byte tables: one table for each byte of the fp32 codebook, of which
  // the results unpack to whole floats, exact ones.
  struct Decoder {
    static constexpr int64_t kChunk = 64;
    explicit Decoder(const Format& format) : codebook(format.codebook) {
      for (int byte = 0; byte < 4; ++byte) planes[byte] = byte_plane(format, byte, 0);
    }
    const float* codebook;
    __m256i planes[4];

    void operator()(const uint8_t* packed, Vec (&values)[8]) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      look_up(even_codes(bytes), values);
      look_up(odd_codes(bytes), values + 4);
    }
    static constexpr int64_t element(int64_t i) {
      const int64_t half = i / 32, byte = i % 32 / 8 * 4 + i % 4 + i % 8 / 4 * 16;
      return 2 * byte + half;
    }

    void natural(const uint8_t* packed, float low, float high, Vec (&values)[8]) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      const __m256i even = even_codes(bytes), odd = odd_codes(bytes);
      Vec split[8];  // [v]: elements 4v..4v+3 and 32+4v..32+4v+3
      look_up(_mm256_unpacklo_epi8(even, odd), split);
      look_up(_mm256_unpackhi_epi8(even, odd), split + 4);
      for (int v = 0; v < 4; ++v) {
        values[v] = mul(_mm256_permute2f128_ps(split[2 * v], split[2 * v + 1], 0x20), broadcast(low));
        values[v + 4] = mul(_mm256_permute2f128_ps(split[2 * v], split[2 * v + 1], 0x31), broadcast(high));
      }
    }

    void natural(const uint8_t* packed, float low, float high, float* out) const {
      Vec values[8];
      natural(packed, low, high, values);
      for (int v = 0; v < 8; ++v) store(out + 8 * v, values[v]);
    }
    // A block has sixteen different values: they are rounded once, then looked up.
    template <class T>
    void natural(const uint8_t* packed, float low, float high, T* out) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      const __m256i even = even_codes(bytes), odd = odd_codes(bytes);
      const __m256i of_low = rounded_codebook<T>(low);
      const __m256i of_high = low == high ? of_low : rounded_codebook<T>(high);
      const __m256i tables[2] = {_mm256_permute2x128_si256(of_low, of_high, 0x20),
                                 _mm256_permute2x128_si256(of_low, of_high, 0x31)};
      __m256i pieces[4];  // [i]: elements 8i..8i+7 and 32+8i..32+8i+7
      const __m256i codes[2] = {_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)};
      for (int i = 0; i < 2; ++i) {
        const __m256i first = _mm256_shuffle_epi8(tables[0], codes[i]);
        const __m256i second = _mm256_shuffle_epi8(tables[1], codes[i]);
        pieces[2 * i] = _mm256_unpacklo_epi8(first, second);
        pieces[2 * i + 1] = _mm256_unpackhi_epi8(first, second);
      }
      __m256i* to = reinterpret_cast<__m256i*>(out);
      for (int i = 0; i < 2; ++i) {
        _mm256_storeu_si256(to + i, _mm256_permute2x128_si256(pieces[2 * i], pieces[2 * i + 1], 0x20));
        _mm256_storeu_si256(to + i + 2, _mm256_permute2x128_si256(pieces[2 * i], pieces[2 * i + 1], 0x31));
      }
    }

    void columns(const uint8_t* const (&rows)[kLanes], int64_t offset, Vec scale, float* out, int64_t stride) const {
      const auto two_rows = [&](int i) {  // 16 bytes of rows i and i + 4
        return _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset))),
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4] + offset)), 1);
      };
      const __m256i r0 = two_rows(0), r1 = two_rows(1), r2 = two_rows(2), r3 = two_rows(3);
      const __m256i low01 = _mm256_unpacklo_epi32(r0, r1), high01 = _mm256_unpackhi_epi32(r0, r1);
      const __m256i low23 = _mm256_unpacklo_epi32(r2, r3), high23 = _mm256_unpackhi_epi32(r2, r3);
      // Byte b of four bytes of every row, in the order of the rows.
      const __m256i by_byte =
          _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
      const auto four_bytes = [&](__m256i bytes, float* to) {
        bytes = _mm256_shuffle_epi8(bytes, by_byte);
        Vec even[4], odd[4];
        look_up(even_codes(bytes), even);
        look_up(odd_codes(bytes), odd);
        for (int b = 0; b < 4; ++b) {
          store(to + 2 * b * stride, mul(even[b], scale));
          store(to + (2 * b + 1) * stride, mul(odd[b], scale));
        }
      };
      four_bytes(_mm256_unpacklo_epi64(low01, low23), out);
      four_bytes(_mm256_unpackhi_epi64(low01, low23), out + 8 * stride);
      four_bytes(_mm256_unpacklo_epi64(high01, high23), out + 16 * stride);
      four_bytes(_mm256_unpackhi_epi64(high01, high23), out + 24 * stride);
    }

   private:
    // The sixteen values times `scale`, rounded to T: their low bytes, then their high bytes.
    template <class T>
    __m256i rounded_codebook(float scale) const {
      const Vec first = mul(load(codebook), broadcast(scale)), second = mul(load(codebook + 8), broadcast(scale));
      __m256i words;
      if constexpr (std::is_same_v<T, Bf16>) {
        words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits(first), bf16_bits(second)), 0b11011000);
      } else {
        words = _mm256_set_m128i(_mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT),
                                 _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
      }
      const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(words, 8);
      return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0b11011000);
    }
    // values[v] lane l: the code in byte 4v + l (l < 4) or 16 + 4v + l - 4.
    void look_up(__m256i codes, Vec* values) const {
      const __m256i byte0 = _mm256_shuffle_epi8(planes[0], codes);
      const __m256i byte1 = _mm256_shuffle_epi8(planes[1], codes);
      const __m256i byte2 = _mm256_shuffle_epi8(planes[2], codes);
      const __m256i byte3 = _mm256_shuffle_epi8(planes[3], codes);
      const __m256i low_a = _mm256_unpacklo_epi8(byte0, byte1), high_a = _mm256_unpacklo_epi8(byte2, byte3);
      const __m256i low_b = _mm256_unpackhi_epi8(byte0, byte1), high_b = _mm256_unpackhi_epi8(byte2, byte3);
      values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_a, high_a));
      values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_a, high_a));
      values[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_b, high_b));
      values[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_b, high_b));
    }
  };

  // The codebook rounded to bf16, for bf16 activations, whose own rounding is as coarse: half the tables, and no
  // second unpacking.
  struct Bf16Decoder {
    static constexpr int64_t kChunk = 64;
    explicit Bf16Decoder(const Format& format) {
      planes[0] = byte_plane(format, 2, 0x8000);
      planes[1] = byte_plane(format, 3, 0x8000);
    }
    __m256i planes[2];

    void operator()(const uint8_t* packed, Vec (&values)[8]) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      look_up(even_codes(bytes), values);
      look_up(odd_codes(bytes), values + 4);
    }
    static constexpr int64_t element(int64_t i) {
      const int64_t half = i / 32, v = i / 8 % 4, lane = i % 8;
      const int64_t byte = v / 2 * 8 + v % 2 + 2 * (lane % 4) + lane / 4 * 16;
      return 2 * byte + half;
    }

   private:
    void look_up(__m256i codes, Vec* values) const {
      const __m256i low_byte = _mm256_shuffle_epi8(planes[0], codes), high_byte = _mm256_shuffle_epi8(planes[1], codes);
      const __m256i first = _mm256_unpacklo_epi8(low_byte, high_byte);
      const __m256i second = _mm256_unpackhi_epi8(low_byte, high_byte);
      const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xffff0000));
      values[0] = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
      values[1] = _mm256_castsi256_ps(_mm256_and_si256(first, high_half));
      values[2] = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
      values[3] = _mm256_castsi256_ps(_mm256_and_si256(second, high_half));
    }
  };

  template <class T, int M>
  using GemvDecoder = std::conditional_t<std::is_same_v<T, Bf16>, Bf16Decoder, Decoder>;

  static Vec join(Vec low_half, Vec high_half) { return _mm256_blend_ps(low_half, high_half, 0xf0); }
  static Vec scale(const float* entry, const float* group_scale, Vec offset) {
    return _mm256_add_ps(_mm256_mul_ps(_mm256_broadcast_ss(entry), _mm256_broadcast_ss(group_scale)), offset);
  }

  struct Int8Dot {
    explicit Int8Dot(const Format& format) {
      alignas(16) int8_t table[16];
      for (int code = 0; code < 16; ++code) table[code] = int8_codebook(format, code);
      codebook = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    }
    __m256i codebook;

    template <int M>
    void operator()(const uint8_t* packed, const int8_t* x, int64_t x_stride, Vec (&sums)[M]) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      const __m256i even = _mm256_shuffle_epi8(codebook, even_codes(bytes));
      const __m256i odd = _mm256_shuffle_epi8(codebook, odd_codes(bytes));
      for (int m = 0; m < M; ++m) {
        const __m256i* from = reinterpret_cast<const __m256i*>(x + m * x_stride);
        const __m256i pairs = products(even, _mm256_loadu_si256(from)),
                      more = products(odd, _mm256_loadu_si256(from + 1));
        sums[m] = _mm256_cvtepi32_ps(_mm256_add_epi32(pairs, more));
      }
    }

   private:
    // maddubs takes an unsigned operand: the sign of w moves to x. Two products are at most 2 x 127 x 127 < 2^15.
    static __m256i products(__m256i w, __m256i x) {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
      return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
  };

  static void decode_scales(const uint8_t* codes, int64_t count, float group_scale, float offset, float* scales) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
      const __m256 entry = _mm256_i32gather_ps(kScaleMap.entries, index, 4);
      // Two roundings, as the format says: no FMA.
      store(scales + i, _mm256_add_ps(_mm256_mul_ps(entry, broadcast(group_scale)), broadcast(offset)));
    }
    for (; i < count; ++i) scales[i] = kScaleMap.entries[codes[i]] * group_scale + offset;
  }

  static Vec look_up(const float* map, const uint8_t* codes) {
    return _mm256_i32gather_ps(map, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))), 4);
  }
  static void store_positions(Vec v, int32_t* positions) {
    // Of NaN and a number the maximum is the second operand.
    const Vec clamped = _mm256_min_ps(_mm256_max_ps(v, broadcast(-1.0f)), broadcast(1.0f));
    const Vec position = add(mul(add(clamped, broadcast(1.0f)), broadcast(32767.5f)), broadcast(0.5f));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(positions), _mm256_cvttps_epi32(position));
  }

  struct Squares {
    __m256d low, high;
    Squares() : low(_mm256_setzero_pd()), high(low) {}
    void add(Vec v) {
      const __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
      const __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
      low = _mm256_fmadd_pd(first, first, low);
      high = _mm256_fmadd_pd(second, second, high);
    }
    void store(double* to) const {
      _mm256_storeu_pd(to, low);
      _mm256_storeu_pd(to + 4, high);
    }
  };

  template <class T>
  static uint32_t absmax_bits(const T* values, int64_t count) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    const auto bits = [&](int64_t i) { return _mm256_and_si256(_mm256_castps_si256(load(values + i)), magnitude); };
    __m256i most = _mm256_setzero_si256(), most2 = most;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      most = _mm256_max_epi32(most, bits(i));
      most2 = _mm256_max_epi32(most2, bits(i + 8));
    }
    most = _mm256_max_epi32(most, most2);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b1110));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b01));
    uint32_t result = static_cast<uint32_t>(_mm_cvtsi128_si32(four));
    for (; i < count; ++i) {
      const uint32_t rest = bits_of(to_float(values[i])) & 0x7fffffff;
      result = rest > result ? rest : result;
    }
    return result;
  }

  // The rank among 15 sorted thresholds by binary search, eight elements at a time: each of the four comparisons
  // adds a bit, and the bits so far pick the next threshold out of a register. A comparison gives -1 where true, so the
  // ranks are kept negative, which saves operations; tables are in the order of the lowest bits of that.
  struct Encoder {
    explicit Encoder(const Format& format) {
      const float* t = format.thresholds;
      first = _mm256_set1_ps(t[7]);
      second = four(t[3], 0, 0, t[11]);  // by 0 or -1
      third = four(t[1], t[13], t[9], t[5]);
      fourth = _mm256_setr_ps(t[0], t[14], t[12], t[10], t[8], t[6], t[4], t[2]);
      code_of_rank =
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(format.code_of_rank)));
    }
    __m256 first, second, third, fourth;
    __m256i code_of_rank;

    template <class T>
    void operator()(const T* values, float inverse, uint8_t* packed) const {
      const __m256 scale = _mm256_set1_ps(inverse);
      __m256i ranks[4];
      for (int i = 0; i < 4; ++i) ranks[i] = negative_rank(_mm256_mul_ps(load(values + 8 * i), scale));
      // Packing works within 128-bit lanes: bytes 4i..4i+3 of the lower one are elements 8i..8i+3, of the upper one
      // 8i+4..8i+7. Pairs of them are put back in order in the end.
      const __m256i bytes =
          _mm256_packs_epi16(_mm256_packs_epi32(ranks[0], ranks[1]), _mm256_packs_epi32(ranks[2], ranks[3]));
      const __m256i codes = _mm256_shuffle_epi8(code_of_rank, _mm256_abs_epi8(bytes));
      const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
      const __m128i joined = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      const __m128i in_order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi8(joined, in_order));
    }

    __m256i negative_rank(__m256 x) const {
      const __m256i bit3 = above(x, first);
      const __m256i two_bits = append(bit3, above(x, _mm256_permutevar_ps(second, bit3)));
      const __m256i three_bits = append(two_bits, above(x, _mm256_permutevar_ps(third, two_bits)));
      return append(three_bits, above(x, _mm256_permutevar8x32_ps(fourth, three_bits)));
    }

   private:
    static __m256 four(float a, float b, float c, float d) { return _mm256_setr_ps(a, b, c, d, a, b, c, d); }
    static __m256i above(__m256 x, __m256 threshold) {
      return _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));
    }
    static __m256i append(__m256i rank, __m256i bit) { return _mm256_add_epi32(_mm256_add_epi32(rank, rank), bit); }
  };

  struct Nearest {
    explicit Nearest(const Format& format) : encoder(format) {
      float of_lower[8], of_upper[8];
      for (int rank = 0; rank < 8; ++rank) {
        of_lower[-rank & 7] = format.codebook[format.code_of_rank[rank]];
        of_upper[-rank & 7] = format.codebook[format.code_of_rank[rank + 8]];
      }
      lower = load(of_lower);
      upper = load(of_upper);
    }
    Encoder encoder;
    __m256 lower, upper;
    Vec operator()(Vec x) const {
      const __m256i rank = encoder.negative_rank(x);
      const __m256 in_upper = _mm256_cmp_ps(x, encoder.first, _CMP_GT_OQ);
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, rank), _mm256_permutevar8x32_ps(upper, rank), in_upper);
    }
  };

 private:
  // The bits of v rounded to bf16, in the low halves of 32; a NaN stays one.
  static __m256i bf16_bits(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounding = _mm256_andnot_si256(is_nan, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_and_si256(is_nan, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_or_si256(bits, quiet), rounding), 16);
  }
  // A product by 2^12, of which the high half is kept, for a shift: the units that shift are busy with look-ups (3%).
  static __m256i even_codes(__m256i bytes) { return odd_codes(_mm256_mulhi_epu16(bytes, _mm256_set1_epi16(1 << 12))); }
  static __m256i odd_codes(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

  // Byte `byte` of the fp32 codebook, `rounding` added first, as a pshufb table in both halves.
  static __m256i byte_plane(const Format& format, int byte, uint32_t rounding) {
    alignas(16) uint8_t table[16];
    for (int code = 0; code < 16; ++code)
      table[code] = static_cast<uint8_t>((bits_of(format.codebook[code]) + rounding) >> 8 * byte);
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  }
};

const Kernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace lowbit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

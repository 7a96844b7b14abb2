// The vector primitives of the kernels in AVX-512 (F, BW, DQ, VL); scalar.cpp has the same names and says what each
// does.
#pragma once

#include <immintrin.h>

#include "../kernels.h"
#include "../standard.h"

// GCC 12 warns of the undefined operands inside its own intrinsics (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// Everything below, up to the end of the file that includes this one, is compiled for AVX-512; see avx2.cpp.
#if defined(LOWBIT_PORTABLE_INTRINSICS)  // make avx512-test: in plain C++
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace lowbit::cpu {

struct Avx512 {
  using Vec = __m512;
  static constexpr const char* name = "avx512";
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kFewBf16Rows = 16;  // most rows of bf16 that go to few_rows.h
  static constexpr int kFetchLocality = 3;     // of the codes that few_rows.h fetches ahead: every cache
  static constexpr int kRows = 12;             // 24 sums, two vectors of weights and a broadcast: 27 of 32 registers

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec broadcast(float value) { return _mm512_set1_ps(value); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
  static Vec sign(Vec a) {
    const __mmask16 is_positive = _mm512_cmp_ps_mask(a, zero(), _CMP_GT_OQ);
    const __mmask16 is_negative = _mm512_cmp_ps_mask(a, zero(), _CMP_LT_OQ);
    const Vec one_or_zero = _mm512_mask_blend_ps(is_positive, zero(), broadcast(1.0f));
    return _mm512_mask_blend_ps(is_negative, one_or_zero, broadcast(-1.0f));
  }
  static float sum(Vec a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // Lane l is the sum of the 16 values at from + l * stride.
  static Vec sums_of_rows(const float* from, int64_t stride) {
    Vec rows[16];
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) rows[row] = _mm512_loadu_ps(from + row * stride);
    // Halves the vectors four times: each step adds what two of them have beside each other.
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      rows[i] = add(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d low = _mm512_castps_pd(rows[2 * i]), high = _mm512_castps_pd(rows[2 * i + 1]);
      rows[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      rows[i] = add(_mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0x88),
                    _mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0xdd));
    return add(_mm512_shuffle_f32x4(rows[0], rows[1], 0x88), _mm512_shuffle_f32x4(rows[0], rows[1], 0xdd));
  }
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static bool any(Vec a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_NEQ_UQ) != 0; }

  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static Vec load(const Bf16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Vec load(const Fp16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vec load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
  static void store(Bf16* to, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  static void store(Fp16* to, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void stream(const char* from, int64_t bytes, char* to) {
    for (int64_t i = 0; i < bytes; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
  static void finish_streams() { _mm_sfence(); }

  // The whole fp32 codebook fits a register: one permutation looks up sixteen codes and reads no index bit but the
  // lowest four, so that codes need a shift and no mask.
  struct Decoder {
    explicit Decoder(const Format& format) : codebook(_mm512_loadu_ps(format.codebook)) {}
    __m512 codebook;

    void natural(const uint8_t* packed, float low, float high, Vec (&values)[4]) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      // [0, even << 4 | odd] to [odd, even]: codes in bytes, in order
      const __m512i words = _mm512_cvtepu8_epi16(bytes);
      const __m512i codes = _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_slli_epi16(words, 8));
      const __m512 scale[2] = {broadcast(low), broadcast(high)};
      const auto quarter = [&](int i, __m128i bytes_of_codes) {
        values[i] = mul(look_up(_mm512_cvtepu8_epi32(bytes_of_codes)), scale[i / 2]);
      };
      quarter(0, _mm512_castsi512_si128(codes));
      quarter(1, _mm512_extracti32x4_epi32(codes, 1));
      quarter(2, _mm512_extracti32x4_epi32(codes, 2));
      quarter(3, _mm512_extracti32x4_epi32(codes, 3));
    }

    template <class T>
    void natural(const uint8_t* packed, float low, float high, T* out) const {
      Vec values[4];
      natural(packed, low, high, values);
      for (int v = 0; v < 4; ++v) store(out + 16 * v, values[v]);
    }

    void columns(const uint8_t* const (&rows)[kLanes], int64_t offset, Vec scale, float* out, int64_t stride) const {
      const auto bytes = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
      const auto four_rows = [&](int i) {  // 16 bytes of rows i, i + 4, i + 8 and i + 12
        __m512i joined = _mm512_castsi128_si512(bytes(i));
        joined = _mm512_inserti32x4(joined, bytes(i + 4), 1);
        joined = _mm512_inserti32x4(joined, bytes(i + 8), 2);
        return _mm512_inserti32x4(joined, bytes(i + 12), 3);
      };
      const __m512i r0 = four_rows(0), r1 = four_rows(1), r2 = four_rows(2), r3 = four_rows(3);
      const __m512i low01 = _mm512_unpacklo_epi32(r0, r1), high01 = _mm512_unpackhi_epi32(r0, r1);
      const __m512i low23 = _mm512_unpacklo_epi32(r2, r3), high23 = _mm512_unpackhi_epi32(r2, r3);
      const auto dword = [&](__m512i dwords, float* to) {
#pragma GCC unroll 8
        for (int nibble = 0; nibble < 8; ++nibble)
          store(to + (nibble ^ 1) * stride, mul(look_up(_mm512_srli_epi32(dwords, 4 * nibble)), scale));
      };
      dword(_mm512_unpacklo_epi64(low01, low23), out);
      dword(_mm512_unpackhi_epi64(low01, low23), out + 8 * stride);
      dword(_mm512_unpacklo_epi64(high01, high23), out + 16 * stride);
      dword(_mm512_unpackhi_epi64(high01, high23), out + 24 * stride);
    }

   private:
    __m512 look_up(__m512i codes) const { return _mm512_permutexvar_ps(codes, codebook); }
  };

  // few_rows.h: 64 weights as four vectors. Lane l of vector v is element 4 l + (v ^ 1), and halves of a chunk that
  // have a scale each, of blocks of 32, are halves of every vector.
  template <bool kHalves>
  struct Fp32Chunk {
    static constexpr int kVectors = 4, kFloats = 64, kScales = kHalves ? 2 : 1;
    explicit Fp32Chunk(const Format& format) : codebook(load(format.codebook)) {}
    Vec codebook;

    struct Weights {
      __m512i codes;
      Vec table, scale;
      Vec vector(int v) const {
        const Vec value = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(4 * v)), table);
        return kHalves ? mul(value, scale) : value;
      }
      static Vec fma(Vec w, Vec x, Vec sums) { return Avx512::fma(w, x, sums); }
    };
    Weights weights(const uint8_t* packed, const float* scales) const {
      const __m512i codes = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
      if (kHalves) return {codes, codebook, join(broadcast(scales[0]), broadcast(scales[1]))};
      return {codes, mul(codebook, broadcast(scales[0])), zero()};
    }
    static Vec x(const float* arranged, int v) { return load(arranged + v * kLanes); }
    template <class T>
    static void arrange(const T* from, float* to) {
      const Vec first = load(from), second = load(from + 16), third = load(from + 32), fourth = load(from + 48);
      for (int v = 0; v < 4; ++v) {
        // Elements v, v + 4, ... of the 32 of two vectors, in the low half.
        const auto every_fourth = [v](Vec low, Vec high) {
          const __m512i index = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
          return _mm512_permutex2var_ps(low, _mm512_add_epi32(index, _mm512_set1_epi32(v)), high);
        };
        store(to + (v ^ 1) * 16, join(every_fourth(first, second), every_fourth(third, fourth)));
      }
    }
  };

  static Vec join(Vec low_half, Vec high_half) { return _mm512_mask_blend_ps(0xff00, low_half, high_half); }

  static void decode_scales(const uint8_t* codes, int64_t count, float group_scale, float offset, float* scales) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 lanes = static_cast<__mmask16>((1u << std::min<int64_t>(count - i, 16)) - 1);
      const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, codes + i));
      const __m512 entry = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, index, kScaleMap.entries, 4);
      // Two roundings, as the format says: no FMA.
      _mm512_mask_storeu_ps(scales + i, lanes, add(mul(entry, broadcast(group_scale)), broadcast(offset)));
    }
  }

  static Vec look_up(const float* map, const uint8_t* codes) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_mask_i32gather_ps(zero(), 0xffff, index, map, 4);
  }
  static void store_positions(Vec v, int32_t* positions) {
    // Of NaN and a number the maximum is the second operand.
    const Vec clamped = _mm512_min_ps(_mm512_max_ps(v, broadcast(-1.0f)), broadcast(1.0f));
    const Vec position = add(mul(add(clamped, broadcast(1.0f)), broadcast(32767.5f)), broadcast(0.5f));
    _mm512_storeu_si512(positions, _mm512_cvttps_epi32(position));
  }

  struct Squares {
    __m512d low, high;
    Squares() : low(_mm512_setzero_pd()), high(low) {}
    void add(Vec v) {
      const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
      const __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
      low = _mm512_fmadd_pd(first, first, low);
      high = _mm512_fmadd_pd(second, second, high);
    }
    void store(double* to) const {
      _mm512_storeu_pd(to, low);
      _mm512_storeu_pd(to + 8, high);
    }
  };

  template <class T>
  static uint32_t absmax_bits(const T* values, int64_t count) {
    __m512i most = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m512i bits = _mm512_castps_si512(load(values + i));
      most = _mm512_max_epi32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    uint32_t result = static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
    for (; i < count; ++i) result = std::max(result, bits_of(to_float(values[i])) & 0x7fffffff);
    return result;
  }

  // The rank among 15 sorted thresholds by binary search: each of the four comparisons adds a bit, and the bits so far
  // pick the next threshold out of a register.
  struct Encoder {
    explicit Encoder(const Format& format) {
      float padded[16] = {};
      std::copy_n(format.thresholds, 15, padded);
      int32_t codes[16];
      std::copy_n(format.code_of_rank, 16, codes);
      thresholds = _mm512_loadu_ps(padded);
      code_of_rank = _mm512_loadu_si512(codes);
    }
    __m512 thresholds;
    __m512i code_of_rank;

    template <class T>
    void operator()(const T* values, float inverse, uint8_t* packed) const {
      const __m512 scale = broadcast(inverse);
      const auto code = [&](int i) {
        return _mm512_permutexvar_epi32(rank(mul(load(values + i), scale)), code_of_rank);
      };
      const __m512i first = code(0), second = code(16);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), pack_pairs(first));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + 8), pack_pairs(second));
    }

    __m512i rank(__m512 x) const {
      __m512i rank = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int step = 8; step > 0; step /= 2) {
        const __m512i next = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
        const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(next, thresholds), _CMP_GT_OQ);
        rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
      }
      return rank;
    }

   private:
    // 16 codes to 8 bytes, the even one of each pair in the high nibble.
    static __m128i pack_pairs(__m512i codes) {
      return _mm512_cvtepi64_epi8(_mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32)));
    }
  };

  struct Nearest {
    explicit Nearest(const Format& format) : encoder(format) {
      float sorted[16];
      for (int rank = 0; rank < 16; ++rank) sorted[rank] = format.codebook[format.code_of_rank[rank]];
      values = load(sorted);
    }
    Encoder encoder;
    __m512 values;
    Vec operator()(Vec x) const { return _mm512_permutexvar_ps(encoder.rank(x), values); }
  };
};

}  // namespace lowbit::cpu

// What AVX512-BF16 and VNNI do better than the rest of AVX-512: products of bf16 and of int8.
#if defined(__x86_64__)

#include "avx512.h"

// The code below is compiled for these too. What avx512.h defines is not: the kernels of Avx512 may share it.
#if defined(LOWBIT_PORTABLE_INTRINSICS)
#elif defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vnni")
#endif

#include "../operations.h"

namespace lowbit::cpu {

struct Avx512Bf16 : Avx512 {
  static constexpr const char* name = "avx512bf16";

  // Each lane of a Vec as two bf16: those of `even` and `odd`, rounded to nearest even.
  static Vec bf16_pairs(Vec even, Vec odd) {
    // The instruction puts all of `even` before all of `odd`.
    alignas(64) static constexpr auto order = [] {
      std::array<uint16_t, 32> words{};
      for (uint16_t i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
      return words;
    }();
    const __m512i rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(order.data()), rounded));
  }
  // sums + both products of each lane's pairs. Subnormal factors and sums (below 1.2e-38) count as zero.
  static Vec bf16_fma(Vec a, Vec b, Vec sums) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // few_rows.h: 64 weights as two vectors of pairs, the even elements and the odd ones, rounded to bf16 once after the
  // scale. A look-up reads the lowest five bits of each word: the table has the sixteen values twice, so that the fifth
  // does not matter, or those of two blocks.
  template <bool kHalves>
  struct Bf16Chunk {
    static constexpr int kVectors = 2, kFloats = 32, kScales = kHalves ? 2 : 1;
    explicit Bf16Chunk(const Format& format) : codebook(load(format.codebook)) {}
    Vec codebook;

    struct Weights {
      __m512i bytes, table;
      Vec vector(int v) const {
        __m512i codes = v == 0 ? _mm512_srli_epi16(bytes, 4) : bytes;
        if (kHalves) {  // the second half looks up in the second half of the table
          const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
          codes = _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi16(15)), second);
        }
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(codes, table));
      }
      static Vec fma(Vec w, Vec x, Vec sums) { return bf16_fma(w, x, sums); }
    };
    Weights weights(const uint8_t* packed, const float* scales) const {
      const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
      const Vec low = mul(codebook, broadcast(scales[0]));
      if (kHalves) {
        const Vec high = mul(codebook, broadcast(scales[1]));
        return {bytes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low))};
      }
      return {bytes, _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)))};
    }
    static Vec x(const float* arranged, int v) { return load(arranged + v * kLanes); }
    static void arrange(const Bf16* from, float* to) {
      alignas(64) static constexpr auto even_words = [] {
        std::array<uint16_t, 32> words{};
        for (uint16_t i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(2 * i);
        return words;
      }();
      const __m512i even = _mm512_load_si512(even_words.data()), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
      const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 32);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, even, high));
      _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(low, odd, high));
    }
  };

  // few_rows.h: 64 weights as one vector of bytes, the even elements before the odd ones, and their products with x in
  // int8 (approximate.h). The instruction takes one factor as unsigned: that is w + 128, and sums start at -128 x.
  template <bool kHalves>
  struct Int8Chunk {
    static constexpr int kVectors = 1, kFloats = 48, kScales = kHalves ? 2 : 1;
    explicit Int8Chunk(const Format& format) {
      alignas(16) uint8_t table[16];
      for (int code = 0; code < 16; ++code) table[code] = static_cast<uint8_t>(int8_codebook(format, code) + 128);
      codebook = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    }
    __m512i codebook;

    struct Arranged {
      __m512i values, start;
      Vec scale;
    };
    struct Weights {
      Vec values, scale;
      Vec vector(int) const { return values; }
      Vec fma(Vec w, const Arranged& x, Vec sums) const {
        const __m512i dot = _mm512_dpbusd_epi32(x.start, _mm512_castps_si512(w), x.values);
        return Avx512::fma(_mm512_cvtepi32_ps(dot), mul(scale, x.scale), sums);
      }
    };
    Weights weights(const uint8_t* packed, const float* scales) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      const __m512i nibbles = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_srli_epi16(bytes, 4)), bytes, 1);
      const __m512i w = _mm512_shuffle_epi8(codebook, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
      Vec scale = broadcast(scales[0]);
      // Lanes 0 to 3 are even elements of the first half of the chunk, 4 to 7 of the second; the odd ones follow.
      if (kHalves) scale = _mm512_mask_blend_ps(0xf0f0, scale, broadcast(scales[1]));
      return {_mm512_castsi512_ps(w), scale};
    }
    static Arranged x(const float* arranged, int) {
      return {_mm512_loadu_si512(arranged), _mm512_loadu_si512(arranged + kLanes), load(arranged + 2 * kLanes)};
    }
    template <class T>
    static void arrange(const T* from, float* to) {
      int8_t values[64];
      const float scale = encode_activations<Avx512Bf16>(from, values);
      int32_t start[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int8_t* four = values + 4 * lane;
        start[lane] = -128 * (four[0] + four[1] + four[2] + four[3]);
      }
      std::memcpy(to, values, sizeof(values));
      std::memcpy(to + kLanes, start, sizeof(start));
      store(to + 2 * kLanes, broadcast(scale * (1.0f / 127)));
    }
  };
};

const Kernels kAvx512Bf16Kernels = kernels_of<Avx512Bf16>();

}  // namespace lowbit::cpu

#if defined(__clang__) && !defined(LOWBIT_PORTABLE_INTRINSICS)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

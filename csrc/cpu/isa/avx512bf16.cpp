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

  // A type of its own, since the linker keeps one copy of what two files instantiate for one type.
  struct Decoder : Avx512::Decoder {
    using Avx512::Decoder::Decoder;
  };
  template <class T, int M>
  using GemvDecoder = Decoder;

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

  struct Int8Dot {
    explicit Int8Dot(const Format& format) {
      alignas(16) int8_t table[16];
      for (int code = 0; code < 16; ++code) table[code] = int8_codebook(format, code);
      codebook = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    }
    __m512i codebook;

    template <int M>
    void operator()(const uint8_t* packed, const int8_t* x, int64_t x_stride, Vec (&sums)[M]) const {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
      const __m512i nibbles = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_srli_epi16(bytes, 4)), bytes, 1);
      const __m512i w = _mm512_shuffle_epi8(codebook, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
      // One factor is taken as unsigned: x + 128, where 128 w is subtracted beforehand.
      const __m512i bias = _mm512_set1_epi8(-128), zero = _mm512_setzero_si512();
      const __m512i start = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, bias, w));
      for (int m = 0; m < M; ++m) {
        const __m512i biased = _mm512_xor_si512(_mm512_loadu_si512(x + m * x_stride), bias);
        const __m512i dot = _mm512_dpbusd_epi32(start, biased, w);
        // Quarters: even elements of the first 32, of the others, then odd ones.
        sums[m] = _mm512_cvtepi32_ps(_mm512_shuffle_i32x4(dot, dot, 0xd8));
      }
    }
  };
};

const Kernels kAvx512Bf16Kernels = kernels_of<Avx512Bf16>();

}  // namespace lowbit::cpu

#if defined(__clang__) && !defined(LOWBIT_PORTABLE_INTRINSICS)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

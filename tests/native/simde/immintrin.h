// Stands in for the compiler's <immintrin.h> in `make avx512-test`, so that csrc/cpu/isa/avx512.h,
// isa/avx512bf16.h and isa/amx.cpp run on any x86-64 CPU: the intrinsics as SIMDe defines them in portable C, and here
// those that SIMDe 0.7.4 (Debian 12) lacks or has otherwise, as Intel's intrinsics guide defines them.
#pragma once

// What SIMDe does not name itself it could not replace: nothing here may come from the compiler's own AVX headers.
#if defined(__AVX__)
#error "compile without -mavx and the like"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Defined below; a later SIMDe has some of them as macros. Of those that 0.7.4 has, _mm512_madd_epi16 is wrong (it
// takes a mask) and _mm512_fmadd_ps rounds twice.
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi64_epi8
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_pd
#undef _mm512_cvtps_ph
#undef _mm512_cvttps_epi32
#undef _mm512_extractf32x8_ps
#undef _mm512_reduce_max_epi32
#undef _mm_maskz_loadu_epi8
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_i32gather_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_stream_si512
#undef _mm512_madd_epi16
#undef _mm512_fmadd_ps
#undef _mm512_dpbf16_ps
#undef _mm512_cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#undef _mm512_dpbusd_epi32

// They then leave the compiler at the instruction set that everything is compiled for.
#define LOWBIT_PORTABLE_INTRINSICS

using __mmask16 = uint16_t;
using __mmask64 = uint64_t;

namespace portable {

template <class T, class Vector>
std::array<T, sizeof(Vector) / sizeof(T)> elements(Vector vector) {
  return std::bit_cast<std::array<T, sizeof(Vector) / sizeof(T)>>(vector);
}

// As many elements as fit into both vectors, each converted from From to To; zeros above.
template <class To, class Result, class From, class Vector>
Result convert(Vector vector) {
  const auto from = elements<From>(vector);
  std::array<To, sizeof(Result) / sizeof(To)> to{};
  for (size_t i = 0; i < from.size() && i < to.size(); ++i) to[i] = static_cast<To>(from[i]);
  return std::bit_cast<Result>(to);
}

inline void require(bool met, const char* what) {
  if (met) return;
  std::fprintf(stderr, "simde/immintrin.h: %s\n", what);
  std::abort();
}

}  // namespace portable

inline __m256i _mm512_cvtepi32_epi16(__m512i a) { return portable::convert<int16_t, __m256i, int32_t>(a); }
inline __m128i _mm512_cvtepi64_epi8(__m512i a) { return portable::convert<int8_t, __m128i, int64_t>(a); }
inline __m512i _mm512_cvtepi8_epi32(__m128i a) { return portable::convert<int32_t, __m512i, int8_t>(a); }
inline __m512i _mm512_cvtepu8_epi16(__m256i a) { return portable::convert<uint16_t, __m512i, uint8_t>(a); }
inline __m512i _mm512_cvtepu8_epi32(__m128i a) { return portable::convert<uint32_t, __m512i, uint8_t>(a); }
inline __m512i _mm512_cvtepu16_epi32(__m256i a) { return portable::convert<uint32_t, __m512i, uint16_t>(a); }
inline __m512 _mm512_cvtepi32_ps(__m512i a) { return portable::convert<float, __m512, int32_t>(a); }
inline __m512d _mm512_cvtps_pd(__m256 a) { return portable::convert<double, __m512d, float>(a); }
inline __m512i _mm512_cvttps_epi32(__m512 a) { return portable::convert<int32_t, __m512i, float>(a); }
inline __m512 _mm512_cvtph_ps(__m256i a) { return portable::convert<float, __m512, _Float16>(a); }
inline __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
  portable::require(rounding == _MM_FROUND_TO_NEAREST_INT, "_mm512_cvtps_ph: only rounding to nearest is defined");
  return portable::convert<_Float16, __m256i, float>(a);
}

inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) { return simde_mm512_madd_epi16(a, b); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = portable::elements<float>(a), y = portable::elements<float>(b);
  auto sums = portable::elements<float>(c);
  for (size_t i = 0; i < sums.size(); ++i) sums[i] = std::fma(x[i], y[i], sums[i]);
  return std::bit_cast<__m512>(sums);
}

inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) { return portable::elements<__m256>(a)[half & 1]; }

// Two quarters of a, then two of b, as two bits of `order` each say.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  const auto low = portable::elements<__m128>(a), high = portable::elements<__m128>(b);
  return std::bit_cast<__m512>(
      std::array{low[order & 3], low[order >> 2 & 3], high[order >> 4 & 3], high[order >> 6 & 3]});
}

inline int _mm512_reduce_max_epi32(__m512i a) {
  int32_t largest = INT32_MIN;
  for (const int32_t element : portable::elements<int32_t>(a)) largest = element > largest ? element : largest;
  return largest;
}

// Memory of an element that the mask leaves out is not touched.
inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* from) {
  std::array<uint8_t, 16> to{};
  for (size_t i = 0; i < to.size(); ++i)
    if (mask >> i & 1) to[i] = static_cast<const uint8_t*>(from)[i];
  return std::bit_cast<__m128i>(to);
}
inline void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 a) {
  const auto from = portable::elements<float>(a);
  for (size_t i = 0; i < from.size(); ++i)
    if (mask >> i & 1) std::memcpy(static_cast<float*>(to) + i, &from[i], sizeof(float));
}
inline __m512 _mm512_mask_i32gather_ps(__m512 otherwise, __mmask16 mask, __m512i index, const void* base, int scale) {
  const auto indices = portable::elements<int32_t>(index);
  auto to = portable::elements<float>(otherwise);
  for (size_t i = 0; i < to.size(); ++i)
    if (mask >> i & 1) std::memcpy(&to[i], static_cast<const char*>(base) + int64_t{indices[i]} * scale, sizeof(float));
  return std::bit_cast<__m512>(to);
}

inline void _mm512_stream_si512(void* to, __m512i a) {
  portable::require(reinterpret_cast<uintptr_t>(to) % 64 == 0, "_mm512_stream_si512: the address is not aligned");
  std::memcpy(to, &a, sizeof(a));
}

// bf16: subnormal operands and results are zero, whatever the mode; each product joins the sum with one rounding of its
// own, that of the odd elements first.
namespace portable {

inline float flush(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }
inline float from_bf16(uint16_t bits) { return flush(std::bit_cast<float>(uint32_t{bits} << 16)); }
inline uint16_t to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(flush(value));
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace portable

inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const auto x = portable::elements<uint16_t>(a), y = portable::elements<uint16_t>(b);
  auto to = portable::elements<float>(sums);
  for (size_t i = 0; i < to.size(); ++i) {
    for (const size_t word : {2 * i + 1, 2 * i}) {
      const float xw = portable::from_bf16(x[word]), yw = portable::from_bf16(y[word]);
      to[i] = portable::flush(std::fma(xw, yw, portable::flush(to[i])));
    }
  }
  return std::bit_cast<__m512>(to);
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto upper = portable::elements<float>(high), lower = portable::elements<float>(low);
  std::array<uint16_t, 32> to;
  for (size_t i = 0; i < 16; ++i) to[i] = portable::to_bf16(lower[i]), to[i + 16] = portable::to_bf16(upper[i]);
  return std::bit_cast<__m512bh>(to);
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  const auto from = portable::elements<float>(a);
  std::array<uint16_t, 16> to;
  for (size_t i = 0; i < to.size(); ++i) to[i] = portable::to_bf16(from[i]);
  return std::bit_cast<__m256bh>(to);
}
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  const auto x = portable::elements<uint8_t>(a);
  const auto y = portable::elements<int8_t>(b);
  auto to = portable::elements<int32_t>(sums);
  for (size_t i = 0; i < x.size(); ++i) to[i / 4] += x[i] * y[i];
  return std::bit_cast<__m512i>(to);
}

// AMX: the tiles of a thread, which exist between _tile_loadconfig and _tile_release. A thread that ends without the
// latter, or an instruction on tiles of no or another shape, is an error.
namespace portable {

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t bytes[16][64] = {};
};
struct Tiles {
  bool configured = false;
  Tile tile[8];
  ~Tiles() { require(!configured, "a thread ended without _tile_release"); }
  Tile& at(int i) {
    require(configured && i < 8 && tile[i].rows > 0, "an instruction on a tile that is not set up");
    return tile[i];
  }
};
inline thread_local Tiles tiles;

}  // namespace portable

inline void _tile_release() { portable::tiles.configured = false; }
inline void _tile_loadconfig(const void* config) {
  const auto* from = static_cast<const uint8_t*>(config);
  portable::require(from[0] == 1, "_tile_loadconfig: not palette 1");
  for (int i = 1; i < 16; ++i) portable::require(from[i] == 0, "_tile_loadconfig: start row or reserved bytes");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, from + 16 + 2 * i, 2);
    const int rows = from[48 + i];
    portable::require(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "_tile_loadconfig: a shape");
    portable::require(i < 8 || rows == 0, "_tile_loadconfig: more than 8 tiles");
    if (i < 8) portable::tiles.tile[i] = {rows, row_bytes, {}};
  }
  portable::tiles.configured = true;
}
inline void _tile_zero(int to) { std::memset(portable::tiles.at(to).bytes, 0, sizeof(portable::Tile::bytes)); }
inline void _tile_loadd(int to, const void* from, int64_t stride) {
  portable::Tile& tile = portable::tiles.at(to);
  _tile_zero(to);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(tile.bytes[row], static_cast<const char*>(from) + row * stride, static_cast<size_t>(tile.row_bytes));
}
inline void _tile_stored(int from, void* to, int64_t stride) {
  const portable::Tile& tile = portable::tiles.at(from);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tile.bytes[row], static_cast<size_t>(tile.row_bytes));
}
// Products of even and of odd elements are summed apart, each with one rounding, then added to each other and to the
// sum; subnormal operands and results are zero.
inline void _tile_dpbf16ps(int sums, int a, int b) {
  portable::Tile &to = portable::tiles.at(sums), &x = portable::tiles.at(a), &y = portable::tiles.at(b);
  portable::require(to.rows == x.rows && to.row_bytes == y.row_bytes && x.row_bytes == 4 * y.rows,
                    "_tile_dpbf16ps: shapes that do not match");
  const auto element = [](const portable::Tile& tile, int row, int i) {
    uint16_t bits;
    std::memcpy(&bits, tile.bytes[row] + 2 * i, 2);
    return portable::from_bf16(bits);
  };
  for (int row = 0; row < to.rows; ++row) {
    for (int column = 0; column < to.row_bytes / 4; ++column) {
      float sum[2] = {};
      for (int pair = 0; pair < y.rows; ++pair)
        for (int i = 0; i < 2; ++i)
          sum[i] = portable::flush(std::fma(element(x, row, 2 * pair + i), element(y, pair, 2 * column + i), sum[i]));
      float total;
      std::memcpy(&total, to.bytes[row] + 4 * column, 4);
      total = portable::flush(portable::flush(total) + portable::flush(sum[0] + sum[1]));
      std::memcpy(to.bytes[row] + 4 * column, &total, 4);
    }
  }
}

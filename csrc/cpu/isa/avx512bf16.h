// What AVX512-BF16, VNNI and VBMI do better than the rest of AVX-512: products of bf16 and of int8, look-ups of bytes.
#pragma once

#include "avx512.h"

// The code below is compiled for these too. What avx512.h defines is not: the kernels of Avx512 may share it.
#if defined(LOWBIT_PORTABLE_INTRINSICS)
#elif defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                                     \
    __attribute__((target("avx512bf16,avx512vnni,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vnni,avx512vbmi")
#endif

#include "../activations.h"

namespace lowbit::cpu {

template <class Isa>
struct VectorPairs;

struct Avx512Bf16 : Avx512 {
  static constexpr const char* name = "avx512bf16";
  // Zen 4 has more misses of the L2 cache under way than of the L1: one row takes a quarter less.
  static constexpr int kFetchLocality = 2;
  static constexpr int64_t kFewBf16Rows = 24;  // of more of them W is decoded once for all
  static constexpr int64_t kInt8Bf16Rows = 1;  // for which products in int8 are faster
  // Rows of bf16 that are multiplied in fp32, and by ScaledBf16Chunk: at most; more of them by Bf16Chunk.
  static constexpr int64_t kExactBf16Rows = 0, kScaledSumsRows = 2;

  // A type of its own, since the linker keeps one copy of what two files instantiate for one type.
  struct Decoder : Avx512::Decoder {
    using Avx512::Decoder::Decoder;
  };
  using Pairs = VectorPairs<Avx512Bf16>;

  // 64 codes at a time: the bytes of their entries are looked up in four tables, and joined. (A gather of 16 entries
  // takes as long on Zen 4.)
  static void decode_scales(const uint8_t* codes, int64_t count, float group_scale, float offset, float* scales) {
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      // Four codes to a word: word 4 j + l goes to 4 l + j, since the joined bytes of a lane of 128 bits are in it.
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i index = _mm512_permutexvar_epi32(order, load_words(codes + i));
      const __mmask64 in_upper_half = _mm512_movepi8_mask(index);
      __m512i bytes[4];
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; ++byte) {
        const uint8_t* table = kScaleMapBytes[byte].data();
        bytes[byte] = _mm512_mask_blend_epi8(
            in_upper_half, _mm512_permutex2var_epi8(load_words(table), index, load_words(table + 64)),
            _mm512_permutex2var_epi8(load_words(table + 128), index, load_words(table + 192)));
      }
      const __m512i low[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])};
      const __m512i high[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
      const auto finish = [&](int vector, __m512i entries) {
        // Two roundings, as the format says: no FMA.
        const Vec scaled = mul(_mm512_castsi512_ps(entries), broadcast(group_scale));
        store(scales + i + kLanes * vector, add(scaled, broadcast(offset)));
      };
      finish(0, _mm512_unpacklo_epi16(low[0], high[0]));
      finish(1, _mm512_unpackhi_epi16(low[0], high[0]));
      finish(2, _mm512_unpacklo_epi16(low[1], high[1]));
      finish(3, _mm512_unpackhi_epi16(low[1], high[1]));
    }
    Avx512::decode_scales(codes + i, count - i, group_scale, offset, scales + i);
  }

  // sums + both products of each lane's pairs. Subnormal factors and sums (below 1.2e-38) count as zero.
  static Vec bf16_fma(Vec a, Vec b, Vec sums) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // 64 words of a row: those of even index and those of odd index.
  struct Halves {
    __m512i even, odd;
  };

  // Decodes 64 elements of a 4-bit weight to bf16, rounded once after their scale: scales[0] of the first 32, and
  // scales[1]. One permutation looks up 32 codes in both scaled codebooks: its index has a fifth bit.
  struct PairDecoder {
    explicit PairDecoder(const Format& format)
        : codebook(_mm512_loadu_ps(format.codebook)),
          low_nibble(_mm512_set1_epi16(15)),
          in_second(_mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1)) {}
    __m512 codebook;
    __m512i low_nibble, in_second;

    // 32 pairs of neighbours in memory order: elements (0, 2), (4, 6), ... and then (1, 3), (5, 7), ...
    void one_row(const uint8_t* packed, const float* scales, float* to) const {
      const Halves row = look_up(packed, scales);
      store_words(to, row.even);
      store_words(to + 16, row.odd);
    }
    // 64 pairs of one element of each row: of the even elements, and then of the odd ones; see store_joined().
    void two_rows(const uint8_t* packed, const float* scales, const uint8_t* packed_below, const float* scales_below,
                  float* even, float* odd) const {
      store_joined(look_up(packed, scales), look_up(packed_below, scales_below), even, odd);
    }

   private:
    Halves look_up(const uint8_t* packed, const float* scales) const {
      const __m512 first = mul(codebook, broadcast(scales[0])), second = mul(codebook, broadcast(scales[1]));
      const __m512i table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
      const __m512i bytes = bytes_as_words(packed);
      const __m512i even = _mm512_or_si512(_mm512_srli_epi16(bytes, 4), in_second);
      const __m512i odd = _mm512_or_si512(_mm512_and_si512(bytes, low_nibble), in_second);
      return {_mm512_permutexvar_epi16(even, table), _mm512_permutexvar_epi16(odd, table)};
    }
  };

  // 64 elements of bf16 in the order of PairDecoder::one_row.
  static void split_pairs(const Bf16* from, float* to) {
    const Halves row = split(from);
    store_words(to, row.even);
    store_words(to + 16, row.odd);
  }
  // 64 elements of two rows in the order of PairDecoder::two_rows.
  static void join_rows(const Bf16* row, const Bf16* row_below, float* even, float* odd) {
    store_joined(split(row), split(row_below), even, odd);
  }

  // 64 elements of each of 16 rows, `row_stride` apart, in the order of PairDecoder::one_row: pair i of row r goes to
  // to[i * stride + r].
  static void transpose_pairs(const Bf16* from, int64_t row_stride, float* to, int64_t stride) {
    __m512i even[16], odd[16];
    for (int row = 0; row < 16; ++row) {
      const Halves halves = split(from + row * row_stride);
      even[row] = halves.even;
      odd[row] = halves.odd;
    }
    transpose(even);
    transpose(odd);
    for (int i = 0; i < 16; ++i) store_words(to + i * stride, even[i]);
    for (int i = 0; i < 16; ++i) store_words(to + (16 + i) * stride, odd[i]);
  }

  // 64 sums of columns in the order of PairDecoder::two_rows, in place: their natural order.
  static void restore_columns(float* sums) {
    const __m512i a = load_words(sums), b = load_words(sums + 16), c = load_words(sums + 32),
                  d = load_words(sums + 48);  // elements 0, 2, 4, 6 of each 16; 8, 10, ...; 1, 3, ...; 9, 11, ...
    const __m512i q0 = _mm512_unpacklo_epi32(a, c), q1 = _mm512_unpackhi_epi32(a, c);
    const __m512i q2 = _mm512_unpacklo_epi32(b, d), q3 = _mm512_unpackhi_epi32(b, d);
    const __m512i q01_low = _mm512_shuffle_i32x4(q0, q1, 0x44), q01_high = _mm512_shuffle_i32x4(q0, q1, 0xee);
    const __m512i q23_low = _mm512_shuffle_i32x4(q2, q3, 0x44), q23_high = _mm512_shuffle_i32x4(q2, q3, 0xee);
    store_words(sums, _mm512_shuffle_i32x4(q01_low, q23_low, 0x88));
    store_words(sums + 16, _mm512_shuffle_i32x4(q01_low, q23_low, 0xdd));
    store_words(sums + 32, _mm512_shuffle_i32x4(q01_high, q23_high, 0x88));
    store_words(sums + 48, _mm512_shuffle_i32x4(q01_high, q23_high, 0xdd));
  }

  // to[j * to_stride + i] = from[i * stride + j], 16 x 16.
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = load_words(from + i * stride);
    transpose(rows);
    for (int i = 0; i < 16; ++i) store_words(to + i * to_stride, rows[i]);
  }

  // few_rows.h: 64 weights as two vectors of pairs, the even elements and the odd ones, rounded to bf16 once after the
  // scale. Two scaled codebooks are one table, whose index has a fifth bit: those of two rows of W, or of the halves of
  // a chunk.
  template <bool kHalves>
  struct Bf16Chunk {
    static constexpr int kVectors = 2, kFloats = 32, kScales = kHalves ? 2 : 1, kRowsPerTable = kHalves ? 1 : 2;
    explicit Bf16Chunk(const Format& format) : codebook(load(format.codebook)) {}
    Vec codebook;

    struct Weights {
      __m512i bytes, table, fifth_bit;
      Vec vector(int v) const {
        constexpr int kAndOr = 0xea;  // of three operands: bytes & 15 | fifth_bit
        const __m512i index = v == 0 ? _mm512_or_si512(_mm512_srli_epi16(bytes, 4), fifth_bit)
                                     : _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi16(15), fifth_bit, kAndOr);
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, table));
      }
      static Vec fma(Vec w, Vec x, Vec sums) { return bf16_fma(w, x, sums); }
    };
    // Row `row` of those that share a table.
    Weights weights(const uint8_t* packed, __m512i table, int row) const {
      __m512i fifth_bit = _mm512_set1_epi16(static_cast<int16_t>(16 * row));
      if (kHalves) fifth_bit = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
      return {bytes_as_words(packed), table, fifth_bit};
    }
    // Of chunk c of rows whose scales begin at scales[0] and scales[1].
    __m512i table(const float* const* scales, int64_t c) const {
      const float* both[2] = {scales[0] + c * kScales, kHalves ? scales[0] + c * kScales + 1 : scales[1] + c};
      return reinterpret_cast<__m512i>(
          _mm512_cvtne2ps_pbh(mul(codebook, broadcast(*both[1])), mul(codebook, broadcast(*both[0]))));
    }
    static Vec x(const float* arranged, int v) { return load(arranged + v * kLanes); }
    static void arrange(const Bf16* from, float* to) { split_pairs(from, to); }
  };

  // few_rows.h: 64 weights as two vectors of values of the codebook, which is rounded to bf16. The scale multiplies the
  // sums of a chunk: for one or two rows that takes less than the tables of scaled values.
  template <bool kHalves>
  struct ScaledBf16Chunk {
    static constexpr int kVectors = 1, kFloats = 32, kScales = kHalves ? 2 : 1;
    explicit ScaledBf16Chunk(const Format& format) {
      const __m256bh once = _mm512_cvtneps_pbh(load(format.codebook));
      table = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(once));
    }
    __m512i table;

    struct Pairs {
      Vec even, odd;
    };
    struct Weights {
      Pairs values;
      Vec scale;
      Pairs vector(int) const { return values; }
      Vec fma(const Pairs& w, const Pairs& x, Vec sums) const {
        return Avx512::fma(bf16_fma(w.odd, x.odd, bf16_fma(w.even, x.even, zero())), scale, sums);
      }
    };
    Weights weights(const uint8_t* packed, const float* scales) const {
      const __m512i bytes = bytes_as_words(packed);
      // The fifth bit of an index does not matter: the table has every value twice.
      const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
      const __m512i odd = _mm512_permutexvar_epi16(bytes, table);
      Vec scale = broadcast(scales[0]);
      if (kHalves) scale = join(scale, broadcast(scales[1]));
      return {{_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)}, scale};
    }
    static Pairs x(const float* arranged, int) { return {load(arranged), load(arranged + kLanes)}; }
    static void arrange(const Bf16* from, float* to) { split_pairs(from, to); }
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

 private:
  // Byte b of the entries of the scale map, for each code.
  static constexpr auto kScaleMapBytes = [] {
    std::array<std::array<uint8_t, 256>, 4> bytes{};
    for (int byte = 0; byte < 4; ++byte)
      for (int code = 0; code < 256; ++code)
        bytes[byte][code] = static_cast<uint8_t>(std::bit_cast<uint32_t>(kScaleMap.entries[code]) >> (8 * byte));
    return bytes;
  }();

  static __m512i load_words(const void* from) { return _mm512_loadu_si512(from); }
  static __m512i bytes_as_words(const uint8_t* from) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void store_words(float* to, __m512i words) { _mm512_storeu_si512(to, words); }

  static Halves split(const Bf16* row) {
    const __m512i low = load_words(row), high = load_words(row + 32);
    return {_mm512_permutex2var_epi16(low, every_second<0>(), high),
            _mm512_permutex2var_epi16(low, every_second<1>(), high)};
  }
  template <int kFirst>
  static __m512i every_second() {
    alignas(64) static constexpr auto order = [] {
      std::array<uint16_t, 32> words{};
      for (uint16_t i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(2 * i + kFirst);
      return words;
    }();
    return _mm512_load_si512(order.data());
  }

  // Pairs of one word of each row: words 0 to 3, 8 to 11, ... and then 4 to 7, 12 to 15, ...
  static void store_joined(Halves row, Halves row_below, float* even, float* odd) {
    store_words(even, _mm512_unpacklo_epi16(row.even, row_below.even));
    store_words(even + 16, _mm512_unpackhi_epi16(row.even, row_below.even));
    store_words(odd, _mm512_unpacklo_epi16(row.odd, row_below.odd));
    store_words(odd + 16, _mm512_unpackhi_epi16(row.odd, row_below.odd));
  }

  static void transpose(__m512i (&rows)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // rows[i + c]: column c of each four, of rows i to i + 3
      rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {  // of rows 0 to 7, then 8 to 15: columns c and c + 8, c + 4 and c + 12
      t[c] = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
      t[4 + c] = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
      t[8 + c] = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
      t[12 + c] = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
      rows[c + 8] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
      rows[c + 4] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
      rows[c + 12] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
    }
  }
};

}  // namespace lowbit::cpu

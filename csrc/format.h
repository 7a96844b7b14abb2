// The formats in C++, for host and device code: codebooks, thresholds, nibble order, the 8-bit scale map.
// The Python twin is lowbit/format.py (it explains the layout); tests/test_format.py holds the two together.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LOWBIT_HOST_DEVICE __host__ __device__
#else
#define LOWBIT_HOST_DEVICE
#endif

namespace lowbit {

constexpr int64_t kMinBlockSize = 32;
constexpr int64_t kMaxBlockSize = 4096;
constexpr int64_t kGroupSize = 256;                 // blocks that share one fp32 group scale under double quantization
constexpr float kTinyAbsmax = 1e-38f;               // floor under absmax before its reciprocal is taken
constexpr float kInt8Unit = 7.874015718698502e-3f;  // 1 / 127: an int8 weight is code * absmax * kInt8Unit
constexpr int64_t kScalePositions = 65536;          // rounding positions of a double-quantized scale in [-1, 1]

LOWBIT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A format's record. Codes have 4 bits and index a codebook, or 8 bits: two's complement in units of absmax / 127.
struct Format {
  const char* name;
  int bits;             // of a code
  bool has_row_scales;  // one fp32 scale for each row; otherwise one for each block
  // Of a 4-bit format. The rank of x is the number of thresholds t with x > t; its code is code_of_rank[rank].
  float codebook[16];    // value by code
  float thresholds[15];  // fp32 midpoints of the sorted codebook
  uint8_t code_of_rank[16];
  uint8_t zero_code;  // pads an odd number of elements

  constexpr int64_t packed_bytes(int64_t numel) const { return bits == 8 ? numel : numel / 2 + numel % 2; }
};

constexpr Format make_format(const char* name, const float (&codebook)[16]) {
  Format format{name, 4, false, {}, {}, {}, 0};
  for (int code = 0; code < 16; ++code) {
    format.codebook[code] = codebook[code];
    // Insertion sort: it is stable, so that FP4's +0 (code 0) stays below its -0 (code 8).
    int rank = code;
    for (; rank > 0 && codebook[format.code_of_rank[rank - 1]] > codebook[code]; --rank)
      format.code_of_rank[rank] = format.code_of_rank[rank - 1];
    format.code_of_rank[rank] = static_cast<uint8_t>(code);
  }
  int zero_rank = 0;
  for (int i = 0; i < 15; ++i) {
    format.thresholds[i] = (codebook[format.code_of_rank[i]] + codebook[format.code_of_rank[i + 1]]) * 0.5f;
    zero_rank += 0.0f > format.thresholds[i];
  }
  format.zero_code = format.code_of_rank[zero_rank];
  return format;
}

// Source: Dettmers et al., "QLoRA", 2023, appendix E.
// clang-format off
constexpr float kNf4Codebook[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};
// clang-format on
// A 4-bit float divided by 12; code 8 is minus zero.
constexpr float kFp4Codebook[16] = {0.0f,         0.0052083333f, 0.66666667f,  1.0f,           0.33333333f,  0.5f,
                                    0.16666667f,  0.25f,         -0.0f,        -0.0052083333f, -0.66666667f, -1.0f,
                                    -0.33333333f, -0.5f,         -0.16666667f, -0.25f};

constexpr Format kNf4 = make_format("nf4", kNf4Codebook);
constexpr Format kFp4 = make_format("fp4", kFp4Codebook);
constexpr Format kInt8 = {"int8", 8, true, {}, {}, {}, 0};
constexpr const Format* kFormats[] = {&kNf4, &kFp4, &kInt8};

// Element 2i sits in the high nibble of byte i, element 2i + 1 in the low one.
LOWBIT_HOST_DEVICE inline uint8_t pack(uint8_t even_code, uint8_t odd_code) {
  return static_cast<uint8_t>(even_code << 4 | odd_code);
}
LOWBIT_HOST_DEVICE inline uint8_t unpack(const uint8_t* packed, int64_t element) {
  const uint8_t byte = packed[element / 2];
  return element % 2 ? byte & 15 : byte >> 4;
}

// What scale="search" tries for a block: absmax times each of these, the plain absmax first.
constexpr int kScaleFactorCount = 36;
constexpr float kLargestSearched = 3e38f;  // absmax above it is not multiplied
struct ScaleFactors {
  float values[kScaleFactorCount];
};
constexpr ScaleFactors make_scale_factors() {
  ScaleFactors factors{{1.0f, -1.0f}};
  for (int i = 0; i < 17; ++i) {
    const float factor = static_cast<float>(0.8 + i * (0.3 / 16));
    factors.values[2 + 2 * i] = factor;
    factors.values[3 + 2 * i] = -factor;
  }
  return factors;
}
constexpr ScaleFactors kScaleFactors = make_scale_factors();

// The code of a value in units of the block's scale.
static inline uint8_t encode_one(const Format& format, float x) {
  int rank = 0;
  for (const float threshold : format.thresholds) rank += x > threshold;
  return format.code_of_rank[rank];
}

// The codebook in multiples of 1 / 127, for the approximate product.
constexpr int8_t int8_codebook(const Format& format, int code) {
  const float value = format.codebook[code] * 127;
  return static_cast<int8_t>(value < 0 ? value - 0.5f : value + 0.5f);
}

// The signed dynamic 8-bit map: these 128 values, zero, and the negatives of all but the last, sorted.
constexpr float kScaleMapPositive[128] = {
    5.5000004e-07f, 3.2500002e-06f, 7.75e-06f,      2.1249998e-05f, 4.375e-05f,    6.625e-05f,     8.875e-05f,
    0.00015625001f, 0.00026875004f, 0.00038125002f, 0.00049375003f, 0.0006062501f, 0.00071875006f, 0.00083125f,
    0.0009437501f,  0.0012812499f,  0.00184375f,    0.00240625f,    0.00296875f,   0.0035312497f,  0.00409375f,
    0.0046562497f,  0.0052187503f,  0.00578125f,    0.00634375f,    0.00690625f,   0.00746875f,    0.00803125f,
    0.00859375f,    0.009156249f,   0.00971875f,    0.01140625f,    0.01421875f,   0.01703125f,    0.019843752f,
    0.02265625f,    0.02546875f,    0.028281251f,   0.03109375f,    0.03390625f,   0.036718752f,   0.03953125f,
    0.042343747f,   0.04515625f,    0.04796875f,    0.05078125f,    0.05359375f,   0.05640625f,    0.059218753f,
    0.06203125f,    0.06484375f,    0.067656256f,   0.070468746f,   0.07328125f,   0.07609375f,    0.07890625f,
    0.08171876f,    0.08453125f,    0.08734375f,    0.09015625f,    0.092968754f,  0.09578126f,    0.09859375f,
    0.107031256f,   0.12109375f,    0.13515624f,    0.14921875f,    0.16328125f,   0.17734376f,    0.19140625f,
    0.20546874f,    0.21953125f,    0.23359375f,    0.24765624f,    0.26171875f,   0.27578127f,    0.28984374f,
    0.30390626f,    0.31796873f,    0.33203125f,    0.34609374f,    0.36015624f,   0.37421876f,    0.38828123f,
    0.40234375f,    0.41640624f,    0.43046874f,    0.44453126f,    0.45859373f,   0.47265625f,    0.4867187f,
    0.50078124f,    0.5148437f,     0.5289062f,     0.54296875f,    0.5570313f,    0.5710938f,     0.58515626f,
    0.5992187f,     0.61328125f,    0.6273438f,     0.6414063f,     0.65546876f,   0.6695312f,     0.68359375f,
    0.6976563f,     0.7117188f,     0.72578126f,    0.7398437f,     0.75390625f,   0.7679688f,     0.78203124f,
    0.79609376f,    0.8101562f,     0.82421875f,    0.8382813f,     0.85234374f,   0.86640626f,    0.8804687f,
    0.89453125f,    0.9085938f,     0.92265624f,    0.93671876f,    0.9507812f,    0.96484375f,    0.9789063f,
    0.99296874f,    1.0f,
};

struct ScaleMap {
  float entries[256];
};
constexpr ScaleMap make_scale_map() {
  ScaleMap map{};
  for (int i = 0; i < 127; ++i) map.entries[126 - i] = -kScaleMapPositive[i];
  map.entries[127] = 0.0f;
  for (int i = 0; i < 128; ++i) map.entries[128 + i] = kScaleMapPositive[i];
  return map;
}
constexpr ScaleMap kScaleMap = make_scale_map();

// Position i of kScalePositions stands for i / 32767.5 - 1; its code is that of the nearest map entry, the lower of two
// (bitsandbytes' CPU rule for scales). first_above[c] is the first position whose code is above c.
struct ScaleBoundaries {
  uint16_t first_above[255];
};
constexpr ScaleBoundaries make_scale_boundaries() {
  ScaleBoundaries boundaries{};
  for (int c = 0; c < 255; ++c) {
    const double below = kScaleMap.entries[c], above = kScaleMap.entries[c + 1];
    const auto is_above = [&](int position) {
      const double value = position / 32767.5 - 1.0;
      const double to_below = value > below ? value - below : below - value;
      const double to_above = value > above ? value - above : above - value;
      return to_above < to_below;
    };
    int position = static_cast<int>(((below + above) / 2 + 1.0) * 32767.5);
    while (position > 0 && is_above(position - 1)) --position;
    while (!is_above(position)) ++position;
    boundaries.first_above[c] = static_cast<uint16_t>(position);
  }
  return boundaries;
}
constexpr ScaleBoundaries kScaleBoundaries = make_scale_boundaries();

}  // namespace lowbit

// The one view of a quantized weight, which every kernel takes: pointers to its device's memory.
#pragma once

#include <cstdint>

#include "format.h"

namespace lowbit {

enum class ScaleKind {
  block,         // an fp32 scale for each block
  double_quant,  // an 8-bit code for each block: its scale is kScaleMap[code] * group_scale + offset
  row,           // an fp32 scale for each row
};

struct Scales {
  ScaleKind kind;
  const float* values;  // of each block or row; under double quantization null, and these are given:
  const uint8_t* codes;
  const float* group_scales;  // of each kGroupSize blocks
  const float* offset;        // one number; on a GPU reading it on the host would wait for the device
};

// A weight of `numel` elements, flattened row-major.
struct QuantizedWeight {
  const uint8_t* packed;  // format->packed_bytes(numel) bytes of codes
  Scales scales;
  const Format* format;  // host memory
  int64_t block_size;    // elements that share a scale: of a block, or of a row (at least 1)
  int64_t numel;
};

}  // namespace lowbit

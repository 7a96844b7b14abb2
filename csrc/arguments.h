// Arguments that kernels take alike on every device: pointers to its memory, but for the format, which is the host's.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "nf4.h"

namespace lowbit {

// packed[(numel + 1) / 2], absmax[ceil(numel / block_size)]; a block with NaN or inf gets a non-finite absmax.
struct QuantizeArgs {
  const void* weight;
  Dtype dtype;
  int64_t numel;
  const Format* format;
  int64_t block_size;
  uint8_t* packed;
  float* absmax;
};

// codes[rows, columns] = round_to_even(w * (1 / absmax * 127)), absmax[rows]; a row of zeros has absmax 0 and codes 0.
struct QuantizeInt8Args {
  const void* weight;
  Dtype dtype;
  int64_t rows, columns;
  int8_t* codes;
  float* absmax;
};

// scales[blocks]: per block the signed scale of a small grid that minimises the squared error of the decoded block,
// each element's weighted by importance[its column] where given (columns: length of a row; element i is in column
// i % columns).
struct SearchScalesArgs {
  const void* weight;
  Dtype dtype;
  int64_t numel;
  const Format* format;
  int64_t block_size;
  const float* importance;  // or null
  int64_t columns;
  float* scales;
};

// packed[(numel + 1) / 2]: for each element the code whose value times its block's scale is nearest.
struct EncodeArgs {
  const void* weight;
  Dtype dtype;
  int64_t numel;
  const Format* format;
  int64_t block_size;
  const float* scales;
  uint8_t* packed;
};

}  // namespace lowbit

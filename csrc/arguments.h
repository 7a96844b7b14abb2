// The arguments of every operation, the same on every device: pointers to its memory, but for the format, which is the
// host's. Matrices are row-major and contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "weight.h"

namespace lowbit {

// packed and scales of a weight: one scale for each block (the last block may be short), or for each row.
//   4 bits: packed[ceil(numel / 2)], the code of w / absmax
//   int8: packed[numel] = round_to_even(w * (1 / absmax * 127)); a row of zeros has absmax 0 and codes 0
// The absmax of a block or row with NaN or inf is not finite.
struct QuantizeArgs {
  const void* weight;
  Dtype dtype;
  int64_t numel;
  const Format* format;
  int64_t block_size;  // elements of a block or row
  int64_t blocks;      // blocks or rows
  uint8_t* packed;
  float* absmax;
};

// codes[blocks], group_scales[ceil(blocks / 256)]
struct QuantizeScalesArgs {
  const float* absmax;
  const float* offset;
  int64_t blocks;
  uint8_t* codes;
  float* group_scales;
};

// scales[blocks]: per block the signed scale of a small grid that minimises the squared error of the decoded block.
// The error of element i is weighted by importance[i % columns] where importance is given.
struct SearchScalesArgs {
  const void* weight;
  Dtype dtype;
  int64_t numel;
  const Format* format;  // of 4 bits
  int64_t block_size;
  const float* importance;  // or null
  int64_t columns;
  float* scales;
};

// packed[ceil(numel / 2)]: for each element the code whose value times its block's scale is nearest.
struct EncodeArgs {
  const void* weight;
  Dtype dtype;
  int64_t numel;
  const Format* format;  // of 4 bits
  int64_t block_size;
  const float* scales;
  uint8_t* packed;
};

// One block of columns of `rows` rows of a weight, rounded by GPTQ with the best of `candidate_count` scales for each
// row; lowbit/reference_descent.py says how. Results are in the order of the reference's.
struct GptqBlockArgs {
  const float* weight;      // [rows, columns]
  const float* factor;      // [columns, columns], upper triangular
  const float* candidates;  // [rows, candidate_count]
  const Format* format;     // of 4 bits
  int64_t rows, columns, candidate_count;
  float* decoded;   // [rows, columns]
  float* errors;    // [rows, columns]
  int32_t* choice;  // [rows]
};

// Coordinate descent over the codes of such a block, `sweeps` times, with the best of the scales.
struct DescendBlockArgs {
  const float* decoded;     // [rows, columns]
  const float* gradient;    // [rows, columns]
  const float* hessian;     // [columns, columns]
  const float* candidates;  // [rows, candidate_count], the block's own scale first
  const Format* format;     // of 4 bits
  int64_t rows, columns, candidate_count, sweeps;
  float* result;    // [rows, columns]
  int32_t* choice;  // [rows]
};

// out[numel] = the decoded weight
struct DequantizeArgs {
  QuantizedWeight weight;
  void* out;
  Dtype dtype;
};

// out[n, count] = the columns of W [n, row_length] from number `first` on, decoded
struct DequantizeColumnsArgs {
  QuantizedWeight weight;
  int64_t row_length, first, count;
  void* out;
  Dtype dtype;
};

// y[m, n] = x[m, k] W[n, k]^T + scaling t[m, rank] lora_b[n, rank]^T + bias[n]
struct LinearArgs {
  const void* x;
  Dtype dtype;  // of x and y
  QuantizedWeight weight;
  const float* bias = nullptr;  // or null
  const float* t = nullptr;     // or null, as lora_b
  const float* lora_b = nullptr;
  float scaling = 1.0f;
  int64_t m, n, k, rank;
  void* y;
  int64_t first_row = 0;         // CPU: W's first row in the weight, which may be a stack of matrices
  float* workspace = nullptr;    // CUDA: as many floats as the plan says, of any content
  uint32_t* counters = nullptr;  // CUDA: as many as the plan says; zeros, before the launch and after it
};

// grad_x[m, k] = grad[m, n] W[n, k] + grad_t[m, rank] lora_a[rank, k]
struct LinearGradInputArgs {
  const void* grad;
  Dtype dtype;  // of grad and grad_x
  QuantizedWeight weight;
  const float* grad_t = nullptr;  // or null, as lora_a
  const float* lora_a = nullptr;
  int64_t m, n, k, rank;
  void* grad_x;
  int64_t first_row = 0;         // as above
  float* workspace = nullptr;    // as above; 16-byte aligned
  uint32_t* counters = nullptr;  // as above
};

// A matrix of LoRA's: element (i, j) is at data[i * row_stride + j * column_stride]; one of the strides is 1.
struct Factor {
  const void* data;
  Dtype dtype;
  int64_t row_stride, column_stride;
};

// Another LoRA's down, of the same dtype and strides, and its t: of the same sizes, and from the same x.
struct OtherLora {
  const void* down;
  float* t;
};
constexpr int kMostOtherLoras = 3;  // lowbit/ops/shared_input.py knows it too

// t[m, rank] = t_scale x[m, k] down[rank, k]^T and y[m, n] = up_scale t[m, rank] up[n, rank]^T + bias[n]
struct LoraProductArgs {
  const void* x;  // null: t is read
  Dtype dtype;    // of x and y: bf16 or f16
  Factor down;
  float t_scale;
  float* t;  // fp32 [m, rank]: written where x is given
  Factor up;
  float up_scale;
  const float* bias;  // or null
  void* y;            // null: only t
  int64_t m, n, k, rank;
  OtherLora others[kMostOtherLoras] = {};  // whose t is written besides; none where x is null
  int other_count = 0;
};

// out(j, r) = scale * sum over i of wide[i, j] low[i, r]: [w, rank], element (j, r) at
// out[j * out_wide_stride + r * out_rank_stride]
struct LoraOuterArgs {
  const void* wide;  // [m, w]
  Dtype dtype;       // bf16 or f16
  const float* low;  // [m, rank]
  float scale;
  void* out;
  Dtype out_dtype;
  int64_t out_wide_stride, out_rank_stride;
  int64_t m, w, rank;
};

}  // namespace lowbit

// The CUDA kernels' launchers: what each computes, on device pointers. Neither torch nor the CUDA headers are needed
// to call them; bindings_cuda.cpp checks the arguments.
//
// A launcher enqueues its kernel on `stream` of the current device and returns 0, or a CUDA error code; it neither
// allocates nor waits. Pointers need the alignment of their element type only: 16-byte accesses are made where the
// memory has the alignment for them. Element counts have 64 bits.
#pragma once

#include <cstdint>

#include "../arguments.h"

struct CUstream_st;  // of the CUDA runtime

namespace lowbit::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// The architectures that were compiled for, times 10 and separated by commas: "750,800". Later GPUs of the same
// generation run the code of earlier ones; for newer ones there is PTX of the last.
const char* architectures();

// The compute capability, times 10, of the code that the current device runs: the last compiled for that is not newer.
int code_capability();

// What an error code means.
const char* error_message(int code);

// A weight of `numel` elements, flattened row-major: 4-bit codes, or int8 codes with one scale per row.
struct QuantizedWeight {
  const uint8_t* packed;       // [(numel + 1) / 2]; int8: [numel], two's complement
  const float* absmax;         // fp32 scale of each block (int8: absmax of each row), or null where double-quantized:
  const uint8_t* scale_codes;  // then code of each block,
  const float* group_scales;   // scale of each group of 256 blocks,
  const float* offset;         // and one number; on the device, so that reading it waits for nothing
  const Format* format;        // host memory; null: int8 codes
  int64_t block_size;          // int8: the length of a row, at least 1
  int64_t numel;
};

int quantize(const QuantizeArgs& args, Stream stream);
int quantize_int8(const QuantizeInt8Args& args, Stream stream);
int search_scales(const SearchScalesArgs& args, Stream stream);
int encode(const EncodeArgs& args, Stream stream);

// codes[blocks], group_scales[ceil(blocks / 256)]
struct QuantizeScalesArgs {
  const float* absmax;
  const float* offset;
  int64_t blocks;
  uint8_t* codes;
  float* group_scales;
};
int quantize_scales(const QuantizeScalesArgs& args, Stream stream);

struct DequantizeArgs {
  QuantizedWeight weight;
  void* out;
  Dtype dtype;
};
int dequantize(const DequantizeArgs& args, Stream stream);

// LoRA's factors rounded to `dtype`: the product low_out up_out^T is scaling low up^T. Only fp16 has too small a range
// for low, whose size is x's or the loss scale's: there up, which is small, takes over, per component of the rank, what
// of low is beyond 2^15, and a large scaling. What is not finite stays so in its own row of low, and does not count for
// the others.
struct RoundedFactorsArgs {
  const void* low;  // [m, rank]
  Dtype low_dtype;
  const void* up;  // [n, rank], with these strides
  Dtype up_dtype;
  int64_t up_row_stride, up_component_stride;
  float scaling;
  int64_t m, n, rank;
  void* low_out;  // as low
  void* up_out;   // as up, strides too
  Dtype dtype;
};
int rounded_factors(const RoundedFactorsArgs& args, Stream stream);

// y[m, n] = x[m, k] W[n, k]^T + scaling t[m, rank] lora_b[n, rank]^T + bias[n]
struct LinearArgs {
  const void* x;
  Dtype dtype;  // of x and y
  QuantizedWeight weight;
  const float* bias;  // or null
  const float* t;     // or null, as lora_b
  const float* lora_b;
  float scaling;
  int64_t m, n, k, rank;
  void* y;
  float* workspace;  // as many floats as the launcher's ..._workspace function says, of any content; null where 0
};

// For a few rows of x: each group of them reads W once, 8 rows where x has 16 bits and the GPU tensor cores for it (2
// for blocks of 32), 2 elsewhere. Any shape, alignment and weight is right, and fast where in_features is a multiple of
// 32 and of the block size, packed and x are aligned to 16 bytes, and for int8 in_features is a multiple of 16.
int linear_gemv(const LinearArgs& args, Stream stream);
int64_t linear_gemv_workspace(const LinearArgs& args);  // on the current device; args.workspace may be anything

// What linear_gemv consists of: 4-bit weights and int8 ones as above, and whatever does not fit those.
int linear_gemv_int8(const LinearArgs& args, Stream stream);
int linear_any(const LinearArgs& args, Stream stream);

// linear on tensor cores, made for 9 to about 256 rows; any m, n and rank. Serves what linear_gemm_fits says: 4-bit
// weights, x in 16 bits, k a multiple of 32, k and rank below 2^23, x and packed 16-byte aligned;
// cudaErrorNotSupported otherwise, and before sm_80. The workspace is for the current device.
bool linear_gemm_fits(const LinearArgs& args);
int64_t linear_gemm_workspace(const LinearArgs& args);
int linear_gemm(const LinearArgs& args, Stream stream);

// grad_x[m, k] = grad[m, n] W[n, k] + grad_t[m, rank] lora_a[rank, k]
struct LinearGradInputArgs {
  const void* grad;
  Dtype dtype;  // of grad and grad_x
  QuantizedWeight weight;
  const float* grad_t;  // or null, as lora_a
  const float* lora_a;
  int64_t m, n, k, rank;
  void* grad_x;
  float* workspace;
};
// Floats of workspace, which needs 16-byte alignment; the answer holds for these sizes and pointers, on this device.
int64_t linear_grad_input_workspace(const LinearGradInputArgs& args);
int linear_grad_input(const LinearGradInputArgs& args, Stream stream);
// Whether it should be faster to decode the weight into 16 or 32 bits and to call cuBLAS: from many rows on.
bool linear_grad_input_decodes_first(const LinearGradInputArgs& args);

}  // namespace lowbit::cuda

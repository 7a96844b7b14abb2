// The CPU kernels: what each computes, on raw pointers. Torch is not known here; bindings.cpp checks the arguments.
#pragma once

#include <cstdint>
#include <functional>

#include "../nf4.h"
#include "half.h"

namespace lowbit::cpu {

// Runs body(begin, end) on disjoint pieces of [0, count), possibly at once on several threads.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const Body& body)>;

// A weight of `numel` elements in the 4-bit format, flattened row-major.
struct QuantizedWeight {
  const uint8_t* packed;
  const float* absmax;         // fp32 scale of each block, or null where double-quantized:
  const uint8_t* scale_codes;  // then code of each block,
  const float* group_scales;   // scale of each group of 256 blocks,
  float offset;
  const Format* format;
  int64_t block_size;
  int64_t numel;
};

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

// codes[blocks], group_scales[ceil(blocks / 256)]
struct QuantizeScalesArgs {
  const float* absmax;
  float offset;
  int64_t blocks;
  uint8_t* codes;
  float* group_scales;
};

struct DequantizeArgs {
  QuantizedWeight weight;
  void* out;
  Dtype dtype;
};

// y[m, n] = x[m, k] W[n, k]^T + t[m, rank] lora_b[n, rank]^T + bias[n]; t is already multiplied by scaling.
struct LinearArgs {
  const void* x;
  Dtype dtype;  // of x and y
  QuantizedWeight weight;
  const float* bias;  // or null
  const float* t;     // or null, as lora_b
  const float* lora_b;
  int64_t m, n, k, rank;
  void* y;
};

// grad_x[m, k] = grad[m, n] W[n, k]
struct LinearGradInputArgs {
  const void* grad;
  Dtype dtype;  // of grad and grad_x
  QuantizedWeight weight;
  int64_t m, n, k;
  void* grad_x;
};

struct Kernels {
  const char* isa;
  void (*quantize)(const QuantizeArgs&, const ParallelFor&);
  void (*quantize_scales)(const QuantizeScalesArgs&, const ParallelFor&);
  void (*dequantize)(const DequantizeArgs&, const ParallelFor&);
  void (*linear)(const LinearArgs&, const ParallelFor&);
  void (*linear_grad_input)(const LinearGradInputArgs&, const ParallelFor&);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;  // needs AVX2, FMA and F16C
#endif

// The kernels in use: the widest instruction set of this CPU, or the one chosen by select_isa.
const Kernels& active_kernels();
// "scalar", "avx2", or "auto" for the widest; false (and no change) where this CPU or build has no such kernels.
bool select_isa(const char* isa);

}  // namespace lowbit::cpu

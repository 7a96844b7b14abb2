// The CPU kernels: what each computes, on raw pointers. Torch is not known here; bindings.cpp checks the arguments.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../arguments.h"
#include "half.h"

namespace lowbit::cpu {

// Runs body(begin, end) on disjoint pieces of [0, count), at least `grain` long, on up to `threads` threads at once.
using Body = std::function<void(int64_t begin, int64_t end)>;
struct ParallelFor {
  std::function<void(int64_t count, int64_t grain, const Body& body)> run;
  int64_t threads;
  void operator()(int64_t count, int64_t grain, const Body& body) const { run(count, grain, body); }
};

// A weight of `numel` elements, flattened row-major: 4-bit codes, or int8 codes with one scale per row.
struct QuantizedWeight {
  const uint8_t* packed;       // [(numel + 1) / 2]; int8: [numel], two's complement
  const float* absmax;         // fp32 scale of each block (int8: absmax of each row), or null where double-quantized:
  const uint8_t* scale_codes;  // then code of each block,
  const float* group_scales;   // scale of each group of 256 blocks,
  float offset;
  const Format* format;  // null: int8 codes
  int64_t block_size;    // int8: the length of a row
  int64_t numel;
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
  int64_t first_row = 0;  // of W in the weight, which may be a stack of matrices
};

// t[m, rank] = x[m, k] lora_a[rank, k]^T
struct LoraDownArgs {
  const void* x;
  Dtype dtype;
  const float* lora_a;
  int64_t m, k, rank;
  float* t;
};

// grad_x[m, k] = grad[m, n] W[n, k] + grad_t[m, rank] lora_a[rank, k]
struct LinearGradInputArgs {
  const void* grad;
  Dtype dtype;  // of grad and grad_x
  QuantizedWeight weight;
  const float* grad_t;  // or null, as lora_a
  const float* lora_a;
  int64_t m, n, k, rank;
  void* grad_x;
  int64_t first_row = 0;  // as above
};

struct Kernels {
  const char* isa;
  void (*quantize)(const QuantizeArgs&, const ParallelFor&);
  void (*quantize_scales)(const QuantizeScalesArgs&, const ParallelFor&);
  void (*quantize_int8)(const QuantizeInt8Args&, const ParallelFor&);
  void (*search_scales)(const SearchScalesArgs&, const ParallelFor&);
  void (*encode)(const EncodeArgs&, const ParallelFor&);
  void (*dequantize)(const DequantizeArgs&, const ParallelFor&);
  void (*lora_down)(const LoraDownArgs&, const ParallelFor&);
  void (*linear)(const LinearArgs&, const ParallelFor&);
  // The same product, approximately: codebook and activations in int8 (4-bit weights only).
  void (*linear_approximate)(const LinearArgs&, const ParallelFor&);
  void (*linear_grad_input)(const LinearGradInputArgs&, const ParallelFor&);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;        // needs AVX2, FMA and F16C
extern const Kernels kAvx512Kernels;      // needs AVX-512 F, BW, DQ and VL besides
extern const Kernels kAvx512Bf16Kernels;  // needs AVX512-BF16 and VNNI besides
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// The kernels in use: the widest instruction set of this CPU, or the one chosen by select_isa.
const Kernels& active_kernels();
// The kernels that this CPU can run, the widest first.
const std::vector<const Kernels*>& available_kernels();
// "scalar", "avx2", "avx512", "avx512bf16", "neon", or "auto" for the widest; false (and no change) where this CPU or
// build has no such kernels.
bool select_isa(const char* isa);

}  // namespace lowbit::cpu

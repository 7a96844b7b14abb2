// The CPU kernels, on raw pointers. They do not know torch; the bindings check the arguments.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../arguments.h"
#include "../optim.h"
#include "half.h"

namespace lowbit::cpu {

// Runs body(begin, end) on disjoint pieces of [0, count), at least `grain` long, on up to `threads` threads at once.
using Body = std::function<void(int64_t begin, int64_t end)>;
struct ParallelFor {
  std::function<void(int64_t count, int64_t grain, const Body& body)> run;
  int64_t threads;
  void operator()(int64_t count, int64_t grain, const Body& body) const { run(count, grain, body); }
};

struct Kernels {
  const char* isa;
  void (*quantize)(const QuantizeArgs&, const ParallelFor&);
  void (*quantize_scales)(const QuantizeScalesArgs&, const ParallelFor&);
  void (*search_scales)(const SearchScalesArgs&, const ParallelFor&);
  void (*encode)(const EncodeArgs&, const ParallelFor&);
  void (*gptq_block)(const GptqBlockArgs&, const ParallelFor&);
  void (*descend_block)(const DescendBlockArgs&, const ParallelFor&);
  void (*dequantize)(const DequantizeArgs&, const ParallelFor&);
  void (*linear)(const LinearArgs&, const ParallelFor&);
  // The same product, approximately: codebook and activations in int8 (4-bit weights only), where that is faster.
  void (*linear_approximate)(const LinearArgs&, const ParallelFor&);
  void (*linear_grad_input)(const LinearGradInputArgs&, const ParallelFor&);
  void (*step)(const OptimizerStepArgs&, const ParallelFor&);
  void (*sum_of_squares)(const SumOfSquaresArgs&, const ParallelFor&);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;        // needs AVX2, FMA and F16C
extern const Kernels kAvx512Kernels;      // needs AVX-512 F, BW, DQ and VL besides
extern const Kernels kAvx512Bf16Kernels;  // needs AVX512-BF16, VNNI and VBMI besides
// linear_approximate of that set for any dtype, where is_few_rows() says so and there are rows.
void few_rows_by_vnni(const LinearArgs& args, const ParallelFor& parallel_for);
#if __has_include(<amxbf16intrin.h>)  // this compiler knows AMX
#define LOWBIT_AMX
extern const Kernels kAmxKernels;  // needs AMX-TILE and AMX-BF16 besides, and the system's permission
#endif
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

// The kernels in use: the fastest set of this CPU, or the one chosen by select_isa.
const Kernels& active_kernels();
// The kernels that this CPU can run, the fastest first.
const std::vector<const Kernels*>& available_kernels();
// "scalar", "avx2", "avx512", "avx512vnni" (avx512, and int8 by VNNI), "avx512bf16", "amx", "neon", or "auto" for the
// fastest; false (and no change) where this CPU or build has no such kernels.
bool select_isa(const char* isa);

}  // namespace lowbit::cpu

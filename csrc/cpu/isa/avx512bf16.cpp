#if defined(__x86_64__)

#include "avx512bf16.h"

#include "../operations.h"

namespace lowbit::cpu {

// For CPUs that multiply pairs of bf16 on half of the ports that multiply fp32: products of many rows are gemm.h's, on
// W that is not rounded.
struct Avx512Bf16Fma : Avx512Bf16 {
  static constexpr const char* name = "avx512bf16_fma";
  using Pairs = void;
};

const Kernels kAvx512Bf16Kernels = kernels_of<Avx512Bf16>();
const Kernels kAvx512Bf16FmaKernels = with_products<Avx512Bf16Fma>(kernels_of<Avx512Bf16>());

}  // namespace lowbit::cpu

#if defined(__clang__) && !defined(LOWBIT_PORTABLE_INTRINSICS)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

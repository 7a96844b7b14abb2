#if defined(__x86_64__)

#include "avx512bf16.h"

#include "../operations.h"

namespace lowbit::cpu {

const Kernels kAvx512Bf16Kernels = kernels_of<Avx512Bf16>();

}  // namespace lowbit::cpu

#if defined(__clang__) && !defined(LOWBIT_PORTABLE_INTRINSICS)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

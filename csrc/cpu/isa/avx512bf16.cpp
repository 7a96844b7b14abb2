#if defined(__x86_64__)

#include "avx512bf16.h"

#include "../operations.h"

namespace lowbit::cpu {

const Kernels kAvx512Bf16Kernels = kernels_of<Avx512Bf16>();

void few_rows_by_vnni(const LinearArgs& args, const ParallelFor& parallel_for) {
  few_rows_int8<Avx512Bf16>(args, parallel_for);
}

}  // namespace lowbit::cpu

#if defined(__clang__) && !defined(LOWBIT_PORTABLE_INTRINSICS)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

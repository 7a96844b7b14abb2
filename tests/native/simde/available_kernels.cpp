// Takes the place of csrc/cpu/isa/select.cpp in `make avx512-test`: the kernels of AVX-512 and AMX run whatever the CPU
// has.
#include "../../../csrc/cpu/kernels.h"

namespace lowbit::cpu {

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> kernels = {
#if defined(LOWBIT_AMX)
      &kAmxKernels,
#endif
      &kAvx512Bf16Kernels, &kAvx512Kernels, &kScalarKernels};
  return kernels;
}

}  // namespace lowbit::cpu

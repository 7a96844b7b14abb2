// Takes the place of csrc/cpu/isa/select.cpp in `make avx512-test`: the AVX-512 kernels run whatever the CPU has.
#include "../../../csrc/cpu/kernels.h"

namespace lowbit::cpu {

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> kernels = {&kAvx512Bf16Kernels, &kAvx512Kernels, &kScalarKernels};
  return kernels;
}

}  // namespace lowbit::cpu

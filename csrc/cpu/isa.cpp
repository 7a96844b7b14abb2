// Which instruction set the kernels use, decided at run time.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace lowbit::cpu {
namespace {

const Kernels* widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return &kAvx2Kernels;
#endif
  return &kScalarKernels;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_relaxed);
  if (!kernels) {
    kernels = widest();
    active.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

bool select_isa(const char* isa) {
  for (const Kernels* kernels : {widest(), &kScalarKernels}) {
    if (std::strcmp(isa, "auto") == 0 || std::strcmp(isa, kernels->isa) == 0) {
      active.store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace lowbit::cpu

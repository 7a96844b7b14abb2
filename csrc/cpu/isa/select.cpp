// Which instruction set the kernels use, decided at run time.
#include <atomic>
#include <cstring>
#include <vector>

#include "../kernels.h"

namespace lowbit::cpu {
namespace {

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> kernels = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
          found.push_back(&kAvx512Bf16Kernels);
        found.push_back(&kAvx512Kernels);
      }
      found.push_back(&kAvx2Kernels);
    }
#elif defined(__aarch64__)
    found.push_back(&kNeonKernels);
#endif
    found.push_back(&kScalarKernels);
    return found;
  }();
  return kernels;
}

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_relaxed);
  if (!kernels) {
    kernels = available_kernels().front();
    active.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

bool select_isa(const char* isa) {
  for (const Kernels* kernels : available_kernels()) {
    if (std::strcmp(isa, "auto") == 0 || std::strcmp(isa, kernels->isa) == 0) {
      active.store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace lowbit::cpu

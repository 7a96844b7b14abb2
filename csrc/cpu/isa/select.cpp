// Which instruction set the kernels use, decided at run time.
#include <atomic>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "../support.h"

#if defined(LOWBIT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit::cpu {
namespace {

std::atomic<const Kernels*> active{nullptr};

#if defined(LOWBIT_AMX)
// Whether the CPU has AMX's tiles and products of bf16, and the system lets this process use them. Linux (since 5.16)
// has to be asked: a thread's tiles are 8 KB that it then saves.
bool may_use_amx() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (edx & kAmxBf16) && (edx & kAmxTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
void approximate_by_vnni(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.m > 0 && is_few_rows(args)) return few_rows_by_vnni(args, parallel_for);
  kAvx512Kernels.linear_approximate(args, parallel_for);
}

// Of the widest set only the products in int8. Intel's cores take two cycles for a vector of products of pairs of bf16
// and half a cycle for one of products in fp32, which is 16 and 32 products a cycle. (AMD's take one for either: 32
// and 16.)
const Kernels& avx512_vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels mixed = kAvx512Kernels;
    mixed.isa = "avx512vnni";
    mixed.linear_approximate = approximate_by_vnni;
    return mixed;
  }();
  return kernels;
}
#endif

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> kernels = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
            __builtin_cpu_supports("avx512vbmi")) {
#if defined(LOWBIT_AMX)
          if (may_use_amx()) found.push_back(&kAmxKernels);
#endif
          if (__builtin_cpu_is("intel")) found.push_back(&avx512_vnni_kernels());
          found.push_back(&kAvx512Bf16Kernels);
          if (!__builtin_cpu_is("intel")) found.push_back(&avx512_vnni_kernels());
        }
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

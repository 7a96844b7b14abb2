#if defined(__x86_64__)

// Standard headers before isa_avx512.h switches the target (isa_avx2.h says why).
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernels.h"

// GCC 12 takes the undefined operands inside its own intrinsics for mistakes (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "isa_avx512.h"

#include "linear.h"

namespace lowbit::cpu {

Kernels with_avx512(const Kernels& avx2) {
  Kernels kernels = avx2;
  kernels.isa = Avx512::name;
  kernels.linear = linear<Avx512>;
  kernels.linear_grad_input = linear_grad_input<Avx512>;
  return kernels;
}

}  // namespace lowbit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

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

#include "dequantize.h"
#include "linear.h"
#include "quantize.h"

namespace lowbit::cpu {

const Kernels kAvx512Kernels = {
    .isa = Avx512::name,
    .quantize = quantize<Avx512>,
    .quantize_scales = quantize_scales<Avx512>,
    .quantize_int8 = nullptr,
    .search_scales = nullptr,
    .encode = nullptr,
    .dequantize = dequantize<Avx512>,
    .linear = linear<Avx512>,
    // Reads memory as fast as it comes already in AVX2.
    .linear_approximate = [](const LinearArgs& args, const ParallelFor& run) { kAvx2Kernels.linear_approximate(args, run); },
    .linear_grad_input = linear_grad_input<Avx512>,
};

}  // namespace lowbit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

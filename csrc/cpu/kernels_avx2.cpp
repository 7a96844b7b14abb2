#if defined(__x86_64__)

// Standard headers before isa_avx2.h switches the target (it says why).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"

#include "isa_avx2.h"

#include "dequantize.h"
#include "int8.h"
#include "linear.h"
#include "quantize.h"

namespace lowbit::cpu {

const Kernels kAvx2Kernels = {
    .isa = Avx2::name,
    .quantize = quantize<Avx2>,
    .quantize_scales = quantize_scales<Avx2>,
    .quantize_int8 = quantize_int8<Avx2>,
    .search_scales = nullptr,
    .encode = nullptr,
    .dequantize = dequantize_any<Avx2>,
    .linear = linear<Avx2>,
    .linear_approximate = nullptr,
    .linear_grad_input = linear_grad_input<Avx2>,
};

}  // namespace lowbit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

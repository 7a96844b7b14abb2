#include "approximate.h"
#include "dequantize.h"
#include "isa_scalar.h"
#include "linear.h"
#include "quantize.h"

namespace lowbit::cpu {

const Kernels kScalarKernels = {
    .isa = Scalar::name,
    .quantize = quantize<Scalar>,
    .quantize_scales = quantize_scales<Scalar>,
    .quantize_int8 = nullptr,
    .search_scales = nullptr,
    .encode = nullptr,
    .dequantize = dequantize<Scalar>,
    .linear = linear<Scalar>,
    .linear_approximate = linear_approximate<Scalar>,
    .linear_grad_input = linear_grad_input<Scalar>,
};

}  // namespace lowbit::cpu

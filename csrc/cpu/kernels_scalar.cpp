#include "dequantize.h"
#include "int8.h"
#include "isa_scalar.h"
#include "linear.h"
#include "quantize.h"

namespace lowbit::cpu {

const Kernels kScalarKernels = {
    .isa = Scalar::name,
    .quantize = quantize<Scalar>,
    .quantize_scales = quantize_scales<Scalar>,
    .quantize_int8 = quantize_int8<Scalar>,
    .search_scales = nullptr,
    .encode = nullptr,
    .dequantize = dequantize_any<Scalar>,
    .linear = linear<Scalar>,
    .linear_approximate = nullptr,
    .linear_grad_input = linear_grad_input<Scalar>,
};

}  // namespace lowbit::cpu

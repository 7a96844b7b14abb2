#include "dequantize.h"
#include "isa_scalar.h"
#include "linear.h"
#include "quantize.h"

namespace lowbit::cpu {

const Kernels kScalarKernels = {Scalar::name,       quantize<Scalar>, quantize_scales<Scalar>,
                                dequantize<Scalar>, linear<Scalar>,   linear_grad_input<Scalar>};

}  // namespace lowbit::cpu

#include "isa_scalar.h"
#include "operations.h"

namespace lowbit::cpu {

const Kernels kScalarKernels = kernels_of<Scalar>();

}  // namespace lowbit::cpu

#if defined(__aarch64__)

#include "isa_neon.h"
#include "operations.h"

namespace lowbit::cpu {

const Kernels kNeonKernels = kernels_of<Neon>();

}  // namespace lowbit::cpu

#endif  // __aarch64__

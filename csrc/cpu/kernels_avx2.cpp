#if defined(__x86_64__)

#include "standard.h"

#include "kernels.h"

#include "isa_avx2.h"

#include "operations.h"

namespace lowbit::cpu {

const Kernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace lowbit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

// What the launchers' error codes mean.
#include <cuda_runtime.h>

#include "kernels.h"

namespace lowbit::cuda {

const char* error_message(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace lowbit::cuda

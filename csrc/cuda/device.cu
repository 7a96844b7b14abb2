// What this build has code for, and what the launchers' error codes mean.
#include <cuda_runtime.h>

#include "kernels.h"

#define LOWBIT_STRING(...) #__VA_ARGS__
#define LOWBIT_STRING_OF(...) LOWBIT_STRING(__VA_ARGS__)

namespace lowbit::cuda {

const char* architectures() { return LOWBIT_STRING_OF(__CUDA_ARCH_LIST__); }

const char* error_message(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace lowbit::cuda

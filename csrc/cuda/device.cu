// What this build has code for, and what the launchers' error codes mean.
#include <cuda_runtime.h>

#include "kernels.h"
#include "launch.h"

#define LOWBIT_STRING(...) #__VA_ARGS__
#define LOWBIT_STRING_OF(...) LOWBIT_STRING(__VA_ARGS__)

namespace lowbit::cuda {

const char* architectures() { return LOWBIT_STRING_OF(__CUDA_ARCH_LIST__); }

int code_capability() {
  const int device = 100 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
                     10 * device_attribute(cudaDevAttrComputeCapabilityMinor);
  int chosen = 0;
  for (const int compiled : {__CUDA_ARCH_LIST__})
    if (compiled <= device) chosen = std::max(chosen, compiled);
  return chosen / 10;
}

const char* error_message(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace lowbit::cuda

// What this build has code for, and what the launchers' error codes mean.
#include <cuda_runtime.h>

#include "kernels.h"

#define LOWBIT_STRING(...) #__VA_ARGS__
#define LOWBIT_STRING_OF(...) LOWBIT_STRING(__VA_ARGS__)

namespace lowbit::cuda {

const char* architectures() { return LOWBIT_STRING_OF(__CUDA_ARCH_LIST__); }

Gpu current_gpu() {
  int device = 0;
  cudaGetDevice(&device);
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    cudaDeviceGetAttribute(&value, name, device);
    return value;
  };
  Gpu gpu{10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor), 0,
          std::max(attribute(cudaDevAttrMultiProcessorCount), 1), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  for (const int compiled : {__CUDA_ARCH_LIST__})
    if (compiled / 10 <= gpu.capability) gpu.code_capability = std::max(gpu.code_capability, compiled / 10);
  return gpu;
}

const char* error_message(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace lowbit::cuda

// What this build has code for, and what the launchers' error codes mean.
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "kernels.h"

#define LOWBIT_STRING(...) #__VA_ARGS__
#define LOWBIT_STRING_OF(...) LOWBIT_STRING(__VA_ARGS__)

namespace lowbit::cuda {
namespace {

std::mutex gpus_mutex;
std::map<int, Gpu> gpus;  // by device

Gpu gpu_of(int device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    cudaDeviceGetAttribute(&value, name, device);
    return value;
  };
  Gpu gpu{10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor), 0,
          std::max(attribute(cudaDevAttrMultiProcessorCount), 1), attribute(cudaDevAttrL2CacheSize)};
  gpu.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  for (const int compiled : {__CUDA_ARCH_LIST__})
    if (compiled / 10 <= gpu.capability) gpu.code_capability = std::max(gpu.code_capability, compiled / 10);
  return gpu;
}

}  // namespace

const char* architectures() { return LOWBIT_STRING_OF(__CUDA_ARCH_LIST__); }

Gpu current_gpu() {
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(gpus_mutex);
  const auto found = gpus.find(device);
  return found != gpus.end() ? found->second : gpus.emplace(device, gpu_of(device)).first->second;
}

void forget_gpus() {
  const std::lock_guard lock(gpus_mutex);
  gpus.clear();
}

uint64_t capture_id(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaStreamGetCaptureInfo(stream, &status, &id);
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

const char* error_message(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace lowbit::cuda

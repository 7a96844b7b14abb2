// What launchers share: sizes of grids, alignment, dtypes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../dtype.h"
#include "../nf4.h"

namespace lowbit::cuda {

LOWBIT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int processor_count() { return std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1); }

// Blocks of a kernel whose blocks share out `units` of work, `per_block` at a time: as many as there is work for, and
// no more than `per_processor` on each multiprocessor of the current device.
inline unsigned grid_for(int64_t units, int64_t per_block, int64_t per_processor) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(units, per_block), 1, processor_count() * per_processor));
}

// Lets `kernel` have so many bytes of dynamic shared memory. Returns 0, or a CUDA error code, which is not left behind
// for whoever asks for the last error next.
template <class Kernel>
int allow_shared_memory(Kernel kernel, int bytes) {
  const int code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code != cudaSuccess) cudaGetLastError();
  return code;
}

inline int log2_of(int64_t power_of_two) { return __builtin_ctzll(static_cast<unsigned long long>(power_of_two)); }

// launch(T{}), T being the element type that `dtype` names.
template <class Launch>
int for_dtype(Dtype dtype, const Launch& launch) {
  if (dtype == Dtype::f32) return launch(float{});
  if (dtype == Dtype::f16) return launch(Fp16{});
  return launch(Bf16{});
}

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace lowbit::cuda

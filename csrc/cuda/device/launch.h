// What launchers share: sizes of grids, shared memory, kinds of weights and dtypes. Brings their declarations and the
// standard headers.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../kernels.h"

namespace lowbit::cuda {

// Blocks of a kernel whose blocks share out `units` of work (see blocks_for), on the current device.
inline unsigned grid_for(int64_t units, int64_t per_block, int64_t per_processor) {
  return blocks_for(units, per_block, per_processor, current_gpu().processors);
}

// Lets `kernel` have so many bytes of dynamic shared memory. Returns 0, or a CUDA error code, which the next
// cudaGetLastError() does not return again.
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

// launch(the kind of the weight's scales as a constant)
template <class Launch>
int for_scale_kind(const QuantizedWeight& weight, const Launch& launch) {
  if (weight.scales.kind == ScaleKind::row) return launch(std::integral_constant<ScaleKind, ScaleKind::row>{});
  if (weight.scales.kind == ScaleKind::block) return launch(std::integral_constant<ScaleKind, ScaleKind::block>{});
  return launch(std::integral_constant<ScaleKind, ScaleKind::double_quant>{});
}

}  // namespace lowbit::cuda

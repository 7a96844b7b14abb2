// lora_product and lora_outer, an element to a thread.
#include "device/elements.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

__device__ float value_at(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[at];
  if (dtype == Dtype::f16) return widen(static_cast<const Fp16*>(data)[at]);
  return widen(static_cast<const Bf16*>(data)[at]);
}
__device__ void set_value(float value, void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) static_cast<float*>(data)[at] = value;
  if (dtype == Dtype::f16) narrow(value, static_cast<Fp16*>(data) + at);
  if (dtype == Dtype::bf16) narrow(value, static_cast<Bf16*>(data) + at);
}
__device__ float value_of(const Factor& f, int64_t i, int64_t j) {
  return value_at(f.data, f.dtype, i * f.row_stride + j * f.column_stride);
}

__global__ void lora_product_kernel(const __grid_constant__ LoraProductArgs args) {
  const int64_t row = blockIdx.x;
  for (int64_t r = threadIdx.x; args.x && r < args.rank; r += blockDim.x) {
    float sum = 0;
    for (int64_t i = 0; i < args.k; ++i)
      sum = fmaf(value_at(args.x, args.dtype, row * args.k + i), value_of(args.down, r, i), sum);
    args.t[row * args.rank + r] = args.t_scale * sum;
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; args.y && j < args.n; j += blockDim.x) {
    float sum = 0;
    for (int64_t r = 0; r < args.rank; ++r) sum = fmaf(args.t[row * args.rank + r], value_of(args.up, j, r), sum);
    set_value(args.up_scale * sum + (args.bias ? args.bias[j] : 0), args.y, args.dtype, row * args.n + j);
  }
}

__global__ void lora_outer_kernel(const __grid_constant__ LoraOuterArgs args) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, j = at / args.rank, r = at % args.rank;
  if (j >= args.w) return;
  float sum = 0;
  for (int64_t i = 0; i < args.m; ++i)
    sum = fmaf(value_at(args.wide, args.dtype, i * args.w + j), args.low[i * args.rank + r], sum);
  set_value(args.scale * sum, args.out, args.out_dtype, j * args.out_wide_stride + r * args.out_rank_stride);
}

}  // namespace

int lora_product(const LoraProductArgs& args, const Gpu& gpu, Stream stream) {
  if (!lora_fits(args.dtype, args.rank, gpu)) return cudaErrorNotSupported;
  if (args.m == 0) return cudaSuccess;
  lora_product_kernel<<<static_cast<unsigned>(args.m), 128, 0, stream>>>(args);
  return cudaGetLastError();
}

int lora_outer(const LoraOuterArgs& args, const Gpu& gpu, Stream stream) {
  if (!lora_fits(args.dtype, args.rank, gpu)) return cudaErrorNotSupported;
  if (args.w == 0 || args.rank == 0) return cudaSuccess;
  lora_outer_kernel<<<static_cast<unsigned>(ceil_div(args.w * args.rank, 128)), 128, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace lowbit::cuda

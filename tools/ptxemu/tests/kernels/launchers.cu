// Launch code as the library writes it, and some that is wrong.
#include <cuda_runtime.h>
#include <stdint.h>

enum class Mode : int { kPlain, kTwice };

struct ScaleArguments {
  const float* x;
  float* y;
  float a;
  int n;
};

__global__ void scale_kernel(ScaleArguments args) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) args.y[i] = args.a * args.x[i];
}

template <int kFactor>
__global__ void __launch_bounds__(128) reverse_kernel(const float* x, float* y, int n) {
  extern __shared__ float shared[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  shared[threadIdx.x] = i < n ? x[i] : 0.f;
  __syncthreads();
  if (i < n) y[i] = kFactor * shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void static_kernel(float* y) {
  __shared__ float fixed[8 * 1024];
  extern __shared__ float shared[];
  fixed[threadIdx.x] = shared[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = fixed[threadIdx.x] + shared[threadIdx.x];
}

namespace lowbit {

// 32 KB of static shared memory, and dynamic memory beside it.
int beside_static(float* y, int ask, int shared) {
  if (ask)
    if (cudaError_t error = cudaFuncSetAttribute(static_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ask))
      return error;
  static_kernel<<<1, 32, shared>>>(y);
  return cudaGetLastError();
}

// Reverses every 128 elements. The grid, the block and the shared memory are the caller's, so that tests get them
// wrong.
int reverse(const float* x, float* y, int64_t n, Mode mode, int blocks, int threads, int shared, cudaStream_t stream) {
  auto* kernel = mode == Mode::kTwice ? reverse_kernel<2> : reverse_kernel<1>;
  kernel<<<blocks, threads, shared, stream>>>(x, y, (int)n);
  return cudaGetLastError();
}

int allow_shared(int bytes) {
  return cudaFuncSetAttribute(reverse_kernel<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Clears y, then launches through a config and a struct by value.
int scale(const ScaleArguments& args, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(args.y, 0, args.n * sizeof(float), stream);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = (args.n + 127) / 128;
  config.blockDim = 128;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, scale_kernel, args);
}

int clear(float* y, int n, cudaStream_t stream) { return cudaMemsetAsync(y, 0, n * sizeof(float), stream); }

// Two kernels through a workspace of the caller's.
int scale_twice(const float* x, float* workspace, float* y, float a, int n, cudaStream_t stream) {
  scale_kernel<<<(n + 127) / 128, 128, 0, stream>>>({x, workspace, a, n});
  scale_kernel<<<(n + 127) / 128, 128, 0, stream>>>({workspace, y, a, n});
  return cudaGetLastError();
}

int allocates(const float* x, float* y, int n) {
  float* workspace = nullptr;
  if (cudaError_t error = cudaMallocAsync(&workspace, n * sizeof(float), 0)) return error;
  scale_kernel<<<(n + 127) / 128, 128>>>({x, workspace, 1.f, n});
  cudaMemcpyAsync(y, workspace, n * sizeof(float), cudaMemcpyDeviceToDevice, 0);
  cudaStreamSynchronize(0);
  return cudaFreeAsync(workspace, 0);
}

int add(int a, int b) { return a + b; }
int add(int a, int b, int c) { return a + b + c; }

}  // namespace lowbit

// Runs on a device as a guard would, and reports what it is.
extern "C" int on_device(int device, int* description, const float* x, float* y) {
  int before = 0;
  cudaGetDevice(&before);
  if (cudaError_t error = cudaSetDevice(device)) return error;
  cudaDeviceGetAttribute(&description[0], cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&description[1], cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&description[2], cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  scale_kernel<<<1, 32>>>({x, y, 1.f, 32});
  cudaSetDevice(before);
  return cudaGetLastError();
}

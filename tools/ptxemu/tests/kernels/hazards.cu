// Kernels that are wrong on purpose. With FIXED, those that have a fix are right.
#ifdef FIXED
#define SYNCTHREADS() __syncthreads()
#define SYNCWARP() __syncwarp()
#else
#define SYNCTHREADS()
#define SYNCWARP()
#endif

extern "C" __global__ void missing_barrier(const float* x, float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  SYNCTHREADS();
  y[threadIdx.x] = s[127 - threadIdx.x];
}

extern "C" __global__ void missing_syncwarp(const int* x, int* y) {
  __shared__ volatile int s[32];
  s[threadIdx.x] = x[threadIdx.x];
  SYNCWARP();
  y[threadIdx.x] = s[31 - threadIdx.x];
}

extern "C" __global__ void past_the_end(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[i];
}

extern "C" __global__ void past_shared(float* y, int k) {
  __shared__ float s[64];
  s[threadIdx.x + k] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void never_written(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 40) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void deadlock(int* y) {
  int v = threadIdx.x;
  if (v < 16)
    v += __shfl_sync(~0u, v, 3);
  else
    __syncthreads();
  y[threadIdx.x] = v;
}

extern "C" __global__ void written_twice(int* y) { y[threadIdx.x / 2] = threadIdx.x; }

extern "C" __global__ void vector_copy(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }

extern "C" __global__ void trap_at_nine(int* y) {
  if (threadIdx.x == 9) __trap();
  y[threadIdx.x] = 1;
}

extern "C" __global__ void endless(volatile int* y) { while (y[0] == 0); }

__device__ __noinline__ float bad_call(const float* x, int i) { return x[i]; }
extern "C" __global__ void through_a_call(const float* x, float* y) { y[threadIdx.x] = bad_call(x, threadIdx.x + 1); }

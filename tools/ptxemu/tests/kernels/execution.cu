// Control flow, warp and block cooperation: one small kernel per way in which threads part and meet.
#include <stdint.h>

constexpr unsigned kAll = ~0u;

extern "C" __global__ void collatz(const int* x, int* steps, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long v = x[i];
  int count = 0;
  while (v != 1) {
    v = v & 1 ? 3 * v + 1 : v >> 1;
    if (++count > 200) break;
  }
  steps[i] = count;
}

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
extern "C" __global__ void recursion(int* y) { y[threadIdx.x] = fibonacci(threadIdx.x % 12); }

extern "C" __global__ void local_array(const int* x, int* y) {
  int a[16], sum = 0, t = threadIdx.x;
  for (int j = 0; j < 16; j++) a[(j * 7 + t) & 15] = x[j] + j;
  for (int j = 0; j < (t & 15); j++) sum = sum * 3 + a[x[j] & 15];
  y[t] = sum;
}

extern "C" __global__ void coordinates(int* y) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x + 10000 * blockIdx.y + 100000 * blockIdx.z;
}

// Row r of out holds one warp operation's result for each of two warps.
extern "C" __global__ void warp_operations(const int* x, unsigned* out) {
  int t = threadIdx.x, v = x[t], lane = t & 31;
  out[t] = __ballot_sync(kAll, v & 1);
  out[t + 64] = __shfl_up_sync(kAll, v, 3);
  out[t + 128] = __shfl_sync(kAll, v, 5, 8);
  out[t + 192] = __shfl_down_sync(kAll, v, 2, 16);
  out[t + 256] = __shfl_xor_sync(kAll, v, 5);
  out[t + 320] = __reduce_add_sync(kAll, v);
  out[t + 384] = __reduce_max_sync(kAll, v);
  out[t + 448] = __match_any_sync(kAll, v & 3);
  out[t + 512] = __all_sync(kAll, v < 1000) + 2 * __any_sync(kAll, v > 90);
  unsigned result = 0;
  if (lane < 10) {
    result = __shfl_sync(0x3ffu, v, 9);
    result += __ballot_sync(0x3ffu, v & 2) << 16;
  }
  out[t + 576] = result;
  unsigned eight = 0xffu << (lane & 24);  // groups of 8 lanes, one instruction
  out[t + 640] = __reduce_add_sync(eight, v);
  out[t + 704] = __ballot_sync(eight, v & 1);
  out[t + 768] = __syncthreads_count(v & 1) + 1000 * __syncthreads_or(v == x[0]) + 10000 * __syncthreads_and(v >= 0);
  out[t + 832] = __activemask();
  if (lane & 1) out[t + 832] = __activemask();
}

extern "C" __global__ void block_sum(const float* x, float* y, int n) {
  __shared__ float partial[8];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_down_sync(kAll, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < 8 ? partial[threadIdx.x] : 0.f;
    for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(kAll, sum, offset);
    if (threadIdx.x == 0) y[blockIdx.x] = sum;
  }
}

extern "C" __global__ void histogram(const uint8_t* x, int* counts, int n) {
  __shared__ int local[16];
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&local[x[i] & 15], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}

extern "C" __global__ void atomics(int* a, float* f, unsigned long long* u) {
  int t = threadIdx.x;
  atomicMax(a, t * 37 % 101);
  atomicMin(a + 1, -t);
  atomicOr(a + 2, 1 << (t & 31));
  atomicXor(a + 3, t);
  atomicInc((unsigned*)a + 4, 10u);
  atomicAdd(f, 0.5f * t);
  atomicAdd(u, 1ull << 33);
  int old = a[5], seen;
  do {
    seen = old;
    old = atomicCAS(a + 5, seen, seen + 2 * t);
  } while (seen != old);
}

// Split-K as kernels do it: the block that arrives last adds up what the others left.
extern "C" __global__ void last_block(const float* x, float* partial, float* out, unsigned* arrived) {
  __shared__ bool last;
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(kAll, v, offset);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = v;
    __threadfence();
    last = atomicAdd(arrived, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < gridDim.x; i++) sum += ((volatile float*)partial)[i];
    *out = sum;
  }
}

extern "C" __global__ void named_barriers(const int* x, int* y) {
  __shared__ int s[64];
  int t = threadIdx.x;
  if (t < 64) {
    s[t] = x[t];
    asm volatile("bar.arrive 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 128;" ::: "memory");
    y[t - 64] = s[127 - t];
  }
}

// One warp spins until a thread of the other sets a flag.
extern "C" __global__ void spin(int* y) {
  __shared__ volatile int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    while (flag == 0);
    y[threadIdx.x] = flag;
  } else if (threadIdx.x == 40) {
    int sum = 7;
    for (int i = 0; i < 50; i++) sum += y[64 + i];
    flag = sum;
  }
}

extern "C" __global__ void leave_early(int* y) {
  int t = threadIdx.x;
  if (t == 3) asm volatile("exit;");
  if (t == 5) return;
  y[t] = 1;
  __syncthreads();
  y[t] = 2;
}

// Depends on which warp comes first.
extern "C" __global__ void order_dependent(int* x) {
  x[256 + threadIdx.x] = x[threadIdx.x ^ 96];
  x[threadIdx.x] = threadIdx.x;
}

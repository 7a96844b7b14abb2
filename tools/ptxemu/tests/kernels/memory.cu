// Ways to address memory: structs by value, constants, vectors, bytes, generic pointers, cp.async of every size.
#include <stdint.h>

struct Arguments {
  int a;
  float b;
  const float* x;
  short s[3];
};
__constant__ float constants[16];
__device__ int counter;
__device__ float table[4] = {1.f, 2.f, 3.f, 4.f};

extern "C" __global__ void variables(Arguments args, float* y, unsigned char k) {
  int i = threadIdx.x;
  y[i] = args.a * args.b + args.x[i] + args.s[i % 3] + constants[i & 15] + table[i & 3] + k;
  if (i == 0) atomicAdd(&counter, 5);
}

extern "C" __global__ void vectors(const uint4* x, uint4* y, const uint8_t* bytes, const ulonglong2* words) {
  int i = threadIdx.x;
  uint64_t policy;
  uint4 z;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3},[%4],%5;"
               : "=r"(z.x), "=r"(z.y), "=r"(z.z), "=r"(z.w)
               : "l"(x + i + 32), "l"(policy));
  uint4 v = __ldg(x + i);
  __stcs(y + i, make_uint4(v.x ^ z.x, v.y + z.y, z.z, v.w));
  y[32 + i].x = bytes[i];
  y[32 + i].y = ((const int8_t*)bytes)[i];
  ((ulonglong2*)(y + 64))[i] = make_ulonglong2(words[i].y, words[i].x + 1);
}

__device__ __noinline__ void add_through(int* to, const int* from) {
  *to += *from;
  atomicAdd(to, 1);
}
extern "C" __global__ void generic(int* g, const int* x, int* y) {
  __shared__ int s[64];
  int t = threadIdx.x, local[2] = {7, t};
  s[t] = t;
  __syncthreads();
  add_through(t % 3 == 0 ? &s[t] : &g[t], t % 2 ? &x[t] : &local[t % 5 == 0]);
  __syncthreads();
  y[t] = s[t];
}

extern "C" __global__ void async_sizes(const uint8_t* x, uint8_t* y) {
  __shared__ __align__(16) uint8_t s[32 * 16];
  int t = threadIdx.x;
  unsigned to = __cvta_generic_to_shared(s + t * 16);
  asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(to), "l"(x + t * 16));
  asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(to + 8), "l"(x + t * 16));
  asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;" ::"r"(to + 4), "l"(x + t * 16), "r"(t % 5));
  asm volatile("cp.async.wait_all;");
  __syncwarp();
  for (int j = 0; j < 16; j++) y[t * 16 + j] = s[t * 16 + j];
}

extern "C" __global__ void strided(const float* x, float* y, int stride) { y[threadIdx.x] = x[threadIdx.x * stride]; }

extern "C" __global__ void banks(const float* x, float* y, int stride) {
  extern __shared__ float shared[];
  shared[threadIdx.x * stride] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x * stride];
}

// Weights and activations in fp32, f16 or bf16, as fp32: one at a time, and the 16 bytes of one access.
#pragma once

#include "../../arguments.h"
#include "layout.h"
#include "ptx.cuh"

namespace lowbit::cuda {

// Elements of T in one access.
template <class T>
constexpr int kPerAccess = kAccessBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ __forceinline__ float widen(Fp16 value) { return ptx::widen(value); }

// Narrowing rounds to nearest even.
__device__ __forceinline__ void narrow(float value, float* to) { *to = value; }
__device__ __forceinline__ void narrow(float value, Bf16* to) {
  to->bits = static_cast<uint16_t>(ptx::narrow_bf16x2(value, 0.0f));
}
__device__ __forceinline__ void narrow(float value, Fp16* to) { *to = ptx::narrow_f16(value); }

template <class T>
__device__ __forceinline__ void widen(uint4 raw, float (&values)[kPerAccess<T>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < kPerAccess<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      values[i] = widen(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  }
}

// Element `at` of memory whose dtype the launch says.
__device__ __forceinline__ float widen_any(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return dtype == Dtype::f16 ? widen(Fp16{bits}) : widen(Bf16{bits});
}

// A sum of output `n` with its bias, if there is one. Once for each output: all threads take the same branches.
__device__ __forceinline__ float plus_bias(float sum, const Bias& bias, int64_t n) {
  return bias ? sum + widen_any(bias.data, bias.dtype, n) : sum;
}

template <class T>
__device__ __forceinline__ void widen_pair(uint32_t pair, float& low, float& high) {
  low = widen(T{static_cast<uint16_t>(pair)});
  high = widen(T{static_cast<uint16_t>(pair >> 16)});
}

// Two elements of 16 bits, `low` first.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  static_assert(sizeof(T) == 2);
  if constexpr (std::is_same_v<T, Bf16>) return ptx::narrow_bf16x2(low, high);
  return ptx::narrow_f16x2(low, high);
}

// Two fp32 as the sums of two bf16 each.
struct SplitPair {
  uint32_t high, low;

  SplitPair() = default;
  __device__ __forceinline__ SplitPair(float x, float y) : high(ptx::narrow_bf16x2(x, y)) {
    low = ptx::narrow_bf16x2(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000));
  }
};

template <class T>
__device__ __forceinline__ uint4 narrow(const float (&values)[kPerAccess<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = narrow_pair<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace lowbit::cuda

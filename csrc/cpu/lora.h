// lora_down: t = x A^T, LoRA's first product, for a few rows of x and a dense A.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "support.h"

namespace lowbit::cpu {

template <class Isa, class T>
float dot(const T* x, const float* a, int64_t k) {
  constexpr int64_t kLanes = Isa::kLanes;
  auto even = Isa::zero(), odd = Isa::zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
    even = Isa::fma(Isa::load(x + i), Isa::load(a + i), even);
    odd = Isa::fma(Isa::load(x + i + kLanes), Isa::load(a + i + kLanes), odd);
  }
  float sum = Isa::sum(Isa::add(even, odd));
  for (; i < k; ++i) sum += to_float(x[i]) * a[i];
  return sum;
}

template <class Isa>
void lora_down(const LoraDownArgs& args, const ParallelFor& parallel_for) {
  for_dtype(args.dtype, [&](auto* typed) {
    const auto* x = static_cast<decltype(typed)>(args.x);
    parallel_for(args.rank, 1 + 65536 / (args.m * args.k + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t m = 0; m < args.m; ++m)
          args.t[m * args.rank + r] = dot<Isa>(x + m * args.k, args.lora_a + r * args.k, args.k);
    });
  });
}

}  // namespace lowbit::cpu

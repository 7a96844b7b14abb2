// The float dtypes of weights and activations.
#pragma once

#include <cstdint>

namespace lowbit {

enum class Dtype { f32, f16, bf16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

}  // namespace lowbit

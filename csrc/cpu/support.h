// Small helpers that several operations share. static: each instruction set keeps its own copy; of an inline function
// the linker keeps one for all, which could be the one compiled for AVX-512.
#pragma once

#include "kernels.h"
#include "standard.h"

namespace lowbit::cpu {

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// fp32 scratch memory on cache lines, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(count * 4 + 64, 64))))) {
    if (!data_) throw std::bad_alloc();
  }
  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

// function(T()), T being the element type that `dtype` names.
template <class Function>
void for_dtype(Dtype dtype, const Function& function) {
  if (dtype == Dtype::f32) function(float());
  if (dtype == Dtype::bf16) function(Bf16());
  if (dtype == Dtype::f16) function(Fp16());
}

// Element `index` of an array of `dtype`.
static inline const void* element_of(const void* data, Dtype dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}
static inline void* element_of(void* data, Dtype dtype, int64_t index) {
  return static_cast<char*>(data) + index * size_of(dtype);
}

// The same product for `count` rows of x (of grad) from row `first` on.
static inline LinearArgs rows_of(LinearArgs args, int64_t first, int64_t count) {
  args.m = count;
  args.x = element_of(args.x, args.dtype, first * args.k);
  args.y = element_of(args.y, args.dtype, first * args.n);
  if (args.t) args.t += first * args.rank;
  return args;
}
static inline LinearGradInputArgs rows_of(LinearGradInputArgs args, int64_t first, int64_t count) {
  args.m = count;
  args.grad = element_of(args.grad, args.dtype, first * args.n);
  args.grad_x = element_of(args.grad_x, args.dtype, first * args.k);
  if (args.grad_t) args.grad_t += first * args.rank;
  return args;
}

// Rows of x that few_rows.h multiplies where an instruction set does not say otherwise, and the weights that it looks
// up at once: rows of W begin at multiples of them.
constexpr int64_t kFewRows = 16, kFewRowsChunk = 64;
static inline bool is_few_rows(const LinearArgs& args, int64_t most = kFewRows) {
  return args.m <= most && args.weight.format->bits == 4 && args.k > 0 && args.k % kFewRowsChunk == 0;
}

// log2 of the block size of a 4-bit weight.
static inline int block_shift(const QuantizedWeight& weight) {
  return std::countr_zero(static_cast<uint64_t>(weight.block_size));
}

// Reads the decoded scales of a weight's blocks.
template <class Isa>
class BlockScales {
 public:
  explicit BlockScales(const QuantizedWeight& weight)
      : scales_(weight.scales), offset_(scales_.kind == ScaleKind::double_quant ? *scales_.offset : 0.0f) {}

  float operator()(int64_t block) const {
    if (scales_.kind != ScaleKind::double_quant) return scales_.values[block];
    return kScaleMap.entries[scales_.codes[block]] * scales_.group_scales[block / kGroupSize] + offset_;
  }

 private:
  const Scales scales_;
  const float offset_;
};

// Widens `count` values of T to fp32.
template <class Isa, class T>
void load_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) Isa::store(to + i, Isa::load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// The bias of output `n`, and of `count` outputs from number `first` on, in fp32.
static inline float bias_of(const Bias& bias, int64_t n) {
  float value = 0;
  for_dtype(bias.dtype, [&]<class T>(T) { value = to_float(static_cast<const T*>(bias.data)[n]); });
  return value;
}
template <class Isa>
void load_bias(const Bias& bias, int64_t first, int64_t count, float* to) {
  for_dtype(bias.dtype, [&]<class T>(T) { load_row<Isa>(static_cast<const T*>(bias.data) + first, count, to); });
}

// Rounds `count` fp32 values to T.
template <class Isa, class T>
void store_row(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) Isa::store(to + i, Isa::load(from + i));
  for (; i < count; ++i) from_float(from[i], to + i);
}

}  // namespace lowbit::cpu

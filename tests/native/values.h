// What the checks of the kernels share: counted reports, buffers of exact size, random tensors and weights.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace {

using namespace lowbit;
using namespace lowbit::cpu;

int passed = 0, failed = 0;

void report(bool right, const std::string& what) {
  right ? ++passed : ++failed;
  if (!right && failed <= 50) std::printf("FAILED %s\n", what.c_str());
}

// `count` elements on the heap, from one element past the start of the block to its very end.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), data_(new T[static_cast<size_t>(count) + 1]()) {}
  T* data() { return data_.get() + 1; }
  const T* data() const { return data_.get() + 1; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  bool operator==(const Buffer& other) const {
    return count_ == other.count_ && std::memcmp(data(), other.data(), static_cast<size_t>(count_) * sizeof(T)) == 0;
  }

 private:
  int64_t count_;
  std::unique_ptr<T[]> data_;
};

ParallelFor serial() {
  return {[](int64_t count, int64_t, const Body& body) {
            if (count > 0) body(0, count);
          },
          1};
}

ParallelFor on_threads(int64_t threads) {
  return {[threads](int64_t count, int64_t, const Body& body) {
            std::vector<std::thread> pool;
            for (int64_t i = 0; i < threads; ++i) {
              const int64_t begin = count * i / threads, end = count * (i + 1) / threads;
              if (begin < end) pool.emplace_back([=, &body] { body(begin, end); });
            }
            for (auto& thread : pool) thread.join();
          },
          threads};
}

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  float normal() { return std::normal_distribution<float>()(engine); }
  uint8_t byte() { return static_cast<uint8_t>(engine()); }
};

const char* name_of(Dtype dtype) { return dtype == Dtype::f32 ? "fp32" : dtype == Dtype::f16 ? "fp16" : "bf16"; }

// A tensor of one of the three dtypes.
struct Values {
  Dtype dtype;
  Buffer<float> f32;
  Buffer<Fp16> f16;
  Buffer<Bf16> bf16;
  Values(Dtype dtype, int64_t count)
      : dtype(dtype),
        f32(dtype == Dtype::f32 ? count : 0),
        f16(dtype == Dtype::f16 ? count : 0),
        bf16(dtype == Dtype::bf16 ? count : 0) {}
  void* data() {
    if (dtype == Dtype::f32) return f32.data();
    return dtype == Dtype::f16 ? static_cast<void*>(f16.data()) : bf16.data();
  }
  void set(int64_t i, float value) {
    if (dtype == Dtype::f32) f32[i] = value;
    if (dtype == Dtype::f16) from_float(value, &f16[i]);
    if (dtype == Dtype::bf16) from_float(value, &bf16[i]);
  }
  float at(int64_t i) const {
    if (dtype == Dtype::f32) return f32[i];
    return dtype == Dtype::f16 ? to_float(f16[i]) : to_float(bf16[i]);
  }
  bool operator==(const Values& other) const {
    const auto same = [](const auto& a, const auto& b) { return a == b; };
    return same(f32, other.f32) && same(f16, other.f16) && same(bf16, other.bf16);
  }
};

// A random quantized weight, [n, k], and what it decodes to.
struct Weight {
  Buffer<uint8_t> packed, codes;
  Buffer<float> absmax, group_scales, offset, decoded;
  QuantizedWeight view;

  Weight(int64_t n, int64_t k, const Format* format, int64_t block_size, bool double_quant, Random& random)
      : packed(format->packed_bytes(n * k)),
        codes(double_quant ? ceil_div(n * k, block_size) : 0),
        absmax(format->has_row_scales ? n
               : double_quant         ? 0
                                      : ceil_div(n * k, block_size)),
        group_scales(ceil_div(codes.size(), kGroupSize)),
        offset(1),
        decoded(n * k) {
    for (int64_t i = 0; i < packed.size(); ++i) packed[i] = random.byte();
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = random.byte();
    for (int64_t i = 0; i < absmax.size(); ++i) {
      absmax[i] = 0.02f * std::fabs(random.normal());
      // Halfway between two values of bf16, or fp16: so are the elements whose code stands for 1 or -1.
      if (i % 3 == 1) absmax[i] = float_of((bits_of(absmax[i]) & 0xffff0000) | 0x8000);
      if (i % 3 == 2) absmax[i] = float_of((bits_of(absmax[i]) & 0xffffe000) | 0x1000);
    }
    for (int64_t i = 0; i < group_scales.size(); ++i) group_scales[i] = 0.01f * std::fabs(random.normal());
    offset[0] = 0.013f;
    const ScaleKind kind = format->has_row_scales ? ScaleKind::row
                           : double_quant         ? ScaleKind::double_quant
                                                  : ScaleKind::block;
    const Scales scales = double_quant ? Scales{kind, nullptr, codes.data(), group_scales.data(), offset.data()}
                                       : Scales{kind, absmax.data(), nullptr, nullptr, nullptr};
    view = {packed.data(), scales, format, format->has_row_scales ? k : block_size, n * k};
    for (int64_t i = 0; i < n * k; ++i) {
      if (format->bits == 8) {
        decoded[i] = static_cast<float>(static_cast<int8_t>(packed[i])) * absmax[i / k] * kInt8Unit;
        continue;
      }
      const int64_t block = i / block_size;
      float scale = 0;
      if (double_quant) {
        const volatile float product = kScaleMap.entries[codes[block]] * group_scales[block / kGroupSize];
        scale = product + offset[0];  // volatile: the product is rounded before the sum
      } else {
        scale = absmax[block];
      }
      decoded[i] = format->codebook[unpack(packed.data(), i)] * scale;
    }
  }
};
std::string shape_text(int64_t m, int64_t n, int64_t k) {
  return std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k);
}

struct Case {
  int64_t m, n, k;
  const Format* format;
  int64_t block_size;
  bool double_quant;
  Dtype dtype;
  int64_t rank;
  bool has_bias;
  float scaling = 1.0f;  // of LoRA's product
  Dtype bias_dtype = Dtype::f32;
  std::string text(const char* isa, const char* operation) const {
    return std::string(isa) + " " + operation + " " + shape_text(m, n, k) + " " + format->name + " block " +
           std::to_string(block_size) + (double_quant ? " dq " : " ") + name_of(dtype) + " rank " +
           std::to_string(rank) + (has_bias ? " bias " + std::string(name_of(bias_dtype)) : "");
  }
};

}  // namespace

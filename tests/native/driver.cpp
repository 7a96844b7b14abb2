// Checks every kernel of every instruction set that this CPU has, without torch: against plain loops in double
// precision (products) or the format's definition (bytes, decoded weights, bit for bit). Built with sanitizers and for
// other CPUs; every buffer has its exact size and starts one element past an aligned address.
//
//   driver [--quick]    prints each failure, and "N passed, N failed"; exit status 1 if any failed
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

float roundoff(Dtype dtype) { return dtype == Dtype::f32 ? 0x1p-24f : dtype == Dtype::f16 ? 0x1p-11f : 0x1p-8f; }
float tiny_roundoff(Dtype dtype) {
  return dtype == Dtype::f32 ? 0x1p-149f : dtype == Dtype::f16 ? 0x1p-25f : 0x1p-134f;
}

// |actual - exact| within the bound of tests/cases.py: Higham's for a sum of `terms`, plus the output's rounding.
bool near(float actual, double exact, double magnitude, int64_t terms, Dtype dtype, double weight_error) {
  const double sum = (static_cast<double>(terms + 8) * 0x1p-24 + weight_error) * magnitude;
  return std::fabs(actual - exact) <= sum + roundoff(dtype) * (std::fabs(exact) + sum) + tiny_roundoff(dtype);
}

// Relative error of the codebook in bf16, which AVX2 uses for up to four rows of bf16.
double codebook_error(const std::string& isa, const Format* format, Dtype dtype, int64_t m, int64_t k) {
  if (isa != "avx2" || format->bits != 4 || dtype != Dtype::bf16 || m > 4 || k % 64) return 0;
  double worst = 0;
  for (const float value : format->codebook) {
    Bf16 rounded;
    from_float(value, &rounded);
    if (value != 0) worst = std::fmax(worst, std::fabs((static_cast<double>(to_float(rounded)) - value) / value));
  }
  return worst;
}

// Whether a product rounds the decoded weights to bf16 before it multiplies: the gemm of AVX512-BF16, to which more
// than four rows of bf16 go, and fewer where the flat weight's chunks of 64 cross rows.
bool rounds_weights(const std::string& isa, const Format* format, Dtype dtype, int64_t m, int64_t k) {
  return isa == "avx512bf16" && dtype == Dtype::bf16 && (m > 4 || (format->bits == 4 && k % 64));
}
// The same for the product with W itself, where few rows times int8 go to the gemm too.
bool rounds_weights_backward(const std::string& isa, const Format* format, Dtype dtype, int64_t m, int64_t k) {
  return isa == "avx512bf16" && dtype == Dtype::bf16 && (m > 4 || format->bits == 8 || k % 64);
}

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
  std::string text(const char* isa, const char* operation) const {
    return std::string(isa) + " " + operation + " " + shape_text(m, n, k) + " " + format->name + " block " +
           std::to_string(block_size) + (double_quant ? " dq " : " ") + name_of(dtype) + " rank " +
           std::to_string(rank) + (has_bias ? " bias" : "");
  }
};

// y against exact sums of x (m x k) times `decoded` as W^T, rounded to bf16 where asked, plus LoRA and bias; names the
// first mismatch.
void check_product(const std::string& text, const Values& y, const Case& c, const Values& x, const Weight& weight,
                   const Buffer<float>& t, const Buffer<float>& lora_b, const Buffer<float>& bias, double weight_error,
                   bool rounded = false) {
  const auto multiplied = [&](int64_t i) {
    Bf16 value;
    from_float(weight.decoded[i], &value);
    return rounded ? to_float(value) : weight.decoded[i];
  };
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t n = 0; n < c.n; ++n) {
      double exact = 0, magnitude = 0;
      const auto add = [&](double a, double b) {
        exact += a * b;
        magnitude += std::fabs(a * b);
      };
      for (int64_t k = 0; k < c.k; ++k) add(x.at(m * c.k + k), multiplied(n * c.k + k));
      for (int64_t r = 0; r < c.rank; ++r) add(c.scaling * t[m * c.rank + r], lora_b[n * c.rank + r]);
      if (c.has_bias) add(bias[n], 1);
      const float actual = y.at(m * c.n + n);
      if (std::isnan(exact) ? std::isnan(actual) : near(actual, exact, magnitude, c.k + c.rank, c.dtype, weight_error))
        continue;
      return report(false, text + ": element [" + std::to_string(m) + ", " + std::to_string(n) + "]: expected " +
                               std::to_string(exact) + ", got " + std::to_string(actual));
    }
  }
  report(true, text);
}

// Rows of the weight from the middle on as a matrix of their own, as one of a stack is: the columns of y that they
// make, and the part of grad_x that the rest of grad makes.
void check_later_rows(const Kernels& kernels, const Case& c, const Weight& weight, LinearArgs args, const Values& y,
                      const Values& grad) {
  const int64_t first = c.n / 2, n = c.n - first;
  Values part(c.dtype, c.m * n);
  args.first_row = first;
  args.n = n;
  args.y = part.data();
  if (args.bias) args.bias += first;
  if (args.lora_b) args.lora_b += first * c.rank;
  kernels.linear(args, serial());
  bool same = true;
  for (int64_t i = 0; i < c.m * n; ++i) {
    const float whole = y.at(i / n * c.n + first + i % n), later = part.at(i);
    same &= whole == later || (std::isnan(whole) && std::isnan(later));
  }
  report(same, c.text(kernels.isa, "linear") + ": differs for the later rows alone");

  Values later_grad(c.dtype, c.m * n), grad_x(c.dtype, c.m * c.k);
  for (int64_t i = 0; i < c.m * n; ++i) later_grad.set(i, grad.at(i / n * c.n + first + i % n));
  kernels.linear_grad_input(
      {later_grad.data(), c.dtype, weight.view, nullptr, nullptr, c.m, n, c.k, 0, grad_x.data(), first}, serial());
  Case turned_case = c;
  turned_case.n = c.k, turned_case.k = n, turned_case.rank = 0, turned_case.has_bias = false;
  Random unused(0);
  Weight turned(0, 0, c.format, c.block_size, false, unused);
  turned.decoded = Buffer<float>(n * c.k);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c.k; ++k) turned.decoded[k * n + i] = weight.decoded[(first + i) * c.k + k];
  const Buffer<float> none(0);
  check_product(c.text(kernels.isa, "linear_grad_input") + ", the later rows alone", grad_x, turned_case, later_grad,
                turned, none, none, none, 0, rounds_weights_backward(kernels.isa, c.format, c.dtype, c.m, c.k));
}

void check_linear(const Kernels& kernels, const Case& c, Random& random) {
  const Weight weight(c.n, c.k, c.format, c.block_size, c.double_quant, random);
  Values x(c.dtype, c.m * c.k), grad(c.dtype, c.m * c.n);
  for (int64_t i = 0; i < c.m * c.k; ++i) x.set(i, random.normal());
  for (int64_t i = 0; i < c.m * c.n; ++i) grad.set(i, random.normal());
  if (c.m > 2 && c.k > 1) x.set(c.k + c.k / 2, NAN);  // one bad row stays alone
  if (c.m > 2 && c.n > 1) grad.set(2 * c.n - 1, NAN);
  Buffer<float> t(c.m * c.rank), lora_b(c.n * c.rank), bias(c.has_bias ? c.n : 0);
  for (auto* buffer : {&t, &lora_b, &bias})
    for (int64_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = random.normal();
  if (c.has_bias && c.n > 2) bias[c.n / 2] = float_of(0x7fffffff);  // a NaN that rounding its bits would make -0

  const auto arguments = [&](Values& y) {
    return LinearArgs{x.data(),
                      c.dtype,
                      weight.view,
                      c.has_bias ? bias.data() : nullptr,
                      c.rank ? t.data() : nullptr,
                      c.rank ? lora_b.data() : nullptr,
                      c.scaling,
                      c.m,
                      c.n,
                      c.k,
                      c.rank,
                      y.data()};
  };
  Values y(c.dtype, c.m * c.n), again(c.dtype, c.m * c.n);
  kernels.linear(arguments(y), serial());
  const std::string text = c.text(kernels.isa, "linear");
  check_product(text, y, c, x, weight, t, lora_b, bias, codebook_error(kernels.isa, c.format, c.dtype, c.m, c.k),
                rounds_weights(kernels.isa, c.format, c.dtype, c.m, c.k));
  kernels.linear(arguments(again), on_threads(3));
  report(y == again, text + ": differs on three threads");

  // The product of grad (m x n) with W itself, by the same check on the transposed weight.
  Values grad_x(c.dtype, c.m * c.k), grad_again(c.dtype, c.m * c.k);
  Buffer<float> lora_a(c.k * c.rank), lora_a_rows(c.rank * c.k);  // as lora_b of the transposed weight; as it is
  for (int64_t k = 0; k < c.k; ++k)
    for (int64_t r = 0; r < c.rank; ++r) lora_a_rows[r * c.k + k] = lora_a[k * c.rank + r] = random.normal();
  const auto grad_arguments = [&](Values& out) {
    const float* grad_t = c.rank ? t.data() : nullptr;
    const float* a = c.rank ? lora_a_rows.data() : nullptr;
    return LinearGradInputArgs{grad.data(), c.dtype, weight.view, grad_t, a, c.m, c.n, c.k, c.rank, out.data()};
  };
  kernels.linear_grad_input(grad_arguments(grad_x), serial());
  Case transposed = c;
  transposed.n = c.k, transposed.k = c.n, transposed.has_bias = false, transposed.scaling = 1;
  Weight turned(0, 0, c.format, c.block_size, false, random);
  turned.decoded = Buffer<float>(c.n * c.k);
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t k = 0; k < c.k; ++k) turned.decoded[k * c.n + n] = weight.decoded[n * c.k + k];
  check_product(c.text(kernels.isa, "linear_grad_input"), grad_x, transposed, grad, turned, t, lora_a, bias, 0,
                rounds_weights_backward(kernels.isa, c.format, c.dtype, c.m, c.k));
  kernels.linear_grad_input(grad_arguments(grad_again), on_threads(2));
  report(grad_x == grad_again, c.text(kernels.isa, "linear_grad_input") + ": differs on two threads");
  check_later_rows(kernels, c, weight, arguments(y), y, grad);

  // LoRA's first product, of x with a dense A.
  if (c.rank) {
    Weight dense_a(0, 0, c.format, c.block_size, false, random);
    dense_a.decoded = Buffer<float>(c.rank * c.k);
    for (int64_t i = 0; i < c.rank * c.k; ++i) dense_a.decoded[i] = lora_a_rows[i];
    Case down = c;
    down.n = c.rank, down.rank = 0, down.has_bias = false, down.dtype = Dtype::f32;
    Values product(Dtype::f32, c.m * c.rank);
    kernels.lora_down({x.data(), c.dtype, lora_a_rows.data(), c.m, c.k, c.rank, static_cast<float*>(product.data())},
                      on_threads(2));
    check_product(c.text(kernels.isa, "lora_down"), product, down, x, dense_a, t, lora_b, bias, 0);
  }

  // The approximate product: within 3% in norm, row by row; exact where there is nothing to round.
  kernels.linear_approximate(arguments(again), serial());
  for (int64_t m = 0; m < c.m; ++m) {
    double error = 0, norm = 0;
    bool finite = true, lost = false;
    for (int64_t n = 0; n < c.n; ++n) {
      const double exact = y.at(m * c.n + n), difference = again.at(m * c.n + n) - exact;
      finite &= !std::isnan(exact);
      lost |= std::isnan(exact) && !std::isnan(again.at(m * c.n + n));
      error += difference * difference;
      norm += exact * exact;
    }
    // A single output may cancel; the statement is about the norm of many.
    if (finite && c.n >= 33 && c.k >= 64)
      report(error <= 9e-4 * norm, c.text(kernels.isa, "linear_approximate") + ": error above 3%");
    if (!finite) report(!lost, c.text(kernels.isa, "linear_approximate") + ": NaN is lost");
  }
}

void check_dequantize(const Kernels& kernels, const Case& c, Random& random) {
  const Weight weight(c.n, c.k, c.format, c.block_size, c.double_quant, random);
  Values out(c.dtype, c.n * c.k), expected(c.dtype, c.n * c.k), again(c.dtype, c.n * c.k);
  for (int64_t i = 0; i < c.n * c.k; ++i) expected.set(i, weight.decoded[i]);
  kernels.dequantize({weight.view, out.data(), c.dtype}, serial());
  report(out == expected, c.text(kernels.isa, "dequantize"));
  kernels.dequantize({weight.view, again.data(), c.dtype}, on_threads(2));
  report(again == expected, c.text(kernels.isa, "dequantize") + ", two threads");
}

// quantize, encode and search_scales against the scalar kernels, and those against the format's definition.
void check_quantize(const Kernels& kernels, int64_t numel, const Format& format, int64_t block_size, Dtype dtype,
                    float magnitude, Random& random) {
  const std::string text = std::string(kernels.isa) + " quantize of " + std::to_string(numel) + " block " +
                           std::to_string(block_size) + " " + name_of(dtype) + " magnitude " +
                           std::to_string(magnitude);
  const int64_t blocks = ceil_div(numel, block_size), columns = std::max<int64_t>(1, numel / 3);
  Values weight(dtype, numel);
  Buffer<float> importance(columns);
  for (int64_t i = 0; i < numel; ++i) weight.set(i, i / 64 == 1 ? 0.0f : random.normal() * magnitude);
  for (int64_t i = 0; i < columns; ++i) importance[i] = i % 5 ? std::fabs(random.normal()) : 0.0f;

  Buffer<uint8_t> packed(ceil_div(numel, 2)), expected(packed.size());
  Buffer<float> absmax(blocks), expected_absmax(blocks);
  kernels.quantize({weight.data(), dtype, numel, &format, block_size, blocks, packed.data(), absmax.data()},
                   on_threads(2));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * block_size, count = std::min(block_size, numel - first);
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(weight.at(first + i)));
    if (count < block_size) largest = std::max(largest, kTinyAbsmax);
    expected_absmax[block] = largest;
    const auto code = [&](int64_t i) {
      if (i >= count) return format.zero_code;
      const float value = weight.at(first + i);
      return encode_one(format, count < block_size ? value / largest : value * (1.0f / std::max(largest, kTinyAbsmax)));
    };
    for (int64_t i = 0; i < count; i += 2) expected[(first + i) / 2] = pack(code(i), code(i + 1));
  }
  report(packed == expected && absmax == expected_absmax, text);

  Buffer<float> scales(blocks), expected_scales(blocks);
  for (const float* weights : {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
    kernels.search_scales({weight.data(), dtype, numel, &format, block_size, weights, columns, scales.data()},
                          on_threads(2));
    kScalarKernels.search_scales(
        {weight.data(), dtype, numel, &format, block_size, weights, columns, expected_scales.data()}, serial());
    report(scales == expected_scales, text + ", search_scales");
  }
  kernels.encode({weight.data(), dtype, numel, &format, block_size, scales.data(), packed.data()}, on_threads(2));
  for (int64_t i = 0; i < numel + numel % 2; i += 2) {
    const auto code = [&](int64_t j) {
      if (j >= numel) return format.zero_code;
      const float scale = scales[j / block_size];
      return encode_one(format, std::fabs(scale) >= kTinyAbsmax ? weight.at(j) * (1.0f / scale) : 0.0f);
    };
    expected[i / 2] = pack(code(i), code(i + 1));
  }
  report(packed == expected, text + ", encode");

  Buffer<uint8_t> codes(blocks), expected_codes(blocks);
  Buffer<float> offset(1);
  offset[0] = 0.5f * magnitude;
  Buffer<float> groups(ceil_div(blocks, kGroupSize)), expected_groups(groups.size());
  kernels.quantize_scales({absmax.data(), offset.data(), blocks, codes.data(), groups.data()}, on_threads(2));
  kScalarKernels.quantize_scales({absmax.data(), offset.data(), blocks, expected_codes.data(), expected_groups.data()},
                                 serial());
  report(codes == expected_codes && groups == expected_groups, text + ", quantize_scales");

  // int8: rows of a third.
  const int64_t rows = numel / columns;
  Buffer<uint8_t> eight(rows * columns), expected_eight(rows * columns);
  Buffer<float> row_absmax(rows);
  kernels.quantize({weight.data(), dtype, rows * columns, &kInt8, columns, rows, eight.data(), row_absmax.data()},
                   on_threads(2));
  for (int64_t row = 0; row < rows; ++row) {
    float largest = 0;
    for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, std::fabs(weight.at(row * columns + i)));
    const float scale = 1.0f / largest * 127.0f;
    for (int64_t i = 0; i < columns; ++i)
      expected_eight[row * columns + i] = static_cast<uint8_t>(
          static_cast<int8_t>(std::isinf(scale) ? 0.0f : std::nearbyint(weight.at(row * columns + i) * scale)));
  }
  report(eight == expected_eight, text + ", int8");
}

// The scale of a block, or a row, with NaN or inf in it is not finite: that is how a caller finds them.
void check_not_finite(const Kernels& kernels, const Format& format, Dtype dtype, Random& random) {
  constexpr int64_t kNumel = 99, kBlockSize = 32, kBlocks = 4;  // the last block has 3
  for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
    for (int64_t at = 0; at < kNumel; ++at) {
      Values weight(dtype, kNumel);
      for (int64_t i = 0; i < kNumel; ++i) weight.set(i, random.normal());
      weight.set(at, bad);
      Buffer<uint8_t> packed(ceil_div(kNumel, 2)), eight(kNumel);
      Buffer<float> scales(kBlocks), searched(kBlocks), row(1);
      kernels.quantize({weight.data(), dtype, kNumel, &format, kBlockSize, kBlocks, packed.data(), scales.data()},
                       serial());
      kernels.search_scales({weight.data(), dtype, kNumel, &format, kBlockSize, nullptr, kNumel, searched.data()},
                            serial());
      kernels.quantize({weight.data(), dtype, kNumel, &kInt8, kNumel, 1, eight.data(), row.data()}, serial());
      bool right = !std::isfinite(row[0]);
      for (int64_t block = 0; block < kBlocks; ++block)
        for (const float scale : {scales[block], searched[block]})
          right &= std::isfinite(scale) == (block != at / kBlockSize);
      report(right, std::string(kernels.isa) + " scales of " + name_of(dtype) + " with " + std::to_string(bad) +
                        " at " + std::to_string(at));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  const Dtype dtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
  const int64_t shapes[][2] = {{1, 1},    {3, 5},     {7, 64},    {33, 130}, {40, 192},
                               {17, 513}, {130, 320}, {34, 1088}, {0, 64},   {4, 0}};
  const int64_t rows[] = {0, 1, 2, 3, 4, 5, 12, 13, 40, 130};
  for (const Kernels* kernels : available_kernels()) {
    const int before = passed + failed;
    Random random(1);
    int64_t turn = 0;
    for (const auto& [n, k] : shapes) {
      for (const int64_t m : rows) {
        if (m * n * k > (quick ? 200'000 : 2'000'000)) continue;
        for (const Format* format : kFormats) {
          for (const Dtype dtype : dtypes) {
            // Block sizes, double quantization, LoRA and bias take turns over the cases.
            const int64_t block_size = kMinBlockSize << (turn % 8);
            const int64_t rank = (turn / 2) % 4 ? 0 : 1 + turn % 17;
            const Case c = {m,
                            n,
                            k,
                            format,
                            block_size,
                            turn % 3 != 0 && format->bits == 4,
                            dtype,
                            rank,
                            turn % 5 == 0,
                            turn % 2 ? 0.7f : 1.0f};
            check_linear(*kernels, c, random);
            if (m == 1) check_dequantize(*kernels, c, random);
            ++turn;
          }
        }
      }
    }
    for (const int64_t numel : {1, 31, 64, 65, 257, 4097, 20001}) {
      if (quick && numel > 5000) continue;
      for (const Format* format : {&kNf4, &kFp4})
        for (const Dtype dtype : dtypes)
          for (const float magnitude : {1e-30f, 0.02f, 3e4f})
            check_quantize(*kernels, numel, *format, kMinBlockSize << (turn++ % 8), dtype, magnitude, random);
    }
    for (const Dtype dtype : dtypes) check_not_finite(*kernels, kNf4, dtype, random);
    std::printf("%s: %d checks\n", kernels->isa, passed + failed - before);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

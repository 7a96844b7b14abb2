// The checks of linear, linear_approximate and linear_grad_input: against sums in double precision.
#pragma once

#include "values.h"

namespace {

float roundoff(Dtype dtype) { return dtype == Dtype::f32 ? 0x1p-24f : dtype == Dtype::f16 ? 0x1p-11f : 0x1p-8f; }
float tiny_roundoff(Dtype dtype) {
  return dtype == Dtype::f32 ? 0x1p-149f : dtype == Dtype::f16 ? 0x1p-25f : 0x1p-134f;
}

// |actual - exact| within the bound of tests/cases.py: Higham's for a sum of `terms`, plus the output's rounding.
bool near(float actual, double exact, double magnitude, int64_t terms, Dtype dtype, double weight_error) {
  const double sum = (static_cast<double>(terms + 8) * 0x1p-24 + weight_error) * magnitude;
  return std::fabs(actual - exact) <= sum + roundoff(dtype) * (std::fabs(exact) + sum) + tiny_roundoff(dtype);
}

// Relative error of the codebook in bf16, which AVX2 uses for up to four rows of bf16 and AVX512-BF16 for up to two.
double codebook_error(const std::string& isa, const Format* format, Dtype dtype, int64_t m, int64_t k) {
  const int64_t most = isa == "avx2" ? 4 : isa == "avx512bf16" ? 2 : 0;
  if (format->bits != 4 || dtype != Dtype::bf16 || m > most || k % 64) return 0;
  double worst = 0;
  for (const float value : format->codebook) {
    Bf16 rounded;
    from_float(value, &rounded);
    if (value != 0) worst = std::fmax(worst, std::fabs((static_cast<double>(to_float(rounded)) - value) / value));
  }
  return worst;
}

// Whether a product rounds the decoded weights to bf16 before it multiplies: few_rows.h does for more than two rows of
// bf16, bf16_gemm.h for any number, which is where tiles multiply more than four, and where chunks of 64 cross rows.
bool multiplies_pairs(const std::string& isa, Dtype dtype) {
  return (isa == "avx512bf16" || isa == "amx") && dtype == Dtype::bf16;
}
bool rounds_weights(const std::string& isa, const Format* format, Dtype dtype, int64_t m, int64_t k) {
  const int64_t most_unrounded = isa == "avx512bf16" && format->bits == 4 ? 2 : 4;
  return multiplies_pairs(isa, dtype) && (m > most_unrounded || (format->bits == 4 && k % 64));
}
// The same for the product with W itself, where few rows times int8 go to the gemm too.
bool rounds_weights_backward(const std::string& isa, const Format* format, Dtype dtype, int64_t m, int64_t k) {
  return multiplies_pairs(isa, dtype) && (m > 4 || format->bits == 8 || k % 64);
}

// y against exact sums of x (m x k) times `decoded` as W^T, rounded to bf16 where asked, plus LoRA and bias; names the
// first mismatch.
void check_product(const std::string& text, const Values& y, const Case& c, const Values& x, const Weight& weight,
                   const Buffer<float>& t, const Buffer<float>& lora_b, const Values& bias, double weight_error,
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
      if (c.has_bias) add(bias.at(n), 1);
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
  args.bias = args.bias.from(first);
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
                turned, none, none, Values(c.dtype, 0), 0,
                rounds_weights_backward(kernels.isa, c.format, c.dtype, c.m, c.k));
}

void check_linear(const Kernels& kernels, const Case& c, Random& random) {
  const Weight weight(c.n, c.k, c.format, c.block_size, c.double_quant, random);
  Values x(c.dtype, c.m * c.k), grad(c.dtype, c.m * c.n);
  for (int64_t i = 0; i < c.m * c.k; ++i) x.set(i, random.normal());
  for (int64_t i = 0; i < c.m * c.n; ++i) grad.set(i, random.normal());
  if (c.m > 2 && c.k > 1) x.set(c.k + c.k / 2, NAN);  // one bad row stays alone
  if (c.m > 2 && c.n > 1) grad.set(2 * c.n - 1, NAN);
  Buffer<float> t(c.m * c.rank), lora_b(c.n * c.rank);
  Values bias(c.bias_dtype, c.has_bias ? c.n : 0);
  for (auto* buffer : {&t, &lora_b})
    for (int64_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = random.normal();
  for (int64_t i = 0; c.has_bias && i < c.n; ++i) bias.set(i, random.normal());
  if (c.has_bias && c.n > 2) bias.set(c.n / 2, float_of(0x7fffffff));  // a NaN that rounding its bits would make -0

  const auto arguments = [&](Values& y) {
    return LinearArgs{x.data(),
                      c.dtype,
                      weight.view,
                      c.has_bias ? Bias{bias.data(), c.bias_dtype} : Bias{},
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

}  // namespace

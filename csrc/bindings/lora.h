// The products with a weight and its LoRA as one op each (lowbit/ops/linear.py), and LoRA's own (lowbit/ops/lora.py),
// for devices with kernels for them.
//
// Besides what ops.h asks of a Device, this asks for lora_linear, lora_down, lora_up and lora_outer.
#pragma once

#include "ops.h"

namespace lowbit::bindings {

// The lora_a of another product with the same x, and its t.
template <class Device>
struct OtherDown {
  Operand<Device> lora_a;
  Tensor t;
};

// y, t = x lora_a^T, and x other^T for each of the others: the lora_a of products that will take x too.
template <class Device>
std::vector<Tensor> lora_linear_shared(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                                       std::optional<Tensor> offset, std::string spec, int64_t out_features,
                                       std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scaling,
                                       std::vector<Tensor> others) {
  STD_TORCH_CHECK(others.size() <= kMostOtherLoras, "others: expected at most ", kMostOtherLoras, ", got ",
                  others.size());
  const int64_t rank = row_length(lora_b, "lora_b");
  const Device device(x);
  LinearCall<Device> call(device, x, packed, absmax, group_scales, offset, spec, out_features, bias, lora_b, rank,
                          scaling);
  Operand<Device> a(device, x, lora_a, "lora_a", product(rank, call.k, "lora_a"));
  std::vector<OtherDown<Device>> downs;
  for (const Tensor& other : others) {
    check(other, "others", lora_a.scalar_type(), lora_a.numel(), x);
    downs.push_back({Operand<Device>(device, x, other, "others", other.numel()),
                     device.empty(with_last(x, rank), ScalarType::Float)});
  }
  Tensor t = device.empty(with_last(x, rank), ScalarType::Float);
  Tensor y = device.empty(with_last(x, out_features), x.scalar_type());
  Operand<Device> t_operand(device, x, t, "t", t.numel());
  device.linear(call, &a, t_operand, y, downs);
  std::vector<Tensor> results = {y, t};
  for (const OtherDown<Device>& down : downs) results.push_back(down.t);
  return results;
}

// y and t
template <class Device>
std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                                       std::optional<Tensor> offset, std::string spec, int64_t out_features,
                                       std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scaling) {
  const std::vector<Tensor> results = lora_linear_shared<Device>(x, packed, absmax, group_scales, offset, spec,
                                                                 out_features, bias, lora_a, lora_b, scaling, {});
  return {results[0], results[1]};
}

// Those of the gradients for x, lora_a and lora_b that are wanted.
template <class Device>
std::vector<Tensor> lora_linear_backward(Tensor grad, Tensor x, Tensor t, Tensor packed, Tensor absmax,
                                         std::optional<Tensor> group_scales, std::optional<Tensor> offset,
                                         std::string spec, Tensor lora_a, Tensor lora_b, double scaling, bool wants_x,
                                         bool wants_a, bool wants_b) {
  const int64_t rank = row_length(t, "t"), k = row_length(x, "x");
  const Device device(grad);
  const Tensor grad_t = device.empty(with_last(grad, rank), ScalarType::Float);
  GradInputCall<Device> call(device, grad, packed, absmax, group_scales, offset, spec, k, grad_t, lora_a);
  check(x, "x", grad.scalar_type(), product(call.m, k, "x"), grad);
  check(t, "t", ScalarType::Float, product(call.m, rank, "t"), grad);
  const Operand<Device> b(device, grad, lora_b, "lora_b", product(call.n, rank, "lora_b"));
  std::vector<Tensor> results;
  if (wants_x) {
    results.push_back(device.empty(with_last(x, k), x.scalar_type()));
    device.linear_grad_input(call, &b, scaling, results.back());
  } else if (wants_a) {
    device.lora_down(call.grad, call.m, call.n, rank, b, true, scaling, call.grad_t);
  }
  // out[w, rank] = scale wide^T low, or its transpose
  const auto outer = [&](const Tensor& wide, int64_t w, const Tensor& low, double scale, const Tensor& factor,
                         bool is_transposed) {
    results.push_back(device.empty({factor.sizes().begin(), factor.sizes().end()}, factor.scalar_type()));
    device.lora_outer(wide, as_contiguous(low), call.m, w, rank, scale, results.back(), is_transposed);
  };
  if (wants_a) outer(as_contiguous(x), k, grad_t, 1, lora_a, true);
  if (wants_b) outer(call.grad, call.n, t, scaling, lora_b, false);
  return results;
}

// One of LoRA's matrices [rows, columns], where it is: in its own order, or as the transpose of what is contiguous.
template <class Device>
struct FactorCall {
  FactorCall(const Device& device, const Tensor& like, const Tensor& factor, int64_t columns)
      : rows(checked_rows(factor, columns)),
        is_transposed(!factor.is_contiguous() && factor.stride(0) == 1 && factor.stride(1) == rows),
        operand(device, like, is_transposed ? matrix_of(factor, columns, rows) : factor, "factor",
                product(rows, columns, "factor")) {}

  static int64_t checked_rows(const Tensor& factor, int64_t columns) {
    STD_TORCH_CHECK(factor.dim() == 2 && factor.size(1) == columns, "factor: expected a matrix of ", columns,
                    " columns, got ", factor.dim(), " dimensions and ", factor.numel(), " elements");
    return factor.size(0);
  }

  const int64_t rows;
  const bool is_transposed;
  Operand<Device> operand;
};

// t = scale x factor^T
template <class Device>
Tensor lora_down(Tensor x, Tensor factor, double scale) {
  const int64_t k = row_length(x, "x");
  dtype_of(x.scalar_type(), "x");
  const Device device(x);
  const FactorCall<Device> down(device, x, factor, k);
  Tensor t = device.empty(with_last(x, down.rows), ScalarType::Float);
  Operand<Device> t_operand(device, x, t, "t", t.numel());
  device.lora_down(as_contiguous(x), rows_of(x), k, down.rows, down.operand, down.is_transposed, scale, t_operand);
  return t;
}

// y = scale t factor^T + bias
template <class Device>
Tensor lora_up(Tensor t, Tensor factor, std::optional<Tensor> bias, double scale, ScalarType type) {
  const int64_t rank = row_length(t, "t");
  dtype_of(type, "dtype");
  const Device device(t);
  FactorCall<Device> up(device, t, factor, rank);
  Operand<Device> t_operand(device, t, t, "t", t.numel()), bias_operand(device, t, bias, "bias", up.rows);
  Tensor y = device.empty(with_last(t, up.rows), type);
  device.lora_up(t_operand, rows_of(t), up.rows, rank, up.operand, up.is_transposed, scale, bias_operand, y);
  return y;
}

// scale wide^T low [w, rank], or its transpose
template <class Device>
Tensor lora_outer(Tensor wide, Tensor low, double scale, bool is_transposed) {
  const int64_t w = row_length(wide, "wide"), rank = row_length(low, "low"), m = rows_of(wide);
  dtype_of(wide.scalar_type(), "wide");
  check(low, "low", ScalarType::Float, product(m, rank, "low"), wide);
  const Device device(wide);
  Tensor out = is_transposed ? device.empty({rank, w}, ScalarType::Float) : device.empty({w, rank}, ScalarType::Float);
  device.lora_outer(as_contiguous(wide), as_contiguous(low), m, w, rank, scale, out, is_transposed);
  return out;
}

template <class Device, class Library>
void implement_lora(Library& library) {
  library.impl("lora_linear", TORCH_BOX(&lora_linear<Device>));
  library.impl("lora_linear_shared", TORCH_BOX(&lora_linear_shared<Device>));
  library.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward<Device>));
  library.impl("lora_down", TORCH_BOX(&lora_down<Device>));
  library.impl("lora_up", TORCH_BOX(&lora_up<Device>));
  library.impl("lora_outer", TORCH_BOX(&lora_outer<Device>));
}

}  // namespace lowbit::bindings

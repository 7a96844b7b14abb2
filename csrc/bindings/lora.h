// The products with a weight and its LoRA as one op each (lowbit/ops/linear.py), for devices with kernels for them.
//
// Besides what ops.h asks of a Device, this asks for lora_linear, lora_down and lora_outer.
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
    device.lora_down(call, b, scaling);
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

template <class Device, class Library>
void implement_lora(Library& library) {
  library.impl("lora_linear", TORCH_BOX(&lora_linear<Device>));
  library.impl("lora_linear_shared", TORCH_BOX(&lora_linear_shared<Device>));
  library.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward<Device>));
}

}  // namespace lowbit::bindings

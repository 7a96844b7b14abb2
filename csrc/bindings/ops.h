// The ops of lowbit/ops/, once for every device.
//
// A Device is made for one call, from a tensor that lives there. It says what differs: how memory is allocated, how an
// operand becomes fp32, and how a kernel is launched.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "checks.h"

namespace lowbit::bindings {

// A small operand (bias, t, lora_b, ...), contiguous; its reader says in which dtype.
template <class Device>
class Operand {
 public:
  Operand(const Device& device, const Tensor& like, const std::optional<Tensor>& tensor, const char* name,
          int64_t numel)
      : device_(device), name_(name) {
    if (!tensor) return;
    check_size(*tensor, name, numel, like);
    dtype_of(tensor->scalar_type(), name);
    tensor_ = as_contiguous(*tensor);
  }

  // For a kernel, while this lives; null where there is none.
  const float* fp32() {
    if (!tensor_) return nullptr;
    if (tensor_->scalar_type() != ScalarType::Float) tensor_ = device_.to_fp32(*tensor_);
    return aligned<float>(*tensor_, name_);
  }

  // As a matrix [rows, columns]; or, where its memory holds that one's transpose, so.
  Factor matrix(int64_t rows, int64_t columns, bool is_transposed) const {
    const Dtype dtype = dtype_of(tensor_->scalar_type(), name_);
    return {float_data(*tensor_, dtype, name_), dtype, is_transposed ? 1 : columns, is_transposed ? rows : 1};
  }

  // As one number for each output, in its own dtype.
  Bias bias() const {
    if (!tensor_) return {};
    const Dtype dtype = dtype_of(tensor_->scalar_type(), name_);
    return {float_data(*tensor_, dtype, name_), dtype};
  }

  const Tensor& operator*() const { return *tensor_; }
  explicit operator bool() const { return tensor_.has_value(); }

 private:
  const Device& device_;
  const char* name_;
  std::optional<Tensor> tensor_;
};

template <class Device>
std::tuple<Tensor, Tensor> quantize(Tensor weight, std::string spec_text) {
  const Spec spec = parse_spec(spec_text);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel(), rows = row_count(weight.sizes());
  const int64_t block_size = spec.format->has_row_scales ? (rows > 0 ? numel / rows : 0) : spec.block_size;
  const int64_t blocks = spec.format->has_row_scales ? rows : ceil_div(numel, block_size);
  const Device device(weight);
  const Tensor source = as_contiguous(weight);
  Tensor packed = device.empty({spec.format->packed_bytes(numel)}, ScalarType::Byte);
  Tensor absmax = device.empty({blocks}, ScalarType::Float);
  device.quantize({float_data(source, dtype, "weight"), dtype, numel, spec.format, block_size, blocks,
                   static_cast<uint8_t*>(packed.data_ptr()), static_cast<float*>(absmax.data_ptr())});
  return {packed, absmax};
}

template <class Device>
std::tuple<Tensor, Tensor> quantize_scales(Tensor absmax, Tensor offset) {
  const int64_t blocks = absmax.numel();
  check(absmax, "absmax", ScalarType::Float, blocks, absmax);
  check(offset, "offset", ScalarType::Float, 1, absmax);
  const Device device(absmax);
  const Tensor source = as_contiguous(absmax);
  Tensor codes = device.empty({blocks}, ScalarType::Byte);
  Tensor group_scales = device.empty({ceil_div(blocks, kGroupSize)}, ScalarType::Float);
  device.quantize_scales({aligned<float>(source, "absmax"), aligned<float>(offset, "offset"), blocks,
                          static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(group_scales.data_ptr())});
  return {codes, group_scales};
}

template <class Device>
Tensor search_scales(Tensor weight, std::optional<Tensor> importance, std::string spec_text) {
  const Spec spec = parse_4_bit_spec(spec_text);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel(), columns = weight.dim() ? weight.size(weight.dim() - 1) : 1;
  const Device device(weight);
  Operand<Device> importance_values(device, weight, importance, "importance", columns);
  const Tensor source = as_contiguous(weight);
  Tensor scales = device.empty({ceil_div(numel, spec.block_size)}, ScalarType::Float);
  device.search_scales({float_data(source, dtype, "weight"), dtype, numel, spec.format, spec.block_size,
                        importance_values.fp32(), columns, static_cast<float*>(scales.data_ptr())});
  return scales;
}

template <class Device>
Tensor encode(Tensor weight, Tensor scales, std::string spec_text) {
  const Spec spec = parse_4_bit_spec(spec_text);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel();
  check(scales, "scales", ScalarType::Float, ceil_div(numel, spec.block_size), weight);
  const Device device(weight);
  const Tensor source = as_contiguous(weight), block_scales = as_contiguous(scales);
  Tensor packed = device.empty({spec.format->packed_bytes(numel)}, ScalarType::Byte);
  device.encode({float_data(source, dtype, "weight"), dtype, numel, spec.format, spec.block_size,
                 aligned<float>(block_scales, "scales"), static_cast<uint8_t*>(packed.data_ptr())});
  return packed;
}

template <class Device>
Tensor dequantize(Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
                  std::string spec, std::vector<int64_t> shape, ScalarType type) {
  const IntHeaderOnlyArrayRef sizes(shape.data(), shape.size());
  const Dtype dtype = dtype_of(type, "dtype");
  const Weight weight(packed, packed, absmax, group_scales, offset, spec, numel_of(sizes), row_count(sizes));
  const Device device(packed);
  Tensor out = device.empty(shape, type);
  device.dequantize({weight.view(), out.data_ptr(), dtype}, "dequantize");
  return out;
}

template <class Device>
void dequantize_out(Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
                    std::string spec, Tensor out) {
  check_device(out, "out", packed);
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const Dtype dtype = dtype_of(out.scalar_type(), "out");
  const Weight weight(packed, packed, absmax, group_scales, offset, spec, out.numel(), row_count(out.sizes()));
  const Device device(packed);
  device.dequantize({weight.view(), float_data(out, dtype, "out"), dtype}, "dequantize_out");
}

inline int64_t checked_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 0, name, ": expected at least 0, got ", size);
  return size;
}

// Sizes like those of x, with the last replaced.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

// LoRA's rank, the last size of its first operand; 0 where there is none.
inline int64_t rank_of(const std::optional<Tensor>& low, const std::optional<Tensor>& up, const char* names,
                       const char* low_name) {
  STD_TORCH_CHECK(low.has_value() == up.has_value(), names, ": expected both (LoRA) or neither, got one");
  return low ? row_length(*low, low_name) : 0;
}

// The checked operands of `experts` products of the rows of x with a matrix each (one: all rows with W), and memory for
// the result.
template <class Device>
struct LinearCall {
  LinearCall(const Device& device, const Tensor& x, const Tensor& packed, const Tensor& absmax,
             const std::optional<Tensor>& group_scales, const std::optional<Tensor>& offset, const std::string& spec,
             int64_t out_features, const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_b, int64_t rank,
             double scaling, int64_t experts = 1)
      : k(row_length(x, "x")),
        n(checked_size(out_features, "out_features")),
        m(rows_of(x)),
        rank(rank),
        dtype(dtype_of(x.scalar_type(), "x")),
        scaling(scaling),
        weight_rows(product(experts, n, "out_features")),
        weight(x, packed, absmax, group_scales, offset, spec, product(weight_rows, k, "out_features"), weight_rows),
        bias(device, x, bias, "bias", weight_rows),
        lora_b(device, x, lora_b, "lora_b", product(weight_rows, rank, "lora_b")),
        x(as_contiguous(x)) {}

  // Of all rows; with bias, t and lora_b null.
  LinearArgs args(const Tensor& y) const {
    return {.x = float_data(x, dtype, "x"),
            .dtype = dtype,
            .weight = weight.view(),
            .scaling = static_cast<float>(scaling),
            .m = m,
            .n = n,
            .k = k,
            .rank = rank,
            .y = y.data_ptr()};
  }

  const int64_t k, n, m, rank;
  const Dtype dtype;
  const double scaling;
  const int64_t weight_rows;  // n of each expert
  const Weight weight;
  Operand<Device> bias, lora_b;
  const Tensor x;
};

// kApproximate: the products may be of activations in int8.
template <class Device, bool kApproximate>
Tensor linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
              std::string spec, int64_t out_features, std::optional<Tensor> bias, std::optional<Tensor> t,
              std::optional<Tensor> lora_b, double scaling) {
  const int64_t rank = rank_of(t, lora_b, "t, lora_b", "t");
  const Device device(x);
  LinearCall<Device> call(device, x, packed, absmax, group_scales, offset, spec, out_features, bias, lora_b, rank,
                          scaling);
  Operand<Device> t_operand(device, x, t, "t", product(call.m, rank, "t"));
  Tensor y = device.empty(with_last(x, out_features), x.scalar_type());
  device.linear(call, t_operand, y, kApproximate);
  return y;
}

// As LinearCall, for grad_x = grad W.
template <class Device>
struct GradInputCall {
  GradInputCall(const Device& device, const Tensor& grad, const Tensor& packed, const Tensor& absmax,
                const std::optional<Tensor>& group_scales, const std::optional<Tensor>& offset, const std::string& spec,
                int64_t in_features, const std::optional<Tensor>& grad_t, const std::optional<Tensor>& lora_a,
                int64_t experts = 1)
      : n(row_length(grad, "grad")),
        k(checked_size(in_features, "in_features")),
        m(rows_of(grad)),
        rank(rank_of(grad_t, lora_a, "grad_t, lora_a", "grad_t")),
        dtype(dtype_of(grad.scalar_type(), "grad")),
        weight_rows(product(experts, n, "grad")),
        weight(grad, packed, absmax, group_scales, offset, spec, product(weight_rows, k, "in_features"), weight_rows),
        grad_t(device, grad, grad_t, "grad_t", product(m, rank, "grad_t")),
        lora_a(device, grad, lora_a, "lora_a", product(product(experts, rank, "grad_t"), k, "grad_t")),
        grad(as_contiguous(grad)) {}

  LinearGradInputArgs args(const Tensor& grad_x) const {
    return {.grad = float_data(grad, dtype, "grad"),
            .dtype = dtype,
            .weight = weight.view(),
            .m = m,
            .n = n,
            .k = k,
            .rank = rank,
            .grad_x = grad_x.data_ptr()};
  }

  const int64_t n, k, m, rank;
  const Dtype dtype;
  const int64_t weight_rows;  // n of each expert
  const Weight weight;
  Operand<Device> grad_t, lora_a;
  const Tensor grad;
};

template <class Device>
Tensor linear_grad_input(Tensor grad, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                         std::optional<Tensor> offset, std::string spec, int64_t in_features,
                         std::optional<Tensor> grad_t, std::optional<Tensor> lora_a) {
  const Device device(grad);
  GradInputCall<Device> call(device, grad, packed, absmax, group_scales, offset, spec, in_features, grad_t, lora_a);
  Tensor grad_x = device.empty(with_last(grad, in_features), grad.scalar_type());
  device.linear_grad_input(call, grad_x);
  return grad_x;
}

// Registers what every device has.
template <class Device, class Library>
void implement(Library& library) {
  library.impl("quantize", TORCH_BOX(&quantize<Device>));
  library.impl("quantize_scales", TORCH_BOX(&quantize_scales<Device>));
  library.impl("search_scales", TORCH_BOX(&search_scales<Device>));
  library.impl("encode", TORCH_BOX(&encode<Device>));
  library.impl("dequantize", TORCH_BOX(&dequantize<Device>));
  library.impl("dequantize_out", TORCH_BOX(&dequantize_out<Device>));
  library.impl("linear", TORCH_BOX((&linear<Device, false>)));
  library.impl("linear_approximate", TORCH_BOX((&linear<Device, true>)));
  library.impl("linear_grad_input", TORCH_BOX(&linear_grad_input<Device>));
}

}  // namespace lowbit::bindings

// Checks of the ops' arguments, before any work. They let no kernel leave its buffers; messages for users come from
// Python before this.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "../dtype.h"
#include "../weight.h"
#include "tensors.h"

namespace lowbit::bindings {

inline const char* name_of(ScalarType type) {
  constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Byte, "uint8"},     {ScalarType::Int, "int32"},         {ScalarType::Long, "int64"},
      {ScalarType::Half, "float16"},   {ScalarType::BFloat16, "bfloat16"}, {ScalarType::Float, "float32"},
      {ScalarType::Double, "float64"}, {ScalarType::Bool, "bool"}};
  for (const auto& [named, name] : kNames)
    if (named == type) return name;
  return "another one";
}

inline Dtype dtype_of(ScalarType type, const char* name) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
                  ": expected dtype float32, float16 or bfloat16, got ", name_of(type));
  if (type == ScalarType::Half) return Dtype::f16;
  return type == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
}

// a * b for sizes; an error instead of a wrapped number, which could pass a check of tensor sizes.
inline int64_t product(int64_t a, int64_t b, const char* name) {
  int64_t result;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), name, ": expected sizes whose product fits 63 bits, got ", a,
                  " x ", b);
  return result;
}

// How a weight is stored, as lowbit.format.WeightSpec writes it: "nf4:64", "nf4:64:double_quant" or "int8".
struct Spec {
  const Format* format = nullptr;
  int64_t block_size = 0;  // none where scales are of rows
  bool double_quant = false;
};

inline Spec parse_spec(const std::string& text) {
  Spec spec;
  const size_t colon = std::min(text.find(':'), text.size());
  for (const Format* format : kFormats)
    if (text.compare(0, colon, format->name) == 0) spec.format = format;
  STD_TORCH_CHECK(spec.format, "spec: expected nf4, fp4 or int8 as its format, got ", text);
  if (spec.format->has_row_scales) {
    STD_TORCH_CHECK(colon == text.size(), "spec: expected int8 alone, which has a scale for each row, got ", text);
    return spec;
  }
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data() + std::min(colon + 1, text.size()), end, spec.block_size);
  spec.double_quant = std::string(rest, end) == ":double_quant";
  STD_TORCH_CHECK(error == std::errc() && (rest == end || spec.double_quant),
                  "spec: expected format:block_size or format:block_size:double_quant, got ", text);
  const int64_t size = spec.block_size;
  STD_TORCH_CHECK(size >= kMinBlockSize && size <= kMaxBlockSize && (size & (size - 1)) == 0,
                  "spec: expected a block size that is a power of two from 32 to 4096, got ", text);
  return spec;
}

// Of an op that works by a codebook and block scales.
inline Spec parse_4_bit_spec(const std::string& text) {
  const Spec spec = parse_spec(text);
  STD_TORCH_CHECK(spec.format->bits == 4, "spec: expected nf4 or fp4 as its format, got ", text);
  return spec;
}

inline const char* device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda" : "another device";
}

// That a kernel on the device of `like` can reach `tensor`.
inline void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected device ", device_name(like), " ",
                  like.get_device_index(), " (that of the other tensors), got ", device_name(tensor), " ",
                  tensor.get_device_index());
}

inline void check_size(const Tensor& tensor, const char* name, int64_t numel, const Tensor& like) {
  check_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements, got ", tensor.numel());
}

inline void check(const Tensor& tensor, const char* name, ScalarType type, int64_t numel, const Tensor& like) {
  check_size(tensor, name, numel, like);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", name_of(type), ", got ",
                  name_of(tensor.scalar_type()));
}

// The length of a row of an activation [..., length of a row], and its number of rows.
inline int64_t row_length(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, name, ": expected at least 1 dimension, got a scalar");
  return x.size(x.dim() - 1);
}
inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// Rows of a weight of this shape; a weight of one dimension, or none, is one row.
inline int64_t row_count(const IntHeaderOnlyArrayRef& shape) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows = product(rows, shape[i], "shape");
  return rows;
}

// Elements of a tensor of this shape.
inline int64_t numel_of(const IntHeaderOnlyArrayRef& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "shape: expected sizes of at least 0, got ", size);
    numel = product(numel, size, "shape");
  }
  return numel;
}

// `data` as T. torch keeps every element aligned; memory from elsewhere may not be, which a GPU does not read.
template <class T>
const T* aligned(const Tensor& tensor, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  STD_TORCH_CHECK(address % alignof(T) == 0, name, ": expected memory aligned to ", alignof(T), " bytes, got address ",
                  address);
  return static_cast<const T*>(tensor.data_ptr());
}

// The elements of a weight, an activation or an output.
inline void* float_data(const Tensor& tensor, Dtype dtype, const char* name) {
  const void* data =
      dtype == Dtype::f32 ? static_cast<const void*>(aligned<float>(tensor, name)) : aligned<uint16_t>(tensor, name);
  return const_cast<void*>(data);
}

// The checked parts of a weight; holds the tensors, made contiguous, while a kernel reads them.
class Weight {
 public:
  Weight(const Tensor& like, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& group_scales,
         const std::optional<Tensor>& offset, const std::string& spec_text, int64_t numel, int64_t rows)
      : packed_(as_contiguous(packed)), absmax_(as_contiguous(absmax)) {
    const Spec spec = parse_spec(spec_text);
    const Format& format = *spec.format;
    check(packed, "packed", ScalarType::Byte, format.packed_bytes(numel), like);
    const int64_t row_size = rows > 0 ? numel / rows : 0;
    const int64_t blocks = format.has_row_scales ? rows : ceil_div(numel, spec.block_size);
    check(absmax, "absmax", spec.double_quant ? ScalarType::Byte : ScalarType::Float, blocks, like);
    STD_TORCH_CHECK(group_scales.has_value() == spec.double_quant && offset.has_value() == spec.double_quant,
                    "group_scales, offset: expected ", spec.double_quant ? "both" : "neither", " for ", spec_text,
                    ", got ",
                    group_scales && offset   ? "both"
                    : group_scales || offset ? "one"
                                             : "neither");
    view_.packed = static_cast<const uint8_t*>(packed_.data_ptr());
    view_.format = &format;
    view_.block_size = format.has_row_scales ? std::max<int64_t>(row_size, 1) : spec.block_size;
    view_.numel = numel;
    Scales& scales = view_.scales;
    if (!spec.double_quant) {
      scales.kind = format.has_row_scales ? ScaleKind::row : ScaleKind::block;
      scales.values = aligned<float>(absmax_, "absmax");
      return;
    }
    check(*group_scales, "group_scales", ScalarType::Float, ceil_div(blocks, kGroupSize), like);
    check(*offset, "offset", ScalarType::Float, 1, like);
    group_scales_ = as_contiguous(*group_scales);
    offset_ = offset;
    scales.kind = ScaleKind::double_quant;
    scales.codes = static_cast<const uint8_t*>(absmax_.data_ptr());
    scales.group_scales = aligned<float>(*group_scales_, "group_scales");
    scales.offset = aligned<float>(*offset_, "offset");
  }

  const QuantizedWeight& view() const { return view_; }

 private:
  QuantizedWeight view_{};
  Tensor packed_, absmax_;
  std::optional<Tensor> group_scales_, offset_;
};

}  // namespace lowbit::bindings

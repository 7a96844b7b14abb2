// What the bindings of every device share: the checks of the ops' arguments, before any work. They let no kernel leave
// its buffers; messages for users come from Python before this.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "dtype.h"
#include "nf4.h"

namespace lowbit::bindings {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another one";
  }
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

// null for int8, which has no codebook.
inline const Format* format_of(const std::string& name) {
  if (name == "int8") return nullptr;
  STD_TORCH_CHECK(name == "nf4" || name == "fp4", "format: expected nf4, fp4 or int8, got ", name);
  return name == "nf4" ? &lowbit::kNf4 : &lowbit::kFp4;
}

inline void check_block_size(int64_t size) {
  STD_TORCH_CHECK(size >= lowbit::kMinBlockSize && size <= lowbit::kMaxBlockSize && (size & (size - 1)) == 0,
                  "block_size: expected a power of two from 32 to 4096, got ", size);
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

// torch::stable::contiguous looks its op up by name, which costs as much as a small kernel.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

// For int8 block_size is the length of a row.
inline void check_row_length(int64_t block_size, int64_t rows, int64_t numel) {
  STD_TORCH_CHECK(rows == 0 || block_size == numel / rows, "block_size: expected ", numel / rows,
                  " (the length of a row) for int8, got ", block_size);
}

// Rows of an activation [..., length of a row].
inline int64_t rows_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, name, ": expected at least 1 dimension, got a scalar");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// Rows of an int8 weight of this shape; a weight of one dimension, or none, is one row.
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

// The checked parts of a weight; holds the tensors, made contiguous, while a kernel reads them. Pointers are null where
// there is no such part.
struct Weight {
  Weight(const Tensor& like, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& group_scales,
         const std::optional<Tensor>& offset, const std::string& format, int64_t block_size, int64_t numel,
         int64_t rows)
      : format(format_of(format)),
        block_size(block_size),
        numel(numel),
        packed_(as_contiguous(packed)),
        absmax_(as_contiguous(absmax)) {
    STD_TORCH_CHECK(numel >= 0, "shape: expected sizes of at least 0");
    this->packed = pointer<uint8_t>(packed_);
    if (!this->format) {
      check_row_length(block_size, rows, numel);
      check(packed, "packed", ScalarType::Byte, numel, like);
      check(absmax, "absmax", ScalarType::Float, rows, like);
      STD_TORCH_CHECK(!group_scales && !offset, "group_scales, offset: expected neither for int8, got one");
      this->absmax = pointer<float>(absmax_);
      this->block_size = std::max<int64_t>(block_size, 1);  // a row length of 0 would be divided by
      return;
    }
    check_block_size(block_size);
    const int64_t blocks = ceil_div(numel, block_size);
    check(packed, "packed", ScalarType::Byte, ceil_div(numel, 2), like);
    STD_TORCH_CHECK(group_scales.has_value() == offset.has_value(),
                    "group_scales, offset: expected both (double quantization) or neither, got one");
    if (!group_scales) {
      check(absmax, "absmax", ScalarType::Float, blocks, like);
      this->absmax = pointer<float>(absmax_);
      return;
    }
    check(absmax, "absmax", ScalarType::Byte, blocks, like);
    check(*group_scales, "group_scales", ScalarType::Float, ceil_div(blocks, kGroupSize), like);
    check(*offset, "offset", ScalarType::Float, 1, like);
    group_scales_ = as_contiguous(*group_scales);
    offset_ = offset;
    scale_codes = pointer<uint8_t>(absmax_);
    this->group_scales = pointer<float>(*group_scales_);
    this->offset = pointer<float>(*offset_);
  }

  const uint8_t* packed = nullptr;
  const float* absmax = nullptr;
  const uint8_t* scale_codes = nullptr;
  const float* group_scales = nullptr;
  const float* offset = nullptr;
  const Format* format;
  int64_t block_size;
  int64_t numel;

 private:
  Tensor packed_, absmax_;
  std::optional<Tensor> group_scales_, offset_;
};

}  // namespace lowbit::bindings

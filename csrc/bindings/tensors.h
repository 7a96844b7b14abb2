// Making, viewing and copying torch's tensors by functions of its C interface. torch::stable's looks each op up by its
// name, which costs the host as much as a small kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../dtype.h"

namespace lowbit::bindings {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// For calls of torch's C interface, which says no more than whether they failed. (torch's own macro for it has another
// name in each version.)
inline void check_call(int32_t code, const char* name) {
  STD_TORCH_CHECK(code == 0, "lowbit: torch's ", name, " failed");
}

inline int32_t shim_dtype(ScalarType type) {
  if (type == ScalarType::Byte) return aoti_torch_dtype_uint8();
  if (type == ScalarType::Int) return aoti_torch_dtype_int32();
  if (type == ScalarType::Half) return aoti_torch_dtype_float16();
  if (type == ScalarType::Double) return aoti_torch_dtype_float64();
  return type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
}

// A contiguous tensor on the device of `like`, of any content.
inline Tensor empty_beside(const Tensor& like, const int64_t* sizes, size_t dimensions, ScalarType type) {
  std::vector<int64_t> strides(dimensions);
  int64_t numel = 1;
  for (size_t i = dimensions; i-- > 0; numel *= sizes[i]) strides[i] = std::max<int64_t>(numel, 1);
  int32_t device_type;
  check_call(aoti_torch_get_device_type(like.get(), &device_type), "get_device_type");
  AtenTensorHandle handle;
  check_call(aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes, strides.data(), shim_dtype(type),
                                      device_type, like.get_device_index(), &handle),
             "empty_strided");
  return Tensor(handle);
}
inline Tensor empty_beside(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return empty_beside(like, sizes.data(), sizes.size(), type);
}

// [rows, columns] of a tensor's memory, from its element number `first` on.
inline Tensor matrix_of(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                        int64_t first = 0) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle;
  check_call(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, first, &handle), "_reinterpret_tensor");
  return Tensor(handle);
}
inline Tensor matrix_of(const Tensor& contiguous, int64_t rows, int64_t columns) {
  return matrix_of(contiguous, rows, columns, std::max<int64_t>(columns, 1), 1);
}

// Elements of a contiguous tensor.
inline Tensor elements_of(const Tensor& contiguous, int64_t first, int64_t count) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  check_call(aoti_torch__reinterpret_tensor(contiguous.get(), 1, &count, &stride, first, &handle),
             "_reinterpret_tensor");
  return Tensor(handle);
}

inline void copy(const Tensor& from, const Tensor& to) {
  check_call(aoti_torch_copy_(to.get(), from.get(), 0), "copy_");
}

inline Tensor copied(const Tensor& tensor, ScalarType type) {
  Tensor result = empty_beside(tensor, tensor.sizes().data(), tensor.sizes().size(), type);
  copy(tensor, result);
  return result;
}
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : copied(tensor, type);
}
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : copied(tensor, tensor.scalar_type());
}

}  // namespace lowbit::bindings

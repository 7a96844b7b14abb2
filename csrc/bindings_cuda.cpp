// The ops of lowbit/ops.py for CUDA tensors.
//
// The one binary has to load next to a torch without CUDA, so nothing of libtorch_cuda is linked: what is needed of it
// is looked up when a CUDA tensor first comes. Kernels run on torch's current stream; nothing here waits for them.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cuda/kernels.h"

// tests/cuda/stub_bindings.cpp compiles this file for CPU tensors and a namespace of its own.
#if !defined(LOWBIT_CUDA_NAMESPACE)
#define LOWBIT_CUDA_NAMESPACE lowbit
#define LOWBIT_CUDA_KEY CUDA
#endif

namespace {

using namespace lowbit::bindings;
using lowbit::Dtype;
using lowbit::Format;
using lowbit::cuda::Stream;

// torch's current stream of a device. A weak symbol would stay null: Python loads torch's libraries out of the sight of
// other extensions, and only by its handle can a library that is not linked be asked.
Stream current_stream(int32_t device_index) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "lowbit: this torch has no CUDA streams (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
  return static_cast<Stream>(stream);
}

// Where a kernel runs: while this lives, the device of the tensors is the current one.
class Launch {
 public:
  explicit Launch(const Tensor& like)
      : guard_(like.get_device_index()), stream_(current_stream(like.get_device_index())) {}

  template <class Args>
  void operator()(int (*launcher)(const Args&, Stream), const Args& args, const char* op) const {
    const int code = launcher(args, stream_);
    STD_TORCH_CHECK(code == 0, op, ": CUDA error ", code, ", ", lowbit::cuda::error_message(code),
                    " (lowbit was compiled for the architectures ", lowbit::cuda::architectures(),
                    "; LOWBIT_CUDA_ARCHS names others)");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

// `data` as T. torch keeps every element aligned; memory from elsewhere may not be.
template <class T>
T* aligned(T* data, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  STD_TORCH_CHECK(address % alignof(T) == 0, name, ": expected memory aligned to ", alignof(T), " bytes, got address ",
                  address);
  return data;
}

template <class T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// The data of a weight or an output.
void* float_data(const Tensor& tensor, Dtype dtype, const char* name) {
  if (dtype == Dtype::f32) return aligned(mutable_pointer<float>(tensor), name);
  return aligned(mutable_pointer<uint16_t>(tensor), name);
}

Tensor empty(const Tensor& like, int64_t size, ScalarType type) {
  return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(&size, 1), type);
}

lowbit::cuda::QuantizedWeight view(const Weight& weight) {
  return {weight.packed,
          aligned(weight.absmax, "absmax"),
          weight.scale_codes,
          aligned(weight.group_scales, "group_scales"),
          aligned(weight.offset, "offset"),
          weight.format,
          weight.block_size,
          weight.numel};
}

const Format* four_bit_format(const std::string& name) {
  const Format* format = format_of(name);
  STD_TORCH_CHECK(format, "format: expected nf4 or fp4, got ", name);
  return format;
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& weight, int64_t block_size) {
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel(), rows = row_count(weight.sizes());
  check_row_length(block_size, rows, numel);
  const Launch launch(weight);
  const Tensor source = as_contiguous(weight);
  Tensor packed = empty(weight, numel, ScalarType::Byte), absmax = empty(weight, rows, ScalarType::Float);
  launch(lowbit::cuda::quantize_int8,
         {float_data(source, dtype, "weight"), dtype, rows, rows ? numel / rows : 0, mutable_pointer<int8_t>(packed),
          mutable_pointer<float>(absmax)},
         "quantize");
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize(Tensor weight, std::string format, int64_t block_size) {
  const Format* table = format_of(format);
  if (!table) return quantize_int8(weight, block_size);
  check_block_size(block_size);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel();
  const Launch launch(weight);
  const Tensor source = as_contiguous(weight);
  Tensor packed = empty(weight, ceil_div(numel, 2), ScalarType::Byte);
  Tensor absmax = empty(weight, ceil_div(numel, block_size), ScalarType::Float);
  launch(lowbit::cuda::quantize,
         {float_data(source, dtype, "weight"), dtype, numel, table, block_size, mutable_pointer<uint8_t>(packed),
          mutable_pointer<float>(absmax)},
         "quantize");
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_scales(Tensor absmax, Tensor offset) {
  const int64_t blocks = absmax.numel();
  check(absmax, "absmax", ScalarType::Float, blocks, absmax);
  check(offset, "offset", ScalarType::Float, 1, absmax);
  const Launch launch(absmax);
  const Tensor source = as_contiguous(absmax);
  Tensor codes = empty(absmax, blocks, ScalarType::Byte);
  Tensor group_scales = empty(absmax, ceil_div(blocks, lowbit::kGroupSize), ScalarType::Float);
  launch(lowbit::cuda::quantize_scales,
         {aligned(pointer<float>(source), "absmax"), aligned(pointer<float>(offset), "offset"), blocks,
          mutable_pointer<uint8_t>(codes), mutable_pointer<float>(group_scales)},
         "quantize_scales");
  return {codes, group_scales};
}

Tensor search_scales(Tensor weight, std::optional<Tensor> importance, std::string format, int64_t block_size) {
  check_block_size(block_size);
  const Format* table = four_bit_format(format);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel(), columns = weight.dim() ? weight.size(weight.dim() - 1) : 1;
  if (importance) {
    check(*importance, "importance", ScalarType::Float, columns, weight);
    importance = as_contiguous(*importance);
  }
  const Launch launch(weight);
  const Tensor source = as_contiguous(weight);
  Tensor scales = empty(weight, ceil_div(numel, block_size), ScalarType::Float);
  launch(lowbit::cuda::search_scales,
         {float_data(source, dtype, "weight"), dtype, numel, table, block_size,
          importance ? aligned(pointer<float>(*importance), "importance") : nullptr, columns,
          mutable_pointer<float>(scales)},
         "search_scales");
  return scales;
}

Tensor encode(Tensor weight, Tensor scales, std::string format, int64_t block_size) {
  check_block_size(block_size);
  const Format* table = four_bit_format(format);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel();
  check(scales, "scales", ScalarType::Float, ceil_div(numel, block_size), weight);
  const Launch launch(weight);
  const Tensor source = as_contiguous(weight), block_scales = as_contiguous(scales);
  Tensor packed = empty(weight, ceil_div(numel, 2), ScalarType::Byte);
  launch(lowbit::cuda::encode,
         {float_data(source, dtype, "weight"), dtype, numel, table, block_size,
          aligned(pointer<float>(block_scales), "scales"), mutable_pointer<uint8_t>(packed)},
         "encode");
  return packed;
}

Tensor dequantize(Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
                  std::string format, int64_t block_size, std::vector<int64_t> shape, ScalarType dtype) {
  const IntHeaderOnlyArrayRef sizes(shape.data(), shape.size());
  const Dtype out_dtype = dtype_of(dtype, "dtype");
  const Weight weight(packed, packed, absmax, group_scales, offset, format, block_size, numel_of(sizes),
                      row_count(sizes));
  const Launch launch(packed);
  Tensor out = torch::stable::new_empty(packed, sizes, dtype);
  launch(lowbit::cuda::dequantize, {view(weight), float_data(out, out_dtype, "out"), out_dtype}, "dequantize");
  return out;
}

void dequantize_out(Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
                    std::string format, int64_t block_size, Tensor out) {
  check_device(out, "out", packed);
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const Dtype dtype = dtype_of(out.scalar_type(), "out");
  const Weight weight(packed, packed, absmax, group_scales, offset, format, block_size, out.numel(),
                      row_count(out.sizes()));
  const Launch launch(packed);
  launch(lowbit::cuda::dequantize, {view(weight), float_data(out, dtype, "out"), dtype}, "dequantize_out");
}

// out[m, n] = a[m, k] b[k, n] by cuBLAS. (mm.out: autocast, which may be on, changes the dtypes of the other mm.)
void multiply_dense(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
}

Tensor linear_grad_input(Tensor grad, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                         std::optional<Tensor> offset, std::string format, int64_t block_size, int64_t in_features) {
  STD_TORCH_CHECK(grad.dim() >= 1, "grad: expected at least 1 dimension, got a scalar");
  STD_TORCH_CHECK(in_features >= 0, "in_features: expected at least 0, got ", in_features);
  std::vector<int64_t> sizes(grad.sizes().begin(), grad.sizes().end());
  const int64_t m = row_count(grad.sizes()), n = sizes.back(), k = in_features;
  sizes.back() = k;
  const Dtype dtype = dtype_of(grad.scalar_type(), "grad");
  const Weight weight(grad, packed, absmax, group_scales, offset, format, block_size, product(n, k, "in_features"), n);
  const Launch launch(grad);
  const Tensor source = as_contiguous(grad);
  Tensor grad_x = torch::stable::new_empty(grad, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), grad.scalar_type());
  lowbit::cuda::LinearGradInputArgs args{
      float_data(source, dtype, "grad"),   dtype,  view(weight), nullptr, nullptr, 1.0f, m, n, k, 0,
      float_data(grad_x, dtype, "grad_x"), nullptr};
  if (lowbit::cuda::linear_grad_input_decodes_first(args)) {
    const int64_t dense_sizes[] = {n, k}, source_sizes[] = {m, n}, grad_x_sizes[] = {m, k};
    const Tensor dense = torch::stable::new_empty(grad, IntHeaderOnlyArrayRef(dense_sizes, 2), grad.scalar_type());
    launch(lowbit::cuda::dequantize, {args.weight, float_data(dense, dtype, "dense"), dtype}, "linear_grad_input");
    multiply_dense(torch::stable::view(source, IntHeaderOnlyArrayRef(source_sizes, 2)), dense,
                   torch::stable::view(grad_x, IntHeaderOnlyArrayRef(grad_x_sizes, 2)));
    return grad_x;
  }
  const Tensor workspace = empty(grad, lowbit::cuda::linear_grad_input_workspace(args), ScalarType::Float);
  args.workspace = mutable_pointer<float>(workspace);
  launch(lowbit::cuda::linear_grad_input, args, "linear_grad_input");
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LOWBIT_CUDA_NAMESPACE, LOWBIT_CUDA_KEY, library) {
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("search_scales", TORCH_BOX(&search_scales));
  library.impl("encode", TORCH_BOX(&encode));
  library.impl("quantize_scales", TORCH_BOX(&quantize_scales));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  library.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
}

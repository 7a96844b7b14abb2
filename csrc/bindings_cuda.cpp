// The ops of lowbit/ops.py for CUDA tensors.
//
// The one binary has to load next to a torch without CUDA, so nothing of libtorch_cuda is linked: what is needed of it
// is looked up when a CUDA tensor first comes. Kernels run on torch's current stream; nothing here waits for them.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cuda/kernels.h"
#include "cuda/shape.h"

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

Tensor converted(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// A small operand (bias, t, lora_b, ...), contiguous; its reader says in which dtype.
class Operand {
 public:
  Operand(const Tensor& like, const std::optional<Tensor>& tensor, const char* name, int64_t numel) : name_(name) {
    if (!tensor) return;
    check_size(*tensor, name, numel, like);
    dtype_of(tensor->scalar_type(), name);
    tensor_ = as_contiguous(*tensor);
  }

  // For a kernel, while this lives; null where there is none.
  const float* fp32() {
    if (!tensor_) return nullptr;
    tensor_ = converted(*tensor_, ScalarType::Float);
    return aligned(pointer<float>(*tensor_), name_);
  }

  const Tensor& operator*() const { return *tensor_; }
  explicit operator bool() const { return tensor_.has_value(); }

 private:
  const char* name_;
  std::optional<Tensor> tensor_;
};

Tensor reshaped(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  return torch::stable::view(tensor, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

// low[m, rank] and up, which is [n, rank] or the transpose of that, both contiguous: so that their product becomes that
// times scaling, rounded to `type` for cuBLAS.
std::pair<Tensor, Tensor> rounded_factors(const Launch& launch, const Tensor& low, const Tensor& up, bool is_transposed,
                                          ScalarType type, double scaling, const char* op) {
  const bool are_of_type = low.scalar_type() == type && up.scalar_type() == type;
  if (are_of_type && scaling == 1 && type != ScalarType::Half) return {low, up};
  const int64_t m = low.size(0), rank = low.size(1), n = up.size(is_transposed ? 1 : 0);
  const Dtype dtype = dtype_of(type, op);
  const Dtype low_dtype = dtype_of(low.scalar_type(), op), up_dtype = dtype_of(up.scalar_type(), op);
  const Tensor low_out = torch::stable::new_empty(low, low.sizes(), type);
  const Tensor up_out = torch::stable::new_empty(up, up.sizes(), type);
  launch(lowbit::cuda::rounded_factors,
         {float_data(low, low_dtype, op), low_dtype, float_data(up, up_dtype, op), up_dtype, is_transposed ? 1 : rank,
          is_transposed ? n : 1, static_cast<float>(scaling), m, n, rank, float_data(low_out, dtype, op),
          float_data(up_out, dtype, op), dtype},
         op);
  return {low_out, up_out};
}

// out[m, n] = x[m, k] w[n, k]^T (+ addend) by cuBLAS: an addmm where there is an addend, which is a bias [n], or [m, n]
// and may be out. (An op that is given its result: autocast, which may be on in a backward, changes the dtypes of the
// others.)
void multiply(const Tensor& x, const Tensor& w, const std::optional<Tensor>& addend, const Tensor& out) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(addend), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
}

Tensor linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
              std::string format, int64_t block_size, int64_t out_features, std::optional<Tensor> bias,
              std::optional<Tensor> t, std::optional<Tensor> lora_b, double scaling) {
  const int64_t m = rows_of(x, "x"), n = out_features, k = x.size(x.dim() - 1);
  STD_TORCH_CHECK(n >= 0, "out_features: expected at least 0, got ", n);
  const ScalarType type = x.scalar_type();
  const Dtype dtype = dtype_of(type, "x");
  STD_TORCH_CHECK(t.has_value() == lora_b.has_value(), "t, lora_b: expected both (LoRA) or neither, got one");
  STD_TORCH_CHECK(!t || t->dim() >= 1, "t: expected at least 1 dimension, got a scalar");
  const int64_t rank = t ? t->size(t->dim() - 1) : 0;
  const Launch launch(x);
  const Weight weight(x, packed, absmax, group_scales, offset, format, block_size, product(n, k, "out_features"), n);
  Operand bias_operand(x, bias, "bias", n), t_operand(x, t, "t", product(m, rank, "t"));
  Operand lora_b_operand(x, lora_b, "lora_b", product(n, rank, "lora_b"));
  const Tensor source = as_contiguous(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;

  const auto path = lowbit::cuda::linear_path(m, dtype, !weight.format, lowbit::cuda::code_capability());
  Tensor y = torch::stable::new_empty(x, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
  if (path != lowbit::cuda::LinearPath::dequantize || n == 0) {
    lowbit::cuda::LinearArgs args{float_data(source, dtype, "x"),
                                  dtype,
                                  view(weight),
                                  nullptr,
                                  nullptr,
                                  nullptr,
                                  static_cast<float>(scaling),
                                  m,
                                  n,
                                  k,
                                  rank,
                                  y.data_ptr(),
                                  nullptr};
    // What does not fit gemm goes the way of dequantize.
    const bool by_gemm = path == lowbit::cuda::LinearPath::gemm && n > 0;
    if (!by_gemm || lowbit::cuda::linear_gemm_fits(args)) {
      args.bias = bias_operand.fp32();
      args.t = t_operand.fp32();
      args.lora_b = lora_b_operand.fp32();
      const int64_t floats =
          by_gemm ? lowbit::cuda::linear_gemm_workspace(args) : lowbit::cuda::linear_gemv_workspace(args);
      std::optional<Tensor> workspace;
      if (floats) {
        workspace = empty(x, floats, ScalarType::Float);
        args.workspace = mutable_pointer<float>(*workspace);
      }
      launch(by_gemm ? lowbit::cuda::linear_gemm : lowbit::cuda::linear_gemv, args, "linear");
      return y;
    }
  }

  // LoRA's product first, into y: that of x adds it to its own fp32 sums.
  const Tensor out = reshaped(y, {m, n});
  std::optional<Tensor> addend;
  if (bias_operand) addend = converted(*bias_operand, type);
  if (t_operand && rank > 0) {
    const auto [low, up] = rounded_factors(launch, reshaped(*t_operand, {m, rank}),
                                           reshaped(*lora_b_operand, {n, rank}), false, type, scaling, "linear");
    multiply(low, up, addend, out);
    addend = out;
  }
  const int64_t weight_sizes[] = {n, k};
  const Tensor decoded = torch::stable::new_empty(x, IntHeaderOnlyArrayRef(weight_sizes, 2), type);
  launch(lowbit::cuda::dequantize, {view(weight), float_data(decoded, dtype, "decoded weight"), dtype}, "linear");
  multiply(reshaped(source, {m, k}), decoded, addend, out);
  return y;
}

Tensor linear_grad_input(Tensor grad, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                         std::optional<Tensor> offset, std::string format, int64_t block_size, int64_t in_features,
                         std::optional<Tensor> grad_t, std::optional<Tensor> lora_a) {
  const int64_t m = rows_of(grad, "grad"), n = grad.size(grad.dim() - 1), k = in_features;
  STD_TORCH_CHECK(k >= 0, "in_features: expected at least 0, got ", k);
  std::vector<int64_t> sizes(grad.sizes().begin(), grad.sizes().end());
  sizes.back() = k;
  const Dtype dtype = dtype_of(grad.scalar_type(), "grad");
  const Weight weight(grad, packed, absmax, group_scales, offset, format, block_size, product(n, k, "in_features"), n);
  STD_TORCH_CHECK(grad_t.has_value() == lora_a.has_value(), "grad_t, lora_a: expected both (LoRA) or neither, got one");
  STD_TORCH_CHECK(!grad_t || grad_t->dim() >= 1, "grad_t: expected at least 1 dimension, got a scalar");
  const int64_t rank = grad_t ? grad_t->size(grad_t->dim() - 1) : 0;
  const Launch launch(grad);
  Operand grad_t_operand(grad, grad_t, "grad_t", product(m, rank, "grad_t"));
  Operand lora_a_operand(grad, lora_a, "lora_a", product(rank, k, "lora_a"));
  const Tensor source = as_contiguous(grad);
  Tensor grad_x = torch::stable::new_empty(grad, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), grad.scalar_type());
  lowbit::cuda::LinearGradInputArgs args{
      float_data(source, dtype, "grad"),   dtype,  view(weight), nullptr, nullptr, m, n, k, rank,
      float_data(grad_x, dtype, "grad_x"), nullptr};
  if (lowbit::cuda::linear_grad_input_decodes_first(args)) {
    // LoRA's product first, as in linear.
    const ScalarType type = grad.scalar_type();
    const Tensor out = reshaped(grad_x, {m, k});
    std::optional<Tensor> addend;
    if (rank > 0) {
      const auto [low, up] = rounded_factors(launch, reshaped(*grad_t_operand, {m, rank}),
                                             reshaped(*lora_a_operand, {rank, k}), true, type, 1, "linear_grad_input");
      multiply(low, torch::stable::transpose(up, 0, 1), {}, out);
      addend = out;
    }
    const int64_t dense_sizes[] = {n, k};
    const Tensor dense = torch::stable::new_empty(grad, IntHeaderOnlyArrayRef(dense_sizes, 2), type);
    launch(lowbit::cuda::dequantize, {args.weight, float_data(dense, dtype, "dense"), dtype}, "linear_grad_input");
    multiply(reshaped(source, {m, n}), torch::stable::transpose(dense, 0, 1), addend, out);
    return grad_x;
  }
  args.grad_t = grad_t_operand.fp32();
  args.lora_a = lora_a_operand.fp32();
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
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_approximate", TORCH_BOX(&linear));  // nothing is faster than the exact product
  library.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
}

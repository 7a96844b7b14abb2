// The ops of lowbit/ops.py for CPU tensors, and the extension module. Only the bindings know torch (its stable ABI: one
// binary serves every torch >= 2.10).
#include <Python.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"
#include "cpu/support.h"
#if defined(LOWBIT_CUDA)
#include "cuda/kernels.h"
#endif

namespace {

using namespace lowbit::bindings;
using lowbit::Dtype;
using lowbit::Format;
using lowbit::cpu::active_kernels;
using lowbit::cpu::Kernels;

// torch's own thread pool.
lowbit::cpu::ParallelFor parallel_for() {
  return {[](int64_t count, int64_t grain, const lowbit::cpu::Body& body) {
            if (count > 0) torch::stable::parallel_for(0, count, grain, body);
          },
          torch::stable::get_num_threads()};
}

lowbit::cpu::QuantizedWeight view(const Weight& weight) {
  return {
      weight.packed, weight.absmax,     weight.scale_codes, weight.group_scales, weight.offset ? *weight.offset : 0.0f,
      weight.format, weight.block_size, weight.numel};
}

// A small operand (bias, t, lora_b) in contiguous fp32, multiplied by `factor`: the tensor's own memory where it is
// that.
class FloatOperand {
 public:
  FloatOperand(const Tensor& like, const std::optional<Tensor>& tensor, const char* name, int64_t numel,
               float factor = 1.0f) {
    if (!tensor) return;
    check_size(*tensor, name, numel, like);
    const Dtype dtype = dtype_of(tensor->scalar_type(), name);
    source_ = as_contiguous(*tensor);
    data_ = pointer<float>(*source_);
    if (dtype == Dtype::f32 && factor == 1.0f) return;
    copy_.resize(static_cast<size_t>(numel));
    if (dtype == Dtype::f32) fill(pointer<float>(*source_), factor);
    if (dtype == Dtype::f16) fill(pointer<lowbit::Fp16>(*source_), factor);
    if (dtype == Dtype::bf16) fill(pointer<lowbit::Bf16>(*source_), factor);
    data_ = copy_.data();
  }
  FloatOperand(const FloatOperand&) = delete;

  const float* data() const { return data_; }  // null where there is no operand
  const float* at(int64_t i) const { return data_ ? data_ + i : nullptr; }

 private:
  template <class T>
  void fill(const T* from, float factor) {
    for (size_t i = 0; i < copy_.size(); ++i) copy_[i] = lowbit::to_float(from[i]) * factor;
  }

  const float* data_ = nullptr;
  std::optional<Tensor> source_;
  std::vector<float> copy_;
};

// Asks for huge pages where a result is large: a new tensor's pages are zeroed by the system as they are touched first,
// and 4 KB at a time that takes longer than quantizing or decoding into them.
Tensor on_huge_pages(Tensor tensor, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  if (bytes >= 4 << 20) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kPage - 1) / kPage * kPage;
    // Advice: where it is not taken, nothing is different but the time.
    madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(bytes) - kPage, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

// An empty CPU tensor like x with its last dimension and dtype replaced. Not new_empty: that looks its op up by name.
Tensor empty_with_last(const Tensor& x, int64_t last, ScalarType type) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
  sizes.back() = last;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  const int32_t dtype = type == ScalarType::Float  ? aoti_torch_dtype_float32()
                        : type == ScalarType::Half ? aoti_torch_dtype_float16()
                                                   : aoti_torch_dtype_bfloat16();
  int32_t device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle empty;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), device_index, &empty));
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  return on_huge_pages(Tensor(empty), numel * (type == ScalarType::Float ? 4 : 2));
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& weight, int64_t block_size) {
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel(), rows = row_count(weight.sizes());
  check_row_length(block_size, rows, numel);
  const Tensor source = as_contiguous(weight);
  Tensor packed =
      on_huge_pages(torch::stable::new_empty(weight, IntHeaderOnlyArrayRef(&numel, 1), ScalarType::Byte), numel);
  Tensor absmax = torch::stable::new_empty(weight, IntHeaderOnlyArrayRef(&rows, 1), ScalarType::Float);
  active_kernels().quantize_int8({source.data_ptr(), dtype, rows, rows ? numel / rows : 0,
                                  static_cast<int8_t*>(packed.data_ptr()), static_cast<float*>(absmax.data_ptr())},
                                 parallel_for());
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize(Tensor weight, std::string format, int64_t block_size) {
  const Format* table = format_of(format);
  if (!table) return quantize_int8(weight, block_size);
  check_block_size(block_size);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const Tensor source = as_contiguous(weight);
  const int64_t numel = weight.numel();
  const int64_t bytes = ceil_div(numel, 2), blocks = ceil_div(numel, block_size);
  Tensor packed =
      on_huge_pages(torch::stable::new_empty(weight, IntHeaderOnlyArrayRef(&bytes, 1), ScalarType::Byte), bytes);
  Tensor absmax = torch::stable::new_empty(weight, IntHeaderOnlyArrayRef(&blocks, 1), ScalarType::Float);
  active_kernels().quantize({source.data_ptr(), dtype, numel, table, block_size,
                             static_cast<uint8_t*>(packed.data_ptr()), static_cast<float*>(absmax.data_ptr())},
                            parallel_for());
  return {packed, absmax};
}

Tensor search_scales(Tensor weight, std::optional<Tensor> importance, std::string format, int64_t block_size) {
  check_block_size(block_size);
  const Format* table = format_of(format);
  STD_TORCH_CHECK(table, "format: expected nf4 or fp4, got ", format);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel(), columns = weight.dim() ? weight.size(weight.dim() - 1) : 1;
  const FloatOperand importance_values(weight, importance, "importance", columns);
  const Tensor source = as_contiguous(weight);
  const int64_t blocks = ceil_div(numel, block_size);
  Tensor scales = torch::stable::new_empty(weight, IntHeaderOnlyArrayRef(&blocks, 1), ScalarType::Float);
  active_kernels().search_scales({source.data_ptr(), dtype, numel, table, block_size, importance_values.data(), columns,
                                  static_cast<float*>(scales.data_ptr())},
                                 parallel_for());
  return scales;
}

Tensor encode(Tensor weight, Tensor scales, std::string format, int64_t block_size) {
  check_block_size(block_size);
  const Format* table = format_of(format);
  STD_TORCH_CHECK(table, "format: expected nf4 or fp4, got ", format);
  const Dtype dtype = dtype_of(weight.scalar_type(), "weight");
  const int64_t numel = weight.numel(), bytes = ceil_div(numel, 2);
  check(scales, "scales", ScalarType::Float, ceil_div(numel, block_size), weight);
  const Tensor source = as_contiguous(weight), block_scales = as_contiguous(scales);
  Tensor packed =
      on_huge_pages(torch::stable::new_empty(weight, IntHeaderOnlyArrayRef(&bytes, 1), ScalarType::Byte), bytes);
  active_kernels().encode({source.data_ptr(), dtype, numel, table, block_size, pointer<float>(block_scales),
                           static_cast<uint8_t*>(packed.data_ptr())},
                          parallel_for());
  return packed;
}

std::tuple<Tensor, Tensor> quantize_scales(Tensor absmax, Tensor offset) {
  const int64_t blocks = absmax.numel(), groups = ceil_div(blocks, lowbit::kGroupSize);
  check(absmax, "absmax", ScalarType::Float, blocks, absmax);
  check(offset, "offset", ScalarType::Float, 1, absmax);
  const Tensor source = as_contiguous(absmax);
  Tensor codes = torch::stable::new_empty(absmax, IntHeaderOnlyArrayRef(&blocks, 1), ScalarType::Byte);
  Tensor group_scales = torch::stable::new_empty(absmax, IntHeaderOnlyArrayRef(&groups, 1));
  active_kernels().quantize_scales(
      {pointer<float>(source), *pointer<float>(offset), blocks, static_cast<uint8_t*>(codes.data_ptr()),
       static_cast<float*>(group_scales.data_ptr())},
      parallel_for());
  return {codes, group_scales};
}

Tensor dequantize(Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
                  std::string format, int64_t block_size, std::vector<int64_t> shape, ScalarType dtype) {
  const IntHeaderOnlyArrayRef sizes(shape.data(), shape.size());
  const int64_t numel = numel_of(sizes), rows = row_count(sizes);
  const Weight weight(packed, packed, absmax, group_scales, offset, format, block_size, numel, rows);
  const Dtype out_dtype = dtype_of(dtype, "dtype");
  Tensor out = on_huge_pages(torch::stable::new_empty(packed, sizes, dtype), numel * (out_dtype == Dtype::f32 ? 4 : 2));
  active_kernels().dequantize({view(weight), out.data_ptr(), out_dtype}, parallel_for());
  return out;
}

void dequantize_out(Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
                    std::string format, int64_t block_size, Tensor out) {
  check_device(out, "out", packed);
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const Dtype out_dtype = dtype_of(out.scalar_type(), "out");
  const Weight weight(packed, packed, absmax, group_scales, offset, format, block_size, out.numel(),
                      row_count(out.sizes()));
  active_kernels().dequantize({view(weight), out.data_ptr(), out_dtype}, parallel_for());
}

// kKernel: the member of Kernels that computes the product, exactly or approximately.
template <auto kKernel>
Tensor linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales, std::optional<Tensor> offset,
              std::string format, int64_t block_size, int64_t out_features, std::optional<Tensor> bias,
              std::optional<Tensor> t, std::optional<Tensor> lora_b, double scaling) {
  const int64_t m = rows_of(x, "x"), n = out_features, k = x.size(x.dim() - 1);
  STD_TORCH_CHECK(n >= 0, "out_features: expected at least 0, got ", n);
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const Weight weight(x, packed, absmax, group_scales, offset, format, block_size, product(n, k, "out_features"), n);
  STD_TORCH_CHECK(t.has_value() == lora_b.has_value(), "t, lora_b: expected both (LoRA) or neither, got one");
  STD_TORCH_CHECK(!t || t->dim() >= 1, "t: expected at least 1 dimension, got a scalar");
  const int64_t rank = t ? t->size(t->dim() - 1) : 0;
  const FloatOperand bias_values(x, bias, "bias", n);
  const FloatOperand t_values(x, t, "t", product(m, rank, "t"), static_cast<float>(scaling));
  const FloatOperand lora_b_values(x, lora_b, "lora_b", product(n, rank, "t"));
  const Tensor source = as_contiguous(x);
  Tensor y = empty_with_last(x, n, x.scalar_type());
  (active_kernels().*kKernel)({source.data_ptr(), dtype, view(weight), bias_values.data(), t_values.data(),
                               lora_b_values.data(), m, n, k, rank, y.data_ptr()},
                              parallel_for());
  return y;
}

// linear with t = x A^T computed here too: for a few rows, where a call of another op would cost more than its work.
std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                                       std::optional<Tensor> offset, std::string format, int64_t block_size,
                                       int64_t out_features, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                       double scaling) {
  const int64_t m = rows_of(x, "x"), n = out_features, k = x.size(x.dim() - 1);
  STD_TORCH_CHECK(n >= 0, "out_features: expected at least 0, got ", n);
  STD_TORCH_CHECK(lora_a.dim() == 2, "lora_a: expected 2 dimensions, got ", lora_a.dim());
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const int64_t rank = lora_a.size(0);
  const Weight weight(x, packed, absmax, group_scales, offset, format, block_size, product(n, k, "out_features"), n);
  const FloatOperand bias_values(x, bias, "bias", n);
  const FloatOperand lora_a_values(x, lora_a, "lora_a", product(rank, k, "lora_a"));
  const FloatOperand lora_b_values(x, lora_b, "lora_b", product(n, rank, "lora_b"));
  const Tensor source = as_contiguous(x);
  Tensor t = empty_with_last(x, rank, ScalarType::Float), y = empty_with_last(x, n, x.scalar_type());
  const Kernels& kernels = active_kernels();
  kernels.lora_down({source.data_ptr(), dtype, lora_a_values.data(), m, k, rank, static_cast<float*>(t.data_ptr())},
                    parallel_for());
  const FloatOperand scaled_t(x, t, "t", m * rank, static_cast<float>(scaling));
  kernels.linear({source.data_ptr(), dtype, view(weight), bias_values.data(), scaled_t.data(), lora_b_values.data(), m,
                  n, k, rank, y.data_ptr()},
                 parallel_for());
  return {y, t};
}

Tensor linear_grad_input(Tensor grad, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                         std::optional<Tensor> offset, std::string format, int64_t block_size, int64_t in_features,
                         std::optional<Tensor> grad_t, std::optional<Tensor> lora_a) {
  const int64_t m = rows_of(grad, "grad"), n = grad.size(grad.dim() - 1), k = in_features;
  STD_TORCH_CHECK(k >= 0, "in_features: expected at least 0, got ", k);
  const Dtype dtype = dtype_of(grad.scalar_type(), "grad");
  const Weight weight(grad, packed, absmax, group_scales, offset, format, block_size, product(n, k, "in_features"), n);
  STD_TORCH_CHECK(grad_t.has_value() == lora_a.has_value(), "grad_t, lora_a: expected both (LoRA) or neither, got one");
  STD_TORCH_CHECK(!grad_t || grad_t->dim() >= 1, "grad_t: expected at least 1 dimension, got a scalar");
  const int64_t rank = grad_t ? grad_t->size(grad_t->dim() - 1) : 0;
  const FloatOperand grad_t_values(grad, grad_t, "grad_t", product(m, rank, "grad_t"));
  const FloatOperand lora_a_values(grad, lora_a, "lora_a", product(rank, k, "grad_t"));
  const Tensor source = as_contiguous(grad);
  Tensor grad_x = empty_with_last(grad, k, grad.scalar_type());
  active_kernels().linear_grad_input({source.data_ptr(), dtype, view(weight), grad_t_values.data(),
                                      lora_a_values.data(), m, n, k, rank, grad_x.data_ptr()},
                                     parallel_for());
  return grad_x;
}

// The rows of each expert's tokens: where the one's before end, and where its own do.
std::vector<int64_t> expert_begins(const Tensor& expert_ends, int64_t rows, const Tensor& like) {
  check(expert_ends, "expert_ends", ScalarType::Int, expert_ends.numel(), like);
  const Tensor ends = as_contiguous(expert_ends);
  std::vector<int64_t> begins{0};
  for (int64_t e = 0; e < ends.numel(); ++e) {
    begins.push_back(pointer<int32_t>(ends)[e]);
    STD_TORCH_CHECK(begins[e] <= begins[e + 1], "expert_ends: expected numbers that do not decrease, got ", begins[e],
                    " and then ", begins[e + 1]);
  }
  STD_TORCH_CHECK(begins.back() == rows, "expert_ends: expected the last to be ", rows, ", the rows, got ",
                  begins.back());
  return begins;
}

// linear by expert: one product after the other, each shared among all threads.
Tensor grouped_linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                      std::optional<Tensor> offset, std::string format, int64_t block_size, Tensor expert_ends,
                      int64_t out_features, std::optional<Tensor> bias, std::optional<Tensor> t,
                      std::optional<Tensor> lora_b, double scaling) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  const int64_t n = out_features, k = x.size(1), experts = expert_ends.numel();
  STD_TORCH_CHECK(n >= 0, "out_features: expected at least 0, got ", n);
  const std::vector<int64_t> begins = expert_begins(expert_ends, x.size(0), x);
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const int64_t matrix_rows = product(experts, n, "out_features");
  const Weight weight(x, packed, absmax, group_scales, offset, format, block_size,
                      product(matrix_rows, k, "out_features"), matrix_rows);
  STD_TORCH_CHECK(t.has_value() == lora_b.has_value(), "t, lora_b: expected both (LoRA) or neither, got one");
  STD_TORCH_CHECK(!t || t->dim() == 2, "t: expected 2 dimensions, got ", t ? t->dim() : 0);
  const int64_t rank = t ? t->size(1) : 0;
  const FloatOperand bias_values(x, bias, "bias", matrix_rows);
  const FloatOperand t_values(x, t, "t", product(x.size(0), rank, "t"), static_cast<float>(scaling));
  const FloatOperand lora_b_values(x, lora_b, "lora_b", product(matrix_rows, rank, "t"));
  const Tensor source = as_contiguous(x);
  Tensor y = empty_with_last(x, n, x.scalar_type());
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t row = begins[e], m = begins[e + 1] - row;
    active_kernels().linear({.x = lowbit::cpu::element_of(source.data_ptr(), dtype, row * k),
                             .dtype = dtype,
                             .weight = view(weight),
                             .bias = bias_values.at(e * n),
                             .t = t_values.at(row * rank),
                             .lora_b = lora_b_values.at(e * n * rank),
                             .m = m,
                             .n = n,
                             .k = k,
                             .rank = rank,
                             .y = lowbit::cpu::element_of(y.data_ptr(), dtype, row * n),
                             .first_row = e * n},
                            parallel_for());
  }
  return y;
}

Tensor grouped_linear_grad_input(Tensor grad, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                                 std::optional<Tensor> offset, std::string format, int64_t block_size,
                                 Tensor expert_ends, int64_t in_features, std::optional<Tensor> grad_t,
                                 std::optional<Tensor> lora_a) {
  STD_TORCH_CHECK(grad.dim() == 2, "grad: expected 2 dimensions, got ", grad.dim());
  const int64_t n = grad.size(1), k = in_features, experts = expert_ends.numel();
  STD_TORCH_CHECK(k >= 0, "in_features: expected at least 0, got ", k);
  const std::vector<int64_t> begins = expert_begins(expert_ends, grad.size(0), grad);
  const Dtype dtype = dtype_of(grad.scalar_type(), "grad");
  const int64_t matrix_rows = product(experts, n, "grad");
  const Weight weight(grad, packed, absmax, group_scales, offset, format, block_size,
                      product(matrix_rows, k, "in_features"), matrix_rows);
  STD_TORCH_CHECK(grad_t.has_value() == lora_a.has_value(), "grad_t, lora_a: expected both (LoRA) or neither, got one");
  STD_TORCH_CHECK(!grad_t || grad_t->dim() == 2, "grad_t: expected 2 dimensions, got ", grad_t ? grad_t->dim() : 0);
  const int64_t rank = grad_t ? grad_t->size(1) : 0;
  const FloatOperand grad_t_values(grad, grad_t, "grad_t", product(grad.size(0), rank, "grad_t"));
  const FloatOperand lora_a_values(grad, lora_a, "lora_a", product(product(experts, rank, "grad_t"), k, "grad_t"));
  const Tensor source = as_contiguous(grad);
  Tensor grad_x = empty_with_last(grad, k, grad.scalar_type());
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t row = begins[e], m = begins[e + 1] - row;
    active_kernels().linear_grad_input({.grad = lowbit::cpu::element_of(source.data_ptr(), dtype, row * n),
                                        .dtype = dtype,
                                        .weight = view(weight),
                                        .grad_t = grad_t_values.at(row * rank),
                                        .lora_a = lora_a_values.at(e * rank * k),
                                        .m = m,
                                        .n = n,
                                        .k = k,
                                        .rank = rank,
                                        .grad_x = lowbit::cpu::element_of(grad_x.data_ptr(), dtype, row * k),
                                        .first_row = e * n},
                                       parallel_for());
  }
  return grad_x;
}

std::string cpu_isa() { return active_kernels().isa; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : lowbit::cpu::available_kernels()) names.emplace_back(kernels->isa);
  return names;
}

void set_cpu_isa(std::string isa) {
  STD_TORCH_CHECK(lowbit::cpu::select_isa(isa.c_str()),
                  "isa: expected auto, scalar, avx2, avx512, avx512bf16 or neon, and one that this CPU has, got ", isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, library) {
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("search_scales", TORCH_BOX(&search_scales));
  library.impl("encode", TORCH_BOX(&encode));
  library.impl("quantize_scales", TORCH_BOX(&quantize_scales));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("dequantize_out", TORCH_BOX(&dequantize_out));
  library.impl("linear", TORCH_BOX(&linear<&Kernels::linear>));
  library.impl("linear_approximate", TORCH_BOX(&linear<&Kernels::linear_approximate>));
  library.impl("lora_linear", TORCH_BOX(&lora_linear));
  library.impl("linear_grad_input", TORCH_BOX(&linear_grad_input));
  library.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  library.impl("grouped_linear_grad_input", TORCH_BOX(&grouped_linear_grad_input));
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  library.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

// Importing lowbit._C loads the registrations above; the module itself only says what the CUDA half was compiled for.
static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&module_definition);
#if defined(LOWBIT_CUDA)
  const char* architectures = lowbit::cuda::architectures();
#else
  const char* architectures = "";
#endif
  if (module && PyModule_AddStringConstant(module, "cuda_architectures", architectures) != 0) Py_CLEAR(module);
  return module;
}

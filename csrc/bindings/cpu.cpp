// The ops for CPU tensors, and the extension module. Only the bindings know torch (its stable ABI: one binary serves
// every torch >= 2.10).
#include <Python.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/kernels.h"
#include "../cpu/pool.h"
#include "../cpu/support.h"
#include "../cuda/kernels.h"
#include "descent.h"
#include "ops.h"
#include "optim.h"

namespace {

using namespace lowbit;
using namespace lowbit::bindings;
using lowbit::cpu::active_kernels;
using lowbit::cpu::Kernels;

void torch_team(int64_t parts, const std::function<void(int64_t)>& part) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) part(i);
  });
}

cpu::ParallelFor parallel_for() {
  const int64_t threads = torch::stable::get_num_threads();
  return {[threads](int64_t count, int64_t grain, const cpu::Body& body) {
            cpu::share(count, grain, threads, torch_team, body);
          },
          threads};
}

// Asks for huge pages where a result is large: a new tensor's pages are zeroed by the system as they are touched first,
// and 4 KB at a time that takes longer than quantizing or decoding into them.
void advise_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  if (bytes < 4 << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kPage - 1) / kPage * kPage;
  // Advice: where it is not taken, nothing is different but the time.
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(bytes) - kPage, MADV_HUGEPAGE);
#endif
}

struct Cpu {
  explicit Cpu(const Tensor& like) : like(like) {}

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    Tensor tensor = empty_beside(like, sizes, type);
    advise_huge_pages(tensor, tensor.numel() * static_cast<int64_t>(tensor.element_size()));
    return tensor;
  }

  Tensor to_fp32(const Tensor& tensor) const {
    Tensor copy = empty({tensor.numel()}, ScalarType::Float);
    cpu::for_dtype(dtype_of(tensor.scalar_type(), "operand"), [&]<class T>(T) {
      const T* from = static_cast<const T*>(tensor.data_ptr());
      float* to = static_cast<float*>(copy.data_ptr());
      for (int64_t i = 0; i < tensor.numel(); ++i) to[i] = to_float(from[i]);
    });
    return copy;
  }

  void quantize(const QuantizeArgs& args) const { active_kernels().quantize(args, parallel_for()); }
  void quantize_scales(const QuantizeScalesArgs& args) const { active_kernels().quantize_scales(args, parallel_for()); }
  void search_scales(const SearchScalesArgs& args) const { active_kernels().search_scales(args, parallel_for()); }
  void encode(const EncodeArgs& args) const { active_kernels().encode(args, parallel_for()); }
  void gptq_block(const GptqBlockArgs& args) const { active_kernels().gptq_block(args, parallel_for()); }
  void descend_block(const DescendBlockArgs& args) const { active_kernels().descend_block(args, parallel_for()); }
  void dequantize(const DequantizeArgs& args, const char*) const { active_kernels().dequantize(args, parallel_for()); }

  void linear(LinearCall<Cpu>& call, Operand<Cpu>& t, const Tensor& y, bool approximate) const {
    LinearArgs args = call.args(y);
    args.bias = call.bias.fp32();
    args.t = t.fp32();
    args.lora_b = call.lora_b.fp32();
    const Kernels& kernels = active_kernels();
    (approximate ? kernels.linear_approximate : kernels.linear)(args, parallel_for());
  }

  void linear_grad_input(GradInputCall<Cpu>& call, const Tensor& grad_x) const {
    LinearGradInputArgs args = call.args(grad_x);
    args.grad_t = call.grad_t.fp32();
    args.lora_a = call.lora_a.fp32();
    active_kernels().linear_grad_input(args, parallel_for());
  }

  void step(const OptimizerStepArgs& args) const { active_kernels().step(args, parallel_for()); }
  void sum_of_squares(const SumOfSquaresArgs& args) const { active_kernels().sum_of_squares(args, parallel_for()); }

  const Tensor& like;
};

// Where each expert's rows begin, and where the last one's end.
std::vector<int64_t> expert_begins(const Tensor& expert_ends, const Tensor& rows, const char* name) {
  STD_TORCH_CHECK(rows.dim() == 2, name, ": expected 2 dimensions, got ", rows.dim());
  check(expert_ends, "expert_ends", ScalarType::Int, expert_ends.numel(), rows);
  const Tensor ends = as_contiguous(expert_ends);
  std::vector<int64_t> begins{0};
  for (int64_t e = 0; e < ends.numel(); ++e) {
    begins.push_back(static_cast<const int32_t*>(ends.data_ptr())[e]);
    STD_TORCH_CHECK(begins[e] <= begins[e + 1], "expert_ends: expected numbers that do not decrease, got ", begins[e],
                    " and then ", begins[e + 1]);
  }
  STD_TORCH_CHECK(begins.back() == rows.size(0), "expert_ends: expected the last to be ", rows.size(0),
                  ", the rows, got ", begins.back());
  return begins;
}

const float* at(const float* operand, int64_t i) { return operand ? operand + i : nullptr; }

// linear by expert: one product after the other, each shared among all threads.
Tensor grouped_linear(Tensor x, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                      std::optional<Tensor> offset, std::string spec, Tensor expert_ends, int64_t out_features,
                      std::optional<Tensor> bias, std::optional<Tensor> t, std::optional<Tensor> lora_b,
                      double scaling) {
  const std::vector<int64_t> begins = expert_begins(expert_ends, x, "x");
  const int64_t rank = rank_of(t, lora_b, "t, lora_b", "t"), experts = expert_ends.numel();
  STD_TORCH_CHECK(!t || t->dim() == 2, "t: expected 2 dimensions, got ", t ? t->dim() : 0);
  const Cpu device(x);
  LinearCall<Cpu> call(device, x, packed, absmax, group_scales, offset, spec, out_features, bias, lora_b, rank, scaling,
                       experts);
  Operand<Cpu> t_operand(device, x, t, "t", product(call.m, rank, "t"));
  Tensor y = device.empty(with_last(x, out_features), x.scalar_type());
  LinearArgs all = call.args(y);
  all.t = t_operand.fp32();
  const float *bias_values = call.bias.fp32(), *lora_b_values = call.lora_b.fp32();
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t row = begins[e];
    LinearArgs args = cpu::rows_of(all, row, begins[e + 1] - row);
    args.bias = at(bias_values, e * call.n);
    args.lora_b = at(lora_b_values, e * call.n * rank);
    args.first_row = e * call.n;
    active_kernels().linear(args, parallel_for());
  }
  return y;
}

Tensor grouped_linear_grad_input(Tensor grad, Tensor packed, Tensor absmax, std::optional<Tensor> group_scales,
                                 std::optional<Tensor> offset, std::string spec, Tensor expert_ends,
                                 int64_t in_features, std::optional<Tensor> grad_t, std::optional<Tensor> lora_a) {
  const std::vector<int64_t> begins = expert_begins(expert_ends, grad, "grad");
  const int64_t experts = expert_ends.numel();
  STD_TORCH_CHECK(!grad_t || grad_t->dim() == 2, "grad_t: expected 2 dimensions, got ", grad_t ? grad_t->dim() : 0);
  const Cpu device(grad);
  GradInputCall<Cpu> call(device, grad, packed, absmax, group_scales, offset, spec, in_features, grad_t, lora_a,
                          experts);
  Tensor grad_x = device.empty(with_last(grad, in_features), grad.scalar_type());
  LinearGradInputArgs all = call.args(grad_x);
  all.grad_t = call.grad_t.fp32();
  const float* lora_a_values = call.lora_a.fp32();
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t row = begins[e];
    LinearGradInputArgs args = cpu::rows_of(all, row, begins[e + 1] - row);
    args.lora_a = at(lora_a_values, e * call.rank * call.k);
    args.first_row = e * call.n;
    active_kernels().linear_grad_input(args, parallel_for());
  }
  return grad_x;
}

std::string cpu_isa() { return active_kernels().isa; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : cpu::available_kernels()) names.emplace_back(kernels->isa);
  return names;
}

void set_cpu_isa(std::string isa) {
  STD_TORCH_CHECK(
      cpu::select_isa(isa.c_str()),
      "isa: expected auto, scalar, avx2, avx512, avx512vnni, avx512bf16, amx or neon, and one that this CPU "
      "has, got ",
      isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, library) {
  implement<Cpu>(library);
  implement_descent<Cpu>(library);
  implement_optim<Cpu>(library);
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
#if defined(Py_GIL_DISABLED)
  // A free-threaded Python turns its lock on again for a module that does not say that it needs none.
  if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  if (module && PyModule_AddStringConstant(module, "cuda_architectures", cuda::architectures()) != 0) Py_CLEAR(module);
  return module;
}

// The ops for CUDA tensors.
//
// The one binary has to load next to a torch without CUDA, so nothing of libtorch_cuda is linked: what is needed of it
// is looked up when a CUDA tensor first comes. Kernels run on torch's current stream; nothing here waits for them.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>

#include "../cuda/kernels.h"
#include "ops.h"
#include "optim.h"

// tests/cuda/stub_bindings.cpp compiles this file for CPU tensors and a namespace of its own.
#if !defined(LOWBIT_CUDA_NAMESPACE)
#define LOWBIT_CUDA_NAMESPACE lowbit
#define LOWBIT_CUDA_KEY CUDA
#endif

namespace {

using namespace lowbit;
using namespace lowbit::bindings;
using lowbit::cuda::Path;
using lowbit::cuda::Plan;
using lowbit::cuda::Stream;

constexpr int64_t kFewestCounters = 4096;

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
  check_call(get(device_index, &stream), "get_current_cuda_stream");
  return static_cast<Stream>(stream);
}

// Counters for a kernel that is launched next on `stream`: zeros, which it leaves as zeros, so that they are filled
// once. Each stream has its own, since another stream's kernels run at the same time. So may a graph, on any stream:
// one that is being captured gets counters of its own, and fills them itself.
Tensor zeroed_counters(const Tensor& like, Stream stream, int64_t count) {
  const auto zeros = [&like](int64_t size) {
    Tensor made = torch::stable::new_empty(like, IntHeaderOnlyArrayRef(&size, 1), ScalarType::Int);
    torch::stable::zero_(made);
    return made;
  };
  if (cuda::is_capturing(stream)) return zeros(count);
  static std::mutex mutex;
  // Never destroyed: at exit torch's allocator may be gone before.
  static auto& kept = *new std::map<std::pair<int32_t, Stream>, Tensor>;
  const std::lock_guard lock(mutex);
  const auto [found, is_new] = kept.try_emplace({like.get_device_index(), stream});
  if (is_new || found->second.numel() < count) found->second = zeros(std::max(count, kFewestCounters));
  return found->second;
}

// Where kernels run: while this lives, the device of the tensors is the current one.
class Cuda {
 public:
  explicit Cuda(const Tensor& like)
      : like_(like), guard_(like.get_device_index()), stream_(current_stream(like.get_device_index())) {}

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    return torch::stable::new_empty(like_, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
  }

  Tensor to_fp32(const Tensor& tensor) const { return torch::stable::to(tensor, ScalarType::Float); }

  void quantize(const QuantizeArgs& args) const { check_launch(cuda::quantize(args, stream_), "quantize"); }
  void quantize_scales(const QuantizeScalesArgs& args) const {
    check_launch(cuda::quantize_scales(args, stream_), "quantize_scales");
  }
  void search_scales(const SearchScalesArgs& args) const {
    check_launch(cuda::search_scales(args, stream_), "search_scales");
  }
  void encode(const EncodeArgs& args) const { check_launch(cuda::encode(args, stream_), "encode"); }
  void dequantize(const DequantizeArgs& args, const char* op) const {
    check_launch(cuda::dequantize(args, stream_), op);
  }

  void step(const OptimizerStepArgs& args) const {
    check_launch(cuda::optimizer_step(args, stream_), "optimizer_step");
  }
  void sum_of_squares(const SumOfSquaresArgs& args) const {
    const Tensor partial_sums = empty({cuda::kMostSumBlocks}, ScalarType::Double);
    check_launch(cuda::sum_of_squares(args, static_cast<double*>(partial_sums.data_ptr()), stream_), "sum_of_squares");
  }

  // Nothing is faster than the exact product.
  void linear(LinearCall<Cuda>& call, Operand<Cuda>& t, const Tensor& y, bool /*approximate*/) const {
    LinearArgs args = call.args(y);
    const Plan plan = cuda::plan_linear(args, cuda::current_gpu());
    if (plan.path != Path::decode) {
      args.bias = call.bias.fp32();
      args.t = t.fp32();
      args.lora_b = call.lora_b.fp32();
      const std::optional<Tensor> workspace = workspace_of(plan, &args.workspace);
      const std::optional<Tensor> counters = counters_of(plan, &args.counters);
      return check_launch(cuda::linear(args, plan, stream_), "linear");
    }
    // LoRA's product first, into y: that of x adds it to its own fp32 sums.
    const ScalarType type = y.scalar_type();
    const Tensor out = reshaped(y, call.m, call.n);
    std::optional<Tensor> addend;
    if (call.bias) addend = converted(*call.bias, type);
    if (t && call.rank > 0) {
      const auto [low, up] = rounded_factors(reshaped(*t, call.m, call.rank), reshaped(*call.lora_b, call.n, call.rank),
                                             false, type, call.scaling, "linear");
      multiply(low, up, addend, out);
      addend = out;
    }
    multiply(reshaped(call.x, call.m, call.k), decoded(args.weight, call.n, call.k, type, "linear"), addend, out);
  }

  void linear_grad_input(GradInputCall<Cuda>& call, const Tensor& grad_x) const {
    LinearGradInputArgs args = call.args(grad_x);
    const Plan plan = cuda::plan_grad_input(args, cuda::current_gpu());
    constexpr const char* kOp = "linear_grad_input";
    if (plan.path != Path::decode) {
      args.grad_t = call.grad_t.fp32();
      args.lora_a = call.lora_a.fp32();
      const std::optional<Tensor> workspace = workspace_of(plan, &args.workspace);
      const std::optional<Tensor> counters = counters_of(plan, &args.counters);
      return check_launch(cuda::linear_grad_input(args, plan, stream_), kOp);
    }
    // LoRA's product first, as in linear.
    const ScalarType type = grad_x.scalar_type();
    const Tensor out = reshaped(grad_x, call.m, call.k);
    std::optional<Tensor> addend;
    if (call.rank > 0) {
      const auto [low, up] = rounded_factors(reshaped(*call.grad_t, call.m, call.rank),
                                             reshaped(*call.lora_a, call.rank, call.k), true, type, 1, kOp);
      multiply(low, torch::stable::transpose(up, 0, 1), {}, out);
      addend = out;
    }
    const Tensor dense = decoded(args.weight, call.n, call.k, type, kOp);
    multiply(reshaped(call.grad, call.m, call.n), torch::stable::transpose(dense, 0, 1), addend, out);
  }

 private:
  static void check_launch(int code, const char* op) {
    STD_TORCH_CHECK(code == 0, op, ": CUDA error ", code, ", ", cuda::error_message(code),
                    " (lowbit was compiled for the architectures ", cuda::architectures(),
                    "; LOWBIT_CUDA_ARCHS names others)");
  }

  std::optional<Tensor> workspace_of(const Plan& plan, float** data) const {
    if (plan.workspace == 0) return {};
    Tensor workspace = empty({plan.workspace}, ScalarType::Float);
    *data = static_cast<float*>(workspace.data_ptr());
    return workspace;
  }

  std::optional<Tensor> counters_of(const Plan& plan, uint32_t** data) const {
    if (plan.counters == 0) return {};
    Tensor counters = zeroed_counters(like_, stream_, plan.counters);
    *data = static_cast<uint32_t*>(counters.data_ptr());
    return counters;
  }

  Tensor decoded(const QuantizedWeight& weight, int64_t rows, int64_t columns, ScalarType type, const char* op) const {
    Tensor dense = empty({rows, columns}, type);
    dequantize({weight, dense.data_ptr(), dtype_of(type, op)}, op);
    return dense;
  }

  // low[m, rank] and up, which is [n, rank] or the transpose of that, both contiguous: so that their product becomes
  // that times scaling, rounded to `type` for cuBLAS.
  std::pair<Tensor, Tensor> rounded_factors(const Tensor& low, const Tensor& up, bool is_transposed, ScalarType type,
                                            double scaling, const char* op) const {
    const bool are_of_type = low.scalar_type() == type && up.scalar_type() == type;
    if (are_of_type && scaling == 1 && type != ScalarType::Half) return {low, up};
    const int64_t m = low.size(0), rank = low.size(1), n = up.size(is_transposed ? 1 : 0);
    const Dtype low_dtype = dtype_of(low.scalar_type(), op), up_dtype = dtype_of(up.scalar_type(), op);
    const Tensor low_out = empty({m, rank}, type), up_out = empty({up.size(0), up.size(1)}, type);
    check_launch(
        cuda::rounded_factors({float_data(low, low_dtype, op), low_dtype, float_data(up, up_dtype, op), up_dtype,
                               is_transposed ? 1 : rank, is_transposed ? n : 1, static_cast<float>(scaling), m, n, rank,
                               low_out.data_ptr(), up_out.data_ptr(), dtype_of(type, op)},
                              stream_),
        op);
    return {low_out, up_out};
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LOWBIT_CUDA_NAMESPACE, LOWBIT_CUDA_KEY, library) {
  implement<Cuda>(library);
  implement_optim<Cuda>(library);
}

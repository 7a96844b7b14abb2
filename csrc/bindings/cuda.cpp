// The ops for CUDA tensors.
//
// The one binary has to load next to a torch without CUDA, so nothing of libtorch_cuda is linked: what is needed of it
// is looked up when a CUDA tensor first comes. Kernels run on torch's current stream; nothing here waits for them.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <span>

#include "../cuda/kernels.h"
#include "descent.h"
#include "lora.h"
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
using lowbit::cuda::Gpu;
using lowbit::cuda::Path;
using lowbit::cuda::Plan;
using lowbit::cuda::Stream;

constexpr int64_t kFewestCounters = 4096;

// Functions of torch that this file is not linked to. A weak symbol would stay null: Python loads torch's libraries out
// of the sight of other extensions, and only by its handle can a library that is not linked be asked.
template <class Function>
Function of_torch(const char* name) {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, name) : nullptr;
  STD_TORCH_CHECK(found, "lowbit: this torch has no ", name,
                  " (libtorch_cuda.so is not loaded, or of another version)");
  return reinterpret_cast<Function>(found);
}

// torch's current stream of a device.
Stream current_stream(int32_t device_index) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = of_torch<Get>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  check_call(get(device_index, &stream), "get_current_cuda_stream");
  return static_cast<Stream>(stream);
}

// out[m, n] = alpha a[m, k] b[k, n] (+ addend) by torch, that is by cuBLAS. The addend is a bias [n], or [m, n] and may
// be out. Not by torch's dispatcher: autocast, which may be on in a backward, changes what most of its ops compute in.
void multiply(const Tensor& a, const Tensor& b, const std::optional<Tensor>& addend, const Tensor& out,
              double alpha = 1) {
  using Addmm =
      AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  static const Addmm addmm = of_torch<Addmm>("aoti_torch_cuda_addmm_out");
  const Tensor& added = addend ? *addend : out;
  check_call(addmm(out.get(), added.get(), a.get(), b.get(), addend ? 1 : 0, alpha), "addmm");
}

Tensor transposed(const Tensor& contiguous, int64_t rows, int64_t columns) {
  return matrix_of(contiguous, columns, rows, 1, columns);
}

// Some rows of a weight [n, k], which begin with a group of scales.
QuantizedWeight rows_of(const QuantizedWeight& weight, int64_t first, int64_t count, int64_t k) {
  QuantizedWeight part = weight;
  const int64_t block = first * k / weight.block_size;
  part.packed += weight.format->packed_bytes(first * k);
  part.numel = count * k;
  Scales& scales = part.scales;
  if (scales.values) scales.values += block;
  if (scales.codes) scales.codes += block, scales.group_scales += block / kGroupSize;
  return part;
}

// Counters for a kernel that is launched next on `stream`: zeros, which it leaves as zeros, so that they are filled
// once. Each stream has its own, since another stream's kernels run at the same time. So may a graph, on any stream:
// one that is being captured gets counters of its own, and fills them itself.
Tensor zeroed_counters(const Tensor& like, Stream stream, int64_t count) {
  const auto zeros = [&like](int64_t size) {
    const Tensor made = empty_beside(like, {size}, ScalarType::Int);
    check_call(aoti_torch_zero_(made.get()), "zero_");
    return made;
  };
  if (cuda::capture_id(stream) != 0) return zeros(count);
  static std::mutex mutex;
  // Never destroyed: at exit torch's allocator may be gone before.
  static auto& kept = *new std::map<std::pair<int32_t, Stream>, Tensor>;
  const std::lock_guard lock(mutex);
  const auto [found, is_new] = kept.try_emplace({like.get_device_index(), stream});
  if (is_new || found->second.numel() < count) found->second = zeros(std::max(count, kFewestCounters));
  return found->second;
}

// The graph that is being captured on torch's stream of x's device; 0: none.
int64_t capture_id(Tensor x) { return static_cast<int64_t>(cuda::capture_id(current_stream(x.get_device_index()))); }

// Where kernels run: while this lives, the device of the tensors is the current one.
class Cuda {
 public:
  explicit Cuda(const Tensor& like)
      : like_(like), guard_(like.get_device_index()), stream_(current_stream(like.get_device_index())) {}

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const { return empty_beside(like_, sizes, type); }

  Tensor to_fp32(const Tensor& tensor) const { return copied(tensor, ScalarType::Float); }

  void quantize(const QuantizeArgs& args) const { check_launch(cuda::quantize(args, stream_), "quantize"); }
  void quantize_scales(const QuantizeScalesArgs& args) const {
    check_launch(cuda::quantize_scales(args, stream_), "quantize_scales");
  }
  void search_scales(const SearchScalesArgs& args) const {
    check_launch(cuda::search_scales(args, stream_), "search_scales");
  }
  void encode(const EncodeArgs& args) const { check_launch(cuda::encode(args, stream_), "encode"); }
  void gptq_block(const GptqBlockArgs& args) const { check_launch(cuda::gptq_block(args, stream_), "gptq_block"); }
  void descend_block(const DescendBlockArgs& args) const {
    check_launch(cuda::descend_block(args, stream_), "descend_block");
  }
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
    linear(call, nullptr, t, y);
  }

  // With lora_a, t is written: t = x lora_a^T; and so is the t of each of `others`.
  void linear(LinearCall<Cuda>& call, const Operand<Cuda>* lora_a, Operand<Cuda>& t, const Tensor& y,
              std::span<const OtherDown<Cuda>> others = {}) const {
    LinearArgs args = call.args(y);
    const Gpu gpu = cuda::current_gpu();
    const Plan plan = cuda::plan_linear(args, gpu);
    constexpr const char* kOp = "linear";
    const bool decodes = plan.path == Path::decode, has_lora = t && call.rank > 0;
    if (has_lora && (decodes || lora_a)) {
      // For a weight that is decoded LoRA's product comes first, into y: that of x adds it to its own fp32 sums.
      LowRankProduct lora{.m = call.m, .rank = call.rank, .t = &t};
      if (lora_a) lora.read(call.x, call.k, *lora_a, false, 1);
      lora.others = others;
      if (decodes) lora.write(y, call.n, call.lora_b, false, call.scaling, &call.bias);
      multiply_low_rank(lora, call.dtype, gpu, kOp);
    }
    if (!decodes) {
      args.bias = call.bias.fp32();
      args.t = t.fp32();
      args.lora_b = call.lora_b.fp32();
      const std::optional<Tensor> workspace = workspace_of(plan, &args.workspace);
      const std::optional<Tensor> counters = counters_of(plan, &args.counters);
      return check_launch(cuda::linear(args, plan, stream_), kOp);
    }
    const int64_t m = call.m, n = call.n, k = call.k, most = cuda::decoded_rows(args.weight, call.dtype, m, n, k, gpu);
    const Tensor x = matrix_of(call.x, m, k), dense = empty({std::min(most, n), k}, y.scalar_type());
    const std::optional<Tensor> bias =
        call.bias && !has_lora ? std::optional(converted(*call.bias, y.scalar_type())) : std::nullopt;
    for (int64_t row = 0; row < n; row += most) {
      const int64_t rows = std::min(most, n - row);
      dequantize({rows_of(args.weight, row, rows, k), dense.data_ptr(), call.dtype}, kOp);
      const Tensor out = matrix_of(y, m, rows, n, 1, row);
      const std::optional<Tensor> addend = has_lora ? out : bias ? std::optional(elements_of(*bias, row, rows)) : bias;
      multiply(x, transposed(dense, rows, k), addend, out);
    }
  }

  void linear_grad_input(GradInputCall<Cuda>& call, const Tensor& grad_x) const {
    linear_grad_input(call, nullptr, 1, grad_x);
  }

  // With lora_b, grad_t is written: grad_t = scaling grad lora_b.
  void linear_grad_input(GradInputCall<Cuda>& call, const Operand<Cuda>* lora_b, double scaling,
                         const Tensor& grad_x) const {
    LinearGradInputArgs args = call.args(grad_x);
    const Gpu gpu = cuda::current_gpu();
    const Plan plan = cuda::plan_grad_input(args, gpu);
    constexpr const char* kOp = "linear_grad_input";
    const bool decodes = plan.path == Path::decode, has_lora = call.grad_t && call.rank > 0;
    if (has_lora && (decodes || lora_b)) {
      LowRankProduct lora{.m = call.m, .rank = call.rank, .t = &call.grad_t};
      if (lora_b) lora.read(call.grad, call.n, *lora_b, true, scaling);
      if (decodes) lora.write(grad_x, call.k, call.lora_a, true, 1, nullptr);
      multiply_low_rank(lora, call.dtype, gpu, kOp);
    }
    if (!decodes) {
      args.grad_t = call.grad_t.fp32();
      args.lora_a = call.lora_a.fp32();
      const std::optional<Tensor> workspace = workspace_of(plan, &args.workspace);
      const std::optional<Tensor> counters = counters_of(plan, &args.counters);
      return check_launch(cuda::linear_grad_input(args, plan, stream_), kOp);
    }
    const int64_t m = call.m, n = call.n, k = call.k;
    const int64_t most = cuda::decoded_columns(args.weight, call.dtype, m, n, k, gpu);
    const Tensor grad = matrix_of(call.grad, m, n), dense = empty({n, std::min(most, k)}, grad_x.scalar_type());
    for (int64_t column = 0; column < k; column += most) {
      const int64_t columns = std::min(most, k - column);
      if (columns == k) {
        dequantize({args.weight, dense.data_ptr(), call.dtype}, kOp);
      } else {
        check_launch(cuda::dequantize_columns({args.weight, k, column, columns, dense.data_ptr(), call.dtype}, stream_),
                     kOp);
      }
      const Tensor out = matrix_of(grad_x, m, columns, k, 1, column);
      multiply(grad, matrix_of(dense, n, columns), has_lora ? std::optional(out) : std::nullopt, out);
    }
  }

  // t[m, rank] = scale x[m, k] down^T
  void lora_down(const Tensor& x, int64_t m, int64_t k, int64_t rank, const Operand<Cuda>& down, bool is_transposed,
                 double scale, Operand<Cuda>& t) const {
    LowRankProduct lora{.m = m, .rank = rank, .t = &t};
    lora.read(x, k, down, is_transposed, scale);
    multiply_low_rank(lora, dtype_of(x.scalar_type(), "x"), cuda::current_gpu(), "lora_down");
  }

  // y[m, n] = scale t[m, rank] up^T + bias
  void lora_up(Operand<Cuda>& t, int64_t m, int64_t n, int64_t rank, Operand<Cuda>& up, bool is_transposed,
               double scale, Operand<Cuda>& bias, const Tensor& y) const {
    LowRankProduct lora{.m = m, .rank = rank, .t = &t};
    lora.write(y, n, up, is_transposed, scale, &bias);
    multiply_low_rank(lora, dtype_of(y.scalar_type(), "dtype"), cuda::current_gpu(), "lora_up");
  }

  // out[w, rank] = scale wide[m, w]^T low[m, rank], low in fp32; or out is the transpose of that.
  void lora_outer(const Tensor& wide, const Tensor& low, int64_t m, int64_t w, int64_t rank, double scale,
                  const Tensor& out, bool is_transposed) const {
    constexpr const char* kOp = "lora_outer";
    const Gpu gpu = cuda::current_gpu();
    const Dtype dtype = dtype_of(wide.scalar_type(), kOp), out_dtype = dtype_of(out.scalar_type(), kOp);
    const LoraOuterArgs args{.wide = float_data(wide, dtype, kOp),
                             .dtype = dtype,
                             .low = aligned<float>(low, kOp),
                             .scale = static_cast<float>(scale),
                             .out = out.data_ptr(),
                             .out_dtype = out_dtype,
                             .out_wide_stride = is_transposed ? 1 : rank,
                             .out_rank_stride = is_transposed ? w : 1,
                             .m = m,
                             .w = w,
                             .rank = rank};
    if (cuda::lora_fits(args, gpu)) return check_launch(cuda::lora_outer(args, gpu, stream_), kOp);
    const Tensor wide_rows = matrix_of(converted(wide, ScalarType::Float), m, w), low_rows = matrix_of(low, m, rank);
    const Tensor sums = out_dtype == Dtype::f32 ? out : empty({w * rank}, ScalarType::Float);
    if (is_transposed) {
      multiply(transposed(low_rows, m, rank), wide_rows, {}, matrix_of(sums, rank, w), scale);
    } else {
      multiply(transposed(wide_rows, m, w), low_rows, {}, matrix_of(sums, w, rank), scale);
    }
    if (out_dtype != Dtype::f32) copy(matrix_of(sums, out.size(0), out.size(1)), out);
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

  // LoRA's two products, or one of them: t[m, rank] = t_scale x down^T, and y = up_scale t up^T + bias.
  struct LowRankProduct {
    int64_t m, rank;
    Operand<Cuda>* t;
    const Tensor* x = nullptr;
    int64_t k = 0;
    const Operand<Cuda>* down = nullptr;  // [rank, k], or the transpose of that
    bool down_is_transposed = false;
    double t_scale = 1;
    const Tensor* y = nullptr;
    int64_t n = 0;
    Operand<Cuda>* up = nullptr;  // [n, rank], or the transpose of that
    bool up_is_transposed = false;
    double up_scale = 1;
    Operand<Cuda>* bias = nullptr;
    std::span<const OtherDown<Cuda>> others;  // more t from x; their factors are as down

    void read(const Tensor& of_x, int64_t of_k, const Operand<Cuda>& of_down, bool is_transposed, double scale) {
      x = &of_x, k = of_k, down = &of_down, down_is_transposed = is_transposed, t_scale = scale;
    }
    void write(const Tensor& of_y, int64_t of_n, Operand<Cuda>& of_up, bool is_transposed, double scale,
               Operand<Cuda>* of_bias) {
      y = &of_y, n = of_n, up = &of_up, up_is_transposed = is_transposed, up_scale = scale, bias = of_bias;
    }
  };

  // In one launch, without a copy of x. fp32, GPUs before sm_80 and very large ranks: by torch's products, in fp32.
  void multiply_low_rank(const LowRankProduct& lora, Dtype dtype, const Gpu& gpu, const char* op) const {
    const int64_t m = lora.m, n = lora.n, k = lora.k, rank = lora.rank;
    float* const t_data = const_cast<float*>(lora.t->fp32());
    const float* const bias = lora.bias ? lora.bias->fp32() : nullptr;
    LoraProductArgs args{.dtype = dtype, .t = t_data, .bias = bias, .m = m, .n = n, .k = k, .rank = rank};
    if (lora.x) {
      args.x = float_data(*lora.x, dtype, op);
      args.down = lora.down->matrix(rank, k, lora.down_is_transposed);
      args.t_scale = static_cast<float>(lora.t_scale);
      for (const OtherDown<Cuda>& other : lora.others)
        args.others[args.other_count++] = {other.lora_a.matrix(rank, k, lora.down_is_transposed).data,
                                           static_cast<float*>(other.t.data_ptr())};
    }
    if (lora.y) {
      args.y = lora.y->data_ptr();
      args.up = lora.up->matrix(n, rank, lora.up_is_transposed);
      args.up_scale = static_cast<float>(lora.up_scale);
    }
    if (cuda::lora_fits(args, gpu)) return check_launch(cuda::lora_product(args, gpu, stream_), op);
    const Tensor t = matrix_of(**lora.t, m, rank);
    if (lora.x) {
      const Tensor x = matrix_of(converted(*lora.x, ScalarType::Float), m, k);
      const auto multiply_down = [&](const Operand<Cuda>& of_down, const Tensor& out) {
        const Tensor down = converted(*of_down, ScalarType::Float);  // [rank, k]^T for the product
        multiply(x, lora.down_is_transposed ? matrix_of(down, k, rank) : transposed(down, rank, k), {}, out,
                 lora.t_scale);
      };
      multiply_down(*lora.down, t);
      for (const OtherDown<Cuda>& other : lora.others) multiply_down(other.lora_a, matrix_of(other.t, m, rank));
    }
    if (!lora.y) return;
    const Tensor up = converted(**lora.up, ScalarType::Float);
    const Tensor y = matrix_of(*lora.y, m, n), sums = dtype == Dtype::f32 ? y : empty({m, n}, ScalarType::Float);
    const std::optional<Tensor> addend = bias ? std::optional(**lora.bias) : std::nullopt;
    multiply(t, lora.up_is_transposed ? matrix_of(up, rank, n) : transposed(up, n, rank), addend, sums, lora.up_scale);
    if (dtype != Dtype::f32) copy(sums, y);
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(LOWBIT_CUDA_NAMESPACE, LOWBIT_CUDA_KEY, library) {
  implement<Cuda>(library);
  implement_descent<Cuda>(library);
  implement_lora<Cuda>(library);
  library.impl("capture_id", TORCH_BOX(&capture_id));
  implement_optim<Cuda>(library);
}

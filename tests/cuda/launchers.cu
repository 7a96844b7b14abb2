// The launchers under C names and with plain arguments, for ctypes. format: 0 nf4, 1 fp4, 2 int8; dtype: Dtype.
#include "cuda/kernels.h"

using namespace lowbit;

static const Format* format_of(int format) { return kFormats[format]; }

// The view of a weight: double-quantized where scale_codes are given, in a format that has scales of blocks.
static QuantizedWeight weight_of(const uint8_t* packed, const float* absmax, const uint8_t* scale_codes,
                                 const float* group_scales, const float* offset, int format, int64_t block_size,
                                 int64_t numel) {
  const ScaleKind kind = format_of(format)->has_row_scales ? ScaleKind::row
                         : scale_codes                     ? ScaleKind::double_quant
                                                           : ScaleKind::block;
  return {packed, {kind, absmax, scale_codes, group_scales, offset}, format_of(format), block_size, numel};
}

extern "C" {

int lowbit_forget_gpus() {
  cuda::forget_gpus();
  return 0;
}

int lowbit_quantize(const void* weight, int dtype, int64_t numel, int format, int64_t block_size, uint8_t* packed,
                    float* absmax, void* stream) {
  return cuda::quantize({weight, static_cast<Dtype>(dtype), numel, format_of(format), block_size,
                         ceil_div(numel, block_size), packed, absmax},
                        static_cast<cuda::Stream>(stream));
}

int lowbit_quantize_scales(const float* absmax, const float* offset, int64_t blocks, uint8_t* codes,
                           float* group_scales, void* stream) {
  return cuda::quantize_scales({absmax, offset, blocks, codes, group_scales}, static_cast<cuda::Stream>(stream));
}

int lowbit_quantize_int8(const void* weight, int dtype, int64_t rows, int64_t columns, uint8_t* codes, float* absmax,
                         void* stream) {
  return cuda::quantize({weight, static_cast<Dtype>(dtype), rows * columns, &kInt8, columns, rows, codes, absmax},
                        static_cast<cuda::Stream>(stream));
}

int lowbit_search_scales(const void* weight, int dtype, int64_t numel, int format, int64_t block_size,
                         const float* importance, int64_t columns, float* scales, void* stream) {
  return cuda::search_scales(
      {weight, static_cast<Dtype>(dtype), numel, format_of(format), block_size, importance, columns, scales},
      static_cast<cuda::Stream>(stream));
}

int lowbit_encode(const void* weight, int dtype, int64_t numel, int format, int64_t block_size, const float* scales,
                  uint8_t* packed, void* stream) {
  return cuda::encode({weight, static_cast<Dtype>(dtype), numel, format_of(format), block_size, scales, packed},
                      static_cast<cuda::Stream>(stream));
}

int lowbit_gptq_block(const float* weight, const float* factor, const float* candidates, int format, int64_t rows,
                      int64_t columns, int64_t candidate_count, float* decoded, float* errors, int32_t* choice,
                      void* stream) {
  return cuda::gptq_block(
      {weight, factor, candidates, format_of(format), rows, columns, candidate_count, decoded, errors, choice},
      static_cast<cuda::Stream>(stream));
}

int lowbit_descend_block(const float* decoded, const float* gradient, const float* hessian, const float* candidates,
                         int format, int64_t rows, int64_t columns, int64_t candidate_count, int64_t sweeps,
                         float* result, int32_t* choice, void* stream) {
  return cuda::descend_block({decoded, gradient, hessian, candidates, format_of(format), rows, columns, candidate_count,
                              sweeps, result, choice},
                             static_cast<cuda::Stream>(stream));
}

int lowbit_dequantize(const uint8_t* packed, const float* absmax, const uint8_t* scale_codes, const float* group_scales,
                      const float* offset, int format, int64_t block_size, int64_t numel, void* out, int dtype,
                      void* stream) {
  return cuda::dequantize({weight_of(packed, absmax, scale_codes, group_scales, offset, format, block_size, numel), out,
                           static_cast<Dtype>(dtype)},
                          static_cast<cuda::Stream>(stream));
}

int lowbit_dequantize_columns(const uint8_t* packed, const float* absmax, const uint8_t* scale_codes,
                              const float* group_scales, const float* offset, int format, int64_t block_size,
                              int64_t rows, int64_t row_length, int64_t first, int64_t count, void* out, int dtype,
                              void* stream) {
  const QuantizedWeight weight =
      weight_of(packed, absmax, scale_codes, group_scales, offset, format, block_size, rows * row_length);
  return cuda::dequantize_columns({weight, row_length, first, count, out, static_cast<Dtype>(dtype)},
                                  static_cast<cuda::Stream>(stream));
}

// A product's arguments as C++ has them, from plain ones.
static LinearArgs linear_args(const void* x, int dtype, const uint8_t* packed, const float* absmax,
                              const uint8_t* scale_codes, const float* group_scales, const float* offset, int format,
                              int64_t block_size, const float* bias, const float* t, const float* lora_b, float scaling,
                              int64_t m, int64_t n, int64_t k, int64_t rank, void* y, float* workspace) {
  return {x,
          static_cast<Dtype>(dtype),
          weight_of(packed, absmax, scale_codes, group_scales, offset, format, block_size, n * k),
          bias,
          t,
          lora_b,
          scaling,
          m,
          n,
          k,
          rank,
          y,
          0,
          workspace};
}

// sizes: how many floats of workspace and how many counters the launcher wants; with y null nothing is launched.
int lowbit_linear_gemv(const void* x, int dtype, const uint8_t* packed, const float* absmax, const uint8_t* scale_codes,
                       const float* group_scales, const float* offset, int format, int64_t block_size,
                       const float* bias, const float* t, const float* lora_b, float scaling, int64_t m, int64_t n,
                       int64_t k, int64_t rank, void* y, float* workspace, uint32_t* counters, int64_t* sizes,
                       void* stream) {
  LinearArgs args = linear_args(x, dtype, packed, absmax, scale_codes, group_scales, offset, format, block_size, bias,
                                t, lora_b, scaling, m, n, k, rank, y, workspace);
  args.counters = counters;
  const cuda::Plan plan = cuda::plan_gemv(args, cuda::current_gpu());
  sizes[0] = plan.workspace;
  sizes[1] = plan.counters;
  return y ? cuda::linear(args, plan, static_cast<cuda::Stream>(stream)) : 0;
}

// sizes: where to write how many floats of workspace and how many counters are needed; with grad_x null nothing is
// launched.
int lowbit_linear_grad_input(const void* grad, int dtype, const uint8_t* packed, const float* absmax,
                             const uint8_t* scale_codes, const float* group_scales, const float* offset, int format,
                             int64_t block_size, const float* grad_t, const float* lora_a, int64_t m, int64_t n,
                             int64_t k, int64_t rank, void* grad_x, float* workspace, uint32_t* counters,
                             int64_t* sizes, void* stream) {
  const LinearGradInputArgs args{
      grad,
      static_cast<Dtype>(dtype),
      weight_of(packed, absmax, scale_codes, group_scales, offset, format, block_size, n * k),
      grad_t,
      lora_a,
      m,
      n,
      k,
      rank,
      grad_x,
      0,
      workspace,
      counters};
  const cuda::Plan plan = cuda::plan_grad_input_kernel(args, cuda::current_gpu());
  sizes[0] = plan.workspace, sizes[1] = plan.counters;
  return grad_x ? cuda::linear_grad_input(args, plan, static_cast<cuda::Stream>(stream)) : 0;
}

int lowbit_linear_gemm(const void* x, int dtype, const uint8_t* packed, const float* absmax, const uint8_t* scale_codes,
                       const float* group_scales, const float* offset, int format, int64_t block_size,
                       const float* bias, const float* t, const float* lora_b, float scaling, int64_t m, int64_t n,
                       int64_t k, int64_t rank, void* y, float* workspace, uint32_t* counters, void* stream) {
  LinearArgs args = linear_args(x, dtype, packed, absmax, scale_codes, group_scales, offset, format, block_size, bias,
                                t, lora_b, scaling, m, n, k, rank, y, workspace);
  args.counters = counters;
  return cuda::linear(args, cuda::plan_gemm(args, cuda::current_gpu()), static_cast<cuda::Stream>(stream));
}

// How many floats linear_gemm needs, and *counters; -1 where it does not serve.
int64_t lowbit_linear_gemm_workspace(const void* x, int dtype, const uint8_t* packed, int format, int64_t block_size,
                                     int64_t m, int64_t n, int64_t k, int64_t* counters) {
  const LinearArgs args = linear_args(x, dtype, packed, nullptr, nullptr, nullptr, nullptr, format, block_size, nullptr,
                                      nullptr, nullptr, 0, m, n, k, 0, nullptr, nullptr);
  if (!cuda::gemm_fits(args)) return -1;
  const cuda::Plan plan = cuda::plan_gemm(args, cuda::current_gpu());
  *counters = plan.counters;
  return plan.workspace;
}

int lowbit_lora_product(const void* x, int dtype, const void* down, int down_dtype, int64_t down_row_stride,
                        int64_t down_column_stride, float t_scale, float* t, const void* up, int up_dtype,
                        int64_t up_row_stride, int64_t up_column_stride, float up_scale, const float* bias, void* y,
                        int64_t m, int64_t n, int64_t k, int64_t rank, void* stream) {
  const LoraProductArgs args{x,
                             static_cast<Dtype>(dtype),
                             {down, static_cast<Dtype>(down_dtype), down_row_stride, down_column_stride},
                             t_scale,
                             t,
                             {up, static_cast<Dtype>(up_dtype), up_row_stride, up_column_stride},
                             up_scale,
                             bias,
                             y,
                             m,
                             n,
                             k,
                             rank};
  return cuda::lora_product(args, cuda::current_gpu(), static_cast<cuda::Stream>(stream));
}

int lowbit_lora_outer(const void* wide, int dtype, const float* low, float scale, void* out, int out_dtype,
                      int64_t out_wide_stride, int64_t out_rank_stride, int64_t m, int64_t w, int64_t rank,
                      void* stream) {
  return cuda::lora_outer({wide, static_cast<Dtype>(dtype), low, scale, out, static_cast<Dtype>(out_dtype),
                           out_wide_stride, out_rank_stride, m, w, rank},
                          cuda::current_gpu(), static_cast<cuda::Stream>(stream));
}

}  // extern "C"

// gptq_block and descend_block: codes and the scale of one block of columns, chosen under a Hessian.
//
// A thread has a row of the weight and takes the reference's steps in the reference's order
// (lowbit/reference_descent.py), so that every backend chooses the same, bit for bit. What it knows of each column is
// in shared memory, the lanes' numbers side by side. The matrix of the columns is read by all lanes at once, from the
// L1 cache.
#include "device/encode.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kColumnsAtOnce = 4;  // of GPTQ: their values stay in registers

// A thread's numbers in shared memory, one for each column.
class PerColumn {
 public:
  __device__ __forceinline__ PerColumn(float* shared, int number, int columns)
      : values_(shared + number * columns * blockDim.x + threadIdx.x) {}
  __device__ __forceinline__ float& operator[](int column) const { return values_[column * blockDim.x]; }

 private:
  float* values_;
};

// What decoding makes of the code nearest to a value.
struct NearestValue {
  uint32_t lane_base;
  float scale, inverse;

  __device__ __forceinline__ NearestValue(uint32_t lane_base, float scale)
      : lane_base(lane_base), scale(scale), inverse(inverse_of(scale)) {}
  __device__ __forceinline__ float operator()(float x) const {
    return __fmul_rn(__uint_as_float(CodeTree::find(__fmul_rn(x, inverse), lane_base)), scale);
  }
};

// Rounds a row with one scale, and returns the sum of squared errors. It may stop where that is no longer less than
// `limit`, since it only grows. With kKeeps the decoded row and its errors are stored.
template <bool kKeeps>
__device__ __forceinline__ float round_row(const GptqBlockArgs& args, int64_t row, const NearestValue& nearest,
                                           const PerColumn& minus_errors, float limit) {
  const int columns = static_cast<int>(args.columns);
  const int64_t begin = row * columns;
  float loss = 0.0f;
  for (int first = 0; first < columns && (kKeeps || loss < limit); first += kColumnsAtOnce) {
    float left[kColumnsAtOnce];
#pragma unroll
    for (int c = 0; c < kColumnsAtOnce; ++c) left[c] = args.weight[begin + first + c];
    for (int j = 0; j < first; ++j) {
      const float minus_error = minus_errors[j];
#pragma unroll
      for (int c = 0; c < kColumnsAtOnce; ++c)
        left[c] = __fmaf_rn(minus_error, args.factor[int64_t{j} * columns + first + c], left[c]);
    }
#pragma unroll
    for (int c = 0; c < kColumnsAtOnce; ++c) {
      const int j = first + c;
      const float* factor = args.factor + int64_t{j} * columns;
      const float value = nearest(left[c]);
      const float minus_error = __fmul_rn(__fsub_rn(value, left[c]), __frcp_rn(factor[j]));
      loss = __fmaf_rn(minus_error, minus_error, loss);
      minus_errors[j] = minus_error;
      if (kKeeps) {
        args.decoded[begin + j] = value;
        args.errors[begin + j] = -minus_error;
      }
#pragma unroll
      for (int later = c + 1; later < kColumnsAtOnce; ++later)
        left[later] = __fmaf_rn(minus_error, factor[first + later], left[later]);
    }
  }
  return loss;
}

__global__ void __launch_bounds__(kWarpSize)
    gptq_kernel(const __grid_constant__ GptqBlockArgs args, const __grid_constant__ Format format) {
  extern __shared__ float shared[];
  __shared__ CodeTree tree;
  tree.fill(format, [&](uint8_t code) { return __float_as_uint(format.codebook[code]); });
  __syncthreads();
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;

  const uint32_t lane_base = tree.lane_base(threadIdx.x);
  const PerColumn minus_errors(shared, 0, static_cast<int>(args.columns));
  const float* scales = args.candidates + row * args.candidate_count;
  float least = INFINITY;
  int choice = 0;
  for (int c = 0; c < args.candidate_count; ++c) {
    const float loss = round_row<false>(args, row, {lane_base, scales[c]}, minus_errors, least);
    if (loss < least) {
      least = loss;
      choice = c;
    }
  }
  round_row<true>(args, row, {lane_base, scales[choice]}, minus_errors, INFINITY);
  args.choice[row] = choice;
}

__global__ void __launch_bounds__(kWarpSize)
    descend_kernel(const __grid_constant__ DescendBlockArgs args, const __grid_constant__ Format format) {
  extern __shared__ float shared[];
  __shared__ CodeTree tree;
  tree.fill(format, [&](uint8_t code) { return __float_as_uint(format.codebook[code]); });
  __syncthreads();
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;

  const uint32_t lane_base = tree.lane_base(threadIdx.x);
  const int columns = static_cast<int>(args.columns);
  const PerColumn values(shared, 0, columns), gradient(shared, 1, columns);
  const float *old = args.decoded + row * columns, *old_gradient = args.gradient + row * columns;
  float* result = args.result + row * columns;
  const float* scales = args.candidates + row * args.candidate_count;
  for (int j = 0; j < columns; ++j) result[j] = old[j];
  float least = 0.0f;
  int choice = 0;
  for (int c = 0; c < args.candidate_count; ++c) {
    const NearestValue nearest(lane_base, scales[c]);
    for (int j = 0; j < columns; ++j) {
      values[j] = old[j];
      gradient[j] = old_gradient[j];
    }
    for (int64_t sweep = 0; sweep < args.sweeps; ++sweep) {
      for (int j = 0; j < columns; ++j) {
        const float* hessian = args.hessian + int64_t{j} * columns;
        const float value = nearest(__fmaf_rn(gradient[j], __frcp_rn(hessian[j]), values[j]));
        const float minus_step = __fsub_rn(values[j], value);
        if (minus_step == 0.0f) continue;
        values[j] = value;
#pragma unroll 8
        for (int i = 0; i < columns; ++i) gradient[i] = __fmaf_rn(minus_step, hessian[i], gradient[i]);
      }
    }
    // By how much the loss changes: c H c^T - 2 c g^T for the change c, since g has become g - c H.
    float loss = 0.0f;
    for (int j = 0; j < columns; ++j)
      loss = __fmaf_rn(__fsub_rn(old[j], values[j]), __fadd_rn(old_gradient[j], gradient[j]), loss);
    if (!(loss < least)) continue;
    least = loss;
    choice = c;
    for (int j = 0; j < columns; ++j) result[j] = values[j];
  }
  args.choice[row] = choice;
}

template <class Args>
int launch(void (*kernel)(Args, Format), const Args& args, int numbers_per_column, Stream stream) {
  if (args.rows == 0) return cudaSuccess;
  const int threads = rows_at_once(args.columns, numbers_per_column);
  const auto bytes = static_cast<size_t>(args.columns) * threads * numbers_per_column * sizeof(float);
  kernel<<<static_cast<unsigned>(ceil_div(args.rows, threads)), threads, bytes, stream>>>(args, *args.format);
  return cudaGetLastError();
}

}  // namespace

int gptq_block(const GptqBlockArgs& args, Stream stream) { return launch(gptq_kernel, args, 1, stream); }

int descend_block(const DescendBlockArgs& args, Stream stream) { return launch(descend_kernel, args, 2, stream); }

}  // namespace lowbit::cuda

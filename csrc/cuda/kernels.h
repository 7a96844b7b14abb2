// The CUDA kernels' launchers: what each computes, on device pointers. Neither torch nor the CUDA headers are needed
// to call them; the bindings check the arguments.
//
// A launcher enqueues its kernel on `stream` of the current device and returns 0, or a CUDA error code; it neither
// allocates nor waits. Pointers need the alignment of their element type only: 16-byte accesses are made where the
// memory has the alignment for them. Element counts have 64 bits.
#pragma once

#include "../arguments.h"
#include "../optim.h"
#include "plan.h"

struct CUstream_st;  // of the CUDA runtime

namespace lowbit::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// The architectures that were compiled for, times 10 and separated by commas: "750,800". Later GPUs of the same
// generation run the code of earlier ones; for newer ones there is PTX of the last.
const char* architectures();

// What an error code means.
const char* error_message(int code);

// The current device. Each is asked once what it is.
Gpu current_gpu();

// Asks again: for tests, in which a device becomes another.
void forget_gpus();

// The graph that what is enqueued on `stream` becomes part of: a number that no other has. 0: none.
uint64_t capture_id(Stream stream);

int quantize(const QuantizeArgs& args, Stream stream);
int quantize_int8(const QuantizeArgs& args, Stream stream);  // which quantize calls
int quantize_scales(const QuantizeScalesArgs& args, Stream stream);
int search_scales(const SearchScalesArgs& args, Stream stream);
int encode(const EncodeArgs& args, Stream stream);
int gptq_block(const GptqBlockArgs& args, Stream stream);
int descend_block(const DescendBlockArgs& args, Stream stream);
int dequantize(const DequantizeArgs& args, Stream stream);
int dequantize_columns(const DequantizeColumnsArgs& args, Stream stream);  // cudaErrorInvalidValue unless columns_fit

// One launch for up to UpdateTable::kCapacity (csrc/cuda/optim.cu) parameters that have elements.
int optimizer_step(const OptimizerStepArgs& args, Stream stream);

// partial_sums: kMostSumBlocks numbers, of any content.
int sum_of_squares(const SumOfSquaresArgs& args, double* partial_sums, Stream stream);

// The products, by the kernel that the plan names (not for Path::decode). The plan is for these arguments and the
// current device; args.workspace has plan.workspace floats, and args.counters plan.counters numbers.
int linear(const LinearArgs& args, const Plan& plan, Stream stream);
int linear_grad_input(const LinearGradInputArgs& args, const Plan& plan, Stream stream);

// What linear consists of.
//   gemv, gemv_int8  for a few rows of x, each group of which reads W once
//   gemm             on tensor cores (sm_80), made for 9 to about 256 rows; any m, n and rank
//   any              whatever does not fit the others
int linear_gemv(const LinearArgs& args, const Plan& plan, Stream stream);
int linear_gemv_int8(const LinearArgs& args, Stream stream);
int linear_gemm(const LinearArgs& args, const Plan& plan, Stream stream);

// LoRA beside a weight that is decoded first. Both take one launch and no workspace, and give the same bits each time.
// cudaErrorNotSupported where lora_fits says no: before sm_80, in fp32, or beyond its sizes. All other sizes, strides
// and alignments are right; plan_lora_product and plan_lora_outer say which are fast.
int lora_product(const LoraProductArgs& args, const Gpu& gpu, Stream stream);
int lora_outer(const LoraOuterArgs& args, const Gpu& gpu, Stream stream);

}  // namespace lowbit::cuda

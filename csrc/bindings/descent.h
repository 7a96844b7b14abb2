// The ops of quantize(..., codes="descent"), once for every device.
//
// Besides what ops.h asks of a Device, this asks for gptq_block(GptqBlockArgs) and descend_block(DescendBlockArgs).
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "checks.h"

namespace lowbit::bindings {

// fp32 [rows, columns].
inline const float* matrix_data(const Tensor& tensor, const char* name, int64_t rows, int64_t columns,
                                const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, ": expected shape [",
                  rows, ", ", columns, "], got ", tensor.dim(), " dimensions and ", tensor.numel(), " elements");
  check(tensor, name, ScalarType::Float, product(rows, columns, name), like);
  return aligned<float>(tensor, name);
}

// What both ops take: a block of columns of some rows, a matrix that belongs to the columns, and scales of each row.
struct BlockOperands {
  BlockOperands(const Tensor& block, const char* name, const Tensor& matrix, const char* matrix_name,
                const Tensor& candidates, const std::string& spec_text)
      : spec(parse_4_bit_spec(spec_text)),
        block(as_contiguous(block)),
        matrix(as_contiguous(matrix)),
        candidates(as_contiguous(candidates)) {
    STD_TORCH_CHECK(block.dim() == 2 && candidates.dim() == 2, name, ", candidates: expected 2 dimensions each, got ",
                    block.dim(), " and ", candidates.dim());
    rows = block.size(0);
    columns = spec.block_size;
    candidate_count = candidates.size(1);
    STD_TORCH_CHECK(candidate_count >= 1, "candidates: expected at least 1 for each row, got 0");
    matrix_data(this->block, name, rows, columns, block);
    matrix_data(this->matrix, matrix_name, columns, columns, block);
    matrix_data(this->candidates, "candidates", rows, candidate_count, block);
  }
  static const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

  const Spec spec;
  const Tensor block, matrix, candidates;
  int64_t rows, columns, candidate_count;
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gptq_block(Tensor weight, Tensor factor, Tensor candidates, std::string spec_text) {
  const BlockOperands operands(weight, "weight", factor, "factor", candidates, spec_text);
  const Device device(weight);
  Tensor decoded = device.empty({operands.rows, operands.columns}, ScalarType::Float);
  Tensor errors = device.empty({operands.rows, operands.columns}, ScalarType::Float);
  Tensor choice = device.empty({operands.rows}, ScalarType::Int);
  device.gptq_block({operands.data(operands.block), operands.data(operands.matrix), operands.data(operands.candidates),
                     operands.spec.format, operands.rows, operands.columns, operands.candidate_count,
                     static_cast<float*>(decoded.data_ptr()), static_cast<float*>(errors.data_ptr()),
                     static_cast<int32_t*>(choice.data_ptr())});
  return {decoded, errors, choice};
}

template <class Device>
std::tuple<Tensor, Tensor> descend_block(Tensor decoded, Tensor gradient, Tensor hessian, Tensor candidates,
                                         int64_t sweeps, std::string spec_text) {
  const BlockOperands operands(decoded, "decoded", hessian, "hessian", candidates, spec_text);
  STD_TORCH_CHECK(sweeps >= 1, "sweeps: expected at least 1, got ", sweeps);
  const Tensor gradients = as_contiguous(gradient);
  const float* gradient_data = matrix_data(gradients, "gradient", operands.rows, operands.columns, decoded);
  const Device device(decoded);
  Tensor result = device.empty({operands.rows, operands.columns}, ScalarType::Float);
  Tensor choice = device.empty({operands.rows}, ScalarType::Int);
  device.descend_block({operands.data(operands.block), gradient_data, operands.data(operands.matrix),
                        operands.data(operands.candidates), operands.spec.format, operands.rows, operands.columns,
                        operands.candidate_count, sweeps, static_cast<float*>(result.data_ptr()),
                        static_cast<int32_t*>(choice.data_ptr())});
  return {result, choice};
}

// Registers both.
template <class Device, class Library>
void implement_descent(Library& library) {
  library.impl("gptq_block", TORCH_BOX(&gptq_block<Device>));
  library.impl("descend_block", TORCH_BOX(&descend_block<Device>));
}

}  // namespace lowbit::bindings

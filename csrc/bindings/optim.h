// The optimizers' ops (lowbit/ops/optim.py), once for every device.
//
// Besides what ops.h asks of a Device, this asks for step(OptimizerStepArgs) and sum_of_squares(SumOfSquaresArgs).
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "../optim.h"
#include "checks.h"

namespace lowbit::bindings {

inline const void* contiguous_data(const Tensor& tensor, const char* name, int64_t i, Dtype dtype) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, "[", i, "]: expected a contiguous tensor");
  return float_data(tensor, dtype, name);
}

// The state that begins at these bytes of the arena; checked to lie inside it.
inline State state_of(const Tensor& arena, int64_t offset, int64_t absmax_offset, int64_t numel, int64_t i) {
  const auto part = [&](int64_t begin, int64_t bytes) {
    STD_TORCH_CHECK(begin >= 0 && begin % 4 == 0 && bytes <= arena.numel() - begin, "layout[", i,
                    "]: expected multiples of 4 inside an arena of ", arena.numel(), " bytes, got ", begin, " and ",
                    bytes, " bytes from there");
    return static_cast<uint8_t*>(arena.data_ptr()) + begin;
  };
  if (absmax_offset < 0) return {part(offset, product(numel, 4, "params")), nullptr};
  return {part(offset, numel), reinterpret_cast<float*>(part(absmax_offset, 4 * ceil_div(numel, kStateBlock)))};
}

template <class Device>
void optimizer_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> arenas, Tensor layout,
                    Tensor constants, std::string rule_name, std::optional<Tensor> grad_scale,
                    std::optional<int64_t> seed) {
  const auto count = static_cast<int64_t>(params.size());
  constexpr int64_t kColumns = 6, kConstants = sizeof(UpdateConstants) / sizeof(float);
  STD_TORCH_CHECK(rule_name == "adamw" || rule_name == "lion", "rule: expected adamw or lion, got ", rule_name);
  const Rule rule = rule_name == "adamw" ? Rule::adamw : Rule::lion;
  STD_TORCH_CHECK(grads.size() == params.size(), "grads: expected ", count, " tensors, got ", grads.size());
  for (const auto& [table, name, type, columns] : {std::tuple{&layout, "layout", ScalarType::Long, kColumns},
                                                   std::tuple{&constants, "constants", ScalarType::Float, kConstants}})
    STD_TORCH_CHECK(table->is_cpu() && table->is_contiguous() && table->scalar_type() == type && table->dim() == 2 &&
                        table->size(1) == columns,
                    name, ": expected a contiguous CPU tensor, ", name_of(type), " [n, ", columns, "]");
  STD_TORCH_CHECK(layout.size(0) == count, "layout: expected ", count, " rows, got ", layout.size(0));
  if (count == 0) return;
  if (grad_scale) check(*grad_scale, "grad_scale", ScalarType::Float, 1, params[0]);
  for (const Tensor& arena : arenas) {
    check(arena, "arenas", ScalarType::Byte, arena.numel(), params[0]);
    STD_TORCH_CHECK(arena.is_contiguous(), "arenas: expected contiguous tensors");
    aligned<float>(arena, "arenas");
  }
  const auto* row = static_cast<const int64_t*>(layout.data_ptr());
  const auto* rows_of_constants = static_cast<const UpdateConstants*>(constants.data_ptr());
  std::vector<ParameterUpdate> updates(params.size());
  for (int64_t i = 0; i < count; ++i, row += kColumns) {
    const Tensor &param = params[i], &grad = grads[i];
    check_device(param, "params", params[0]);
    check_size(grad, "grads", param.numel(), params[0]);
    STD_TORCH_CHECK(row[0] >= 0 && row[0] < constants.size(0), "layout[", i, "]: expected a row of constants below ",
                    constants.size(0), ", got ", row[0]);
    STD_TORCH_CHECK(row[1] >= 0 && row[1] < static_cast<int64_t>(arenas.size()), "layout[", i,
                    "]: expected an arena below ", arenas.size(), ", got ", row[1]);
    ParameterUpdate& update = updates[i];
    update.param_dtype = dtype_of(param.scalar_type(), "params");
    update.grad_dtype = dtype_of(grad.scalar_type(), "grads");
    update.numel = param.numel();
    update.param = const_cast<void*>(contiguous_data(param, "params", i, update.param_dtype));
    update.grad = contiguous_data(grad, "grads", i, update.grad_dtype);
    update.states[0] = state_of(arenas[row[1]], row[2], row[3], update.numel, i);
    if (rule == Rule::adamw) update.states[1] = state_of(arenas[row[1]], row[4], row[5], update.numel, i);
    update.constants = rows_of_constants[row[0]];
    if (seed) update.rounding_key = rounding_key(static_cast<uint64_t>(*seed), static_cast<uint64_t>(i));
  }
  const Device device(params[0]);
  device.step({updates.data(), count, rule, grad_scale ? aligned<float>(*grad_scale, "grad_scale") : nullptr,
               seed.has_value()});
}

template <class Device>
Tensor sum_of_squares(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors: expected at least one, got none");
  const Device device(tensors[0]);
  std::vector<SumOfSquaresArgs::Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(tensors[i], "tensors", tensors[0]);
    const Dtype dtype = dtype_of(tensors[i].scalar_type(), "tensors");
    pieces.push_back(
        {contiguous_data(tensors[i], "tensors", static_cast<int64_t>(i), dtype), tensors[i].numel(), dtype});
  }
  Tensor sum = device.empty({}, ScalarType::Double);
  device.sum_of_squares({pieces.data(), static_cast<int64_t>(pieces.size()), static_cast<double*>(sum.data_ptr())});
  return sum;
}

template <class Device, class Library>
void implement_optim(Library& library) {
  library.impl("optimizer_step", TORCH_BOX(&optimizer_step<Device>));
  library.impl("sum_of_squares", TORCH_BOX(&sum_of_squares<Device>));
}

}  // namespace lowbit::bindings

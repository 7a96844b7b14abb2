// Every operation for one instruction set.
#pragma once

#include "approximate.h"
#include "dequantize.h"
#include "descent.h"
#include "int8.h"
#include "linear.h"
#include "optim.h"
#include "quantize.h"
#include "search.h"

namespace lowbit::cpu {

template <class Isa>
constexpr Kernels kernels_of() {
  return {
      .isa = Isa::name,
      .quantize = quantize<Isa>,
      .quantize_scales = quantize_scales<Isa>,
      .search_scales = search_scales<Isa>,
      .encode = encode<Isa>,
      .gptq_block = gptq_block<Isa>,
      .descend_block = descend_block<Isa>,
      .dequantize = dequantize<Isa>,
      .linear = linear<Isa>,
      .linear_approximate = linear_approximate<Isa>,
      .linear_grad_input = linear_grad_input<Isa>,
      .step = step<Isa>,
      .sum_of_squares = sum_of_squares<Isa>,
  };
}

}  // namespace lowbit::cpu

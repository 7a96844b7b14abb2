// How blocks of threads that share out a sum agree on who adds up their parts, without a second launch.
#pragma once

#include "ptx.cuh"

namespace lowbit::cuda {

// Whether this block of threads is the last of `blocks` to arrive at `counter`, which is 0 before the first arrives and
// 0 again after the last. All threads of the block call it and get the same answer. What the blocks wrote to global
// memory before they arrived, the last one sees; it must read it past L1 (ptx::load_global_16_fresh).
//
// The barrier puts the whole block's writes before its thread 0's arrival, which releases them.
__device__ __forceinline__ bool is_last_to_arrive(uint32_t* counter, unsigned blocks) {
  __syncthreads();
  const bool is_last = threadIdx.x == 0 && ptx::increment_or_wrap(counter, blocks - 1) == blocks - 1;
  return __syncthreads_or(is_last);
}

}  // namespace lowbit::cuda

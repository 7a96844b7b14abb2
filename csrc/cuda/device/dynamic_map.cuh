// Codes of the dynamic 8-bit maps: of states of optimizers, and of double-quantized scales.
#pragma once

#include "ptx.cuh"

namespace lowbit::cuda {

// The rounding position of x, in units of the absmax, before its fraction is cut off: each operation rounds to fp32.
constexpr float position_of(float x) {
  const float shifted = x + 1.0f;
  const float scaled = shifted * 32767.5f;
  return scaled + 0.5f;
}

// The least x whose position reaches `boundary`: positions never fall as x grows.
constexpr float least_at(uint16_t boundary) {
  float below = -1.0f, at = 1.0f;
  for (float middle = 0.0f; below < middle && middle < at; middle = below + (at - below) / 2)
    (position_of(middle) >= static_cast<float>(boundary) ? at : below) = middle;
  return at;
}

// The 255 boundaries of a map, in units of the absmax, as a search tree in shared memory. The 2^d nodes of depth d
// begin at number 2^d, each at the bits of its path, the first turn lowest. So a step right adds to the address what
// leads to the next depth, and nodes of one depth are neighbours: up to 32 are in different banks, where those of a
// sorted list meet in a few.
struct BoundaryTree {
  float nodes[256];  // number 0 is not part of it

  // All threads of the block call this; a barrier has to follow.
  __device__ __forceinline__ void fill(const BoundaryTree& from) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) nodes[i] = from.nodes[i];
  }

  // The code of x, in units of the absmax, its 8 bits in reverse; of NaN it is 0. `base`: the shared address of nodes.
  static __device__ __forceinline__ uint32_t find_reversed(float x, uint32_t base) {
    uint32_t address = base;
#pragma unroll
    for (uint32_t step = sizeof(float); step < sizeof(nodes); step *= 2)  // LDS, FSETP, IADD
      if (x >= __uint_as_float(ptx::load_shared_4(address + step))) address += step;
    return (address - base) / sizeof(float);
  }
};

template <class Boundaries>
constexpr BoundaryTree make_boundary_tree(const Boundaries& boundaries) {
  BoundaryTree tree{};
  for (int depth = 0; depth < 8; ++depth)
    for (int path = 0; path < 1 << depth; ++path) {
      int code = 0;  // the greatest to the left of the node
      for (int turn = 0; turn < depth; ++turn) code += (path >> turn & 1) << (7 - turn);
      tree.nodes[(1 << depth) + path] = least_at(boundaries.first_above[code + (1 << (7 - depth)) - 1]);
    }
  return tree;
}

}  // namespace lowbit::cuda

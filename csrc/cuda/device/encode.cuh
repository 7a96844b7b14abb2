// What the kernels that choose codes share: the code search, magnitudes, and packing a tile.
#pragma once

#include "elements.cuh"

namespace lowbit::cuda {

// The sorted thresholds as a search tree in shared memory, one copy per lane, so that lanes meet in no bank. Node n has
// the children 2n (x <= threshold, or NaN) and 2n + 1; nodes 16 + rank are the leaves. Four comparisons and no branch.
struct CodeTree {
  uint32_t nodes[32][kWarpSize];

  // All threads of the block call this; leaf_of(code) is a leaf. A barrier has to follow.
  template <class LeafOf>
  __device__ __forceinline__ void fill(const Format& format, const LeafOf& leaf_of) {
    for (int i = static_cast<int>(threadIdx.x); i < 32 * kWarpSize; i += static_cast<int>(blockDim.x)) {
      const int n = i / kWarpSize;
      uint32_t node = 0;  // number 0 is not part of the tree
      if (n >= 16) {
        node = leaf_of(format.code_of_rank[n - 16]);
      } else if (n > 0) {
        const int depth = 31 - __clz(n), in_row = n - (1 << depth);
        node = __float_as_uint(format.thresholds[((2 * in_row + 1) << (3 - depth)) - 1]);
      }
      nodes[n][i % kWarpSize] = node;
    }
  }

  __device__ __forceinline__ void fill_with_codes(const Format& format) {
    fill(format, [](uint8_t code) { return uint32_t{code}; });
  }

  // Where the lane's copy begins.
  __device__ __forceinline__ uint32_t lane_base(int lane) const { return ptx::shared_address(&nodes[0][lane]); }

  // The leaf of x, which is in units of its block's scale.
  static __device__ __forceinline__ uint32_t find(float x, uint32_t lane_base) {
    static_assert(sizeof(nodes[0]) == 128);
    uint32_t n = 1;
#pragma unroll
    for (int depth = 0; depth < 4; ++depth) n = 2 * n + (x > __uint_as_float(ptx::load_shared_4(lane_base + n * 128)));
    return ptx::load_shared_4(lane_base + n * 128);
  }
};

// A scale whose inverse would overflow decodes everything to nearly zero, so every element gets the code of zero.
__device__ __forceinline__ float inverse_of(float scale) {
  return scale >= kTinyAbsmax || scale <= -kTinyAbsmax ? __frcp_rn(scale) : 0.0f;
}

// The largest magnitude of some elements of T, as an integer that orders as the magnitudes do, NaN on top.
template <class T>
struct Magnitude {
  uint32_t bits = 0;  // fp32, or 16 bits in the upper half

  __device__ __forceinline__ void take(uint4 raw) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (const uint32_t word : words) {
      if constexpr (sizeof(T) == 4) {
        bits = max(bits, word & 0x7fffffff);
      } else {
        bits = max(bits, max(word << 16 & 0x7fff0000, word & 0x7fff0000));
      }
    }
  }
  __device__ __forceinline__ void take(float value) { bits = max(bits, __float_as_uint(value) & 0x7fffffff); }
  __device__ __forceinline__ void take(Bf16 value) { bits = max(bits, uint32_t{value.bits} << 16 & 0x7fff0000); }
  __device__ __forceinline__ void take(Fp16 value) { bits = max(bits, uint32_t{value.bits} << 16 & 0x7fff0000); }

  // The largest of those of 2, 4, ... or 32 lanes, which differ in the low bits of their number.
  __device__ __forceinline__ void reduce(int lanes) {
    for (int mask = 1; mask < lanes; mask *= 2) bits = max(bits, ptx::shuffle_xor(bits, mask));
  }

  __device__ __forceinline__ float value() const {
    if constexpr (std::is_same_v<T, Fp16>) return widen(Fp16{static_cast<uint16_t>(bits >> 16)});
    return __uint_as_float(bits);
  }
};

// A tile of 4-bit codes in shared memory: each lane puts the packed codes of its accesses, then stores 16 packed bytes.
template <class T>
struct PackedTile {
  static constexpr int kCount = kPerAccess<T>;
  static constexpr int kElements = 2 * kTileBytes;
  static constexpr int kAccesses = kElements / kCount / kWarpSize;
  using Piece = std::conditional_t<kCount == 8, uint32_t, uint16_t>;  // the codes of one access

  uint4* staged;  // kWarpSize, of this warp

  // Of the elements in `raw`, each multiplied by `inverse`.
  __device__ __forceinline__ void put(int lane, int access, uint4 raw, float inverse, uint32_t lane_base) const {
    float values[kCount];
    widen<T>(raw, values);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      word |= CodeTree::find(__fmul_rn(values[i], inverse), lane_base) << (i / 2 * 8 + (1 - i % 2) * 4);
    reinterpret_cast<Piece*>(staged)[piece_of(lane, access)] = static_cast<Piece>(word);
  }

  __device__ __forceinline__ void store(int lane, uint8_t* tile_packed) const {
    __syncwarp();
    ptx::store_global_16(tile_packed + lane * kAccessBytes, staged[lane]);
    __syncwarp();
  }
};

// The byte of two elements, each made into units of the scale by `scaled`; the second may be past the end.
template <class T, class Scaled>
__device__ __forceinline__ uint8_t encode_pair(const T* pair, bool has_second, uint8_t zero_code, const Scaled& scaled,
                                               uint32_t lane_base) {
  const uint32_t even = CodeTree::find(scaled(widen(pair[0])), lane_base);
  const uint32_t odd = has_second ? CodeTree::find(scaled(widen(pair[1])), lane_base) : zero_code;
  return pack(static_cast<uint8_t>(even), static_cast<uint8_t>(odd));
}

}  // namespace lowbit::cuda

// What every kernel that reads a packed weight needs: decoded scales, and tables of decoded pairs.
#pragma once

#include "../../weight.h"
#include "elements.cuh"

namespace lowbit::cuda {

static __device__ const ScaleMap device_scale_map = kScaleMap;

// Reads the scales of blocks (kDoubleQuant false: also of rows), in two steps where other work fits between.
template <bool kDoubleQuant>
class ScaleReader {
 public:
  struct Loaded {
    float number;   // the scale, or the scale of its group
    uint32_t code;  // of the double-quantized scale
  };

  __device__ __forceinline__ explicit ScaleReader(const Scales& scales)
      : scales_(scales), offset_(kDoubleQuant ? *scales.offset : 0.0f) {}

  template <class Index>  // unsigned
  __device__ __forceinline__ Loaded load(Index block) const {
    if constexpr (!kDoubleQuant) return {scales_.values[block], 0};
    return {scales_.group_scales[block / Index{kGroupSize}], scales_.codes[block]};
  }

  // fl(fl(map[code] * group_scale) + offset): the format allows no contraction into an FMA.
  __device__ __forceinline__ float decode(Loaded loaded) const {
    if constexpr (!kDoubleQuant) return loaded.number;
    return __fadd_rn(__fmul_rn(device_scale_map.entries[loaded.code], loaded.number), offset_);
  }

  __device__ __forceinline__ float operator()(uint64_t block) const { return decode(load(block)); }

 private:
  const Scales& scales_;  // a kernel's argument
  float offset_;
};

// Decodes any weight, an element at a time. block_shift: log2 of the block size, where scales are of blocks.
template <ScaleKind kKind>
struct ElementReader {
  const QuantizedWeight& weight;  // a kernel's arguments
  const Format& format;
  int block_shift;
  ScaleReader<kKind == ScaleKind::double_quant> scale_of;

  __device__ ElementReader(const QuantizedWeight& weight, const Format& format, int block_shift)
      : weight(weight), format(format), block_shift(block_shift), scale_of(weight.scales) {}

  // element: row * columns + column
  __device__ float operator()(int64_t row, int64_t element) const {
    if constexpr (kKind == ScaleKind::row) {
      const auto code = static_cast<int8_t>(weight.packed[element]);
      return __fmul_rn(__fmul_rn(static_cast<float>(code), scale_of(static_cast<uint64_t>(row))), kInt8Unit);
    }
    const float scale = scale_of(static_cast<uint64_t>(element) >> block_shift);
    return __fmul_rn(format.codebook[unpack(weight.packed, element)], scale);
  }
};

// The two codebook values of each packed byte, in shared memory: 32 KB, sixteen copies side by side. Lanes l and
// l + 16 read copy l % 16, which alone has its two banks, so no two lanes of a half warp meet in one.
struct PairTable {
  static constexpr int kCopies = 16;

  alignas(16) float2 pairs[256][kCopies];

  // All threads of the block call this; a barrier has to follow. A thread writes two copies at a time, in other banks
  // than its neighbours.
  __device__ __forceinline__ void fill(const Format& format) {
#pragma unroll 1  // it runs once or twice; unrolled it would take more registers than the loop of a kernel
    for (int byte = static_cast<int>(threadIdx.x); byte < 256; byte += static_cast<int>(blockDim.x)) {
      const float even = format.codebook[byte >> 4], odd = format.codebook[byte & 15];
      float4* copies = reinterpret_cast<float4*>(pairs[byte]);
#pragma unroll 2  // so that weights in flight keep their registers
      for (int i = 0; i < kCopies / 2; ++i) copies[(i + byte) % (kCopies / 2)] = {even, odd, even, odd};
    }
  }

  // Where the lane's copy begins.
  __device__ __forceinline__ uint32_t lane_base(int lane) const {
    return ptx::shared_address(&pairs[0][lane % kCopies]);
  }

  // Byte `b` of `word`, decoded: its even element, its odd one. IDP, LDS.
  static __device__ __forceinline__ float2 decode(uint32_t word, int b, uint32_t lane_base) {
    return ptx::load_shared_8(ptx::add_product_of_byte(word, b, sizeof(pairs[0]), lane_base));
  }
};

// The same in 16 bits, for the tensor cores: 32 KB, a copy for each lane, which has a bank to itself.
template <class T>
struct NarrowPairTable {
  uint32_t pairs[256][kWarpSize];

  // All threads of the block call this; a barrier has to follow. Neighbouring threads begin at different banks.
  __device__ __forceinline__ void fill(const Format& format) {
    constexpr int kPieces = kWarpSize / 4;
    for (int byte = static_cast<int>(threadIdx.x); byte < 256; byte += static_cast<int>(blockDim.x)) {
      const uint32_t pair = narrow_pair<T>(format.codebook[byte >> 4], format.codebook[byte & 15]);
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        reinterpret_cast<uint4*>(pairs[byte])[(i + byte) % kPieces] = {pair, pair, pair, pair};
    }
  }

  __device__ __forceinline__ uint32_t lane_base(int lane) const { return ptx::shared_address(&pairs[0][lane]); }

  // Byte `b` of `word`: the even element in the low half. IDP, LDS.
  static __device__ __forceinline__ uint32_t decode(uint32_t word, int b, uint32_t lane_base) {
    return ptx::load_shared_4(ptx::add_product_of_byte(word, b, sizeof(pairs[0]), lane_base));
  }
};

}  // namespace lowbit::cuda

// What the kernels of grad_input.cu share: the product, and the scales of its weight.
#pragma once

#include <cstdint>

#include "decode.cuh"
#include "elements.cuh"
#include "kernels.h"

namespace lowbit::cuda {

// partial[split, m, k] = the part of grad[m, n] W[n, k] that the rows of W in one split make. Blocks of threads are
// numbered with the tile of rows of grad fastest: those that read one part of W run side by side.
struct GradInputProduct {
  const void* grad;
  const uint8_t* packed;
  const float* absmax;  // as in QuantizedWeight
  const uint8_t* scale_codes;
  const float* group_scales;
  const float* offset;
  int64_t m, n, k;
  int64_t split_rows;  // rows of W in each split, of which the last may have fewer
  unsigned row_tiles, column_tiles;
  float* partial;
  int block_shift;  // log2 of the block size; not for int8

  struct Tile {
    int64_t row, column;         // the first of grad_x
    int64_t first_row, end_row;  // of W
    float* out;                  // partial[split, row, column]
  };
  __device__ __forceinline__ Tile tile_of(unsigned block, int rows, int columns) const {
    const int64_t split = block / row_tiles / column_tiles;
    Tile tile;
    tile.row = int64_t{block % row_tiles} * rows;
    tile.column = int64_t{block / row_tiles % column_tiles} * columns;
    tile.first_row = split * split_rows;
    tile.end_row = min(n, tile.first_row + split_rows);
    tile.out = partial + (split * m + tile.row) * k + tile.column;
    return tile;
  }
};

// BlockScales in two steps, so that other work fits between: loads, then arithmetic.
template <bool kDoubleQuant>
class DeferredScales {
 public:
  struct Loaded {
    float number;   // the scale, or the scale of its group
    uint32_t code;  // of the double-quantized scale
  };

  __device__ __forceinline__ explicit DeferredScales(const GradInputProduct& product)
      : absmax_(product.absmax),
        codes_(product.scale_codes),
        group_scales_(product.group_scales),
        offset_(kDoubleQuant ? *product.offset : 0.0f) {}

  template <class Index>  // unsigned
  __device__ __forceinline__ Loaded load(Index block) const {
    if constexpr (!kDoubleQuant) return {absmax_[block], 0};
    return {group_scales_[block / Index{kGroupSize}], codes_[block]};
  }

  // No contraction into an FMA.
  __device__ __forceinline__ float decode(Loaded loaded) const {
    if constexpr (!kDoubleQuant) return loaded.number;
    return __fadd_rn(__fmul_rn(device_scale_map.entries[loaded.code], loaded.number), offset_);
  }

  __device__ __forceinline__ float operator()(uint64_t block) const { return decode(load(block)); }

 private:
  const float* absmax_;
  const uint8_t* codes_;
  const float* group_scales_;
  float offset_;
};

}  // namespace lowbit::cuda

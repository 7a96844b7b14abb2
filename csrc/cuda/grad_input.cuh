// The product as the kernels of grad_input.cu take it.
#pragma once

#include "device/weight.cuh"

namespace lowbit::cuda {

// partial[split, m, k] = the part of grad[m, n] W[n, k] that the rows of W in one split make. Blocks of threads are
// numbered with the tile of rows of grad fastest: those that read one part of W run side by side.
struct GradInputProduct {
  const void* grad;
  QuantizedWeight weight;
  int64_t m, n, k;
  int64_t split_rows;  // rows of W in each split, of which the last may have fewer
  unsigned row_tiles, column_tiles;
  float* partial;
  int block_shift;  // log2 of the block size, where scales are of blocks

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

}  // namespace lowbit::cuda

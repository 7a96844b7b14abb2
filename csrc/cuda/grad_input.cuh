// The product as the kernels of grad_input.cu take it, and the end that they share: several blocks of threads make a
// tile of grad_x, each from some of the rows of W and of lora_a, and the last to arrive adds up their sums.
#pragma once

#include "device/arrival.cuh"
#include "device/weight.cuh"

namespace lowbit::cuda {

// out[m, k] = grad[m, n] W[n, k] + grad_t[m, rank] lora_a[rank, k]. Blocks of threads are numbered with the tile of
// rows of grad fastest: those that read one part of W run side by side.
struct GradInputProduct {
  const void* grad;
  QuantizedWeight weight;
  const float *grad_t, *lora_a;
  int64_t m, n, k, rank;
  void* out;
  float* partial;      // [splits, m, k] where there are several
  uint32_t* counters;  // of each tile, how many of its blocks have arrived
  int64_t split_rows;  // rows of W in each split, of which the last may have fewer
  unsigned splits, row_tiles, column_tiles;
  int block_shift;  // log2 of the block size, where scales are of blocks
  bool whole_out;   // the kernels that write four columns of out at once may do so in one access

  struct Tile {
    int64_t row, column;         // the first of out
    int64_t first_row, end_row;  // of W
    unsigned split, number;      // number: of the tile of out
  };
  __device__ __forceinline__ Tile tile_of(unsigned block, int rows, int columns) const {
    Tile tile;
    tile.number = block % (row_tiles * column_tiles);
    tile.split = block / (row_tiles * column_tiles);
    tile.row = int64_t{tile.number % row_tiles} * rows;
    tile.column = int64_t{tile.number / row_tiles} * columns;
    tile.first_row = tile.split * split_rows;
    tile.end_row = min(n, tile.first_row + split_rows);
    return tile;
  }
};

// kCount sums, one or four, that stand side by side in a row.
template <class T, int kCount>
__device__ __forceinline__ void store_rounded(const float (&sums)[kCount], bool whole, T* to) {
  if constexpr (kCount == 4) {  // which only 16 bits have
    if (whole) {
      *reinterpret_cast<uint2*>(to) = {narrow_pair<T>(sums[0], sums[1]), narrow_pair<T>(sums[2], sums[3])};
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) narrow(sums[i], to + i);
}

// The same in fp32, for another block of threads, and what such a block has stored.
template <int kCount>
__device__ __forceinline__ void store_partial(const float (&sums)[kCount], float* to) {
  if constexpr (kCount == 4) {
    *reinterpret_cast<float4*>(to) = {sums[0], sums[1], sums[2], sums[3]};
  } else {
    *to = sums[0];
  }
}
template <int kCount>
__device__ __forceinline__ void load_partial(const float* from, float (&sums)[kCount]) {
  if constexpr (kCount == 4) {
    const float4 four = ptx::load_global_16_fresh(from);
    sums[0] = four.x, sums[1] = four.y, sums[2] = four.z, sums[3] = four.w;
  } else {
    sums[0] = ptx::load_global_4_fresh(from);
  }
}

// Stores a block's sums of kRows x kColumns of the product, which sums_at(row, column, sums) gives kCount at a time; k
// is a multiple of kCount. Where there are several splits, the last block of a tile adds them up in their order, so
// that the sum is always the same.
template <class T, int kRows, int kColumns, int kCount, class SumsAt>
__device__ __forceinline__ void store_tile(const GradInputProduct& product, const GradInputProduct::Tile& tile,
                                           const SumsAt& sums_at) {
  constexpr int kGroups = kColumns / kCount, kTogether = 8;  // loads on their way
  const auto for_each = [&](const auto& visit) {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kGroups; i += static_cast<int>(blockDim.x)) {
      const int row = i / kGroups, column = i % kGroups * kCount;
      if (tile.row + row < product.m && tile.column + column < product.k)
        visit(row, column, (tile.row + row) * product.k + tile.column + column);
    }
  };
  T* out = static_cast<T*>(product.out);
  const int64_t split_size = product.m * product.k;
  for_each([&](int row, int column, int64_t at) {
    float sums[kCount];
    sums_at(row, column, sums);
    if (product.splits == 1) {
      store_rounded(sums, product.whole_out, out + at);
    } else {
      store_partial(sums, product.partial + tile.split * split_size + at);
    }
  });
  if (product.splits == 1 || !is_last_to_arrive(&product.counters[tile.number], product.splits)) return;
  for_each([&](int, int, int64_t at) {
    float sums[kCount] = {};
    for (unsigned first = 0; first < product.splits; first += kTogether) {
      float parts[kTogether][kCount] = {};
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (first + j < product.splits) load_partial(product.partial + (first + j) * split_size + at, parts[j]);
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] += parts[j][i];
    }
    store_rounded(sums, product.whole_out, out + at);
  });
}

}  // namespace lowbit::cuda

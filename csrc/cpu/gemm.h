// gemm: sums += A B in fp32, where A is rows of activations and B a weight that is decoded tile by tile.
//
//   A  is copied once into panels of up to kRows rows, each panel cut into tiles of kDepth columns
//   B  a tile of it is decoded to strips [depth][kStrip], kept in the L1 and L2 caches, and used by every panel of A
//   micro  holds kRows x kStrip sums in registers: per step of depth two loads of B and one broadcast of A per row
//
// Each sum is accumulated in the order of depth, whatever the tiling: results depend neither on the number of threads
// nor on the rows that are computed beside.
#pragma once

#include "support.h"

namespace lowbit::cpu {

constexpr int64_t kDepth = 256;
constexpr int64_t kBlockRows = 512;  // rows of A at a time: a decoded tile serves them all

template <class Isa>
constexpr int64_t kStrip = 2 * Isa::kLanes;

// What micro() multiplies: words of 32 bits, here elements in fp32, of rows that are kStride words apart. The rows then
// start in different sets of the L1 cache.
template <class Isa>
struct Fp32Product {
  static constexpr int64_t kStride = kDepth + 16;
  static typename Isa::Vec fma(const typename Isa::Vec& a, const typename Isa::Vec& b, const typename Isa::Vec& sums) {
    return Isa::fma(a, b, sums);
  }
};

// A in fp32 as [tile of depth][panel][kRows][kStride]. Panels are as equal in height as they can be: one of a few rows
// would cost as much as a full one. Tiles likewise: a short one costs as much for its loads and stores of sums.
template <class Isa>
class Panels {
 public:
  Panels(const void* data, Dtype dtype, int64_t rows, int64_t depth, const ParallelFor& parallel_for)
      : rows(rows),
        depth(depth),
        count(ceil_div(rows, Isa::kRows)),
        tiles(ceil_div(depth, kDepth)),
        tile_depth(tiles ? round_up(ceil_div(depth, tiles), 64) : 0),
        storage_(count * tiles * kTileSize) {
    parallel_for(count * tiles, ceil_div(16384, kTileSize), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i % count, k0 = i / count * tile_depth, width = std::min(tile_depth, depth - k0);
        float* to = storage_.data() + i * kTileSize;
        for (int64_t row = first_row(panel); row < first_row(panel + 1); ++row, to += Fp32Product<Isa>::kStride)
          for_dtype(dtype,
                    [&]<class T>(T) { load_row<Isa>(static_cast<const T*>(data) + row * depth + k0, width, to); });
      }
    });
  }
  int64_t first_row(int64_t panel) const { return panel * rows / count; }
  const float* tile(int64_t panel, int64_t index) const {
    return storage_.data() + (index * count + panel) * kTileSize;
  }

  const int64_t rows, depth, count, tiles, tile_depth;

 private:
  static constexpr int64_t kTileSize = Isa::kRows * Fp32Product<Isa>::kStride;
  Scratch storage_;
};

// sums[I, kVecs vectors] += a[I, words] b[words, kVecs vectors]; fetches the tile of A at `next` meanwhile: its rows
// are streams too short for the hardware's prefetcher.
template <class Isa, class Product, int I, int kVecs>
void micro(const float* a, const float* next, const float* b, int64_t words, float* sums, int64_t sums_stride) {
  typename Isa::Vec acc[I][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Isa::load(sums + i * sums_stride + v * Isa::kLanes);
  for (int64_t k = 0; k < words; ++k, b += kVecs * Isa::kLanes) {
    typename Isa::Vec b_k[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) b_k[v] = Isa::load(b + v * Isa::kLanes);
    __builtin_prefetch(next + k * (I + 1));
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const auto a_k = Isa::broadcast(a[i * Product::kStride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Product::fma(a_k, b_k[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) Isa::store(sums + i * sums_stride + v * Isa::kLanes, acc[i][v]);
}

template <class Isa, class Product, int kVecs = 2, int I = Isa::kRows>
void micro_rows(int64_t rows, const float* a, const float* next, const float* b, int64_t words, float* sums,
                int64_t sums_stride) {
  if constexpr (I > 0) {
    if (rows == I) return micro<Isa, Product, I, kVecs>(a, next, b, words, sums, sums_stride);
    micro_rows<Isa, Product, kVecs, I - 1>(rows, a, next, b, words, sums, sums_stride);
  }
}

// Calls body(first row, rows) on blocks of at most kBlockRows rows, of as equal a height as they can be. The copy of a
// block of A then stays in the L3 cache, and memory for it is taken from the system once.
template <class Body>
void for_row_blocks(int64_t rows, const Body& body) {
  const int64_t blocks = ceil_div(rows, kBlockRows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = i * rows / blocks;
    body(begin, (i + 1) * rows / blocks - begin);
  }
}

// Which part of A B a task computes: panels [panel_begin, panel_end) of A and `strips` strips of B.
struct Task {
  int64_t panel_begin, panel_end, strip_begin, strips;
};

// Cuts A B into tasks of min_strips to max_strips strips (a multiple of min_strips) and some panels: the cut with the
// shortest time, where a thread's share is its tasks, and decoding a strip costs as much as eight rows of it.
class Tasks {
 public:
  Tasks(int64_t panels, int64_t rows_per_panel, int64_t strips, int64_t min_strips, int64_t max_strips, int64_t threads)
      : panels_(panels), strips_(strips) {
    constexpr int64_t kDecodeRows = 8;
    const int64_t most_blocks = std::min(panels, 4 * threads);
    int64_t best = std::numeric_limits<int64_t>::max();
    for (int64_t width = max_strips; width >= min_strips; width -= min_strips) {
      for (int64_t blocks = 1; blocks <= most_blocks; ++blocks) {
        const int64_t height = ceil_div(panels, blocks), tasks = ceil_div(strips, width) * ceil_div(panels, height);
        const int64_t time = ceil_div(tasks, threads) * width * (height * rows_per_panel + kDecodeRows);
        if (time >= best) continue;
        best = time;
        strips_per_task_ = width;
        panels_per_task_ = height;
        count = tasks;
      }
    }
    blocks_ = ceil_div(panels, panels_per_task_);
  }
  Task operator[](int64_t i) const {
    const int64_t panel = i % blocks_ * panels_per_task_, strip = i / blocks_ * strips_per_task_;
    return {panel, std::min(panel + panels_per_task_, panels_), strip, std::min(strips_per_task_, strips_ - strip)};
  }
  int64_t strips_per_task() const { return strips_per_task_; }
  int64_t panels_per_task() const { return panels_per_task_; }

  int64_t count = 0;

 private:
  int64_t panels_, strips_, strips_per_task_ = 1, panels_per_task_ = 1, blocks_;
};

// sums[rows of the task, strips * kStrip] += A B; fill(k0, depth, tile) writes rows [k0, k0 + depth) of the task's
// strips of B in fp32, strip s at tile + s * kDepth * kStrip.
template <class Isa, class Fill>
void accumulate(const Panels<Isa>& a, const Task& task, const Fill& fill, float* tile, float* sums) {
  const int64_t width = task.strips * kStrip<Isa>, first_row = a.first_row(task.panel_begin);
  for (int64_t t = 0; t < a.tiles; ++t) {
    const int64_t depth = std::min(a.tile_depth, a.depth - t * a.tile_depth);
    fill(t * a.tile_depth, depth, tile);
    for (int64_t s = 0; s < task.strips; ++s) {
      const float* strip = tile + s * kDepth * kStrip<Isa>;
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
        const int64_t row = a.first_row(panel), rows = a.first_row(panel + 1) - row;
        const float* next = a.tile(panel + 1 < task.panel_end ? panel + 1 : task.panel_begin, t);
        micro_rows<Isa, Fp32Product<Isa>>(rows, a.tile(panel, t), next, strip, depth,
                                          sums + (row - first_row) * width + s * kStrip<Isa>, width);
      }
    }
  }
}

}  // namespace lowbit::cpu

// gemm: sums += A B in fp32, where A is rows of activations and B a weight that is decoded tile by tile. Both are held
// in words of 32 bits: fp32, or two bf16 one after the other along the depth.
//
//   A  is copied once into panels of up to kRows rows, each panel cut into tiles of kDepth columns
//   B  a tile of it is decoded to strips [depth][kStrip], kept in the L1 and L2 caches, and used by every panel of A
//   micro  holds kRows x kStrip sums in registers: per word of depth two loads of B and one broadcast of A per row
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

// A word is an element in fp32, whatever its dtype was.
template <class Isa>
struct Fp32Words {
  using Vec = typename Isa::Vec;
  static constexpr int64_t kElements = 1;
  static Vec fma(const Vec& a, const Vec& b, const Vec& sums) { return Isa::fma(a, b, sums); }
  // Elements [begin, begin + count) of data to words.
  static void load_row(const void* data, Dtype dtype, int64_t begin, int64_t count, float* to) {
    for_dtype(dtype, [&]<class T>(T) { cpu::load_row<Isa>(static_cast<const T*>(data) + begin, count, to); });
  }
  // The rows of a strip of B from elements in fp32 to words, in place.
  static void join_rows(float*, int64_t) {}
};

// A word is two elements: of A, bf16 as it is, or of B, rounded to bf16. Where the depth is odd, a zero stands beside
// the last element, in A and in B: what was in memory there could be NaN.
template <class Isa>
struct Bf16Words {
  using Vec = typename Isa::Vec;
  static constexpr int64_t kElements = 2;
  static Vec fma(const Vec& a, const Vec& b, const Vec& sums) { return Isa::bf16_fma(a, b, sums); }
  static void load_row(const void* data, Dtype, int64_t begin, int64_t count, float* to) {
    if (count % 2) to[count / 2] = 0;
    std::memcpy(to, static_cast<const Bf16*>(data) + begin, static_cast<size_t>(count) * sizeof(Bf16));
  }
  static void join_rows(float* strip, int64_t depth) {
    for (int64_t k = 0; k < depth; k += 2) {
      for (int64_t column = 0; column < kStrip<Isa>; column += Isa::kLanes) {
        const float* even = strip + k * kStrip<Isa> + column;
        const Vec odd = k + 1 < depth ? Isa::load(even + kStrip<Isa>) : Isa::zero();
        Isa::store(strip + k / 2 * kStrip<Isa> + column, Isa::bf16_pairs(Isa::load(even), odd));
      }
    }
  }
};

// Calls body(Words()) with the words for activations of `dtype`.
template <class Isa, class Body>
void with_words(Dtype dtype, const Body& body) {
  if constexpr (requires(typename Isa::Vec v) { Isa::bf16_fma(v, v, v); }) {
    if (dtype == Dtype::bf16) return body(Bf16Words<Isa>());
  }
  body(Fp32Words<Isa>());
}

// Words from one row of a panel to the next: they start in different sets of the L1 cache.
template <class Words>
constexpr int64_t kDepthStride = kDepth / Words::kElements + 16;

// A as [tile of depth][panel][kRows][kDepthStride]. Panels are as equal in height as they can be: one of a few rows
// would cost as much as a full one. Tiles likewise: a short one costs as much for its loads and stores of sums.
template <class Isa, class Words>
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
        for (int64_t row = first_row(panel); row < first_row(panel + 1); ++row, to += kDepthStride<Words>)
          Words::load_row(data, dtype, row * depth + k0, width, to);
      }
    });
  }
  int64_t first_row(int64_t panel) const { return panel * rows / count; }
  const float* tile(int64_t panel, int64_t index) const {
    return storage_.data() + (index * count + panel) * kTileSize;
  }

  const int64_t rows, depth, count, tiles, tile_depth;

 private:
  static constexpr int64_t kTileSize = Isa::kRows * kDepthStride<Words>;
  Scratch storage_;
};

// sums[I, kStrip] += a[I, words] b[words, kStrip]; fetches the tile of A at `next` meanwhile: its rows are streams too
// short for the hardware's prefetcher.
template <class Isa, class Words, int I>
void micro(const float* a, const float* next, const float* b, int64_t words, float* sums, int64_t sums_stride) {
  typename Isa::Vec acc[I][2];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i) {
    acc[i][0] = Isa::load(sums + i * sums_stride);
    acc[i][1] = Isa::load(sums + i * sums_stride + Isa::kLanes);
  }
  for (int64_t k = 0; k < words; ++k, b += kStrip<Isa>) {
    const auto low = Isa::load(b), high = Isa::load(b + Isa::kLanes);
    __builtin_prefetch(next + k * (I + 1));
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const auto a_k = Isa::broadcast(a[i * kDepthStride<Words> + k]);
      acc[i][0] = Words::fma(a_k, low, acc[i][0]);
      acc[i][1] = Words::fma(a_k, high, acc[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i) {
    Isa::store(sums + i * sums_stride, acc[i][0]);
    Isa::store(sums + i * sums_stride + Isa::kLanes, acc[i][1]);
  }
}

template <class Isa, class Words, int I = Isa::kRows>
void micro_rows(int64_t rows, const float* a, const float* next, const float* b, int64_t words, float* sums,
                int64_t sums_stride) {
  if constexpr (I > 0) {
    if (rows == I) return micro<Isa, Words, I>(a, next, b, words, sums, sums_stride);
    micro_rows<Isa, Words, I - 1>(rows, a, next, b, words, sums, sums_stride);
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
template <class Isa, class Words, class Fill>
void accumulate(const Panels<Isa, Words>& a, const Task& task, const Fill& fill, float* tile, float* sums) {
  const int64_t width = task.strips * kStrip<Isa>, first_row = a.first_row(task.panel_begin);
  for (int64_t t = 0; t < a.tiles; ++t) {
    const int64_t depth = std::min(a.tile_depth, a.depth - t * a.tile_depth);
    fill(t * a.tile_depth, depth, tile);
    for (int64_t s = 0; s < task.strips; ++s) {
      float* strip = tile + s * kDepth * kStrip<Isa>;
      Words::join_rows(strip, depth);
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
        const int64_t row = a.first_row(panel), rows = a.first_row(panel + 1) - row;
        const float* next = a.tile(panel + 1 < task.panel_end ? panel + 1 : task.panel_begin, t);
        micro_rows<Isa, Words>(rows, a.tile(panel, t), next, strip, ceil_div(depth, Words::kElements),
                               sums + (row - first_row) * width + s * kStrip<Isa>, width);
      }
    }
  }
}

}  // namespace lowbit::cpu

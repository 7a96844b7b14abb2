// bf16_gemm: products of many rows in bf16. W is rounded to bf16 once, after its scale, a block at a time:
//
//   sums += A B in fp32, where A and B are held in pairs: words of two bf16, neighbours along the contraction
//
//   linear             A is W, whose rows decode to pairs as they are; B is x^T, transposed once; sums are y^T
//   linear_grad_input  A is grad; B is W, two rows of which decode to pairs
//
//   A  [rows][Pairs::kStride]     a block of kDepth along the contraction
//   B  panels [pairs][width]   of 32 columns, the last one perhaps of 16: a panel of a block stays in the L1 cache
//
// Isa::Pairs multiplies a block of A with a panel of B: registers of sums, or tiles. Each 64 elements along a row of W
// stand in the order of Isa::PairDecoder: those of x too, and columns of grad_x until they are stored. Each sum is
// accumulated in the same order whatever the tasks are: results depend neither on the number of threads nor on the rows
// that are computed beside.
#pragma once

#include "dequantize.h"
#include "epilogue.h"
#include "gemm.h"
#include "support.h"

namespace lowbit::cpu {

// Whether products of many rows in bf16 are this file's.
template <class Isa>
concept MultipliesPairs = requires { Isa::Pairs::kDepth; };

constexpr int64_t kPanel = 32;        // columns of B
constexpr int64_t kChunk = 64;        // elements along a row of W that are decoded at once
constexpr int64_t kMaxColumns = 256;  // of W for a task of linear_grad_input

// Isa::Pairs where sums stay in vector registers.
template <class Isa>
struct VectorPairs {
  static constexpr int64_t kDepth = 512;               // 256: 5% more time for 256 rows, 20% for 32
  static constexpr int64_t kStride = kDepth / 2 + 16;  // words; rows start in different sets of the L1 cache
  static constexpr int64_t kMaxStrips = 3;             // of W's rows: 8 panels of 12
  struct Session {                                     // nothing to set up
    Session() {}
  };
  static typename Isa::Vec fma(typename Isa::Vec a, typename Isa::Vec b, typename Isa::Vec sums) {
    return Isa::bf16_fma(a, b, sums);
  }
  // sums[rows, kVecs vectors] += a[rows, pairs] b[pairs, kVecs vectors]
  template <int kVecs>
  static void multiply(const float* a, int64_t rows, const float* b, int64_t pairs, float* sums, int64_t sums_stride) {
    const int64_t panels = ceil_div(rows, Isa::kRows);
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t row = i * rows / panels, end = (i + 1) * rows / panels;
      micro_rows<Isa, VectorPairs, kVecs>(end - row, a + row * kStride, a + end % rows * kStride, b, pairs,
                                          sums + row * sums_stride, sums_stride);
    }
  }
};

// The contraction in blocks as equal as multiples of kChunk can be. Zeros fill the last one up.
struct DepthBlocks {
  DepthBlocks(int64_t depth, int64_t max)
      : total(depth), count(ceil_div(depth, max)), size(count ? round_up(ceil_div(depth, count), kChunk) : 0) {}
  int64_t begin(int64_t i) const { return i * size; }
  int64_t depth(int64_t i) const { return std::min(size, total - i * size); }
  int64_t pairs(int64_t i) const { return round_up(depth(i), kChunk) / 2; }
  const int64_t total, count, size;
};

// Panels that cover `columns`, and the width of one of them.
struct ColumnPanels {
  explicit ColumnPanels(int64_t columns) : columns(columns), count(ceil_div(columns, kPanel)) {}
  int64_t width(int64_t panel) const { return columns - panel * kPanel > 16 ? kPanel : 16; }
  const int64_t columns, count;
};

// sums[rows, columns] += A B for panels [begin, end) of B; a block of B's panel i is at b(i).
template <class Isa, class Panel>
void multiply_panels(const float* a, int64_t rows, const Panel& b, const ColumnPanels& panels, int64_t begin,
                     int64_t end, int64_t pairs, float* sums, int64_t sums_stride) {
  for (int64_t i = begin; i < end; ++i) {
    float* to = sums + (i - begin) * kPanel;
    if (panels.width(i) == kPanel) {
      Isa::Pairs::template multiply<2>(a, rows, b(i), pairs, to, sums_stride);
    } else {
      Isa::Pairs::template multiply<1>(a, rows, b(i), pairs, to, sums_stride);
    }
  }
}

// x^T in pairs: [block of depth][panel][pairs][width].
template <class Isa>
class TransposedRows {
 public:
  TransposedRows(const Bf16* x, int64_t rows, int64_t depth, const ParallelFor& parallel_for)
      : panels(rows), blocks(depth, Isa::Pairs::kDepth), storage_(panels.count * blocks.count * kPanelSize) {
    parallel_for(panels.count * blocks.count, 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i % panels.count, block = i / panels.count, width = panels.width(panel);
        float* to = storage_.data() + i * kPanelSize;
        for (int64_t row = 0; row < width; row += 16) transpose(x, panel * kPanel + row, depth, block, to + row, width);
      }
    });
  }
  const float* panel(int64_t index, int64_t block) const {
    return storage_.data() + (block * panels.count + index) * kPanelSize;
  }

  const ColumnPanels panels;
  const DepthBlocks blocks;

 private:
  static constexpr int64_t kPanelSize = Isa::Pairs::kDepth / 2 * kPanel;

  // 16 rows from `row` on, fewer at the end.
  void transpose(const Bf16* x, int64_t row, int64_t depth, int64_t block, float* to, int64_t width) const {
    const int64_t rows = std::clamp<int64_t>(panels.columns - row, 0, 16), k0 = blocks.begin(block);
    for (int64_t k = 0; k < blocks.depth(block); k += kChunk, to += kChunk / 2 * width) {
      const int64_t count = std::min(kChunk, blocks.depth(block) - k);
      const Bf16* from = x + row * depth + k0 + k;
      if (rows == 16 && count == kChunk) {
        Isa::transpose_pairs(from, depth, to, width);
        continue;
      }
      Bf16 padded[16 * kChunk] = {};
      for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * depth, count, padded + i * kChunk);
      Isa::transpose_pairs(padded, kChunk, to, width);
    }
  }

  Scratch storage_;
};

// grad in pairs: [block of depth][rows][Pairs::kStride]. Rows are copied as they are: their pairs are neighbours.
template <class Isa>
class PairRows {
 public:
  PairRows(const Bf16* grad, int64_t rows, int64_t depth, const ParallelFor& parallel_for)
      : blocks(depth, Isa::Pairs::kDepth),
        rows_(round_up(rows, 16)),
        storage_(rows_ * blocks.count * Isa::Pairs::kStride) {
    parallel_for(rows * blocks.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % rows, block = i / rows, count = blocks.depth(block);
        Bf16* to = reinterpret_cast<Bf16*>(storage_.data() + (block * rows_ + row) * Isa::Pairs::kStride);
        std::copy_n(grad + row * depth + blocks.begin(block), count, to);
        std::fill_n(to + count, 2 * blocks.pairs(block) - count, Bf16{0});
      }
    });
  }
  const float* row(int64_t index, int64_t block) const {
    return storage_.data() + (block * rows_ + index) * Isa::Pairs::kStride;
  }

  const DepthBlocks blocks;

 private:
  const int64_t rows_;
  Scratch storage_;
};

// Decodes pieces of W to bf16 in pairs.
template <class Isa>
class PairWeight {
 public:
  PairWeight(const QuantizedWeight& weight, int64_t k)
      : weight_(weight), k_(k), whole_chunks_(weight.format->bits == 4 && k % kChunk == 0), scale_of_(weight) {
    if (weight.format->bits == 4) decode_.emplace(*weight.format), shift_ = block_shift(weight);
    if (whole_chunks_) decode_pairs_.emplace(*weight.format);
  }

  // Columns [k0, k0 + depth) of one row as A: pairs along the row. Zeros fill the last chunk up.
  void fill_row(int64_t row, int64_t k0, int64_t depth, float* to) const {
    if (!whole_chunks_) {
      for (int64_t k = 0; k < depth; k += kChunk, to += kChunk / 2) {
        Bf16 decoded[kChunk] = {};
        decode_elements<Isa>(weight_, decode_, row * k_ + k0 + k, std::min(kChunk, depth - k), decoded);
        Isa::split_pairs(decoded, to);
      }
      return;
    }
    float scales[Isa::Pairs::kDepth / 32];
    find_scales(row, k0, depth, scales);
    const auto decode = *decode_pairs_;
    const uint8_t* packed = packed_at(row, k0);
    for (int64_t i = 0; i < depth / kChunk; ++i)
      decode.one_row(packed + i * kChunk / 2, scales + 2 * i, to + i * kChunk / 2);
  }

  // Columns [k0, k0 + columns) of rows [n0, n0 + depth) as panels of B: pairs across two rows. Zeros stand for missing
  // rows.
  void fill_panels(int64_t n0, int64_t depth, int64_t pairs, int64_t k0, int64_t columns, int64_t panel_size,
                   float* to) const {
    constexpr int64_t kAhead = 8;  // rows; a row has too few lines of the task for the hardware's prefetcher
    for (int64_t pair = 0; pair < pairs; ++pair, to += kPanel) {
      const int64_t n = 2 * pair;
      for (int64_t ahead = n + kAhead; ahead < std::min(depth, n + kAhead + 2); ++ahead)
        prefetch(n0 + ahead, k0, columns);
      if (whole_chunks_) {
        fill_whole_pair(n0 + n, std::clamp<int64_t>(depth - n, 0, 2), k0, columns, panel_size, to);
      } else {
        fill_any_pair(n0 + n, std::clamp<int64_t>(depth - n, 0, 2), k0, columns, panel_size, to);
      }
    }
  }

  // Fetches columns [k0, k0 + columns) of a row that will be decoded.
  void prefetch(int64_t row, int64_t k0, int64_t columns) const {
    for (int64_t k = 0; k < columns; k += 128) __builtin_prefetch(packed_at(row, k0 + k));
  }

 private:
  const uint8_t* packed_at(int64_t row, int64_t column) const {
    return weight_.packed + (row * k_ + column) * weight_.format->bits / 8;
  }

  // The scale of each 32 elements.
  void find_scales(int64_t row, int64_t k0, int64_t columns, float* scales) const {
    const int64_t element = row * k_ + k0;
    for (int64_t i = 0; i < columns / 32; i += 2) {
      scales[i] = scale_of_((element + 32 * i) >> shift_);
      scales[i + 1] = shift_ == 5 ? scale_of_((element + 32 * i + 32) >> shift_) : scales[i];
    }
  }

  void fill_whole_pair(int64_t n, int64_t rows, int64_t k0, int64_t columns, int64_t panel_size, float* to) const {
    float scales[2][kMaxColumns / 32] = {};  // a missing row is another one times zero
    for (int64_t i = 0; i < rows; ++i) find_scales(n + i, k0, columns, scales[i]);
    const uint8_t* packed = rows > 0 ? packed_at(n, k0) : weight_.packed;
    const uint8_t* second = rows > 1 ? packed_at(n + 1, k0) : packed;
    const auto decode = *decode_pairs_;
    for (int64_t i = 0; i < columns / kChunk; ++i, to += 2 * panel_size)
      decode.two_rows(packed + i * kChunk / 2, scales[0] + 2 * i, second + i * kChunk / 2, scales[1] + 2 * i, to,
                      to + panel_size);
  }

  void fill_any_pair(int64_t n, int64_t rows, int64_t k0, int64_t columns, int64_t panel_size, float* to) const {
    for (int64_t k = 0; k < columns; k += kChunk, to += 2 * panel_size) {
      Bf16 decoded[2][kChunk] = {};
      for (int64_t i = 0; i < rows; ++i)
        decode_elements<Isa>(weight_, decode_, (n + i) * k_ + k0 + k, std::min(kChunk, columns - k), decoded[i]);
      Isa::join_rows(decoded[0], decoded[1], to, to + panel_size);
    }
  }

  const QuantizedWeight& weight_;
  const int64_t k_;
  const bool whole_chunks_;
  const BlockScales<Isa> scale_of_;
  std::optional<typename Isa::Decoder> decode_;
  std::optional<typename Isa::PairDecoder> decode_pairs_;
  int shift_ = 0;
};

// y = x W^T (+ LoRA + bias)
template <class Isa>
void linear_bf16_gemm(const LinearArgs& args, const ParallelFor& parallel_for) {
  const TransposedRows<Isa> x(static_cast<const Bf16*>(args.x), args.m, args.k, parallel_for);
  const DepthBlocks& blocks = x.blocks;
  const Tasks tasks(x.panels.count, kPanel, ceil_div(args.n, kStrip<Isa>), 1, Isa::Pairs::kMaxStrips,
                    parallel_for.threads);
  parallel_for(tasks.count, 1, [&](int64_t begin, int64_t end) {
    const PairWeight<Isa> weight(args.weight, args.k);
    const typename Isa::Pairs::Session session;
    const int64_t max_width = tasks.strips_per_task() * kStrip<Isa>;
    const int64_t sums_stride = tasks.panels_per_task() * kPanel + 16;
    const Scratch rows(max_width * Isa::Pairs::kStride);             // of W
    const Scratch transposed(max_width * sums_stride);               // y^T
    const Scratch sums((sums_stride - 16) * max_width);              // y
    const Scratch tile(args.rank ? kDepth * max_width : max_width);  // of lora_b, or the bias
    for (int64_t i = begin; i < end; ++i) {
      const Task task = tasks[i];
      const int64_t m0 = task.panel_begin * kPanel, m = std::min(task.panel_end * kPanel, args.m) - m0;
      const int64_t n0 = task.strip_begin * kStrip<Isa>, width = task.strips * kStrip<Isa>;
      const int64_t n = std::min(width, args.n - n0);
      std::fill_n(transposed.data(), width * sums_stride, 0.0f);
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t k0 = blocks.begin(block);
        // What this thread decodes next is fetched meanwhile: rows' pieces are too short for the hardware's prefetcher.
        const bool last = block + 1 == blocks.count;
        for (int64_t row = 0; row < n; ++row) {
          const int64_t w_row = args.first_row + n0 + row;
          weight.prefetch(last ? w_row + width : w_row, last ? 0 : blocks.begin(block + 1), blocks.size);
          weight.fill_row(w_row, k0, blocks.depth(block), rows.data() + row * Isa::Pairs::kStride);
        }
        const auto panel_of_x = [&](int64_t panel) { return x.panel(panel, block); };
        multiply_panels<Isa>(rows.data(), n, panel_of_x, x.panels, task.panel_begin, task.panel_end,
                             blocks.pairs(block), transposed.data(), sums_stride);
      }
      for (int64_t row = 0; row < round_up(m, 16); row += 16)
        for (int64_t column = 0; column < width; column += 16)
          Isa::transpose(transposed.data() + column * sums_stride + row, sums_stride,
                         sums.data() + row * width + column, width);
      finish_linear<Isa>(args, m0, m, n0, task.strips, tile.data(), sums.data());
    }
  });
}

// grad_x = grad W (+ LoRA)
template <class Isa>
void grad_input_bf16_gemm(const LinearGradInputArgs& args, const ParallelFor& parallel_for) {
  const PairRows<Isa> grad(static_cast<const Bf16*>(args.grad), args.m, args.n, parallel_for);
  const DepthBlocks& blocks = grad.blocks;
  // Whole cache lines of packed weight to a task: 128 columns, or 256. 16 rows of grad are its share at least.
  const Tasks tasks(ceil_div(args.m, 16), 16, ceil_div(args.k, kChunk), 128 / kChunk, kMaxColumns / kChunk,
                    parallel_for.threads);
  parallel_for(tasks.count, 1, [&](int64_t begin, int64_t end) {
    const PairWeight<Isa> weight(args.weight, args.k);
    const typename Isa::Pairs::Session session;
    const int64_t max_width = tasks.strips_per_task() * kChunk;
    constexpr int64_t kPanelSize = Isa::Pairs::kDepth / 2 * kPanel;
    const Scratch panels(max_width / kPanel * kPanelSize);  // of W
    const Scratch sums(tasks.panels_per_task() * 16 * max_width);
    const Scratch lora_a(args.rank ? kDepth * max_width : 0);
    for (int64_t i = begin; i < end; ++i) {
      const Task task = tasks[i];
      const int64_t m0 = task.panel_begin * 16, m = std::min(task.panel_end * 16, args.m) - m0;
      const int64_t k0 = task.strip_begin * kChunk, width = task.strips * kChunk;
      const int64_t k = std::min(width, args.k - k0);
      std::fill_n(sums.data(), round_up(m, 16) * width, 0.0f);
      for (int64_t block = 0; block < blocks.count; ++block) {
        weight.fill_panels(args.first_row + blocks.begin(block), blocks.depth(block), blocks.pairs(block), k0, k,
                           kPanelSize, panels.data());
        const auto panel_of_w = [&](int64_t panel) { return panels.data() + panel * kPanelSize; };
        multiply_panels<Isa>(grad.row(m0, block), m, panel_of_w, ColumnPanels(width), 0, width / kPanel,
                             blocks.pairs(block), sums.data(), width);
      }
      for (int64_t column = 0; column < m * width; column += kChunk) Isa::restore_columns(sums.data() + column);
      finish_grad_input<Isa>(args, m0, m, k0, width / kStrip<Isa>, lora_a.data(), sums.data());
    }
  });
}

}  // namespace lowbit::cpu

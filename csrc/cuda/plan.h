// Which kernel computes a product, in which tiles, and over how many blocks of threads: functions of sizes and of the
// GPU, for the host. A plan prints itself.
//
// The figures below are per weight (of n k, which scales all of them alike, as the number of multiprocessors scales all
// issue slots) and for an H100: 3.35 TB/s of DRAM, that is 0.30 ps per byte; 132 multiprocessors that issue 128 lanes'
// instructions in a cycle of 1.7 GHz, that is 0.035 ps per instruction. instructions: tests/test_cuda_budget.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "../arguments.h"
#include "device/layout.h"

namespace lowbit::cuda {

struct Gpu {
  int capability;       // compute capability, times 10
  int code_capability;  // of the code that it runs: the last compiled for that is not newer
  int processors;       // multiprocessors
};

enum class Path {
  gemv_mma,            // linear: W decoded into registers for a few rows of x, on tensor cores
  gemv_fma,            // the same in fp32 arithmetic
  gemv_int8,           // the same for int8
  gemm,                // linear: W decoded into registers for each tile of rows, on tensor cores
  linear_any,          // linear for any shape and alignment, a weight at a time
  grad_input_mma,      // linear_grad_input on tensor cores
  grad_input_fma,      // in fp32 arithmetic
  grad_input_element,  // for any shape and alignment, a weight at a time
  decode,              // W decoded into memory once, then torch's own product
};

struct Plan {
  Path path;
  int rows = 0, columns = 0;                // of the output in a tile
  int step_blocks = 0;                      // gemv_mma: blocks of W that a step spans
  int scale_columns = 0;                    // gemm: how many columns of W certainly share a scale
  int64_t row_tiles = 0, column_tiles = 0;  // of the output
  // Of the contraction: how many parts it is split into, and how much of it each takes. gemv: columns; gemm: tiles;
  // grad_input: rows of W.
  int64_t splits = 1, split_size = 0;
  int64_t workspace = 0;  // floats
  int64_t counters = 0;   // zeros, which the last block of threads to use them leaves as zeros

  int64_t blocks() const { return row_tiles * column_tiles * splits; }

  std::string describe() const {
    constexpr const char* kNames[] = {"gemv_mma",       "gemv_fma",       "gemv_int8",          "gemm",  "linear_any",
                                      "grad_input_mma", "grad_input_fma", "grad_input_element", "decode"};
    const auto text = [](int64_t number) { return std::to_string(number); };
    return std::string(kNames[static_cast<int>(path)]) + ": tiles of " + text(rows) + " x " + text(columns) + ", " +
           text(row_tiles) + " x " + text(column_tiles) + " of them, " + text(splits) + " splits of " +
           text(split_size) + ", workspace " + text(workspace) + ", counters " + text(counters);
  }
};

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Blocks of threads that share out `units` of work, `per_block` at a time: as many as there is work for, and no more
// than `per_processor` on each multiprocessor.
inline unsigned blocks_for(int64_t units, int64_t per_block, int64_t per_processor, int processors) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(units, per_block), 1, processors * per_processor));
}

// --- sum_of_squares

// A block of threads sums every so many tiles, and one block their sums: in an order that sizes alone decide, so that
// every GPU finds the same number. An H200 holds 1056 such blocks.
constexpr int64_t kSumTile = 4096;  // elements
constexpr int64_t kMostSumBlocks = 1024;
inline unsigned sum_blocks(int64_t tiles) { return blocks_for(tiles, 1, kMostSumBlocks, 1); }

// --- linear: the path

// gemv on tensor cores takes up to 8 rows for 2.1 instructions, 0.07 ps, where reading W takes 0.15 ps: it waits for
// DRAM. More rows would be a second pass, while gemm's tiles have 16 rows at least.
constexpr int64_t kMostGemvRows = 8;

// gemv in fp32 arithmetic (fp32 x; 16 bits before sm_80; int8) takes 1.9 instructions for each row, 0.07 ps. Decoding
// into fp32 moves 0.5 + 4 + 4 bytes, 2.5 ps, and an fp32 product at 60 TFLOPS takes 0.03 ps for each row: they meet at
// 2.5 / (0.07 - 0.03) = 62 rows. On a B200, with 2.4 times the bandwidth and 1.25 times the instructions, at 1.06 /
// (0.056 - 0.03) = 40; for 16 bits on a T4 (0.5 + 2 + 2 bytes) at 14 / 0.37 = 38; for int8 and 16-bit x (1 + 2 + 2
// bytes, 2.2 instructions) at 1.5 / 0.08 = 19. One number, below all of them:
constexpr int64_t kMostFmaRows = 16;

// Decoding into 16 bits moves 4.5 bytes, 1.3 ps, before a product at 800 TFLOPS begins: 0.0025 ps for each row. gemm
// reads 0.5 bytes, but mma.sync reaches about 0.6 of that rate, 0.0042 ps for each row: they would meet at 1.2 / 0.0017
// = 700 rows. But every tile of rows (128 at most) decodes W again, 4 to 5 instructions or 0.16 ps: at 256 rows these
// are 0.15 + 2 x 0.16 + 1.08 = 1.5 ps against 1.3 + 0.64 = 1.9 ps; at 512 rows, 2.9 against 2.6.
constexpr int64_t kMostGemmRows = 256;

inline bool has_tensor_cores(Dtype dtype, const Gpu& gpu) {
  return dtype != Dtype::f32 && gpu.code_capability >= 80;  // m16n8k16, bf16
}

// --- linear: gemv

constexpr int kPanelBlocks = 128;          // scales of a row that are decoded at once
constexpr int64_t kMostColumns = 1 << 26;  // offsets within 8 rows have 32 bits

struct Shares {
  int64_t count, size;  // of units; the last may be smaller
};

// Over how many blocks of threads gemv shares out the columns of each of `tiles` tiles, in units of columns that its
// warps take in one step: as many as fit with one, two or three blocks on each multiprocessor, if that costs less.
//
// In sixths of a multiprocessor's time for a block's unit (8 KB, about 0.24 us): a block takes 6 for each and 2 to
// begin; half as much again where it is alone, since 8 warps do not keep a multiprocessor busy; and adding up the
// shares costs 18: the sums go to L2, a counter comes from there, and then the others' sums.
constexpr Shares gemv_column_shares(int64_t tiles, int64_t units, int processors) {
  Shares best{1, units};
  int64_t least = INT64_MAX;
  for (int per_processor = 0; per_processor <= kGemvResident; ++per_processor) {
    const int64_t wanted = std::clamp<int64_t>(per_processor * processors / tiles, 1, units);
    const int64_t size = ceil_div(units, wanted), count = ceil_div(units, size);
    const int64_t busiest = ceil_div(tiles * count, processors);
    const int64_t cost = (6 * size + 2) * (busiest == 1 ? 3 : 2 * busiest) / 2 + (count > 1 ? 18 : 0);
    if (cost >= least) continue;
    least = cost;
    best = {count, size};
  }
  return best;
}

// Bytes of W that are on their way to each multiprocessor while gemv runs. DRAM of 4.3 TB/s that answers in 0.8 us
// under load needs 26 KB for each of 132 (H200), and more to spare, since a warp asks for a step when it has used
// another.
inline int64_t gemv_bytes_in_flight(const Plan& plan, const Gpu& gpu) {
  const int64_t blocks = std::min<int64_t>(ceil_div(plan.blocks(), gpu.processors), kGemvResident);
  const int64_t ahead = plan.path == Path::gemv_mma ? kGemvMmaAhead : kGemvFmaAhead;
  const int64_t steps = std::min(ahead, ceil_div(plan.split_size, int64_t{kGemvWarps} * kGemvDepth));
  return blocks * kGemvWarps * steps * (kGemvRows * kGemvDepth / 2);
}

// For int8, gemv_int8; for shapes and alignments that the fast kernels do not take, linear_any.
inline Plan plan_gemv(const LinearArgs& args, const Gpu& gpu) {
  const QuantizedWeight& weight = args.weight;
  const bool is_int8 = weight.format->bits == 8;
  const bool are_aligned = is_aligned(weight.packed, kAccessBytes) && is_aligned(args.x, kAccessBytes);
  Plan plan{Path::linear_any};
  if (is_int8 && are_aligned && args.k % kAccessBytes == 0) plan.path = Path::gemv_int8;
  if (is_int8 || !are_aligned || args.n < kGemvRows || args.k == 0 || args.k > kMostColumns ||
      args.k % kGemvLaneDepth != 0 || args.k % weight.block_size != 0 ||
      weight.numel / weight.block_size > UINT32_MAX || args.rank > kMostColumns)
    return plan;
  if (has_tensor_cores(args.dtype, gpu)) {
    plan.path = Path::gemv_mma;
    plan.step_blocks = static_cast<int>(std::clamp<int64_t>(kGemvDepth / weight.block_size, 1, 4));
    plan.rows = args.m <= 8 / plan.step_blocks ? 8 / plan.step_blocks : 8;
  } else {
    plan.path = Path::gemv_fma;
    plan.rows = args.m > 1 ? 2 : 1;
  }
  plan.columns = kGemvRows;
  plan.row_tiles = ceil_div(args.m, plan.rows);
  plan.column_tiles = ceil_div(args.n, kGemvRows);
  // A share begins with a block.
  const int64_t unit = std::max<int64_t>(kGemvWarps * kGemvDepth, weight.block_size),
                tiles = plan.row_tiles * plan.column_tiles;
  const Shares shares = gemv_column_shares(std::max<int64_t>(tiles, 1), ceil_div(args.k, unit), gpu.processors);
  plan.splits = shares.count;
  plan.split_size = shares.size * unit;
  plan.workspace = plan.splits > 1 ? plan.splits * args.m * args.n : 0;
  plan.counters = plan.splits > 1 ? tiles : 0;
  return plan;
}

// --- linear: gemm

constexpr int kMaxSplits = 16;
constexpr int64_t kMaxSide = 1 << 23;  // of k and rank: offsets within a tile's rows have 32 bits

inline bool gemm_fits(const LinearArgs& args) {
  return args.weight.format->bits == 4 && args.dtype != Dtype::f32 && args.k > 0 && args.k % 32 == 0 &&
         args.k < kMaxSide && args.rank < kMaxSide && args.weight.numel / 32 <= UINT32_MAX &&
         is_aligned(args.x, kAccessBytes) && is_aligned(args.weight.packed, kAccessBytes) &&
         ceil_div(args.m, 16) * ceil_div(args.n, 64) <= INT32_MAX;
}

// scale_columns: 64 columns share a scale where blocks are that long and start at multiples of it; else 32, for which
// tiles have at most 32 rows (two sets of block sums beside 64 rows' sums would not fit the registers).
//
// The tile is the smallest that holds all rows of x, or the largest: a tile of M rows costs its shared memory 40 + M
// cycles per step of a warp, so that one large tile beats two small ones.
//
// k is split where that costs less. In units of one multiprocessor's time for a tile of k: each round of blocks takes
// its tiles of k and 4 more (filling table and ring, writing out); the kernel that adds up the splits takes 5, and
// 8 bytes of each of their sums go through L2, of which 2^16 take about 40 units of one multiprocessor.
inline Plan plan_gemm(const LinearArgs& args, const Gpu& gpu) {
  Plan plan{Path::gemm};
  plan.scale_columns = args.weight.block_size >= 64 && args.k % 64 == 0 ? 64 : 32;
  plan.rows = args.m <= 16 ? 16 : args.m <= 32 || plan.scale_columns == 32 ? 32 : 64;
  plan.columns = 4 * plan.rows;
  plan.row_tiles = ceil_div(args.m, plan.rows);
  plan.column_tiles = ceil_div(args.n, plan.columns);
  const int64_t tiles_k = ceil_div(args.k, 4096 / plan.rows), tiles = plan.row_tiles * plan.column_tiles;
  int64_t least = INT64_MAX;
  for (int64_t tried = 1; tried <= std::min<int64_t>(tiles_k, kMaxSplits); ++tried) {
    const int64_t per_split = ceil_div(tiles_k, tried), splits = ceil_div(tiles_k, per_split);
    const int64_t rounds = ceil_div(tiles * splits, gpu.processors);
    const int64_t second_pass = splits == 1 ? 0 : 5 + splits * args.m * args.n / 65536 * 40 / gpu.processors;
    const int64_t cost = rounds * (per_split + 4) + second_pass;
    if (cost >= least) continue;
    least = cost;
    plan.split_size = per_split;
    plan.splits = splits;
  }
  plan.workspace = plan.splits > 1 ? plan.splits * args.m * args.n : 0;
  return plan;
}

inline Plan plan_linear(const LinearArgs& args, const Gpu& gpu) {
  const bool by_mma = args.weight.format->bits == 4 && has_tensor_cores(args.dtype, gpu);
  if (args.m <= (by_mma ? kMostGemvRows : kMostFmaRows) || args.n == 0) return plan_gemv(args, gpu);
  if (by_mma && args.m <= kMostGemmRows && gemm_fits(args)) return plan_gemm(args, gpu);
  return {Path::decode};
}

// --- linear_grad_input

// Whether it should be faster to decode the weight into 16 or 32 bits and to call cuBLAS: from many rows on.
//
// Cycles of a multiprocessor per weight. An H100 moves 14 bytes in one. To decode to 16 bits and read that again moves
// 4.5 bytes: 0.32; to fp32 8.5 bytes, 0.61, and its product of m rows takes m / 128 more. The kernels take
//   mma      0.058 (shared memory) per 32 rows: 5.5 tiles; 6, since cuBLAS does not reach all of that speed,
//   fma      4.7 instructions of 128 in a cycle, 0.037, per 2 rows: 8 tiles in 16 bits, 24 in fp32,
//   element  about 40 instructions, 0.31, per 8 rows: 1 tile.
// Other GPUs move fewer bytes in a cycle, so that decoding first costs more, but for the B200 (29 bytes: 3 tiles of
// mma) and the H200, which nothing tells from an H100 (20 bytes: would be 4).
inline bool decodes_first(Path path, const LinearGradInputArgs& args, const Gpu& gpu) {
  if (args.m == 0 || args.n == 0 || args.k == 0) return false;
  if (path == Path::grad_input_mma) return args.m > (gpu.capability / 10 == 10 ? 3 : 6) * 32;
  if (path == Path::grad_input_fma) return args.m > (args.dtype == Dtype::f32 ? 24 : 8) * FmaTile::kRows;
  return args.m > ElementTile::kRows;
}

// Which kernel serves a product, and how its contraction is split: into no more parts than fill the GPU, since each
// part writes and reads a tile of fp32.
inline Plan plan_grad_input_kernel(const LinearGradInputArgs& args, const Gpu& gpu) {
  constexpr int kBlocksPerProcessor = 2;
  constexpr int64_t kMost = 1 << 30;
  const QuantizedWeight& weight = args.weight;
  // 16-byte accesses of W, whose rows the kernels count in 32 bits; for the tensor cores also of grad, whole blocks in
  // each row, and blocks counted in 32 bits.
  const bool fits_fma = weight.format->bits == 4 && args.k % (2 * kAccessBytes) == 0 &&
                        is_aligned(weight.packed, kAccessBytes) && args.n < kMost;
  const bool fits_mma = fits_fma && has_tensor_cores(args.dtype, gpu) && is_aligned(args.grad, kAccessBytes) &&
                        args.n % (kAccessBytes / 2) == 0 && args.k % weight.block_size == 0 &&
                        weight.numel / weight.block_size < kMost;
  Plan plan{Path::grad_input_element, ElementTile::kRows, ElementTile::kColumns};
  int64_t depth = 64;  // rows of W that a block of threads should have at least, in multiples of which it is split
  if (fits_mma) {
    const int rows = args.m <= 8 ? 8 : args.m <= 16 || weight.block_size < 64 ? 16 : 32;
    plan = {Path::grad_input_mma, rows, MmaTile<8>::kColumns};
    depth = MmaTile<8>::kDepth;
  } else if (fits_fma) {
    plan = {Path::grad_input_fma, FmaTile::kRows, FmaTile::kColumns};
  }
  plan.row_tiles = ceil_div(args.m, plan.rows);
  plan.column_tiles = ceil_div(args.k, plan.columns);
  const int64_t parts = ceil_div(args.n, depth), tiles = std::max<int64_t>(plan.row_tiles * plan.column_tiles, 1);
  const int64_t wanted =
      std::clamp<int64_t>(gpu.processors * kBlocksPerProcessor / tiles, 1, std::max<int64_t>(parts, 1));
  plan.split_size = std::max<int64_t>(ceil_div(parts, wanted), 1) * depth;
  plan.splits = ceil_div(args.n, plan.split_size);
  plan.workspace = plan.splits * args.m * args.k;
  return plan;
}

inline Plan plan_grad_input(const LinearGradInputArgs& args, const Gpu& gpu) {
  const Plan plan = plan_grad_input_kernel(args, gpu);
  return decodes_first(plan.path, args, gpu) ? Plan{Path::decode} : plan;
}

}  // namespace lowbit::cuda

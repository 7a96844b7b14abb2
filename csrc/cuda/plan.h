// Which kernel computes a product, in which tiles, and over how many blocks of threads: functions of sizes and of the
// GPU, for the host. A plan prints itself.
//
// The figures below are per weight (of n k, which scales all of them alike, as the number of multiprocessors scales all
// issue slots) and for an H100: 3.35 TB/s of DRAM, that is 0.30 ps per byte; 132 multiprocessors that issue 128 lanes'
// instructions in a cycle of 1.7 GHz, that is 0.035 ps per instruction. instructions: tests/test_cuda_budget.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "../arguments.h"
#include "device/layout.h"

namespace lowbit::cuda {

struct Gpu {
  int capability;       // compute capability, times 10
  int code_capability;  // of the code that it runs: the last compiled for that is not newer
  int processors;       // multiprocessors
  int64_t l2_bytes = 0;
  int shared_memory = 100 * 1024;  // bytes of a multiprocessor; the fewest since sm_80
};

// How many blocks of threads, of so many bytes of shared memory, a multiprocessor holds at once. The GPU takes 1 KB for
// each. (Registers allow for two of each kernel that asks: that is what their __launch_bounds__ are for.)
inline int blocks_per_processor(const Gpu& gpu, int shared_bytes) {
  return std::clamp(gpu.shared_memory / (shared_bytes + 1024), 1, 2);
}

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
  int stages = 0;                           // gemm: of the ring of tiles
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

// --- gptq_block, descend_block

// Rows that a block of threads has, one each, if each keeps so many numbers for every column in shared memory: a
// warp's, so that a weight's rows reach every multiprocessor; fewer where those would not fit 32 KB. Columns are 32 to
// 4096.
inline int rows_at_once(int64_t columns, int numbers_per_column) {
  return static_cast<int>(std::clamp<int64_t>(8192 / (columns * numbers_per_column), 1, 32));
}

// --- which path for which rows

// The most rows of x (of grad) that each kernel takes; above them W is decoded first and cuBLAS multiplies.
// (grad_input's kernels read W once for each tile of rows, so their numbers are whole tiles.)
struct MostRows {
  int first_capability;  // of the generation
  int64_t gemv_mma, gemm, grad_input_mma;
  // In fp32 arithmetic: fp32 x; 16 bits before sm_80; int8.
  int64_t gemv_fma, grad_input_fma_16_bits, grad_input_fma_32_bits, grad_input_element;
};

// gemv_mma takes up to 8 rows for 2.1 instructions, 0.07 ps, where reading W takes 0.15 ps: it waits for DRAM. More
// rows would be a second pass, while gemm's tiles have 16 rows at least.
//
// gemm. Decoding into 16 bits moves 4.5 bytes, 1.3 ps, before a product at 800 TFLOPS begins: 0.0025 ps for each row.
// gemm reads 0.5 bytes, but mma.sync reaches about 0.6 of that rate, 0.0042 ps for each row, and every tile of 64 rows
// decodes W again, 4 to 5 instructions or 0.16 ps: at 128 rows these are 0.15 + 2 x 0.16 + 0.54 = 1.0 ps against 1.3 +
// 0.32 = 1.6, at 256 rows 1.9 against 1.9. An H200 decodes in 1.0 ps, and what no other work hides adds up: 128 rows.
// An A100 (2 TB/s, 0.051 ps per instruction, one rate for mma.sync and cuBLAS, of which the kernel reaches 0.9): at 256
// rows 0.25 + 4 x 0.25 + 2.2 = 3.4 against 2.25 + 1.9 = 4.2, at 512 rows 6.6 against 6.1. Ada, and Blackwell without
// tcgen05 (12.0), have less bandwidth for the same arithmetic, so that decoding pays later still; one number for all.
// A B200 (7.7 TB/s; mma.sync at 0.0036 ps, cuBLAS 0.001 for each row): at 96 rows 0.065 + 2 x 0.12 + 0.35 = 0.65
// against 0.58 + 0.1 = 0.68; at 128 rows 0.77 against 0.71.
//
// gemv_fma takes 1.9 instructions for each row, 0.07 ps. Decoding into fp32 moves 0.5 + 4 + 4 bytes, 2.5 ps, and an
// fp32 product at 60 TFLOPS takes 0.03 ps for each row: they meet at 2.5 / (0.07 - 0.03) = 62 rows. On a B200, with 2.4
// times the bandwidth and 1.25 times the instructions, at 1.06 / (0.056 - 0.03) = 40; for 16 bits on a T4 (0.5 + 2 + 2
// bytes) at 14 / 0.37 = 38; for int8 and 16-bit x (1 + 2 + 2 bytes, 2.2 instructions) at 1.5 / 0.08 = 19. One number,
// below all of them.
//
// grad_input, in cycles of a multiprocessor per weight. An H100 moves 14 bytes in one. To decode to 16 bits and read
// that again moves 4.5 bytes: 0.32; to fp32 8.5 bytes, 0.61, and its product of m rows takes m / 128 more. The kernels
// take
//   mma      0.058 (shared memory) per 32 rows: 5.5 tiles; 6, since cuBLAS does not reach all of that speed,
//   fma      4.7 instructions of 128 in a cycle, 0.037, per 2 rows: 8 tiles in 16 bits, 24 in fp32,
//   element  about 40 instructions, 0.31, per 8 rows: 1 tile.
// Other GPUs move fewer bytes in a cycle, so that decoding first costs more, but for the B200 (29 bytes: 3 tiles of
// mma) and the H200, which nothing tells from an H100 (20 bytes: would be 4).
constexpr MostRows kMostRows[] = {
    //    gemv  gemm  grad  fma
    {0, 8, 256, 192, 16, 16, 48, 8},    // no tensor cores that the kernels use before 8.0
    {80, 8, 256, 192, 16, 16, 48, 8},   // A100; consumer GPUs of 8.6 and 8.9
    {90, 8, 128, 192, 16, 16, 48, 8},   // H100, H200
    {100, 8, 96, 96, 16, 16, 48, 8},    // B200
    {110, 8, 256, 192, 16, 16, 48, 8},  // consumer GPUs of 12.0
};

inline const MostRows& most_rows(const Gpu& gpu) {
  const MostRows* found = kMostRows;
  for (const MostRows& generation : kMostRows)
    if (generation.first_capability <= gpu.capability) found = &generation;
  return *found;
}

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
         ceil_div(args.m, 16) * ceil_div(args.n, 128) <= INT32_MAX;
}

// Cycles of an H200's multiprocessor, of which one block of threads takes all.
//
// A step of a warp is 32 x 64 weights, 1 KB, which DRAM at 4.3 TB/s brings in 53 cycles. Shared memory serves it in
// 32 cycles of look-ups, 16 for W in and out, M for x out and 32 M / N for x in; the L2 brings W and 4 M / N as much
// of x in 42 (1 + 4 M / N) at 5.5 TB/s. A block takes 2000 cycles more, for filling the table and the ring and
// writing out. Where k is split, it writes its sums (24 bytes in a cycle, as all blocks do so at once) and arrives
// (1500), and the last of a tile's blocks reads all of them (64 bytes in a cycle: few blocks read).
inline int64_t gemm_cycles(int64_t rows, int64_t columns, int64_t rounds, int64_t tiles_k, int64_t splits) {
  const int64_t step = std::max(48 + rows + 32 * rows / columns, 42 + 168 * rows / columns);
  const int64_t sums = 4 * rows * columns;
  const int64_t reduction = splits == 1 ? 0 : sums / 24 + 1500 + splits * sums / 64;
  return rounds * (tiles_k * kGemmWarps * step + 2000) + reduction;
}

// The tiles that the kernel is compiled for; only the first two where 32 columns share a scale, and not 64. (Tiles of
// 64 x 128 would take a register more than there are, as would two sets of block sums beside 64 rows' sums.)
struct GemmShape {
  int rows, columns;
};
constexpr GemmShape kGemmShapes[] = {{16, 128}, {32, 128}, {32, 256}, {64, 256}};

// scale_columns: 64 columns share a scale where blocks are that long and start at multiples of it; else 32.
//
// Large tiles read x less often and decode W once for more rows; small ones leave fewer sums to the last block, since k
// is split less often. The tiles and the splits that take the fewest cycles are taken. GPUs whose blocks cannot have
// the memory for four stages have two: 16 KB of W on their way, where an RTX 5090 needs 9.
inline Plan plan_gemm(const LinearArgs& args, const Gpu& gpu) {
  Plan plan{Path::gemm};
  plan.scale_columns = args.weight.block_size >= 64 && args.k % 64 == 0 ? 64 : 32;
  int64_t least = INT64_MAX;
  for (const GemmShape& shape : kGemmShapes) {
    if (plan.scale_columns == 32 && &shape > &kGemmShapes[1]) break;
    const int64_t row_tiles = ceil_div(args.m, shape.rows), column_tiles = ceil_div(args.n, shape.columns);
    const int64_t tiles_k = ceil_div(args.k, gemm_depth(shape.columns));
    for (int64_t tried = 1; tried <= std::min<int64_t>(tiles_k, kMaxSplits); ++tried) {
      const int64_t per_split = ceil_div(tiles_k, tried), splits = ceil_div(tiles_k, per_split);
      const int64_t rounds = ceil_div(row_tiles * column_tiles * splits, gpu.processors);
      const int64_t cycles = gemm_cycles(shape.rows, shape.columns, rounds, per_split, splits);
      if (cycles >= least) continue;
      least = cycles;
      plan.rows = shape.rows, plan.columns = shape.columns;
      plan.row_tiles = row_tiles, plan.column_tiles = column_tiles;
      plan.splits = splits, plan.split_size = per_split;
    }
  }
  plan.stages = gemm_most_stages(plan.rows);
  if (gemm_shared_bytes(plan.rows, plan.columns, plan.stages) > gpu.shared_memory - 1024) plan.stages = 2;
  plan.workspace = plan.splits > 1 ? plan.splits * args.m * args.n : 0;
  plan.counters = plan.splits > 1 ? plan.row_tiles * plan.column_tiles : 0;
  return plan;
}

inline Plan plan_linear(const LinearArgs& args, const Gpu& gpu) {
  const MostRows& most = most_rows(gpu);
  const bool by_mma = args.weight.format->bits == 4 && has_tensor_cores(args.dtype, gpu);
  if (args.m <= (by_mma ? most.gemv_mma : most.gemv_fma) || args.n == 0) return plan_gemv(args, gpu);
  if (by_mma && args.m <= most.gemm && gemm_fits(args)) return plan_gemm(args, gpu);
  return {Path::decode};
}

// --- linear_grad_input

// Whether it should be faster to decode the weight into 16 or 32 bits and to call cuBLAS.
inline bool decodes_first(Path path, const LinearGradInputArgs& args, const Gpu& gpu) {
  if (args.m == 0 || args.n == 0 || args.k == 0) return false;
  const MostRows& most = most_rows(gpu);
  if (path == Path::grad_input_mma) return args.m > most.grad_input_mma;
  if (path == Path::grad_input_element) return args.m > most.grad_input_element;
  return args.m > (args.dtype == Dtype::f32 ? most.grad_input_fma_32_bits : most.grad_input_fma_16_bits);
}

constexpr int64_t kMostGradInputSplits = 16;

// Splits the contraction, of n rows of W in steps of `depth`, where that takes less time. The unit is a
// multiprocessor's time for a step of one of the `held` blocks that it holds at once. A lone block takes 1.5, since
// eight warps do not hide all of their latencies. A round of blocks takes 2 more, to fill table and stages and to write
// out. Where there are several splits, it takes 1 until the last block knows that it is, and their sums go through L2
// twice, at 64 bytes in a cycle, of which a unit has about 900.
inline void split_grad_input(Plan& plan, int64_t n, int64_t depth, int held, const Gpu& gpu) {
  const int64_t tiles = plan.row_tiles * plan.column_tiles, steps = std::max<int64_t>(ceil_div(n, depth), 1);
  const auto units = [](int64_t blocks) { return blocks == 1 ? 1.5 : static_cast<double>(blocks); };
  const double units_of_sums = 2.0 * plan.rows * plan.columns * sizeof(float) / 64 / 900;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t tried = 1; tried <= std::min(steps, kMostGradInputSplits); ++tried) {
    const int64_t per_split = ceil_div(steps, tried), splits = ceil_div(steps, per_split), blocks = tiles * splits;
    const int64_t rounds = blocks / (held * gpu.processors), rest = blocks % (held * gpu.processors);
    double cost =
        (rounds * units(held) + units(ceil_div(rest, gpu.processors))) * per_split + 2 * (rounds + (rest > 0));
    if (splits > 1) cost += 1 + units_of_sums * ceil_div(blocks, gpu.processors);
    if (cost >= least) continue;
    least = cost;
    plan.split_size = per_split * depth;
    plan.splits = splits;
  }
}

// Which kernel serves a product.
inline Plan plan_grad_input_kernel(const LinearGradInputArgs& args, const Gpu& gpu) {
  constexpr int64_t kMost = 1 << 30;
  const QuantizedWeight& weight = args.weight;
  // 16-byte accesses of W, whose rows the kernels count in 32 bits; for the tensor cores also of grad, whole blocks in
  // each row, and blocks and the rank counted in 32 bits.
  const bool fits_fma = weight.format->bits == 4 && args.k % (2 * kAccessBytes) == 0 &&
                        is_aligned(weight.packed, kAccessBytes) && args.n < kMost;
  const bool fits_mma = fits_fma && has_tensor_cores(args.dtype, gpu) && is_aligned(args.grad, kAccessBytes) &&
                        args.n % (kAccessBytes / 2) == 0 && args.k % weight.block_size == 0 &&
                        weight.numel / weight.block_size < kMost && args.rank < kMost;
  Plan plan{Path::grad_input_element, ElementTile::kRows, ElementTile::kColumns};
  int64_t depth = 64;  // rows of W in a step
  int shared_bytes = ElementTile::kSharedBytes;
  if (fits_mma) {
    const int rows = args.m <= 8 ? 8 : args.m <= 16 || weight.block_size < 64 ? 16 : 32;
    plan = {Path::grad_input_mma, rows, MmaTile<8>::kColumns};
    depth = MmaTile<8>::kDepth;
    shared_bytes = rows == 8    ? MmaTile<8>::kSharedBytes
                   : rows == 16 ? MmaTile<16>::kSharedBytes
                                : MmaTile<32>::kSharedBytes;
  } else if (fits_fma) {
    plan = {Path::grad_input_fma, FmaTile::kRows, FmaTile::kColumns};
    shared_bytes = FmaTile::kSharedBytes;
  }
  plan.row_tiles = ceil_div(args.m, plan.rows);
  plan.column_tiles = ceil_div(args.k, plan.columns);
  split_grad_input(plan, args.n, depth, blocks_per_processor(gpu, shared_bytes), gpu);
  plan.workspace = plan.splits > 1 ? plan.splits * args.m * args.k : 0;
  plan.counters = plan.splits > 1 ? plan.row_tiles * plan.column_tiles : 0;
  return plan;
}

inline Plan plan_grad_input(const LinearGradInputArgs& args, const Gpu& gpu) {
  const Plan plan = plan_grad_input_kernel(args, gpu);
  return decodes_first(plan.path, args, gpu) ? Plan{Path::decode} : plan;
}

// --- a weight that is decoded first

// How many of the product's outputs (rows of W for y, columns for grad_x) are decoded at a time, a multiple of `unit`,
// for cuBLAS to multiply before the next ones are; all of them where parts do not pay. What fits half of the L2 cache
// is read there: 0.5 bytes of DRAM per weight instead of 4.5, and no dense weight in memory.
//
// Parts take time where cuBLAS's tiles of 128 x 256 fill the GPU less well: in more waves, each of 2 x 128 x 256 x
// contraction FLOP of a multiprocessor's 6 TFLOPS. What they save is 4 x outputs x contraction bytes at 4.3 TB/s
// (H200), as much as a wave for 11700 outputs, whatever the contraction. (An A100: 11300; a B200: 8400; an RTX 4090:
// 12500.) So the part is the one of the fewest waves, the largest of these, unless it adds more than that. The two
// launches of a part of a half or a quarter of the cache take 2 us, where it saves 12 or 6.
inline int64_t decoded_part(int64_t outputs, int64_t contraction, int64_t unit, Dtype dtype, int64_t m,
                            const Gpu& gpu) {
  const auto waves = [&](int64_t part) {
    return ceil_div(ceil_div(m, int64_t{128}) * ceil_div(part, int64_t{256}), int64_t{gpu.processors});
  };
  constexpr int64_t kOutputsForWave = 12288;
  const int64_t output_bytes = contraction * size_of(dtype);
  if (outputs * output_bytes <= gpu.l2_bytes) return outputs;
  const int64_t most = gpu.l2_bytes / 2 / output_bytes / unit * unit;
  int64_t best = outputs, least = waves(outputs) + outputs / kOutputsForWave + 1;
  for (int64_t part = most; part > 0 && 2 * part >= most; part -= unit) {
    const int64_t tried = outputs / part * waves(part) + waves(outputs % part);
    if (tried >= least) continue;
    least = tried;
    best = part;
  }
  return best;
}

// Rows of W [n, k] for y. Parts begin where a group of scales does.
inline int64_t decoded_rows(const QuantizedWeight& weight, Dtype dtype, int64_t m, int64_t n, int64_t k,
                            const Gpu& gpu) {
  return k % weight.block_size != 0 ? n : decoded_part(n, k, kGroupSize, dtype, m, gpu);
}

// Whether a window of columns can be decoded: whole blocks of rows, and pieces of 32 weights counted in 32 bits.
inline bool columns_fit(const DequantizeColumnsArgs& args) {
  constexpr int64_t kPiece = 2 * kAccessBytes;
  if (args.first < 0 || args.count < 0 || args.first + args.count > args.row_length) return false;
  if (args.weight.format->has_row_scales) return true;
  return args.row_length % args.weight.block_size == 0 && args.first % kPiece == 0 && args.count % kPiece == 0 &&
         args.weight.numel / kPiece <= UINT32_MAX;
}

// Columns of W [n, k] for grad_x.
inline int64_t decoded_columns(const QuantizedWeight& weight, Dtype dtype, int64_t m, int64_t n, int64_t k,
                               const Gpu& gpu) {
  constexpr int64_t kUnit = 256;
  return columns_fit({weight, k, 0, kUnit}) ? decoded_part(k, n, kUnit, dtype, m, gpu) : k;
}

// --- LoRA beside a weight that is decoded first

constexpr int64_t kMostLoraRank = 512;               // as t of 32 rows is kept in shared memory
constexpr int64_t kMostLoraSide = int64_t{1} << 30;  // of n and k, or of m in lora_outer: counted in 32 bits
constexpr int kMostLoraWarps = 4;                    // of a block, side by side over rows (product) or columns (outer)

inline bool lora_fits(const LoraProductArgs& args, const Gpu& gpu) {
  return has_tensor_cores(args.dtype, gpu) && args.rank <= kMostLoraRank && std::max(args.n, args.k) <= kMostLoraSide;
}

inline bool lora_fits(const LoraOuterArgs& args, const Gpu& gpu) {
  return has_tensor_cores(args.dtype, gpu) && args.rank <= kMostLoraRank && args.m <= kMostLoraSide;
}

// How many columns of the rank are multiplied at a time. (lora_product in fp16 has the registers for 32 of them.)
inline int lora_rank_tile(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

// What a phase of LoRA's kernels takes, in cycles. A multiprocessor gets 25 bytes from L2 where all of them read (5.5
// TB/s on an H100), 50 where few do. Each of its four tensor cores takes 8 for an mma, for which 7 to 8 instructions
// are issued, but 13 where the rank is small. One block runs on a multiprocessor at a time.
struct LoraPhase {
  int64_t bytes, mmas;  // of a block
  int64_t cycles(int64_t blocks, int rank_tile, int64_t processors) const {
    const int64_t rounds = ceil_div(blocks, processors), of_mma = rank_tile == 16 ? 13 : 8;
    return std::max({rounds * bytes / 50, rounds * mmas * of_mma / 4, blocks * bytes / (25 * processors)});
  }
};

// Products of two bf16 for one of x, which is one or two of them, and an fp32 factor.
inline int64_t lora_products(Dtype dtype) { return dtype == Dtype::bf16 ? 2 : 3; }

// How lora_product reads its factors: 4 elements at once along the contraction or across it, or one by one.
enum class LoraAccess { along, across, any };

struct LoraProductPlan {
  LoraAccess access = LoraAccess::any;
  int rank = 32;      // columns of t at a time
  int row_warps = 1;  // each takes 32 rows
  int64_t row_tiles = 0;
  int shares = 1, share_chunks = 0;  // of y's columns, in chunks of 32; a block of each share computes t of its rows
  int shared_bytes = 0;

  int64_t blocks() const { return row_tiles * shares; }
};

inline LoraAccess lora_access(const LoraProductArgs& args) {
  // A factor that is not read may be anything.
  const Factor &down = args.x ? args.down : args.up, &up = args.y ? args.up : args.down;
  const auto fits = [&](const Factor& factor, int64_t consecutive, int64_t other) {
    return consecutive == 1 && other % 4 == 0 && is_aligned(factor.data, 4 * size_of(factor.dtype));
  };
  const bool has_dtypes = down.dtype == up.dtype && (down.dtype == Dtype::f32 || down.dtype == args.dtype);
  const bool has_x = !args.x || (args.k > 0 && args.k % 8 == 0 && is_aligned(args.x, kAccessBytes));
  const bool has_y = !args.y || (args.n % 4 == 0 && is_aligned(args.y, kAccessBytes / 2));
  if (!has_dtypes || !has_x || !has_y || args.rank == 0 || args.rank % 4 != 0) return LoraAccess::any;
  for (int i = 0; i < args.other_count; ++i)
    if (!is_aligned(args.others[i].down, 4 * size_of(down.dtype))) return LoraAccess::any;
  if (fits(down, down.column_stride, down.row_stride) && fits(up, up.column_stride, up.row_stride))
    return LoraAccess::along;
  if (fits(down, down.row_stride, down.column_stride) && fits(up, up.row_stride, up.column_stride))
    return LoraAccess::across;
  return LoraAccess::any;
}

// More rows in a block read the factors less often. Fewer rows, and shares of y's columns, fill more multiprocessors:
// 1 share is tried, and as many as fill a half of them, all, and up to twice all. (To try every number finds plans that
// take 1% less on average, and costs the host 2 us.)
inline LoraProductPlan plan_lora_product(const LoraProductArgs& args, const Gpu& gpu) {
  constexpr int64_t kMostShares = 64, kMostHalves = 4,
                    kMostShared = 96 * 1024;  // bytes; every GPU from sm_80 on has 99 KB
  LoraProductPlan plan;
  plan.access = lora_access(args);
  if (plan.access != LoraAccess::any)
    plan.rank = std::min(lora_rank_tile(args.rank), args.dtype == Dtype::bf16 ? 64 : 32);
  const int64_t rank = ceil_div(args.rank, plan.rank) * plan.rank;
  const int64_t chunks = args.y ? ceil_div(args.n, LoraTile::kRows) : 0;
  int64_t least = INT64_MAX;
  for (int row_warps = 1; row_warps <= kMostLoraWarps; row_warps *= 2) {
    const int64_t rows = row_warps * LoraTile::kRows, row_tiles = ceil_div(args.m, rows);
    const int64_t shared = LoraTile::threads(plan.rank) / kWarpSize * LoraTile::kSliceBytes +
                           rows / 8 * rank / LoraTile::kSliceColumns * LoraTile::kShortRowsBytes;
    if (shared > kMostShared) break;
    for (int64_t halves = 0; halves <= kMostHalves; ++halves) {
      const int64_t tried = std::clamp<int64_t>(halves * gpu.processors / std::max<int64_t>(2 * row_tiles, 1), 1,
                                                std::clamp<int64_t>(chunks, 1, kMostShares));
      const int64_t share_chunks = ceil_div(chunks, tried), shares = chunks > 0 ? ceil_div(chunks, share_chunks) : 1;
      const int64_t columns = share_chunks * LoraTile::kRows, blocks = row_tiles * shares;
      const LoraPhase t{args.k * (rows * 2 + rank * size_of(args.down.dtype)),
                        rows * args.k * rank / 2048 * lora_products(args.dtype)};
      const LoraPhase y{columns * (rows * 2 + rank * size_of(args.up.dtype)), rows * columns * rank / 2048 * 3};
      const int64_t cost =
          (args.x ? t.cycles(blocks, plan.rank, gpu.processors) : 0) + y.cycles(blocks, plan.rank, gpu.processors);
      if (cost >= least) continue;
      least = cost;
      plan.row_warps = row_warps;
      plan.row_tiles = row_tiles;
      plan.shares = static_cast<int>(shares);
      plan.share_chunks = static_cast<int>(share_chunks);
      plan.shared_bytes = static_cast<int>(shared);
    }
  }
  return plan;
}

struct LoraOuterPlan {
  bool is_whole = false;  // wide accesses fit
  int rank = 32;          // columns of low at a time
  int column_warps = 1;   // each takes 32 columns of wide
  int64_t column_tiles = 0, rank_tiles = 0;
};

// More columns in a block read low less often. Fewer fill more multiprocessors.
inline LoraOuterPlan plan_lora_outer(const LoraOuterArgs& args, const Gpu& gpu) {
  LoraOuterPlan plan;
  plan.is_whole = args.m >= 8 && args.w % 4 == 0 && args.rank % 4 == 0 && is_aligned(args.wide, kAccessBytes / 2) &&
                  is_aligned(args.low, kAccessBytes);
  if (plan.is_whole) plan.rank = lora_rank_tile(args.rank);
  plan.rank_tiles = ceil_div(args.rank, plan.rank);
  int64_t least = INT64_MAX;
  for (int column_warps = 1; column_warps <= kMostLoraWarps; column_warps *= 2) {
    const int64_t columns = column_warps * LoraTile::kRows, tiles = ceil_div(args.w, columns);
    const LoraPhase phase{args.m * (columns * 2 + plan.rank * 4),
                          args.m * columns * plan.rank / 2048 * lora_products(args.dtype)};
    const int64_t cost = phase.cycles(tiles * plan.rank_tiles, plan.rank, gpu.processors);
    if (cost >= least) continue;
    least = cost;
    plan.column_warps = column_warps;
    plan.column_tiles = tiles;
  }
  return plan;
}

}  // namespace lowbit::cuda

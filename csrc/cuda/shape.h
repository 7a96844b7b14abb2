// Which kernel computes a product, and over how many blocks of threads: functions of sizes and of the GPU, for the
// host.
//
// The figures below are per weight (of n k, which scales all of them alike, as the number of multiprocessors scales all
// issue slots) and for an H100: 3.35 TB/s of DRAM, that is 0.30 ps per byte; 132 multiprocessors that issue 128 lanes'
// instructions in a cycle of 1.7 GHz, that is 0.035 ps per instruction. instructions: tests/test_cuda_budget.py.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace lowbit::cuda {

enum class LinearPath {
  gemv,        // linear_gemv: W decoded into registers for each few rows of x
  gemm,        // linear_gemm: W decoded into registers for each tile of rows, on tensor cores
  dequantize,  // W decoded into memory once, then torch's own product
};

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

// m: rows of x. capability: that of the code which runs, times 10 (code_capability).
constexpr LinearPath linear_path(int64_t m, Dtype dtype, bool is_int8, int capability) {
  const bool has_mma = dtype != Dtype::f32 && capability >= 80;  // m16n8k16, bf16
  if (is_int8 || !has_mma) return m <= kMostFmaRows ? LinearPath::gemv : LinearPath::dequantize;
  if (m <= kMostGemvRows) return LinearPath::gemv;
  return m <= kMostGemmRows ? LinearPath::gemm : LinearPath::dequantize;
}

// Over how many blocks of threads gemv shares out the columns of each of `tiles` tiles: as many panels for each, the
// last fewer. With a block on every multiprocessor (8 warps with 2 steps of 1 KB on their way: 16 KB, 2.1 MB on the
// whole GPU) DRAM is about busy (3.35 TB/s times 0.7 us is 2.3 MB). Below that, those idle which have no block. Less
// than a panel of columns is no work for a block that first fills its table.
constexpr int64_t gemv_column_shares(int64_t tiles, int64_t panels, int processors) {
  const int64_t wanted = processors / (tiles > 0 ? tiles : 1);
  const int64_t shares = wanted < 1 ? 1 : wanted < panels ? wanted : panels;
  const int64_t panels_each = (panels + shares - 1) / shares;
  return (panels + panels_each - 1) / panels_each;
}

}  // namespace lowbit::cuda

// Which element of a tile each lane holds: functions of (lane, i), the same on host and device. tests/cuda/layout.cpp
// checks that each is bijective; tests/test_cuda_ptx.py, that the tensor core's are what the instructions do.
#pragma once

#include "../../format.h"

namespace lowbit::cuda {

constexpr int kWarpSize = 32;
constexpr int kAccessBytes = 16;  // what a lane reads or writes at once, where memory is aligned

// A warp tile is the 512 consecutive packed bytes that one 16-byte access of each lane covers: 1024 4-bit weights, or
// 512 of int8.
constexpr int kTileBytes = kWarpSize * kAccessBytes;

// Which 16-byte piece of consecutive memory a lane takes in its access number `access`. Neighbours are in
// neighbouring lanes, so that every access of a warp is 512 consecutive bytes.
LOWBIT_HOST_DEVICE constexpr int piece_of(int lane, int access) { return access * kWarpSize + lane; }

// optimizer_step: which of a warp's block of 256 elements is number i of a lane's 8. Four in a row are 16 bytes of
// fp32, 8 of 16 bits and 4 of codes: whatever dtypes meet, a warp's accesses are to consecutive memory.
constexpr int kLaneElements = 8;
LOWBIT_HOST_DEVICE constexpr int state_element(int lane, int i) { return i / 4 * 128 + lane * 4 + i % 4; }

struct Position {
  int row, column;
};

// mma.m16n8k16 with 16-bit operands: where element i of a lane's fragment stands in A [16, 16], B [16, 8], C [16, 8].
// Register r holds elements 2r (low half) and 2r + 1. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with
// floating point type".
LOWBIT_HOST_DEVICE constexpr Position mma_a(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
LOWBIT_HOST_DEVICE constexpr Position mma_b(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }
LOWBIT_HOST_DEVICE constexpr Position mma_c(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// ldmatrix.x4 that fills an A fragment from a row-major tile: lane `lane` gives the address of these 16 bytes.
LOWBIT_HOST_DEVICE constexpr Position ldmatrix_a(int lane) { return {lane % 16, lane / 16 * 8}; }

// gemv: a warp takes 16 rows by 128 columns of W at a time. Each lane loads 16 bytes of row lane / 4 and 16 of the row
// 8 below, so that a quad reads 64 consecutive bytes; this is where weight i of its 64 stands.
constexpr int kGemvRows = 16, kGemvDepth = 128;
constexpr int kGemvLaneDepth = 2 * kAccessBytes;
LOWBIT_HOST_DEVICE constexpr Position gemv_weight(int lane, int i) {
  return {lane / 4 + i / kGemvLaneDepth * 8, lane % 4 * kGemvLaneDepth + i % kGemvLaneDepth};
}

// What a warp has on its way, in steps, and how many blocks of so many warps a multiprocessor holds: 3 of 46 KB of
// shared memory and 80 registers a thread. Four blocks of 64 registers would have room for two steps only: 64 KB of W
// on their way to a full multiprocessor instead of 96, and 32 instead of 64 where it has two.
constexpr int kGemvWarps = 8, kGemvResident = 3;
constexpr int kGemvMmaAhead = 4, kGemvFmaAhead = 2;

// The same on tensor cores, after the lanes of a quad have exchanged words: the first of the 8 columns that word `word`
// of a lane's 4 of a row has. A step spans so many blocks, and all lanes have words of the first before the next.
LOWBIT_HOST_DEVICE constexpr int gemv_word_column(int step_blocks, int lane, int word) {
  const int in_quad = lane % 4;
  if (step_blocks == 1) return in_quad * kGemvLaneDepth + word * 8;
  if (step_blocks == 2) return word / 2 * 64 + in_quad % 2 * kGemvLaneDepth + in_quad / 2 * 16 + word % 2 * 8;
  return word * 32 + in_quad * 8;
}

// --- tiles staged in shared memory, in pieces of 16 bytes.

// A tile of 16-bit activations whose rows are whole lines of 128 bytes: where in its row a piece goes, so that eight
// rows' pieces of one column meet in no bank (ldmatrix).
LOWBIT_HOST_DEVICE constexpr int swizzled_piece(int row, int piece) { return piece ^ row % 8; }

// A tile of packed weights with 64 bytes (128 columns) in each row. A quad reads one word of each of four rows 2t + c:
// pairs of rows lie in different quarters of a line of 128 bytes, so that it meets in no bank.
constexpr int kPackedRowBytes = 64;
LOWBIT_HOST_DEVICE constexpr int packed_offset(int row, int byte) {
  return (row / 8 * 4 + row % 2 * 2 + byte / 32) * 128 + row / 2 % 4 * 32 + byte % 32;
}
// The inverse: row, and first byte (as column), of piece number `piece` of the tile's memory.
LOWBIT_HOST_DEVICE constexpr Position packed_piece(int piece) {
  const int line = piece / 8;
  return {line / 4 * 8 + piece / 2 % 4 * 2 + line / 2 % 2, line % 2 * 32 + piece % 2 * kAccessBytes};
}

// The gemm's tiles: kRows of x by kColumns rows of W, which are columns of the output.
//
// Each of 16 warps takes 32 rows of W and 64 columns of the contraction per step (64 weights per lane): warps_k of them
// stand side by side along k. So a stage has 16 KB of packed W, and x is read 4 kRows / kColumns times as often as W,
// in bytes.
constexpr int kGemmWarps = 16, kGemmWarpN = 32, kGemmWarpK = 64;
constexpr int kGemmTableBytes = 256 * kWarpSize * 4;  // NarrowPairTable
LOWBIT_HOST_DEVICE constexpr int gemm_depth(int columns) { return kGemmWarps * kGemmWarpN * kGemmWarpK / columns; }
LOWBIT_HOST_DEVICE constexpr int gemm_shared_bytes(int rows, int columns, int stages) {
  return kGemmTableBytes + stages * gemm_depth(columns) * (columns / 2 + rows * 2);
}

// Stages of the ring, where a block of threads can have the memory: 48 KB of W on their way, where an H200 at full
// speed needs 26. Tiles of 64 rows read W at less than half that speed.
LOWBIT_HOST_DEVICE constexpr int gemm_most_stages(int rows) { return rows < 64 ? 4 : 2; }

template <int kRows, int kColumns>
struct GemmTile {
  static constexpr int kM = kRows, kN = kColumns, kK = gemm_depth(kColumns);
  static constexpr int kMostStages = gemm_most_stages(kRows);
  static constexpr int kWarpsN = kN / kGemmWarpN, kWarpsK = kK / kGemmWarpK;
  static constexpr int kXPieces = kK / 8, kWPieces = kK / 32, kHalf = kWPieces / 2;  // 16-byte pieces of a row

  // Which row and piece of it is at each place of a staged tile, eight to a line of 128 bytes. Eight lanes that read at
  // once are on one line: of x, four pieces of two rows; of W, the same piece of eight rows.
  static LOWBIT_HOST_DEVICE constexpr Position x_at(int place) {
    const int line = place / 8;
    return {line % kM / 2 * 2 + place / 4 % 2, line / kM * 8 + line % 2 * 4 + place % 4};
  }
  static LOWBIT_HOST_DEVICE constexpr int x_place(int row, int piece) {
    return (piece / 8 * kM + row / 2 * 2 + piece / 4 % 2) * 8 + row % 2 * 4 + piece % 4;
  }
  // The first half of the pieces of all rows, then the other.
  static LOWBIT_HOST_DEVICE constexpr Position w_at(int place) {
    const int half = place / (kN * kHalf), in_half = place % (kN * kHalf);
    return {in_half / (8 * kHalf) * 8 + place % 8, half * kHalf + in_half / 8 % kHalf};
  }
  static LOWBIT_HOST_DEVICE constexpr int w_place(int row, int piece) {
    return piece / kHalf * kN * kHalf + (row / 8 * kHalf + piece % kHalf) * 8 + row % 8;
  }
};

// The tiles of grad_x of linear_grad_input's kernels. On tensor cores a block of threads makes kRows x 128 from 128
// rows of W at a time: warp (i, j) takes columns 64 i and rows 32 j, the columns of a lane being the two codes of each
// byte of one word.
template <int kRows>
struct MmaTile {
  static constexpr int kColumnWarps = 2, kRowWarps = 4;
  static constexpr int kThreads = kColumnWarps * kRowWarps * kWarpSize;
  static constexpr int kColumns = 2 * kPackedRowBytes;
  static constexpr int kSteps = 2;  // of 16 rows of W, by each warp
  static constexpr int kDepth = kRowWarps * kSteps * 16;
  static constexpr int kStages = 3;
  static constexpr int kPackedPieces = kDepth * kPackedRowBytes / kAccessBytes;
  static constexpr int kGradRowPieces = kDepth * 2 / kAccessBytes;
  static constexpr int kGradPieces = kRows * kGradRowPieces;
  // Scales of a warp: for each of its rows of W one per unit of columns. With 32 rows of grad two units, which are
  // blocks of 32, would take more than 128 registers.
  static constexpr int kWarpColumns = kColumns / kColumnWarps, kWarpRows = kSteps * 16;
  static constexpr int kUnits = kWarpColumns / (kRows < 32 ? 32 : 64);
  static constexpr int kUnitStride = kWarpRows + 8 * (kUnits - 1);  // two units' scales of a quad's rows: other banks
  // The table of pairs, the stages, the scales. Of 32 rows' 81 KB, and the 1 KB that the GPU adds, an A100 holds two
  // blocks, and no byte more.
  static constexpr int kSharedBytes = 256 * 16 * 8 + kStages * (kPackedPieces + kGradPieces) * kAccessBytes +
                                      kThreads / kWarpSize * kUnits * kUnitStride * 4;
};

// In fp32 arithmetic, for rows of W whose start has 16-byte alignment: a lane takes 32 columns of a row at a time, a
// warp 256 of each of four rows, which are whole lines of 128 bytes; the warps of a block share out the rows of W.
struct FmaTile {
  static constexpr int kRows = 2;  // 64 sums a lane
  static constexpr int kLaneColumns = 2 * kAccessBytes;
  static constexpr int kColumnLanes = 8, kWarpRows = kWarpSize / kColumnLanes;
  static constexpr int kColumns = kColumnLanes * kLaneColumns;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSumStride = kWarpSize + 1;  // of a lane's sums: no two lanes meet in a bank, whoever reads
  static constexpr int kSharedBytes = 256 * 16 * 8 + kRows * kLaneColumns * kSumStride * 4;  // the table of pairs, sums
};

// For any shape: a thread takes one column, element by element.
struct ElementTile {
  static constexpr int kRows = 8;
  static constexpr int kColumns = 256;
  static constexpr int kThreads = kColumns;
  static constexpr int kSharedBytes = kRows * kThreads * 4;
};

// LoRA's kernels: threads of a block for `rank` columns of t at a time. Each warp makes 32 rows of them; 64 columns are
// 64 sums of a lane and 64 registers of a factor on its way.
struct LoraTile {
  static constexpr int kRows = 32, kSliceColumns = 16;          // t goes through shared memory 16 columns at a time
  static constexpr int kSliceBytes = 8 * (kRows + 8) * 8;       // sums of a warp in them
  static constexpr int kShortRowsBytes = (kWarpSize + 1) * 16;  // 8 rows of them as fragments
  static LOWBIT_HOST_DEVICE constexpr int threads(int rank) { return rank == 16 ? 512 : 256; }
};

// The order of the gemm's contraction: which of a warp's 64 columns stands at column `column` of A (row `column` of B)
// in mma number `step` of 4. In the fragments' columns lane % 4 * 2 + {0, 1, 8, 9}, that is two consecutive bytes of a
// row of packed W, and over two steps 16 consecutive bytes of a row of x.
LOWBIT_HOST_DEVICE constexpr int gemm_k(int step, int column) {
  return step / 2 * 32 + column % 8 / 2 * 8 + step % 2 * 4 + column / 8 * 2 + column % 2;
}

}  // namespace lowbit::cuda

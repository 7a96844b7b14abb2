// Which element of a tile each lane holds: functions of (lane, i), the same on host and device. tests/cuda/layout.cpp
// checks that each is bijective; tests/test_cuda_ptx.py, that the tensor core's are what the instructions do.
#pragma once

#include "../nf4.h"

namespace lowbit::cuda {

constexpr int kWarpSize = 32;
constexpr int kAccessBytes = 16;  // what a lane reads or writes at once, where memory is aligned

// A warp tile is the 512 consecutive packed bytes that one 16-byte access of each lane covers: 1024 4-bit weights, or
// 512 of int8.
constexpr int kTileBytes = kWarpSize * kAccessBytes;

// Which 16-byte piece of consecutive memory a lane takes in its access number `access`. Neighbours are in
// neighbouring lanes, so that every access of a warp is 512 consecutive bytes.
LOWBIT_HOST_DEVICE constexpr int piece_of(int lane, int access) { return access * kWarpSize + lane; }

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

// The gemm's tiles: 8 KB of x and 8 KB of packed weights per step, whatever the number of rows.
//
// Each of 8 warps takes 32 rows of W and 64 columns of the contraction per step (64 weights per lane): warps_k of them
// stand side by side along k, so that a tile of few rows of x still reads long pieces of the rows of W.
template <int kRows>
struct GemmTile {
  static constexpr int kWarpN = 32, kWarpK = 64;
  static constexpr int kM = kRows, kN = 4 * kRows, kK = 4096 / kRows;
  static constexpr int kWarpsN = kN / kWarpN, kWarpsK = kK / kWarpK;
  static constexpr int kXPieces = kK / 8, kWPieces = kK / 32;  // 16-byte pieces of a row

  // Which row and piece of it is at each of the 512 places of a staged tile, eight to a line of 128 bytes. Eight lanes
  // that read at once are on one line: of x, four pieces of two rows; of W, the same piece of eight rows.
  static LOWBIT_HOST_DEVICE constexpr Position x_at(int place) {
    const int line = place / 8;
    return {line % kM / 2 * 2 + place / 4 % 2, line / kM * 8 + line % 2 * 4 + place % 4};
  }
  static LOWBIT_HOST_DEVICE constexpr int x_place(int row, int piece) {
    return (piece / 8 * kM + row / 2 * 2 + piece / 4 % 2) * 8 + row % 2 * 4 + piece % 4;
  }
  static LOWBIT_HOST_DEVICE constexpr Position w_at(int place) {
    return {place / (8 * kWPieces) * 8 + place % 8, place / 8 % kWPieces};
  }
  static LOWBIT_HOST_DEVICE constexpr int w_place(int row, int piece) {
    return (row / 8 * kWPieces + piece) * 8 + row % 8;
  }
};

// The order of the gemm's contraction: which of a warp's 64 columns stands at column `column` of A (row `column` of B)
// in mma number `step` of 4. In the fragments' columns lane % 4 * 2 + {0, 1, 8, 9}, that is two consecutive bytes of a
// row of packed W, and over two steps 16 consecutive bytes of a row of x.
LOWBIT_HOST_DEVICE constexpr int gemm_k(int step, int column) {
  return step / 2 * 32 + column % 8 / 2 * 8 + step % 2 * 4 + column / 8 * 2 + column % 2;
}

}  // namespace lowbit::cuda

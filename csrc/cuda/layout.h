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

}  // namespace lowbit::cuda

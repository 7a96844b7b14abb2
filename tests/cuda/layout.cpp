// Compiles if every lane map of csrc/cuda/device/layout.h is bijective: each element of the tile in one lane, and none
// twice.
#include "cuda/device/layout.h"

using namespace lowbit::cuda;

// at(lane, i) for i < per_lane has to meet each of the rows * columns positions once.
template <class At>
constexpr bool is_bijective(int per_lane, int rows, int columns, At at) {
  bool seen[2048] = {};
  if (kWarpSize * per_lane != rows * columns) return false;
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < per_lane; ++i) {
      const Position position = at(lane, i);
      if (position.row < 0 || position.row >= rows || position.column < 0 || position.column >= columns) return false;
      bool& here = seen[position.row * columns + position.column];
      if (here) return false;
      here = true;
    }
  return true;
}

static_assert(is_bijective(8, 16, 16, mma_a));
static_assert(is_bijective(4, 16, 8, mma_b));
static_assert(is_bijective(4, 16, 8, mma_c));
// Each of ldmatrix's addresses covers eight columns.
static_assert(is_bijective(8, 16, 16, [](int lane, int i) {
  return Position{ldmatrix_a(lane).row, ldmatrix_a(lane).column + i};
}));
static_assert(is_bijective(64, kGemvRows, kGemvDepth, gemv_weight));
// gemv on tensor cores: a quad's words have each column once, and those that meet in an mma are of one block.
constexpr bool is_gemv_word_column(int step_blocks) {
  for (int word = 0; word < 4; ++word)
    for (int lane = 0; lane < 4; ++lane)
      if (step_blocks > 1 &&
          gemv_word_column(step_blocks, lane, word) * step_blocks / kGemvDepth != word * step_blocks / 4)
        return false;
  return is_bijective(32, 8, kGemvDepth, [=](int lane, int i) {
    return Position{lane / 4, gemv_word_column(step_blocks, lane, i / 8) + i % 8};
  });
}
static_assert(is_gemv_word_column(1) && is_gemv_word_column(2) && is_gemv_word_column(4));
// Accesses of a tile of 8 pieces per lane.
static_assert(is_bijective(8, 1, 8 * kWarpSize, [](int lane, int i) { return Position{0, piece_of(lane, i)}; }));
static_assert(is_bijective(kLaneElements, 1, 256, [](int lane, int i) { return Position{0, state_element(lane, i)}; }));
// Tiles in shared memory: each piece in one place, and the two maps of the packed tile each other's inverse.
static_assert(is_bijective(4, 8, 16, [](int lane, int i) {
  const int row = lane / 4, piece = lane % 4 * 4 + i;
  return Position{row, swizzled_piece(row, piece)};
}));
static_assert(is_bijective(4, 32, 4, [](int lane, int i) {
  const Position piece = packed_piece(lane * 4 + i);
  return Position{piece.row, piece.column / kAccessBytes};
}));
constexpr bool is_inverse() {
  for (int piece = 0; piece < 512; ++piece)
    if (packed_offset(packed_piece(piece).row, packed_piece(piece).column) != piece * kAccessBytes) return false;
  return true;
}
static_assert(is_inverse());

// The gemm's staged tiles: each piece of 16 bytes in one place, and the way back.
template <int kRows, int kColumns>
constexpr bool has_bijective_places() {
  using Tile = GemmTile<kRows, kColumns>;
  constexpr int kX = Tile::kM * Tile::kXPieces, kW = Tile::kN * Tile::kWPieces;
  for (int place = 0; place < kX; ++place)
    if (Tile::x_place(Tile::x_at(place).row, Tile::x_at(place).column) != place) return false;
  for (int place = 0; place < kW; ++place)
    if (Tile::w_place(Tile::w_at(place).row, Tile::w_at(place).column) != place) return false;
  const auto x_at = [](int lane, int i) { return Tile::x_at(lane * (kX / kWarpSize) + i); };
  const auto w_at = [](int lane, int i) { return Tile::w_at(lane * (kW / kWarpSize) + i); };
  return is_bijective(kX / kWarpSize, Tile::kM, Tile::kXPieces, x_at) &&
         is_bijective(kW / kWarpSize, Tile::kN, Tile::kWPieces, w_at);
}
static_assert(has_bijective_places<16, 128>());
static_assert(has_bijective_places<32, 128>());
static_assert(has_bijective_places<32, 256>());
static_assert(has_bijective_places<64, 256>());

// The gemm's order of the contraction: each of 64 columns once, and so that a lane's two elements of a register are one
// byte of W (an even column and the next), and its four of B in two steps 16 consecutive bytes of x.
static_assert(is_bijective(2, 1, 64, [](int lane, int i) {
  return Position{0, gemm_k((lane * 2 + i) / 16, (lane * 2 + i) % 16)};
}));
static_assert([] {
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int step = 0; step < 4; ++step)
      for (int i = 0; i < 4; ++i)
        if (gemm_k(step, mma_b(lane, i).row) != step / 2 * 32 + lane % 4 * 8 + step % 2 * 4 + i) return false;
  return true;
}());

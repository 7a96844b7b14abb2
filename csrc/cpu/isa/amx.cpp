// What AMX does better than AVX512-BF16: products of many rows in bf16, by tiles of 16 x 32 elements.
#include "../kernels.h"

#if defined(LOWBIT_AMX)

#include "avx512bf16.h"

// Everything below is compiled for AMX too.
#if defined(LOWBIT_PORTABLE_INTRINSICS)
#elif defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                                 \
    __attribute__((                                                                                           \
        target("amx-tile,amx-bf16,avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16")
#endif

#include "../operations.h"

namespace lowbit::cpu {

// GCC's intrinsics do not say that loading a tile reads memory: no store may be moved across this.
static inline void finish_stores() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Every tile has 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kTileShapes{};

// Tiles 0 to 3 hold sums, 4 and 5 rows of A (16 pairs of each), 6 and 7 rows of B (16 columns
// of each).
struct TilePairs {
  static constexpr int64_t kDepth = 512;               // loads and stores of the sums take a tenth of the time
  static constexpr int64_t kStride = kDepth / 2 + 16;  // words; rows start in different sets of the L1 cache
  static constexpr int64_t kMaxStrips = 4;             // of W's rows: 4 times two tiles

  // The tiles of this thread, set up while an object lives: unused ones cost other code (and its power) nothing.
  struct Session {
    Session() { _tile_loadconfig(&kTileShapes); }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // sums[rows, 16 kTiles] += a[rows, pairs] b[pairs, 16 kTiles]; whole tiles of rows are read and written, and pairs is
  // a multiple of 16.
  template <int kTiles>
  static void multiply(const float* a, int64_t rows, const float* b, int64_t pairs, float* sums, int64_t sums_stride) {
    finish_stores();
    for (int64_t row = 0; row < rows; row += 32) {
      const float* a_row = a + row * kStride;
      float* to = sums + row * sums_stride;
      if (rows - row > 16) {
        multiply_tiles<2, kTiles>(a_row, b, pairs, to, sums_stride);
      } else {
        multiply_tiles<1, kTiles>(a_row, b, pairs, to, sums_stride);
      }
    }
    finish_stores();
  }

 private:
  template <int kRowTiles, int kTiles>
  static void multiply_tiles(const float* a, const float* b, int64_t pairs, float* sums, int64_t sums_stride) {
    const int64_t a_bytes = kStride * 4, b_bytes = 64 * kTiles, sums_bytes = sums_stride * 4;
    float* lower = sums + 16 * sums_stride;
    _tile_loadd(0, sums, sums_bytes);
    if (kTiles > 1) _tile_loadd(1, sums + 16, sums_bytes);
    if (kRowTiles > 1) _tile_loadd(2, lower, sums_bytes);
    if (kRowTiles > 1 && kTiles > 1) _tile_loadd(3, lower + 16, sums_bytes);
    for (int64_t pair = 0; pair < pairs; pair += 16, b += 256 * kTiles) {
      _tile_loadd(6, b, b_bytes);
      _tile_loadd(4, a + pair, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (kTiles > 1) {
        _tile_loadd(7, b + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (kRowTiles > 1) {
        _tile_loadd(5, a + 16 * kStride + pair, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (kTiles > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, sums_bytes);
    if (kTiles > 1) _tile_stored(1, sums + 16, sums_bytes);
    if (kRowTiles > 1) _tile_stored(2, lower, sums_bytes);
    if (kRowTiles > 1 && kTiles > 1) _tile_stored(3, lower + 16, sums_bytes);
  }
};

// The compiler itself uses no tiles: what it compiles here for a type of Avx512Bf16 runs on every CPU that has that
// set.
struct Amx : Avx512Bf16 {
  static constexpr const char* name = "amx";
  // Tiles take as long for one row as for sixteen, about as long as few_rows.h for four. Those are exact: Intel's cores
  // take two cycles for a vector of products of pairs of bf16.
  static constexpr int64_t kFewBf16Rows = 4;
  static constexpr int64_t kExactBf16Rows = 4;
  static constexpr int64_t kInt8Bf16Rows = 4;
  using Pairs = TilePairs;
};

const Kernels kAmxKernels = kernels_of<Amx>();

}  // namespace lowbit::cpu

#if defined(__clang__) && !defined(LOWBIT_PORTABLE_INTRINSICS)
#pragma clang attribute pop
#endif

#endif  // LOWBIT_AMX

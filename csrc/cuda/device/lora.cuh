// What LoRA's kernels share: operands as sums of bf16, products over a contraction, and sums over a block's warps.
//
// Every number is a bf16 or the sum of two: a bf16 is one; an fp16 is exactly two; an fp32 is two with an error of
// 2^-16 of it. bf16 has fp32's range, so that nothing over- or underflows on the way. The product of two sums leaves
// out low times low: 1 to 3 mma, and an error of 3 * 2^-16 at most. (tf32 would take fp16 and bf16 as they are. But its
// mma has half the depth, so that 16-bit x times an fp32 factor takes 4 for 2 or, in fp16, 3 here; and x would have to
// be widened.) What is not finite makes NaN: the low part of an infinity is one.
//
// A warp multiplies two matrices that have the same columns, the contraction: 32 rows of `wide`, which are four of
// mma's B, and 8 kV rows of `narrow`, which are kV / 2 of its A. Operands go from global memory to the registers of the
// lane that multiplies them; nothing is staged. The order of rows and of the contraction is free. It is one in which
// lane 4 g + q has consecutive elements:
//   of a step of 32 columns, 8 q .. 8 q + 7: four in each of its halves, which are mma's depth of 16;
//   of 8 kV rows of narrow, kV g .. kV g + kV - 1.
#pragma once

#include "../../arguments.h"
#include "elements.cuh"

namespace lowbit::cuda {

constexpr int kStepColumns = 32;
constexpr int kLaneColumns = 8;

// --- numbers as sums of bf16

// An element of a matrix whose dtype, strides or alignment wide loads do not fit: read one by one, as fp32.
struct AnyElement {
  float value;
};

template <class T>
constexpr int kParts = std::is_same_v<T, Bf16> ? 1 : 2;

// Two neighbours along the contraction, the first in the low half.
__device__ __forceinline__ void split(float first, float second, uint32_t (&parts)[2]) {
  parts[0] = ptx::narrow_bf16x2(first, second);
  parts[1] =
      ptx::narrow_bf16x2(first - __uint_as_float(parts[0] << 16), second - __uint_as_float(parts[0] & 0xffff0000));
}
__device__ __forceinline__ void split(Bf16, uint32_t pair, uint32_t (&parts)[1]) { parts[0] = pair; }
__device__ __forceinline__ void split(Fp16, uint32_t pair, uint32_t (&parts)[2]) {
  split(widen(Fp16{static_cast<uint16_t>(pair)}), widen(Fp16{static_cast<uint16_t>(pair >> 16)}), parts);
}

// --- operands

// kWords aligned words at once.
template <int kWords>
__device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 4) {
    const uint4 v = ptx::load_global_16_cached(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kWords == 2) {
    const uint2 v = ptx::load_global_8_cached(from);
    words[0] = v.x, words[1] = v.y;
  } else {
    static_assert(kWords == 1);
    words[0] = ptx::load_global_4_cached(from);
  }
}

// 2 kWords elements of 16 bits, of which the first `count` are read and the others are zeros.
template <int kWords, class T>
__device__ __forceinline__ void load_elements(const T* from, int64_t count, uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t low = 2 * i < count ? from[2 * i].bits : 0, high = 2 * i + 1 < count ? from[2 * i + 1].bits : 0;
    words[i] = low | high << 16;
  }
}

// narrow: a lane's kV rows and 4 columns of a matrix whose columns are consecutive (kAlong: along the contraction), or
// else its rows.
template <class F, int kV, bool kAlong>
struct NarrowTile {
  static constexpr bool kIsAny = std::is_same_v<F, AnyElement>;
  static_assert(kAlong || !kIsAny);
  static constexpr int kLoads = kAlong ? kV : 4, kPerLoad = kAlong ? 4 : kV;
  static constexpr int kWords = kPerLoad * static_cast<int>(sizeof(F)) / 4;
  uint32_t raw[kLoads][kWords];

  // Row `row` and column `column` are the lane's first. In wide loads the columns are inside, and behind the last rows,
  // of which there is a multiple of kV, come others, whose sums are not used.
  __device__ __forceinline__ void load(const Factor& matrix, int rows, int columns, int row, int column) {
    if constexpr (kIsAny) {
#pragma unroll
      for (int j = 0; j < kV; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool is_inside = row + j < rows && column + e < columns;
          const int64_t at = (row + j) * matrix.row_stride + (column + e) * matrix.column_stride;
          raw[j][e] = is_inside ? __float_as_uint(widen_any(matrix.data, matrix.dtype, at)) : 0;
        }
    } else {
      const int first_row = min(row, rows - kV);
      const int64_t stride = kAlong ? matrix.row_stride : matrix.column_stride;
      const F* from =
          static_cast<const F*>(matrix.data) + (kAlong ? first_row * stride + column : column * stride + first_row);
#pragma unroll
      for (int i = 0; i < kLoads; ++i, from += stride) load_words(from, raw[i]);
    }
  }

  // A's rows g and g + 8 are the lane's rows 2 i and 2 i + 1.
  __device__ __forceinline__ void fragment(int i, uint32_t (&a)[kParts<F>][4]) const {
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const int j = 2 * i + at % 2, e = at / 2 * 2;
      uint32_t parts[kParts<F>];
      if constexpr (sizeof(F) == 4) {
        const auto value = [&](int e) { return __uint_as_float(kAlong ? raw[j][e] : raw[e][j]); };
        split(value(e), value(e + 1), parts);
      } else if constexpr (kAlong) {
        split(F{}, raw[j][e / 2], parts);
      } else {
        const uint32_t first = raw[e][j / 2], second = raw[e + 1][j / 2];
        split(F{}, j % 2 ? ptx::high_halves(first, second) : ptx::low_halves(first, second), parts);
      }
#pragma unroll
      for (int part = 0; part < kParts<F>; ++part) a[part][at] = parts[part];
    }
  }
};

// wide: fragments of B, by half of the step and tile of 8 rows.
template <class T>
using WideFragments = uint32_t[2][4][kParts<T>][2];

// A matrix whose columns are consecutive: the lane's rows are g + 8 i.
template <class T>
struct WideAlong {
  uint4 raw[4];

  // The first `count` of the lane's columns become zeros: all or none.
  __device__ __forceinline__ void drop(int count) {
    if (count > 0)
#pragma unroll
      for (uint4& row : raw) row = {};
  }

  __device__ __forceinline__ void fragments(WideFragments<T>& b) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t parts[kParts<T>];
        split(T{}, words[pair], parts);
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part) b[pair / 2][i][part][pair % 2] = parts[part];
      }
    }
  }
};

// A matrix whose rows are consecutive: the lane's are 4 g + i.
template <class T>
struct WideAcross {
  uint32_t raw[kLaneColumns][2];

  __device__ __forceinline__ void drop(int count) {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      if (c < count) raw[c][0] = raw[c][1] = 0;
  }

  __device__ __forceinline__ void fragments(WideFragments<T>& b) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const uint32_t first = raw[2 * pair][i / 2], second = raw[2 * pair + 1][i / 2];
        uint32_t parts[kParts<T>];
        split(T{}, i % 2 ? ptx::high_halves(first, second) : ptx::low_halves(first, second), parts);
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part) b[pair / 2][i][part][pair % 2] = parts[part];
      }
  }
};

// --- products

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // bf16's mma

// By tiles of 16 rows of narrow and 8 of wide.
template <int kV>
using TileSums = float[kV / 2][4][4];

// The next mma of a sum comes after those of all others.
template <int kPartsA, int kPartsB, int kV>
__device__ __forceinline__ void multiply(float (&sums)[kV][4][4], const uint32_t (&a)[kV][kPartsA][4],
                                         const uint32_t (&b)[4][kPartsB][2]) {
#pragma unroll
  for (int part_a = kPartsA - 1; part_a >= 0; --part_a)
#pragma unroll
    for (int part_b = kPartsB - 1; part_b >= 0; --part_b) {
      if (part_a + part_b == 2) continue;
#pragma unroll
      for (int i = 0; i < kV; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) ptx::mma<Bf16>(sums[i][j], a[i][part_a], b[j][part_b]);
    }
}

// sums += narrow wide^T over `columns` columns, of which the warp takes the steps first_step, first_step + stride, ...;
// for kGroups times 16 kTiles rows of narrow. load_wide(wide, column) and load_narrow(tile, column, group) load what a
// lane has from its column `column` on, for the next step as soon as the registers are free: the rest of this step
// hides the latency. In the last step a lane that would reach behind the last column goes back, and drops what others
// have.
template <class T, class Wide, class F, bool kAlong, int kGroups, int kTiles, class LoadWide, class LoadNarrow>
__device__ __forceinline__ void contract(int columns, int first_step, int stride, const LoadWide& load_wide,
                                         const LoadNarrow& load_narrow, float (&sums)[kGroups][kTiles][4][4]) {
  constexpr bool kIsWhole = !std::is_same_v<F, AnyElement>;
  const int whole_steps = columns / kStepColumns, steps = (columns + kStepColumns - 1) / kStepColumns;
  if (first_step >= steps) return;
  const auto wanted_column = [](int step) {
    return step * kStepColumns + static_cast<int>(threadIdx.x) % 4 * kLaneColumns;
  };
  const auto column_of = [&](int step) {
    return kIsWhole ? min(wanted_column(step), columns - kLaneColumns) : wanted_column(step);
  };
  Wide wide;
  NarrowTile<F, 2 * kTiles, kAlong> narrow[2][kGroups];
  const auto multiply_step = [&](int next_step) {
    const bool has_next = next_step < steps;
    const int next = column_of(next_step);
    WideFragments<T> b;
    wide.fragments(b);
    if (has_next) load_wide(wide, next);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t a[kTiles][kParts<F>][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) narrow[half][group].fragment(i, a[i]);
        if (has_next) load_narrow(narrow[half][group], next + half * 4, group);
        multiply(sums[group], a, b[half]);
      }
  };

  int step = first_step;
  load_wide(wide, column_of(step));
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int group = 0; group < kGroups; ++group) load_narrow(narrow[half][group], column_of(step) + half * 4, group);
#pragma unroll 1
  for (; step < whole_steps; step += stride) multiply_step(step + stride);
  if (step >= steps) return;
  if constexpr (kIsWhole) wide.drop(wanted_column(step) - column_of(step));
  multiply_step(steps);
}

// --- sums of a block's warps

// 16 rows of narrow in the sums of a warp, in pairs: pair g is rows kV g + 2 i and kV g + 2 i + 1 of one group and i.
struct Slice {
  // By row of wide: row g of tile j is number 8 j + g. Padded: two pairs that are written at once are in distinct
  // banks.
  float2 pairs[8][LoraTile::kRows + 8];
};
static_assert(sizeof(Slice) == LoraTile::kSliceBytes);

__device__ __forceinline__ void put_slice(Slice& slice, const float (&sums)[4][4]) {
  const int group = threadIdx.x % kWarpSize / 4, quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    *reinterpret_cast<float4*>(&slice.pairs[group][j * 8 + quad_lane * 2]) = {sums[j][0], sums[j][2], sums[j][1],
                                                                              sums[j][3]};
}

// The sum over the slices of `count` warps, `stride` apart, in their order.
__device__ __forceinline__ float2 sum_slices(const Slice* slices, int count, int stride, int pair, int row) {
  float2 sum{};
  for (int i = 0; i < count; ++i) {
    const float2 v = slices[i * stride].pairs[pair][row];
    sum.x += v.x, sum.y += v.y;
  }
  return sum;
}

// Of 8 kV rows of narrow in each group, that which is first in a pair of slice number `slice`.
template <int kV>
__device__ __forceinline__ int narrow_row_of(int slice, int pair) {
  return slice / (kV / 2) * 8 * kV + pair * kV + slice % (kV / 2) * 2;
}

#endif

}  // namespace lowbit::cuda

// lora_outer: the gradient of a factor of LoRA, out = scale wide^T low, on tensor cores, with wide as it is.
//
// A block of threads takes 32, 64 or 128 columns of wide and up to 64 of the rank. Its warps share out the rows, and
// more than 32 columns too: each sums over its own rows in registers. Then the warps' sums are added in shared memory,
// in their order, so that the result is always the same. Blocks read all of low from L2, w / columns times; plan.h
// weighs this against multiprocessors that have no block.
//
// Rows are the contraction, whose neighbours mma wants in one register: two rows' words of two columns are two PRMT,
// and low's rows are paired when they are split. So nothing is staged here either.
#include "device/launch.h"
#include "device/lora.cuh"

namespace lowbit::cuda {
namespace {

[[maybe_unused]] __device__ __forceinline__ void narrow_any(  // unused before sm_80
    float value, Dtype dtype, void* data, int64_t at) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(data)[at] = value;
  } else if (dtype == Dtype::f16) {
    narrow(value, static_cast<Fp16*>(data) + at);
  } else {
    narrow(value, static_cast<Bf16*>(data) + at);
  }
}

template <class T, class L, int kRank>
__global__ void __launch_bounds__(LoraTile::threads(kRank), 1)
    lora_outer_kernel(const __grid_constant__ LoraOuterArgs args, const __grid_constant__ LoraOuterPlan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr bool kIsWhole = !std::is_same_v<L, AnyElement>;
  constexpr int kColumns = LoraTile::kRows, kThreads = LoraTile::threads(kRank), kWarps = kThreads / kWarpSize;
  constexpr int kV = kRank == 16 ? 2 : 4, kGroups = kRank / (8 * kV), kSlices = kRank / LoraTile::kSliceColumns;
  __shared__ Slice slices[kWarps];

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, group = lane / 4;
  const int column_warps = plan.column_warps, column_warp = warp % column_warps;  // 32 columns of wide each
  const int row_warps = kWarps / column_warps, row_warp = warp / column_warps;
  const int64_t w0 = int64_t{blockIdx.x} * column_warps * kColumns;
  const int r0 = blockIdx.y * kRank, m = static_cast<int>(args.m), rank = static_cast<int>(args.rank);

  // Both matrices are seen transposed: the contraction is over their rows.
  const int64_t column = w0 + column_warp * kColumns + group * 4;
  const T* const wide = static_cast<const T*>(args.wide) + (kIsWhole ? min(column, args.w - 4) : column);
  const auto load_wide = [&](WideAcross<T>& tile, int row) {
    const T* from = wide + row * args.w;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i, from += args.w) {
      if constexpr (kIsWhole) {
        load_words(from, tile.raw[i]);
      } else {
        load_elements(from, row + i < m ? args.w - column : 0, tile.raw[i]);
      }
    }
  };
  const Factor low{args.low, Dtype::f32, 1, args.rank};
  const auto load_low = [&](NarrowTile<L, kV, !kIsWhole>& tile, int row, int part) {
    tile.load(low, rank, m, r0 + (part * 8 + group) * kV, row);
  };
  TileSums<kV> sums[kGroups] = {};
  contract<T, WideAcross<T>, L, !kIsWhole>(m, row_warp, row_warps, load_wide, load_low, sums);

#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    __syncthreads();  // the slices before are read
    put_slice(slices[warp], sums[slice / (kV / 2)][slice % (kV / 2)]);
    __syncthreads();
    for (int i = threadIdx.x; i < column_warps * kColumns * 8; i += kThreads) {
      const int of_warp = i / (8 * kColumns), pair = i / kColumns % 8, row = i % kColumns;
      const float2 v = sum_slices(slices + of_warp, row_warps, column_warps, pair, row);
      // Row 8 j + g of the slice is column 4 g + j of the warp's.
      const int64_t to_column = w0 + of_warp * kColumns + row % 8 * 4 + row / 8;
      const int r = r0 + narrow_row_of<kV>(slice, pair);
      const int64_t to = to_column * args.out_wide_stride + r * args.out_rank_stride;
      if (to_column >= args.w) continue;
      if (r < rank) narrow_any(args.scale * v.x, args.out_dtype, args.out, to);
      if (r + 1 < rank) narrow_any(args.scale * v.y, args.out_dtype, args.out, to + args.out_rank_stride);
    }
  }
#endif
}

template <class T, class L, int kRank>
int launch(const LoraOuterArgs& args, const LoraOuterPlan& plan, Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.column_tiles), static_cast<unsigned>(plan.rank_tiles));
  lora_outer_kernel<T, L, kRank><<<grid, LoraTile::threads(kRank), 0, stream>>>(args, plan);
  return cudaGetLastError();
}

template <class T>
int launch(const LoraOuterArgs& args, const LoraOuterPlan& plan, Stream stream) {
  if (!plan.is_whole) return launch<T, AnyElement, 32>(args, plan, stream);
  if (plan.rank == 16) return launch<T, float, 16>(args, plan, stream);
  if (plan.rank == 32) return launch<T, float, 32>(args, plan, stream);
  return launch<T, float, 64>(args, plan, stream);
}

}  // namespace

int lora_outer(const LoraOuterArgs& args, const Gpu& gpu, Stream stream) {
  if (!lora_fits(args, gpu)) return cudaErrorNotSupported;
  if (args.w == 0 || args.rank == 0) return cudaSuccess;
  const LoraOuterPlan plan = plan_lora_outer(args, gpu);
  return args.dtype == Dtype::f16 ? launch<Fp16>(args, plan, stream) : launch<Bf16>(args, plan, stream);
}

}  // namespace lowbit::cuda

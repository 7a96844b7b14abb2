// lora_product: t = t_scale x down^T and y = up_scale t up^T + bias in one launch, on tensor cores, with x as it is.
//
// A block of threads takes 32, 64 or 128 rows of x. First its warps share out the columns of x, and for more than 32
// rows also the rows: each sums t of 32 rows over its own columns, in registers. The warps' sums are added in shared
// memory, 16 columns of t at a time, and become mma's fragments there. Then each warp makes y of 32 rows and every so
// many chunks of 32 columns. Neither loop has a barrier or stages anything: lora.cuh says which element a lane loads.
//
// More LoRAs of the same x have blocks of their own (blockIdx.y), which make only t.
//
// Every block reads both factors from L2, so that these are read m / rows times; warps that read the same part of a
// factor meet in L1. plan.h weighs this against multiprocessors that have no block.
#include "device/launch.h"
#include "device/lora.cuh"

namespace lowbit::cuda {
namespace {

// t of 8 rows of a block as fragments of B for 16 of its columns: for each lane the two registers of the high part and
// those of the low part. Padded: tiles of rows that are written at once are in distinct banks.
struct ShortRows {
  uint32_t words[kWarpSize + 1][4];
};
static_assert(sizeof(ShortRows) == LoraTile::kShortRowsBytes);

// The bias of four columns from `column` on; behind the last one that of others. kIsWhole: n is a multiple of four, and
// the bias, in fp32 or T, is aligned.
template <class T, bool kIsWhole>
__device__ __forceinline__ void load_bias(const Bias& bias, int column, int n, float (&values)[4]) {
  if constexpr (!kIsWhole) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = widen_any(bias.data, bias.dtype, min(column + i, n - 1));
  } else if (bias.dtype == Dtype::f32) {
    widen<float>(ptx::load_global_16_cached(static_cast<const float*>(bias.data) + min(column, n - 4)), values);
  } else {
    const uint2 pairs = ptx::load_global_8_cached(static_cast<const T*>(bias.data) + min(column, n - 4));
    widen_pair<T>(pairs.x, values[0], values[1]);
    widen_pair<T>(pairs.y, values[2], values[3]);
  }
}

template <class T, class F, int kRank, bool kAlong>
__global__ void __launch_bounds__(LoraTile::threads(kRank), 1)
    lora_product_kernel(const __grid_constant__ LoraProductArgs args, const __grid_constant__ LoraProductPlan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr bool kIsWhole = !std::is_same_v<F, AnyElement>;
  constexpr int kRows = LoraTile::kRows, kThreads = LoraTile::threads(kRank), kWarps = kThreads / kWarpSize;
  constexpr int kV = kRank == 16 ? 2 : 4, kGroups = kRank / (8 * kV), kSlices = kRank / LoraTile::kSliceColumns;
  extern __shared__ uint4 memory[];
  Slice* const slices = reinterpret_cast<Slice*>(memory);
  ShortRows* const t_rows = reinterpret_cast<ShortRows*>(slices + kWarps);  // [steps][tiles of 8 rows]

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, quad_lane = lane % 4;
  const int row_warps = plan.row_warps, row_warp = warp % row_warps;            // 32 rows each
  const int column_warps = kWarps / row_warps, column_warp = warp / row_warps;  // share out x's columns, then y's
  const auto share = static_cast<int>(blockIdx.x % plan.shares);
  const int64_t m0 = int64_t{blockIdx.x / static_cast<unsigned>(plan.shares)} * row_warps * kRows;
  const bool is_other = blockIdx.y > 0;
  if (is_other && share != 0) return;
  const int64_t warp_m0 = m0 + row_warp * kRows;
  const int n = static_cast<int>(args.n), k = static_cast<int>(args.k), rank = static_cast<int>(args.rank);
  const int steps = (rank + kRank - 1) / kRank * kSlices;  // of 16 columns of t
  Factor down = args.down;
  float* t = args.t;
  if (is_other) {
    down.data = args.others[blockIdx.y - 1].down;
    t = args.others[blockIdx.y - 1].t;
  }

  // --- t

  const auto put_t = [&](int row, int column, float first, float second) {
    uint32_t parts[2];
    split(first * args.up_scale, second * args.up_scale, parts);
    auto& words = t_rows[column / 16 * row_warps * 4 + row / 8].words[row % 8 * 4 + column % 16 / 4];
    words[column % 4 / 2] = parts[0];
    words[column % 4 / 2 + 2] = parts[1];
  };
  // f(row, pair) for 16 columns of the block's rows.
  const auto for_each_pair = [&](const auto& f) {
    for (int i = threadIdx.x; i < row_warps * kRows * 8; i += kThreads)
      f(i / (8 * kRows) * kRows + i % kRows, i / kRows % 8);
  };

  if (args.x) {
    // Behind the last row that one again, whose sums are not used.
    const int64_t first_row = min(warp_m0 + group, args.m - 1);
    const auto rows_behind = static_cast<int>(min(args.m - 1 - first_row, int64_t{kRows}));
    const T* const x_first = static_cast<const T*>(args.x) + first_row * k;
    const auto load_x = [&](WideAlong<T>& tile, int column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* const from = x_first + column + int64_t{min(8 * i, rows_behind)} * k;
        if constexpr (kIsWhole) {
          tile.raw[i] = ptx::load_global_16(from);
        } else {
          uint32_t words[4];
          load_elements(from, k - column, words);
          tile.raw[i] = {words[0], words[1], words[2], words[3]};
        }
      }
    };
#pragma unroll 1
    for (int r0 = 0; r0 < rank; r0 += kRank) {
      const auto load_down = [&](NarrowTile<F, kV, kAlong>& tile, int column, int part) {
        tile.load(down, rank, k, r0 + (part * 8 + group) * kV, column);
      };
      TileSums<kV> sums[kGroups] = {};
      contract<T, WideAlong<T>, F, kAlong>(k, column_warp, column_warps, load_x, load_down, sums);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        __syncthreads();  // the slices before are read
        put_slice(slices[warp], sums[slice / (kV / 2)][slice % (kV / 2)]);
        __syncthreads();
        for_each_pair([&](int row, int pair) {
          const int column = r0 + narrow_row_of<kV>(slice, pair);
          float2 v = sum_slices(slices + row / kRows, column_warps, row_warps, pair, row % kRows);
          // Columns behind the last are products with some other row of down.
          v.x = column < rank ? v.x * args.t_scale : 0.0f;
          v.y = column + 1 < rank ? v.y * args.t_scale : 0.0f;
          put_t(row, column, v.x, v.y);
          if (share != 0 || m0 + row >= args.m || !t) return;
          float* const to = t + (m0 + row) * rank + column;
          if (column < rank) to[0] = v.x;
          if (column + 1 < rank) to[1] = v.y;
        });
      }
    }
  } else {
    for (int step = 0; step < steps; ++step)
      for_each_pair([&](int row, int pair) {
        const int column = step * 16 + pair * 2;
        const float* const from = t + min(m0 + row, args.m - 1) * rank + column;
        put_t(row, column, column < rank ? from[0] : 0.0f, column + 1 < rank ? from[1] : 0.0f);
      });
  }
  if (!args.y || is_other) return;
  __syncthreads();

  // --- y, in chunks of 32 columns

  const auto load_up = [&](NarrowTile<F, 4, kAlong>& tile, int chunk, int step) {
    const int column = step * 16 + quad_lane * 4;
    tile.load(args.up, n, rank, chunk * kRows + group * 4, kIsWhole ? min(column, rank - 4) : column);
  };
  // Sums begin with the bias. Element e of a lane's sums [i][j] is column 4 g + 2 i + e / 2 of the chunk, and of its
  // rows 8 j + 2 q + e % 2.
  const auto fill_with_bias = [&](int chunk, TileSums<4>& sums) {
    float bias[4] = {};
    if (args.bias) load_bias<T, kIsWhole>(args.bias, chunk * kRows + group * 4, n, bias);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = bias[2 * i + e / 2];
  };
  const auto rows_left = static_cast<int>(min(args.m - warp_m0, int64_t{kRows})) - quad_lane * 2;
  const auto store_chunk = [&](int chunk, const TileSums<4>& sums) {
    const int column = chunk * kRows + group * 4;
    if (column >= n) return;
    T* const to = static_cast<T*>(args.y) + (warp_m0 + quad_lane * 2) * n + column;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + e >= rows_left) continue;
        const float values[4] = {sums[0][j][e], sums[0][j][e + 2], sums[1][j][e], sums[1][j][e + 2]};
        T* const row = to + int64_t{8 * j + e} * n;
        if constexpr (kIsWhole) {
          *reinterpret_cast<uint2*>(row) = {narrow_pair<T>(values[0], values[1]), narrow_pair<T>(values[2], values[3])};
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (column + i < n) narrow(values[i], row + i);
        }
      }
  };
  const int end = min((share + 1) * plan.share_chunks, (n + kRows - 1) / kRows);
  int chunk = share * plan.share_chunks + column_warp;
  if (chunk >= end) return;
  NarrowTile<F, 4, kAlong> up[kSlices];
#pragma unroll
  for (int i = 0; i < kSlices; ++i) load_up(up[i], chunk, i);
#pragma unroll 1
  for (; chunk < end; chunk += column_warps) {
    TileSums<4> sums;
    fill_with_bias(chunk, sums);
#pragma unroll 1
    for (int step = 0; step < steps; step += kSlices) {
      const bool is_last = step + kSlices >= steps;
      const int next_chunk = is_last ? chunk + column_warps : chunk, next_step = is_last ? 0 : step + kSlices;
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        uint32_t a[2][kParts<F>][4], b[4][2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) up[i].fragment(j, a[j]);
        if (next_chunk < end) load_up(up[i], next_chunk, next_step + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const ShortRows& from = t_rows[((step + i) * row_warps + row_warp) * 4 + j];
          const uint4 v = ptx::load_shared_16(ptx::shared_address(from.words[lane]));
          b[j][0][0] = v.x, b[j][0][1] = v.y, b[j][1][0] = v.z, b[j][1][1] = v.w;
        }
        multiply(sums, a, b);
      }
    }
    store_chunk(chunk, sums);
  }
#endif
}

template <class T, class F, int kRank, bool kAlong>
int launch(const LoraProductArgs& args, const LoraProductPlan& plan, Stream stream) {
  const auto kernel = lora_product_kernel<T, F, kRank, kAlong>;
  if (const int code = allow_shared_memory(kernel, plan.shared_bytes)) return code;
  const dim3 grid(static_cast<unsigned>(plan.blocks()), static_cast<unsigned>(1 + args.other_count));
  kernel<<<grid, LoraTile::threads(kRank), plan.shared_bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

template <class T, class F>
int launch(const LoraProductArgs& args, const LoraProductPlan& plan, Stream stream) {
  const auto for_rank = [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    return plan.access == LoraAccess::along ? launch<T, F, kRank, true>(args, plan, stream)
                                            : launch<T, F, kRank, false>(args, plan, stream);
  };
  if (plan.rank == 16) return for_rank(std::integral_constant<int, 16>{});
  if constexpr (std::is_same_v<T, Bf16>)
    if (plan.rank == 64) return for_rank(std::integral_constant<int, 64>{});
  return for_rank(std::integral_constant<int, 32>{});
}

template <class T>
int launch(const LoraProductArgs& args, const LoraProductPlan& plan, Stream stream) {
  if (plan.access == LoraAccess::any) return launch<T, AnyElement, 32, true>(args, plan, stream);
  if ((args.x ? args.down : args.up).dtype == Dtype::f32) return launch<T, float>(args, plan, stream);
  return launch<T, T>(args, plan, stream);
}

}  // namespace

int lora_product(const LoraProductArgs& args, const Gpu& gpu, Stream stream) {
  if (!lora_fits(args, gpu)) return cudaErrorNotSupported;
  if (args.m == 0 || (!args.y && (!args.x || args.rank == 0)) || (args.n == 0 && (!args.x || args.rank == 0)))
    return cudaSuccess;
  const LoraProductPlan plan = plan_lora_product(args, gpu);
  return args.dtype == Dtype::f16 ? launch<Fp16>(args, plan, stream) : launch<Bf16>(args, plan, stream);
}

}  // namespace lowbit::cuda

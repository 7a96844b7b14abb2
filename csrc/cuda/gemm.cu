// linear for more rows of x than the gemv takes, on tensor cores: y = x W^T + scaling t lora_b^T + bias.
//
// W is the mma's A (16 rows) and x its B (8 columns), so that y comes out transposed and the rows of x are padded to
// eights only. Tiles of x and of packed W come through a ring of four stages of cp.async, with one barrier per tile. A
// weight is decoded in the registers of the lane that multiplies it: the order of the contraction is free, and
// gemm_k (layout.h) is the one in which a lane's fragments are consecutive bytes of W as stored, and of x.
//
// Costs per 64 weights of a lane (one step of a warp: 32 rows of W, 64 columns), M being the rows of x in the tile:
//
// Decode: a byte's two values are one PRMT, which makes the address, and one LDS from a table of pairs with a copy per
// lane: 64 instructions and 32 cycles of shared memory. From registers (PRMT on 16 entries in two byte planes) it would
// be 2.6 instructions per weight, 168, and all of them on the pipe that does 64 lanes per cycle: 84 cycles of a
// multiprocessor per warp and step, where DRAM at full speed leaves an H100 70.
// x: M / 4 LDS.128, each serving four mma: 16 bytes of every lane, as ldmatrix.x4 would; M cycles of shared memory.
// Scales: in fp32, on the sums of each block: M FFMA, on a pipe that is free otherwise. Multiplied into the decoded
// pairs it would be 32 HMUL2 (and their scales' conversion), fewer from M = 32 on, but shared memory is what limits
// then, and the weight would be rounded twice more (2^-8 each in bf16), and in f16 underflow where scales are small.
// Here the codebook alone is rounded to 16 bits. (Sums of x times the codebook must fit fp32: |x| below 1e36.)
// In all, without NOPs, on sm_90: 163 at M = 16, 232 at M = 32, 297 at M = 64 (2.5 to 4.6 per weight), of which 16, 32
// and 64 are HMMA; 16 to 23 more where scales are double-quantized.
//
// LoRA: t and lora_b are in fp32. Each is split into two bf16, of which three products make the fp32 one to 3 * 2^-16,
// in the same sums: 3 mma per 16 of the rank and fragment, in place of 64 FFMA in fp32.
#include "device/launch.h"
#include "device/split_sum.cuh"
#include "device/weight.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
[[maybe_unused]] constexpr int kWarps = kThreads / kWarpSize;  // unused before sm_80
constexpr int kStages = 4;
constexpr int kPad = 4;  // floats after each row of the staged output: its writers' rows fall into distinct banks

template <int kRows>
union Shared {
  using Tile = GemmTile<kRows>;
  struct {
    // Half a line each: the pair of values of every byte, one copy per lane, and x. So a pair's address is the byte
    // above the lane's offset in the line.
    struct {
      uint32_t pairs[kWarpSize];
      uint4 x[kWarpSize / 4];
    } lines[256];
    uint4 w[kStages][Tile::kN * Tile::kWPieces];
  };
  float sums[Tile::kWarpsK][Tile::kM][Tile::kN + kPad];  // after the last tile
};

// Four values of a row, of which `count` are in it.
template <class T>
__device__ __forceinline__ void store(const float (&values)[4], int64_t count, bool whole, T* to) {
  if (whole) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
    } else {
      *reinterpret_cast<uint2*>(to) = {narrow_pair<T>(values[0], values[1]), narrow_pair<T>(values[2], values[3])};
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) narrow(values[i], to + i);
}

// kScaleK: how many columns, from a multiple of it on, certainly share a scale: 32 or 64.
// tiles_per_split: tiles of k that block (.., y) sums. whole: rows of four of the output are aligned.
template <class T, int kRows, int kScaleK, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads, 2)
    gemm_kernel(const __grid_constant__ LinearArgs args, const __grid_constant__ Format format, int scale_shift,
                int tiles_per_split, bool whole) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Tile = GemmTile<kRows>;
  constexpr int kTilesA = Tile::kWarpN / 16, kTilesB = Tile::kM / 8;      // of mma, in what a warp multiplies
  constexpr int kScales = Tile::kWarpK / kScaleK, kSteps = kScaleK / 16;  // scales per row and tile, mma steps of each
  static_assert(Tile::kWarpsN * Tile::kWarpsK == kWarps && Tile::kM * Tile::kXPieces == 2 * kThreads);
  extern __shared__ uint4 memory[];  // at 0 or 0x400: lines begin where an address ends in a byte of zeros
  Shared<kRows>& shared = *reinterpret_cast<Shared<kRows>*>(memory);
  constexpr int kLineBytes = sizeof(shared.lines[0]), kStageX = 64 * kLineBytes, kStageW = sizeof(shared.w[0]);

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = lane / 4, quad_lane = lane % 4;
  const int warp_n = warp % Tile::kWarpsN, warp_k = warp / Tile::kWarpsN;
  const auto tiles_m = static_cast<uint32_t>(ceil_div(args.m, Tile::kM));
  // Blocks that read the same rows of W are neighbours, so that L2 serves all but the first.
  const int64_t m0 = int64_t{blockIdx.x % tiles_m} * Tile::kM, n0 = int64_t{blockIdx.x / tiles_m} * Tile::kN;
  const int k = static_cast<int>(args.k), k0 = blockIdx.y * tiles_per_split * Tile::kK;
  const int tiles = min(tiles_per_split, (k - k0 + Tile::kK - 1) / Tile::kK);
  const auto rows_left = [](int64_t all, int64_t first, int tile) {
    return static_cast<int>(min(all - first, int64_t{tile}));
  };
  const int m_left = rows_left(args.m, m0, Tile::kM), n_left = rows_left(args.n, n0, Tile::kN);

  // --- copies: two pieces of x and two of W per thread and tile. Behind the last row some other row is read, for sums
  // that are not written. Behind the last column there are zeros, which add nothing: codes decode to finite numbers

  const Position x_at = Tile::x_at(threadIdx.x / 8 * 16 + threadIdx.x % 8), w_at = Tile::w_at(threadIdx.x);
  const char* x_from =
      static_cast<const char*>(args.x) + ((m0 + min(x_at.row, m_left - 1)) * k + k0 + x_at.column * 8) * 2;
  const uint8_t* w_from = args.weight.packed + ((n0 + min(w_at.row, n_left - 1)) * k + k0 + w_at.column * 32) / 2;
  const uint32_t w_half = w_at.row + Tile::kN / 2 < n_left ? Tile::kN / 2 * (k / 2) : 0;
  const uint32_t x_to = ptx::shared_address(&shared.lines[threadIdx.x / 8 * 2].x[threadIdx.x % 8]);
  const uint32_t w_to = ptx::shared_address(&shared.w[0][threadIdx.x]);
  // Whether the tile reaches so far along k: all of it, where a tile is no longer than what k is a multiple of.
  const auto reaches = [&](int tile, int column) {
    return tile < tiles && (Tile::kK <= kScaleK || tile * Tile::kK + column < k - k0);
  };
  const auto copy_tile = [&](int tile) {
    const int stage = tile % kStages;
#pragma unroll
    for (int half = 0; half < 2; ++half)  // of 64 columns
      ptx::copy_async_16(x_to + stage * kStageX + half * kLineBytes, x_from + half * 64,
                         reaches(tile, x_at.column * 8 + half * 32) ? kAccessBytes : 0);
    const int w_bytes = reaches(tile, w_at.column * 32) ? kAccessBytes : 0;
    ptx::copy_async_16(w_to + stage * kStageW, w_from, w_bytes);
    ptx::copy_async_16(w_to + stage * kStageW + kStageW / 2, w_from + w_half, w_bytes);
    x_from += Tile::kK * 2;
    w_from += Tile::kK / 2;
    ptx::commit_copies();
  };

  // --- scales: each lane has those of one of the warp's rows, one that its quad multiplies, and loads them one tile
  // ahead

  const int scale_row = warp_n * Tile::kWarpN + quad_lane * 8 + group;
  uint32_t scale_from = static_cast<uint32_t>(((n0 + min(scale_row, n_left - 1)) * k + k0 + warp_k * Tile::kWarpK) /
                                              kScaleK);  // in units of kScaleK columns
  const ScaleReader<kDoubleQuant> scale_of(args.weight.scales);
  using LoadedScale = typename ScaleReader<kDoubleQuant>::Loaded;
  const auto load_scales = [&](int tile, LoadedScale(&scales)[kScales]) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      scales[i] = {};
      if (!reaches(tile, warp_k * Tile::kWarpK + i * kScaleK)) continue;
      scales[i] = scale_of.load((scale_from + i) >> scale_shift);
    }
    scale_from += Tile::kK / kScaleK;
  };

  // --- one tile: decode the warp's 32 x 64 weights, multiply them with every row of x

  float sums[kTilesA][kTilesB][4] = {};
  const char* const pairs = reinterpret_cast<const char*>(shared.lines);
  // Its lowest byte is the lane's offset in a line: 16 group + 4 quad_lane.
  const uint32_t w_lane =
      ptx::shared_address(&shared.w[0][Tile::w_place(warp_n * Tile::kWarpN + group, warp_k * 2)]) + quad_lane * 4;
  const uint32_t x_lane =
      ptx::shared_address(&shared.lines[Tile::x_place(group, warp_k * 8) / 8].x[group % 2 * 4 + quad_lane]);
  const auto multiply = [&](int stage, const float (&row_scales)[kScales]) {
    uint32_t w_from = w_lane + stage * kStageW, x_from = x_lane + stage * kStageX;
#pragma unroll 1  // or ptxas makes all loads first, with more registers than there are
    for (int i_scale = 0; i_scale < kScales; ++i_scale) {
      const float row_scale = i_scale == 0 ? row_scales[0] : row_scales[kScales - 1];
      uint32_t a[kTilesA][kSteps][4];
      float scales[kTilesA][2];
#pragma unroll
      for (int tile = 0; tile < kTilesA; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scales[tile][half] = __uint_as_float(ptx::shuffle_quad(__float_as_uint(row_scale), tile * 2 + half));
#pragma unroll
          for (int i = 0; i < kSteps / 2; ++i) {
            const int place = Tile::w_place(tile * 16 + half * 8, i);
            const uint32_t word = ptx::load_shared_4(w_from + place * kAccessBytes);
#pragma unroll
            for (int b = 0; b < 4; ++b)
              a[tile][2 * i + b / 2][half + b % 2 * 2] =
                  *reinterpret_cast<const uint32_t*>(pairs + ptx::byte_above(word, b, w_lane));
          }
        }
#pragma unroll
      for (int column = 0; column < kTilesB; ++column) {
        float block_sums[kTilesA][4] = {};
#pragma unroll
        for (int i = 0; i < kSteps / 2; ++i) {
          const int line = Tile::x_place(column * 8, i * 4) / 8;
          const uint4 v = ptx::load_shared_16(x_from + line * kLineBytes);
          const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
          for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int tile = 0; tile < kTilesA; ++tile) ptx::mma<T>(block_sums[tile], a[tile][2 * i + step], b[step]);
        }
#pragma unroll
        for (int tile = 0; tile < kTilesA; ++tile)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[tile][column][j] = fmaf(block_sums[tile][j], scales[tile][j / 2], sums[tile][column][j]);
      }
      w_from += Tile::w_place(0, 1) * kAccessBytes;
      x_from += Tile::x_place(0, 4) / 8 * kLineBytes;
    }
  };

  // --- the pipeline

#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) copy_tile(tile);
  LoadedScale stored[kScales];
  load_scales(0, stored);
  for (int high = warp * 2; high < warp * 2 + 2; ++high)
#pragma unroll
    for (int low = 0; low < 16; ++low)
      shared.lines[high * 16 + low].pairs[lane] = narrow_pair<T>(format.codebook[high], format.codebook[low]);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // the tile is here for all, and the stage before it is free
    copy_tile(tile + kStages - 1);
    float scales[kScales];
#pragma unroll
    for (int i = 0; i < kScales; ++i) scales[i] = scale_of.decode(stored[i]);
    load_scales(tile + 1, stored);
    multiply(tile % kStages, scales);
  }

  // --- the sums go to shared memory: registers for LoRA, and rows of the output that are written together

  ptx::wait_copies<0>();
  __syncthreads();
  const auto sum_at = [&](int tile, int column, int i) -> float& {
    const Position at = mma_c(lane, i);
    return shared.sums[warp_k][column * 8 + at.column][warp_n * Tile::kWarpN + tile * 16 + at.row];
  };
#pragma unroll
  for (int tile = 0; tile < kTilesA; ++tile)
#pragma unroll
    for (int column = 0; column < kTilesB; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_at(tile, column, i) = sums[tile][column][i];

  // --- LoRA: the rank's columns in sixteens, shared out among the warps along k and the blocks along y

  const float* const t_rows = args.t + m0 * args.rank;
  const float* const b_rows = args.lora_b + n0 * args.rank;
  const int rank = static_cast<int>(args.rank);
  const auto pair_of = [&](const float* rows, int row, int row_count, int column, float scaling) {
    const auto element = [&](int at) {
      return at < rank ? scaling * rows[static_cast<uint32_t>(min(row, row_count - 1) * rank + at)] : 0.0f;
    };
    return SplitPair(element(column), element(column + 1));
  };
#pragma unroll 1
  for (int r0 = (blockIdx.y * Tile::kWarpsK + warp_k) * 16; r0 < rank; r0 += gridDim.y * Tile::kWarpsK * 16) {
    uint32_t a[2][kTilesA][4];
#pragma unroll
    for (int tile = 0; tile < kTilesA; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Position at = mma_a(lane, 2 * i);
        const SplitPair pair =
            pair_of(b_rows, warp_n * Tile::kWarpN + tile * 16 + at.row, n_left, r0 + at.column, args.scaling);
        a[0][tile][i] = pair.high, a[1][tile][i] = pair.low;
      }
#pragma unroll
    for (int column = 0; column < kTilesB; ++column) {
      uint32_t b[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Position at = mma_b(lane, 2 * i);
        const SplitPair pair = pair_of(t_rows, column * 8 + at.column, m_left, r0 + at.row, 1.0f);
        b[0][i] = pair.high, b[1][i] = pair.low;
      }
#pragma unroll
      for (int tile = 0; tile < kTilesA; ++tile) {
        float c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = sum_at(tile, column, i);
        ptx::mma<Bf16>(c, a[1][tile], b[0]);
        ptx::mma<Bf16>(c, a[0][tile], b[1]);
        ptx::mma<Bf16>(c, a[0][tile], b[0]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_at(tile, column, i) = c[i];
      }
    }
  }

  // --- the output: the warps' sums, added up

  __syncthreads();
  constexpr int kFours = Tile::kN / 4;  // in a row
  for (int i = threadIdx.x; i < Tile::kM * kFours; i += kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    const int64_t left = args.n - n0 - column;
    if (m0 + row >= args.m || left <= 0) continue;
    float values[4] = {};
#pragma unroll 1  // unrolled, it changes what ptxas spills in the main loop
    for (int part = 0; part < Tile::kWarpsK; ++part) {
      const float4 v = *reinterpret_cast<const float4*>(&shared.sums[part][row][column]);
      values[0] += v.x, values[1] += v.y, values[2] += v.z, values[3] += v.w;
    }
    if (args.bias && blockIdx.y == 0)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < left) values[j] += args.bias[n0 + column + j];
    const int64_t at = (m0 + row) * args.n + n0 + column;
    if (gridDim.y == 1) {
      store(values, left, whole, static_cast<T*>(args.y) + at);
    } else {
      store(values, left, whole, args.workspace + blockIdx.y * args.m * args.n + at);
    }
  }
#endif
}

template <class T, int kRows, int kScaleK>
int launch(const LinearArgs& args, const Plan& plan, Stream stream) {
  const auto kernel = args.weight.scales.kind == ScaleKind::block ? gemm_kernel<T, kRows, kScaleK, false>
                                                                  : gemm_kernel<T, kRows, kScaleK, true>;
  constexpr int kBytes = sizeof(Shared<kRows>);
  if (const int code = allow_shared_memory(kernel, kBytes)) return code;
  const bool direct = plan.splits == 1;
  const bool whole = args.n % 4 == 0 && is_aligned(direct ? args.y : args.workspace, direct ? 8 : 16);
  const dim3 grid(static_cast<unsigned>(plan.row_tiles * plan.column_tiles), static_cast<unsigned>(plan.splits));
  kernel<<<grid, kThreads, kBytes, stream>>>(args, *args.weight.format, log2_of(args.weight.block_size / kScaleK),
                                             static_cast<int>(plan.split_size), whole);
  // The first split has added the bias.
  return direct ? cudaGetLastError() : sum_splits<T>({args.workspace, plan.splits, args.m, args.n}, args.y, stream);
}

template <class T>
int launch(const LinearArgs& args, const Plan& plan, Stream stream) {
  const auto for_rows = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    return plan.scale_columns == 64 ? launch<T, kRows, 64>(args, plan, stream)
                                    : launch<T, kRows, 32>(args, plan, stream);
  };
  if (plan.rows == 16) return for_rows(std::integral_constant<int, 16>{});
  if (plan.rows == 32) return for_rows(std::integral_constant<int, 32>{});
  return launch<T, 64, 64>(args, plan, stream);
}

}  // namespace

int linear_gemm(const LinearArgs& args, const Plan& plan, Stream stream) {
  if (!gemm_fits(args) || current_gpu().code_capability < 80) return cudaErrorNotSupported;
  return args.dtype == Dtype::f16 ? launch<Fp16>(args, plan, stream) : launch<Bf16>(args, plan, stream);
}

}  // namespace lowbit::cuda

// linear for more rows of x than the gemv takes, on tensor cores: y = x W^T + scaling t lora_b^T + bias.
//
// W is the mma's A (16 rows) and x its B (8 columns), so that y comes out transposed and the rows of x are padded to
// eights only. A block of threads is all that a multiprocessor holds: 16 warps share one table of decoded pairs and
// each tile of x, and add up in shared memory what those have that stand side by side along k. Tiles of x and of packed
// W come through a ring of cp.async, with one barrier per tile. A weight is decoded in the registers of the lane that
// multiplies it: the order of the contraction is free, and gemm_k (layout.h) is the one in which a lane's fragments are
// consecutive bytes of W as stored, and of x. Where k is split, the block that comes last adds up what all have.
//
// Tiles of 64 rows leave no register to spare of the 128 that 16 warps have: what a tile's copies and scales need is
// kept as offsets of 32 bits and one count of columns, or found out again from the thread's number.
//
// Costs per 64 weights of a lane (one step of a warp: 32 rows of W, 64 columns), M being the rows of x in the tile:
//
// Decode: a byte's two values are one IDP, which makes the address, and one LDS from a table of pairs with a copy per
// lane: 64 instructions and 32 cycles of shared memory. From registers (PRMT on 16 entries in two byte planes) it would
// be 2.6 instructions per weight, 168, and all of them on the pipe that does 64 lanes per cycle: 84 cycles of a
// multiprocessor per warp and step, where DRAM at full speed leaves an H200 53.
// x: M / 4 LDS.128, each serving four mma: 16 bytes of every lane, as ldmatrix.x4 would; M cycles of shared memory.
// Scales: in fp32, on the sums of each block: M FFMA, on a pipe that is free otherwise. Multiplied into the decoded
// pairs it would be 32 HMUL2 (and their scales' conversion), fewer from M = 32 on, but shared memory is what limits
// then, and the weight would be rounded twice more (2^-8 each in bf16), and in f16 underflow where scales are small.
// Here the codebook alone is rounded to 16 bits. (Sums of x times the codebook must fit fp32: |x| below 1e36.)
//
// LoRA: t and lora_b are in fp32. Each is split into two bf16, of which three products make the fp32 one to 3 * 2^-16,
// in the same sums: 3 mma per 16 of the rank and fragment, in place of 64 FFMA in fp32.
#include "device/arrival.cuh"
#include "device/launch.h"
#include "device/weight.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = kGemmWarps * kWarpSize;
constexpr int kPad = 4;  // floats after each row of the staged output: its writers' rows fall into distinct banks

// The table and the ring; after the last tile, the sums of the output.
template <class T, class Tile>
union Shared {
  struct Stage {
    uint4 w[Tile::kN * Tile::kWPieces], x[Tile::kM * Tile::kXPieces];
  };
  struct {
    NarrowPairTable<T> table;
    Stage ring[Tile::kMostStages];  // as many as the plan says
  };
  float sums[Tile::kM][Tile::kN + kPad];
  static_assert(sizeof(table) == kGemmTableBytes && sizeof(sums) <= gemm_shared_bytes(Tile::kM, Tile::kN, 2));
  static_assert(sizeof(table) + 2 * sizeof(Stage) == gemm_shared_bytes(Tile::kM, Tile::kN, 2));
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

// What another block has stored.
__device__ __forceinline__ float4 load_fresh(const float* from, int count, bool whole) {
  if (whole) return ptx::load_global_16_fresh(from);
  float4 values = {ptx::load_global_4_fresh(from), 0.0f, 0.0f, 0.0f};
  if (count > 1) values.y = ptx::load_global_4_fresh(from + 1);
  if (count > 2) values.z = ptx::load_global_4_fresh(from + 2);
  if (count > 3) values.w = ptx::load_global_4_fresh(from + 3);
  return values;
}

// Where a thread's warp works: its tile of the output, and its part of the tile and of k.
template <class Tile>
struct Place {
  int thread, lane, warp_n, warp_k;
  int64_t m0, n0;
  int m_left, n_left;  // rows of x and of W in the tile

  __device__ __forceinline__ Place(const LinearArgs& args, int thread, unsigned block)
      : thread(thread), lane(thread % kWarpSize) {
    const int warp = ptx::shuffle(thread / kWarpSize, 0);  // so that the compiler knows it for the warp's
    warp_n = warp % Tile::kWarpsN, warp_k = warp / Tile::kWarpsN;
    // Blocks that read the same rows of W are neighbours, so that L2 serves all but the first.
    const auto tiles_m = static_cast<unsigned>(ceil_div(args.m, Tile::kM));
    m0 = int64_t{block % tiles_m} * Tile::kM, n0 = int64_t{block / tiles_m} * Tile::kN;
    m_left = static_cast<int>(min(args.m - m0, int64_t{Tile::kM}));
    n_left = static_cast<int>(min(args.n - n0, int64_t{Tile::kN}));
  }
};

// Adds LoRA's product to the sums, which are at sum_at(tile of W, tile of x, i) of the warp's rows of W. Its tiles of x
// are shared out among the warps along k, and the rank's columns, in sixteens, among the blocks along y.
template <class Tile, class SumAt>
__device__ __forceinline__ void add_lora(const LinearArgs& args, const Place<Tile>& place, const SumAt& sum_at) {
  constexpr int kTilesA = kGemmWarpN / 16;
  const float* const t_rows = args.t + place.m0 * args.rank;
  const float* const b_rows = args.lora_b + place.n0 * args.rank;
  const int rank = static_cast<int>(args.rank);
  const auto pair_of = [&](const float* rows, int row, int row_count, int column, float scaling) {
    const auto element = [&](int at) {
      return at < rank ? scaling * rows[static_cast<uint32_t>(min(row, row_count - 1) * rank + at)] : 0.0f;
    };
    return SplitPair(element(column), element(column + 1));
  };
#pragma unroll 1
  for (int r0 = blockIdx.y * 16; r0 < rank; r0 += gridDim.y * 16) {
    uint32_t a[2][kTilesA][4];
#pragma unroll
    for (int tile = 0; tile < kTilesA; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Position at = mma_a(place.lane, 2 * i);
        const SplitPair pair =
            pair_of(b_rows, place.warp_n * kGemmWarpN + tile * 16 + at.row, place.n_left, r0 + at.column, args.scaling);
        a[0][tile][i] = pair.high, a[1][tile][i] = pair.low;
      }
#pragma unroll 1
    for (int column = place.warp_k; column < Tile::kM / 8; column += Tile::kWarpsK) {
      uint32_t b[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Position at = mma_b(place.lane, 2 * i);
        const SplitPair pair = pair_of(t_rows, column * 8 + at.column, place.m_left, r0 + at.row, 1.0f);
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
}

// Four sums of a row: of all of k, with the bias, into y; of a split, into its part of the workspace.
template <class T, class Tile>
__device__ __forceinline__ void write(const LinearArgs& args, const Place<Tile>& place, int row, int column,
                                      float (&values)[4], bool is_whole_sum, bool whole) {
  const int64_t first = place.n0 + column, at = (place.m0 + row) * args.n + first, left = args.n - first;
  if (!is_whole_sum) return store(values, left, whole, args.workspace + blockIdx.y * args.m * args.n + at);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < left) values[j] = plus_bias(values[j], args.bias, first + j);
  store(values, left, whole, static_cast<T*>(args.y) + at);
}

// Adds up what all blocks along y have written, in their order, so that it is always the same.
template <class T, class Tile>
__device__ __forceinline__ void add_splits(const LinearArgs& args, const Place<Tile>& place, bool whole) {
  constexpr int kFours = Tile::kN / 4, kAhead = 4;
#pragma unroll 1
  for (int i = place.thread; i < Tile::kM * kFours; i += kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    if (row >= place.m_left || column >= place.n_left) continue;
    const float* const from = args.workspace + (place.m0 + row) * args.n + place.n0 + column;
    float values[4] = {};
#pragma unroll 1
    for (unsigned split = 0; split < gridDim.y; split += kAhead) {
      float4 parts[kAhead] = {};
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (split + j < gridDim.y)
          parts[j] = load_fresh(from + (split + j) * args.m * args.n, place.n_left - column, whole);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        values[0] += parts[j].x, values[1] += parts[j].y, values[2] += parts[j].z, values[3] += parts[j].w;
    }
    write<T>(args, place, row, column, values, true, whole);
  }
}

// kScaleK: how many columns, from a multiple of it on, certainly share a scale: 32 or 64.
// planned_stages: of the ring, 2 or the most. tiles_per_split: tiles of k that block (.., y) sums. whole: rows of four
// of the output are aligned.
template <class T, int kRows, int kColumns, int kScaleK, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ LinearArgs args, const __grid_constant__ Format format, int scale_shift,
                int planned_stages, int tiles_per_split, bool whole) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Tile = GemmTile<kRows, kColumns>;
  constexpr int kTilesA = kGemmWarpN / 16, kTilesB = Tile::kM / 8;      // of mma, in what a warp multiplies
  constexpr int kScales = kGemmWarpK / kScaleK, kSteps = kScaleK / 16;  // scales per row and tile, mma steps of each
  extern __shared__ uint4 memory[];
  Shared<T, Tile>& shared = *reinterpret_cast<Shared<T, Tile>*>(memory);
  constexpr int kStageBytes = sizeof(shared.ring[0]);

  const Place<Tile> at(args, threadIdx.x, blockIdx.x);
  const int64_t m0 = at.m0, n0 = at.n0;
  const int lane = at.lane, group = lane / 4, quad_lane = lane % 4, warp_n = at.warp_n, warp_k = at.warp_k;
  const int m_left = at.m_left, n_left = at.n_left;
  const int k = static_cast<int>(args.k), k0 = blockIdx.y * tiles_per_split * Tile::kK;
  const int k_left = min(k - k0, tiles_per_split * Tile::kK);
  // The ring. (Where it has two stages on every GPU, ptxas knows that and needs fewer registers.)
  const int stages = Tile::kMostStages == 2 ? 2 : planned_stages;
  const auto next = [&](int stage) { return stage == (stages - 1) * kStageBytes ? 0 : stage + kStageBytes; };

  // --- copies: some pieces of x and two of W per thread and tile. Behind the last row some other row is read, for sums
  // that are not written. Behind the last column there are zeros, which add nothing: codes decode to finite numbers

  constexpr int kXCopies = Tile::kM * Tile::kXPieces / kThreads;  // of one row of x, so many columns apart:
  constexpr int kXApart = kThreads / 8 / Tile::kM * 64;
  static_assert(Tile::kN * Tile::kWPieces == 2 * kThreads && (kXCopies == 1 || kXCopies * kXApart == Tile::kK));
  const Position x_at = Tile::x_at(threadIdx.x), w_at = Tile::w_at(threadIdx.x);
  const char* const x_base = static_cast<const char*>(args.x) + (m0 * k + k0) * 2;
  const uint8_t* const w_base = args.weight.packed + (n0 * k + k0) / 2;
  uint32_t x_from = (min(x_at.row, m_left - 1) * k + x_at.column * 8) * 2;
  uint32_t w_from = (min(w_at.row, n_left - 1) * (k / 2) + w_at.column * kAccessBytes);
  // Where all threads' pieces are of the same kScaleK columns, of which k is a multiple, one register serves them all.
  const int w_column = Tile::kHalf * 32 <= kScaleK ? 0 : w_at.column * 32;
  const int x_column = kThreads / 8 <= Tile::kM && kScaleK == 64 ? 0 : x_at.column * 8;
  constexpr int kAtX = sizeof(shared.ring[0].w);
  const uint32_t to = ptx::shared_address(shared.ring[0].w);
  int copy_stage = 0;                     // of the next tile
  const auto copy_tile = [&](int left) {  // left: columns from it on
    const uint32_t w_to = to + copy_stage + ptx::read_thread_index() * kAccessBytes, x_to = w_to + kAtX;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ptx::copy_async_16(w_to + i * kThreads * kAccessBytes, w_base + w_from + i * Tile::kHalf * kAccessBytes,
                         w_column + i * Tile::kK / 2 < left ? kAccessBytes : 0);
#pragma unroll
    for (int i = 0; i < kXCopies; ++i)
      ptx::copy_async_16(x_to + i * kThreads * kAccessBytes, x_base + x_from + i * kXApart * 2,
                         x_column + i * kXApart < left ? kAccessBytes : 0);
    w_from += Tile::kK / 2;
    x_from += Tile::kK * 2;
    copy_stage = next(copy_stage);
    ptx::commit_copies();
  };

  // --- scales: each lane has those of one of the warp's rows, one that its quad multiplies, and loads them one tile
  // ahead

  const int scale_row = warp_n * kGemmWarpN + quad_lane * 8 + group;
  uint32_t scale_from = static_cast<uint32_t>(((n0 + min(scale_row, n_left - 1)) * k + k0 + warp_k * kGemmWarpK) /
                                              kScaleK);  // in units of kScaleK columns
  using LoadedScale = typename ScaleReader<kDoubleQuant>::Loaded;
  const auto load_scales = [&](int left, LoadedScale(&scales)[kScales]) {
    const int column = ptx::read_thread_index() / (kWarpSize * Tile::kWarpsN) * kGemmWarpK;
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      scales[i] = {};
      if (column + i * kScaleK < left)
        scales[i] = ScaleReader<kDoubleQuant>(args.weight.scales).load((scale_from + i) >> scale_shift);
    }
    scale_from += Tile::kK / kScaleK;
  };

  // --- one tile: decode the warp's 32 x 64 weights, multiply them with every row of x

  float sums[kTilesA][kTilesB][4] = {};
  const uint32_t pairs = shared.table.lane_base(lane);
  const uint32_t w_lane =
      ptx::shared_address(&shared.ring[0].w[Tile::w_place(warp_n * kGemmWarpN, warp_k * 2)]) + lane * 4;
  const uint32_t x_lane = ptx::shared_address(&shared.ring[0].x[Tile::x_place(0, warp_k * 8)]) +
                          Tile::x_place(group, quad_lane) * kAccessBytes;
  const auto multiply = [&](int stage, const float (&row_scales)[kScales]) {
    uint32_t w_from = w_lane + stage, x_from = x_lane + stage;
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
              a[tile][2 * i + b / 2][half + b % 2 * 2] = NarrowPairTable<T>::decode(word, b, pairs);
          }
        }
#pragma unroll
      for (int column = 0; column < kTilesB; ++column) {
        float block_sums[kTilesA][4] = {};
#pragma unroll
        for (int i = 0; i < kSteps / 2; ++i) {
          const uint4 v = ptx::load_shared_16(x_from + Tile::x_place(column * 8, i * 4) * kAccessBytes);
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
      x_from += Tile::x_place(0, 4) * kAccessBytes;
    }
  };

  // --- the pipeline

#pragma unroll 1
  for (int tile = 0; tile < stages - 1; ++tile) copy_tile(k_left - tile * Tile::kK);
  LoadedScale stored[kScales];
  load_scales(k_left, stored);
  shared.table.fill(format);
  int stage = 0;
#pragma unroll 1
  for (int left = k_left; left > 0; left -= Tile::kK) {
    stages == 2 ? ptx::wait_copies<0>() : ptx::wait_copies<Tile::kMostStages - 2>();
    __syncthreads();        // the tile is here for all, and the stage before it is free
    float scales[kScales];  // their offset is read each time: kept, it would be a register too many
#pragma unroll
    for (int i = 0; i < kScales; ++i) scales[i] = ScaleReader<kDoubleQuant>(args.weight.scales).decode(stored[i]);
    load_scales(left - Tile::kK, stored);
    copy_tile(left - (stages - 1) * Tile::kK);
    multiply(stage, scales);
    stage = next(stage);
  }

  // --- the sums go to shared memory: those of the warps along k are added up there, and LoRA's. (Where the thread
  // works is found out again, so that the loop need not keep it in registers.)

  const Place<Tile> here(args, ptx::read_thread_index(), ptx::read_block_index());
  const auto sum_at = [&](int tile, int column, int i) -> float& {
    const Position at = mma_c(here.lane, i);
    return shared.sums[column * 8 + at.column][here.warp_n * kGemmWarpN + tile * 16 + at.row];
  };
  ptx::wait_copies<0>();
#pragma unroll 1
  for (int part = 0; part < Tile::kWarpsK; ++part) {
    __syncthreads();
    if (here.warp_k != part) continue;
#pragma unroll
    for (int tile = 0; tile < kTilesA; ++tile)
#pragma unroll
      for (int column = 0; column < kTilesB; ++column)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum_at(tile, column, i) = sums[tile][column][i] + (part == 0 ? 0.0f : sum_at(tile, column, i));
  }
  __syncthreads();
  if (args.rank > 0) add_lora<Tile>(args, here, sum_at);
  __syncthreads();

  // --- the output

  constexpr int kFours = Tile::kN / 4;  // in a row
#pragma unroll 1
  for (int i = here.thread; i < Tile::kM * kFours; i += kThreads) {
    const int row = i / kFours, column = i % kFours * 4;
    if (row >= here.m_left || column >= here.n_left) continue;
    const float4 v = *reinterpret_cast<const float4*>(&shared.sums[row][column]);
    float values[4] = {v.x, v.y, v.z, v.w};
    write<T>(args, here, row, column, values, gridDim.y == 1, whole);
  }
  if (gridDim.y > 1 && is_last_to_arrive(args.counters + blockIdx.x, gridDim.y)) add_splits<T>(args, here, whole);
#endif
}

template <class T, int kRows, int kColumns, int kScaleK>
int launch(const LinearArgs& args, const Plan& plan, Stream stream) {
  const auto kernel = args.weight.scales.kind == ScaleKind::block ? gemm_kernel<T, kRows, kColumns, kScaleK, false>
                                                                  : gemm_kernel<T, kRows, kColumns, kScaleK, true>;
  const int bytes = gemm_shared_bytes(kRows, kColumns, plan.stages);
  if (const int code = allow_shared_memory(kernel, bytes)) return code;
  const bool whole =
      args.n % 4 == 0 && is_aligned(args.y, 8) && (plan.splits == 1 || is_aligned(args.workspace, kAccessBytes));
  const dim3 grid(static_cast<unsigned>(plan.row_tiles * plan.column_tiles), static_cast<unsigned>(plan.splits));
  kernel<<<grid, kThreads, bytes, stream>>>(args, *args.weight.format, log2_of(args.weight.block_size / kScaleK),
                                            plan.stages, static_cast<int>(plan.split_size), whole);
  return cudaGetLastError();
}

template <class T>
int launch(const LinearArgs& args, const Plan& plan, Stream stream) {
  if (plan.scale_columns == 32)
    return plan.rows == 16 ? launch<T, 16, 128, 32>(args, plan, stream) : launch<T, 32, 128, 32>(args, plan, stream);
  if (plan.rows == 16) return launch<T, 16, 128, 64>(args, plan, stream);
  if (plan.rows == 64) return launch<T, 64, 256, 64>(args, plan, stream);
  return plan.columns == 256 ? launch<T, 32, 256, 64>(args, plan, stream) : launch<T, 32, 128, 64>(args, plan, stream);
}

}  // namespace

int linear_gemm(const LinearArgs& args, const Plan& plan, Stream stream) {
  if (!gemm_fits(args) || current_gpu().code_capability < 80) return cudaErrorNotSupported;
  return args.dtype == Dtype::f16 ? launch<Fp16>(args, plan, stream) : launch<Bf16>(args, plan, stream);
}

}  // namespace lowbit::cuda

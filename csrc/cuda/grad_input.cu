// linear_grad_input: grad_x = grad W (+ LoRA), from the bytes that the forward pass reads.
//
// The contraction runs over the rows of W. A fragment of the tensor core pairs rows n and n + 1 of one column, which
// are far apart in memory: a lane looks up both in fp32, multiplies each by its row's scale and packs them into one
// register. So a weight is rounded once, to what dequantize writes, bit for bit: 2.5 instructions a weight, and half of
// an 8-byte access to shared memory. A table of pairs of rows and their scales, all in 16 bits, would save 0.75 and
// half of the access, at three roundings a weight; scales multiplied into grad would cost more than that from 64 rows
// on, and take fp16 grad out of its range.
//
// W is the mma's A (its columns are the 16 rows of A), grad its B, so a lane ends with 8 consecutive columns of a row
// of grad_x. Blocks of threads write partial sums in fp32, one for each split of the contraction; a second kernel adds
// these up in order, adds LoRA's part and rounds.
#include <type_traits>

#include "grad_input.cuh"
#include "grad_input_fma.cuh"
#include "launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kFinishThreads = 256;

// A block of threads makes kRows x 128 of grad_x from 128 rows of W at a time: warp (i, j) takes columns 64 i and rows
// 32 j, the columns of a lane being the two codes of each byte of one word.
template <int kRows>
struct MmaTile {
  static constexpr int kColumnWarps = 2, kRowWarps = 4;
  static constexpr int kThreads = kColumnWarps * kRowWarps * kWarpSize;
  static constexpr int kColumns = 2 * kPackedRowBytes, kColumnsShift = 7;
  static constexpr int kSteps = 2;  // of 16 rows of W, by each warp
  static constexpr int kDepth = kRowWarps * kSteps * 16;
  static constexpr int kStages = 3;
  static constexpr int kPackedPieces = kDepth * kPackedRowBytes / kAccessBytes;
  static constexpr int kGradRowPieces = kDepth * 2 / kAccessBytes;
  static constexpr int kGradPieces = kRows * kGradRowPieces;
  // Scales of a tile: for each row of W one per unit of columns. With 32 rows four units, which are blocks of 32, would
  // take more than 128 registers.
  static constexpr int kUnits = kColumns / (kRows < 32 ? 32 : 64);
  static constexpr int kUnitStride = kDepth + 8;  // two units' scales of a quad's rows are in different banks

  struct Shared {
    PairTable table;
    uint4 packed[kStages][kPackedPieces];
    uint4 grad[kStages][kGradPieces];
    float scales[2][kUnits * kUnitStride];
  };
};

// Where the four sums of columns 4 quad, ... of a row are. A quad of lanes holds four rows: without the exclusive or
// they would meet in a bank.
[[maybe_unused]] __device__ __forceinline__ int sum_at(int row, int quad) {
  return row * 32 + (quad ^ (row / 2 % 2 + row / 4 % 2 * 4));
}

// Rows of W consist of whole blocks. unit_shift: log2 of how many columns of a tile, 32 to 128, have one scale.
template <class T, int kRows, bool kDoubleQuant>
__global__ void __launch_bounds__(MmaTile<kRows>::kThreads, 2)
    grad_input_mma_kernel(const __grid_constant__ GradInputProduct product, const __grid_constant__ Format format,
                          int unit_shift) {
#if __CUDA_ARCH__ >= 800  // earlier GPUs have neither the instructions nor bf16: the launcher does not come here
  using Tile = MmaTile<kRows>;
  constexpr int kRowTiles = kRows / 8;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, in_quad = lane % 4;
  const int column_warp = warp % Tile::kColumnWarps, row_warp = warp / Tile::kColumnWarps;
  const auto tile = product.tile_of(blockIdx.x, kRows, Tile::kColumns);
  const int depth = static_cast<int>(tile.end_row - tile.first_row);

  // Copies of the next tile of the contraction; what lies outside of grad and W becomes zeros. `first` is the tile's
  // first row, counted from that of the split; .._end is where the thread's pieces end, 0 for columns outside.
  const Position packed_at = packed_piece(thread);
  const uint8_t* packed_from =
      product.packed + ((tile.first_row + packed_at.row) * product.k + tile.column) / 2 + packed_at.column;
  const int packed_end = tile.column + 2 * packed_at.column < product.k ? depth - packed_at.row : 0;
  constexpr int kPackedStep = packed_piece(Tile::kThreads).row;  // rows from a thread's piece to its next
  const int grad_row = thread / Tile::kGradRowPieces;
  const int grad_column = swizzled_piece(grad_row, thread % Tile::kGradRowPieces) * kPerAccess<T>;
  const T* grad_from =
      static_cast<const T*>(product.grad) + (tile.row + grad_row) * product.n + tile.first_row + grad_column;
  constexpr int kGradStep = Tile::kThreads / Tile::kGradRowPieces;
  int grad_end[(kRows + kGradStep - 1) / kGradStep];
#pragma unroll
  for (int i = 0; i * kGradStep < kRows; ++i)
    grad_end[i] = tile.row + grad_row + i * kGradStep < product.m ? depth - grad_column : 0;
  const auto copy = [&](int first, int stage) {
    if (first < depth) {
#pragma unroll
      for (int i = 0; i * Tile::kThreads < Tile::kPackedPieces; ++i)
        ptx::copy_async_16(ptx::shared_address(&shared.packed[stage][i * Tile::kThreads + thread]),
                           packed_from + i * kPackedStep * product.k / 2,
                           first + i * kPackedStep < packed_end ? kAccessBytes : 0);
#pragma unroll
      for (int i = 0; i * kGradStep < kRows; ++i)
        if (kRows >= kGradStep || grad_row < kRows)
          ptx::copy_async_16(ptx::shared_address(&shared.grad[stage][i * Tile::kThreads + thread]),
                             grad_from + i * kGradStep * product.n, first < grad_end[i] ? kAccessBytes : 0);
      packed_from += Tile::kDepth * product.k / 2;
      grad_from += Tile::kDepth;
    }
    ptx::commit_copies();
  };

  // Scales of the next tile, in two steps: a thread takes that of one row and unit, and of a second row where there are
  // four units. Those outside of W are zero. (Block numbers have 32 bits: the launcher sees to it.)
  const DeferredScales<kDoubleQuant> scale_of(product);
  const int units_shift = Tile::kColumnsShift - unit_shift;
  const int scale_unit = thread & ((1 << units_shift) - 1), scale_row = thread >> units_shift;
  const int64_t scale_column = tile.column + (scale_unit << unit_shift);
  const auto row_blocks = static_cast<uint32_t>(product.k >> product.block_shift);
  auto block = static_cast<uint32_t>(((tile.first_row + scale_row) * product.k + scale_column) >> product.block_shift);
  constexpr int kSecond = Tile::kThreads / 4;
  // Which tiles, by their first row, have the thread's scales.
  const int scale_end = scale_row < Tile::kDepth && scale_column < product.k ? depth - scale_row : 0;
  const int second_end = Tile::kUnits == 4 && units_shift == 2 ? scale_end - kSecond : 0;
  typename DeferredScales<kDoubleQuant>::Loaded loaded[2];
  const auto load_scales = [&](int first) {
    if (first < scale_end) loaded[0] = scale_of.load(block);
    if (first < second_end) loaded[1] = scale_of.load(block + kSecond * row_blocks);
    block += Tile::kDepth * row_blocks;
  };
  const auto store_scales = [&](int first, int slot) {
    float* to = &shared.scales[slot][scale_unit * Tile::kUnitStride + scale_row];
    if (scale_row < Tile::kDepth) to[0] = first < scale_end ? scale_of.decode(loaded[0]) : 0.0f;
    if (Tile::kUnits == 4 && units_shift == 2) to[kSecond] = first < second_end ? scale_of.decode(loaded[1]) : 0.0f;
  };

  // sums[byte][row tile]: c[0], c[1] belong to the even column of the byte, c[2], c[3] to the odd one.
  float sums[4][kRowTiles][4] = {};
  const uint32_t lane_base = shared.table.lane_base(lane);
  const int warp_row = row_warp * Tile::kSteps * 16;
  const uint32_t words_at = packed_offset(warp_row + 2 * in_quad, column_warp * 32 + 4 * group);
  const int unit = (column_warp * 64 + 8 * group) >> unit_shift;
  const auto multiply = [&](int stage, int slot) {
    // b of row tiles 2i and 2i + 1, or of both steps of the only one: matrix q of ldmatrix is half q % 2 of the 16 rows
    // of W, for number q / 2 of the two.
    uint32_t b[Tile::kSteps * kRowTiles][2];
    const auto load_pair = [&](int pair) {
      const int step = (pair + lane / 16) / kRowTiles, row_tile = (pair + lane / 16) % kRowTiles;
      const int row = row_tile * 8 + lane % 8, piece = warp_row / 8 + step * 2 + lane / 8 % 2;
      uint32_t matrices[4];
      ptx::load_matrix_4(
          matrices, ptx::shared_address(&shared.grad[stage][row * Tile::kGradRowPieces + swizzled_piece(row, piece)]));
      b[pair][0] = matrices[0];
      b[pair][1] = matrices[1];
      b[pair + 1][0] = matrices[2];
      b[pair + 1][1] = matrices[3];
    };
    const uint32_t words_from = ptx::shared_address(shared.packed[stage]) + words_at;
    const uint32_t scales_from =
        ptx::shared_address(&shared.scales[slot][unit * Tile::kUnitStride + warp_row + 2 * in_quad]);
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
#pragma unroll
      for (int pair = step * kRowTiles; pair < (step + 1) * kRowTiles; ++pair)
        if (pair % 2 == 0) load_pair(pair);
      // Rows of the fragment: 2t, 2t + 1, 2t + 8, 2t + 9. (The offsets add up: they are different bits of the row.)
      const auto word_of = [&](int row) { return ptx::load_shared_4(words_from + packed_offset(16 * step + row, 0)); };
      const uint32_t words[4] = {word_of(0), word_of(1), word_of(8), word_of(9)};
      const float2 low = ptx::load_shared_8(scales_from + (16 * step) * sizeof(float));
      const float2 high = ptx::load_shared_8(scales_from + (16 * step + 8) * sizeof(float));
      const float scales[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        float even[4], odd[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 pair = PairTable::decode(words[r], byte, lane_base);
          even[r] = __fmul_rn(pair.x, scales[r]);
          odd[r] = __fmul_rn(pair.y, scales[r]);
        }
        const uint32_t a[4] = {narrow_pair<T>(even[0], even[1]), narrow_pair<T>(odd[0], odd[1]),
                               narrow_pair<T>(even[2], even[3]), narrow_pair<T>(odd[2], odd[3])};
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
          ptx::mma<T>(sums[byte][row_tile], a, b[step * kRowTiles + row_tile]);
      }
    }
  };

#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy(stage * Tile::kDepth, stage);
  shared.table.fill(format);
  load_scales(0);
  store_scales(0, 0);
  for (int first = 0, stage = 0, slot = 0; first < depth; first += Tile::kDepth, slot ^= 1) {
    ptx::wait_copies<Tile::kStages - 2>();
    __syncthreads();
    const int previous = stage == 0 ? Tile::kStages - 1 : stage - 1;  // which everyone has left
    copy(first + (Tile::kStages - 1) * Tile::kDepth, previous);
    load_scales(first + Tile::kDepth);
    multiply(stage, slot);
    store_scales(first + Tile::kDepth, slot ^ 1);
    stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
  }
  ptx::wait_copies<0>();

  // The row warps add up one after the other, in shared memory, so that the sum is always the same. (Where a thread
  // stands is worked out anew: what is only needed here would take registers from the loop.)
  __syncthreads();
  float4* sums_of_warps = reinterpret_cast<float4*>(shared.packed);
  static_assert(sizeof(shared.packed) >= kRows * Tile::kColumns * sizeof(float));
  const int again = ptx::thread_index();
  const auto to_tile = product.tile_of(ptx::block_index(), kRows, Tile::kColumns);
  for (int adding = 0; adding < Tile::kRowWarps; ++adding) {
    if (again / kWarpSize / Tile::kColumnWarps == adding) {
      const int lane_columns = again / kWarpSize % Tile::kColumnWarps * 64 + again % kWarpSize / 4 * 8;
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int row = i / 2 * 8 + again % 4 * 2 + i % 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto &even = sums[2 * half][i / 2], &odd = sums[2 * half + 1][i / 2];
          float4& to = sums_of_warps[sum_at(row, lane_columns / 4 + half)];
          float4 sum{even[i % 2], even[i % 2 + 2], odd[i % 2], odd[i % 2 + 2]};
          if (adding) {
            const float4 others = to;
            sum = {others.x + sum.x, others.y + sum.y, others.z + sum.z, others.w + sum.w};
          }
          to = sum;
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = again; i < kRows * Tile::kColumns / 4; i += Tile::kThreads) {
    const int row = i / (Tile::kColumns / 4), quad = i % (Tile::kColumns / 4);
    if (to_tile.row + row < product.m && to_tile.column + 4 * quad < product.k)
      *reinterpret_cast<float4*>(&to_tile.out[row * product.k + 4 * quad]) = sums_of_warps[sum_at(row, quad)];
  }
#endif
}

// grad_x = the sum of the splits + grad_t lora_a.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    grad_input_finish_kernel(const float* partial, int64_t splits, int64_t m, int64_t k, const float* grad_t,
                             const float* lora_a, int64_t rank, T* grad_x) {
  const int64_t column_tiles = (k + kFinishThreads - 1) / kFinishThreads;
  for (int64_t tile = blockIdx.x; tile < m * column_tiles; tile += gridDim.x) {
    const int64_t row = tile / column_tiles, column = tile % column_tiles * kFinishThreads + threadIdx.x;
    if (column >= k) continue;
    float sum = 0.0f;
    for (int64_t split = 0; split < splits; ++split) sum += partial[(split * m + row) * k + column];
    for (int64_t r = 0; r < rank; ++r) sum = fmaf(grad_t[row * rank + r], lora_a[r * k + column], sum);
    narrow(sum, grad_x + row * k + column);
  }
}

// --- launching

enum class Path { mma, fma, element };

struct Plan {
  Path path;
  int rows, columns, threads;  // of a tile of grad_x
  int64_t row_tiles, column_tiles, splits, split_rows;

  int64_t blocks() const { return row_tiles * column_tiles * splits; }
};

// Which kernel serves a product, and how its contraction is split: into no more parts than fill the GPU, since each
// part writes and reads a tile of fp32.
Plan plan_of(const LinearGradInputArgs& args) {
  constexpr int kBlocksPerProcessor = 2;
  constexpr int64_t kMost = 1 << 30;
  const QuantizedWeight& weight = args.weight;
  // 16-byte accesses of W, whose rows the kernels count in 32 bits; for the tensor cores also of grad, whole blocks in
  // each row, and blocks counted in 32 bits.
  const bool fits_fma =
      weight.format && args.k % (2 * kAccessBytes) == 0 && is_aligned(weight.packed, kAccessBytes) && args.n < kMost;
  const bool fits_mma = fits_fma && args.dtype != Dtype::f32 && is_aligned(args.grad, kAccessBytes) &&
                        args.n % (kAccessBytes / 2) == 0 && args.k % weight.block_size == 0 &&
                        weight.numel / weight.block_size < kMost && code_capability() >= 80;
  Plan plan{};
  int64_t depth = 64;  // rows of W that a block of threads should have at least, in multiples of which it is split
  if (fits_mma) {
    plan = {Path::mma,
            args.m <= 8                              ? 8
            : args.m <= 16 || weight.block_size < 64 ? 16
                                                     : 32,
            MmaTile<8>::kColumns, MmaTile<8>::kThreads};
    depth = MmaTile<8>::kDepth;
  } else if (fits_fma) {
    plan = {Path::fma, FmaTile::kRows, FmaTile::kColumns, FmaTile::kThreads};
  } else {
    plan = {Path::element, ElementTile::kRows, ElementTile::kColumns, ElementTile::kThreads};
  }
  plan.row_tiles = ceil_div(args.m, plan.rows);
  plan.column_tiles = ceil_div(args.k, plan.columns);
  if (args.n == 0) return plan;
  const int64_t parts = ceil_div(args.n, depth);
  const int64_t wanted = processor_count() * kBlocksPerProcessor / (plan.row_tiles * plan.column_tiles);
  plan.split_rows = ceil_div(parts, std::clamp<int64_t>(wanted, 1, parts)) * depth;
  plan.splits = ceil_div(args.n, plan.split_rows);
  return plan;
}

template <class T, int kRows>
int launch_mma(const Plan& plan, const GradInputProduct& product, const LinearGradInputArgs& args, Stream stream) {
  constexpr int kSharedBytes = sizeof(typename MmaTile<kRows>::Shared);
  static_assert(kSharedBytes <= 99 * 1024);  // what every GPU from sm_80 on has
  const auto kernel =
      args.weight.absmax ? grad_input_mma_kernel<T, kRows, false> : grad_input_mma_kernel<T, kRows, true>;
  if (const int error = allow_shared_memory(kernel, kSharedBytes)) return error;
  const int unit_shift = std::min(product.block_shift, MmaTile<kRows>::kColumnsShift);
  kernel<<<static_cast<unsigned>(plan.blocks()), plan.threads, kSharedBytes, stream>>>(product, *args.weight.format,
                                                                                       unit_shift);
  return cudaGetLastError();
}

template <class T>
int launch_product(const Plan& plan, const GradInputProduct& product, const LinearGradInputArgs& args, Stream stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks());
  const Format& format = args.weight.format ? *args.weight.format : kNf4;  // int8 has none
  if constexpr (sizeof(T) == 2) {
    if (plan.path == Path::mma) {
      if (plan.rows == 8) return launch_mma<T, 8>(plan, product, args, stream);
      if (plan.rows == 16) return launch_mma<T, 16>(plan, product, args, stream);
      return launch_mma<T, 32>(plan, product, args, stream);
    }
  }
  if (plan.path == Path::fma) {
    const auto kernel = args.weight.absmax ? grad_input_fma_kernel<T, false> : grad_input_fma_kernel<T, true>;
    kernel<<<blocks, plan.threads, 0, stream>>>(product, format);
  } else {
    const auto kernel = !args.weight.format  ? grad_input_element_kernel<T, Int8Weight>
                        : args.weight.absmax ? grad_input_element_kernel<T, FourBitWeight<false>>
                                             : grad_input_element_kernel<T, FourBitWeight<true>>;
    kernel<<<blocks, plan.threads, 0, stream>>>(product, format);
  }
  return cudaGetLastError();
}

template <class T>
int launch(const LinearGradInputArgs& args, Stream stream) {
  const Plan plan = plan_of(args);
  if (plan.blocks() > INT32_MAX) return cudaErrorInvalidValue;
  if (plan.splits > 0) {
    const QuantizedWeight& weight = args.weight;
    const GradInputProduct product{args.grad,
                                   weight.packed,
                                   weight.absmax,
                                   weight.scale_codes,
                                   weight.group_scales,
                                   weight.offset,
                                   args.m,
                                   args.n,
                                   args.k,
                                   plan.split_rows,
                                   static_cast<unsigned>(plan.row_tiles),
                                   static_cast<unsigned>(plan.column_tiles),
                                   args.workspace,
                                   weight.format ? log2_of(weight.block_size) : 0};
    const int error = launch_product<T>(plan, product, args, stream);
    if (error) return error;
  }
  const int64_t tiles = args.m * ceil_div(args.k, kFinishThreads);
  grad_input_finish_kernel<<<grid_for(tiles, 1, 8), kFinishThreads, 0, stream>>>(
      args.workspace, plan.splits, args.m, args.k, args.grad_t, args.lora_a, args.grad_t ? args.rank : 0,
      static_cast<T*>(args.grad_x));
  return cudaGetLastError();
}

}  // namespace

int64_t linear_grad_input_workspace(const LinearGradInputArgs& args) {
  if (args.m == 0 || args.k == 0) return 0;
  return plan_of(args).splits * args.m * args.k;
}

bool linear_grad_input_decodes_first(const LinearGradInputArgs& args) {
  if (args.m == 0 || args.n == 0 || args.k == 0) return false;
  // Cycles of a multiprocessor per weight. An H100 moves 14 bytes in one. To decode to 16 bits and read that again
  // moves 4.5 bytes: 0.32; to fp32 8.5 bytes, 0.61, and its product of m rows takes m / 128 more. The kernels take
  //   mma      0.058 (shared memory) per 32 rows: 5.5 tiles; 6, since cuBLAS does not reach all of that speed,
  //   fma      4.7 instructions of 128 in a cycle, 0.037, per 2 rows: 8 tiles in 16 bits, 24 in fp32,
  //   element  about 40 instructions, 0.31, per 8 rows: 1 tile.
  // Other GPUs move fewer bytes in a cycle, so that decoding first costs more, but for the B200 (29 bytes: 3 tiles of
  // mma) and the H200, which nothing tells from an H100 (20 bytes: would be 4).
  const Plan plan = plan_of(args);
  int64_t tiles = 1;
  if (plan.path == Path::mma) tiles = device_attribute(cudaDevAttrComputeCapabilityMajor) == 10 ? 3 : 6;
  if (plan.path == Path::fma) tiles = args.dtype == Dtype::f32 ? 24 : 8;
  return args.m > tiles * (plan.path == Path::mma ? 32 : plan.rows);
}

int linear_grad_input(const LinearGradInputArgs& args, Stream stream) {
  if (args.m == 0 || args.k == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

}  // namespace lowbit::cuda

// linear_grad_input: grad_x = grad W (+ LoRA), from the bytes that the forward pass reads.
//
// The contraction runs over the rows of W. A fragment of the tensor core pairs rows n and n + 1 of one column, which
// are far apart in memory: a lane looks up both in fp32, multiplies each by its row's scale and packs them into one
// register. So a weight is rounded once, to what dequantize writes, bit for bit. This takes 2.5 instructions per weight
// and half of an 8-byte access to shared memory. A table of pairs of rows and their scales, all in 16 bits, would save
// 0.75 and half of the access, but round each weight three times. Scales multiplied into grad would cost more than that
// from 64 rows on, and take fp16 grad out of its range.
//
// W is the mma's A (its columns are the 16 rows of A), grad its B, so a lane ends with 8 consecutive columns of a row
// of grad_x.
//
// LoRA: the rows of lora_a are more rows of W, grad_t's columns more of grad, both in fp32. Each is split into two
// bf16, of which three products make the fp32 one to 3 * 2^-16, in the same sums.
#include "device/launch.h"
#include "grad_input.cuh"
#include "grad_input_fma.cuh"

namespace lowbit::cuda {
namespace {

template <int kRows>
struct MmaShared {
  using Tile = MmaTile<kRows>;
  PairTable table;
  uint4 packed[Tile::kStages][Tile::kPackedPieces];
  uint4 grad[Tile::kStages][Tile::kGradPieces];
  float scales[Tile::kThreads / kWarpSize][Tile::kUnits * Tile::kUnitStride];
};

// Where the four sums of columns 4 quad, ... of a row are. A quad of lanes holds four rows: without the exclusive or
// they would meet in a bank.
[[maybe_unused]] __device__ __forceinline__ int sum_at(int row, int quad) {
  return row * 32 + (quad ^ (row / 2 % 2 + row / 4 % 2 * 4));
}

// Lets what add_lora reads of lora_a come into L2: a thread takes 8 columns of a row.
template <class Tile>
__device__ __forceinline__ void prefetch_lora(const GradInputProduct& product, const GradInputProduct::Tile& tile) {
  constexpr int kRowThreads = Tile::kColumns / 8;
  static_assert(Tile::kThreads == 16 * kRowThreads);
  const int thread = threadIdx.x;
  const int64_t column = tile.column + thread % kRowThreads * 8;
  for (int64_t r = 16 * tile.split + thread / kRowThreads; r < product.rank; r += 16 * product.splits)
    if (column < product.k) ptx::prefetch_l2(product.lora_a + r * product.k + column);
}

// Adds grad_t lora_a to a tile's sums: sixteens of the rank, dealt out to the splits. A warp takes 16 of the columns,
// so that all have a share of any rank and none needs the registers of the tile's sums.
template <class Tile, int kRows>
__device__ __forceinline__ void add_lora(const GradInputProduct& product, const GradInputProduct::Tile& tile,
                                         int thread, float4* sums) {
  constexpr int kRowTiles = kRows / 8;
  static_assert(Tile::kColumns == Tile::kThreads / kWarpSize * 16);
  const int lane = thread % kWarpSize, first_column = thread / kWarpSize * 16, rank = static_cast<int>(product.rank);
  const auto a_element = [&](int column, int r) {
    const int64_t at = tile.column + first_column + column;
    return r < rank && at < product.k ? product.lora_a[r * product.k + at] : 0.0f;
  };
  const auto b_element = [&](int r, int row) {
    return r < rank ? product.grad_t[min(tile.row + row, product.m - 1) * rank + r] : 0.0f;
  };
  float added[kRowTiles][4] = {};
#pragma unroll 1
  for (int r0 = 16 * tile.split; r0 < rank; r0 += 16 * product.splits) {
    uint32_t a_high[4], a_low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Position at = mma_a(lane, 2 * i);
      const SplitPair pair(a_element(at.row, r0 + at.column), a_element(at.row, r0 + at.column + 1));
      a_high[i] = pair.high, a_low[i] = pair.low;
    }
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Position at = mma_b(lane, 2 * i);
        const int row = row_tile * 8 + at.column;
        const SplitPair pair(b_element(r0 + at.row, row), b_element(r0 + at.row + 1, row));
        b_high[i] = pair.high, b_low[i] = pair.low;
      }
      ptx::mma<Bf16>(added[row_tile], a_low, b_high);
      ptx::mma<Bf16>(added[row_tile], a_high, b_low);
      ptx::mma<Bf16>(added[row_tile], a_high, b_high);
    }
  }
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Position at = mma_c(lane, i);
      const int column = first_column + at.row;
      reinterpret_cast<float*>(&sums[sum_at(row_tile * 8 + at.column, column / 4)])[column % 4] += added[row_tile][i];
    }
}

// Rows of W consist of whole blocks. unit_shift: log2 of how many of a warp's columns, 32 or 64, have one scale.
template <class T, int kRows, bool kDoubleQuant>
__global__ void __launch_bounds__(MmaTile<kRows>::kThreads, 2)
    grad_input_mma_kernel(const __grid_constant__ GradInputProduct product, const __grid_constant__ Format format,
                          int unit_shift) {
#if __CUDA_ARCH__ >= 800  // earlier GPUs have neither the instructions nor bf16: the launcher does not come here
  using Tile = MmaTile<kRows>;
  constexpr int kRowTiles = kRows / 8;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<MmaShared<kRows>*>(shared_memory);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int group = lane / 4, in_quad = lane % 4;
  const int column_warp = warp % Tile::kColumnWarps, row_warp = warp / Tile::kColumnWarps;
  const auto tile = product.tile_of(blockIdx.x, kRows, Tile::kColumns);
  const int depth = static_cast<int>(tile.end_row - tile.first_row);

  // Copies of the next tile of the contraction; what lies outside of grad and W becomes zeros. `first` is the tile's
  // first row, counted from that of the split; .._end is where the thread's pieces end, 0 for columns outside.
  const Position packed_at = packed_piece(thread);
  const uint8_t* packed_from =
      product.weight.packed + ((tile.first_row + packed_at.row) * product.k + tile.column) / 2 + packed_at.column;
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

  // Scales of the next tile, in two steps: a lane takes those of one of its warp's rows. Those outside of W are zero.
  // (Block numbers have 32 bits: the launcher sees to it.)
  const ScaleReader<kDoubleQuant> scale_of(product.weight.scales);
  const int warp_row = row_warp * Tile::kWarpRows, scale_row = warp_row + lane;
  const int64_t warp_column = tile.column + column_warp * Tile::kWarpColumns;
  const auto row_blocks = static_cast<uint32_t>(product.k >> product.block_shift);
  auto block = static_cast<uint32_t>(((tile.first_row + scale_row) * product.k + warp_column) >> product.block_shift);
  // Which tiles, by their first row, have the lane's scales.
  const int scale_end = warp_column < product.k ? depth - scale_row : 0;
  const int second_end = Tile::kUnits == 2 && unit_shift == 5 && warp_column + 32 < product.k ? scale_end : 0;
  typename ScaleReader<kDoubleQuant>::Loaded loaded[2];
  const auto load_scales = [&](int first) {
    if (first < scale_end) loaded[0] = scale_of.load(block);
    if (first < second_end) loaded[1] = scale_of.load(block + 1);
    block += Tile::kDepth * row_blocks;
  };
  const auto store_scales = [&](int first) {
    float* to = &shared.scales[warp][lane];
    to[0] = first < scale_end ? scale_of.decode(loaded[0]) : 0.0f;
    if (Tile::kUnits == 2) to[Tile::kUnitStride] = first < second_end ? scale_of.decode(loaded[1]) : 0.0f;
  };

  // sums[byte][row tile]: c[0], c[1] belong to the even column of the byte, c[2], c[3] to the odd one.
  float sums[4][kRowTiles][4] = {};
  const uint32_t lane_base = shared.table.lane_base(lane);
  const uint32_t words_at = packed_offset(warp_row + 2 * in_quad, column_warp * (Tile::kWarpColumns / 2) + 4 * group);
  const uint32_t scales_from =
      ptx::shared_address(&shared.scales[warp][(8 * group >> unit_shift) * Tile::kUnitStride + 2 * in_quad]);
  const auto multiply = [&](int stage) {
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
  prefetch_lora<Tile>(product, tile);
  shared.table.fill(format);
  load_scales(0);
  store_scales(0);
  for (int first = 0, stage = 0; first < depth; first += Tile::kDepth) {
    ptx::wait_copies<Tile::kStages - 2>();
    __syncthreads();
    const int previous = stage == 0 ? Tile::kStages - 1 : stage - 1;  // which everyone has left
    copy(first + (Tile::kStages - 1) * Tile::kDepth, previous);
    load_scales(first + Tile::kDepth);
    multiply(stage);
    __syncwarp();  // all of its lanes have read this tile's scales
    store_scales(first + Tile::kDepth);
    stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
  }
  ptx::wait_copies<0>();

  // The row warps add up one after the other, in shared memory, so that the sum is always the same. (The thread's place
  // is computed again: what is only needed here would take registers from the loop.)
  __syncthreads();
  const int again = ptx::read_thread_index();
  const auto to_tile = product.tile_of(ptx::read_block_index(), kRows, Tile::kColumns);
  float4* sums_of_warps = reinterpret_cast<float4*>(shared.packed);
  static_assert(sizeof(shared.packed) >= kRows * Tile::kColumns * sizeof(float));
  for (int adding = 0; adding < Tile::kRowWarps; ++adding) {
    if (again / kWarpSize / Tile::kColumnWarps == adding) {
      const int lane_columns = again / kWarpSize % Tile::kColumnWarps * Tile::kWarpColumns + again % kWarpSize / 4 * 8;
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
  if (16 * to_tile.split < product.rank) {
    add_lora<Tile, kRows>(product, to_tile, again, sums_of_warps);
    __syncthreads();
  }
  store_tile<T, kRows, Tile::kColumns, 4>(product, to_tile, [&](int row, int column, float (&four)[4]) {
    const float4 v = sums_of_warps[sum_at(row, column / 4)];
    four[0] = v.x, four[1] = v.y, four[2] = v.z, four[3] = v.w;
  });
#endif
}

// --- launching

template <class T, int kRows>
int launch_mma(const Plan& plan, const GradInputProduct& product, const Format& format, Stream stream) {
  constexpr int kSharedBytes = MmaTile<kRows>::kSharedBytes;
  static_assert(kSharedBytes == sizeof(MmaShared<kRows>));
  static_assert(kSharedBytes <= 99 * 1024);  // what every GPU from sm_80 on has
  const auto kernel = product.weight.scales.kind == ScaleKind::block ? grad_input_mma_kernel<T, kRows, false>
                                                                     : grad_input_mma_kernel<T, kRows, true>;
  if (const int error = allow_shared_memory(kernel, kSharedBytes)) return error;
  const int unit_shift = std::min(product.block_shift, 6);
  kernel<<<static_cast<unsigned>(plan.blocks()), MmaTile<kRows>::kThreads, kSharedBytes, stream>>>(product, format,
                                                                                                   unit_shift);
  return cudaGetLastError();
}

template <class T>
int launch_product(const Plan& plan, const GradInputProduct& product, const Format& format, Stream stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks());
  if constexpr (sizeof(T) == 2) {
    if (plan.path == Path::grad_input_mma) {
      if (plan.rows == 8) return launch_mma<T, 8>(plan, product, format, stream);
      if (plan.rows == 16) return launch_mma<T, 16>(plan, product, format, stream);
      return launch_mma<T, 32>(plan, product, format, stream);
    }
  }
  if (plan.path == Path::grad_input_fma) {
    const auto kernel = product.weight.scales.kind == ScaleKind::block ? grad_input_fma_kernel<T, false>
                                                                       : grad_input_fma_kernel<T, true>;
    kernel<<<blocks, FmaTile::kThreads, 0, stream>>>(product, format);
    return cudaGetLastError();
  }
  return for_scale_kind(product.weight, [&](auto kind) {
    grad_input_element_kernel<T, kind.value><<<blocks, ElementTile::kThreads, 0, stream>>>(product, format);
    return cudaGetLastError();
  });
}

template <class T>
int launch(const LinearGradInputArgs& args, const Plan& plan, Stream stream) {
  if (plan.blocks() > INT32_MAX) return cudaErrorInvalidValue;
  const GradInputProduct product{args.grad,
                                 args.weight,
                                 args.grad_t,
                                 args.lora_a,
                                 args.m,
                                 args.n,
                                 args.k,
                                 args.grad_t ? args.rank : 0,
                                 args.grad_x,
                                 args.workspace,
                                 args.counters,
                                 plan.split_size,
                                 static_cast<unsigned>(plan.splits),
                                 static_cast<unsigned>(plan.row_tiles),
                                 static_cast<unsigned>(plan.column_tiles),
                                 log2_of(args.weight.block_size),
                                 is_aligned(args.grad_x, 8)};
  return launch_product<T>(plan, product, *args.weight.format, stream);
}

}  // namespace

int linear_grad_input(const LinearGradInputArgs& args, const Plan& plan, Stream stream) {
  if (args.m == 0 || args.k == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, plan, stream); });
}

}  // namespace lowbit::cuda

// quantize: absmax scales and 4-bit codes of a float weight; quantize_scales: the scales in 8 bits.
//
// A warp takes one unit at a time: a tile, or a block that is longer than one. Each lane's 16-byte loads stay in
// registers from the absmax to the codes (a longer block is read again). The rest and unaligned memory go block by
// block, element by element.
#include "device/dynamic_map.cuh"
#include "device/encode.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerProcessor = 8;

__device__ const BoundaryTree device_scale_boundaries = make_boundary_tree(kScaleBoundaries);

__device__ __forceinline__ float inverse_of(float absmax) {
  return __frcp_rn(absmax < kTinyAbsmax ? kTinyAbsmax : absmax);  // NaN stays
}

// The largest magnitude of the block of each of a lane's accesses to a tile, for blocks of at most a tile.
template <class T, int kAccesses>
__device__ __forceinline__ void reduce_blocks(Magnitude<T> (&largest)[kAccesses], int block_size) {
  const int pieces = block_size / kPerAccess<T>;  // of a block
#pragma unroll
  for (int step = 1; step < kAccesses; step *= 2) {
    if (step * kWarpSize >= pieces) break;
#pragma unroll
    for (int access = 0; access < kAccesses; ++access)
      if ((access & step) == 0) {
        const uint32_t bits = max(largest[access].bits, largest[access + step].bits);
        largest[access].bits = largest[access + step].bits = bits;
      }
  }
#pragma unroll
  for (auto& magnitude : largest) magnitude.reduce(min(pieces, kWarpSize));
}

// A warp quantizes one block, from and to any address. The short last block divides by absmax, where full ones multiply
// by its reciprocal (the format says so).
template <class T>
__device__ void quantize_block(const T* values, int count, bool is_short, uint8_t zero_code, uint32_t lane_base,
                               uint8_t* packed, float* absmax) {
  const int lane = threadIdx.x % kWarpSize;
  Magnitude<T> largest;
  for (int i = lane; i < count; i += kWarpSize) largest.take(values[i]);
  largest.reduce(kWarpSize);
  const float value = largest.value();
  const float divisor = is_short && value < kTinyAbsmax ? kTinyAbsmax : value;
  if (lane == 0) *absmax = divisor;
  const float inverse = inverse_of(value);
  const auto scaled = [&](float x) { return is_short ? __fdiv_rn(x, divisor) : __fmul_rn(x, inverse); };
  for (int i = 2 * lane; i < count; i += 2 * kWarpSize)
    packed[i / 2] = encode_pair(values + i, i + 1 < count, zero_code, scaled, lane_base);
}

// block_shift: log2 of the block size. units: how many of the first units 16-byte accesses can serve.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)  // 80 registers; left alone, ptxas takes 64 on some GPUs and spills
    quantize_kernel(const T* weight, int64_t numel, const __grid_constant__ Format format, int block_shift,
                    int64_t units, uint8_t* packed, float* absmax) {
  using Tile = PackedTile<T>;
  __shared__ CodeTree tree;
  __shared__ uint4 staged[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first_warp = int64_t{blockIdx.x} * kWarps + warp, warps = int64_t{gridDim.x} * kWarps;
  const Tile tile{staged[warp]};

  tree.fill_with_codes(format);
  __syncthreads();
  const uint32_t lane_base = tree.lane_base(lane);
  const int block_size = 1 << block_shift;
  const int unit_size = max(block_size, Tile::kElements), unit_tiles = unit_size / Tile::kElements;
  for (int64_t unit = first_warp; unit < units; unit += warps) {
    const T* values = weight + unit * unit_size;
    uint4 raw[Tile::kAccesses];
    Magnitude<T> largest[Tile::kAccesses];
    const auto load = [&](int t) {
      const T* from = values + t * Tile::kElements + lane * Tile::kCount;
#pragma unroll
      for (int access = 0; access < Tile::kAccesses; ++access)
        raw[access] = ptx::load_global_16(from + piece_of(0, access) * Tile::kCount);
    };
    for (int t = 0; t < unit_tiles; ++t) {
      load(t);
#pragma unroll
      for (int access = 0; access < Tile::kAccesses; ++access) largest[access].take(raw[access]);
    }
    reduce_blocks<T>(largest, min(block_size, Tile::kElements));
    float inverse[Tile::kAccesses];
#pragma unroll
    for (int access = 0; access < Tile::kAccesses; ++access) {
      const float value = largest[access].value();
      const int64_t element = unit * unit_size + piece_of(lane, access) * Tile::kCount;
      if ((element & (block_size - 1)) == 0) absmax[element >> block_shift] = value;
      inverse[access] = inverse_of(value);
    }
    for (int t = 0; t < unit_tiles; ++t) {
      if (unit_tiles > 1) load(t);
#pragma unroll
      for (int access = 0; access < Tile::kAccesses; ++access)
        tile.put(lane, access, raw[access], inverse[access], lane_base);
      tile.store(lane, packed + unit * unit_size / 2 + t * kTileBytes);
    }
  }

  for (int64_t block = (units * unit_size >> block_shift) + first_warp; block << block_shift < numel; block += warps) {
    const int64_t first = block << block_shift;
    const int count = static_cast<int>(min(int64_t{block_size}, numel - first));
    quantize_block(weight + first, count, count < block_size, format.zero_code, lane_base, packed + first / 2,
                   absmax + block);
  }
}

template <class T>
int launch(const QuantizeArgs& args, Stream stream) {
  const int64_t unit_size = std::max<int64_t>(args.block_size, PackedTile<T>::kElements);
  const bool aligned = is_aligned(args.weight, kAccessBytes) && is_aligned(args.packed, kAccessBytes);
  const unsigned blocks = grid_for(ceil_div(args.numel, PackedTile<T>::kElements), kWarps, kBlocksPerProcessor);
  quantize_kernel<T><<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(args.weight), args.numel, *args.format,
                                                      log2_of(args.block_size), aligned ? args.numel / unit_size : 0,
                                                      args.packed, args.absmax);
  return cudaGetLastError();
}

// A group per block of threads, a scale per thread.
__global__ void __launch_bounds__(kGroupSize)
    quantize_scales_kernel(const float* absmax, const float* offset, int64_t blocks, uint8_t* codes,
                           float* group_scales) {
  constexpr int kGroupWarps = static_cast<int>(kGroupSize) / kWarpSize;
  __shared__ uint32_t largest_of[kGroupWarps];
  __shared__ BoundaryTree boundaries;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t block = int64_t{blockIdx.x} * kGroupSize + threadIdx.x;

  boundaries.fill(device_scale_boundaries);
  const float value = block < blocks ? __fsub_rn(absmax[block], *offset) : 0.0f;
  Magnitude<float> largest;
  largest.take(value);
  largest.reduce(kWarpSize);
  if (lane == 0) largest_of[warp] = largest.bits;
  __syncthreads();
#pragma unroll
  for (const uint32_t bits : largest_of) largest.bits = max(largest.bits, bits);
  const float group_scale = largest.value();
  if (threadIdx.x == 0) group_scales[blockIdx.x] = group_scale;
  if (block >= blocks) return;
  const float scaled = __fmul_rn(value, __frcp_rn(group_scale));
  const uint32_t code = __brev(BoundaryTree::find_reversed(scaled, ptx::shared_address(boundaries.nodes))) >> 24;
  codes[block] = group_scale == 0.0f ? 0 : static_cast<uint8_t>(code);
}

}  // namespace

int quantize(const QuantizeArgs& args, Stream stream) {
  if (args.format->has_row_scales) return quantize_int8(args, stream);
  if (args.numel == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

int quantize_scales(const QuantizeScalesArgs& args, Stream stream) {
  if (args.blocks == 0) return cudaSuccess;
  const auto groups = static_cast<unsigned>(ceil_div(args.blocks, kGroupSize));
  quantize_scales_kernel<<<groups, kGroupSize, 0, stream>>>(args.absmax, args.offset, args.blocks, args.codes,
                                                            args.group_scales);
  return cudaGetLastError();
}

}  // namespace lowbit::cuda

// search_scales: per block the signed scale that minimises the squared error; encode: codes for given scales.
//
// Half a warp searches one block: lane l adds up the errors of elements l, l + 16, ... for all factors at once, and the
// lanes' sums are added in the format's order, so that every backend chooses the same scale, bit for bit.
#include "device/encode.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerProcessor = 8;
constexpr int kPartialSums = 16;

// Where to read the importance of an element's column.
struct Importance {
  const float* values;  // or null
  int64_t columns;

  __device__ __forceinline__ float operator()(int64_t element) const {
    return values[static_cast<uint64_t>(element) % static_cast<uint64_t>(columns)];
  }
};

// At least 2 blocks on a processor: 128 registers, of which the 36 sums leave room for. (64 would spill.)
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    search_scales_kernel(const T* weight, int64_t numel, const __grid_constant__ Format format, int block_size,
                         const float* importance_values, int64_t columns, float* scales) {
  constexpr ScaleFactors kFactors = kScaleFactors;  // a copy that device code can use
  __shared__ CodeTree tree;
  const Importance importance{importance_values, columns};
  const int lane = threadIdx.x % kPartialSums;

  tree.fill(format, [&](uint8_t code) { return __float_as_uint(format.codebook[code]); });
  __syncthreads();
  const uint32_t lane_base = tree.lane_base(threadIdx.x % kWarpSize);
  const int64_t stride = int64_t{gridDim.x} * (kThreads / kPartialSums);
  const int64_t half_warp = int64_t{blockIdx.x} * (kThreads / kPartialSums) + threadIdx.x / kPartialSums;
  // Both halves of a warp take equally many rounds, since they shuffle together. A half past the last block has no
  // elements.
  for (int64_t block = half_warp; (block & ~int64_t{1}) * block_size < numel; block += stride) {
    const int64_t first = block * block_size;
    const int count = static_cast<int>(max(int64_t{0}, min(int64_t{block_size}, numel - first)));
    Magnitude<T> largest;
    for (int i = lane; i < count; i += kPartialSums) largest.take(weight[first + i]);
    largest.reduce(kPartialSums);
    const float absmax = largest.value();
    // Outside of this range a factor or an inverse would leave fp32; NaN and inf stay, for the caller to find.
    const bool searched = absmax >= kTinyAbsmax && absmax <= kLargestSearched;

    uint32_t weighted = 0;
    if (importance.values)
      for (int i = lane; i < count; i += kPartialSums) weighted |= importance(first + i) > 0;
#pragma unroll
    for (int mask = 1; mask < kPartialSums; mask *= 2) weighted |= ptx::shuffle_xor(weighted, mask);

    float sums[kScaleFactorCount] = {};
    const float inverse = __frcp_rn(absmax);
    for (int i = lane; searched && i < count; i += kPartialSums) {
      const float value = __fmul_rn(widen(weight[first + i]), inverse);
      const float element_weight = weighted ? importance(first + i) : 1.0f;
#pragma unroll
      for (int f = 0; f < kScaleFactorCount; ++f) {
        const float nearest = __uint_as_float(CodeTree::find(__fmul_rn(value, 1.0f / kFactors.values[f]), lane_base));
        const float error = __fsub_rn(value, __fmul_rn(nearest, kFactors.values[f]));
        sums[f] = __fadd_rn(sums[f], __fmul_rn(__fmul_rn(error, error), element_weight));
      }
    }
    float best = 1.0f, least = INFINITY;
#pragma unroll
    for (int f = 0; f < kScaleFactorCount; ++f) {
      float sum = sums[f];
#pragma unroll
      for (int mask = kPartialSums / 2; mask > 0; mask /= 2)
        sum = __fadd_rn(sum, __uint_as_float(ptx::shuffle_xor(__float_as_uint(sum), mask)));
      if (sum < least) {
        least = sum;
        best = kFactors.values[f];
      }
    }
    if (lane == 0 && count > 0) scales[block] = searched ? __fmul_rn(absmax, best) : absmax;
  }
}

// block_shift: log2 of the block size. tiles: how many of the first whole tiles 16-byte accesses can serve.
template <class T>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(const T* weight, int64_t numel, const __grid_constant__ Format format, int block_shift, int64_t tiles,
                  const float* scales, uint8_t* packed) {
  using Tile = PackedTile<T>;
  __shared__ CodeTree tree;
  __shared__ uint4 staged[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Tile packed_tile{staged[warp]};

  tree.fill_with_codes(format);
  __syncthreads();
  const uint32_t lane_base = tree.lane_base(lane);
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t tile = int64_t{blockIdx.x} * kWarps + warp; tile < tiles; tile += stride) {
#pragma unroll
    for (int access = 0; access < Tile::kAccesses; ++access) {
      const int64_t element = tile * Tile::kElements + piece_of(lane, access) * Tile::kCount;
      const uint4 raw = ptx::load_global_16(weight + element);
      packed_tile.put(lane, access, raw, inverse_of(scales[element >> block_shift]), lane_base);
    }
    packed_tile.store(lane, packed + tile * kTileBytes);
  }

  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t byte = tiles * kTileBytes + int64_t{blockIdx.x} * kThreads + threadIdx.x; 2 * byte < numel;
       byte += threads) {
    const float inverse = inverse_of(scales[2 * byte >> block_shift]);
    const auto scaled = [&](float x) { return __fmul_rn(x, inverse); };
    packed[byte] = encode_pair(weight + 2 * byte, 2 * byte + 1 < numel, format.zero_code, scaled, lane_base);
  }
}

template <class T>
int launch(const SearchScalesArgs& args, Stream stream) {
  const unsigned blocks = grid_for(ceil_div(args.numel, args.block_size), kThreads / kPartialSums, kBlocksPerProcessor);
  search_scales_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(args.weight), args.numel, *args.format,
                                                        static_cast<int>(args.block_size), args.importance,
                                                        args.columns, args.scales);
  return cudaGetLastError();
}

template <class T>
int launch(const EncodeArgs& args, Stream stream) {
  const bool aligned = is_aligned(args.weight, kAccessBytes) && is_aligned(args.packed, kAccessBytes);
  const int64_t tiles = ceil_div(args.numel, PackedTile<T>::kElements);
  encode_kernel<<<grid_for(tiles, kWarps, kBlocksPerProcessor), kThreads, 0, stream>>>(
      static_cast<const T*>(args.weight), args.numel, *args.format, log2_of(args.block_size),
      aligned ? args.numel / PackedTile<T>::kElements : 0, args.scales, args.packed);
  return cudaGetLastError();
}

}  // namespace

int search_scales(const SearchScalesArgs& args, Stream stream) {
  if (args.numel == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

int encode(const EncodeArgs& args, Stream stream) {
  if (args.numel == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

}  // namespace lowbit::cuda

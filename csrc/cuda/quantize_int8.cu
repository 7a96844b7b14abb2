// The part of quantize that makes int8 codes with one scale per row. (dequantize.cu reads them.)
//
// A block of threads takes a row at a time, twice: for its absmax and for its codes.
#include "device/encode.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerProcessor = 8;

// The integer nearest to x, ties to even, for |x| < 2^22, in the low byte. Adding 1.5 * 2^23 leaves no bits for a
// fraction. Any input gives some code, NaN too.
__device__ __forceinline__ uint32_t round_to_byte(float x) { return __float_as_uint(__fadd_rn(x, 12582912.0f)) & 255; }

// tiles: whole tiles of a row that 16-byte accesses can serve.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)  // 64 registers; left alone, ptxas takes 32 and spills
    quantize_int8_kernel(const T* weight, int64_t rows, int64_t columns, int64_t tiles, int8_t* codes, float* absmax) {
  constexpr int kCount = kPerAccess<T>;
  constexpr int kAccesses = kTileBytes / kCount / kWarpSize;
  using Piece = std::conditional_t<kCount == 8, uint2, uint32_t>;  // the codes of one access
  __shared__ uint32_t largest_of[kWarps];
  __shared__ uint4 staged[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first_column = tiles * kTileBytes + threadIdx.x;  // of those that go one by one

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* values = weight + row * columns;
    const auto load = [&](int64_t tile, int access) {
      return ptx::load_global_16(values + tile * kTileBytes + piece_of(lane, access) * kCount);
    };
    Magnitude<T> largest;
    for (int64_t tile = warp; tile < tiles; tile += kWarps) {
#pragma unroll
      for (int access = 0; access < kAccesses; ++access) largest.take(load(tile, access));
    }
    for (int64_t column = first_column; column < columns; column += kThreads) largest.take(values[column]);
    largest.reduce(kWarpSize);
    if (lane == 0) largest_of[warp] = largest.bits;
    __syncthreads();
#pragma unroll
    for (const uint32_t bits : largest_of) largest.bits = max(largest.bits, bits);
    __syncthreads();  // before the next row's are written
    const float row_absmax = largest.value();
    if (threadIdx.x == 0) absmax[row] = row_absmax;

    // Infinite for a row of zeros (and below 3.7e-37), NaN for one with NaN.
    const float exact = __fmul_rn(__frcp_rn(row_absmax), 127.0f);
    const float scale = exact <= FLT_MAX ? exact : 0.0f;
    int8_t* row_codes = codes + row * columns;
    Piece* pieces = reinterpret_cast<Piece*>(staged[warp]);
    for (int64_t tile = warp; tile < tiles; tile += kWarps) {
#pragma unroll
      for (int access = 0; access < kAccesses; ++access) {
        float elements[kCount];
        widen<T>(load(tile, access), elements);
        uint32_t words[kCount / 4] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) words[i / 4] |= round_to_byte(__fmul_rn(elements[i], scale)) << (i % 4 * 8);
        pieces[piece_of(lane, access)] = *reinterpret_cast<const Piece*>(words);
      }
      __syncwarp();
      ptx::store_global_16(row_codes + tile * kTileBytes + lane * kAccessBytes, staged[warp][lane]);
      __syncwarp();
    }
    for (int64_t column = first_column; column < columns; column += kThreads)
      row_codes[column] = static_cast<int8_t>(round_to_byte(__fmul_rn(widen(values[column]), scale)));
  }
}

template <class T>
int launch(const QuantizeArgs& args, Stream stream) {
  const bool aligned = is_aligned(args.weight, kAccessBytes) && is_aligned(args.packed, kAccessBytes) &&
                       (args.blocks == 1 || args.block_size % kAccessBytes == 0);
  quantize_int8_kernel<<<grid_for(args.blocks, 1, kBlocksPerProcessor), kThreads, 0, stream>>>(
      static_cast<const T*>(args.weight), args.blocks, args.block_size, aligned ? args.block_size / kTileBytes : 0,
      reinterpret_cast<int8_t*>(args.packed), args.absmax);
  return cudaGetLastError();
}

}  // namespace

int quantize_int8(const QuantizeArgs& args, Stream stream) {
  if (args.blocks == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, stream); });
}

}  // namespace lowbit::cuda

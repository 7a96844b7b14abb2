// dequantize: the decoded weight; dequantize_columns: some columns of it.
//
// A warp takes one tile at a time: each lane loads 16 packed bytes, the warp passes them through shared memory to the
// lanes that will write what they decode to, and each lane writes 16 bytes at a time; every access of a warp is 512
// consecutive bytes. The rest and unaligned memory go element by element.
#include "device/launch.h"
#include "device/weight.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerProcessor = 4;
constexpr int kTileElements = 2 * kTileBytes;  // in 4 bits; in int8 as many as bytes
constexpr int kTilesPerPiece = 8;              // of a long int8 row

// Weights are read in pieces of one access, 32 of 4 bits: which piece of the whole weight an output's piece is.
constexpr int kPieceElements = 2 * kAccessBytes;

struct Whole {
  __device__ int64_t operator()(int64_t piece) const { return piece; }
};

struct ColumnWindow {
  int64_t first;              // of the first row
  uint32_t per_row, skipped;  // pieces of a row in the window, and outside of it

  __device__ int64_t operator()(int64_t piece) const {
    const uint32_t row = static_cast<uint32_t>(piece) / per_row;
    return first + piece + int64_t{row} * skipped;
  }
};

// Decodes a byte into out[0] and, if it exists, out[1].
template <class T>
__device__ void decode_byte(uint8_t byte, const Format& format, float scale, bool has_second, T* out) {
  narrow(__fmul_rn(format.codebook[byte >> 4], scale), out);
  if (has_second) narrow(__fmul_rn(format.codebook[byte & 15], scale), out + 1);
}

// block_shift: log2 of the block size. numel: of the output. tiles: how many of its first whole tiles 16-byte accesses
// can serve.
template <class T, bool kDoubleQuant, class Source>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* packed, const __grid_constant__ Scales scales,
                      const __grid_constant__ Format format, int block_shift, Source source_of, int64_t numel,
                      int64_t tiles, T* out) {
  constexpr int kCount = kPerAccess<T>;
  using PackedPiece = std::conditional_t<kCount == 8, uint32_t, uint16_t>;  // what decodes to one access
  __shared__ PairTable table;
  __shared__ uint4 staged[kWarps][kWarpSize];
  const ScaleReader<kDoubleQuant> scale_of(scales);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  table.fill(format);
  __syncthreads();
  const uint32_t lane_base = table.lane_base(lane);
  const PackedPiece* pieces = reinterpret_cast<const PackedPiece*>(staged[warp]);
  const int64_t first_tile = int64_t{blockIdx.x} * kWarps + warp, stride = int64_t{gridDim.x} * kWarps;
  T* to = out + first_tile * kTileElements + lane * kCount;
#pragma unroll 1  // for sm_120 nvcc would take two tiles at once: 85 registers, and a third fewer threads in flight
  for (int64_t tile = first_tile; tile < tiles; tile += stride, to += stride * kTileElements) {
    const int64_t source = source_of(tile * kWarpSize + lane);
    const uint4 bytes = ptx::load_global_16(packed + source * kAccessBytes);
    const float scale = scale_of(static_cast<uint64_t>(source) * kPieceElements >> block_shift);  // of those bytes
    __syncwarp();
    staged[warp][lane] = bytes;
    __syncwarp();
#pragma unroll
    for (int access = 0; access < kTileElements / kCount / kWarpSize; ++access) {
      const int piece = piece_of(lane, access);
      const float piece_scale = __uint_as_float(ptx::shuffle(__float_as_uint(scale), piece * kCount / kPieceElements));
      const uint32_t word = pieces[piece];
      float values[kCount];
#pragma unroll
      for (int b = 0; b < kCount / 2; ++b) {
        const float2 pair = PairTable::decode(word, b, lane_base);
        values[2 * b] = __fmul_rn(pair.x, piece_scale);
        values[2 * b + 1] = __fmul_rn(pair.y, piece_scale);
      }
      ptx::store_global_16(to + piece_of(0, access) * kCount, narrow<T>(values));
    }
  }

  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t byte = tiles * kTileBytes + int64_t{blockIdx.x} * kThreads + threadIdx.x; 2 * byte < numel;
       byte += threads) {
    const int64_t source = source_of(byte / kAccessBytes);
    decode_byte(packed[source * kAccessBytes + byte % kAccessBytes], format,
                scale_of(static_cast<uint64_t>(source) * kPieceElements >> block_shift), 2 * byte + 1 < numel,
                out + 2 * byte);
  }
}

// Codes of one row, or of a piece of a long one, per warp. row_stride: of codes. tiles: whole tiles of a row that
// 16-byte accesses can serve.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int8_kernel(const int8_t* codes, const float* absmax, int64_t rows, int64_t columns, int64_t row_stride,
                           int64_t tiles, T* out) {
  constexpr int kCount = kPerAccess<T>;
  using Piece = std::conditional_t<kCount == 8, uint2, uint32_t>;  // the codes of one 16-byte store
  __shared__ uint4 staged[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp;
  if (row >= rows) return;

  const float row_absmax = absmax[row];
  const auto decode = [&](uint32_t word, int b) {
    const float code = static_cast<float>(ptx::signed_byte(word, b));  // one I2F
    return __fmul_rn(__fmul_rn(code, row_absmax), kInt8Unit);
  };
  const Piece* pieces = reinterpret_cast<const Piece*>(staged[warp]);
  const int8_t* row_codes = codes + row * row_stride;
  T* row_out = out + row * columns;
  const int8_t* from = row_codes + int64_t{blockIdx.y} * kTileBytes + lane * kAccessBytes;
  T* to = row_out + int64_t{blockIdx.y} * kTileBytes + lane * kCount;
  const int64_t step = int64_t{gridDim.y} * kTileBytes;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y, from += step, to += step) {
    const uint4 bytes = ptx::load_global_16(from);
    __syncwarp();
    staged[warp][lane] = bytes;
    __syncwarp();
#pragma unroll
    for (int access = 0; access < kTileBytes / kCount / kWarpSize; ++access) {
      uint32_t words[kCount / 4];
      *reinterpret_cast<Piece*>(words) = pieces[piece_of(lane, access)];
      float values[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = decode(words[i / 4], i % 4);
      ptx::store_global_16(to + piece_of(0, access) * kCount, narrow<T>(values));
    }
  }
  for (int64_t column = tiles * kTileBytes + int64_t{blockIdx.y} * kWarpSize + lane; column < columns;
       column += int64_t{gridDim.y} * kWarpSize)
    narrow(decode(static_cast<uint8_t>(row_codes[column]), 0), row_out + column);
}

// columns: of the codes' rows, which begin at `codes`.
template <class T>
int launch_int8(const QuantizedWeight& weight, const uint8_t* codes, int64_t columns, T* out, Stream stream) {
  const int64_t row_stride = weight.block_size, rows = weight.numel / row_stride;
  const bool aligned = is_aligned(codes, kAccessBytes) && is_aligned(out, kAccessBytes) &&
                       (rows == 1 || (columns % kAccessBytes == 0 && row_stride % kAccessBytes == 0));
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kWarps)),
                  static_cast<unsigned>(std::clamp<int64_t>(columns / (kTilesPerPiece * kTileBytes), 1, 65535)));
  dequantize_int8_kernel<<<grid, kThreads, 0, stream>>>(reinterpret_cast<const int8_t*>(codes), weight.scales.values,
                                                        rows, columns, row_stride, aligned ? columns / kTileBytes : 0,
                                                        out);
  return cudaGetLastError();
}

template <class T, class Source>
int launch_4_bits(const QuantizedWeight& weight, Source source, int64_t numel, T* out, Stream stream) {
  const bool aligned = is_aligned(weight.packed, kAccessBytes) && is_aligned(out, kAccessBytes);
  const int64_t tiles = aligned ? numel / kTileElements : 0;
  const unsigned blocks = grid_for(ceil_div(numel, kTileElements), kWarps, kBlocksPerProcessor);
  const auto kernel =
      weight.scales.kind == ScaleKind::block ? dequantize_kernel<T, false, Source> : dequantize_kernel<T, true, Source>;
  kernel<<<blocks, kThreads, 0, stream>>>(weight.packed, weight.scales, *weight.format, log2_of(weight.block_size),
                                          source, numel, tiles, out);
  return cudaGetLastError();
}

}  // namespace

int dequantize(const DequantizeArgs& args, Stream stream) {
  const QuantizedWeight& weight = args.weight;
  if (weight.numel == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) {
    auto* out = static_cast<decltype(element)*>(args.out);
    if (weight.scales.kind == ScaleKind::row) return launch_int8(weight, weight.packed, weight.block_size, out, stream);
    return launch_4_bits(weight, Whole{}, weight.numel, out, stream);
  });
}

int dequantize_columns(const DequantizeColumnsArgs& args, Stream stream) {
  const QuantizedWeight& weight = args.weight;
  if (!columns_fit(args)) return cudaErrorInvalidValue;
  if (weight.numel == 0 || args.count == 0) return cudaSuccess;
  return for_dtype(args.dtype, [&](auto element) {
    auto* out = static_cast<decltype(element)*>(args.out);
    if (weight.scales.kind == ScaleKind::row)
      return launch_int8(weight, weight.packed + args.first, args.count, out, stream);
    const ColumnWindow window{args.first / kPieceElements, static_cast<uint32_t>(args.count / kPieceElements),
                              static_cast<uint32_t>((args.row_length - args.count) / kPieceElements)};
    return launch_4_bits(weight, window, weight.numel / args.row_length * args.count, out, stream);
  });
}

}  // namespace lowbit::cuda

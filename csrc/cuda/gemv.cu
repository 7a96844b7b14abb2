// linear for a few rows of x and a 4-bit weight. Its cost is to read W once.
//
// A block of threads takes 16 rows of W; its warps share their columns, 128 at a time (layout.h). A warp multiplies its
// 16 x 128 weights by mma where x has 16 bits, by FMAs in fp32 elsewhere. The scales of a panel of columns are decoded
// into shared memory at once. At the end the block adds up the sums of its warps and LoRA's product. Where N is too
// small to fill the GPU, several blocks share the columns, and split_sum adds up their sums.
#include "device/launch.h"
#include "device/split_sum.cuh"
#include "device/weight.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowThreads = kThreads / kGemvRows;

struct Arguments {
  LinearArgs linear;     // workspace [gridDim.y, m, n], or null where one block takes all columns
  int block_shift;       // log2 of the block size
  int panel_steps;       // steps of 128 columns in a panel, a multiple of kAhead * kWarps
  int panels_per_block;  // of threads
  Format format;
};

// Decoded scales of a panel, those of rows r and r + 8 side by side. Rows are 8 banks apart: 4 blocks of 4 rows, which
// half a warp reads at once, meet in no bank.
struct PanelScales {
  alignas(16) float2 of[kGemvRows / 2][kPanelBlocks + 4];
};

// What a lane reads past the end of x.
[[maybe_unused]] __device__ const uint4 zeros[4] = {};  // unused before sm_80

// W is A and x is B of mma.m16n8k16. The order of the contraction is free: mma i takes bytes 2i and 2i + 1 of each
// lane's 16, and the lane's elements of x are consecutive too. A step spans kParts blocks (4, 2 or 1 of 32, 64 or
// more), each in lanes of its own. So that each sum has one scale, each part of a row of x has a column of B of its
// own, zero for the other lanes: with kTiles = 1 beside the other parts, with kTiles = kParts in another B.
//
// The second B, for 5 to 8 rows and blocks of 64, takes 2.1 instructions per weight where one B takes 1.75: 16 mma and
// 8 FMAs more for 128 weights of a lane. The reason is the width of the loads of W: two lanes of a quad have all 64
// columns of a block, and an mma adds up what four have.
template <class T, int kParts, int kTiles>
struct TensorCores {
  static constexpr int kColumnParts = kParts / kTiles;
  static constexpr int kRows = 8 / kColumnParts;      // of x
  static constexpr int kAhead = kTiles == 1 ? 2 : 1;  // steps on their way: as registers allow
  using Table = NarrowPairTable<T>;

  float sums[4] = {};
  uint4 b[kTiles][2] = {};  // 16 of the lane's x; zeros for ever where it has none
  const T* x;               // the lane's next column, in the row of x of its column of B
  bool has_x[kTiles];       // the lane's k are of its column's part
  int lane;
  uint32_t table;

  __device__ __forceinline__ TensorCores(const T* first_x, int rows, uint32_t k, int lane, const Table& pairs)
      : x(first_x + min(lane / 4 / kColumnParts, rows - 1) * k), lane(lane), table(pairs.lane_base(lane)) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      has_x[tile] = lane % 4 * kParts / 4 == tile * kColumnParts + lane / 4 % kColumnParts;
  }

  // inside: this step has columns for the lane, `columns` after its next; step: counted from the panel's first.
  __device__ __forceinline__ void add(const uint4 (&weights)[2], const PanelScales& scales, bool inside, int columns,
                                      int step, int block_shift) {
    const uint32_t upper[4] = {weights[0].x, weights[0].y, weights[0].z, weights[0].w};
    const uint32_t lower[4] = {weights[1].x, weights[1].y, weights[1].z, weights[1].w};
    float c[kTiles][4] = {};
    const void* from = inside ? static_cast<const void*>(x + columns) : zeros;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        ptx::load_global_16_if(has_x[tile], b[tile][word % 2], static_cast<const uint4*>(from) + word);
#pragma unroll
      for (int byte = 0; byte < 4; byte += 2) {
        const uint32_t a[4] = {Table::decode(upper[word], byte, table), Table::decode(lower[word], byte, table),
                               Table::decode(upper[word], byte + 1, table),
                               Table::decode(lower[word], byte + 1, table)};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 pairs = b[tile][word % 2];
          const uint32_t b_words[2] = {byte ? pairs.z : pairs.x, byte ? pairs.w : pairs.y};
          ptx::mma<T>(c[tile], a, b_words);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int part = tile * kColumnParts + (lane % 4 * 2 + i % 2) % kColumnParts;
        const int block = kParts == 1 ? step * kGemvDepth >> block_shift : step * kParts + part;
        const float2 scale = scales.of[lane / 4][block];
        sums[i] += c[tile][i] * (i < 2 ? scale.x : scale.y);
      }
    }
  }

  __device__ __forceinline__ void advance(int columns) { x += columns; }

  // Calls write(row of W, row of x, sum) for the 16 x kRows sums of the warp.
  template <class Write>
  __device__ __forceinline__ void finish(const Write& write) const {
    const int lane = ptx::read_thread_index() % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8, column = lane % 4 * 2;
      const float left = sums[2 * half], right = sums[2 * half + 1];
      if constexpr (kColumnParts == 1) {
        write(row, column, left);
        write(row, column + 1, right);
      } else {
        const float sum = ptx::sum_lanes<kColumnParts / 2>(left + right);
        if (kColumnParts == 2 || lane % 2 == 0) write(row, column / kColumnParts, sum);
      }
    }
  }
};

// fp32 arithmetic: each lane multiplies its own weights.
template <class T, int kRowCount>
struct Fmas {
  static constexpr int kRows = kRowCount;
  static constexpr int kAhead = kRows == 1 ? 2 : 1;  // as registers allow
  using Table = PairTable;

  float sums[2][kRows] = {};  // of the lane's two rows of W
  const T* x[kRows];          // the lane's next column, in each row of x; in the last once more for those that are not
  int lane;
  uint32_t table;

  __device__ __forceinline__ Fmas(const T* first_x, int rows, uint32_t k, int lane, const Table& pairs)
      : lane(lane), table(pairs.lane_base(lane)) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) x[row] = first_x + min(row, rows - 1) * k;
  }

  __device__ __forceinline__ void add(const uint4 (&weights)[2], const PanelScales& scales, bool inside, int columns,
                                      int step, int block_shift) {
    constexpr int kCount = kPerAccess<T>;
    if (!inside) return;
    const uint32_t words[2][4] = {{weights[0].x, weights[0].y, weights[0].z, weights[0].w},
                                  {weights[1].x, weights[1].y, weights[1].z, weights[1].w}};
    float products[2][kRows] = {};
#pragma unroll
    for (int first = 0; first < kGemvLaneDepth; first += kCount) {
      float pairs[2][kCount];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
          const float2 pair = Table::decode(words[half][(first + i) / 8], (first + i) / 2 % 4, table);
          pairs[half][i] = pair.x;
          pairs[half][i + 1] = pair.y;
        }
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float values[kCount];
        widen<T>(ptx::load_global_16_cached(x[row] + columns + first), values);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) products[half][row] = fmaf(pairs[half][i], values[i], products[half][row]);
        }
      }
    }
    const int block = (step * kGemvDepth + lane % 4 * kGemvLaneDepth) >> block_shift;
    const float2 scale = scales.of[lane / 4][block];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) sums[half][row] += products[half][row] * (half == 0 ? scale.x : scale.y);
    }
  }

  __device__ __forceinline__ void advance(int columns) {
#pragma unroll
    for (const T*& row : x) row += columns;
  }

  template <class Write>
  __device__ __forceinline__ void finish(const Write& write) const {
    const int lane = ptx::read_thread_index() % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float sum = ptx::sum_lanes<4>(sums[half][row]);
        if (lane % 4 == 0) write(lane / 4 + half * 8, row, sum);
      }
    }
  }
};

// Blocks: x: 16 rows of W, y: a share of the columns, z: a group of kRows rows of x.
template <class Product, class T>
__device__ __forceinline__ void gemv(const Arguments& arguments) {
  const LinearArgs& args = arguments.linear;
  const Scales stored_scales = args.weight.scales;  // a copy: by reference ptxas spills for sm_90
  constexpr int kRows = Product::kRows, kAhead = Product::kAhead;
  __shared__ typename Product::Table table;
  __shared__ PanelScales scales;
  __shared__ float sums[kWarps + 1][kRows][kGemvRows];  // the last for LoRA
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int warp = static_cast<int>(ptx::shuffle(threadIdx.x / kWarpSize, 0));  // known to be the same in all lanes
  const uint32_t k = static_cast<uint32_t>(args.k);
  // The last 16 rows may overlap those of the block before.
  const int64_t first_n = min(int64_t{blockIdx.x} * kGemvRows, args.n - kGemvRows);
  const int64_t first_m = int64_t{blockIdx.z} * kRows;
  const int rows = static_cast<int>(min(args.m - first_m, int64_t{kRows}));

  // Steps are numbered along a row of W; a warp takes every eighth.
  constexpr uint32_t kWarpStride = kWarps * kGemvDepth;
  const int first_step = static_cast<int>(blockIdx.y) * arguments.panels_per_block * arguments.panel_steps;
  const int end_step = min(static_cast<int>((k + kGemvDepth - 1) / kGemvDepth),
                           first_step + arguments.panels_per_block * arguments.panel_steps);
  const uint32_t end_k = min(k, end_step * kGemvDepth);
  uint32_t lane_k = (first_step + warp) * kGemvDepth + lane % 4 * kGemvLaneDepth;
  const uint8_t* packed = args.weight.packed + first_n * (k / 2) + (lane / 4 * k + lane_k) / 2;
  uint4 weights[kAhead][2] = {};
  // The warp's step `steps` ahead. Past the end there is no x to multiply with.
  const auto load = [&](uint32_t steps, uint4(&to)[2]) {
    if (lane_k + steps * kWarpStride >= end_k) return;
    to[0] = ptx::load_global_16(packed + steps * (kWarpStride / 2));
    to[1] = ptx::load_global_16(packed + kGemvRows / 4 * k + steps * (kWarpStride / 2));
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, weights[i]);
  table.fill(arguments.format);

  // scaling t lora_b^T, by 16 threads for each row of lora_b.
  const int64_t lora_row = (first_n + thread / kRowThreads) * args.rank;
#pragma unroll 1  // registers hold the weights that are on their way
  for (int m = 0; m < rows; ++m) {
    float product = 0.0f;
    for (int64_t r = blockIdx.y == 0 ? thread % kRowThreads : args.rank; r < args.rank; r += kRowThreads)
      product += args.t[(first_m + m) * args.rank + r] * args.lora_b[lora_row + r];
    product = ptx::sum_lanes<kRowThreads>(product);
    if (thread % kRowThreads == 0) sums[kWarps][m][thread / kRowThreads] = args.scaling * product;
  }

  // Scales of a panel, by 16 threads for each row.
  const int blocks_per_row = static_cast<int>(k >> arguments.block_shift);
  const auto decode_scales = [&](int panel, const auto& scale_of) {
    const int thread = ptx::read_thread_index();
    const int row = thread / kRowThreads;
    float2* const to = scales.of[row % (kGemvRows / 2)];
    const int first_block = panel * kGemvDepth >> arguments.block_shift;
    const int64_t row_block = (first_n + row) * blocks_per_row + first_block;
#pragma unroll 1  // what unrolling precomputes would take registers from the loop below
    for (int block = thread % kRowThreads; block < arguments.panel_steps * kGemvDepth >> arguments.block_shift;
         block += kRowThreads) {
      // A block past the end is multiplied with zeros.
      const float scale = first_block + block < blocks_per_row ? scale_of(row_block + block) : 0.0f;
      (row < kGemvRows / 2 ? to[block].x : to[block].y) = scale;
    }
  };

  Product product(static_cast<const T*>(args.x) + first_m * k + lane_k, rows, k, lane, table);
  for (int panel = first_step; panel < end_step; panel += arguments.panel_steps) {
    __syncthreads();  // the table is there; the last panel's scales have been read
    if (stored_scales.kind == ScaleKind::block) {
      decode_scales(panel, ScaleReader<false>(stored_scales));
    } else {
      decode_scales(panel, ScaleReader<true>(stored_scales));
    }
    __syncthreads();
    // All warps take equally many steps.
    const int steps = min(arguments.panel_steps, end_step - panel);
    for (int step = 0; step < steps; step += kAhead * kWarps) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i > 0 && step + i * kWarps >= steps) break;
        product.add(weights[i], scales, lane_k + i * kWarpStride < end_k, i * kWarpStride, step + i * kWarps + warp,
                    arguments.block_shift);
        load(i + kAhead, weights[i]);
      }
      lane_k += kAhead * kWarpStride;
      packed += kAhead * kWarpStride / 2;
      product.advance(kAhead * kWarpStride);
    }
  }

  product.finish([&](int row, int m, float sum) { sums[warp][m][row] = sum; });
  __syncthreads();
  for (int i = ptx::read_thread_index(); i < kRows * kGemvRows; i += kThreads) {
    const int m = i / kGemvRows;
    const int64_t n = first_n + i % kGemvRows;
    if (m >= rows || n < int64_t{blockIdx.x} * kGemvRows) continue;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part <= kWarps; ++part) sum += sums[part][m][i % kGemvRows];
    const int64_t at = (first_m + m) * args.n + n;
    if (args.workspace) {
      args.workspace[int64_t{blockIdx.y} * args.m * args.n + at] = sum;
    } else {
      narrow(args.bias ? sum + args.bias[n] : sum, static_cast<T*>(args.y) + at);
    }
  }
}

template <class T, int kParts, int kTiles>
__global__ void __launch_bounds__(kThreads, 4)  // 64 registers
    gemv_mma_kernel(const __grid_constant__ Arguments args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  gemv<TensorCores<T, kParts, kTiles>, T>(args);
#endif
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 4) gemv_fma_kernel(const __grid_constant__ Arguments args) {
  gemv<Fmas<T, kRows>, T>(args);
}

template <class T>
int launch(const LinearArgs& args, const Plan& plan, Stream stream) {
  const Arguments arguments{args, log2_of(args.weight.block_size), plan.panel_steps, static_cast<int>(plan.split_size),
                            *args.weight.format};
  void (*kernel)(Arguments) = plan.rows == 1 ? gemv_fma_kernel<T, 1> : gemv_fma_kernel<T, 2>;
  if constexpr (sizeof(T) == 2) {
    if (plan.scale_parts == 1) kernel = gemv_mma_kernel<T, 1, 1>;
    if (plan.scale_parts == 2) kernel = plan.rows == 4 ? gemv_mma_kernel<T, 2, 1> : gemv_mma_kernel<T, 2, 2>;
    if (plan.scale_parts == 4) kernel = gemv_mma_kernel<T, 4, 1>;
  }
  const dim3 grid(static_cast<unsigned>(plan.column_tiles), static_cast<unsigned>(plan.splits),
                  static_cast<unsigned>(plan.row_tiles));
  kernel<<<grid, kThreads, 0, stream>>>(arguments);
  if (plan.splits == 1) return cudaGetLastError();
  return sum_splits<T>({args.workspace, plan.splits, args.m, args.n, args.bias}, args.y, stream);
}

}  // namespace

int linear_gemv(const LinearArgs& args, const Plan& plan, Stream stream) {
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, plan, stream); });
}

}  // namespace lowbit::cuda

// linear for a few rows of x and a 4-bit weight. Its cost is to read W once.
//
// A block of threads takes 16 rows of W; its warps share their columns, 128 at a time (layout.h). A warp multiplies its
// 16 x 128 weights by mma where x has 16 bits, by FMAs in fp32 elsewhere. The scales of a panel of columns are decoded
// into shared memory at once. At the end the block adds up the sums of its warps and LoRA's product. Where N is too
// small to fill the GPU, several blocks share the columns, and the last of them to finish adds up their sums.
//
// What hides DRAM's latency is how much of W is on its way: kAhead steps of each warp, from the first instruction on.
// Table, scales and LoRA's product are made while the first of them arrive.
#include "device/arrival.cuh"
#include "device/launch.h"
#include "device/weight.cuh"

namespace lowbit::cuda {
namespace {

constexpr int kWarps = kGemvWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowThreads = kThreads / kGemvRows;

struct Arguments {
  LinearArgs linear;       // workspace [gridDim.y, m, n] and its counters, or null where one block takes all columns
  int block_shift;         // log2 of the block size
  uint32_t share_columns;  // whole steps of all warps, and whole blocks of W
  Format format;
};

// Decoded scales of a panel, those of rows r and r + 8 side by side. Rows are 8 banks apart: 4 blocks of 4 rows, which
// half a warp reads at once, meet in no bank.
struct PanelScales {
  alignas(16) float2 of[kGemvRows / 2][kPanelBlocks + 4];
};

// W is A and x is B of mma.m16n8k16, which adds up what the four lanes of a quad have. A step spans kBlocks blocks of W
// (4 of 32, 2 of 64, or a part of one), loaded by lanes of their own, and each sum has to have one scale. For few rows
// of x (kRows 4 or 2) each block has a column of B of its own, zero for the lanes that have the others. For up to 8 the
// lanes of a quad exchange words until all have the same blocks: 8 instructions for each halving of a row's words, that
// is 16 in a step of blocks of 64, 2.0 for each weight instead of 1.75. (Loads of 8 bytes would need no exchange, and
// twice as many requests to L2, of 32 bytes.)
//
// A step has two sums at least, so that no mma waits for more than three others.
template <class T, int kBlocks, int kRowCount>
struct TensorCores {
  static constexpr int kRows = kRowCount;   // of x
  static constexpr int kParts = 8 / kRows;  // columns of B for each
  static constexpr int kAhead = kGemvMmaAhead;
  static constexpr int kGroups = kParts > 1 ? 1 : kBlocks;  // of words that have the same blocks
  static constexpr int kSums = kGroups == 1 ? 2 : kGroups;
  static constexpr int kBlockDepth = kGemvDepth / kBlocks;
  static_assert(kParts == 1 || kParts == kBlocks);
  using Table = NarrowPairTable<T>;

  float sums[4] = {};
  uint4 b[2] = {};  // 8 of the lane's x each; zeros for ever where it has none
  const T* x;       // the lane's next column, in the row of x of its column of B
  bool has_x;
  int lane;
  uint32_t table;

  __device__ __forceinline__ TensorCores(const T* step_x, int rows, uint32_t k, int lane, const Table& pairs)
      : x(step_x + min(lane / 4 / kParts, rows - 1) * k + gemv_word_column(kGroups, lane, 0)),
        has_x(lane / 4 / kParts < rows && lane % 4 * kParts / 4 == lane / 4 % kParts),
        lane(lane),
        table(pairs.lane_base(lane)) {}

  // A row's words: of a quad's 4 x 4 the upper right and the lower left quarter change places, then those of quarters.
  __device__ __forceinline__ void regroup(uint32_t (&words)[4]) const {
    if constexpr (kGroups >= 2) {
      ptx::swap_with_lane(words[0], words[2], lane, 2);
      ptx::swap_with_lane(words[1], words[3], lane, 2);
    }
    if constexpr (kGroups == 4) {
      ptx::swap_with_lane(words[0], words[1], lane, 1);
      ptx::swap_with_lane(words[2], words[3], lane, 1);
    }
  }

  // left: columns from the step's first to the end; columns: of x from the next step to this one; step: counted from
  // the panel's first.
  __device__ __forceinline__ void add(const uint4 (&weights)[2], const PanelScales& scales, int left, int columns,
                                      int step, int block_shift) {
    uint32_t upper[4] = {weights[0].x, weights[0].y, weights[0].z, weights[0].w};
    uint32_t lower[4] = {weights[1].x, weights[1].y, weights[1].z, weights[1].w};
    regroup(upper);
    regroup(lower);
    // The last step may end with any of its blocks.
    const auto is_inside = [&](int block) { return kBlocks == 1 || left > block * kBlockDepth; };
    const auto add_scaled = [&](const float (&c)[4], int group) {
      const int block = group + lane * 2 % kParts;  // of the lane's first column
      const int first = kBlocks == 1 ? step * kGemvDepth >> block_shift : step * kBlocks + block;
      const uint32_t address = ptx::shared_address(&scales.of[lane / 4][first]);
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int part = kParts == 1 ? 0 : column;
        const float2 scale = ptx::load_shared_8(address + part * sizeof(float2));
        if (!is_inside(block + part)) continue;
        sums[column] += c[column] * scale.x;
        sums[column + 2] += c[column + 2] * scale.y;
      }
    };
    float c[kSums][4] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int sum = word * kSums / 4, group = kGroups == 1 ? 0 : sum;
      uint4& pairs = b[word % 2];
      ptx::load_global_16_if(has_x && is_inside(group + lane % 4 * kParts / 4), pairs,
                             x + columns + gemv_word_column(kGroups, 0, word));
#pragma unroll
      for (int byte = 0; byte < 4; byte += 2) {
        const uint32_t a[4] = {Table::decode(upper[word], byte, table), Table::decode(lower[word], byte, table),
                               Table::decode(upper[word], byte + 1, table),
                               Table::decode(lower[word], byte + 1, table)};
        const uint32_t b_words[2] = {byte ? pairs.z : pairs.x, byte ? pairs.w : pairs.y};
        ptx::mma<T>(c[sum], a, b_words);
      }
      if (kGroups > 1 && (word + 1) % (4 / kSums) == 0) add_scaled(c[sum], group);
    }
    if constexpr (kGroups == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[0][i] += c[1][i];
      add_scaled(c[0], 0);
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
      if constexpr (kParts == 1) {
        write(row, column, left);
        write(row, column + 1, right);
      } else {
        const float sum = ptx::sum_lanes<kParts / 2>(left + right);
        if (kParts == 2 || lane % 2 == 0) write(row, column / kParts, sum);
      }
    }
  }
};

// fp32 arithmetic: each lane multiplies its own weights.
template <class T, int kRowCount>
struct Fmas {
  static constexpr int kRows = kRowCount;
  static constexpr int kAhead = kGemvFmaAhead;
  using Table = PairTable;

  float sums[2][kRows] = {};  // of the lane's two rows of W
  const T* x;                 // the lane's next column
  uint32_t row_stride;        // of x; 0 where there is one row
  int lane;
  uint32_t table;

  __device__ __forceinline__ Fmas(const T* step_x, int rows, uint32_t k, int lane, const Table& pairs)
      : x(step_x + lane % 4 * kGemvLaneDepth), row_stride(rows > 1 ? k : 0), lane(lane), table(pairs.lane_base(lane)) {
    static_assert(kRows <= 2);
  }

  __device__ __forceinline__ void add(const uint4 (&weights)[2], const PanelScales& scales, int left, int columns,
                                      int step, int block_shift) {
    constexpr int kCount = kPerAccess<T>;
    if (left <= lane % 4 * kGemvLaneDepth) return;
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
        widen<T>(ptx::load_global_16_cached(x + row * row_stride + columns + first), values);
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

  __device__ __forceinline__ void advance(int columns) { x += columns; }

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

// The sum of one output's shares, which stand `stride` apart, in their order; four at a time are on their way.
__device__ __forceinline__ float sum_shares(const float* shares, int64_t stride, int count) {
  constexpr int kBatch = 4;
  float sum = 0.0f;
  for (int first = 0; first < count; first += kBatch) {
    float batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) batch[i] = ptx::load_global_4_fresh(shares + min(first + i, count - 1) * stride);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += first + i < count ? batch[i] : 0.0f;
  }
  return sum;
}

// The blocks of W whose scales a thread decodes in a panel: every 16th of one row.
struct PanelBlocks {
  uint32_t row;           // the number of the row's first block in the weight
  uint32_t column, last;  // in the row: the thread's first block, and the last of the share

  __device__ __forceinline__ PanelBlocks(int64_t first_n, uint32_t k, uint32_t end_k, uint32_t panel_k, int block_shift,
                                         int distance = 1)
      : column(panel_k >> block_shift), last((end_k >> block_shift) - 1) {
    const uint32_t thread = ptx::read_thread_index();
    row = (static_cast<uint32_t>(first_n) + thread / kRowThreads) * (k >> block_shift);
    column += thread % kRowThreads * distance;
  }

  // Block number i; past the end of the share its last one, whose place no weight meets.
  __device__ __forceinline__ uint32_t at(int i) const { return row + min(column + i * kRowThreads, last); }
};

// Blocks: x: 16 rows of W, y: a share of the columns, z: a group of kRows rows of x.
template <class Product, class T>
__device__ __forceinline__ void gemv(const Arguments& arguments) {
  const LinearArgs& args = arguments.linear;
  const Scales& stored_scales = args.weight.scales;
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

  // A warp takes every eighth step of 128 columns.
  constexpr int kWarpStride = kWarps * kGemvDepth;
  const int block_shift = arguments.block_shift;
  const uint32_t share_k = blockIdx.y * arguments.share_columns, end_k = min(k, share_k + arguments.share_columns);
  const uint32_t first_k = share_k + warp * kGemvDepth;
  int left = static_cast<int>(end_k - first_k);  // columns from the warp's next step on
  const uint8_t* packed =
      args.weight.packed + first_n * (k / 2) + (lane / 4 * k + first_k) / 2 + lane % 4 * kAccessBytes;
  uint4 weights[kAhead][2] = {};
  // The warp's step `steps` ahead.
  const auto load = [&](int steps, uint4(&to)[2]) {
    if (left <= steps * kWarpStride + lane % 4 * kGemvLaneDepth) return;
    to[0] = ptx::load_global_16(packed + steps * (kWarpStride / 2));
    to[1] = ptx::load_global_16(packed + kGemvRows / 4 * k + steps * (kWarpStride / 2));
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, weights[i]);

  // Scales of a panel, by 16 threads for each row: loaded all at once, then decoded.
  constexpr int kLoaded = kPanelBlocks / kRowThreads;
  const bool is_double_quant = stored_scales.kind == ScaleKind::double_quant;
  uint32_t loaded[kLoaded];  // codes, or the bits of fp32
  const auto load_scales = [&](uint32_t panel_k) {
    const PanelBlocks blocks(first_n, k, end_k, panel_k, block_shift);
    if (is_double_quant) {
      ptx::prefetch_l2(stored_scales.group_scales + blocks.at(0) / kGroupSize);
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) loaded[i] = stored_scales.codes[blocks.at(i)];
    } else {
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) loaded[i] = __float_as_uint(stored_scales.values[blocks.at(i)]);
    }
  };
  const auto store_scales = [&](const auto& decode) {
    const int thread = ptx::read_thread_index(), row = thread / kRowThreads;
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
      float2& pair = scales.of[row % (kGemvRows / 2)][thread % kRowThreads + i * kRowThreads];
      (row < kGemvRows / 2 ? pair.x : pair.y) = decode(i);
    }
  };
  // Brings a panel's scales into L2: a thread takes 32 bytes of fp32, or 8 of codes.
  const auto prefetch_scales = [&](uint32_t panel_k) {
    if (panel_k >= end_k) return;
    const uint32_t block = PanelBlocks(first_n, k, end_k, panel_k, block_shift, kLoaded).at(0);
    if (is_double_quant) {
      ptx::prefetch_l2(stored_scales.codes + block);
      ptx::prefetch_l2(stored_scales.group_scales + block / kGroupSize);
    } else {
      ptx::prefetch_l2(stored_scales.values + block);
    }
  };
  load_scales(share_k);
  table.fill(arguments.format);

  // scaling t lora_b^T, by 16 threads for each row of lora_b.
  if (blockIdx.y == 0 && args.rank > 0) {
    // Rows of x at a time: registers hold the weights that are on their way.
    constexpr int kLoraRows = kRows < 4 ? kRows : 4;
    const uint32_t rank = static_cast<uint32_t>(args.rank);
    const float* const up = args.lora_b + (first_n + thread / kRowThreads) * args.rank;
#pragma unroll 1
    for (int first = 0; first < rows; first += kLoraRows) {
      const float* const low = args.t + (first_m + first) * args.rank;
      float products[kLoraRows] = {};
#pragma unroll 1
      for (uint32_t r = thread % kRowThreads; r < rank; r += kRowThreads) {
        const float value = up[r];
#pragma unroll
        for (int m = 0; m < kLoraRows; ++m)
          if (first + m < rows) products[m] = fmaf(low[m * rank + r], value, products[m]);
      }
#pragma unroll
      for (int m = 0; m < kLoraRows; ++m) {
        const float product = ptx::sum_lanes<kRowThreads>(products[m]);
        if (thread % kRowThreads == 0) sums[kWarps][first + m][thread / kRowThreads] = args.scaling * product;
      }
    }
  }

  Product product(static_cast<const T*>(args.x) + first_m * k + first_k, rows, k, lane, table);
  for (uint32_t panel_k = share_k;;) {
    if (is_double_quant) {
      const ScaleReader<true> reader(stored_scales);
      const PanelBlocks blocks(first_n, k, end_k, panel_k, block_shift);
      store_scales(
          [&](int i) { return reader.decode({stored_scales.group_scales[blocks.at(i) / kGroupSize], loaded[i]}); });
    } else {
      store_scales([&](int i) { return __uint_as_float(loaded[i]); });
    }
    __syncthreads();  // the table is there too
    prefetch_scales(panel_k + (kPanelBlocks << block_shift));
#pragma unroll 1
    for (int step = warp; step < (kPanelBlocks << block_shift) / kGemvDepth && left > 0; step += kAhead * kWarps) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i > 0 && left <= i * kWarpStride) break;
        product.add(weights[i], scales, left - i * kWarpStride, i * kWarpStride, step + i * kWarps, block_shift);
        load(i + kAhead, weights[i]);
      }
      left -= kAhead * kWarpStride;
      packed += kAhead * kWarpStride / 2;
      product.advance(kAhead * kWarpStride);
    }
    panel_k += kPanelBlocks << block_shift;
    if (panel_k >= end_k) break;
    __syncthreads();  // its scales have been read
    load_scales(panel_k);
  }

  product.finish([&](int row, int m, float sum) { sums[warp][m][row] = sum; });
  __syncthreads();
  const int output = ptx::read_thread_index(), m = output / kGemvRows;
  const int64_t tile_n = int64_t{ptx::read_block_index()} * kGemvRows;
  const int64_t n = min(tile_n, args.n - kGemvRows) + output % kGemvRows;
  const int64_t at = (int64_t{ptx::read_block_index_z()} * kRows + m) * args.n + n;
  const bool has_output = m < rows && n >= tile_n;
  float sum = 0.0f;
  if (has_output) {
#pragma unroll
    for (int part = 0; part < kWarps; ++part) sum += sums[part][m][output % kGemvRows];
    if (blockIdx.y == 0 && args.rank > 0) sum += sums[kWarps][m][output % kGemvRows];
  }
  if (args.workspace) {
    const int64_t outputs = args.m * args.n;
    if (has_output) args.workspace[blockIdx.y * outputs + at] = sum;
    if (!is_last_to_arrive(args.counters + blockIdx.z * gridDim.x + blockIdx.x, gridDim.y)) return;
    if (has_output) sum = sum_shares(args.workspace + at, outputs, static_cast<int>(gridDim.y));
  }
  sum = plus_bias(sum, args.bias, n);
  if (has_output) narrow(sum, static_cast<T*>(args.y) + at);
}

template <class T, int kBlocks, int kRows>
__global__ void __launch_bounds__(kThreads, kGemvResident) gemv_mma_kernel(const __grid_constant__ Arguments args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  gemv<TensorCores<T, kBlocks, kRows>, T>(args);
#endif
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, kGemvResident) gemv_fma_kernel(const __grid_constant__ Arguments args) {
  gemv<Fmas<T, kRows>, T>(args);
}

template <class T>
int launch(const LinearArgs& args, const Plan& plan, Stream stream) {
  const Arguments arguments{args, log2_of(args.weight.block_size), static_cast<uint32_t>(plan.split_size),
                            *args.weight.format};
  void (*kernel)(Arguments) = plan.rows == 1 ? gemv_fma_kernel<T, 1> : gemv_fma_kernel<T, 2>;
  if constexpr (sizeof(T) == 2) {
    if (plan.step_blocks == 1) kernel = gemv_mma_kernel<T, 1, 8>;
    if (plan.step_blocks == 2) kernel = plan.rows == 4 ? gemv_mma_kernel<T, 2, 4> : gemv_mma_kernel<T, 2, 8>;
    if (plan.step_blocks == 4) kernel = plan.rows == 2 ? gemv_mma_kernel<T, 4, 2> : gemv_mma_kernel<T, 4, 8>;
  }
  const dim3 grid(static_cast<unsigned>(plan.column_tiles), static_cast<unsigned>(plan.splits),
                  static_cast<unsigned>(plan.row_tiles));
  kernel<<<grid, kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

int linear_gemv(const LinearArgs& args, const Plan& plan, Stream stream) {
  return for_dtype(args.dtype, [&](auto element) { return launch<decltype(element)>(args, plan, stream); });
}

}  // namespace lowbit::cuda

// optimizer_step: one launch for all parameters; sum_of_squares: of all tensors, in fp64.
//
// What a launch works on is a table in its parameters (up to 32,764 bytes from CUDA 12.1 on), so that nothing is
// allocated or copied and a graph can hold it.
//
// A warp takes one block of 256 elements of one parameter at a time, 8 of them in each lane, from the first access to
// the last: dtypes and kinds of states differ between parameters, never within a warp.
#include <cstring>

#include "device/dynamic_map.cuh"
#include "device/encode.cuh"
#include "device/launch.h"

namespace lowbit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerProcessor = 2;  // resident: 128 registers. With 3 of them 80 would spill
constexpr int kMostParameterBytes = 32764;
constexpr int kFours = kLaneElements / 4;

static_assert(kLaneElements * kWarpSize == kStateBlock);

// --- tables of launches

// Which entry of the table has this unit of work; it is number `least` or a later one.
template <class Table>
__device__ __forceinline__ int entry_of(const Table& table, uint32_t unit, int least) {
  int above = table.count;
#pragma unroll 1
  for (int middle = least + 1; least + 1 < above; middle = (least + above) / 2) {
    if (table.first_unit[middle] <= unit) {
      least = middle;
    } else {
      above = middle;
    }
  }
  return least;
}

// Elements of entry `i` in this unit, which has kUnit of them at most.
template <int kUnit, class Table>
__device__ __forceinline__ int elements_of(const Table& table, int i, uint32_t unit) {
  return unit + 1 == table.first_unit[i + 1] ? table.last_elements[i] + 1 : kUnit;
}

// As many parameters of a step as fit: a warp's units are blocks of kStateBlock elements. 2^32 blocks, 10 TB, fit in.
template <int kStateCount>
struct UpdateTable {
  static constexpr int kStates = kStateCount;
  static constexpr int kMostConstants = 16;
  static constexpr int kHeadBytes = kMostConstants * sizeof(UpdateConstants) + 24, kEntryBytes = 28 + 16 * kStates;
  static constexpr int kCapacity = (kMostParameterBytes - kHeadBytes - 8) / kEntryBytes;

  UpdateConstants constants[kMostConstants];  // distinct ones
  const float* grad_scale;                    // or null
  int32_t count, constants_count;
  bool is_stochastic;
  void* params[kCapacity];
  const void* grads[kCapacity];
  void* values[kStates][kCapacity];
  float* absmax[kStates][kCapacity];  // null: the state is fp32
  uint32_t first_unit[kCapacity + 1];
  uint32_t rounding_keys[kCapacity];
  uint8_t constants_of[kCapacity];                          // the place of an entry's constants
  uint8_t param_dtypes[kCapacity], grad_dtypes[kCapacity];  // Dtype
  uint8_t last_elements[kCapacity];                         // of an entry's last unit, minus one

  // False where the table is full.
  bool add(const ParameterUpdate& update) {
    int place = 0;
    while (place < constants_count && std::memcmp(&constants[place], &update.constants, sizeof(UpdateConstants)) != 0)
      ++place;
    if (count == kCapacity || place == kMostConstants) return false;
    constants_count = std::max(constants_count, place + 1);
    constants[place] = update.constants;
    params[count] = update.param;
    grads[count] = update.grad;
    for (int state = 0; state < kStates; ++state) {
      values[state][count] = update.states[state].values;
      absmax[state][count] = update.states[state].absmax;
    }
    rounding_keys[count] = update.rounding_key;
    constants_of[count] = static_cast<uint8_t>(place);
    param_dtypes[count] = static_cast<uint8_t>(update.param_dtype);
    grad_dtypes[count] = static_cast<uint8_t>(update.grad_dtype);
    last_elements[count] = static_cast<uint8_t>((update.numel - 1) % kStateBlock);
    first_unit[count + 1] = first_unit[count] + static_cast<uint32_t>(ceil_div(update.numel, kStateBlock));
    ++count;
    return true;
  }
};

struct SumTable {
  static constexpr int kCapacity = (kMostParameterBytes - 32) / 15;

  const void* values[kCapacity];
  uint32_t first_unit[kCapacity + 1];  // units are tiles of kSumTile elements
  int32_t count;
  uint16_t last_elements[kCapacity];
  uint8_t dtypes[kCapacity];

  bool add(const SumOfSquaresArgs::Piece& piece) {
    if (count == kCapacity) return false;
    values[count] = piece.values;
    last_elements[count] = static_cast<uint16_t>((piece.numel - 1) % kSumTile);
    dtypes[count] = static_cast<uint8_t>(piece.dtype);
    first_unit[count + 1] = first_unit[count] + static_cast<uint32_t>(ceil_div(piece.numel, kSumTile));
    ++count;
    return true;
  }
};

// launch(table) for tables that hold all of the items that have elements, in their order. Returns the first error.
template <class Table, class Item, class Launch>
int for_tables(const Table& empty, const Item* items, int64_t count, const Launch& launch) {
  Table table = empty;
  int code = cudaSuccess;
  for (int64_t i = 0; i < count && code == cudaSuccess; ++i) {
    if (items[i].numel == 0 || table.add(items[i])) continue;
    code = launch(table);
    table = empty;
    table.add(items[i]);
  }
  return code == cudaSuccess && table.count > 0 ? launch(table) : code;
}

// --- a lane's elements of one tensor, as they are in memory

// Elements have 4 bytes or kNarrow.
template <int kNarrow>
struct Elements {
  using Narrow = std::conditional_t<kNarrow == 2, uint16_t, uint8_t>;

  uint32_t words[kFours][4];  // of four elements: as many words as an element has bytes

  // From a block's first element on, of which there are `count`; what is past the end is zeros.
  __device__ __forceinline__ void load(const void* block, bool is_fp32, int count) {
    if (is_fp32) {
      load_as(static_cast<const uint32_t*>(block), count);
    } else {
      load_as(static_cast<const Narrow*>(block), count);
    }
  }

  __device__ __forceinline__ void store(void* block, bool is_fp32, int count) const {
    if (is_fp32) {
      store_as(static_cast<uint32_t*>(block), count);
    } else {
      store_as(static_cast<Narrow*>(block), count);
    }
  }

 private:
  template <class T>
  using Four = std::conditional_t<sizeof(T) == 4, uint4, std::conditional_t<sizeof(T) == 2, uint2, uint1>>;

  template <class T>
  static __device__ __forceinline__ bool is_wide(const T* block, int count) {
    return count == kStateBlock && reinterpret_cast<uintptr_t>(block) % sizeof(Four<T>) == 0;
  }

  template <class T>
  __device__ __forceinline__ void load_as(const T* block, int count) {
    constexpr int kBytes = sizeof(T);
    const int lane = threadIdx.x % kWarpSize;
    const bool wide = is_wide(block, count);
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      uint32_t (&to)[4] = words[four];
      if (wide) {
        const Four<T> v = *reinterpret_cast<const Four<T>*>(block + state_element(lane, 4 * four));
        to[0] = v.x;
        if constexpr (kBytes >= 2) to[1] = v.y;
        if constexpr (kBytes == 4) to[2] = v.z, to[3] = v.w;
      } else {
#pragma unroll
        for (int word = 0; word < kBytes; ++word) to[word] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int element = state_element(lane, 4 * four + i);
          if (element < count) to[i * kBytes / 4] |= uint32_t{block[element]} << i * kBytes % 4 * 8;
        }
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void store_as(T* block, int count) const {
    constexpr int kBytes = sizeof(T);
    const int lane = threadIdx.x % kWarpSize;
    const bool wide = is_wide(block, count);
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const uint32_t (&from)[4] = words[four];
      if (wide) {
        Four<T> v;
        v.x = from[0];
        if constexpr (kBytes >= 2) v.y = from[1];
        if constexpr (kBytes == 4) v.z = from[2], v.w = from[3];
        *reinterpret_cast<Four<T>*>(block + state_element(lane, 4 * four)) = v;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int element = state_element(lane, 4 * four + i);
          if (element < count) block[element] = static_cast<T>(from[i * kBytes / 4] >> i * kBytes % 4 * 8);
        }
      }
    }
  }
};

using Values = float[kLaneElements];

__device__ __forceinline__ int bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Rounds to bf16, up or down by the key and the element's number in its tensor. What is not finite stays.
__device__ __forceinline__ uint32_t round_stochastically(float value, uint32_t key, uint64_t element) {
  const uint32_t bits = __float_as_uint(value), nearest = ptx::narrow_bf16x2(value, 0.0f);
  return (bits & 0x7f800000) == 0x7f800000 ? nearest : (bits + rounding_bits(key, element)) >> 16;
}

// Of a parameter or gradient.
struct Floats : Elements<2> {
  __device__ __forceinline__ void unpack(Dtype dtype, Values& values) const {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const auto half = static_cast<uint16_t>(words[i / 4][i % 4 / 2] >> i % 2 * 16);
      if (dtype == Dtype::f32) {
        values[i] = __uint_as_float(words[i / 4][i % 4]);
      } else {
        values[i] = dtype == Dtype::bf16 ? widen(Bf16{half}) : widen(Fp16{half});
      }
    }
  }

  __device__ __forceinline__ void pack(const Values& values, Dtype dtype) {
#pragma unroll
    for (int i = 0; i < kLaneElements; i += 2) {
      if (dtype == Dtype::f32) {
        words[i / 4][i % 4] = __float_as_uint(values[i]);
        words[i / 4][i % 4 + 1] = __float_as_uint(values[i + 1]);
      } else {
        words[i / 4][i % 4 / 2] = dtype == Dtype::bf16 ? narrow_pair<Bf16>(values[i], values[i + 1])
                                                       : narrow_pair<Fp16>(values[i], values[i + 1]);
      }
    }
  }

  // bf16; block: its first element's number.
  __device__ __forceinline__ void pack_stochastically(const Values& values, uint32_t key, uint64_t block) {
    const auto rounded = [&](int i) {
      const auto element = static_cast<uint32_t>(state_element(threadIdx.x % kWarpSize, i));
      return round_stochastically(values[i], key, block + element);
    };
#pragma unroll
    for (int i = 0; i < kLaneElements; i += 2) words[i / 4][i % 4 / 2] = rounded(i) | rounded(i + 1) << 16;
  }
};

// Of a state, in fp32 or codes.
struct StateElements : Elements<1> {
  __device__ __forceinline__ void unpack(Values& values) const {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) values[i] = __uint_as_float(words[i / 4][i % 4]);
  }

  __device__ __forceinline__ void pack(const Values& values) {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) words[i / 4][i % 4] = __float_as_uint(values[i]);
  }
};

// --- states

// What codes mean, and how they are found, by whether the state has negative values.
__device__ const StateMap device_state_maps[2] = {kStateMaps[0], kStateMaps[1]};
__device__ const BoundaryTree device_state_boundaries[2] = {make_boundary_tree(kStateBoundaries[0]),
                                                            make_boundary_tree(kStateBoundaries[1])};

// The same in shared memory.
struct Codes {
  float map[256];
  BoundaryTree boundaries;

  // All threads of the block call this; a barrier has to follow.
  __device__ __forceinline__ void fill(bool is_signed) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x))
      map[i] = device_state_maps[is_signed].entries[i];
    boundaries.fill(device_state_boundaries[is_signed]);
  }

  __device__ __forceinline__ void decode(const StateElements& from, float absmax, Values& values) const {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) values[i] = __fmul_rn(map[from.words[i / 4][0] >> i % 4 * 8 & 255], absmax);
  }

  // Returns the absmax of the block, which has `count` elements.
  __device__ __forceinline__ float encode(const Values& values, int count, StateElements& to) const {
    const int lane = threadIdx.x % kWarpSize;
    Magnitude<float> largest;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i)
      if (state_element(lane, i) < count) largest.take(values[i]);
    largest.reduce(kWarpSize);
    const float absmax = largest.value(), inverse = __frcp_rn(absmax);
    const uint32_t base = ptx::shared_address(boundaries.nodes);
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      uint32_t reversed = 0;  // all 32 bits
#pragma unroll
      for (int i = 0; i < 4; ++i)
        reversed |= BoundaryTree::find_reversed(__fmul_rn(values[4 * four + i], inverse), base) << (24 - 8 * i);
      to.words[four][0] = absmax == 0.0f ? 0 : __brev(reversed);
    }
    return absmax;
  }
};

// --- rules: one element's step

template <Rule kRule>
constexpr int kStatesOf = kRule == Rule::adamw ? 2 : 1;

template <Rule kRule>
__device__ __forceinline__ float updated(const UpdateConstants& c, float param, float grad, float& state1,
                                         float& state2) {
  if constexpr (kRule == Rule::adamw) {
    state1 = __fmaf_rn(grad, c.one_minus_beta1, __fmul_rn(state1, c.beta1));
    state2 = __fmaf_rn(__fmul_rn(grad, c.one_minus_beta2), grad, __fmul_rn(state2, c.beta2));
    const float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(state2), c.second_scale), c.eps);
    return __fsub_rn(__fmul_rn(param, c.decay), __fdiv_rn(__fmul_rn(state1, c.step_size), denominator));
  } else {
    const float mixed = __fmaf_rn(grad, c.one_minus_beta1, __fmul_rn(state1, c.beta1));
    const float direction = static_cast<float>((mixed > 0.0f) - (mixed < 0.0f));
    state1 = __fmaf_rn(grad, c.one_minus_beta2, __fmul_rn(state1, c.beta2));
    return __fsub_rn(__fmul_rn(param, c.decay), __fmul_rn(direction, c.step_size));
  }
}

template <Rule kRule>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    optimizer_step_kernel(const __grid_constant__ UpdateTable<kStatesOf<kRule>> table) {
  constexpr int kStates = kStatesOf<kRule>;
  __shared__ Codes codes[kStates];
#pragma unroll
  for (int s = 0; s < kStates; ++s) codes[s].fill(s == 0);
  __syncthreads();

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float grad_scale = table.grad_scale ? *table.grad_scale : 1.0f;  // times 1 changes nothing
  const uint32_t units = table.first_unit[table.count];
  int entry = 0;
  for (uint32_t unit = blockIdx.x * kWarps + warp; unit < units; unit += gridDim.x * kWarps) {
    entry = entry_of(table, unit, entry);
    const int count = elements_of<kStateBlock>(table, entry, unit);
    const uint32_t block = unit - table.first_unit[entry];
    const auto at = [block](auto* begin, int bytes) {
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(begin)>>, const char, char>;
      return static_cast<Byte*>(begin) + int64_t{block} * kStateBlock * bytes;
    };

    // All loads before the first use of one.
    const auto param_dtype = static_cast<Dtype>(table.param_dtypes[entry]);
    const auto grad_dtype = static_cast<Dtype>(table.grad_dtypes[entry]);
    auto* const param = at(table.params[entry], bytes_of(param_dtype));
    Floats params, grads;
    StateElements states[kStates];
    float scales[kStates];
    params.load(param, param_dtype == Dtype::f32, count);
    grads.load(at(table.grads[entry], bytes_of(grad_dtype)), grad_dtype == Dtype::f32, count);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const float* absmax = table.absmax[s][entry];
      states[s].load(at(table.values[s][entry], absmax ? 1 : 4), absmax == nullptr, count);
      scales[s] = absmax ? absmax[block] : 1.0f;
    }

    Values param_values, grad_values, state_values[2];
    params.unpack(param_dtype, param_values);
    grads.unpack(grad_dtype, grad_values);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (table.absmax[s][entry]) {
        codes[s].decode(states[s], scales[s], state_values[s]);
      } else {
        states[s].unpack(state_values[s]);
      }
    }
    const UpdateConstants& constants = table.constants[table.constants_of[entry]];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i)
      param_values[i] = updated<kRule>(constants, param_values[i], __fmul_rn(grad_values[i], grad_scale),
                                       state_values[0][i], state_values[1][i]);

    if (table.is_stochastic && param_dtype == Dtype::bf16) {
      params.pack_stochastically(param_values, table.rounding_keys[entry], uint64_t{block} * kStateBlock);
    } else {
      params.pack(param_values, param_dtype);
    }
    params.store(param, param_dtype == Dtype::f32, count);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      float* absmax = table.absmax[s][entry];
      if (absmax) {
        scales[s] = codes[s].encode(state_values[s], count, states[s]);
        if (lane == 0) absmax[block] = scales[s];
      } else {
        states[s].pack(state_values[s]);
      }
      states[s].store(at(table.values[s][entry], absmax ? 1 : 4), absmax == nullptr, count);
    }
  }
}

template <Rule kRule>
int launch_step(const OptimizerStepArgs& args, Stream stream) {
  using Table = UpdateTable<kStatesOf<kRule>>;
  static_assert(sizeof(Table) <= kMostParameterBytes);
  Table empty{};
  empty.grad_scale = args.grad_scale;
  empty.is_stochastic = args.stochastic;
  return for_tables(empty, args.updates, args.count, [stream](const Table& table) -> int {
    const unsigned blocks = grid_for(table.first_unit[table.count], kWarps, kBlocksPerProcessor);
    optimizer_step_kernel<kRule><<<blocks, kThreads, 0, stream>>>(table);
    return cudaGetLastError();
  });
}

// --- sum_of_squares

// Adds to `sum` the squares of a thread's elements of a tile, of which there are `count`.
template <class T>
__device__ __forceinline__ void add_squares(const void* values, uint32_t tile, int count, double& sum) {
  constexpr int kCount = kPerAccess<T>, kAccesses = kSumTile / kThreads / kCount;
  const T* elements = static_cast<const T*>(values) + int64_t{tile} * kSumTile;
  const bool wide = count == kSumTile && reinterpret_cast<uintptr_t>(elements) % kAccessBytes == 0;
  const auto add = [&sum](float value) { sum = __fma_rn(double{value}, double{value}, sum); };
  if (wide) {
    uint4 raw[kAccesses];
#pragma unroll
    for (int access = 0; access < kAccesses; ++access)
      raw[access] = ptx::load_global_16(elements + (access * kThreads + threadIdx.x) * kCount);
#pragma unroll
    for (int access = 0; access < kAccesses; ++access) {
      float widened[kCount];
      cuda::widen<T>(raw[access], widened);
#pragma unroll
      for (const float value : widened) add(value);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kAccesses * kCount; ++i) {  // in the same order
      const int element = static_cast<int>(i / kCount * kThreads + threadIdx.x) * kCount + i % kCount;
      if (element < count) add(widen(elements[element]));
    }
  }
}

// The sum over a block of threads, in thread 0.
__device__ __forceinline__ double sum_threads(double sum) {
  __shared__ double of_warps[kWarps];
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  sum = 0.0;
#pragma unroll
  for (const double of_warp : of_warps) sum += of_warp;
  return sum;
}

// earlier: how many partial sums there are of earlier tables.
__global__ void __launch_bounds__(kThreads)
    square_sums_kernel(const __grid_constant__ SumTable table, unsigned earlier, double* partial_sums) {
  const uint32_t tiles = table.first_unit[table.count];
  double sum = 0.0;
  int entry = 0;
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    entry = entry_of(table, tile, entry);
    const int count = elements_of<kSumTile>(table, entry, tile);
    const uint32_t tile_of_entry = tile - table.first_unit[entry];
    const auto dtype = static_cast<Dtype>(table.dtypes[entry]);
    if (dtype == Dtype::f32) {
      add_squares<float>(table.values[entry], tile_of_entry, count, sum);
    } else if (dtype == Dtype::bf16) {
      add_squares<Bf16>(table.values[entry], tile_of_entry, count, sum);
    } else {
      add_squares<Fp16>(table.values[entry], tile_of_entry, count, sum);
    }
  }
  sum = sum_threads(sum);
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = blockIdx.x < earlier ? partial_sums[blockIdx.x] + sum : sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const double* partial_sums, unsigned count, double* to) {
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) sum += partial_sums[i];
  sum = sum_threads(sum);
  if (threadIdx.x == 0) *to = sum;
}

}  // namespace

int optimizer_step(const OptimizerStepArgs& args, Stream stream) {
  return args.rule == Rule::adamw ? launch_step<Rule::adamw>(args, stream) : launch_step<Rule::lion>(args, stream);
}

int sum_of_squares(const SumOfSquaresArgs& args, double* partial_sums, Stream stream) {
  static_assert(sizeof(SumTable) + 16 <= kMostParameterBytes);
  unsigned sums = 0;
  const int code = for_tables(SumTable{}, args.pieces, args.count, [&](const SumTable& table) -> int {
    const unsigned blocks = sum_blocks(table.first_unit[table.count]);
    square_sums_kernel<<<blocks, kThreads, 0, stream>>>(table, sums, partial_sums);
    sums = std::max(sums, blocks);
    return cudaGetLastError();
  });
  if (code != cudaSuccess) return code;
  sum_partials_kernel<<<1, kThreads, 0, stream>>>(partial_sums, sums, args.sum);
  return cudaGetLastError();
}

}  // namespace lowbit::cuda

// optimizer_step and sum_of_squares: one pass over all tensors of a call.
//
// Blocks of every tensor form one range that threads share, so that hundreds of small tensors cost one launch. The
// reference says what each rounding is (lowbit/reference_optim.py).
#pragma once

#include "../optim.h"
#include "quantize.h"
#include "support.h"

namespace lowbit::cpu {

// The hardware's prefetcher stops at each page.
static inline void prefetch_ahead(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + kQuantizeAhead); }

// The blocks of many arrays as one range. Of Isa, so that each instruction set keeps its own copy.
template <class Isa>
class BlocksOfAll {
 public:
  template <class Array>
  BlocksOfAll(const Array* arrays, int64_t count, int64_t block_size) : begins_(static_cast<size_t>(count) + 1) {
    for (size_t i = 0; i + 1 < begins_.size(); ++i) begins_[i + 1] = begins_[i] + ceil_div(arrays[i].numel, block_size);
  }

  int64_t count() const { return begins_.back(); }

  // function(i, first, last) for each array i that has blocks from `begin` to `end` of the range, and which of its own
  // these are.
  template <class Function>
  void visit(int64_t begin, int64_t end, const Function& function) const {
    const auto after = std::upper_bound(begins_.begin(), begins_.end(), begin);
    for (auto i = static_cast<size_t>(after - begins_.begin()) - 1; begin < end; ++i) {
      const int64_t last = std::min(end, begins_[i + 1]);
      if (begin < last) function(i, begin - begins_[i], last - begins_[i]);
      begin = last;
    }
  }

 private:
  std::vector<int64_t> begins_;  // where each array's blocks begin, and the end
};

// --- states in 8 bits

// The code of each position, by whether there is a sign.
static inline const std::vector<uint8_t>& state_code_table(bool is_signed) {
  static const std::vector<uint8_t> tables[2] = {codes_of_positions(kStateBoundaries[0].first_above),
                                                 codes_of_positions(kStateBoundaries[1].first_above)};
  return tables[is_signed];
}

template <class Isa>
void decode_state(const uint8_t* codes, int64_t count, float absmax, bool is_signed, float* values) {
  const float* map = kStateMaps[is_signed].entries;
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes)
    Isa::store(values + i, Isa::mul(Isa::look_up(map, codes + i), Isa::broadcast(absmax)));
  for (; i < count; ++i) values[i] = map[codes[i]] * absmax;
}

// Returns the absmax. Reads whole vectors of `values`.
template <class Isa>
float encode_state(const float* values, int64_t count, bool is_signed, uint8_t* codes) {
  const float absmax = float_of(Isa::absmax_bits(values, count));
  if (absmax == 0.0f) {
    std::memset(codes, 0, static_cast<size_t>(count));
    return absmax;
  }
  const uint8_t* table = state_code_table(is_signed).data();
  const auto inverse = Isa::broadcast(1.0f / absmax);
  int32_t positions[kStateBlock];
  for (int64_t i = 0; i < count; i += Isa::kLanes)
    Isa::store_positions(Isa::mul(Isa::load(values + i), inverse), positions + i);
  for (int64_t i = 0; i < count; ++i) codes[i] = table[positions[i]];
  return absmax;
}

// --- the rules, on `count` elements rounded up to whole vectors

template <class Isa>
void adamw(const UpdateConstants& c, float grad_scale, int64_t count, const float* grad, float* param, float* state1,
           float* state2) {
  using Vec = typename Isa::Vec;
  for (int64_t i = 0; i < count; i += Isa::kLanes) {
    for (const float* operand :
         {grad, static_cast<const float*>(param), static_cast<const float*>(state1), static_cast<const float*>(state2)})
      prefetch_ahead(operand + i);
    const Vec g = Isa::mul(Isa::load(grad + i), Isa::broadcast(grad_scale));
    const Vec m =
        Isa::fused(g, Isa::broadcast(c.one_minus_beta1), Isa::mul(Isa::load(state1 + i), Isa::broadcast(c.beta1)));
    const Vec v = Isa::fused(Isa::mul(g, Isa::broadcast(c.one_minus_beta2)), g,
                             Isa::mul(Isa::load(state2 + i), Isa::broadcast(c.beta2)));
    const Vec denominator = Isa::add(Isa::mul(Isa::sqrt(v), Isa::broadcast(c.second_scale)), Isa::broadcast(c.eps));
    const Vec change = Isa::div(Isa::mul(m, Isa::broadcast(c.step_size)), denominator);
    Isa::store(param + i, Isa::sub(Isa::mul(Isa::load(param + i), Isa::broadcast(c.decay)), change));
    Isa::store(state1 + i, m);
    Isa::store(state2 + i, v);
  }
}

template <class Isa>
void lion(const UpdateConstants& c, float grad_scale, int64_t count, const float* grad, float* param, float* state) {
  using Vec = typename Isa::Vec;
  for (int64_t i = 0; i < count; i += Isa::kLanes) {
    const Vec g = Isa::mul(Isa::load(grad + i), Isa::broadcast(grad_scale)), old = Isa::load(state + i);
    const Vec direction = Isa::fused(g, Isa::broadcast(c.one_minus_beta1), Isa::mul(old, Isa::broadcast(c.beta1)));
    const Vec change = Isa::mul(Isa::sign(direction), Isa::broadcast(c.step_size));
    Isa::store(param + i, Isa::sub(Isa::mul(Isa::load(param + i), Isa::broadcast(c.decay)), change));
    Isa::store(state + i, Isa::fused(g, Isa::broadcast(c.one_minus_beta2), Isa::mul(old, Isa::broadcast(c.beta2))));
  }
}

// --- blocks of operands

// `count` values as fp32: where they are, if they are whole vectors of that, else in `copy`, filled up with zeros.
template <class Isa>
const float* widened(const void* values, Dtype dtype, int64_t count, float* copy) {
  const int64_t whole = round_up(count, Isa::kLanes);
  if (dtype == Dtype::f32 && count == whole) return static_cast<const float*>(values);
  for_dtype(dtype, [&]<class T>(T) { load_row<Isa>(static_cast<const T*>(values), count, copy); });
  std::fill(copy + count, copy + whole, 0.0f);
  return copy;
}

// Rounds what widened() has copied back to where it is from.
template <class Isa>
void put_back(const float* values, int64_t count, void* to, Dtype dtype) {
  if (values != to) for_dtype(dtype, [&]<class T>(T) { store_row<Isa>(values, count, static_cast<T*>(to)); });
}

// Elements from `first` on, which is a multiple of kStateBlock, of the parameter with this key.
template <class Isa>
void round_stochastically(const float* values, int64_t count, uint32_t key, int64_t first, Bf16* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(values[i]);
    const bool is_finite = (bits & 0x7f800000) != 0x7f800000;
    Bf16 nearest;
    from_float(values[i], &nearest);
    const uint32_t random = rounding_bits(key, static_cast<uint64_t>(first + i));
    to[i].bits = is_finite ? static_cast<uint16_t>((bits + random) >> 16) : nearest.bits;
  }
}

template <class Isa>
const float* state_values(const State& state, int64_t block, int64_t count, bool is_signed, float* copy) {
  const int64_t first = block * kStateBlock;
  if (!state.absmax) return widened<Isa>(static_cast<const float*>(state.values) + first, Dtype::f32, count, copy);
  decode_state<Isa>(static_cast<const uint8_t*>(state.values) + first, count, state.absmax[block], is_signed, copy);
  std::fill(copy + count, copy + round_up(count, Isa::kLanes), 0.0f);
  return copy;
}

template <class Isa>
void put_state_back(const float* values, int64_t block, int64_t count, bool is_signed, const State& state) {
  const int64_t first = block * kStateBlock;
  if (state.absmax) {
    uint8_t* codes = static_cast<uint8_t*>(state.values) + first;
    state.absmax[block] = encode_state<Isa>(values, count, is_signed, codes);
  } else {
    put_back<Isa>(values, count, static_cast<float*>(state.values) + first, Dtype::f32);
  }
}

// Blocks `begin` to `end` of a parameter.
template <class Isa>
void step_blocks(const OptimizerStepArgs& args, const ParameterUpdate& update, int64_t begin, int64_t end) {
  const float grad_scale = args.grad_scale ? *args.grad_scale : 1.0f;
  alignas(64) float copies[4][kStateBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kStateBlock, count = std::min(kStateBlock, update.numel - first);
    void* param_at = element_of(update.param, update.param_dtype, first);
    const void* grad_at = element_of(update.grad, update.grad_dtype, first);
    const float* grad = widened<Isa>(grad_at, update.grad_dtype, count, copies[0]);
    // Widened in place or into a copy, both of which may be written to.
    float* param = const_cast<float*>(widened<Isa>(param_at, update.param_dtype, count, copies[1]));
    float* states[2];
    const int state_count = args.rule == Rule::adamw ? 2 : 1;
    for (int i = 0; i < state_count; ++i)
      states[i] = const_cast<float*>(state_values<Isa>(update.states[i], block, count, i == 0, copies[2 + i]));
    if (args.rule == Rule::adamw) {
      adamw<Isa>(update.constants, grad_scale, count, grad, param, states[0], states[1]);
    } else {
      lion<Isa>(update.constants, grad_scale, count, grad, param, states[0]);
    }
    for (int i = 0; i < state_count; ++i) put_state_back<Isa>(states[i], block, count, i == 0, update.states[i]);
    if (args.stochastic && update.param_dtype == Dtype::bf16) {
      round_stochastically<Isa>(param, count, update.rounding_key, first, static_cast<Bf16*>(param_at));
    } else {
      put_back<Isa>(param, count, param_at, update.param_dtype);
    }
  }
}

template <class Isa>
void step(const OptimizerStepArgs& args, const ParallelFor& parallel_for) {
  const BlocksOfAll<Isa> blocks(args.updates, args.count, kStateBlock);
  parallel_for(blocks.count(), 32, [&](int64_t begin, int64_t end) {
    blocks.visit(begin, end,
                 [&](size_t i, int64_t first, int64_t last) { step_blocks<Isa>(args, args.updates[i], first, last); });
  });
}

// --- the sum of squares

constexpr int64_t kSquaresBlock = 4096;

// In an order that every instruction set keeps: sixteen partial sums.
template <class Isa, class T>
double squares_of(const T* values, int64_t count) {
  constexpr int64_t kSums = 16;
  typename Isa::Squares squares[kSums / Isa::kLanes];
  const auto add = [&]<class From>(const From* from) {
    for (int64_t j = 0; j < kSums; j += Isa::kLanes) squares[j / Isa::kLanes].add(Isa::load(from + j));
  };
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    prefetch_ahead(values + i);
    add(values + i);
  }
  float rest[kSums] = {};
  load_row<Isa>(values + i, count - i, rest);
  add(rest);
  double sums[kSums], sum = 0.0;
  for (int64_t j = 0; j < kSums; j += Isa::kLanes) squares[j / Isa::kLanes].store(sums + j);
  for (const double part : sums) sum += part;
  return sum;
}

template <class Isa>
void sum_of_squares(const SumOfSquaresArgs& args, const ParallelFor& parallel_for) {
  const BlocksOfAll<Isa> blocks(args.pieces, args.count, kSquaresBlock);
  std::vector<double> sums(static_cast<size_t>(blocks.count()));
  parallel_for(blocks.count(), 8, [&](int64_t begin, int64_t end) {
    double* sum = sums.data() + begin;
    blocks.visit(begin, end, [&](size_t i, int64_t first, int64_t last) {
      const auto& piece = args.pieces[i];
      for_dtype(piece.dtype, [&]<class T>(T) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t start = block * kSquaresBlock;
          const T* values = static_cast<const T*>(piece.values) + start;
          *sum++ = squares_of<Isa>(values, std::min(kSquaresBlock, piece.numel - start));
        }
      });
    });
  });
  // In their order, whatever thread computed them.
  *args.sum = 0.0;
  for (const double sum : sums) *args.sum += sum;
}

}  // namespace lowbit::cpu

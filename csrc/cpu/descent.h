// gptq_block and descend_block: codes and the scale of one block of columns, chosen under a Hessian.
//
// A row of the weight is a lane, so a vector holds one column of kLanes rows, and every lane takes the reference's
// steps in the reference's order (lowbit/reference_descent.py): equal bits from every instruction set and number of
// threads. A column is rounded once its value is known, which depends on the columns before it: a chain of some fifty
// cycles. A few candidate scales are tried at once, so that one's chain runs while another's waits.
#pragma once

#include "support.h"

namespace lowbit::cpu {

// A tile: kLanes rows of a matrix [rows, columns], transposed, so that column j is at data + j * kLanes. Rows past the
// last are zeros.
template <class Isa>
class Tile {
 public:
  explicit Tile(int64_t columns) : columns_(columns), scratch_(columns * Isa::kLanes) {}

  void load(const float* matrix, int64_t first, int64_t rows) {
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) {
      const float* row = matrix + (first + lane) * columns_;
      for (int64_t j = 0; j < columns_; ++j)
        scratch_.data()[j * Isa::kLanes + lane] = first + lane < rows ? row[j] : 0.0f;
    }
  }
  void store(float* matrix, int64_t first, int64_t rows) const {
    for (int64_t lane = 0; lane < std::min(Isa::kLanes, rows - first); ++lane) {
      float* row = matrix + (first + lane) * columns_;
      for (int64_t j = 0; j < columns_; ++j) row[j] = scratch_.data()[j * Isa::kLanes + lane];
    }
  }
  typename Isa::Vec operator[](int64_t j) const { return Isa::load(scratch_.data() + j * Isa::kLanes); }
  float at(int64_t j, int64_t lane) const { return scratch_.data()[j * Isa::kLanes + lane]; }
  void set(int64_t j, const typename Isa::Vec& v) { Isa::store(scratch_.data() + j * Isa::kLanes, v); }

 private:
  const int64_t columns_;
  Scratch scratch_;
};

// Scales for each row, of which one's chain of operations runs while another's waits, and their inverses.
template <class Isa, int K>
struct Tried {
  typename Isa::Vec scale[K], inverse[K];
};

// All candidate scales of a tile. A scale whose inverse would overflow has none: all codes are then zero's.
template <class Isa>
class Candidates {
 public:
  explicit Candidates(int64_t count) : count_(count), scales_(count), inverses_(count) {}

  void load(const float* matrix, int64_t first, int64_t rows) {
    scales_.load(matrix, first, rows);
    for (int64_t c = 0; c < count_; ++c) {
      float inverse[Isa::kLanes];
      Isa::store(inverse, scales_[c]);
      for (float& value : inverse) value = value >= kTinyAbsmax || value <= -kTinyAbsmax ? 1.0f / value : 0.0f;
      inverses_.set(c, Isa::load(inverse));
    }
  }
  int64_t count() const { return count_; }

  // K of them from number c on. Past the last that one again, which changes no choice.
  template <int K>
  Tried<Isa, K> from(int64_t c) const {
    Tried<Isa, K> tried;
    for (int k = 0; k < K; ++k) {
      tried.scale[k] = scales_[std::min(c + k, count_ - 1)];
      tried.inverse[k] = inverses_[std::min(c + k, count_ - 1)];
    }
    return tried;
  }
  // Each lane's own.
  Tried<Isa, 1> chosen(const int32_t (&choice)[Isa::kLanes]) const {
    float scale[Isa::kLanes], inverse[Isa::kLanes];
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) {
      scale[lane] = scales_.at(choice[lane], lane);
      inverse[lane] = inverses_.at(choice[lane], lane);
    }
    return {{Isa::load(scale)}, {Isa::load(inverse)}};
  }

 private:
  const int64_t count_;
  Tile<Isa> scales_, inverses_;
};

// Each lane's least loss so far, and the candidate that has it, the first of equal ones.
template <class Isa>
class Choice {
 public:
  using Vec = typename Isa::Vec;
  explicit Choice(float limit) : loss_(Isa::broadcast(limit)), candidate_(Isa::zero()) {}

  const Vec& loss() const { return loss_; }
  bool would_change(const Vec& loss) const {
    return Isa::any(Isa::select_less(loss, loss_, Isa::broadcast(1.0f), Isa::zero()));
  }
  void take(const Vec& loss, int64_t candidate) {
    candidate_ = Isa::select_less(loss, loss_, Isa::broadcast(static_cast<float>(candidate)), candidate_);
    loss_ = Isa::select_less(loss, loss_, loss, loss_);
  }
  void store(int32_t (&choice)[Isa::kLanes]) const {
    float numbers[Isa::kLanes];
    Isa::store(numbers, candidate_);
    for (int64_t lane = 0; lane < Isa::kLanes; ++lane) choice[lane] = static_cast<int32_t>(numbers[lane]);
  }

 private:
  Vec loss_, candidate_;
};

// Columns that are brought up to date together, and candidates tried at once: as many sums stay in registers as their
// product.
constexpr int kColumnsAtOnce = 4;
template <class Isa>
constexpr int kTriedAtOnce = Isa::kLanes == 16 ? 4 : 2;

// left[c][k] += minus[k] * row[c]: what a change of one column makes of a panel.
template <class Isa, int K>
inline __attribute__((always_inline)) void pass_on(const typename Isa::Vec (&minus)[K], const float* row,
                                                   typename Isa::Vec (&left)[kColumnsAtOnce][K], int begin = 0) {
#pragma GCC unroll 4
  for (int c = 0; c < kColumnsAtOnce; ++c) {
    if (c < begin) continue;
    const typename Isa::Vec factor = Isa::broadcast(row[c]);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) left[c][k] = Isa::fused(minus[k], factor, left[c][k]);
  }
}

template <class Isa>
class GptqTile {
 public:
  using Vec = typename Isa::Vec;
  explicit GptqTile(const GptqBlockArgs& args)
      : args_(args),
        nearest_(*args.format),
        weight_(args.columns),
        decoded_(args.columns),
        minus_errors_(args.columns * kTriedAtOnce<Isa>),
        candidates_(args.candidate_count) {}

  void operator()(int64_t first) {
    constexpr int K = kTriedAtOnce<Isa>;
    weight_.load(args_.weight, first, args_.rows);
    candidates_.load(args_.candidates, first, args_.rows);
    Choice<Isa> choice(std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < candidates_.count(); c += K) {
      Vec losses[K];
      if (!round(candidates_.template from<K>(c), choice, losses)) continue;
      for (int k = 0; k < K; ++k) choice.take(losses[k], std::min(c + k, candidates_.count() - 1));
    }
    // Each row once more with its scale: keeping every candidate's results would take longer.
    int32_t numbers[Isa::kLanes];
    choice.store(numbers);
    Vec loss[1];
    round(candidates_.chosen(numbers), Choice<Isa>(std::numeric_limits<float>::infinity()), loss);
    for (int64_t j = 0; j < args_.columns; ++j) weight_.set(j, Isa::sub(Isa::zero(), minus_errors_[j]));
    decoded_.store(args_.decoded, first, args_.rows);
    weight_.store(args_.errors, first, args_.rows);
    for (int64_t lane = 0; lane < std::min(Isa::kLanes, args_.rows - first); ++lane)
      args_.choice[first + lane] = numbers[lane];
  }

 private:
  // Rounds all columns with K scales, and says what each loses. False: none can be the choice of any row. Losses only
  // grow, so that this may be known before the last column.
  template <int K>
  bool round(const Tried<Isa, K>& tried, const Choice<Isa>& choice, Vec (&losses)[K]) {
    for (Vec& loss : losses) loss = Isa::zero();
    for (int64_t first = 0; first < args_.columns; first += kColumnsAtOnce) {
      const float* factor = args_.factor + first;
      Vec left[kColumnsAtOnce][K], minus[K];
      for (int c = 0; c < kColumnsAtOnce; ++c)
        for (int k = 0; k < K; ++k) left[c][k] = weight_[first + c];
      for (int64_t j = 0; j < first; ++j) {
        for (int k = 0; k < K; ++k) minus[k] = minus_errors_[j * K + k];
        pass_on<Isa>(minus, factor + j * args_.columns, left);
      }
#pragma GCC unroll 4
      for (int c = 0; c < kColumnsAtOnce; ++c) {
        const int64_t j = first + c;
        const Vec reciprocal = Isa::broadcast(1.0f / factor[j * args_.columns + c]);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          const Vec value = Isa::mul(nearest_(Isa::mul(left[c][k], tried.inverse[k])), tried.scale[k]);
          minus[k] = Isa::mul(Isa::sub(value, left[c][k]), reciprocal);
          losses[k] = Isa::fused(minus[k], minus[k], losses[k]);
          minus_errors_.set(j * K + k, minus[k]);
          if (K == 1) decoded_.set(j, value);
        }
        pass_on<Isa>(minus, factor + j * args_.columns, left, c + 1);
      }
      bool is_possible = K == 1;
      for (int k = 0; k < K; ++k) is_possible |= choice.would_change(losses[k]);
      if (!is_possible) return false;
    }
    return true;
  }

  const GptqBlockArgs& args_;
  const typename Isa::Nearest nearest_;
  Tile<Isa> weight_, decoded_, minus_errors_;
  Candidates<Isa> candidates_;
};

template <class Isa>
class DescentTile {
 public:
  using Vec = typename Isa::Vec;
  explicit DescentTile(const DescendBlockArgs& args)
      : args_(args),
        nearest_(*args.format),
        old_(args.columns),
        old_gradient_(args.columns),
        result_(args.columns),
        new_(args.columns * kTriedAtOnce<Isa>),
        gradient_(args.columns * kTriedAtOnce<Isa>),
        minus_steps_(args.sweeps * args.columns * kTriedAtOnce<Isa>),
        known_steps_(static_cast<size_t>(args.columns / kColumnsAtOnce)),
        candidates_(args.candidate_count) {}

  void operator()(int64_t first) {
    old_.load(args_.decoded, first, args_.rows);
    result_.load(args_.decoded, first, args_.rows);
    old_gradient_.load(args_.gradient, first, args_.rows);
    candidates_.load(args_.candidates, first, args_.rows);
    Choice<Isa> choice(0.0f);
    // Most codes of a block stay with its own scale, which makes it quick alone.
    try_candidates<1>(0, choice);
    for (int64_t c = 1; c < candidates_.count(); c += kTriedAtOnce<Isa>) try_candidates<kTriedAtOnce<Isa>>(c, choice);
    int32_t numbers[Isa::kLanes];
    choice.store(numbers);
    result_.store(args_.result, first, args_.rows);
    for (int64_t lane = 0; lane < std::min(Isa::kLanes, args_.rows - first); ++lane)
      args_.choice[first + lane] = numbers[lane];
  }

 private:
  template <int K>
  void try_candidates(int64_t first, Choice<Isa>& choice) {
    for (int64_t j = 0; j < args_.columns; ++j) {
      for (int k = 0; k < K; ++k) {
        new_.set(j * K + k, old_[j]);
        gradient_.set(j * K + k, old_gradient_[j]);
      }
    }
    stepped_.clear();
    std::fill(known_steps_.begin(), known_steps_.end(), 0);
    const Tried<Isa, K> tried = candidates_.template from<K>(first);
    for (int64_t sweep = 0; sweep < args_.sweeps; ++sweep)
      for (int64_t j = 0; j < args_.columns; j += kColumnsAtOnce) descend<K>(j, tried);
    Vec losses[K];
    sum_losses(losses);
    for (int k = 0; k < K; ++k) {
      if (!choice.would_change(losses[k])) continue;
      for (int64_t j = 0; j < args_.columns; ++j)
        result_.set(j, Isa::select_less(losses[k], choice.loss(), new_[j * K + k], result_[j]));
      choice.take(losses[k], std::min(first + k, candidates_.count() - 1));
    }
  }

  // The gradient of a panel after all steps so far. Each panel learns of them when it is looked at.
  template <int K>
  void bring_up_to_date(int64_t first, Vec (&left)[kColumnsAtOnce][K]) {
    for (int c = 0; c < kColumnsAtOnce; ++c)
      for (int k = 0; k < K; ++k) left[c][k] = gradient_[(first + c) * K + k];
    for (size_t step = known_steps_[static_cast<size_t>(first / kColumnsAtOnce)]; step < stepped_.size(); ++step) {
      Vec minus[K];
      for (int k = 0; k < K; ++k) minus[k] = minus_steps_[static_cast<int64_t>(step) * K + k];
      pass_on<Isa>(minus, args_.hessian + stepped_[step] * args_.columns + first, left);
    }
  }

  // The codes of a panel, one column after the other.
  template <int K>
  void descend(int64_t first, const Tried<Isa, K>& tried) {
    Vec left[kColumnsAtOnce][K];
    bring_up_to_date(first, left);
#pragma GCC unroll 4
    for (int c = 0; c < kColumnsAtOnce; ++c) {
      const int64_t j = first + c;
      const float* hessian = args_.hessian + j * args_.columns;
      const Vec reciprocal = Isa::broadcast(1.0f / hessian[j]);
      Vec value[K], minus[K];
      bool changes = false;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const Vec old = new_[j * K + k], target = Isa::fused(left[c][k], reciprocal, old);
        value[k] = Isa::mul(nearest_(Isa::mul(target, tried.inverse[k])), tried.scale[k]);
        minus[k] = Isa::sub(old, value[k]);
        changes |= Isa::any(minus[k]);
      }
      if (!changes) continue;
      for (int k = 0; k < K; ++k) {
        new_.set(j * K + k, value[k]);
        minus_steps_.set(static_cast<int64_t>(stepped_.size()) * K + k, minus[k]);
      }
      stepped_.push_back(j);
      pass_on<Isa>(minus, hessian + first, left);
    }
    for (int c = 0; c < kColumnsAtOnce; ++c)
      for (int k = 0; k < K; ++k) gradient_.set((first + c) * K + k, left[c][k]);
    known_steps_[static_cast<size_t>(first / kColumnsAtOnce)] = stepped_.size();
  }

  // By how much tr((W - Q) H (W - Q)^T) changes: c H c^T - 2 c g^T for the change c, since g has become g - c H.
  template <int K>
  void sum_losses(Vec (&losses)[K]) {
    for (Vec& loss : losses) loss = Isa::zero();
    for (int64_t first = 0; first < args_.columns; first += kColumnsAtOnce) {
      Vec left[kColumnsAtOnce][K];
      bring_up_to_date(first, left);
      for (int c = 0; c < kColumnsAtOnce; ++c) {
        const int64_t j = first + c;
        for (int k = 0; k < K; ++k) {
          const Vec minus_change = Isa::sub(old_[j], new_[j * K + k]);
          losses[k] = Isa::fused(minus_change, Isa::add(old_gradient_[j], left[c][k]), losses[k]);
        }
      }
    }
  }

  const DescendBlockArgs& args_;
  const typename Isa::Nearest nearest_;
  Tile<Isa> old_, old_gradient_, result_, new_, gradient_, minus_steps_;
  std::vector<int64_t> stepped_;     // the column of each step
  std::vector<size_t> known_steps_;  // of each panel: how many steps its gradient knows of
  Candidates<Isa> candidates_;
};

// Tiles of rows at least that a thread takes: what it allocates for them is then little.
constexpr int64_t kTilesAtOnce = 4;

template <class Isa>
void gptq_block(const GptqBlockArgs& args, const ParallelFor& parallel_for) {
  parallel_for(ceil_div(args.rows, Isa::kLanes), kTilesAtOnce, [&](int64_t begin, int64_t end) {
    GptqTile<Isa> round_tile(args);
    for (int64_t tile = begin; tile < end; ++tile) round_tile(tile * Isa::kLanes);
  });
}

template <class Isa>
void descend_block(const DescendBlockArgs& args, const ParallelFor& parallel_for) {
  parallel_for(ceil_div(args.rows, Isa::kLanes), kTilesAtOnce, [&](int64_t begin, int64_t end) {
    DescentTile<Isa> descend_tile(args);
    for (int64_t tile = begin; tile < end; ++tile) descend_tile(tile * Isa::kLanes);
  });
}

}  // namespace lowbit::cpu

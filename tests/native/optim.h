// The checks of the optimizers' kernels: against the rules in plain C++, bit for bit.
#pragma once

#include "../../csrc/optim.h"
#include "values.h"

namespace {

// One parameter of a step, with its own copies of what the step changes.
struct Parameter {
  Values param, grad;
  bool in_8_bits;
  Buffer<float> values[2], absmax[2];
  Buffer<uint8_t> codes[2];
  UpdateConstants constants;

  Parameter(int64_t numel, Dtype param_dtype, Dtype grad_dtype, bool in_8_bits, float magnitude, Random& random)
      : param(param_dtype, numel),
        grad(grad_dtype, numel),
        in_8_bits(in_8_bits),
        values{Buffer<float>(in_8_bits ? 0 : numel), Buffer<float>(in_8_bits ? 0 : numel)},
        absmax{Buffer<float>(in_8_bits ? blocks_of(numel) : 0), Buffer<float>(in_8_bits ? blocks_of(numel) : 0)},
        codes{Buffer<uint8_t>(in_8_bits ? numel : 0), Buffer<uint8_t>(in_8_bits ? numel : 0)},
        constants{0.99f, 0.9f, 0.1f, 0.999f, 0.001f, 0.01f, 1.5f, 1e-8f},
        numel(numel) {
    for (int64_t i = 0; i < numel; ++i) {
      param.set(i, random.normal());
      // The second block has no gradient, and then its first moments are -0 or 0.
      grad.set(i, i / kStateBlock == 1 ? 0.0f : random.normal() * magnitude);
      if (in_8_bits) {
        codes[0][i] = random.byte(), codes[1][i] = random.byte();
      } else {
        values[0][i] = random.normal() * magnitude, values[1][i] = std::fabs(random.normal()) * magnitude * magnitude;
      }
    }
    for (int64_t block = 0; block < absmax[0].size(); ++block) {
      absmax[0][block] = block == 1 ? 0.0f : magnitude;
      absmax[1][block] = block == 1 ? 0.0f : magnitude * magnitude;
    }
  }

  static int64_t blocks_of(int64_t numel) { return ceil_div(numel, kStateBlock); }

  ParameterUpdate update(Rule rule, uint32_t key) {
    const auto state = [&](int i) {
      return in_8_bits ? State{codes[i].data(), absmax[i].data()} : State{values[i].data(), nullptr};
    };
    return {.param = param.data(),
            .grad = grad.data(),
            .numel = numel,
            .states = {state(0), rule == Rule::adamw ? state(1) : State{}},
            .constants = constants,
            .rounding_key = key,
            .param_dtype = param.dtype,
            .grad_dtype = grad.dtype};
  }

  int64_t numel;
};

// A copy of what is stored now; buffers do not copy.
struct Stored {
  std::vector<float> param, values[2], absmax[2];
  std::vector<uint8_t> codes[2];
  explicit Stored(const Parameter& p) {
    for (int64_t i = 0; i < p.numel; ++i) param.push_back(p.param.at(i));
    for (int i = 0; i < 2; ++i) {
      values[i].assign(p.values[i].data(), p.values[i].data() + p.values[i].size());
      absmax[i].assign(p.absmax[i].data(), p.absmax[i].data() + p.absmax[i].size());
      codes[i].assign(p.codes[i].data(), p.codes[i].data() + p.codes[i].size());
    }
  }
  bool operator==(const Stored& other) const {
    bool same = equal(param, other.param);
    for (int i = 0; i < 2; ++i)
      same &= equal(values[i], other.values[i]) && equal(absmax[i], other.absmax[i]) && codes[i] == other.codes[i];
    return same;
  }
  static bool equal(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  }
};

// The code of the map's entry nearest to a position, the lower of two, by going through all entries.
uint8_t nearest_code(bool is_signed, int position) {
  const float value = static_cast<float>(position) / 32767.5f - 1.0f;
  int nearest = 0;
  for (int code = 1; code < 256; ++code) {
    const float* entries = kStateMaps[is_signed].entries;
    if (std::fabs(entries[code] - value) < std::fabs(entries[nearest] - value)) nearest = code;
  }
  return static_cast<uint8_t>(nearest);
}

const std::vector<uint8_t>& nearest_codes(bool is_signed) {
  static const auto made = [](bool with_sign) {
    std::vector<uint8_t> codes;
    for (int position = 0; position < 65536; ++position) codes.push_back(nearest_code(with_sign, position));
    return codes;
  };
  static const std::vector<uint8_t> of_magnitudes = made(false), of_signed = made(true);
  return is_signed ? of_signed : of_magnitudes;
}

// The step in plain C++, in place.
void expected_step(Stored& s, const Parameter& p, Rule rule, float grad_scale, bool stochastic, uint32_t key) {
  const UpdateConstants& c = p.constants;
  const int state_count = rule == Rule::adamw ? 2 : 1;
  std::vector<float> states[2];
  for (int i = 0; i < state_count; ++i) {
    for (int64_t j = 0; j < p.numel; ++j) {
      const size_t at = static_cast<size_t>(j), block = static_cast<size_t>(j / kStateBlock);
      states[i].push_back(p.in_8_bits ? kStateMaps[i == 0].entries[s.codes[i][at]] * s.absmax[i][block]
                                      : s.values[i][at]);
    }
  }
  for (int64_t j = 0; j < p.numel; ++j) {
    const size_t at = static_cast<size_t>(j);
    const float g = p.grad.at(j) * grad_scale, decayed = s.param[at] * c.decay;
    float &first = states[0][at], updated = 0;
    const float direction = std::fma(g, c.one_minus_beta1, first * c.beta1);
    if (rule == Rule::adamw) {
      float& second = states[1][at];
      first = direction;
      second = std::fma(g * c.one_minus_beta2, g, second * c.beta2);
      const float denominator = std::sqrt(second) * c.second_scale + c.eps;
      updated = decayed - first * c.step_size / denominator;
    } else {
      first = std::fma(g, c.one_minus_beta2, first * c.beta2);
      const float sign = direction > 0 ? 1.0f : direction < 0 ? -1.0f : 0.0f;
      updated = decayed - sign * c.step_size;
    }
    Values rounded(p.param.dtype, 1);
    if (stochastic && p.param.dtype == Dtype::bf16) {
      rounded.bf16[0].bits = static_cast<uint16_t>((bits_of(updated) + rounding_bits(key, at)) >> 16);
    } else {
      rounded.set(0, updated);
    }
    s.param[at] = rounded.at(0);
  }
  for (int i = 0; i < state_count; ++i) {
    if (!p.in_8_bits) s.values[i] = states[i];
    for (size_t block = 0; block < s.absmax[i].size(); ++block) {
      const size_t begin = block * kStateBlock, end = std::min(begin + kStateBlock, states[i].size());
      float absmax = 0;
      for (size_t j = begin; j < end; ++j) absmax = std::max(absmax, std::fabs(states[i][j]));
      s.absmax[i][block] = absmax;
      for (size_t j = begin; j < end; ++j) {
        float scaled = states[i][j] * (1.0f / absmax);
        if (!(scaled >= -1)) scaled = -1;  // NaN too, which 0 times an infinite inverse is
        if (scaled > 1) scaled = 1;
        const int position = static_cast<int>((scaled + 1.0f) * 32767.5f + 0.5f);
        s.codes[i][j] = absmax == 0 ? uint8_t{0} : nearest_codes(i == 0)[static_cast<size_t>(position)];
      }
    }
  }
}

// Two steps of several parameters in one call, on one thread and on three.
void check_step(const Kernels& kernels, Rule rule, float magnitude, bool stochastic, bool quick, Random& random) {
  const Dtype dtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  std::vector<std::unique_ptr<Parameter>> parameters;
  int turn = 0;
  for (const int64_t numel : {1, 0, 7, 16, 255, 256, 257, 300, 1000, 5000}) {
    if (quick && numel > 1000) continue;
    for (const bool in_8_bits : {false, true}) {
      const Dtype param = dtypes[turn % 3], grad = dtypes[turn / 3 % 3];
      // fp16 would be infinite.
      const float scale = param == Dtype::f16 || grad == Dtype::f16 ? std::min(magnitude, 1e3f) : magnitude;
      parameters.push_back(std::make_unique<Parameter>(numel, param, grad, in_8_bits, scale, random));
      parameters.back()->constants.step_size *= static_cast<float>(1 + turn++ % 2);
    }
  }
  const float grad_scale = 0.3f;
  for (const auto& parallel_for : {serial(), on_threads(3)}) {
    std::vector<ParameterUpdate> updates;
    std::vector<Stored> expected;
    for (size_t i = 0; i < parameters.size(); ++i) {
      updates.push_back(parameters[i]->update(rule, rounding_key(7, i)));
      expected.emplace_back(*parameters[i]);
      expected_step(expected[i], *parameters[i], rule, grad_scale, stochastic, rounding_key(7, i));
    }
    kernels.step({updates.data(), static_cast<int64_t>(updates.size()), rule, &grad_scale, stochastic}, parallel_for);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Parameter& p = *parameters[i];
      report(Stored(p) == expected[i],
             std::string(kernels.isa) + (rule == Rule::adamw ? " adamw of " : " lion of ") + std::to_string(p.numel) +
                 " " + name_of(p.param.dtype) + " by " + name_of(p.grad.dtype) + (p.in_8_bits ? " in 8 bits" : "") +
                 (stochastic ? " stochastic" : "") + " magnitude " + std::to_string(magnitude) + ", " +
                 std::to_string(parallel_for.threads) + " threads");
    }
  }
}

// The absmax of a block whose gradient is not finite is not either, and those of others are.
void check_step_not_finite(const Kernels& kernels, Rule rule, Random& random) {
  for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
    for (const int64_t at : {0, 255, 256, 600, 602}) {
      Parameter p(603, Dtype::f32, Dtype::f32, true, 1.0f, random);
      p.grad.set(at, bad);
      const ParameterUpdate update = p.update(rule, 0);
      kernels.step({&update, 1, rule, nullptr, false}, serial());
      bool right = true;
      for (int64_t block = 0; block < p.absmax[0].size(); ++block)
        for (int i = 0; i < (rule == Rule::adamw ? 2 : 1); ++i)
          right &= std::isfinite(p.absmax[i][block]) == (block != at / kStateBlock);
      report(right, std::string(kernels.isa) + " step with " + std::to_string(bad) + " at " + std::to_string(at));
    }
  }
}

// Against a plain sum in long double; on any number of threads the same bits.
void check_sum_of_squares(const Kernels& kernels, Random& random) {
  std::vector<std::unique_ptr<Values>> tensors;
  std::vector<SumOfSquaresArgs::Piece> pieces;
  long double exact = 0;
  for (const int64_t numel : {0, 1, 15, 17, 4096, 4097, 20001}) {
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      tensors.push_back(std::make_unique<Values>(dtype, numel));
      Values& values = *tensors.back();
      for (int64_t i = 0; i < numel; ++i) {
        values.set(i, random.normal() * (dtype == Dtype::f32 ? 1e25f : 1.0f));
        exact += static_cast<long double>(values.at(i)) * static_cast<long double>(values.at(i));
      }
      pieces.push_back({values.data(), numel, dtype});
    }
  }
  double sums[3];
  for (int threads = 1; threads <= 3; ++threads)
    kernels.sum_of_squares({pieces.data(), static_cast<int64_t>(pieces.size()), &sums[threads - 1]},
                           on_threads(threads));
  report(std::fabs(static_cast<double>(sums[0] / exact) - 1) < 1e-12 && sums[0] == sums[1] && sums[0] == sums[2],
         std::string(kernels.isa) + " sum_of_squares");
}

}  // namespace

// The arguments of the optimizers' ops, the same on every device, and what the codes of states in 8 bits mean.
// lowbit/reference_optim.py is the oracle: every backend computes its bits.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "format.h"

namespace lowbit {

constexpr int64_t kStateBlock = 256;  // elements of a state in 8 bits that share a scale

enum class Rule { adamw, lion };

// What the rows of the op's table say, in its order.
struct UpdateConstants {
  float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, second_scale, eps;
};

// One state of a parameter, in its arena: fp32 values, or codes and for each kStateBlock of them an absmax.
struct State {
  void* values;   // null where the rule has no such state
  float* absmax;  // null: fp32
};

// One parameter of a step.
struct ParameterUpdate {
  void* param;
  const void* grad;
  int64_t numel;
  State states[2];
  UpdateConstants constants;
  uint32_t rounding_key;  // of a bf16 parameter that is rounded stochastically
  Dtype param_dtype, grad_dtype;
};

struct OptimizerStepArgs {
  const ParameterUpdate* updates;  // host memory
  int64_t count;
  Rule rule;
  const float* grad_scale;  // one number that gradients are multiplied by first, or null
  bool stochastic;          // whether bf16 parameters are rounded by their keys
};

struct SumOfSquaresArgs {
  struct Piece {
    const void* values;
    int64_t numel;
    Dtype dtype;
  };
  const Piece* pieces;  // host memory
  int64_t count;
  double* sum;
};

// --- stochastic rounding

LOWBIT_HOST_DEVICE constexpr uint32_t mix_bits(uint32_t x) {  // murmur3's finalizer
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

constexpr uint32_t kGolden = 0x9E3779B9u;

// The key of the parameter at this place in the list of a call.
constexpr uint32_t rounding_key(uint64_t seed, uint64_t parameter) {
  return mix_bits(static_cast<uint32_t>(seed) ^
                  mix_bits(static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(parameter) * kGolden));
}

// What is added to the 32 bits of an fp32 number, which lose their lower half then.
LOWBIT_HOST_DEVICE constexpr uint32_t rounding_bits(uint32_t key, uint64_t element) {
  return mix_bits(static_cast<uint32_t>(element) * kGolden + static_cast<uint32_t>(element >> 32) * 0x85EBCA6Bu +
                  key) >>
         16;
}

// --- states in 8 bits

// The dynamic map of a state without negative values; that of a state with a sign is kScaleMap.
constexpr float kUnsignedStateMap[256] = {
    0.0f,           3.2500003e-07f, 7.75e-07f,      2.1249998e-06f, 4.3749997e-06f, 6.625e-06f,     8.874999e-06f,
    1.5624999e-05f, 2.6875001e-05f, 3.8125e-05f,    4.9374998e-05f, 6.0625003e-05f, 7.1875e-05f,    8.312499e-05f,
    9.4375e-05f,    0.000128125f,   0.000184375f,   0.00024062501f, 0.00029687502f, 0.00035312498f, 0.00040937503f,
    0.00046562502f, 0.00052187504f, 0.000578125f,   0.000634375f,   0.00069062505f, 0.000746875f,   0.0008031251f,
    0.00085937505f, 0.000915625f,   0.00097187504f, 0.001140625f,   0.001421875f,   0.001703125f,   0.001984375f,
    0.002265625f,   0.0025468748f,  0.002828125f,   0.0031093748f,  0.0033906251f,  0.003671875f,   0.003953125f,
    0.0042343745f,  0.004515625f,   0.0047968747f,  0.005078125f,   0.005359375f,   0.0056406246f,  0.005921875f,
    0.0062031248f,  0.006484375f,   0.0067656254f,  0.0070468746f,  0.007328125f,   0.0076093744f,  0.007890625f,
    0.008171875f,   0.008453124f,   0.008734375f,   0.009015624f,   0.0092968745f,  0.009578126f,   0.009859375f,
    0.010703126f,   0.012109376f,   0.013515624f,   0.014921876f,   0.016328124f,   0.017734377f,   0.019140625f,
    0.020546874f,   0.021953126f,   0.023359375f,   0.024765624f,   0.026171876f,   0.027578129f,   0.028984373f,
    0.030390626f,   0.031796873f,   0.033203125f,   0.034609374f,   0.036015626f,   0.03742188f,    0.038828123f,
    0.040234376f,   0.041640624f,   0.043046873f,   0.044453125f,   0.045859374f,   0.047265626f,   0.04867187f,
    0.050078124f,   0.051484372f,   0.052890625f,   0.054296877f,   0.05570313f,    0.057109382f,   0.058515627f,
    0.059921872f,   0.061328124f,   0.06273438f,    0.06414063f,    0.06554688f,    0.06695312f,    0.068359375f,
    0.06976563f,    0.07117188f,    0.072578125f,   0.07398438f,    0.07539063f,    0.07679688f,    0.07820313f,
    0.07960938f,    0.081015624f,   0.08242188f,    0.08382813f,    0.085234374f,   0.086640626f,   0.08804687f,
    0.08945312f,    0.090859376f,   0.09226563f,    0.09367188f,    0.095078126f,   0.09648438f,    0.09789063f,
    0.099296875f,   0.103515625f,   0.11054687f,    0.11757813f,    0.12460937f,    0.13164061f,    0.13867188f,
    0.14570314f,    0.15273437f,    0.15976563f,    0.16679686f,    0.17382812f,    0.18085939f,    0.18789062f,
    0.19492188f,    0.20195311f,    0.20898438f,    0.21601564f,    0.22304687f,    0.23007813f,    0.23710936f,
    0.24414062f,    0.25117186f,    0.25820312f,    0.26523438f,    0.2722656f,     0.27929688f,    0.28632814f,
    0.29335937f,    0.3003906f,     0.30742186f,    0.31445312f,    0.3214844f,     0.32851562f,    0.33554685f,
    0.3425781f,     0.34960938f,    0.35664064f,    0.36367187f,    0.3707031f,     0.37773436f,    0.38476562f,
    0.3917969f,     0.39882812f,    0.40585935f,    0.4128906f,     0.41992188f,    0.42695314f,    0.43398437f,
    0.4410156f,     0.44804686f,    0.45507812f,    0.4621094f,     0.46914062f,    0.47617185f,    0.4832031f,
    0.49023438f,    0.4972656f,     0.5042969f,     0.5113281f,     0.51835936f,    0.5253906f,     0.5324218f,
    0.53945315f,    0.54648435f,    0.5535157f,     0.5605469f,     0.56757814f,    0.5746094f,     0.5816406f,
    0.5886719f,     0.5957031f,     0.6027344f,     0.60976565f,    0.61679685f,    0.6238282f,     0.6308594f,
    0.63789064f,    0.6449219f,     0.6519531f,     0.6589844f,     0.6660156f,     0.6730469f,     0.68007815f,
    0.68710935f,    0.6941407f,     0.7011719f,     0.70820314f,    0.7152344f,     0.7222656f,     0.7292969f,
    0.7363281f,     0.7433594f,     0.75039065f,    0.75742185f,    0.7644532f,     0.7714844f,     0.7785156f,
    0.7855469f,     0.7925781f,     0.7996094f,     0.8066406f,     0.8136718f,     0.82070315f,    0.82773435f,
    0.8347657f,     0.8417969f,     0.8488281f,     0.8558594f,     0.8628906f,     0.8699219f,     0.8769531f,
    0.8839843f,     0.89101565f,    0.89804685f,    0.9050782f,     0.9121094f,     0.9191406f,     0.9261719f,
    0.9332031f,     0.9402344f,     0.9472656f,     0.9542968f,     0.96132815f,    0.96835935f,    0.9753907f,
    0.9824219f,     0.9894531f,     0.9964844f,     1.0f,
};

struct StateMap {
  float entries[256];
};
constexpr StateMap make_state_map(bool is_signed) {
  StateMap map{};
  for (int i = 0; i < 256; ++i) map.entries[i] = is_signed ? kScaleMap.entries[i] : kUnsignedStateMap[i];
  return map;
}
constexpr StateMap kStateMaps[2] = {make_state_map(false), make_state_map(true)};  // by whether there is a sign

// Position i of kScalePositions stands for i / 32767.5 - 1, in fp32; its code is that of the nearest map entry, the
// lower of two. first_above[c] is the first position whose code is above c.
struct StateBoundaries {
  uint16_t first_above[255];
};
constexpr StateBoundaries make_state_boundaries(const StateMap& map) {
  StateBoundaries boundaries{};
  for (int c = 0; c < 255; ++c) {
    const float below = map.entries[c], above = map.entries[c + 1];
    const auto is_above = [&](int position) {
      const float value = static_cast<float>(position) / 32767.5f - 1.0f;
      const float to_below = value > below ? value - below : below - value;
      const float to_above = value > above ? value - above : above - value;
      return to_above < to_below;
    };
    int position = static_cast<int>(((below + above) / 2.0f + 1.0f) * 32767.5f);
    while (position > 0 && is_above(position - 1)) --position;
    while (!is_above(position)) ++position;
    boundaries.first_above[c] = static_cast<uint16_t>(position);
  }
  return boundaries;
}
constexpr StateBoundaries kStateBoundaries[2] = {make_state_boundaries(kStateMaps[0]),
                                                 make_state_boundaries(kStateMaps[1])};

}  // namespace lowbit

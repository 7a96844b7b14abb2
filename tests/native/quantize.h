// The checks of what makes and decodes bytes: against the format's definition, bit for bit.
#pragma once

#include "values.h"

namespace {

void check_dequantize(const Kernels& kernels, const Case& c, Random& random) {
  const Weight weight(c.n, c.k, c.format, c.block_size, c.double_quant, random);
  Values out(c.dtype, c.n * c.k), expected(c.dtype, c.n * c.k), again(c.dtype, c.n * c.k);
  for (int64_t i = 0; i < c.n * c.k; ++i) expected.set(i, weight.decoded[i]);
  kernels.dequantize({weight.view, out.data(), c.dtype}, serial());
  report(out == expected, c.text(kernels.isa, "dequantize"));
  kernels.dequantize({weight.view, again.data(), c.dtype}, on_threads(2));
  report(again == expected, c.text(kernels.isa, "dequantize") + ", two threads");
}

// quantize, encode and search_scales against the scalar kernels, and those against the format's definition.
void check_quantize(const Kernels& kernels, int64_t numel, const Format& format, int64_t block_size, Dtype dtype,
                    float magnitude, Random& random) {
  const std::string text = std::string(kernels.isa) + " quantize of " + std::to_string(numel) + " block " +
                           std::to_string(block_size) + " " + name_of(dtype) + " magnitude " +
                           std::to_string(magnitude);
  const int64_t blocks = ceil_div(numel, block_size), columns = std::max<int64_t>(1, numel / 3);
  Values weight(dtype, numel);
  Buffer<float> importance(columns);
  for (int64_t i = 0; i < numel; ++i) weight.set(i, i / 64 == 1 ? 0.0f : random.normal() * magnitude);
  for (int64_t i = 0; i < columns; ++i) importance[i] = i % 5 ? std::fabs(random.normal()) : 0.0f;

  Buffer<uint8_t> packed(ceil_div(numel, 2)), expected(packed.size());
  Buffer<float> absmax(blocks), expected_absmax(blocks);
  kernels.quantize({weight.data(), dtype, numel, &format, block_size, blocks, packed.data(), absmax.data()},
                   on_threads(2));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * block_size, count = std::min(block_size, numel - first);
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(weight.at(first + i)));
    if (count < block_size) largest = std::max(largest, kTinyAbsmax);
    expected_absmax[block] = largest;
    const auto code = [&](int64_t i) {
      if (i >= count) return format.zero_code;
      const float value = weight.at(first + i);
      return encode_one(format, count < block_size ? value / largest : value * (1.0f / std::max(largest, kTinyAbsmax)));
    };
    for (int64_t i = 0; i < count; i += 2) expected[(first + i) / 2] = pack(code(i), code(i + 1));
  }
  report(packed == expected && absmax == expected_absmax, text);

  Buffer<float> scales(blocks), expected_scales(blocks);
  for (const float* weights : {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
    kernels.search_scales({weight.data(), dtype, numel, &format, block_size, weights, columns, scales.data()},
                          on_threads(2));
    kScalarKernels.search_scales(
        {weight.data(), dtype, numel, &format, block_size, weights, columns, expected_scales.data()}, serial());
    report(scales == expected_scales, text + ", search_scales");
  }
  kernels.encode({weight.data(), dtype, numel, &format, block_size, scales.data(), packed.data()}, on_threads(2));
  for (int64_t i = 0; i < numel + numel % 2; i += 2) {
    const auto code = [&](int64_t j) {
      if (j >= numel) return format.zero_code;
      const float scale = scales[j / block_size];
      return encode_one(format, std::fabs(scale) >= kTinyAbsmax ? weight.at(j) * (1.0f / scale) : 0.0f);
    };
    expected[i / 2] = pack(code(i), code(i + 1));
  }
  report(packed == expected, text + ", encode");

  Buffer<uint8_t> codes(blocks), expected_codes(blocks);
  Buffer<float> offset(1);
  offset[0] = 0.5f * magnitude;
  Buffer<float> groups(ceil_div(blocks, kGroupSize)), expected_groups(groups.size());
  kernels.quantize_scales({absmax.data(), offset.data(), blocks, codes.data(), groups.data()}, on_threads(2));
  kScalarKernels.quantize_scales({absmax.data(), offset.data(), blocks, expected_codes.data(), expected_groups.data()},
                                 serial());
  report(codes == expected_codes && groups == expected_groups, text + ", quantize_scales");

  // int8: rows of a third.
  const int64_t rows = numel / columns;
  Buffer<uint8_t> eight(rows * columns), expected_eight(rows * columns);
  Buffer<float> row_absmax(rows);
  kernels.quantize({weight.data(), dtype, rows * columns, &kInt8, columns, rows, eight.data(), row_absmax.data()},
                   on_threads(2));
  for (int64_t row = 0; row < rows; ++row) {
    float largest = 0;
    for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, std::fabs(weight.at(row * columns + i)));
    const float scale = 1.0f / largest * 127.0f;
    for (int64_t i = 0; i < columns; ++i)
      expected_eight[row * columns + i] = static_cast<uint8_t>(
          static_cast<int8_t>(std::isinf(scale) ? 0.0f : std::nearbyint(weight.at(row * columns + i) * scale)));
  }
  report(eight == expected_eight, text + ", int8");
}

// The scale of a block, or a row, with NaN or inf in it is not finite: that is how a caller finds them.
void check_not_finite(const Kernels& kernels, const Format& format, Dtype dtype, Random& random) {
  constexpr int64_t kNumel = 99, kBlockSize = 32, kBlocks = 4;  // the last block has 3
  for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
    for (int64_t at = 0; at < kNumel; ++at) {
      Values weight(dtype, kNumel);
      for (int64_t i = 0; i < kNumel; ++i) weight.set(i, random.normal());
      weight.set(at, bad);
      Buffer<uint8_t> packed(ceil_div(kNumel, 2)), eight(kNumel);
      Buffer<float> scales(kBlocks), searched(kBlocks), row(1);
      kernels.quantize({weight.data(), dtype, kNumel, &format, kBlockSize, kBlocks, packed.data(), scales.data()},
                       serial());
      kernels.search_scales({weight.data(), dtype, kNumel, &format, kBlockSize, nullptr, kNumel, searched.data()},
                            serial());
      kernels.quantize({weight.data(), dtype, kNumel, &kInt8, kNumel, 1, eight.data(), row.data()}, serial());
      bool right = !std::isfinite(row[0]);
      for (int64_t block = 0; block < kBlocks; ++block)
        for (const float scale : {scales[block], searched[block]})
          right &= std::isfinite(scale) == (block != at / kBlockSize);
      report(right, std::string(kernels.isa) + " scales of " + name_of(dtype) + " with " + std::to_string(bad) +
                        " at " + std::to_string(at));
    }
  }
}

}  // namespace

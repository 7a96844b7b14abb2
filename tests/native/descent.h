// The checks of gptq_block and descend_block: against plain loops that take one row at a time, bit for bit.
#pragma once

#include "values.h"

namespace {

// What decoding makes of the nearest code.
float nearest_value(const Format& format, float x, float scale) {
  const float inverse = std::fabs(scale) >= kTinyAbsmax ? 1.0f / scale : 0.0f;
  return format.codebook[encode_one(format, x * inverse)] * scale;
}

// Rounds a row by GPTQ with one scale; returns the sum of squared errors.
float gptq_row(const Format& format, const float* weight, const float* factor, int64_t columns, float scale,
               float* decoded, float* errors) {
  std::vector<float> left(weight, weight + columns);
  float loss = 0;
  for (int64_t j = 0; j < columns; ++j) {
    const size_t at = static_cast<size_t>(j);
    decoded[j] = nearest_value(format, left[at], scale);
    errors[j] = (left[at] - decoded[j]) * (1.0f / factor[j * columns + j]);
    loss = std::fma(errors[j], errors[j], loss);
    for (int64_t i = j + 1; i < columns; ++i)
      left[static_cast<size_t>(i)] = std::fma(-errors[j], factor[j * columns + i], left[static_cast<size_t>(i)]);
  }
  return loss;
}

// Descends over a row's codes with one scale; returns by how much the loss changes.
float descend_row(const Format& format, const float* old, const float* gradient, const float* hessian, int64_t columns,
                  float scale, int64_t sweeps, float* result) {
  std::vector<float> left(gradient, gradient + columns);
  std::copy_n(old, columns, result);
  for (int64_t step = 0; step < sweeps * columns; ++step) {
    const int64_t j = step % columns;
    const float* row = hessian + j * columns;
    const float value = nearest_value(format, std::fma(left[static_cast<size_t>(j)], 1.0f / row[j], result[j]), scale);
    const float change = value - result[j];
    result[j] = value;
    for (int64_t i = 0; i < columns; ++i)
      left[static_cast<size_t>(i)] = std::fma(-change, row[i], left[static_cast<size_t>(i)]);
  }
  float loss = 0;
  for (int64_t j = 0; j < columns; ++j)
    loss = std::fma(-(result[j] - old[j]), gradient[j] + left[static_cast<size_t>(j)], loss);
  return loss;
}

// Equal but for the signs of zeros.
bool same_values(const Buffer<float>& a, const Buffer<float>& b) {
  for (int64_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i])) return false;
  return true;
}

void check_descent(const Kernels& kernels, int64_t rows, int64_t columns, int64_t count, const Format& format,
                   Random& random) {
  const std::string text = std::string(kernels.isa) + " descent of " + std::to_string(rows) + " x " +
                           std::to_string(columns) + ", " + std::to_string(count) + " scales of " + format.name;
  Buffer<float> weight(rows * columns), gradient(rows * columns), candidates(rows * count);
  Buffer<float> factor(columns * columns), hessian(columns * columns);
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const float off_diagonal = 0.1f * random.normal();
      hessian[i * columns + j] = hessian[j * columns + i] = i == j ? 1.0f + std::fabs(random.normal()) : off_diagonal;
      factor[j * columns + i] = i == j ? 0.5f + std::fabs(random.normal()) : off_diagonal;
    }
  }
  for (int64_t i = 0; i < rows * columns; ++i) {
    weight[i] = i / columns == 1 ? 0.0f : random.normal();
    gradient[i] = 0.3f * random.normal();
  }
  for (int64_t i = 0; i < rows * count; ++i) candidates[i] = i % 7 == 6 ? 0.0f : 2.5f + 0.3f * random.normal();

  Buffer<float> decoded(rows * columns), errors(rows * columns), expected(rows * columns),
      expected_errors(rows * columns);
  Buffer<int32_t> choice(rows), expected_choice(rows);
  std::vector<float> row(static_cast<size_t>(columns)), row_errors(row.size());
  const auto choose = [&](int64_t r, float limit, const auto& loss_of, const auto& keep) {
    float least = limit;
    for (int64_t c = 0; c < count; ++c) {
      const float loss = loss_of(candidates[r * count + c]);
      if (!(loss < least)) continue;
      least = loss;
      expected_choice[r] = static_cast<int32_t>(c);
      keep();
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    const auto loss_of = [&](float scale) {
      return gptq_row(format, weight.data() + r * columns, factor.data(), columns, scale, row.data(),
                      row_errors.data());
    };
    choose(r, INFINITY, loss_of, [&] {
      std::copy_n(row.data(), columns, expected.data() + r * columns);
      std::copy_n(row_errors.data(), columns, expected_errors.data() + r * columns);
    });
  }
  kernels.gptq_block({weight.data(), factor.data(), candidates.data(), &format, rows, columns, count, decoded.data(),
                      errors.data(), choice.data()},
                     on_threads(2));
  report(same_values(decoded, expected) && same_values(errors, expected_errors) && choice == expected_choice,
         text + ", gptq_block");

  Buffer<float> result(rows * columns);
  std::copy_n(decoded.data(), rows * columns, expected.data());
  for (int64_t r = 0; r < rows; ++r) {
    expected_choice[r] = 0;
    const auto loss_of = [&](float scale) {
      return descend_row(format, decoded.data() + r * columns, gradient.data() + r * columns, hessian.data(), columns,
                         scale, 2, row.data());
    };
    choose(r, 0.0f, loss_of, [&] { std::copy_n(row.data(), columns, expected.data() + r * columns); });
  }
  kernels.descend_block({decoded.data(), gradient.data(), hessian.data(), candidates.data(), &format, rows, columns,
                         count, 2, result.data(), choice.data()},
                        on_threads(2));
  report(same_values(result, expected) && choice == expected_choice, text + ", descend_block");
}

}  // namespace

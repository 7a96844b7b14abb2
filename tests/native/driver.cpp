// Checks every kernel of every instruction set that this CPU has, without torch: against plain loops in double
// precision (products.h), the format's definition (quantize.h), plain loops over rows (descent.h) or the optimizers'
// rules (optim.h). Built with sanitizers and for other CPUs; every buffer has its exact size and starts one element
// past an aligned address.
//
//   driver [--quick]    prints each failure, and "N passed, N failed"; exit status 1 if any failed
#include "descent.h"
#include "optim.h"
#include "products.h"
#include "quantize.h"

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  const Dtype dtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
  const int64_t shapes[][2] = {{1, 1},    {3, 5},     {7, 64},    {33, 130}, {40, 192},
                               {17, 513}, {130, 320}, {34, 1088}, {0, 64},   {4, 0}};
  const int64_t blocks[][2] = {{1, 32}, {17, 64}, {40, 32}, {3, 256}};
  const int64_t rows[] = {0, 1, 2, 3, 4, 5, 12, 16, 17, 40, 130};
  for (const Kernels* kernels : available_kernels()) {
    const int before = passed + failed;
    Random random(1);
    int64_t turn = 0;
    for (const auto& [n, k] : shapes) {
      for (const int64_t m : rows) {
        if (m * n * k > (quick ? 200'000 : 2'000'000)) continue;
        for (const Format* format : kFormats) {
          for (const Dtype dtype : dtypes) {
            // Block sizes, double quantization, LoRA and bias take turns over the cases.
            const int64_t block_size = kMinBlockSize << (turn % 8);
            const int64_t rank = (turn / 2) % 4 ? 0 : 1 + turn % 17;
            const Case c = {m,
                            n,
                            k,
                            format,
                            block_size,
                            turn % 3 != 0 && format->bits == 4,
                            dtype,
                            rank,
                            turn % 5 == 0,
                            turn % 2 ? 0.7f : 1.0f};
            check_linear(*kernels, c, random);
            if (m == 1) check_dequantize(*kernels, c, random);
            ++turn;
          }
        }
      }
    }
    for (const int64_t numel : {1, 31, 64, 65, 257, 4097, 20001}) {
      if (quick && numel > 5000) continue;
      for (const Format* format : {&kNf4, &kFp4})
        for (const Dtype dtype : dtypes)
          for (const float magnitude : {1e-30f, 0.02f, 3e4f})
            check_quantize(*kernels, numel, *format, kMinBlockSize << (turn++ % 8), dtype, magnitude, random);
    }
    for (const auto& [n, columns] : blocks)
      for (const Format* format : {&kNf4, &kFp4})
        for (const int64_t count : {1, 5, 6, 11}) check_descent(*kernels, n, columns, count, *format, random);
    for (const Dtype dtype : dtypes) check_not_finite(*kernels, kNf4, dtype, random);
    for (const Rule rule : {Rule::adamw, Rule::lion}) {
      for (const float magnitude : {1e-20f, 1e-3f, 1.0f, 1e15f})
        for (const bool stochastic : {false, true}) check_step(*kernels, rule, magnitude, stochastic, quick, random);
      check_step_not_finite(*kernels, rule, random);
    }
    check_sum_of_squares(*kernels, random);
    std::printf("%s: %d checks\n", kernels->isa, passed + failed - before);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

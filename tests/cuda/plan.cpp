// Checks csrc/cuda/plan.h on a CPU: prints each plan that is not as expected; exit status 1 if any is not.
#include "cuda/plan.h"

#include <cstdio>

using namespace lowbit;
using namespace lowbit::cuda;

namespace {

alignas(16) char memory[32];
int failures = 0;

void expect(bool right, const Plan& plan, const char* what) {
  if (!right) std::printf("%s: %s\n", what, plan.describe().c_str());
  failures += !right;
}

LinearArgs product(int64_t m, Dtype dtype, const Format& format, int64_t n = 4096, int64_t k = 4096) {
  LinearArgs args{};
  args.x = memory;
  args.dtype = dtype;
  args.weight = {reinterpret_cast<const uint8_t*>(memory), {}, &format, format.has_row_scales ? k : 64, n * k};
  args.m = m, args.n = n, args.k = k;
  return args;
}

// That first_m to last_m rows go the same way.
void expect_linear(Path path, int64_t first_m, int64_t last_m, Dtype dtype, const Format& format, int capability) {
  for (const int64_t m : {first_m, last_m}) {
    const Plan plan = plan_linear(product(m, dtype, format), {capability, capability, 132});
    expect(plan.path == path, plan, "linear");
  }
}

// That `most` rows are the most for which the kernels take the packed weight.
void expect_grad_input(Path path, int64_t most, Dtype dtype, int capability) {
  for (const int64_t m : {most, most + 1}) {
    LinearGradInputArgs args{};
    args.grad = memory;
    args.dtype = dtype;
    args.weight = product(m, dtype, kNf4).weight;
    args.m = m, args.n = 4096, args.k = 4096;
    const Plan plan = plan_grad_input(args, {capability, capability, 132});
    expect(plan.path == (m > most ? Path::decode : path), plan, "linear_grad_input");
    expect(plan.splits * plan.split_size >= args.n || plan.path == Path::decode, plan, "rows of W are left out");
  }
}

}  // namespace

// Columns are shared out where tiles are fewer than multiprocessors, and never into less than a panel or an empty
// share.
static_assert(gemv_column_shares(256, 1, 132) == 1);
static_assert(gemv_column_shares(256, 4, 132) == 1);
static_assert(gemv_column_shares(64, 4, 132) == 2);
static_assert(gemv_column_shares(1, 4, 132) == 4);
static_assert(gemv_column_shares(10, 12, 132) == 12);
static_assert(gemv_column_shares(20, 10, 132) == 5);  // 6 are wanted: two panels each fill 5
static_assert(gemv_column_shares(1, 1, 1) == 1);

int main() {
  // 16 bits on tensor cores.
  expect_linear(Path::gemv_mma, 1, 8, Dtype::bf16, kNf4, 80);
  expect_linear(Path::gemm, 9, 256, Dtype::f16, kFp4, 80);
  expect_linear(Path::gemm, 9, 128, Dtype::bf16, kNf4, 90);
  expect_linear(Path::decode, 129, 256, Dtype::bf16, kNf4, 90);
  expect_linear(Path::gemm, 9, 96, Dtype::bf16, kNf4, 103);
  expect_linear(Path::decode, 257, int64_t{1} << 40, Dtype::bf16, kNf4, 120);
  // Without them, or with nothing for them to do.
  expect_linear(Path::gemv_fma, 1, 16, Dtype::f32, kNf4, 90);
  expect_linear(Path::decode, 17, 10'000, Dtype::f32, kNf4, 90);
  expect_linear(Path::gemv_fma, 1, 16, Dtype::f16, kNf4, 75);
  expect_linear(Path::decode, 17, 256, Dtype::bf16, kNf4, 75);
  expect_linear(Path::gemv_int8, 1, 16, Dtype::bf16, kInt8, 90);
  expect_linear(Path::decode, 17, 256, Dtype::bf16, kInt8, 90);

  expect_grad_input(Path::grad_input_mma, 192, Dtype::bf16, 90);
  expect_grad_input(Path::grad_input_mma, 96, Dtype::bf16, 100);
  expect_grad_input(Path::grad_input_fma, 16, Dtype::bf16, 75);
  expect_grad_input(Path::grad_input_fma, 48, Dtype::f32, 90);

  // What the fast kernels do not take: a ragged k, memory that is not aligned.
  const Gpu gpu{90, 90, 132};
  expect(plan_linear(product(4, Dtype::bf16, kNf4, 64, 70), gpu).path == Path::linear_any, {}, "ragged gemv");
  expect(plan_linear(product(12, Dtype::bf16, kNf4, 64, 70), gpu).path == Path::decode, {}, "ragged gemm");
  LinearArgs unaligned = product(4, Dtype::f16, kInt8);
  unaligned.x = memory + 2;
  expect(plan_linear(unaligned, gpu).path == Path::linear_any, {}, "unaligned gemv");

  // The splits of a contraction cover it, and ask for memory where there are several.
  for (const int64_t m : {1, 8, 9, 64, 128})
    for (const int64_t n : {16, 100, 4096})
      for (const int64_t k : {64, 4096, 96 * 1024}) {
        const Plan plan = plan_linear(product(m, Dtype::bf16, kNf4, n, k), gpu);
        const int64_t unit = plan.path == Path::gemm ? 4096 / plan.rows : int64_t{plan.panel_steps} * kGemvDepth;
        const bool covers = plan.splits * plan.split_size * unit >= k && (plan.splits - 1) * plan.split_size * unit < k;
        expect(covers && plan.workspace == (plan.splits > 1 ? plan.splits * m * n : 0), plan, "splits");
      }

  // W is decoded in chunks where these fit half of the L2 cache and cuBLAS still fills the GPU, from a group of scales on.
  const Gpu h100{90, 90, 132, 50 << 20};
  const auto rows_of = [&](int64_t m, int64_t n, int64_t k) {
    return decoded_rows(product(m, Dtype::bf16, kNf4, n, k).weight, Dtype::bf16, m, n, k, h100);
  };
  expect(rows_of(2048, 4096, 4096) == 4096, {Path::decode}, "W fits the cache");
  expect(rows_of(2048, 14336, 4096) == 3072, {Path::decode}, "five chunks");
  expect(rows_of(512, 14336, 4096) == 14336, {Path::decode}, "a chunk is too small for the GPU");
  expect(rows_of(2048, 14336, 4096 + 32) == 14336, {Path::decode}, "blocks cross rows");
  return failures > 0;
}

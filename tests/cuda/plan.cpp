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

// Columns are shared out where the time that it saves is longer than what adding up takes, and never into an empty
// share.
constexpr bool are_shares(int64_t tiles, int64_t units, int64_t count, int64_t size) {
  const Shares found = gemv_column_shares(tiles, units, 132);
  return found.count == count && found.size == size;
}
static_assert(are_shares(256, 1, 1, 1));
static_assert(are_shares(896, 4, 1, 4));
static_assert(are_shares(256, 4, 1, 4));
static_assert(are_shares(256, 14, 1, 14));
static_assert(are_shares(128, 4, 1, 4));  // one block on each; 8 shares would save no more than they cost
static_assert(are_shares(64, 4, 4, 1));
static_assert(are_shares(64, 14, 4, 4));
static_assert(are_shares(1, 4, 4, 1));
static_assert(are_shares(10, 12, 12, 1));
static_assert(are_shares(1, 1, 1, 1));

int main() {
  // 16 bits on tensor cores.
  expect_linear(Path::gemv_mma, 1, 8, Dtype::bf16, kNf4, 80);
  expect_linear(Path::gemm, 9, 256, Dtype::f16, kFp4, 90);
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

  // gemv fills an H200: no multiprocessor has a fifth more of W than its part, and DRAM has enough to do (see
  // gemv_bytes_in_flight), or all of W is on its way at once.
  const struct {
    int64_t n, k, blocks, kilobytes;
  } filled[] = {{1024, 4096, 256, 16}, {1024, 14336, 256, 64}, {2048, 4096, 128, 32},
                {4096, 4096, 256, 64}, {4096, 14336, 256, 64}, {14336, 4096, 896, 96}};
  for (const auto& each : filled)
    for (const int64_t m : {1, 4, 8}) {
      const Plan plan = plan_linear(product(m, Dtype::bf16, kNf4, each.n, each.k), gpu);
      expect(plan.blocks() == each.blocks, plan, "blocks");
      expect(gemv_bytes_in_flight(plan, gpu) == each.kilobytes * 1024, plan, "bytes in flight");
      const double busiest = static_cast<double>(ceil_div(plan.blocks(), 132) * std::min(plan.split_size, each.k));
      expect(busiest * 132 <= 1.2 * each.n / 16 * each.k, plan, "a multiprocessor has more than its part");
    }

  // The splits of a contraction cover it, and ask for memory where there are several.
  for (const int64_t m : {1, 8, 9, 64, 200})
    for (const int64_t n : {16, 100, 4096})
      for (const int64_t k : {64, 4096, 96 * 1024}) {
        const Plan plan = plan_linear(product(m, Dtype::bf16, kNf4, n, k), gpu);
        const int64_t unit = plan.path == Path::gemm ? 4096 / plan.rows : 1;
        const bool covers = plan.splits * plan.split_size * unit >= k && (plan.splits - 1) * plan.split_size * unit < k;
        expect(covers && plan.workspace == (plan.splits > 1 ? plan.splits * m * n : 0), plan, "splits");
        expect(plan.path == Path::gemm || plan.counters == (plan.splits > 1 ? plan.row_tiles * plan.column_tiles : 0),
               plan, "counters");
      }
  return failures > 0;
}

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

void expect(bool right, const char* what, int64_t m, int64_t w, int64_t rank) {
  if (!right) std::printf("%s: m %lld, w %lld, rank %lld\n", what, (long long)m, (long long)w, (long long)rank);
  failures += !right;
}

LoraProductArgs lora(int64_t m, int64_t n, int64_t rank, int64_t k = 4096) {
  LoraProductArgs args{};
  args.x = args.y = memory;
  args.dtype = Dtype::bf16;
  args.down = {memory, Dtype::f32, k, 1};
  args.up = {memory, Dtype::f32, rank, 1};
  args.m = m, args.n = n, args.k = k, args.rank = rank;
  return args;
}

// Blocks that cover rows and columns, none of them empty, and that fill about half of the GPU where there is work.
void expect_lora(int64_t m, int64_t w, int64_t rank, const Gpu& gpu) {
  const LoraProductPlan product = plan_lora_product(lora(m, w, rank), gpu);
  const int64_t rows = product.row_warps * int64_t{32}, columns = product.share_chunks * int64_t{32};
  expect(product.row_tiles * rows >= m && (product.row_tiles - 1) * rows < m, "lora_product's rows", m, w, rank);
  expect(product.shares * columns >= w && (product.shares - 1) * columns < w, "lora_product's shares", m, w, rank);
  expect(product.shared_bytes <= 96 * 1024, "lora_product's memory", m, w, rank);
  LoraOuterArgs args{};
  args.wide = memory, args.dtype = Dtype::bf16, args.low = reinterpret_cast<const float*>(memory);
  args.m = m, args.w = w, args.rank = rank;
  const LoraOuterPlan outer = plan_lora_outer(args, gpu);
  const int64_t wide = outer.column_warps * int64_t{32};
  expect(outer.column_tiles * wide >= w && (outer.column_tiles - 1) * wide < w, "lora_outer's columns", m, w, rank);
  expect(outer.rank_tiles * outer.rank >= rank, "lora_outer's rank", m, w, rank);
  if (m >= 128 && w >= 2048) {
    expect(product.blocks() >= gpu.processors / 2 - 2, "lora_product's blocks", m, w, rank);
    expect(outer.column_tiles * outer.rank_tiles >= gpu.processors / 2 - 2, "lora_outer's blocks", m, w, rank);
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

  // The splits of a contraction cover it, and ask for memory where there are several.
  for (const int64_t m : {1, 8, 9, 64, 200})
    for (const int64_t n : {16, 100, 4096})
      for (const int64_t k : {64, 4096, 96 * 1024}) {
        const Plan plan = plan_linear(product(m, Dtype::bf16, kNf4, n, k), gpu);
        const int64_t unit = plan.path == Path::gemm ? 4096 / plan.rows : int64_t{plan.panel_steps} * kGemvDepth;
        const bool covers = plan.splits * plan.split_size * unit >= k && (plan.splits - 1) * plan.split_size * unit < k;
        expect(covers && plan.workspace == (plan.splits > 1 ? plan.splits * m * n : 0), plan, "splits");
      }

  for (const int64_t m : {1, 33, 128, 2048, 16384, 1 << 20})
    for (const int64_t w : {4, 100, 2048, 4096, 28672})
      for (const int64_t rank : {1, 4, 16, 64, 128, 512}) expect_lora(m, w, rank, gpu);
  // Which factors wide loads fit: in the forward along the contraction, in the backward across it; a slice of several
  // stacked; not an odd rank or two dtypes.
  const auto access_is = [&](LoraAccess access, const LoraProductArgs& args) {
    expect(lora_access(args) == access, "how lora_product reads its factors", args.m, args.n, args.rank);
  };
  LoraProductArgs args = lora(512, 4096, 16);
  access_is(LoraAccess::along, args);
  args.up.row_stride = 3 * 16;
  access_is(LoraAccess::along, args);
  args.down = {memory, Dtype::f32, 1, 16};
  access_is(LoraAccess::any, args);
  args.up = {memory, Dtype::f32, 1, 4096};
  access_is(LoraAccess::across, args);
  args.up.dtype = Dtype::bf16;
  access_is(LoraAccess::any, args);
  args.x = nullptr;
  access_is(LoraAccess::across, args);
  access_is(LoraAccess::any, lora(512, 4096, 5));
  access_is(LoraAccess::any, lora(512, 4098, 16));
  return failures > 0;
}

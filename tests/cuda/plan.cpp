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
  }
}

Gpu with_shared_memory(Gpu gpu, int kilobytes) {
  gpu.shared_memory = kilobytes * 1024;
  return gpu;
}

// That the splits of grad_input's contraction cover it, none is empty, and there is memory where there are several.
void expect_splits_of_grad_input(int64_t m, int64_t n, int64_t k, Dtype dtype, const Gpu& gpu) {
  LinearGradInputArgs args{};
  args.grad = memory;
  args.dtype = dtype;
  args.weight = product(m, dtype, kNf4, n, k).weight;
  args.m = m, args.n = n, args.k = k;
  const Plan plan = plan_grad_input_kernel(args, gpu);
  const bool covers =
      plan.splits * plan.split_size >= n && (plan.splits - 1) * plan.split_size < std::max<int64_t>(n, 1);
  const bool shared = plan.splits > 1;
  expect(covers && plan.workspace == (shared ? plan.splits * m * k : 0) &&
             plan.counters == (shared ? plan.row_tiles * plan.column_tiles : 0),
         plan, "splits of grad_input");
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

// An A100 holds two blocks of each kernel of grad_input, to the last byte; GPUs with less memory fewer.
static_assert(MmaTile<32>::kSharedBytes + 1024 == 164 * 1024 / 2);
static_assert(MmaTile<16>::kSharedBytes < MmaTile<32>::kSharedBytes);

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

  const Gpu a100 = with_shared_memory({80, 80, 108}, 164), ada = with_shared_memory({89, 89, 128}, 100);
  expect(blocks_per_processor(a100, MmaTile<32>::kSharedBytes) == 2, {}, "blocks on an A100");
  expect(blocks_per_processor(ada, MmaTile<8>::kSharedBytes) == 1, {}, "blocks on an RTX 4090");
  expect(blocks_per_processor(ada, ElementTile::kSharedBytes) == 2, {}, "blocks of little memory");
  for (const int64_t m : {1, 8, 32, 33, 192})
    for (const int64_t n : {0, 8, 200, 4096, 14336})
      for (const int64_t k : {64, 4096})
        for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
          for (const Gpu& gpu : {a100, ada, with_shared_memory({90, 90, 132}, 228)})
            expect_splits_of_grad_input(m, n, k, dtype, gpu);

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
  for (const int64_t m : {1, 8, 9, 64, 128})
    for (const int64_t n : {16, 100, 4096})
      for (const int64_t k : {64, 4096, 96 * 1024}) {
        const Plan plan = plan_linear(product(m, Dtype::bf16, kNf4, n, k), gpu);
        const int64_t unit = plan.path == Path::gemm ? gemm_depth(plan.columns) : 1;
        const bool covers = plan.splits * plan.split_size * unit >= k && (plan.splits - 1) * plan.split_size * unit < k;
        expect(covers && plan.workspace == (plan.splits > 1 ? plan.splits * m * n : 0), plan, "splits");
        expect(plan.counters == (plan.splits > 1 ? plan.row_tiles * plan.column_tiles : 0), plan, "counters");
        expect(plan.path != Path::gemm || gemm_shared_bytes(plan.rows, plan.columns, plan.stages) <= 99 * 1024, plan,
               "memory of a consumer GPU");
      }

  // gemm: the tiles of a Llama's layers on an H200, whose multiprocessors are all busy in one round.
  const auto tile_is = [&](int64_t m, int64_t n, int64_t k, int rows, int columns) {
    const Plan plan = plan_linear(product(m, Dtype::bf16, kNf4, n, k), with_shared_memory({90, 90, 132}, 228));
    expect(plan.path == Path::gemm && plan.rows == rows && plan.columns == columns, plan, "gemm's tile");
    expect(plan.blocks() <= 132 && plan.blocks() >= 112, plan, "gemm's blocks");
  };
  tile_is(16, 4096, 4096, 16, 128);
  tile_is(32, 14336, 4096, 32, 128);
  tile_is(32, 28672, 8192, 32, 256);
  tile_is(64, 4096, 4096, 32, 128);
  tile_is(64, 14336, 4096, 64, 256);

  // W is decoded in parts where these fit half of the L2 cache and cuBLAS's waves do not become many more: from a group
  // of scales on for y, by columns for grad_x.
  const Gpu h100{90, 90, 132, 50 << 20};
  const auto parts_are = [&](int64_t m, int64_t n, int64_t k, int64_t rows, int64_t columns, const char* what) {
    const QuantizedWeight weight = product(m, Dtype::bf16, kNf4, n, k).weight;
    expect(decoded_rows(weight, Dtype::bf16, m, n, k, h100) == rows, {Path::decode}, what);
    expect(decoded_columns(weight, Dtype::bf16, m, n, k, h100) == columns, {Path::decode}, what);
  };
  parts_are(2048, 4096, 4096, 4096, 4096, "W fits the cache");
  parts_are(2048, 14336, 4096, 2048, 4096, "seven waves either way; 768 columns would be six for four");
  parts_are(8192, 14336, 4096, 3072, 512, "a wave more, which costs less than the memory; eight of 128 tiles");
  parts_are(2048, 4096, 14336, 4096, 2048, "the other way round");
  parts_are(512, 14336, 4096, 14336, 4096, "a part is too small for the GPU");
  parts_are(8192, 14336, 4096 + 32, 14336, 4096 + 32, "blocks cross rows");

  for (const int64_t m : {1, 33, 128, 2048, 16384, 1 << 20})
    for (const int64_t w : {4, 100, 2048, 4096, 28672})
      for (const int64_t rank : {1, 4, 16, 64, 128, 512}) expect_lora(m, w, rank, gpu);
  // Which factors wide loads fit: in the forward along the contraction, in the backward across it; a slice of several
  // stacked; not an odd rank or two dtypes, nor another LoRA's factor that begins anywhere.
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
  args = lora(512, 4096, 16);
  args.others[args.other_count++].down = memory + 4;
  access_is(LoraAccess::any, args);
  return failures > 0;
}

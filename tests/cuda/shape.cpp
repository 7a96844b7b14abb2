// Compiles if csrc/cuda/shape.h routes as it says.
#include "cuda/shape.h"

using namespace lowbit;
using namespace lowbit::cuda;

constexpr bool goes(LinearPath path, int64_t first_m, int64_t last_m, Dtype dtype, bool is_int8, int capability) {
  return linear_path(first_m, dtype, is_int8, capability) == path &&
         linear_path(last_m, dtype, is_int8, capability) == path;
}

// 16 bits on tensor cores.
static_assert(goes(LinearPath::gemv, 1, 8, Dtype::bf16, false, 80));
static_assert(goes(LinearPath::gemm, 9, 256, Dtype::f16, false, 90));
static_assert(goes(LinearPath::dequantize, 257, int64_t{1} << 40, Dtype::bf16, false, 120));
// Without them, or with nothing for them to do.
static_assert(goes(LinearPath::gemv, 1, 16, Dtype::f32, false, 90));
static_assert(goes(LinearPath::dequantize, 17, 10'000, Dtype::f32, false, 90));
static_assert(goes(LinearPath::gemv, 1, 16, Dtype::f16, false, 75));
static_assert(goes(LinearPath::dequantize, 17, 256, Dtype::bf16, false, 75));
static_assert(goes(LinearPath::gemv, 1, 16, Dtype::bf16, true, 90));
static_assert(goes(LinearPath::dequantize, 17, 256, Dtype::bf16, true, 90));

// Columns are shared out where tiles are fewer than multiprocessors, and never into less than a panel or an empty
// share.
static_assert(gemv_column_shares(256, 1, 132) == 1);
static_assert(gemv_column_shares(256, 4, 132) == 1);
static_assert(gemv_column_shares(64, 4, 132) == 2);
static_assert(gemv_column_shares(1, 4, 132) == 4);
static_assert(gemv_column_shares(10, 12, 132) == 12);
static_assert(gemv_column_shares(20, 10, 132) == 5);  // 6 are wanted: two panels each fill 5
static_assert(gemv_column_shares(1, 1, 1) == 1);

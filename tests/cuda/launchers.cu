// The launchers under C names and with plain arguments, for ctypes. format: 0 nf4, 1 fp4, 2 int8; dtype: Dtype.
#include "cuda/kernels.h"

using namespace lowbit;

static const Format* format_of(int format) { return format == 0 ? &kNf4 : format == 1 ? &kFp4 : nullptr; }

extern "C" {

int lowbit_dequantize(const uint8_t* packed, const float* absmax, const uint8_t* scale_codes,
                      const float* group_scales, const float* offset, int format, int64_t block_size, int64_t numel,
                      void* out, int dtype, cuda::Stream stream) {
  return cuda::dequantize({{packed, absmax, scale_codes, group_scales, offset, format_of(format), block_size, numel},
                           out,
                           static_cast<Dtype>(dtype)},
                          stream);
}

}  // extern "C"

// Takes the place of cuda.cpp in an extension without the CUDA half.
#include "../cuda/kernels.h"

const char* lowbit::cuda::architectures() { return ""; }

"""Reading the machine code that nvcc and Triton make of lowbit's kernels, for benchmarks and tests."""

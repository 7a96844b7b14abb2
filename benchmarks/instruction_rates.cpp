// How many AVX2 instructions a cycle this CPU executes, of the kinds that bound one row of x (docs/performance.md).
//
//   g++ -O2 -o instruction_rates benchmarks/instruction_rates.cpp && ./instruction_rates
//
// The clock is measured first: by a chain of additions, one a cycle.
#include <algorithm>
#include <chrono>
#include <cstdio>

#if defined(__x86_64__)

namespace {

// Seconds of the fastest of some runs of `body` a million times.
template <class Body>
double seconds(const Body& body) {
  double best = 1e9;
  for (int run = 0; run < 9; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 1'000'000; ++i) body();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

#define ADD "add $1, %%rax\n"
// Ymm registers 2 to 13, each a chain of its own: more than latency times throughput.
#define TWELVE(op) op("2") op("3") op("4") op("5") op("6") op("7") op("8") op("9") op("10") op("11") op("12") op("13")
#define VECTORS                                                                                                       \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
#define LOOK_UP(r) "vpshufb %%ymm0, %%ymm" r ", %%ymm" r "\n"
#define INTERLEAVE(r) "vpunpcklbw %%ymm0, %%ymm" r ", %%ymm" r "\n"
#define SHIFT(r) "vpsrlw $4, %%ymm" r ", %%ymm" r "\n"
#define MULTIPLY(r) "vpmulhuw %%ymm0, %%ymm" r ", %%ymm" r "\n"
#define MASK(r) "vpand %%ymm0, %%ymm" r ", %%ymm" r "\n"
#define FMA(r) "vfmadd231ps %%ymm0, %%ymm0, %%ymm" r "\n"
// A look-up and an FMA in turns, seven chains of each.
#define PAIR(a, b) LOOK_UP(a) FMA(b)

int main() {
  const double cycle = seconds([] { asm volatile(ADD ADD ADD ADD ADD ADD ADD ADD ::"r"(0) : "rax"); }) / 8e6;
  std::printf("%-28s %5.2f GHz\n", "clock", 1e-9 / cycle);
  const auto report = [cycle](const char* name, double count, double time) {
    std::printf("%-28s %5.2f a cycle\n", name, count * 1e6 * cycle / time);
  };
  report("look-up (vpshufb)", 12, seconds([] { asm volatile(TWELVE(LOOK_UP)::"r"(0) : VECTORS); }));
  report("interleaving (vpunpcklbw)", 12, seconds([] { asm volatile(TWELVE(INTERLEAVE)::"r"(0) : VECTORS); }));
  report("shift (vpsrlw)", 12, seconds([] { asm volatile(TWELVE(SHIFT)::"r"(0) : VECTORS); }));
  report("product (vpmulhuw)", 12, seconds([] { asm volatile(TWELVE(MULTIPLY)::"r"(0) : VECTORS); }));
  report("mask (vpand)", 12, seconds([] { asm volatile(TWELVE(MASK)::"r"(0) : VECTORS); }));
  report("multiply-add (vfmadd231ps)", 12, seconds([] { asm volatile(TWELVE(FMA)::"r"(0) : VECTORS); }));
  report("look-up and multiply-add", 7, seconds([] {
           asm volatile(PAIR("2", "9") PAIR("3", "10") PAIR("4", "11") PAIR("5", "12") PAIR("6", "13") PAIR("7", "14")
                            PAIR("8", "15")::"r"(0)
                        : VECTORS);
         }));
}

#else

int main() {
  std::puts("these rates are of x86-64 CPUs with AVX2");
  return 1;
}

#endif

// csrc/bindings_cuda.cpp for CPU tensors, in the namespace lowbit_stub: so that the bindings run where there is no GPU,
// on launchers that are linked to the emulator's stub runtime. What torch would do on a device is recorded instead.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

namespace {

// Told of the memory of every tensor that an op makes for a kernel to write or (`filled` by torch) to read, and of
// every device guard.
void (*on_allocation)(void* data, int64_t bytes, bool filled);
void (*on_guard)(int device);
// Kept, so that their memory does not become another tensor's, of which the emulator is not told.
auto& kept = *new std::vector<torch::stable::Tensor>;

void record(const torch::stable::Tensor& tensor, bool filled) {
  kept.push_back(tensor);
  on_allocation(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()), filled);
}

torch::stable::Tensor recorded_empty(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                                     torch::headeronly::ScalarType type) {
  auto tensor = torch::stable::new_empty(like, size, type);
  record(tensor, false);
  return tensor;
}

torch::stable::Tensor recorded_to(const torch::stable::Tensor& self, torch::headeronly::ScalarType type) {
  auto tensor = torch::stable::to(self, type);
  record(tensor, true);
  return tensor;
}

struct RecordedGuard {
  explicit RecordedGuard(int device) { on_guard(device); }
};

constexpr uintptr_t kStream = 0x5eed;  // torch's current stream, as tests/test_cuda_bindings.py expects it
AOTITorchError current_stream_stub(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(kStream);
  return 0;
}
void* stub_dlopen(const char*, int) { return &on_allocation; }
void* stub_dlsym(void*, const char*) { return reinterpret_cast<void*>(&current_stream_stub); }

}  // namespace

extern "C" __attribute__((visibility("default"))) void stub_set_callbacks_of_bindings(void (*allocation)(void*, int64_t,
                                                                                                         bool),
                                                                                      void (*guard)(int)) {
  on_allocation = allocation;
  on_guard = guard;
}

namespace torch::stable {
using ::recorded_empty;
using ::recorded_to;
namespace accelerator {
using ::RecordedGuard;
}
}  // namespace torch::stable

#include <torch/csrc/stable/accelerator.h>
#include "bindings.h"
#define new_empty recorded_empty
#define to(...) recorded_to(__VA_ARGS__)  // not to<T>(...)
#define DeviceGuard RecordedGuard
#define dlopen stub_dlopen
#define dlsym stub_dlsym
#define LOWBIT_CUDA_NAMESPACE lowbit_stub
#define LOWBIT_CUDA_KEY CPU
#include "bindings_cuda.cpp"

// csrc/bindings_cuda.cpp for CPU tensors, in the namespace lowbit_stub: so that the bindings run where there is no GPU,
// on launchers that are linked to the emulator's stub runtime. What torch would do on a device is recorded instead.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

namespace {

// Told of the memory of every tensor that an op makes, and of every device guard.
void (*on_allocation)(void* data, int64_t bytes);
void (*on_guard)(int device);

torch::stable::Tensor recorded_empty(const torch::stable::Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                                     torch::headeronly::ScalarType type) {
  auto tensor = torch::stable::new_empty(like, size, type);
  on_allocation(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  // Also a workspace stays: its memory must not become another tensor's, since the emulator knows it as this one's.
  static std::vector<torch::stable::Tensor> kept;
  kept.push_back(tensor);
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

extern "C" __attribute__((visibility("default"))) void stub_set_callbacks_of_bindings(void (*allocation)(void*,
                                                                                                         int64_t),
                                                                                      void (*guard)(int)) {
  on_allocation = allocation;
  on_guard = guard;
}

namespace torch::stable {
using ::recorded_empty;
namespace accelerator {
using ::RecordedGuard;
}
}  // namespace torch::stable

#include <torch/csrc/stable/accelerator.h>
#define new_empty recorded_empty
#define DeviceGuard RecordedGuard
#define dlopen stub_dlopen
#define dlsym stub_dlsym
#define LOWBIT_CUDA_NAMESPACE lowbit_stub
#define LOWBIT_CUDA_KEY CPU
#include "bindings_cuda.cpp"

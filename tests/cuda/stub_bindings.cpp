// csrc/bindings/cuda.cpp for CPU tensors, in the namespace lowbit_stub: so that the bindings run where there is no GPU,
// on launchers that are linked to the emulator's stub runtime. What torch would do on a device is recorded instead.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

namespace {

// Told of the memory of every tensor that an op makes for a kernel to write or (`filled` by torch) to read.
void (*on_allocation)(void* data, int64_t bytes, bool filled);
int device_of_tensors;  // where CPU tensors pretend to be
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

torch::stable::Tensor recorded_zero(torch::stable::Tensor& self) {
  auto tensor = torch::stable::zero_(self);
  on_allocation(self.data_ptr(), self.numel() * static_cast<int64_t>(self.element_size()), true);
  return tensor;
}

// torch's products, which write memory that a kernel may read after.
AOTITorchError recorded_call(const char* op, const char* overload, StableIValue* stack, uint64_t version) {
  const AOTITorchError error = torch_call_dispatcher(op, overload, stack, version);
  const auto result = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
  void* data = nullptr;
  int64_t numel = 0;
  aoti_torch_get_data_ptr(result, &data);
  aoti_torch_get_numel(result, &numel);
  on_allocation(data, numel, true);  // of which the address is what counts: its allocation is known
  return error;
}

extern "C" int cudaGetDevice(int*);
extern "C" int cudaSetDevice(int);

// What torch's does on a GPU, on the stub runtime.
struct StubGuard {
  explicit StubGuard(int device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);
  }
  ~StubGuard() { cudaSetDevice(before_); }
  StubGuard(const StubGuard&) = delete;

 private:
  int before_;
};

constexpr uintptr_t kStream = 0x5eed;  // of device 0, as tests/test_cuda_bindings.py expects it
AOTITorchError current_stream_stub(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(kStream + device);
  return 0;
}
void* stub_dlopen(const char*, int) { return &on_allocation; }
void* stub_dlsym(void*, const char*) { return reinterpret_cast<void*>(&current_stream_stub); }

}  // namespace

extern "C" __attribute__((visibility("default"))) void stub_set_callback_of_bindings(void (*allocation)(void*, int64_t,
                                                                                                        bool)) {
  on_allocation = allocation;
}
extern "C" __attribute__((visibility("default"))) void stub_set_device_of_tensors(int device) {
  device_of_tensors = device;
}

namespace torch::stable {
using ::recorded_empty;
using ::recorded_to;
using ::recorded_zero;
namespace accelerator {
using ::StubGuard;
}
}  // namespace torch::stable

#include <torch/csrc/stable/accelerator.h>
#define torch_call_dispatcher recorded_call
#include "bindings/ops.h"
#define new_empty recorded_empty
#define zero_ recorded_zero
#define to(...) recorded_to(__VA_ARGS__)  // not to<T>(...)
#define DeviceGuard StubGuard
#define get_device_index() is_cpu() ? device_of_tensors : -1
#define dlopen stub_dlopen
#define dlsym stub_dlsym
#define LOWBIT_CUDA_NAMESPACE lowbit_stub
#define LOWBIT_CUDA_KEY CPU
#include "bindings/cuda.cpp"

// The address of so many counters for a kernel on `stream`.
extern "C" __attribute__((visibility("default"))) void* stub_counters(int64_t count, void* stream) {
  AtenTensorHandle handle;
  const int64_t size = 1;
  aoti_torch_empty_strided(1, &size, &size, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle);
  return zeroed_counters(torch::stable::Tensor(handle), static_cast<Stream>(stream), count).data_ptr();
}

// csrc/bindings/cuda.cpp for CPU tensors, in the namespace lowbit_stub: so that the bindings run where there is no GPU,
// on launchers that are linked to the emulator's stub runtime. What torch would do on a device is recorded instead.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string_view>
#include <vector>

namespace {

// Told of the memory of every tensor that an op makes for a kernel to write or (`filled` by torch) to read.
void (*on_allocation)(void* data, int64_t bytes, bool filled);
int device_of_tensors;  // where CPU tensors pretend to be
int launches_of_torch;  // kernels that torch would launch for the bindings
// Kept, so that their memory does not become another tensor's, of which the emulator is not told.
auto& kept = *new std::vector<torch::stable::Tensor>;

void record(AtenTensorHandle tensor, bool filled) {
  if (!on_allocation) return;
  void* data = nullptr;
  int64_t numel = 0;
  int32_t dtype = 0;
  aoti_torch_get_data_ptr(tensor, &data);
  aoti_torch_get_numel(tensor, &numel);
  aoti_torch_get_dtype(tensor, &dtype);
  on_allocation(data, numel * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)), filled);
}

AOTITorchError recorded_empty(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                              int32_t device_type, int32_t device, AtenTensorHandle* made) {
  const AOTITorchError error = aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device_type, device, made);
  if (!on_allocation) return error;
  AtenTensorHandle another;
  aoti_torch_new_tensor_handle(*made, &another);
  kept.emplace_back(another);
  record(*made, false);
  return error;
}

AOTITorchError recorded_copy(AtenTensorHandle to, AtenTensorHandle from, int32_t non_blocking) {
  ++launches_of_torch;
  const AOTITorchError error = aoti_torch_copy_(to, from, non_blocking);
  record(to, true);
  return error;
}

AOTITorchError recorded_zero(AtenTensorHandle tensor) {
  ++launches_of_torch;
  const AOTITorchError error = aoti_torch_zero_(tensor);
  record(tensor, true);
  return error;
}

// torch's products, which write memory that a kernel may read after.
AOTITorchError recorded_addmm(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a, AtenTensorHandle b,
                              double beta, double alpha) {
  ++launches_of_torch;
  const AOTITorchError error = aoti_torch_cpu_addmm_out(out, self, a, b, beta, alpha);
  bool is_contiguous = false;
  aoti_torch_is_contiguous(out, &is_contiguous);
  if (is_contiguous) record(out, true);  // of which the address is what counts: its allocation is known
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
void* stub_dlsym(void*, const char* name) {
  return name == std::string_view("aoti_torch_cuda_addmm_out") ? reinterpret_cast<void*>(&recorded_addmm)
                                                               : reinterpret_cast<void*>(&current_stream_stub);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void stub_set_callback_of_bindings(void (*allocation)(void*, int64_t,
                                                                                                        bool)) {
  on_allocation = allocation;
}
extern "C" __attribute__((visibility("default"))) int stub_launches_of_torch() { return launches_of_torch; }
extern "C" __attribute__((visibility("default"))) void stub_set_device_of_tensors(int device) {
  device_of_tensors = device;
}

namespace torch::stable::accelerator {
using ::StubGuard;
}

#include <torch/csrc/stable/accelerator.h>
#define aoti_torch_empty_strided recorded_empty
#define aoti_torch_copy_ recorded_copy
#define aoti_torch_zero_ recorded_zero
#include "bindings/ops.h"
#include "bindings/tensors.h"
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
  recorded_empty(1, &size, &size, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle);
  return zeroed_counters(torch::stable::Tensor(handle), static_cast<Stream>(stream), count).data_ptr();
}

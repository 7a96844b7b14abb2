// A CUDA runtime with no GPU behind it. Launchers compiled by nvcc are linked to this instead of libcudart; "device"
// memory is host memory. It keeps only the current device and the last error: everything that needs a decision goes
// to the callbacks that hostlaunch.py sets, which return a cudaError_t.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
  unsigned x, y, z;
} Dim3;

typedef struct {
  // A kernel by its mangled name, as in the PTX; args holds one pointer per parameter, in their order.
  int (*launch)(const char* kernel, const Dim3* grid, const Dim3* block, size_t shared, void** args, void* stream);
  int (*set_kernel_attribute)(const char* kernel, int attribute, int value);
  int (*device_attribute)(int attribute, int device);
  // Every other call with an effect, by its name. pointer may be changed (cudaMalloc).
  int (*memory)(const char* call, void** pointer, const void* source, int value, size_t bytes, void* stream);
} Callbacks;

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  INVALID_DEVICE_FUNCTION = 98,
  INVALID_DEVICE = 101,
  NO_CALLBACKS = 999,
};
enum { MAX_KERNELS = 4096 };

static struct {
  const void* host;
  const char* name;
} kernels[MAX_KERNELS];
static int kernel_count, last_error, current_device, device_count = 1, capturing, captures, idle;
static Callbacks callbacks;
static struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

// ---- for the test

void stub_set_callbacks(const Callbacks* set) { callbacks = *set; }
void stub_set_device_count(int count) { device_count = count; }
int stub_current_device(void) { return current_device; }
void stub_set_capturing(int is_capturing) {
  capturing = is_capturing;
  captures += is_capturing;
}
void stub_set_idle(int is_idle) { idle = is_idle; }  // launches do nothing: to time the host code alone
void stub_forget_error(void) { last_error = SUCCESS; }

static int fail(int code) {
  if (code != SUCCESS) last_error = code;
  return code;
}

static const char* kernel_name(const void* host) {
  for (int i = 0; i < kernel_count; i++)
    if (kernels[i].host == host) return kernels[i].name;
  return NULL;
}

static int memory(const char* call, void** pointer, const void* source, int value, size_t bytes, void* stream) {
  if (!callbacks.memory) return fail(NO_CALLBACKS);
  return fail(callbacks.memory(call, pointer, source, value, bytes, stream));
}

// ---- registration, called by the constructors that nvcc generates

void** __cudaRegisterFatBinary(void* fat) {
  void** handle = malloc(sizeof *handle);
  *handle = fat;
  return handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { free(handle); }

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, void* tid,
                            void* bid, void* block, void* grid, int* warp_size) {
  (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp_size;
  if (kernel_count == MAX_KERNELS) {
    fprintf(stderr, "cudart_stub: more than %d kernels\n", MAX_KERNELS);
    abort();
  }
  kernels[kernel_count].host = host;
  kernels[kernel_count++].name = name;
}

// Initialized tables live in the PTX; there is nothing to register.
void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external, size_t size,
                       int constant, int global) {
  (void)handle, (void)host, (void)device, (void)name, (void)external, (void)size, (void)constant, (void)global;
}

// ---- launches

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return SUCCESS;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void**)stream = configuration.stream;
  return SUCCESS;
}

int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** args, size_t shared, void* stream) {
  const char* name = kernel_name(host);
  if (!name) return fail(INVALID_DEVICE_FUNCTION);
  if (idle) return SUCCESS;
  if (!callbacks.launch) return fail(NO_CALLBACKS);
  return fail(callbacks.launch(name, &grid, &block, shared, args, stream));
}

int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = (void*)host;
  return SUCCESS;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}
int __cudaLaunchKernel_ptsz(void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}

typedef struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} LaunchConfig;

int cudaLaunchKernelExC(const LaunchConfig* config, const void* host, void** args) {
  return cudaLaunchKernel(host, config->grid, config->block, args, config->shared, config->stream);
}

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  const char* name = kernel_name(host);
  if (!name) return fail(INVALID_DEVICE_FUNCTION);
  if (idle) return SUCCESS;
  if (!callbacks.set_kernel_attribute) return fail(NO_CALLBACKS);
  return fail(callbacks.set_kernel_attribute(name, attribute, value));
}

// ---- devices

int cudaGetDevice(int* device) {
  *device = current_device;
  return SUCCESS;
}
int cudaSetDevice(int device) {
  if (device < 0 || device >= device_count) return fail(INVALID_DEVICE);
  current_device = device;
  return SUCCESS;
}
int cudaGetDeviceCount(int* count) {
  *count = device_count;
  return SUCCESS;
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  if (device < 0 || device >= device_count) return fail(INVALID_DEVICE);
  if (!callbacks.device_attribute) return fail(NO_CALLBACKS);
  *value = callbacks.device_attribute(attribute, device);
  return SUCCESS;
}

// Limited by threads alone: registers are not known here.
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads, size_t shared,
                                                           unsigned flags) {
  (void)host, (void)shared, (void)flags;
  int per_multiprocessor = 0;
  int code = cudaDeviceGetAttribute(&per_multiprocessor, 39, current_device);
  if (code != SUCCESS || threads <= 0) return fail(code != SUCCESS ? code : INVALID_VALUE);
  *blocks = per_multiprocessor / threads;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}

// ---- memory and streams

int cudaMemsetAsync(void* pointer, int value, size_t bytes, void* stream) {
  return memory("cudaMemsetAsync", &pointer, NULL, value, bytes, stream);
}
int cudaMemset(void* pointer, int value, size_t bytes) {
  return memory("cudaMemset", &pointer, NULL, value, bytes, NULL);
}
int cudaMemcpyAsync(void* pointer, const void* source, size_t bytes, int kind, void* stream) {
  return memory("cudaMemcpyAsync", &pointer, source, kind, bytes, stream);
}
int cudaMemcpy(void* pointer, const void* source, size_t bytes, int kind) {
  return memory("cudaMemcpy", &pointer, source, kind, bytes, NULL);
}
int cudaMalloc(void** pointer, size_t bytes) { return memory("cudaMalloc", pointer, NULL, 0, bytes, NULL); }
int cudaMallocAsync(void** pointer, size_t bytes, void* stream) {
  return memory("cudaMallocAsync", pointer, NULL, 0, bytes, stream);
}
int cudaMallocManaged(void** pointer, size_t bytes, unsigned flags) {
  return memory("cudaMallocManaged", pointer, NULL, (int)flags, bytes, NULL);
}
int cudaFree(void* pointer) { return memory("cudaFree", &pointer, NULL, 0, 0, NULL); }
int cudaFreeAsync(void* pointer, void* stream) { return memory("cudaFreeAsync", &pointer, NULL, 0, 0, stream); }
int cudaDeviceSynchronize(void) { return memory("cudaDeviceSynchronize", NULL, NULL, 0, 0, NULL); }
int cudaStreamGetCaptureInfo(void* stream, int* status, unsigned long long* id, void** graph, const void*** nodes,
                             const void** edges, size_t* count) {
  (void)stream, (void)graph, (void)nodes, (void)edges, (void)count;
  *status = capturing;  // 1: cudaStreamCaptureStatusActive
  *id = captures;
  return SUCCESS;
}
int cudaStreamSynchronize(void* stream) { return memory("cudaStreamSynchronize", NULL, NULL, 0, 0, stream); }

// ---- errors

int cudaGetLastError(void) {
  int code = last_error;
  last_error = SUCCESS;
  return code;
}
int cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorName(int code) { return code == SUCCESS ? "cudaSuccess" : "cudaErrorFromStub"; }
const char* cudaGetErrorString(int code) {
  switch (code) {
    case SUCCESS:
      return "no error";
    case INVALID_VALUE:
      return "invalid argument";
    case 9:
      return "invalid configuration argument";
    case INVALID_DEVICE_FUNCTION:
      return "invalid device function";
    case INVALID_DEVICE:
      return "invalid device ordinal";
    case NO_CALLBACKS:
      return "the stub runtime has no callbacks";
    default:
      return "unspecified launch failure";
  }
}

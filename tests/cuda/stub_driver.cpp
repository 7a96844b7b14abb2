// The functions of CUDA's driver that managed memory takes, over malloc: they write down their calls, fail when told
// to, and have as much memory free as they are told. With the toolkit's cuda.h the compiler compares their types with
// it.
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#if __has_include(<cuda.h>)
#define __CUDA_API_VERSION_INTERNAL  // declares the functions of before CUDA 12.2 as well
#include <cuda.h>
#else
#include <cstddef>
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUstream = struct CUstream_st*;
using CUmem_advise = int;
using CUdevice_attribute = int;
#endif

namespace {

constexpr int kHandleOfFirst = 100;  // a CUdevice need not be the device's index

std::string calls;  // one a line, with their arguments
std::map<std::string, int> failures;
size_t free_memory = size_t{1} << 30;
int pages = 1;

void write_argument(std::string& text, const void* value) { text += value ? " pointer" : " null"; }
template <typename T>
void write_argument(std::string& text, T value) {
  text += " " + std::to_string(static_cast<unsigned long long>(value));
}

template <typename... Args>
CUresult record(const char* name, Args... args) {
  calls += name;
  (write_argument(calls, args), ...);
  calls += "\n";
  const auto failure = failures.find(name);
  return static_cast<CUresult>(failure == failures.end() ? 0 : failure->second);
}

}  // namespace

extern "C" {

const char* stub_calls() { return calls.c_str(); }
void stub_fail(const char* name, int code) { failures[name] = code; }
void stub_set_free(size_t bytes) { free_memory = bytes; }
void stub_set_pages(int value) { pages = value; }
void stub_reset() {
  calls.clear();
  failures.clear();
  free_memory = size_t{1} << 30;
  pages = 1;
}

CUresult cuInit(unsigned int flags) { return record("cuInit", flags); }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = kHandleOfFirst + ordinal;
  return record("cuDeviceGet", static_cast<const void*>(device), ordinal);
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = pages;
  return record("cuDeviceGetAttribute", static_cast<const void*>(value), attribute, device);
}

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = free_memory;
  *total = 2 * free_memory;
  return record("cuMemGetInfo_v2");
}

CUresult cuMemAllocManaged(CUdeviceptr* address, size_t bytes, unsigned int flags) {
  const CUresult result = record("cuMemAllocManaged", bytes, flags);
  if (static_cast<int>(result)) return result;
  void* memory = std::aligned_alloc(256, bytes);
  std::memset(memory, 0xCD, bytes);
  *address = reinterpret_cast<CUdeviceptr>(memory);
  return result;
}

CUresult cuMemAdvise(CUdeviceptr address, size_t bytes, CUmem_advise advice, CUdevice device) {
  return record("cuMemAdvise", address, bytes, advice, device);
}

CUresult cuMemPrefetchAsync(CUdeviceptr address, size_t bytes, CUdevice device, CUstream stream) {
  return record("cuMemPrefetchAsync", address, bytes, device, reinterpret_cast<size_t>(stream));
}

CUresult cuCtxSynchronize() { return record("cuCtxSynchronize"); }

CUresult cuMemFree_v2(CUdeviceptr address) {
  const CUresult result = record("cuMemFree_v2", address);
  if (!static_cast<int>(result)) std::free(reinterpret_cast<void*>(address));
  return result;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "the stub was told to fail";
  return record("cuGetErrorString", error);
}

}  // extern "C"

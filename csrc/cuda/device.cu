#include <cuda_runtime.h>

#include "device.h"

namespace {
int64_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t failed = cudaDeviceGetAttribute(&value, which, device);
  return failed == cudaSuccess ? value : -static_cast<int64_t>(failed);
}
}  // namespace

const char* kd_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
int64_t kd_cuda_multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }
int64_t kd_cuda_cache(int device) { return attribute(cudaDevAttrL2CacheSize, device); }

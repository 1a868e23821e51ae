// What the CUDA run-time library says of a device. Torch-free.
#pragma once
#include <stdint.h>

extern "C" {
const char* kd_cuda_error(int code);
int64_t kd_cuda_multiprocessors(int device);  // negative: - cudaError_t
int64_t kd_cuda_cache(int device);            // bytes of the second-level cache; negative: - cudaError_t
}

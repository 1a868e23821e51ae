// What the glue of the CUDA leaves shares: sizes a launch takes, dtypes, the current stream. Only where nvcc
// was found.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "kernels.h"

// Weak: a CPU build of torch has no streams, and is never asked for one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace kd {

constexpr int64_t kMost = (int64_t{1} << 31) - 1;

inline kd_dtype gpu_dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return KD_F32;
    case ScalarType::Half:
      return KD_F16;
    case ScalarType::BFloat16:
      return KD_BF16;
    default:
      break;
  }
  require(false, name, " is ", dtype_name(x.scalar_type()), "; it must be float32, float16 or bfloat16");
  return KD_F32;
}

// torch's current stream on a GPU.
inline void* stream_of(int32_t device) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
          "torch names no CUDA stream");
  return stream;
}

}  // namespace kd

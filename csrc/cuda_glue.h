// What the glue of the CUDA leaves shares: sizes a launch takes, dtypes, the current stream. Only where nvcc
// was found.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>

#include "checks.h"
#include "cuda/device.h"
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

// A fact of a GPU, asked once.
template <int64_t (*kAsk)(int)>
int64_t fact_of(int32_t device) {
  static std::array<std::atomic<int64_t>, 64> known{};
  const bool remembered = device >= 0 && device < static_cast<int32_t>(known.size());
  if (remembered && known[static_cast<size_t>(device)]) return known[static_cast<size_t>(device)];
  const int64_t fact = kAsk(device);
  require(fact > 0, "CUDA does not answer: ", kd_cuda_error(static_cast<int>(-fact)));
  if (remembered) known[static_cast<size_t>(device)] = fact;
  return fact;
}

// torch's current stream on a GPU.
inline void* stream_of(int32_t device) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
          "torch names no CUDA stream");
  return stream;
}

}  // namespace kd

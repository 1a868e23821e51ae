// The SWITCH gate on a GPU: for each row the Jensen-Shannon divergence of two models' distributions, who
// speaks, and the token by inversion of the cumulative mass: kernels and launcher.
//
// Few rows must use the whole GPU, so every row is cut between blocks. A first launch leaves the largest
// logit and the sum of exponentials of each block, and of each of its warps. In a second, blocks merge these,
// sum up the divergence of their entries, and the last one of a row to end adds up the parts, decides, finds
// the warp whose part of the row holds the token, and looks at that part alone once more. Many rows go in
// waves, each launch being the second of one wave and the first of the next: the second sweep finds its rows
// in the second-level cache (topk_plan.h says how long waves are).
//
// Bytes: both rows read twice, once of that from the cache, and one warp's part of one row a third time.
// Under top-k or top-p a third kernel reads the speaker's row 3 to 6 times.
#include <cuda_runtime.h>

#include "gate_decide.cuh"
#include "gate_filter.cuh"

namespace kd {
namespace gate {
namespace {

static_assert(kBlockThreads == 128, "as the bounds of the kernels say");

union SweepShared {
  __device__ SweepShared() {}
  NormsShared norms;
  DecideShared decide;
};

template <class Side>
__device__ __forceinline__ void sweep(const kd_gate_arguments& a, SweepShared& shared) {
  const int block = static_cast<int>(blockIdx.x), row = block / a.splits, split = block % a.splits;
  if (row < a.decide_rows) {
    compare<Side>(a, shared.decide, a.decide_first + row, split);
  } else {
    sum_up<Side>(a, shared.norms, a.norms_first + row - a.decide_rows, split);
  }
}

}  // namespace
}  // namespace gate
}  // namespace kd

// Eight blocks a multiprocessor: 64 registers a thread; six: 80.
#define KD_GATE_KERNEL(name, Side, blocks)                  \
  extern "C" __global__ void __launch_bounds__(128, blocks) \
      name(const __grid_constant__ kd_gate_arguments a) {   \
    __shared__ kd::gate::SweepShared shared;                \
    kd::gate::sweep<Side>(a, shared);                       \
  }
KD_GATE_KERNEL(kd_gate_f32, kd::gate::PlainSide<float>, 8)
KD_GATE_KERNEL(kd_gate_f16, kd::gate::PlainSide<__half>, 8)
KD_GATE_KERNEL(kd_gate_bf16, kd::gate::PlainSide<__nv_bfloat16>, 8)
KD_GATE_KERNEL(kd_gate_any, kd::gate::AnySide, 6)

extern "C" __global__ void __launch_bounds__(1024, 1)
    kd_gate_filter(const __grid_constant__ kd_gate_arguments a) {
  __shared__ kd::gate::FilterShared shared;
  kd::gate::draw_filtered(a, shared);
}

namespace {
using Kernel = void (*)(kd_gate_arguments);
constexpr Kernel kKernels[KD_GATE_KERNELS] = {kd_gate_f32, kd_gate_f16, kd_gate_bf16, kd_gate_any,
                                              kd_gate_filter};
}  // namespace

int kd_gate_cuda(const kd_gate* call, void* scratch, kd_gate_machine machine, void* stream) {
  for (kd_gate_launch& launch : kd::gate::plan(*call, scratch, machine)) {
    void* arguments[] = {&launch.arguments};
    const cudaError_t failed = cudaLaunchKernel(
        reinterpret_cast<const void*>(kKernels[launch.kernel]), dim3(static_cast<unsigned>(launch.grid)),
        dim3(static_cast<unsigned>(launch.threads)), arguments, 0, static_cast<cudaStream_t>(stream));
    if (failed != cudaSuccess) return failed;
  }
  return cudaSuccess;
}

// Exact top-k of rows of logits, with log-probabilities and the log mass of what is left out: kernels and
// launcher.
//
// One sweep over the row in global memory. A block keeps candidates in shared memory: entries that reach a
// bound which k entries are known to reach. Everything else goes at once to a sum of exponentials, its own,
// so that a tail of 1e-12 keeps its digits. The first bound comes from the first loads, which lie all over
// the row. When the buffer is full, a radix select raises the bound and makes room: at most 2 (V / (capacity
// - k) + 1) times, on the worst of rows, and about k log(V / capacity) / (capacity - k) times on rows in no
// order. Few rows are cut between blocks, whose candidates a second launch merges. Entropy and further
// temperatures need the selection first: another sweep for up to four of them.
//
// Related: AIR top-k (Zhang et al., SC 2023), which histograms digits of the whole row from global memory,
// and RadiK (Li et al., ICS 2024), which scales keys to what their range leaves open. Here both happen among
// candidates only.
//
// ids ascend; equal logits: the lower id; -inf is never kept: -1 and -inf fill up. A row with NaN or +inf, or
// without a finite logit: ids -1, everything else NaN. Sums are added in no fixed order: their last bits may
// differ between runs. Bytes: read V times the dtype's size a row (twice with entropy or other temperatures),
// written 8 k + 4.
#include <cuda_runtime.h>

#include "topk_sums.cuh"

namespace kd {
namespace {

extern __shared__ u64 dynamic_slots[];

template <class T, bool kPlain>
__device__ __forceinline__ void select_rows(const kd_topk_arguments& a, BlockShared& shared) {
  const int64_t row = blockIdx.x, split = blockIdx.y;
  const int begin = static_cast<int>(split * a.segment);
  const int end = static_cast<int>(min(static_cast<int64_t>(begin) + a.segment, int64_t{a.vocab}));
  Candidates candidates(shared, dynamic_slots, a.capacity, a.k);
  Sweep<T, kPlain> sweep(a, candidates, row * a.row_stride, begin, end);
  sweep.run();
  if (a.splits == 1) {
    finish_row(a, row, candidates, sweep.tail);
    return;
  }
  const ExpSum own = sweep.tail;
  const float reference = block_reduce(make_float2(own.reference, 0), shared.numbers[0], true).x;
  const float mine = own.sum * exp2_of((own.reference - reference) * a.exponent);
  const float sum = block_reduce(make_float2(mine, 0), shared.numbers[1], false).x;
  const int64_t part = row * a.splits + split;
  const int n = static_cast<int>(candidates.shared.count);
  for (int i = threadIdx.x; i < a.k; i += kThreads) {
    a.candidates[part * a.k + i] = i < n ? candidates.slots[i] : 0;
  }
  if (threadIdx.x == 0) a.tails[part * 2] = reference, a.tails[part * 2 + 1] = sum;
}

// The answer of a row from the candidates and sums of its blocks.
__device__ __forceinline__ void merge_blocks(const kd_topk_arguments& a, BlockShared& shared) {
  constexpr int kEach = 4;
  const int64_t row = blockIdx.x, total = int64_t{a.splits} * a.k;
  const u64* parts = a.candidates + row * total;
  Candidates candidates(shared, dynamic_slots, a.capacity, a.k);
  ExpSum tail;
  for (int i = threadIdx.x; i < a.splits; i += kThreads) {
    const float* part = a.tails + (row * a.splits + i) * 2;
    tail.add(ExpSum{part[0], part[1]}, a.exponent);
  }
  const auto drop = [&](u64 entry) { tail.add(capped(logit_of(entry), a.softcap), a.exponent); };
  for (int64_t first = 0; first < total; first += kThreads * kEach) {
    u64 left[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t i = first + j * kThreads + threadIdx.x;
      left[j] = i < total ? parts[i] : 0;
    }
    bool any = true;
    while (any) {
      any = false;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (!left[j]) continue;
        if (left[j] < candidates.bound) {
          drop(left[j]);
          left[j] = 0;
        } else if (candidates.put(left[j])) {
          left[j] = 0;
        } else {
          any = true;
        }
      }
      any = candidates.any(any);
      if (any) candidates.select(candidates.capacity, drop);
    }
  }
  candidates.select(candidates.shared.count, drop);
  __syncthreads();
  finish_row(a, row, candidates, tail);
}

}  // namespace
}  // namespace kd

// Two blocks a multiprocessor: 64 registers a thread.
#define KD_TOPK_KERNEL(name, call)                                                                         \
  extern "C" __global__ void __launch_bounds__(512, 2) name(const __grid_constant__ kd_topk_arguments a) { \
    __shared__ kd::BlockShared shared;                                                                     \
    call(a, shared);                                                                                       \
  }
KD_TOPK_KERNEL(kd_topk_rows_f32, (kd::select_rows<float, true>))
KD_TOPK_KERNEL(kd_topk_rows_f16, (kd::select_rows<__half, true>))
KD_TOPK_KERNEL(kd_topk_rows_bf16, (kd::select_rows<__nv_bfloat16, true>))
KD_TOPK_KERNEL(kd_topk_rows_head_f32, (kd::select_rows<float, false>))
KD_TOPK_KERNEL(kd_topk_rows_head_f16, (kd::select_rows<__half, false>))
KD_TOPK_KERNEL(kd_topk_rows_head_bf16, (kd::select_rows<__nv_bfloat16, false>))
KD_TOPK_KERNEL(kd_topk_sums_f32, (kd::sum_tail<float, true>))
KD_TOPK_KERNEL(kd_topk_sums_f16, (kd::sum_tail<__half, true>))
KD_TOPK_KERNEL(kd_topk_sums_bf16, (kd::sum_tail<__nv_bfloat16, true>))
KD_TOPK_KERNEL(kd_topk_sums_head_f32, (kd::sum_tail<float, false>))
KD_TOPK_KERNEL(kd_topk_sums_head_f16, (kd::sum_tail<__half, false>))
KD_TOPK_KERNEL(kd_topk_sums_head_bf16, (kd::sum_tail<__nv_bfloat16, false>))
KD_TOPK_KERNEL(kd_topk_merge, kd::merge_blocks)
KD_TOPK_KERNEL(kd_topk_finish, kd::finish_sums)

static_assert(kd::kThreads == kd::topk::kBlockThreads, "as planned");

namespace {
using Kernel = void (*)(kd_topk_arguments);
constexpr Kernel kKernels[KD_TOPK_KERNELS] = {
    kd_topk_rows_f32,      kd_topk_rows_f16,       kd_topk_rows_bf16,     kd_topk_rows_head_f32,
    kd_topk_rows_head_f16, kd_topk_rows_head_bf16, kd_topk_sums_f32,      kd_topk_sums_f16,
    kd_topk_sums_bf16,     kd_topk_sums_head_f32,  kd_topk_sums_head_f16, kd_topk_sums_head_bf16,
    kd_topk_merge,         kd_topk_finish};
}  // namespace

int kd_topk_cuda(const kd_topk* call, void* scratch, int multiprocessors, void* stream) {
  for (kd_topk_launch& launch : kd::topk::plan(*call, scratch, multiprocessors)) {
    const auto kernel = reinterpret_cast<const void*>(kKernels[launch.kernel]);
    if (launch.shared > 48 * 1024) {
      const cudaError_t refused =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared);
      if (refused != cudaSuccess) return refused;
    }
    void* arguments[] = {&launch.arguments};
    const dim3 grid(static_cast<unsigned>(launch.grid_x), static_cast<unsigned>(launch.grid_y));
    const dim3 block(static_cast<unsigned>(launch.threads));
    const cudaError_t failed =
        cudaLaunchKernel(kernel, grid, block, arguments, static_cast<size_t>(launch.shared),
                         static_cast<cudaStream_t>(stream));
    if (failed != cudaSuccess) return failed;
  }
  return cudaSuccess;
}

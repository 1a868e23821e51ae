// What blocks do with masses: whole numbers of 2^-40 of the row's largest, so that sums are exact in any
// order, and of one row always the same.
#pragma once
#include "gate_rows.cuh"

namespace kd {
namespace gate {

constexpr float kWhole = 1099511627776.0f;  // 2^40

// exp2((z - top) * exponent) times `count`.
__device__ __forceinline__ u64 mass_of(float z, float top, float exponent, float count = 1.0f) {
  return __float2ull_rn(exp2_of((z - top) * exponent) * count * kWhole);
}

// The mass that u in [0, 1) asks for: the first entry whose cumulative mass is greater is drawn.
__device__ __forceinline__ u64 target_of(double u, u64 total) {
  return min(static_cast<u64>(u * static_cast<double>(total)), total - 1);
}

__device__ __forceinline__ u64 warp_sum(u64 x) {
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(kAll, x, o);
  return x;
}

// The sum over this lane and those before it.
__device__ __forceinline__ u64 warp_scan(u64 x) {
  for (int o = 1; o < 32; o *= 2) {
    const u64 other = __shfl_up_sync(kAll, x, o);
    if (lane_of() >= o) x += other;
  }
  return x;
}

template <int kWarps>
struct ScanShared {
  u64 warps[kWarps];
};

// The sum over this thread and those before it, and over all. Between two of them lies a barrier.
template <int kWarps>
__device__ __forceinline__ u64 block_scan(u64 x, ScanShared<kWarps>& shared, u64* total) {
  x = warp_scan(x);
  if (lane_of() == 31) shared.warps[warp_of()] = x;
  __syncthreads();
  u64 before = 0, all = 0;
#pragma unroll 4
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp_of()) before = all;
    all += shared.warps[w];
  }
  *total = all;
  return before + x;
}

}  // namespace gate
}  // namespace kd

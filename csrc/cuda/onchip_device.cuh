// What dense_onchip.cuh needs of the machine (sm_90 and up): bulk copies and the mbarriers they complete on,
// clusters, and 16-byte vectors of logits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kd {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// Initialised mbarriers become visible to the copies that complete on them.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// `bytes`, and both addresses, are multiples of 16.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}

// All threads of the cluster, and what they stored before.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();  // `aligned` needs a warp whose threads are together
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores to the place of block `rank` of the cluster that `address` is here.
__device__ __forceinline__ void store_remote(uint32_t address, uint32_t rank, float x) {
  asm volatile(
      "{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.f32 [a], %2; }" ::"r"(address),
      "r"(rank), "f"(x)
      : "memory");
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if either is NaN.
__device__ __forceinline__ float larger(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The largest of a warp's numbers, none of them NaN: as integers of the same order, one instruction.
__device__ __forceinline__ float warp_largest(float x) {
  const int bits = __float_as_int(x), most = __reduce_max_sync(kAll, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(most ^ (most >> 31 & 0x7fffffff));
}

// Adds up four numbers of each lane over the warp; lane l gets the sum of the (l / 8)-th.
__device__ __forceinline__ float fold(float a, float b, float c, float d, int lane) {
  const bool high = lane & 16, odd = lane & 8;
  const float kept0 = (high ? c : a) + __shfl_xor_sync(kAll, high ? a : c, 16);
  const float kept1 = (high ? d : b) + __shfl_xor_sync(kAll, high ? b : d, 16);
  float x = (odd ? kept1 : kept0) + __shfl_xor_sync(kAll, odd ? kept0 : kept1, 8);
  for (int distance = 4; distance; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

// 16 bytes of logits as float32 and back. The bits of a half word are moved in one instruction, without the
// register moves that intrinsics cost in PTX.
template <class T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static __device__ __forceinline__ void load(const uint4* from, float* z) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    z[0] = x.x, z[1] = x.y, z[2] = x.z, z[3] = x.w;
  }
  static __device__ __forceinline__ void store(uint4* to, const float* g) {
    __stcs(reinterpret_cast<float4*>(to), float4{g[0], g[1], g[2], g[3]});
  }
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};

template <class Half>
struct HalfVector {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ void load(const uint4* from, float* z) {
    const uint4 x = *from;
    Half::widen(x.x, z), Half::widen(x.y, z + 2), Half::widen(x.z, z + 4), Half::widen(x.w, z + 6);
  }
  static __device__ __forceinline__ void store(uint4* to, const float* g) {
    __stcs(to, uint4{Half::narrow(g), Half::narrow(g + 2), Half::narrow(g + 4), Half::narrow(g + 6)});
  }
};

template <>
struct Vector<__nv_bfloat16> : HalfVector<Vector<__nv_bfloat16>> {
  static __device__ __forceinline__ void widen(uint32_t word, float* z) {
    asm("shl.b32 %0, %1, 16;" : "=f"(z[0]) : "r"(word));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(z[1]) : "r"(word));
  }
  static __device__ __forceinline__ uint32_t narrow(const float* g) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(g[1]), "f"(g[0]));
    return x;
  }
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

template <>
struct Vector<__half> : HalfVector<Vector<__half>> {
  static __device__ __forceinline__ void widen(uint32_t word, float* z) {
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(z[0]), "=f"(z[1])
        : "r"(word));
  }
  static __device__ __forceinline__ uint32_t narrow(const float* g) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(g[1]), "f"(g[0]));
    return x;
  }
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
};

}  // namespace kd

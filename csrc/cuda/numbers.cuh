// Numbers on the device: order-preserving keys, 16-byte vectors of logits, sums of exponentials with a
// reference.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>

namespace kd {

using u64 = unsigned long long;

constexpr float kLeastFloat = -3.402823466e38f;

// Larger numbers have larger keys; -0 and +0 have the same.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float number_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// A logit and its token id as one number: larger logits first, the lower id among equal ones. 0 stands for no
// entry.
__device__ __forceinline__ u64 entry_of(float x, int id) {
  return static_cast<u64>(key_of(x)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ float logit_of(u64 entry) { return number_of(static_cast<uint32_t>(entry >> 32)); }
__device__ __forceinline__ int id_of(u64 entry) { return static_cast<int>(~static_cast<uint32_t>(entry)); }

// 2^x within 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -inf stands for what is not there, and stays.
__device__ __forceinline__ float capped(float u, float softcap) {
  return softcap > 0 && u != -CUDART_INF_F ? softcap * tanhf(u / softcap) : u;
}

// A soft cap makes finite numbers of infinite ones.
__device__ __forceinline__ float cappable(float u, float softcap) {
  if (softcap > 0 && fabsf(u) == CUDART_INF_F) return copysignf(-kLeastFloat, u);
  return u;
}

template <class T>
struct Vector;  // 16 bytes of logits

// Two bytes. CUDA's own __ldg of 16-bit floats is assembly that compilers move in front of the condition that
// guards it.
__device__ __forceinline__ unsigned short load_short(const void* x) {
  return __ldg(static_cast<const unsigned short*>(x));
}

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static __device__ __forceinline__ float get(const uint4& v, int i) {
    return __uint_as_float(i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w);
  }
  static __device__ __forceinline__ float one(const float* x) { return __ldg(x); }
};

template <>
struct Vector<__half> {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ float get(const uint4& v, int i) {
    const uint32_t word = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word & 0xffffu)));
  }
  static __device__ __forceinline__ float one(const __half* x) {
    return __half2float(__ushort_as_half(load_short(x)));
  }
};

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ float get(const uint4& v, int i) {
    const uint32_t word = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ float one(const __nv_bfloat16* x) {
    return __uint_as_float(static_cast<uint32_t>(load_short(x)) << 16);
  }
};

template <int N>
__device__ __forceinline__ float largest(const float (&x)[N]) {
  float most = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) most = fmaxf(most, x[i]);
  return most;
}

// sum = sum_v 2^((z_v - reference) * exponent), where the reference is the largest z so far: terms are at
// most 1, so neither overflow nor a small sum beside larger numbers loses anything. NaN stays in the sum;
// -inf adds nothing.
struct ExpSum {
  float reference = kLeastFloat, sum = 0;

  __device__ __forceinline__ void refer_to(float z, float exponent) {
    if (z > reference) {
      sum *= exp2_of((reference - z) * exponent);
      reference = z;
    }
  }

  __device__ __forceinline__ void add(float z, float exponent) {
    refer_to(z, exponent);
    sum += exp2_of((z - reference) * exponent);
  }

  // All of z, of which `most` is the largest.
  template <int N>
  __device__ __forceinline__ void add(const float (&z)[N], float most, float exponent) {
    refer_to(most, exponent);
    float part[N];
#pragma unroll
    for (int i = 0; i < N; ++i) part[i] = exp2_of((z[i] - reference) * exponent);
#pragma unroll
    for (int step = N / 2; step; step /= 2) {
#pragma unroll
      for (int i = 0; i < step; ++i) part[i] += part[i + step];
    }
    sum += part[0];
  }

  // Merges another sum.
  __device__ __forceinline__ void add(const ExpSum& other, float exponent) {
    refer_to(other.reference, exponent);
    sum += other.sum * exp2_of((other.reference - reference) * exponent);
  }
};

}  // namespace kd

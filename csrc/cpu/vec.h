// A vector of floats and the few operations the kernels need, for the instruction set this file is compiled
// for.
//
// Order of operands: x86's max and min return their second operand when either is NaN. `floor_at(x, low)`
// relies on it, so that a NaN is never repaired.
#pragma once
#include <stdint.h>
#include <string.h>

#include "isa.h"

#define KD_IS_baseline 0
#define KD_IS_avx2 2
#define KD_IS_avx512 5
#define KD_LEVEL KD_CAT(KD_IS_, KD_ISA)

#if KD_LEVEL >= KD_IS_avx2
// GCC 12 takes the deliberately undefined pass-through of its own AVX-512 intrinsics for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace KD_NS {

#if KD_LEVEL == KD_IS_avx512

constexpr int kWidth = 16;
typedef __m512 native;
typedef __m512i native_int;
typedef __mmask16 native_mask;
KD_INLINE native n_all(float x) { return _mm512_set1_ps(x); }
KD_INLINE native n_load(const float* p) { return _mm512_loadu_ps(p); }
KD_INLINE void n_store(float* p, native x) { _mm512_storeu_ps(p, x); }
KD_INLINE native n_fma(native a, native b, native c) { return _mm512_fmadd_ps(a, b, c); }
KD_INLINE native n_max(native a, native b) { return _mm512_max_ps(a, b); }
KD_INLINE native n_min(native a, native b) { return _mm512_min_ps(a, b); }
KD_INLINE native n_abs(native a) { return _mm512_abs_ps(a); }
KD_INLINE native_mask n_lt(native a, native b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
KD_INLINE native_mask n_le(native a, native b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
KD_INLINE native_mask n_eq(native a, native b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
KD_INLINE native_mask n_first(int count) { return (native_mask)((1u << count) - 1u); }
KD_INLINE native_mask n_not(native_mask a) { return (native_mask)~a; }
KD_INLINE native n_select(native_mask k, native a, native b) { return _mm512_mask_blend_ps(k, b, a); }
KD_INLINE native_int n_bits(native a) { return _mm512_castps_si512(a); }
KD_INLINE native n_from_bits(native_int a) { return _mm512_castsi512_ps(a); }
KD_INLINE native_int n_int(int x) { return _mm512_set1_epi32(x); }
KD_INLINE native_int n_add_int(native_int a, native_int b) { return _mm512_add_epi32(a, b); }
KD_INLINE native_int n_and_int(native_int a, native_int b) { return _mm512_and_si512(a, b); }
KD_INLINE native_int n_shift_up16(native_int a) { return _mm512_slli_epi32(a, 16); }
KD_INLINE native_int n_shift_down16(native_int a) { return _mm512_srli_epi32(a, 16); }
// The upper halves of `low`'s lanes, below those of `high`'s.
KD_INLINE native_int n_join16(native_int low, native_int high) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, _mm512_set1_epi32((int)0xffff0000),
                                   0xf8);
}

#elif KD_LEVEL == KD_IS_avx2

constexpr int kWidth = 8;
typedef __m256 native;
typedef __m256i native_int;
typedef __m256 native_mask;
KD_INLINE native n_all(float x) { return _mm256_set1_ps(x); }
KD_INLINE native n_load(const float* p) { return _mm256_loadu_ps(p); }
KD_INLINE void n_store(float* p, native x) { _mm256_storeu_ps(p, x); }
KD_INLINE native n_fma(native a, native b, native c) { return _mm256_fmadd_ps(a, b, c); }
KD_INLINE native n_fma_exact(native a, native b, native c) { return n_fma(a, b, c); }
KD_INLINE native n_max(native a, native b) { return _mm256_max_ps(a, b); }
KD_INLINE native n_min(native a, native b) { return _mm256_min_ps(a, b); }
KD_INLINE native n_abs(native a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
KD_INLINE native_mask n_lt(native a, native b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
KD_INLINE native_mask n_le(native a, native b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
KD_INLINE native_mask n_eq(native a, native b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
KD_INLINE native_mask n_first(int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
}
KD_INLINE native_mask n_not(native_mask a) {
  return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-1)));
}
KD_INLINE native n_select(native_mask k, native a, native b) { return _mm256_blendv_ps(b, a, k); }
KD_INLINE native_int n_bits(native a) { return _mm256_castps_si256(a); }
KD_INLINE native n_from_bits(native_int a) { return _mm256_castsi256_ps(a); }
KD_INLINE native_int n_int(int x) { return _mm256_set1_epi32(x); }
KD_INLINE native_int n_add_int(native_int a, native_int b) { return _mm256_add_epi32(a, b); }
KD_INLINE native_int n_and_int(native_int a, native_int b) { return _mm256_and_si256(a, b); }
KD_INLINE native_int n_shift_up16(native_int a) { return _mm256_slli_epi32(a, 16); }
KD_INLINE native_int n_shift_down16(native_int a) { return _mm256_srli_epi32(a, 16); }
KD_INLINE native_int n_join16(native_int low, native_int high) {
  return _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xaa);
}
// a | (b ^ c)
KD_INLINE native_int n_or_difference(native_int a, native_int b, native_int c) {
  return _mm256_or_si256(a, _mm256_xor_si256(b, c));
}
// No bit of `which` is set in a.
KD_INLINE bool n_none(native_int a, native_int which) { return _mm256_testz_si256(a, which); }

#else

// 16 bytes of GCC's and Clang's own vector type: SSE2 on x86-64, NEON on AArch64.
constexpr int kWidth = 4;
typedef float native __attribute__((vector_size(16)));
typedef int32_t native_int __attribute__((vector_size(16)));
typedef uint32_t native_uint __attribute__((vector_size(16)));
typedef int32_t native_mask __attribute__((vector_size(16)));
KD_INLINE native n_all(float x) { return native{x, x, x, x}; }
KD_INLINE native n_load(const float* p) {
  native x;
  memcpy(&x, p, sizeof x);
  return x;
}
KD_INLINE void n_store(float* p, native x) { memcpy(p, &x, sizeof x); }
KD_INLINE native_int n_bits(native a) { return (native_int)a; }
KD_INLINE native n_from_bits(native_int a) { return (native)a; }
KD_INLINE native_int n_int(int x) { return native_int{x, x, x, x}; }
KD_INLINE native_int n_add_int(native_int a, native_int b) {  // unsigned: signed overflow is undefined
  return (native_int)((native_uint)a + (native_uint)b);
}
KD_INLINE native_int n_and_int(native_int a, native_int b) { return a & b; }
KD_INLINE native_int n_shift_up16(native_int a) { return (native_int)((native_uint)a << 16); }
KD_INLINE native_int n_shift_down16(native_int a) { return (native_int)((native_uint)a >> 16); }
KD_INLINE native_int n_join16(native_int low, native_int high) {
  return n_shift_down16(low) | (high & (int)0xffff0000);
}
KD_INLINE native_int n_or_difference(native_int a, native_int b, native_int c) { return a | (b ^ c); }
KD_INLINE bool n_none(native_int a, native_int which) {
  const native_int x = a & which;
  return (x[0] | x[1] | x[2] | x[3]) == 0;
}
KD_INLINE native n_fma(native a, native b, native c) { return a * b + c; }

// Where the product must not be rounded: there is no such instruction, but doubles hold it.
KD_INLINE native n_fma_exact(native a, native b, native c) {
  typedef double wide __attribute__((vector_size(32)));
  const wide x = __builtin_convertvector(a, wide), y = __builtin_convertvector(b, wide);
  return __builtin_convertvector(x * y + __builtin_convertvector(c, wide), native);
}
KD_INLINE native n_abs(native a) { return (native)((native_int)a & 0x7fffffff); }
KD_INLINE native_mask n_lt(native a, native b) { return a < b; }
KD_INLINE native_mask n_le(native a, native b) { return a <= b; }
KD_INLINE native_mask n_eq(native a, native b) { return a == b; }
KD_INLINE native_mask n_first(int count) { return native_int{0, 1, 2, 3} < count; }
KD_INLINE native_mask n_not(native_mask a) { return ~a; }
KD_INLINE native n_select(native_mask k, native a, native b) {
  return (native)((k & (native_int)a) | (~k & (native_int)b));
}
KD_INLINE native n_max(native a, native b) { return n_select(a > b, a, b); }
KD_INLINE native n_min(native a, native b) { return n_select(a < b, a, b); }

#endif

KD_INLINE native_mask n_and(native_mask a, native_mask b) {
#if KD_LEVEL == KD_IS_avx2
  return _mm256_and_ps(a, b);
#else
  return (native_mask)(a & b);
#endif
}

// How a divergence's `near` branch is taken (see math.h): kPrecise keeps the series, kQuick drops them.
enum { kPrecise, kQuick };

// A mask that holds nowhere, known at compile time.
struct nowhere {};
struct everywhere {};
struct mask {
  native_mask k;
};
KD_INLINE mask operator&(mask a, mask b) { return {n_and(a.k, b.k)}; }
KD_INLINE mask operator!(mask a) { return {n_not(a.k)}; }
KD_INLINE mask first_lanes(int count) { return {n_first(count)}; }

template <int kMode>
struct vec {
  native v;
  KD_INLINE static vec all(float x) { return {n_all(x)}; }
  KD_INLINE static vec load(const float* p) { return {n_load(p)}; }
  KD_INLINE void store(float* p) const { n_store(p, v); }
  KD_INLINE friend vec operator+(vec a, vec b) { return {a.v + b.v}; }
  KD_INLINE friend vec operator-(vec a, vec b) { return {a.v - b.v}; }
  KD_INLINE friend vec operator*(vec a, vec b) { return {a.v * b.v}; }
  KD_INLINE friend vec operator/(vec a, vec b) { return {a.v / b.v}; }
  KD_INLINE friend vec operator-(vec a) { return {-a.v}; }
  KD_INLINE friend vec fma(vec a, vec b, vec c) { return {n_fma(a.v, b.v, c.v)}; }
  // max(low, x), but x where x is NaN.
  KD_INLINE friend vec floor_at(vec x, vec low) { return {n_max(low.v, x.v)}; }
  KD_INLINE friend vec larger(vec a, vec b) { return {n_max(a.v, b.v)}; }
  KD_INLINE friend vec smaller(vec a, vec b) { return {n_min(a.v, b.v)}; }
  KD_INLINE friend mask lt(vec a, vec b) { return {n_lt(a.v, b.v)}; }
  KD_INLINE friend mask eq(vec a, vec b) { return {n_eq(a.v, b.v)}; }
  KD_INLINE friend vec select(mask k, vec a, vec b) { return {n_select(k.k, a.v, b.v)}; }
  KD_INLINE friend vec select(nowhere, vec, vec b) { return b; }
  KD_INLINE friend vec select(everywhere, vec a, vec) { return a; }
};
typedef vec<kPrecise> vf;

KD_INLINE double sum(native x) {
  float lane[kWidth];
  n_store(lane, x);
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += lane[i];
  return total;
}
KD_INLINE float largest(native x) {
  float lane[kWidth];
  n_store(lane, x);
  float best = lane[0];
  for (int i = 1; i < kWidth; ++i) best = lane[i] > best ? lane[i] : best;
  return best;
}
KD_INLINE float smallest(native x) { return -largest(-x); }

}  // namespace KD_NS

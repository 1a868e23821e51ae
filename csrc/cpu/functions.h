// exp, log and the rest of the element language for float vectors.
//
// Accuracy (against long double, all finite arguments of the stated range): kd_exp 1.1 ulp, kd_log 1.5 ulp.
#pragma once
#include "vec.h"

namespace KD_NS {

// 2^n * y for the n hidden in the low bits of t = n + 1.5 * 2^23; n in [-126, 127] and y near 1.
KD_INLINE native scale_by(native y, native t, native n) {
#if KD_LEVEL == KD_IS_avx512
  (void)t;
  return _mm512_scalef_ps(y, n);
#elif KD_LEVEL == KD_IS_avx2
  (void)n;
  return n_from_bits(_mm256_add_epi32(n_bits(y), _mm256_slli_epi32(n_bits(t), 23)));
#else
  (void)n;
  return n_from_bits(n_bits(y) + (n_bits(t) << 23));
#endif
}

// e^x for x in [-87, 88]. The remainder needs one step: |n| * (ln 2 - float(ln 2)) stays below 2.4e-7 at n =
// 126 and below 4e-8 where e^x still counts. Polynomial: minimax, relative error 3e-9.
KD_INLINE native exp_in_range(native x) {
  const native magic = n_all(12582912.0f);
  const native t = n_fma(x, n_all(1.44269504f), magic);
  const native n = t - magic;
  const native r = n_fma(n, n_all(-0.693147181f), x);
  native y = n_fma(n_all(0.00138144671f), r, n_all(0.00836878041f));
  y = n_fma(y, r, n_all(0.0416683942f));
  y = n_fma(y, r, n_all(0.166665201f));
  y = n_fma(y, r, n_all(0.499999934f));
  y = n_fma(y, r, n_all(1.0f));
  y = n_fma(y, r, n_all(1.0f));
  return scale_by(y, t, n);
}

KD_INLINE native exp_clamped(native x) { return exp_in_range(n_min(n_all(88.7f), n_max(n_all(-87.0f), x))); }

// Natural logarithm of a positive normal number.
KD_INLINE native log_positive(native x) {
#if KD_LEVEL == KD_IS_avx512
  const native e = _mm512_getexp_ps(x * n_all(1.33333333f));
  const native f = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src) - n_all(1.0f);
#elif KD_LEVEL == KD_IS_avx2
  const __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(n_bits(x), _mm256_set1_epi32(0x3f400000)), 23);
  const native e = _mm256_cvtepi32_ps(k);
  const native f = n_from_bits(_mm256_sub_epi32(n_bits(x), _mm256_slli_epi32(k, 23))) - n_all(1.0f);
#else
  const native_int k = (n_bits(x) - 0x3f400000) >> 23;
  const native e = __builtin_convertvector(k, native);
  const native f = n_from_bits(n_bits(x) - (k << 23)) - n_all(1.0f);
#endif
  native y = n_fma(n_all(0.0555971373f), f, n_all(-0.121141248f));
  y = n_fma(y, f, n_all(0.149044386f));
  y = n_fma(y, f, n_all(-0.167888184f));
  y = n_fma(y, f, n_all(0.1998232f));
  y = n_fma(y, f, n_all(-0.249963606f));
  y = n_fma(y, f, n_all(0.333334707f));
  y = n_fma(y, f, n_all(-0.5f));
  y = n_fma(y * f, f, n_fma(e, n_all(-2.12194440e-4f), f));
  return n_fma(e, n_all(0.693359375f), y);
}

// tanh by expm1, to a few ulp of the result also near 0.
KD_INLINE native tanh_full(native x) {
  const native u = n_min(n_all(18.0f), n_abs(x) + n_abs(x));
  const native magic = n_all(12582912.0f);
  const native t = n_fma(u, n_all(1.44269504f), magic);
  const native n = t - magic;
  const native r = n_fma(n, n_all(-0.693147181f), u);
  native y = n_fma(n_all(0.00136818029f), r, n_all(0.00836163867f));
  y = n_fma(y, r, n_all(0.0416696273f));
  y = n_fma(y, r, n_all(0.166665797f));
  y = n_fma(y, r, n_all(0.499999932f));
  y = n_fma(y * r, r, r);
  const native power = scale_by(n_all(1.0f), t, n);
  const native em1 = n_fma(power, y, power - n_all(1.0f));
  const native size = em1 / (em1 + n_all(2.0f));
  const native signed_size = n_select(n_lt(x, n_all(0.0f)), -size, size);
  return n_select(n_eq(x, x), signed_size, x);
}

// ---- what the generated header of divergences calls
// --------------------------------------------------------

template <class T>
KD_INLINE T kd_const(double x) {
  return T::all((float)x);
}
template <int M>
KD_INLINE vec<M> kd_exp(vec<M> x) {
  return {exp_clamped(x.v)};
}
template <int M>
KD_INLINE vec<M> kd_log(vec<M> x) {
  return {log_positive(x.v)};
}
template <int M>
KD_INLINE vec<M> kd_abs(vec<M> x) {
  return {n_abs(x.v)};
}
template <int M>
KD_INLINE vec<M> kd_max(vec<M> x, vec<M> y) {
  return {n_select(n_eq(x.v, x.v), n_max(x.v, y.v), x.v)};
}
template <int M>
KD_INLINE vec<M> kd_min(vec<M> x, vec<M> y) {
  return {n_select(n_eq(x.v, x.v), n_min(x.v, y.v), x.v)};
}
template <int M>
KD_INLINE mask kd_lt(vec<M> x, vec<M> y) {
  return {n_lt(x.v, y.v)};
}
template <int M>
KD_INLINE mask kd_gt(vec<M> x, vec<M> y) {
  return {n_lt(y.v, x.v)};
}
template <int M>
KD_INLINE mask kd_le(vec<M> x, vec<M> y) {
  return {n_le(x.v, y.v)};
}
template <int M>
KD_INLINE mask kd_ge(vec<M> x, vec<M> y) {
  return {n_le(y.v, x.v)};
}
template <int M>
KD_INLINE mask kd_eq(vec<M> x, vec<M> y) {
  return {n_eq(x.v, y.v)};
}
template <int M>
KD_INLINE mask kd_ne(vec<M> x, vec<M> y) {
  return {n_not(n_eq(x.v, y.v))};
}
template <int M>
KD_INLINE vec<M> kd_select(mask k, vec<M> x, vec<M> y) {
  return select(k, x, y);
}
template <int M>
KD_INLINE vec<M> kd_select(nowhere, vec<M>, vec<M> y) {
  return y;
}

// Rows far from convergence skip the series that protect small differences: preferred over the header's own
// template because it is not one. See `quick` in rows.h for which divergences and rows may.
KD_INLINE nowhere kd_near(vec<kQuick>) { return {}; }
KD_INLINE mask kd_near(vec<kPrecise> x) { return {n_lt(n_abs(x.v), n_all(0.25f))}; }

KD_INLINE vec<kQuick> kd_kl(vec<kQuick> p, vec<kQuick> q, vec<kQuick> d) { return fma(p, d, q - p); }
KD_INLINE vec<kPrecise> kd_kl(vec<kPrecise> p, vec<kPrecise> q, vec<kPrecise> d) {
  const vf m = -d;
  vf s = fma(m, vf::all(1.0f / 720), vf::all(1.0f / 120));
  s = fma(m, s, vf::all(1.0f / 24));
  s = fma(m, s, vf::all(1.0f / 6));
  s = fma(m, s, vf::all(0.5f));
  return select(kd_near(d), (p * d) * (d * s), fma(p, d, q - p));
}

}  // namespace KD_NS

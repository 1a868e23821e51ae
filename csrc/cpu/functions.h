// exp, log and the rest of the element language for float vectors.
//
// Accuracy (against long double, all finite arguments of the stated range): kd_exp 1.1 ulp, kd_log 1.5 ulp.
#pragma once
#include "vec.h"

#if KD_LEVEL == KD_IS_avx512
#include "tables.h"
#endif

namespace KD_NS {

// 2^n * y for the n hidden in the low bits of t = n + 1.5 * 2^23; n in [-126, 127] and y near 1. Any other n
// gives some number.
KD_INLINE native scale_by(native y, native t) {
#if KD_LEVEL == KD_IS_avx512
  return n_from_bits(_mm512_add_epi32(n_bits(y), _mm512_slli_epi32(n_bits(t), 23)));
#elif KD_LEVEL == KD_IS_avx2
  return n_from_bits(_mm256_add_epi32(n_bits(y), _mm256_slli_epi32(n_bits(t), 23)));
#else
  return n_from_bits(n_add_int(n_bits(y), (native_int)((native_uint)n_bits(t) << 23)));
#endif
}

// What Exp::checked has seen: on AVX-512 the bits that all had, elsewhere those that some had wrong.
struct RangeCheck {
  native_int bits;
};

// scale * e^(x / T) for one temperature. A step of the range reduction is exact but for float(T ln 2): 3e-9
// of x at T = 1, up to 6e-8 of x (as that of 1 / T would be) at others. Relative error of the rest: 1.7e-7 at
// most.
//
// `clamped` holds x / T at -87 from below, where e^x is 1.6e-38 (NaN stays NaN); x / T must not exceed 88.
// `checked`, for a scale of 1, is for -87.3 < x / T < 1.38 and instead notes when an x was outside, or NaN:
// the number t that counts steps is arranged so that its upper bits are the same for all others, which costs
// less than clamping and keeping a maximum and a minimum.
//
// Where the time goes (Zen 5, 512 bits): multiplications, fused or not, and all instructions with three
// inputs share two pipes; additions, shifts, max and min another two; two-input integer arithmetic runs on
// any. So the check is integer arithmetic, and the exponent is added as an integer, not by vscalefps (two
// slots).
struct Exp {
  native low, rate, step, c0, c1, c2;
#if KD_LEVEL == KD_IS_avx512
  native table, more;
#endif

  KD_INLINE explicit Exp(float per_t, float scale = 1.0f) {
    const float t = 1.0f / per_t;
    low = n_all(-87.0f * t);
    rate = n_all(1.44269504f * per_t * kUnit);
    step = n_all(-0.693147181f * t / kUnit);
    c0 = n_all(scale);
#if KD_LEVEL == KD_IS_avx512
    c1 = n_all(scale * 1.00001468f * per_t);
    c2 = n_all(scale * 0.499996269f * per_t * per_t);
    table = _mm512_load_ps((const float*)kExpTable);
    more = _mm512_load_ps((const float*)(kExpTable + 16));
#else
    c1 = n_all(per_t);
#endif
  }

#if KD_LEVEL == KD_IS_avx512
  // x / T = n ln 2 + r, n in 32nds. t = (n - 1.97) 2^109 - 2^128: among the last negative numbers before
  // -infinity, where 32nds have the weight of the last bit. For n in [-126, 2) its bits are 0xff7ff000 + (63
  // - 32 n).
  static constexpr float kUnit = 6.49037107e32f, kMagic = -3.40200568e38f;  // 2^109; 0xff7ff03f
  static constexpr int kPattern = (int)0xff7ff000;
  KD_INLINE native finish(native x, native t) const {
    const native r = n_fma(t - n_all(kMagic), step, x);
    const __m512i k = n_bits(t);
    const __m512i power = n_bits(_mm512_permutex2var_ps(table, k, more));
    return n_fma(n_fma(c2, r, c1), r, c0) * n_from_bits(_mm512_sub_epi32(power, _mm512_slli_epi32(k, 18)));
  }
  KD_INLINE static RangeCheck fresh() { return {n_int(-1)}; }
  KD_INLINE static void note(native t, RangeCheck& check) { check.bits = n_and_int(check.bits, n_bits(t)); }
  KD_INLINE static bool in_range(RangeCheck check) {
    return _mm512_cmpneq_epi32_mask(n_and_int(check.bits, n_int(kPattern)), n_int(kPattern)) == 0;
  }
  KD_INLINE native scaled(native x) const { return clamped(x); }
#else
  // The same in whole steps: t = 1.5 * 2^23 - 2 + n; for n in [-126, 2) its bits lie in [0x4b3fff80,
  // 0x4b3fffff].
  static constexpr float kUnit = 1.0f, kMagic = 12582910.0f;
  static constexpr int kPattern = 0x4b3fff80, kFixed = ~0x7f;
  KD_INLINE native finish(native x, native t) const {
    const native r = n_fma_exact(t - n_all(kMagic), step, x) * c1;
    native y = n_fma(n_all(0.0331902845f), r, n_all(0.167663505f));  // of 4 e^r: t counts from 2 steps below
    y = n_fma(y, r, n_all(0.66670314f));
    y = n_fma(y, r, n_all(1.99995562f));
    y = n_fma(y, r, n_all(3.99999876f));
    y = n_fma(y, r, n_all(4.00000029f));
    return scale_by(y, t);
  }
  KD_INLINE static RangeCheck fresh() { return {n_int(0)}; }
  KD_INLINE static void note(native t, RangeCheck& check) {
    check.bits = n_or_difference(check.bits, n_bits(t), n_int(kPattern));
  }
  KD_INLINE static bool in_range(RangeCheck check) { return n_none(check.bits, n_int(kFixed)); }
  KD_INLINE native scaled(native x) const { return clamped(x) * c0; }
#endif

  KD_INLINE native clamped(native x) const {
    x = n_max(low, x);
    return finish(x, n_fma(x, rate, n_all(kMagic)));
  }
  KD_INLINE native checked(native x, RangeCheck& check) const {
    const native t = n_fma(x, rate, n_all(kMagic));
    note(t, check);
    return finish(x, t);
  }
};

// Natural logarithm of a positive normal number, to 1e-7 or 1e-7 of itself.
KD_INLINE native log_positive(native x) {
#if KD_LEVEL == KD_IS_avx512
  const __m512i k = _mm512_srli_epi32(n_bits(x), 19);  // four leading bits of the fraction
  const native m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const native r = n_fma(m, _mm512_permutexvar_ps(k, _mm512_load_ps(kInverseTable)), n_all(-1.0f));
  const native base = _mm512_permutexvar_ps(k, _mm512_load_ps(kLogTable));
  const native y = n_fma(n_fma(n_all(0.333609774f), r, n_all(-0.500202369f)), r, n_all(0.999999921f));
  return n_fma(y, r, n_fma(_mm512_getexp_ps(x), n_all(0.693147181f), base));
#else
#if KD_LEVEL == KD_IS_avx2
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
#endif
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
  const native power = scale_by(n_all(1.0f), t);
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
  return {Exp(1.0f).clamped(n_min(n_all(88.7f), x.v))};
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

// What the gate does to a block of logits: sums of exponentials, and the divergence of two sides.
//
// With M the larger of p and q and rho <= 1 the smaller over M, an entry adds, in bits,
//
//   2 term = p log2(2p / s) + q log2(2q / s) = M ((1 + rho) g(rho) + rho log2 rho),   g(rho) = log2(2 / (1 +
//   rho)).
//
// Two exponentials, no logarithm of a small number, no division: log2 rho is a difference of logits. The two
// parts, of one sign each, are of the order of M, so the sum over a row is good to 1e-7 whatever p and q are.
// Where they are nearly equal the parts cancel; there, with d = log p - log q in nats, 2 term = s F(d) with
// the even series F = d^2 / 8 - d^4 / 64 + d^6 / 576 - ...
#pragma once
#include "gate_isa.h"
#include "lse.h"

namespace KD_NS {

constexpr double kLog2E = 1.4426950408889634;

// Both sides' log-sum-exp, in nats.
struct Pair {
  double student, teacher;
};

// Lines of the rows to come that are asked for meanwhile: so many eighths of as many bytes as are at work.
struct Coming {
  const char *student, *teacher;
  int eighths;

  // While the step at element i is at work.
  template <class X>
  KD_INLINE void ask(int i) const {
    const int64_t begin = (int64_t)i * (int)sizeof(typename X::stored) * eighths / 8;
    for (int at = 0; at < kStep * (int)sizeof(typename X::stored); at += 64) {
      __builtin_prefetch(student + begin + at, 0, 2);
      __builtin_prefetch(teacher + begin + at, 0, 2);
    }
  }
};

KD_INLINE double lanes_total(vf x) {
#if KD_LEVEL == KD_IS_avx512
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1));
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(high)));
#else
  return sum(x.v);
#endif
}

template <class X>
KD_INLINE void load_step(const typename X::stored* p, vf* x) {
  X::load2(p, x);
}
template <>
KD_INLINE void load_step<f16>(const uint16_t* p, vf* x) {
  x[0] = f16::load(p);
  x[1] = f16::load(p + kWidth);
}

// From logits to log-probabilities in nats. References are multiples of 1/8: exact to subtract.
struct Logs {
  Normaliser s, t;

  KD_INLINE explicit Logs(const Pair& c) : s(of(c.student)), t(of(c.teacher)) {}
  KD_INLINE static Normaliser of(double lse) {
    return normaliser_of({exp(lse - (float)lse), 0, (float)lse}, 1.0);
  }
  KD_INLINE vf student(vf z) const { return (z - vf::all(s.reference)) - vf::all(s.log); }
  KD_INLINE vf teacher(vf z) const { return (z - vf::all(t.reference)) - vf::all(t.log); }
  // log p - log q.
  KD_INLINE vf apart(vf zs, vf zt) const {
    return ((zt - vf::all(t.reference)) - (zs - vf::all(s.reference))) - vf::all(t.log - s.log);
  }
};

// 2 term / M in nats, from rho and -log rho.
KD_INLINE vf twice_term(vf rho, vf size) {
  const vf t = rho + vf::all(1);
  return fma(t, vf::all(0.693147181f) - vf{log_positive(t.v)}, -(rho * size));
}

#if KD_LEVEL == KD_IS_avx512

// Bits of 2^((126 - i) / 32) times a factor of Power2, plus i << 18, plus 0xc0000000: less (k << 18), for the
// k of Power2, that is 2^n.
alignas(64) static const uint32_t kPower2Table[32] = {
    0x006b8f9c, 0x006a836d, 0x006992ef, 0x0068bd89, 0x006802a7, 0x006761b8, 0x0066da2c, 0x00666b79,
    0x00661517, 0x0065d67f, 0x0065af31, 0x00659eab, 0x0065a471, 0x0065c008, 0x0065f0f9, 0x006636cf,
    0x00669117, 0x0066ff61, 0x00678140, 0x00681647, 0x0068be0e, 0x0069782d, 0x006a4441, 0x006b21e7,
    0x006c10be, 0x006d1068, 0x006e2088, 0x006f40c5, 0x007070c7, 0x006f606b, 0x006dfd7a, 0x006cb816,
};
// 1 plus log2 of kInverseTable, corrected at rho = (i + 1/2) / 16 for what Power2::below takes off rho.
alignas(64) static const float kRatioTable[16] = {
    0.955605865f, 0.870716929f, 0.790546536f,  0.714597702f,  0.642447829f, 0.573735118f,
    0.508146763f, 0.445410937f, 0.385289967f,  0.327574551f,  0.272079408f, 0.218640074f,
    0.167109832f, 0.117356792f, 0.0692624152f, 0.0227199942f,
};

// 2^y for y in (-124, 3.95), as two factors. y = n + f with n in 32nds, whose bits come from t as in Exp, two
// steps higher: the factor from the table is 2^(y - 2.1) and must not fall below 2^-126;
// then 2^f = c ((f + a)^2 + b) to 5e-8, c being in the table: a square costs one multiplication less than a
// quadratic.
//
// Where the time goes (Zen 5, 512 bits, measured): multiplications and fused ones take two pipes, additions,
// shifts, max and min the other two, permutes one of each; vreduceps counts as two additions.
struct Power2 {
  native low, high;
  native b, b_below;

  KD_INLINE Power2() {
    low = _mm512_load_ps((const float*)kPower2Table);
    high = _mm512_load_ps((const float*)(kPower2Table + 16));
    b = n_all(2.081308f);
    b_below = n_all(2.081307f);
  }
  static constexpr float kUnit = 6.49037107e32f;  // 2^109
  static constexpr int kMagic = (int)0xff7ff07e;  // even, as n = 0 is: both roundings take ties to the same n

  struct Factors {
    native m, power;
  };
  KD_INLINE Factors factors(native y, native offset, RangeCheck& check) const {
    const native t = n_fma(y, n_all(kUnit), n_from_bits(n_int(kMagic)));
    Exp::note(t, check);
    const native f = _mm512_reduce_ps(y, 0x50) + n_all(1.4427267f);
    const native_int k = n_bits(t), bits = n_bits(_mm512_permutex2var_ps(low, k, high));
    return {n_fma(f, f, offset), n_from_bits(_mm512_sub_epi32(bits, _mm512_slli_epi32(k, 18)))};
  }
  KD_INLINE Factors of(native y, RangeCheck& check) const { return factors(y, b, check); }
  // Less by 2.3e-7 of itself: below 1 for y <= 0.
  KD_INLINE Factors below(native y, RangeCheck& check) const { return factors(y, b_below, check); }
};

// log2 e as logits are multiplied by it. Normalisers too: what it is off by then acts on differences alone,
// not on logits that share an offset of hundreds.
constexpr double kRate = (float)kLog2E;

// Sum of e^(z - *reference) over n stored numbers, a multiple of kStep; *reference is close to `guess`.
// False, and of no use, where one is masked, NaN, or far from it: not in (-85.9, 2.7).
template <class X>
KD_NOINLINE bool sum_quickly(const void* from, int n, float guess, double* reference, double* to) {
  const typename X::stored* p = (const typename X::stored*)from;
  const float base = (float)(guess * kRate);
  const Power2 power2;
  const native rate = n_all((float)kRate), shift = n_all(-base);
  RangeCheck check = Exp::fresh();
  native sums[2] = {n_all(0), n_all(0)};
  for (int i = 0; i < n; i += kStep) {
    vf z[2];
    load_step<X>(p + i, z);
    for (int h = 0; h < 2; ++h) {
      const Power2::Factors e = power2.of(n_fma(z[h].v, rate, shift), check);
      sums[h] = n_fma(e.m, e.power, sums[h]);
    }
  }
  *reference = base / kRate;
  *to = lanes_total({sums[0] + sums[1]});
  return Exp::in_range(check);
}

// 2 term / M in bits, from rho and log2 rho.
KD_INLINE native twice_term(native rho, native log) {
  const native one = n_all(1.0f), t = rho + one;  // below 2
  const native_int k = _mm512_srli_epi32(n_bits(t), 19);
  const native r = n_fma(t, _mm512_permutexvar_ps(k, _mm512_load_ps(kInverseTable)), -one);
  const native y = n_fma(n_fma(n_all(-0.4812741f), r, n_all(0.7216226f)), r, n_all(-1.4426949f));
  const native g = n_fma(y, r, _mm512_permutexvar_ps(k, _mm512_load_ps(kRatioTable)));
  return n_fma(t, g, rho * log);
}

// Sum of 2 term over n pairs of stored numbers. False where one is masked or far from both normalisers. In
// two loops through the first cache: in one the chain of operations is longer than the processor looks ahead
// (and the constants more than it has registers), which takes a quarter more time.
template <class X>
KD_NOINLINE bool apart_quickly(const void* student, const void* teacher, int n, const Pair& c,
                               const Coming* coming, double* to) {
  const typename X::stored *ps = (const typename X::stored*)student, *pt = (const typename X::stored*)teacher;
  const double lse_s = c.student * kRate, lse_t = c.teacher * kRate;
  const float base_s = (float)lse_s, base_t = (float)lse_t;
  const native rate = n_all((float)kRate), shift_s = n_all(-base_s), shift_t = n_all(-base_t);
  const native apart = n_all((float)((lse_t - base_t) - (lse_s - base_s)));
  const Power2 power2;
  RangeCheck check = Exp::fresh();
  native sums[2] = {n_all(0), n_all(0)};
  alignas(64) float ratios[3 * 512];
  for (int first = 0; first < n; first += 512) {
    const int end = first + 512 < n ? first + 512 : n;
    float* out = ratios;
    for (int i = first; i < end; i += kStep) {
      vf zs[2], zt[2];
      load_step<X>(ps + i, zs);
      load_step<X>(pt + i, zt);
      if (coming) coming->ask<X>(i);
      for (int h = 0; h < 2; ++h, out += 3 * kWidth) {
        const native q = n_fma(zs[h].v, rate, shift_s), p = n_fma(zt[h].v, rate, shift_t) - apart;
        const native top = n_max(p, q), log = n_min(p, q) - top;
        const Power2::Factors big = power2.of(top, check), rho = power2.below(log, check);
        n_store(out, big.m * big.power);
        n_store(out + kWidth, rho.m * rho.power);
        n_store(out + 2 * kWidth, log);
      }
    }
    for (const float* at = ratios; at < out; at += 6 * kWidth) {
      for (int h = 0; h < 2; ++h) {
        const float* x = at + 3 * kWidth * h;
        sums[h] = n_fma(n_load(x), twice_term(n_load(x + kWidth), n_load(x + 2 * kWidth)), sums[h]);
      }
    }
  }
  *to = lanes_total({sums[0] + sums[1]}) * exp2(base_s - lse_s);
  return Exp::in_range(check);
}

#else

template <class X>
KD_NOINLINE bool sum_quickly(const void* from, int n, float guess, double* reference, double* to) {
  const typename X::stored* p = (const typename X::stored*)from;
  const Exp exp_1(1.0f);
  const vf base = vf::all(guess);
  RangeCheck check = Exp::fresh();
  Running<kLongLanes, vf> sums[2];
  for (int i = 0; i < n; i += kStep) {
    vf z[2];
    load_step<X>(p + i, z);
    for (int h = 0; h < 2; ++h) sums[h].add(vf{exp_1.checked((z[h] - base).v, check)});
  }
  *reference = guess;
  *to = lanes_total(sums[0].total + sums[1].total);
  return Exp::in_range(check);
}

template <class X>
KD_NOINLINE bool apart_quickly(const void* student, const void* teacher, int n, const Pair& c,
                               const Coming* coming, double* to) {
  const typename X::stored *ps = (const typename X::stored*)student, *pt = (const typename X::stored*)teacher;
  const Logs logs(c);
  const Exp larger_of(1.0f), ratio_of(-1.0f);
  RangeCheck check_big = Exp::fresh(), check_rho = Exp::fresh();
  Running<kLongLanes, vf> sums[2];
  for (int i = 0; i < n; i += kStep) {
    vf zs[2], zt[2];
    load_step<X>(ps + i, zs);
    load_step<X>(pt + i, zt);
    if (coming) coming->ask<X>(i);
    for (int h = 0; h < 2; ++h) {
      const vf q = logs.student(zs[h]), p = logs.teacher(zt[h]), d = p - q, size = {n_abs(d.v)};
      const vf rho = {ratio_of.checked(size.v, check_rho)};
      sums[h].add(vf{larger_of.checked(larger(p, q).v, check_big)}, twice_term(rho, size));
    }
  }
  *to = lanes_total(sums[0].total + sums[1].total) * kLog2E;
  return Exp::in_range(check_big) && Exp::in_range(check_rho);
}

#endif

// The same for any floats but NaN and +inf, with the series where p and q are nearly equal.
KD_NOINLINE inline double apart_carefully(const float* student, const float* teacher, int n, const Pair& c) {
  const Logs logs(c);
  const Exp exp_1(1.0f);
  const vf most = vf::all(100.0f), quarter = vf::all(0.25f), one = vf::all(1);
  Running<true, vf> sums;
  for (int i = 0; i < n; i += kWidth) {
    const vf x = vf::load(student + i), y = vf::load(teacher + i);
    const vf size = smaller({n_abs(logs.apart(x, y).v)}, most);  // NaN, of two masked entries, too
    const vf big = {exp_1.clamped(larger(logs.student(x), logs.teacher(y)).v)};
    const vf rho = {exp_1.clamped((-size).v)}, d2 = size * size;
    vf f = fma(d2, vf::all(-17.0f / 92160), vf::all(1.0f / 576));
    f = fma(-d2, f, vf::all(1.0f / 64));
    f = fma(-d2, f, vf::all(1.0f / 8));
    sums.add(big * select(lt(size, quarter), (one + rho) * (d2 * f), twice_term(rho, size)));
  }
  return lanes_total(sums.total) * kLog2E;
}

}  // namespace KD_NS

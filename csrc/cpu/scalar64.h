// float64 in plain scalar code, in double precision throughout: what the row functions of every form of
// teacher share. For gradcheck and for whoever trains in float64; nothing here is tuned. -inf entries,
// hopeless logits and NaN rows as in rows.h.
#pragma once
#define KD_ISA f64
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "head.h"
#include "isa.h"

namespace kd_f64 {

template <class T>
KD_INLINE T kd_const(double x) {
  return x;
}
KD_INLINE double kd_exp(double x) { return exp(x < -700.0 ? -700.0 : x); }
KD_INLINE double kd_log(double x) { return log(x); }
KD_INLINE double kd_abs(double x) { return fabs(x); }
KD_INLINE double kd_max(double x, double y) { return x != x || x > y ? x : y; }
KD_INLINE double kd_min(double x, double y) { return x != x || x < y ? x : y; }
KD_INLINE bool kd_lt(double x, double y) { return x < y; }
KD_INLINE bool kd_gt(double x, double y) { return x > y; }
KD_INLINE bool kd_le(double x, double y) { return x <= y; }
KD_INLINE bool kd_ge(double x, double y) { return x >= y; }
KD_INLINE bool kd_eq(double x, double y) { return x == y; }
KD_INLINE bool kd_ne(double x, double y) { return x != y; }
KD_INLINE double kd_select(bool k, double x, double y) { return k ? x : y; }
KD_INLINE double kd_kl(double p, double q, double d) { return p * (d - 1.0) + q; }

#include "divergences.gen.h"

constexpr double kMasked = -1e4, kHopeless = -1e20;
constexpr double kInfinity = INFINITY;

typedef double (*Element)(double, double, double, double, double, double);
struct Functions {
  Element term, grad;
};
#define KD_ROW(name, id) {name::term<double>, name::grad<double>},
static const Functions kFunctions[] = {KD_FOR_EACH_DIVERGENCE(KD_ROW)};
#undef KD_ROW
constexpr int kDivergences = sizeof(kFunctions) / sizeof(kFunctions[0]);

inline double logit(const kd_side& s, int64_t r, int64_t i) {
  const double x = ((const double*)s.data)[r * s.row_stride + i];
  const double z = s.scale * (s.bias ? x + ((const double*)s.bias)[i] : x);
  return s.softcap > 0 ? s.softcap * tanh(z / s.softcap) : z;
}

// A side's row at one temperature: log-probability = (z - max) / T - log_sum.
struct Norm {
  double max, log_sum, entropy;
  int64_t top;
  bool bad;
};

inline Norm norm_of(const kd_side& s, int64_t r, int64_t vocab, double t) {
  Norm n = {-kInfinity, 0, 0, 0, false};
  for (int64_t i = 0; i < vocab; ++i) {
    const double z = logit(s, r, i);
    n.bad |= z != z;
    if (z > n.max) {
      n.max = z;
      n.top = i;
    }
  }
  n.bad |= !(n.max > -kInfinity && n.max < kInfinity);
  double sum = 0, weighted = 0;
  for (int64_t i = 0; i < vocab && !n.bad; ++i) {
    const double x = (logit(s, r, i) - n.max) / t, e = kd_exp(x);
    sum += e;
    weighted += x < -700 ? 0 : x * e;
  }
  n.log_sum = log(sum);
  n.entropy = n.log_sum - weighted / sum;
  return n;
}

inline double log_probability(double z, const Norm& n, double t) {
  const double l = (z - n.max) / t - n.log_sum;
  return l < kHopeless ? kMasked : l;
}

inline void fill_row(const kd_rows& a, int64_t r, double value) {
  ((double*)a.loss)[r] = value;
  for (int i = 0; a.stats && i < KD_STATS; ++i) ((double*)a.stats)[r * KD_STATS + i] = value;
  for (int64_t i = 0; a.dlogits && i < a.vocab; ++i) ((double*)a.dlogits)[r * a.dlogits_stride + i] = value;
}

inline void zero_padding(const kd_rows& a, int64_t r) {
  for (int64_t i = a.vocab; a.dlogits && i < a.dlogits_vocab; ++i)
    ((double*)a.dlogits)[r * a.dlogits_stride + i] = 0;
}

}  // namespace kd_f64

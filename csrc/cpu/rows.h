// The generic row functions: statistics (sum of term, sum of grad) and gradient of any separable divergence,
// for one block of a row. Log-probabilities and clamped exponentials are formed here; the divergence sees
// nothing else.
#pragma once
#include "lse.h"

namespace KD_NS {

#include "divergences.gen.h"

// What the sweeps after the first need to know of a row.
struct RowNumbers {
  Normaliser student, teacher;
  float per_t;
};

// The two sides of one vector.
template <class V>
struct Pair {
  V lp, lq, p, q;
};

// Rows with masked entries, -inf or hopeless (below kHopeless: finfo.min): their log-probability becomes
// kMasked. The clamped exponential, 1.6e-38, would make numbers of products with a hopeless one.
template <class V>
KD_INLINE void mend(Pair<V>& x) {
  const V masked = V::all(kMasked), hopeless = V::all(kHopeless);
  x.lp = select(lt(x.lp, hopeless), masked, x.lp);
  x.lq = select(lt(x.lq, hopeless), masked, x.lq);
}

template <bool kCareful, class V>
KD_INLINE Pair<V> pair_at(const float* zs, const float* zt, const RowNumbers& r) {
  const V inverse = V::all(r.per_t);
  Pair<V> x;
  x.lp = fma(V::load(zt) - V::all(r.teacher.reference), inverse, V::all(-r.teacher.log));
  x.lq = fma(V::load(zs) - V::all(r.student.reference), inverse, V::all(-r.student.log));
  x.p = kd_exp(x.lp);
  x.q = kd_exp(x.lq);
  if (kCareful) mend(x);
  return x;
}

struct TermGrad {
  double term, grad;
};

struct Parameters {
  float a, b;
};

// Sums of term and grad; with `kept`, grad and q of every vector are left there for the gradient.
template <class D, int kMode, bool kCareful>
KD_NOINLINE TermGrad stats_block(const float* zs, const float* zt, int n, const RowNumbers& r,
                                 Parameters given, float* kept) {
  typedef vec<kMode> V;
  const V a = V::all(given.a), b = V::all(given.b), zero = V::all(0);
  V term = zero, grad = zero;
  for_vectors(n, [&](int i, auto lanes) {
    const Pair<V> x = pair_at<kCareful, V>(zs + i, zt + i, r);
    term = term + select(lanes, D::term(x.lp, x.lq, x.p, x.q, a, b), zero);
    const V g = D::grad(x.lp, x.lq, x.p, x.q, a, b);
    grad = grad + select(lanes, g, zero);
    if (kept) {
      vf{g.v}.store(kept + 2 * i);
      vf{x.q.v}.store(kept + 2 * i + kWidth);
    }
  });
  return {sum(term.v), sum(grad.v)};
}

// out = kd * grad + share * q from what the statistics kept; share = ce - kd * total, with kd = w_kd / T and,
// at T = 1, ce = w_ce; else ce = 0.
KD_NOINLINE inline void kept_gradient(const float* kept, float* out, int n, float kd, float share) {
  const vf a = vf::all(kd), b = vf::all(share);
  for (int i = 0; i < n; i += kWidth) {
    fma(a, vf::load(kept + 2 * i), b * vf::load(kept + 2 * i + kWidth)).store(out + i);
  }
}

// A divergence's row functions. `quick` leaves out the series for small differences: its sum is off by some
// 1e-7 nats, so a row whose divergence comes out small is summed again by `precise`. Only divergences whose
// plain form is that good are quick; a newcomer is not.
struct RowFunctions {
  TermGrad (*quick)(const float*, const float*, int, const RowNumbers&, Parameters, float*);
  TermGrad (*precise)(const float*, const float*, int, const RowNumbers&, Parameters, float*);
  TermGrad (*careful)(const float*, const float*, int, const RowNumbers&, Parameters, float*);
};

constexpr bool same(const char* a, const char* b) {
  for (; *a && *a == *b; ++a, ++b) {
  }
  return *a == *b;
}

template <class D>
constexpr bool plain_form_is_good() {
  return same(D::name, "forward_kl") || same(D::name, "reverse_kl") || same(D::name, "jsd") ||
         same(D::name, "skew_kl") || same(D::name, "skew_reverse_kl") || same(D::name, "total_variation");
}

template <class D>
constexpr RowFunctions functions_of() {
  return {stats_block<D, (plain_form_is_good<D>() ? kQuick : kPrecise), false>,
          stats_block<D, kPrecise, false>, stats_block<D, kPrecise, true>};
}

enum Online { kNotOnline, kForwardKl, kReverseKl };

template <class D>
constexpr Online online_of() {
  return same(D::name, "forward_kl") ? kForwardKl : same(D::name, "reverse_kl") ? kReverseKl : kNotOnline;
}

#define KD_ROW(name, id) online_of<name>(),
static constexpr Online kOnline[] = {KD_FOR_EACH_DIVERGENCE(KD_ROW)};
#undef KD_ROW

#define KD_ROW(name, id) functions_of<name>(),
static constexpr RowFunctions kRowFunctions[] = {KD_FOR_EACH_DIVERGENCE(KD_ROW)};
#undef KD_ROW
constexpr int kDivergences = sizeof(kRowFunctions) / sizeof(kRowFunctions[0]);

}  // namespace KD_NS

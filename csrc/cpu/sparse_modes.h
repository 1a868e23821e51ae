// What each mode makes of a row's kept entries and its tail: D, the gradient on the kept entries, and one
// number for all others. Everything here is of size K.
#pragma once
#include "sparse.h"

namespace KD_NS {

struct SparseTask {
  Task task;
  const kd_sparse* args;
  Kept kept;
};

// The student's row in two parts; row.s is their sum.
struct Parts {
  Norm kept, tail;
  double log_tail;  // of the tail's mass; -inf without one
};

struct Comparison {
  double d, entropy;  // the teacher's
  double rest;        // gradient of an entry not kept, in units of its share of the tail's mass
};

typedef void (*ElementSums)(const Sides&, int, Parameters, float*, Lanes&);
#define KD_CAREFUL(name, id) stats_block<name, kPrecise, true>,
static constexpr ElementSums kElementSums[] = {KD_FOR_EACH_DIVERGENCE(KD_CAREFUL)};
#undef KD_CAREFUL

// log-probabilities (z - reference) / T - log of n logits.
inline void log_probabilities(const float* z, int n, Normaliser to, float per_t, float* lq) {
  const vf reference = vf::all(to.reference), log = vf::all(-to.log), inverse = vf::all(per_t);
  for (int k = 0; k < n; k += kWidth) fma(vf::load(z + k) - reference, inverse, log).store(lq + k);
}

// Sums of e^x and e^x (z - max), x = (z - max) / T; NaN where there is NaN or +inf. Writes to the last step's
// rest.
inline Norm norm_of_kept(float* z, int n, float per_t) {
  if (n == 0) return {0, 0, -INFINITY};
  for (int k = n; k < whole_steps(n); ++k) z[k] = z[n - 1];
  Norm s = {0, 0, extremes_of<f32>(z, whole_steps(n)).max};
  if (s.reference == -INFINITY) {
    for (int k = 0; k < n; ++k) s.sum += z[k] != z[k] ? NAN : 0;
    return s;
  }
  for (int k = 0; k < n; k += kBlock) add_block(z + k, n - k < kBlock ? n - k : kBlock, per_t, s);
  return s;
}

// Sums of two parts of a row, relative to the larger maximum.
inline Norm together(const Norm& x, const Norm& y, double per_t) {
  const Norm &high = x.reference >= y.reference ? x : y, &low = x.reference >= y.reference ? y : x;
  if (low.sum == 0) return high;
  const double d = (double)low.reference - high.reference, f = exp(d * per_t);
  return {high.sum + f * low.sum, high.weighted + f * (low.weighted + d * low.sum), high.reference};
}

// Fills task.sides from k .. k + n - 1 of the compared log-probabilities.
inline void kept_sides(const Kept& kept, int at, int n, Sides& to) {
  const vf masked = vf::all(kMasked), hopeless = vf::all(kHopeless);
  for (int k = 0; k < n; k += kWidth) {
    vf lp = vf::load(kept.lp + at + k), lq = vf::load(kept.lq + at + k);
    lp = select(lt(lp, hopeless), masked, lp);
    lq = select(lt(lq, hopeless), masked, lq);
    lp.store(to.lp + k);
    lq.store(to.lq + k);
    kd_exp(lp).store(to.p + k);
    kd_exp(lq).store(to.q + k);
  }
}

struct ModeSums {
  double d, grad, p, q, entropy;
};

// The cross-entropy's term and grad for kElementSums' place.
KD_NOINLINE inline void cross_entropy(const Sides& x, int n, float* kept, Lanes& to) {
  const vf zero = vf::all(0);
  Running<kLongLanes, vf> term, grad;
  for_vectors(n, [&](int i, auto lanes) {
    const vf g = -vf::load(x.p + i);
    term.add(select(lanes, g * vf::load(x.lq + i), zero));
    grad.add(select(lanes, g, zero));
    g.store(kept + i);
  });
  add_lanes(to.term, term.total);
  add_lanes(to.grad, grad.total);
}

// Adds what a block of compared entries is besides its divergence.
KD_NOINLINE inline void add_masses(const Sides& x, int n, ModeSums& to) {
  const vf zero = vf::all(0);
  Running<kLongLanes, vf> p, q, surprise;
  for_vectors(n, [&](int i, auto lanes) {
    const vf one = vf::load(x.p + i);
    p.add(select(lanes, one, zero));
    q.add(select(lanes, vf::load(x.q + i), zero));
    surprise.add(select(lanes, -one * vf::load(x.lp + i), zero));
  });
  to.p += sum(p.total.v);
  to.q += sum(q.total.v);
  to.entropy += sum(surprise.total.v);
}

// Sums over m compared entries; grad is kept.
inline ModeSums sums_of_mode(const SparseTask& s, int m) {
  ModeSums u = {0, 0, 0, 0, 0};
  Lanes lanes;
  memset(&lanes, 0, sizeof lanes);
  Sides& x = *s.task.sides;
  for (int at = 0; at < m; at += kBlock) {
    const int n = m - at < kBlock ? m - at : kBlock;
    kept_sides(s.kept, at, n, x);
    add_masses(x, n, u);
    if (s.args->mode == KD_SAMPLED) {
      cross_entropy(x, n, s.kept.grad + at, lanes);
    } else {
      kElementSums[s.task.args->kernel](x, n, s.task.given, s.kept.grad + at, lanes);
    }
  }
  u.d = total(lanes.term);
  u.grad = total(lanes.grad);
  return u;
}

// grad becomes the gradient by the scaled logits: grad - excess q - q total.
KD_NOINLINE inline void chain_kept(const Kept& kept, int m, double excess, double total) {
  const vf factor = vf::all((float)(excess + total)), masked = vf::all(kMasked),
           hopeless = vf::all(kHopeless);
  for (int k = 0; k < m; k += kWidth) {
    const vf lq = vf::load(kept.lq + k), q = kd_exp(select(lt(lq, hopeless), masked, lq));
    (vf::load(kept.grad + k) - q * factor).store(kept.grad + k);
  }
}

inline double log_mass(float* lp, int n) {
  const Norm s = norm_of_kept(lp, n, 1.0f);
  return log(s.sum) + s.reference;
}

// Compares the row; kept.z and kept.lp are there.
inline Comparison compare(const SparseTask& s, const Row& row, const Parts& parts, double log_tail) {
  const Kept& kept = s.kept;
  const float per_t = s.task.per_t;
  const int n = kept.n, mode = s.args->mode;
  const bool ghost = mode == KD_GHOST && n < s.task.args->vocab;
  int m = n;
  log_probabilities(kept.z, n, normaliser_of(mode == KD_RENORMALIZE ? parts.kept : row.s, per_t), per_t,
                    kept.lq);
  if (mode == KD_RENORMALIZE) {
    const vf mass = vf::all((float)log_mass(kept.lp, n));
    for (int k = 0; k < n; k += kWidth) (vf::load(kept.lp + k) - mass).store(kept.lp + k);
  } else if (ghost) {
    kept.lp[m] = (float)log_tail;
    kept.lq[m++] = (float)parts.log_tail;
  }
  const ModeSums u = sums_of_mode(s, m);
  const double excess = mode == KD_TRUNCATE ? s.args->excess : 0.0;
  const double total = u.grad - excess * u.q;
  chain_kept(kept, m, excess, total);
  Comparison c = {u.d - excess * (u.q - u.p), u.entropy, 0};
  if (ghost) c.rest = kept.grad[n];
  if (mode == KD_TRUNCATE || mode == KD_SAMPLED) c.rest = -exp(parts.log_tail) * total;
  if (mode == KD_TRUNCATE && log_tail > -INFINITY) c.entropy -= exp(log_tail) * log_tail;
  return c;
}

}  // namespace KD_NS

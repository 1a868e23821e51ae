// The generic row functions of any separable divergence: sum of term, sum of grad, and grad kept for the last
// sweep. Log-probabilities and clamped exponentials are formed here; the divergence sees nothing else.
#pragma once
#include "task.h"

namespace KD_NS {

#include "divergences.gen.h"

// What the sweeps after the first need to know of a row.
struct RowNumbers {
  Normaliser student, teacher;
  float per_t;
};

inline RowNumbers numbers_of(const Task& task, const Row& row) {
  return {normaliser_of(row.s, task.per_t), normaliser_of(row.t, task.per_t), task.per_t};
}

// Log-probabilities and clamped exponentials of n elements (a multiple of kStep), in X's order. kCareful: an
// entry that is -inf, or finite but so low that it can only be a mask, counts as kMasked (products of it
// with 1.6e-38, the smallest exponential, would still be numbers).
template <class X, bool kCareful>
KD_NOINLINE void probabilities(const void* student, const void* teacher, int n, const RowNumbers& r,
                               Sides& to) {
  const auto *s = (const typename X::stored*)student, *t = (const typename X::stored*)teacher;
  const Exp exp_1(1.0f);
  const vf inverse = vf::all(r.per_t), masked = vf::all(kMasked), hopeless = vf::all(kHopeless);
  const vf ref_s = vf::all(r.student.reference), log_s = vf::all(-r.student.log);
  const vf ref_t = vf::all(r.teacher.reference), log_t = vf::all(-r.teacher.log);
  for (int i = 0; i < n; i += kStep) {
    vf zs[2], zt[2];
    X::load2(s + i, zs);
    X::load2(t + i, zt);
    for (int h = 0; h < 2; ++h) {
      vf lp = fma(zt[h] - ref_t, inverse, log_t), lq = fma(zs[h] - ref_s, inverse, log_s);
      if (kCareful) {
        lp = select(lt(lp, hopeless), masked, lp);
        lq = select(lt(lq, hopeless), masked, lq);
      }
      lp.store(to.lp + i + h * kWidth);
      lq.store(to.lq + i + h * kWidth);
      vf{exp_1.clamped(lp.v)}.store(to.p + i + h * kWidth);
      vf{exp_1.clamped(lq.v)}.store(to.q + i + h * kWidth);
    }
  }
}

// Fills task.sides from a block.
inline void sides_of(const Task& task, const Row& row, const Block& b, const RowNumbers& r) {
  const bool bf16_rows = !b.staged && task.args->dtype == KD_BF16;
  const auto fill = row.careful ? probabilities<f32, true>
                    : bf16_rows ? probabilities<bf16, false>
                                : probabilities<f32, false>;
  fill(b.student, b.teacher, b.padded, r, *task.sides);
}

struct TermGrad {
  double term, grad;
};

struct Lanes {
  double term[kWidth], grad[kWidth];
};

// Adds term and grad of n elements to `to`; grad is kept.
template <class D, int kMode, bool kCareful>
KD_NOINLINE void stats_block(const Sides& x, int n, Parameters given, float* kept, Lanes& to) {
  typedef vec<kMode> V;
  const V a = V::all(given.a), b = V::all(given.b), zero = V::all(0);
  Running<kCareful || kLongLanes, V> term, grad;
  for_vectors(n, [&](int i, auto lanes) {
    const V lp = V::load(x.lp + i), lq = V::load(x.lq + i), p = V::load(x.p + i), q = V::load(x.q + i);
    const V g = D::grad(lp, lq, p, q, a, b);
    term.add(select(lanes, D::term(lp, lq, p, q, a, b), zero));
    grad.add(select(lanes, g, zero));
    g.store(kept + i);
  });
  add_lanes(to.term, {term.total.v});
  add_lanes(to.grad, {grad.total.v});
}

// A divergence's row functions. `quick` leaves out the series for small differences: its sum is off by some
// 1e-7 nats, so a row whose divergence comes out small is summed again by `precise`. Only divergences whose
// plain form is that good are quick; for a newcomer the two are one.
typedef void (*StatsBlock)(const Sides&, int, Parameters, float*, Lanes&);
struct RowFunctions {
  StatsBlock quick, precise, careful;  // careful: for rows with masked entries
};

constexpr bool same(const char* a, const char* b) {
  for (; *a && *a == *b; ++a, ++b) {
  }
  return *a == *b;
}

template <class D>
constexpr bool plain_form_is_good() {
  return same(D::name, "forward_kl") || same(D::name, "reverse_kl") || same(D::name, "jsd") ||
         same(D::name, "skew_kl") || same(D::name, "skew_reverse_kl");
}

template <class D>
constexpr RowFunctions functions_of() {
  constexpr int kMode = plain_form_is_good<D>() ? kQuick : kPrecise;
  return {stats_block<D, kMode, false>, stats_block<D, kPrecise, false>, stats_block<D, kPrecise, true>};
}

#define KD_ROW(name, id) functions_of<name>(),
static constexpr RowFunctions kRowFunctions[] = {KD_FOR_EACH_DIVERGENCE(KD_ROW)};
#undef KD_ROW
constexpr int kDivergences = sizeof(kRowFunctions) / sizeof(kRowFunctions[0]);

#define KD_CARRY(name, id) \
  (same(#name, "forward_kl") ? kForward : same(#name, "reverse_kl") ? kReverse : kNothing),
static constexpr Carry kCarries[] = {KD_FOR_EACH_DIVERGENCE(KD_CARRY)};
#undef KD_CARRY

// Sums of term and grad over a row, grad kept.
inline TermGrad stats_of(const Task& task, const Row& row, StatsBlock block) {
  const RowNumbers numbers = numbers_of(task, row);
  Lanes lanes;
  memset(&lanes, 0, sizeof lanes);
  for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
    const Block b = block_at(task, row, first, kMiddle);
    sides_of(task, row, b, numbers);
    block(*task.sides, b.n, task.given, task.kept + first, lanes);
  }
  return {total(lanes.term), total(lanes.grad)};
}

constexpr double kSmall = 1e-3;  // nats; below, a quick sum's error of 1e-7 would show

// Writes the gradient of a row whose grad is kept and sums to `total`.
inline void gradient_of_grad(const Task& task, const Row& row, double total) {
  const double kd = (double)row.w_kd * task.per_t, ce = cold_label(task, row) ? 0.0 : row.w_ce;
  const Weights w = {(float)((ce - kd * total) / row.s.sum), (float)kd};
  write_gradient(task, row, [&](References) { return w; });
}

// D of a row whose normalisers are known; writes its gradient.
inline double separable_row(const Task& task, const Row& row) {
  const RowFunctions& f = kRowFunctions[task.args->kernel];
  TermGrad sums = stats_of(task, row, row.careful ? f.careful : f.quick);
  if (!row.careful && f.quick != f.precise && sums.term < kSmall) {
    sums.term = stats_of(task, row, f.precise).term;
  }
  if (row.gradient) gradient_of_grad(task, row, sums.grad);
  return sums.term;
}

// D of a row by sweep 1's c alone; writes its gradient.
inline double online_row(const Task& task, const Row& row, double cross) {
  const bool forward = row.carry == kForward;
  const double per_t = task.per_t, log_s = log(row.s.sum), log_t = log(row.t.sum);
  const double mean = per_t * cross / (forward ? row.t.sum : row.s.sum);
  const double d = forward ? mean - log_t + log_s : mean - log_s + log_t;
  if (d < kSmall) {
    const TermGrad sums = stats_of(task, row, kRowFunctions[task.args->kernel].precise);
    if (row.gradient) gradient_of_grad(task, row, sums.grad);
    return sums.term;
  }
  const double kd = row.w_kd * per_t, ce = cold_label(task, row) ? 0.0 : row.w_ce;
  const auto weights = [&](References r) {
    const double ds = ((double)r.s - row.s.reference) * per_t, dt = ((double)r.t - row.t.reference) * per_t;
    if (forward) return Weights{(float)((kd + ce) / row.s.sum), (float)(-kd * exp(dt) / row.t.sum)};
    const double a = kd * (ds - dt + log_t - log_s - d) + ce;
    return Weights{(float)(a / row.s.sum), (float)(kd * per_t * exp(ds) / row.s.sum)};
  };
  if (row.gradient) write_gradient(task, row, weights);
  return d;
}

}  // namespace KD_NS

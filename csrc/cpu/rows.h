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

// The two sides of one vector.
template <class V>
struct Pair {
  V lp, lq, p, q;
};

// Log-probabilities and clamped exponentials. kCareful: an entry that is -inf, or finite but so low that it
// can only be a mask, counts as kMasked (products of it with 1.6e-38, the smallest exponential, would still
// be numbers).
template <bool kCareful, class V>
KD_INLINE Pair<V> pair_of(V zs, V zt, const RowNumbers& r) {
  const V inverse = V::all(r.per_t), masked = V::all(kMasked), hopeless = V::all(kHopeless);
  const Exp exp_1(1.0f);
  Pair<V> x;
  x.lp = fma(zt - V::all(r.teacher.reference), inverse, V::all(-r.teacher.log));
  x.lq = fma(zs - V::all(r.student.reference), inverse, V::all(-r.student.log));
  if (kCareful) {
    x.lp = select(lt(x.lp, hopeless), masked, x.lp);
    x.lq = select(lt(x.lq, hopeless), masked, x.lq);
  }
  x.p = {exp_1.clamped(x.lp.v)};
  x.q = {exp_1.clamped(x.lq.v)};
  return x;
}

struct TermGrad {
  double term, grad;
};

// Of n elements; grad is kept. A partial last vector is masked out of the sums (staged blocks, natural order,
// only).
template <class X, class D, int kMode, bool kCareful>
KD_NOINLINE TermGrad stats_block(const void* student, const void* teacher, int n, const RowNumbers& r,
                                 Parameters given, float* kept, Ahead) {
  typedef vec<kMode> V;
  const auto *s = (const typename X::stored*)student, *t = (const typename X::stored*)teacher;
  const V a = V::all(given.a), b = V::all(given.b), zero = V::all(0);
  Running<kCareful || kLongLanes, V> term, grad;
  const auto body = [&](V zs, V zt, int i, auto lanes) __attribute__((always_inline)) {
    const Pair<V> x = pair_of<kCareful, V>(zs, zt, r);
    const V g = D::grad(x.lp, x.lq, x.p, x.q, a, b);
    term.add(select(lanes, D::term(x.lp, x.lq, x.p, x.q, a, b), zero));
    grad.add(select(lanes, g, zero));
    g.store(kept + i);
  };
  int i = 0;
  for (; i + kStep <= n; i += kStep) {
    vf zs[2], zt[2];
    X::load2(s + i, zs);
    X::load2(t + i, zt);
    for (int h = 0; h < 2; ++h) body(V{zs[h].v}, V{zt[h].v}, i + h * kWidth, everywhere{});
  }
  for (; i < n; i += kWidth) {
    body(V{X::load(s + i).v}, V{X::load(t + i).v}, i, first_lanes(n - i < kWidth ? n - i : kWidth));
  }
  return {sum(term.total.v), sum(grad.total.v)};
}

// A divergence's row functions. `quick` leaves out the series for small differences: its sum is off by some
// 1e-7 nats, so a row whose divergence comes out small is summed again by `precise`. Only divergences whose
// plain form is that good are quick; for a newcomer the two are one.
typedef TermGrad (*StatsBlock)(const void*, const void*, int, const RowNumbers&, Parameters, float*, Ahead);
struct RowFunctions {
  StatsBlock quick[2], precise[2];  // of floats, of bf16
  StatsBlock careful;               // of floats
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

#define KD_TYPES(D, mode) {stats_block<f32, D, mode, false>, stats_block<bf16, D, mode, false>}
template <class D>
constexpr RowFunctions functions_of() {
  constexpr int kMode = plain_form_is_good<D>() ? kQuick : kPrecise;
  return {KD_TYPES(D, kMode), KD_TYPES(D, kPrecise), stats_block<f32, D, kPrecise, true>};
}
#undef KD_TYPES

#define KD_ROW(name, id) functions_of<name>(),
static constexpr RowFunctions kRowFunctions[] = {KD_FOR_EACH_DIVERGENCE(KD_ROW)};
#undef KD_ROW
constexpr int kDivergences = sizeof(kRowFunctions) / sizeof(kRowFunctions[0]);

#define KD_CARRY(name, id) \
  (same(#name, "forward_kl") ? kForward : same(#name, "reverse_kl") ? kReverse : kNothing),
static constexpr Carry kCarries[] = {KD_FOR_EACH_DIVERGENCE(KD_CARRY)};
#undef KD_CARRY

// Sums of term and grad over a row, grad kept. `functions`: of floats, of bf16.
inline TermGrad stats_of(const Task& task, const Row& row, const StatsBlock* functions) {
  const RowNumbers numbers = numbers_of(task, row);
  TermGrad total = {0, 0};
  for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
    const Block b = block_at(task, row, first, kMiddle);
    const TermGrad x = functions[!b.staged && task.args->dtype == KD_BF16](
        b.student, b.teacher, b.n, numbers, task.given, task.kept + first, b.ahead);
    total.term += x.term;
    total.grad += x.grad;
  }
  return total;
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
  TermGrad sums = stats_of(task, row, row.careful ? &f.careful : f.quick);
  if (!row.careful && f.quick[0] != f.precise[0] && sums.term < kSmall) {
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

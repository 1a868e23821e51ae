// float64: the same row functions in plain scalar code, in double precision throughout. For gradcheck and for
// whoever trains in float64; nothing here is tuned. -inf entries, hopeless logits and NaN rows as in rows.h.
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

static double logit(const kd_side& s, int64_t r, int64_t i) {
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

static Norm norm_of(const kd_side& s, int64_t r, int64_t vocab, double t) {
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

struct Row {
  const kd_rows* args;
  int64_t r, label;
  double w_kd, w_ce;
  Norm s, t, cold;  // cold: the student at temperature 1
};

struct Pair {
  double lp, lq, p, q;
};

static double log_probability(double z, const Norm& n, double t) {
  const double l = (z - n.max) / t - n.log_sum;
  return l < kHopeless ? kMasked : l;
}

static Pair pair_at(const Row& row, int64_t i) {
  const kd_rows& a = *row.args;
  Pair x;
  x.lp = log_probability(logit(a.teacher, row.r, i), row.t, a.temperature);
  x.lq = log_probability(logit(a.student, row.r, i), row.s, a.temperature);
  x.p = kd_exp(x.lp);
  x.q = kd_exp(x.lq);
  return x;
}

// A row's divergence and gradient: dz = kd * (ahead * (grad - q * total) + behind * (reverse KL's)); a
// separable divergence has behind = 0, adaptive_kl has forward KL's grad.
struct Outcome {
  double divergence, ahead, total, behind, reverse;
  Functions f;
};

static Outcome separable(const Row& row) {
  const kd_rows& a = *row.args;
  Outcome o = {0, 1, 0, 0, 0, kFunctions[a.kernel]};
  for (int64_t i = 0; i < a.vocab; ++i) {
    const Pair x = pair_at(row, i);
    o.divergence += o.f.term(x.lp, x.lq, x.p, x.q, a.a, a.b);
    o.total += o.f.grad(x.lp, x.lq, x.p, x.q, a.a, a.b);
  }
  return o;
}

static Outcome adaptive(const Row& row) {
  const kd_rows& a = *row.args;
  const Head<double> h = head_of<double>(a.a, [&](auto f) {
    for (int64_t i = 0; i < a.vocab; ++i) {
      const double z = logit(a.teacher, row.r, i);
      if (!f(i, z, kd_exp(log_probability(z, row.t, a.temperature)))) return;
    }
  });
  double head = 0, tail = 0, forward = 0, reverse = 0;
  for (int64_t i = 0; i < a.vocab; ++i) {
    const Pair x = pair_at(row, i);
    const double z = logit(a.teacher, row.r, i);
    (z > h.least || (z == h.least && i <= h.last) ? head : tail) += fabs(x.p - x.q);
    forward += kd_kl(x.p, x.q, x.lp - x.lq);
    reverse += kd_kl(x.q, x.p, x.lq - x.lp);
  }
  const double apart = head + tail, ahead = apart > 0 ? head / apart : 0,
               behind = apart > 0 ? tail / apart : 0;
  const Element difference = [](double, double, double p, double q, double, double) { return q - p; };
  return {ahead * forward + behind * reverse, ahead, 0, behind, reverse, {nullptr, difference}};
}

static void write_gradient(const Row& row, const Outcome& o) {
  const kd_rows& a = *row.args;
  double* out = (double*)a.dlogits + row.r * a.dlogits_stride;
  const double kd = row.w_kd / a.temperature;
  for (int64_t i = 0; i < a.vocab; ++i) {
    const Pair x = pair_at(row, i);
    const double z = logit(a.student, row.r, i);
    const double own = o.f.grad(x.lp, x.lq, x.p, x.q, a.a, a.b) - x.q * o.total;
    const double other = o.behind != 0 ? x.q * (x.lq - x.lp - o.reverse) : 0;
    double g = kd * (o.ahead * own + o.behind * other);
    if (row.w_ce != 0) g += row.w_ce * (kd_exp(log_probability(z, row.cold, 1)) - (i == row.label ? 1 : 0));
    const double t = a.student.softcap > 0 ? z / a.student.softcap : 0;
    out[i] = g * a.student.scale * (1 - t * t);
  }
}

static void fill_row(const kd_rows& a, int64_t r, double value) {
  ((double*)a.loss)[r] = value;
  for (int i = 0; a.stats && i < KD_STATS; ++i) ((double*)a.stats)[r * KD_STATS + i] = value;
  for (int64_t i = 0; a.dlogits && i < a.vocab; ++i) ((double*)a.dlogits)[r * a.dlogits_stride + i] = value;
}

static void dense_row(const kd_rows& a, int64_t r) {
  for (int64_t i = a.vocab; a.dlogits && i < a.dlogits_vocab; ++i)
    ((double*)a.dlogits)[r * a.dlogits_stride + i] = 0;
  Row row;
  row.args = &a;
  row.r = r;
  row.label = a.labels && a.labels[r] >= 0 && a.labels[r] < a.vocab ? a.labels[r] : -1;
  row.w_kd = ((const double*)a.w_kd)[r];
  row.w_ce = a.w_ce ? ((const double*)a.w_ce)[r] : 0;
  if (row.w_kd == 0 && row.w_ce == 0) return fill_row(a, r, 0);
  row.s = norm_of(a.student, r, a.vocab, a.temperature);
  row.t = norm_of(a.teacher, r, a.vocab, a.temperature);
  if ((row.w_ce != 0 && row.label < 0) || row.s.bad || row.t.bad) return fill_row(a, r, NAN);
  row.cold = row.label < 0 || a.temperature == 1 ? row.s : norm_of(a.student, r, a.vocab, 1);
  const double nll = row.label < 0 ? 0 : -log_probability(logit(a.student, r, row.label), row.cold, 1);
  const Outcome o = a.kernel == KD_ADAPTIVE_KL ? adaptive(row) : separable(row);
  if (a.dlogits) write_gradient(row, o);
  ((double*)a.loss)[r] = (row.w_kd != 0 ? row.w_kd * o.divergence : 0) + (row.w_ce != 0 ? row.w_ce * nll : 0);
  if (!a.stats) return;
  const double values[KD_STATS] = {o.divergence,  row.t.entropy,
                                   row.s.entropy, row.s.top == row.t.top ? 1.0 : 0.0,
                                   nll,           row.s.top == row.label ? 1.0 : 0.0};
  memcpy((double*)a.stats + r * KD_STATS, values, sizeof values);
}

}  // namespace kd_f64

int kd_dense64(const kd_rows* args, int64_t begin, int64_t end) {
  using namespace kd_f64;
  if (args->kernel != KD_ADAPTIVE_KL && (args->kernel < 0 || args->kernel >= kDivergences)) return -1;
  for (int64_t r = begin; r < end; ++r) dense_row(*args, r);
  return 0;
}

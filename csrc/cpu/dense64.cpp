// Rows of the dense distillation loss in float64.
#include "scalar64.h"

namespace kd_f64 {

struct Row {
  const kd_rows* args;
  int64_t r, label;
  double w_kd, w_ce;
  Norm s, t, cold;  // cold: the student at temperature 1
};

struct Pair {
  double lp, lq, p, q;
};

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

static void dense_row(const kd_rows& a, int64_t r) {
  zero_padding(a, r);
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

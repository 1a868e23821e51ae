// Rows of the distillation loss against a sparse teacher, in float64; see sparse.cpp for what is done.
#include "../sparse.h"
#include "scalar64.h"

namespace kd_f64 {
namespace {

struct Row {
  const kd_sparse* args;
  int64_t r, label;
  double w_kd, w_ce;
  const int32_t* ids;
  const double* log_probs;
  int64_t n;
  Norm s, cold;     // the student at T and at 1
  double tail_max;  // of the student's logits not kept
  double tail_sum;  // of e^((z - tail_max) / T); 0: the tail has no mass
};

// What a mode makes of a row: dz = w_kd / T * (grad_v - excess q_v - q_v total) on the kept entries, with q_v
// = e^((z
// - max) / T - log_sum) of `norm`, and rest e^((z - tail_max) / T) elsewhere.
struct Outcome {
  double d, entropy, total, excess, rest;
  Norm norm;
  double log_mass;  // taken off the teacher's log-probabilities
};

bool take_kept(Row& row) {
  const int64_t vocab = row.args->rows.vocab;
  int64_t n = 0;
  double top = -kInfinity;
  for (; n < row.args->kept && row.ids[n] >= 0; ++n) {
    if ((n && row.ids[n] <= row.ids[n - 1]) || row.ids[n] >= vocab) return false;
    if (!(row.log_probs[n] < kInfinity)) return false;
    top = row.log_probs[n] > top ? row.log_probs[n] : top;
  }
  for (int64_t k = n; k < row.args->kept; ++k) {
    if (row.ids[k] != -1) return false;
  }
  row.n = n;
  const double log_tail = ((const double*)row.args->log_tail)[row.r];
  const int mode = row.args->mode;
  const bool tail = (mode == KD_GHOST || mode == KD_TRUNCATE) && n < vocab && log_tail > -kInfinity;
  return (top > -kInfinity || tail) && log_tail < kInfinity;
}

// f(index, logit) for every entry of the student's row that is not kept.
template <class F>
void for_tail(const Row& row, F f) {
  const kd_rows& a = row.args->rows;
  int64_t k = 0;
  for (int64_t i = 0; i < a.vocab; ++i) {
    if (k < row.n && row.ids[k] == i) {
      ++k;
    } else {
      f(i, logit(a.student, row.r, i));
    }
  }
}

void split(Row& row) {
  const double t = row.args->rows.temperature;
  row.tail_max = -kInfinity;
  row.tail_sum = 0;
  for_tail(row, [&](int64_t, double z) { row.tail_max = z > row.tail_max ? z : row.tail_max; });
  if (row.tail_max == -kInfinity) return;
  for_tail(row, [&](int64_t, double z) { row.tail_sum += kd_exp((z - row.tail_max) / t); });
}

double student_at(const Row& row, int64_t k) { return logit(row.args->rows.student, row.r, row.ids[k]); }

// The student's normaliser on the kept entries alone.
Norm norm_of_kept(const Row& row) {
  const double t = row.args->rows.temperature;
  Norm n = {-kInfinity, 0, 0, 0, false};
  for (int64_t k = 0; k < row.n; ++k) n.max = student_at(row, k) > n.max ? student_at(row, k) : n.max;
  n.bad = n.max == -kInfinity;
  double sum = 0;
  for (int64_t k = 0; k < row.n; ++k) sum += kd_exp((student_at(row, k) - n.max) / t);
  n.log_sum = log(sum);
  return n;
}

double log_mass_of_kept(const Row& row) {
  double top = -kInfinity, sum = 0;
  for (int64_t k = 0; k < row.n; ++k) top = row.log_probs[k] > top ? row.log_probs[k] : top;
  for (int64_t k = 0; k < row.n; ++k) sum += exp(row.log_probs[k] - top);
  return top + log(sum);
}

double mended(double l) { return l < kHopeless ? kMasked : l; }

double gradient_at(const Row& row, const Outcome& o, double lp, double lq) {
  const kd_rows& a = row.args->rows;
  const double p = kd_exp(lp), q = kd_exp(lq);
  const bool sampled = row.args->mode == KD_SAMPLED;
  return (sampled ? -p : kFunctions[a.kernel].grad(lp, lq, p, q, a.a, a.b)) - o.excess * q;
}

double term_at(const Row& row, const Outcome& o, double lp, double lq) {
  const kd_rows& a = row.args->rows;
  const double p = kd_exp(lp), q = kd_exp(lq);
  if (row.args->mode == KD_SAMPLED) return -p * lq;
  return kFunctions[a.kernel].term(lp, lq, p, q, a.a, a.b) - o.excess * (q - p);
}

double teacher_at(const Row& row, const Outcome& o, int64_t k) {
  return mended(row.log_probs[k] - o.log_mass);
}

void add(const Row& row, Outcome& o, double lp, double lq) {
  o.d += term_at(row, o, lp, lq);
  o.total += gradient_at(row, o, lp, lq);
}

Outcome compare(const Row& row) {
  const kd_rows& a = row.args->rows;
  const int mode = row.args->mode;
  const bool own = mode == KD_RENORMALIZE;
  Outcome o = {0, 0, 0, mode == KD_TRUNCATE ? row.args->excess : 0, 0, own ? norm_of_kept(row) : row.s, 0};
  if (own) o.log_mass = log_mass_of_kept(row);
  for (int64_t k = 0; k < row.n && !o.norm.bad; ++k) {
    const double lp = teacher_at(row, o, k);
    add(row, o, lp, log_probability(student_at(row, k), o.norm, a.temperature));
    o.entropy -= kd_exp(lp) * lp;
  }
  const double log_tail = ((const double*)row.args->log_tail)[row.r];
  const double log_rest = row.tail_sum > 0
                              ? (row.tail_max - row.s.max) / a.temperature + log(row.tail_sum) - row.s.log_sum
                              : -kInfinity;
  if (own) return o;
  const double q = exp(log_rest);
  double share = 0;
  if (mode == KD_GHOST && row.n < a.vocab) {
    const double lp = mended(log_tail), lq = mended(log_rest);
    add(row, o, lp, lq);
    share = gradient_at(row, o, lp, lq);
  }
  if ((mode == KD_GHOST && row.n < a.vocab) || mode == KD_TRUNCATE) {
    o.entropy -= log_tail > -kInfinity ? exp(log_tail) * log_tail : 0;
  }
  o.rest = log_rest >= kHopeless ? (share - q * o.total) / row.tail_sum : 0;
  return o;
}

void write(const Row& row, int64_t i, double z, double gradient) {
  const kd_rows& a = row.args->rows;
  double g = row.w_kd != 0 ? row.w_kd / a.temperature * gradient : 0;
  if (row.w_ce != 0) g += row.w_ce * (kd_exp(log_probability(z, row.cold, 1)) - (i == row.label ? 1 : 0));
  const double t = a.student.softcap > 0 ? z / a.student.softcap : 0;
  ((double*)a.dlogits)[row.r * a.dlogits_stride + i] = g * a.student.scale * (1 - t * t);
}

void write_gradient(const Row& row, const Outcome& o) {
  const double t = row.args->rows.temperature;
  for_tail(row, [&](int64_t i, double z) {
    write(row, i, z, o.rest != 0 ? o.rest * kd_exp((z - row.tail_max) / t) : 0);
  });
  for (int64_t k = 0; k < row.n; ++k) {
    const double z = student_at(row, k), lq = log_probability(z, o.norm, t);
    write(row, row.ids[k], z, gradient_at(row, o, teacher_at(row, o, k), lq) - kd_exp(lq) * o.total);
  }
}

void sparse_row(const kd_sparse& args, int64_t r) {
  const kd_rows& a = args.rows;
  zero_padding(a, r);
  Row row;
  row.args = &args;
  row.r = r;
  row.label = a.labels && a.labels[r] >= 0 && a.labels[r] < a.vocab ? a.labels[r] : -1;
  row.w_kd = ((const double*)a.w_kd)[r];
  row.w_ce = a.w_ce ? ((const double*)a.w_ce)[r] : 0;
  row.ids = args.ids + r * args.kept;
  row.log_probs = (const double*)args.log_probs + r * args.kept;
  if (row.w_kd == 0 && row.w_ce == 0) return fill_row(a, r, 0);
  row.s = norm_of(a.student, r, a.vocab, a.temperature);
  if ((row.w_ce != 0 && row.label < 0) || row.s.bad || !take_kept(row)) return fill_row(a, r, NAN);
  split(row);
  const Outcome o = compare(row);
  if (o.norm.bad) return fill_row(a, r, NAN);
  row.cold = row.label < 0 || a.temperature == 1 ? row.s : norm_of(a.student, r, a.vocab, 1);
  const double nll = row.label < 0 ? 0 : -log_probability(logit(a.student, r, row.label), row.cold, 1);
  if (a.dlogits) write_gradient(row, o);
  ((double*)a.loss)[r] = (row.w_kd != 0 ? row.w_kd * o.d : 0) + (row.w_ce != 0 ? row.w_ce * nll : 0);
  if (!a.stats) return;
  int64_t best = 0;
  for (int64_t k = 1; k < row.n; ++k) best = row.log_probs[k] > row.log_probs[best] ? k : best;
  const bool agree = row.log_probs[best] > -kInfinity && row.s.top == row.ids[best];
  const double values[KD_STATS] = {
      o.d, o.entropy, row.s.entropy, agree ? 1.0 : 0.0, nll, row.s.top == row.label ? 1.0 : 0.0};
  memcpy((double*)a.stats + r * KD_STATS, values, sizeof values);
}

}  // namespace
}  // namespace kd_f64

int kd_sparse64(const kd_sparse* args, int64_t begin, int64_t end) {
  using namespace kd_f64;
  const bool known = args->rows.kernel >= 0 && args->rows.kernel < kDivergences;
  if (!known || args->mode < KD_GHOST || args->mode > KD_SAMPLED) return -1;
  for (int64_t r = begin; r < end; ++r) sparse_row(*args, r);
  return 0;
}

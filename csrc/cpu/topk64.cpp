// Selection and draws in float64: plain scalar code, nothing here is tuned. See topk.h.
#include <math.h>

#include <algorithm>
#include <functional>

#include "topk_isa.h"

namespace {

constexpr double kInfinity = INFINITY;

// Logits of one row in `to`; the largest of them, NaN if the row is no distribution.
double read_row(const kd_side& s, int64_t r, int64_t vocab, double* to) {
  const double *x = (const double*)s.data + r * s.row_stride, *bias = (const double*)s.bias;
  double top = -kInfinity;
  bool nan = false;
  for (int64_t i = 0; i < vocab; ++i) {
    const double z = s.scale * (bias ? x[i] + bias[i] : x[i]);
    to[i] = s.softcap > 0 ? s.softcap * tanh(z / s.softcap) : z;
    nan |= to[i] != to[i];
    top = to[i] > top ? to[i] : top;
  }
  return !nan && top - top == 0 ? top : (double)NAN;
}

// Kept entries are those above `least` and the first `ties` equal to it.
struct Cut {
  double max, least;
  int64_t kept, ties;
};

// `work` holds a row.
Cut cut_of(const double* z, int64_t vocab, int64_t k, double max, double* work) {
  double* end = std::copy_if(z, z + vocab, work, [](double x) { return x > -kInfinity; });
  Cut c = {max, 0, std::min<int64_t>(k, end - work), 0};
  std::nth_element(work, work + c.kept - 1, end, std::greater<double>());
  c.least = work[c.kept - 1];
  c.ties = c.kept - std::count_if(z, z + vocab, [&](double x) { return x > c.least; });
  return c;
}

// visit(i, kept) for every entry.
template <class Visit>
void for_each(const double* z, int64_t vocab, const Cut& c, Visit visit) {
  int64_t ties = c.ties;
  for (int64_t i = 0; i < vocab; ++i) visit(i, z[i] > c.least || (z[i] == c.least && ties-- > 0));
}

struct Logs {
  double sum, tail, mean;  // of the row, relative to e^(max / T); mean of (z - max) / T
};

Logs logs_of(const double* z, int64_t vocab, const Cut& c, double t) {
  double top = -kInfinity;  // of the tail
  for_each(z, vocab, c, [&](int64_t i, bool kept) { top = !kept && z[i] > top ? z[i] : top; });
  double kept_sum = 0, tail_sum = 0, weighted = 0;
  for_each(z, vocab, c, [&](int64_t i, bool kept) {
    if (z[i] == -kInfinity) return;
    const double x = (z[i] - c.max) / t, e = exp(x);
    if (e > 0) weighted += x * e;  // x may have overflowed to -inf
    (kept ? kept_sum : tail_sum) += kept ? e : exp((z[i] - top) / t);
  });
  const double tail = top == -kInfinity ? top : log(tail_sum) + (top - c.max) / t;
  const double sum = kept_sum + exp(tail);
  return {log(sum), tail, weighted / sum};
}

void select_row(const kd_topk& a, int64_t r, double* z, double* work) {
  int32_t* ids = a.ids + r * a.k;
  double *log_probs = (double*)a.log_probs + r * a.k, *log_tail = (double*)a.log_tail + r;
  double* others = a.other_tails ? (double*)a.other_tails + r * a.others : nullptr;
  const double max = read_row(a.logits, r, a.vocab, z);
  const bool bad = max != max;
  std::fill(ids, ids + a.k, -1);
  std::fill(log_probs, log_probs + a.k, bad ? (double)NAN : -kInfinity);
  *log_tail = NAN;
  if (a.entropy) ((double*)a.entropy)[r] = NAN;
  if (others) std::fill(others, others + a.others, (double)NAN);
  if (bad) return;
  const Cut c = cut_of(z, a.vocab, a.k, max, work);
  const Logs l = logs_of(z, a.vocab, c, a.temperature);
  int64_t at = 0;
  for_each(z, a.vocab, c, [&](int64_t i, bool kept) {
    if (!kept) return;
    ids[at] = (int32_t)i;
    log_probs[at++] = (z[i] - max) / a.temperature - l.sum;
  });
  *log_tail = l.tail - l.sum;
  if (a.entropy) ((double*)a.entropy)[r] = l.sum - l.mean;
  for (int64_t i = 0; others && i < a.others; ++i) {
    const Logs o = logs_of(z, a.vocab, c, a.other_temperatures[i]);
    others[i] = o.tail - o.sum;
  }
}

void draw_row(const kd_draw& a, int64_t r, double* z) {
  const double max = read_row(a.logits, r, a.vocab, z);
  double total = 0;  // z becomes the cumulative mass
  for (int64_t i = 0; i < a.vocab; ++i) z[i] = total += exp((z[i] - max) / a.temperature);
  for (int64_t i = r * a.draws; i < (r + 1) * a.draws; ++i) {
    const double u = a.uniforms[i];
    a.ids[i] = -1;
    if (!(u >= 0 && u < 1) || max != max) continue;
    const double* at = std::upper_bound(z, z + a.vocab, u * total);
    if (at == z + a.vocab) at = std::lower_bound(z, z + a.vocab, total);  // rounding: the last with any mass
    a.ids[i] = (int32_t)(at - z);
  }
}

}  // namespace

size_t kd_topk64_scratch(const kd_topk* a) { return 2 * (size_t)a->vocab * sizeof(double); }

int kd_topk64(const kd_topk* a, int64_t begin, int64_t end, void* scratch) {
  double* z = (double*)scratch;
  for (int64_t r = begin; r < end; ++r) select_row(*a, r, z, z + a->vocab);
  return 0;
}

size_t kd_draw64_scratch(const kd_draw* a) { return (size_t)a->vocab * sizeof(double); }

int kd_draw64(const kd_draw* a, int64_t begin, int64_t end, void* scratch) {
  for (int64_t r = begin; r < end; ++r) draw_row(*a, r, (double*)scratch);
  return 0;
}

// The gate in float64: plain scalar code, nothing here is tuned. See gate.h.
#include <math.h>

#include "gate_isa.h"

namespace {

constexpr double kInfinity = INFINITY;

// Log-probabilities of one row in `to`; the first largest entry, or -1 if the row is no distribution.
int64_t read_row(const kd_side& s, int64_t r, int64_t vocab, double* to) {
  const double *x = (const double*)s.data + r * s.row_stride, *bias = (const double*)s.bias;
  int64_t top = 0;
  bool nan = false;
  for (int64_t i = 0; i < vocab; ++i) {
    const double z = s.scale * (bias ? x[i] + bias[i] : x[i]);
    to[i] = s.softcap > 0 ? s.softcap * tanh(z / s.softcap) : z;
    nan |= to[i] != to[i];
    if (to[i] > to[top]) top = i;
  }
  const double max = to[top];
  if (nan || max - max != 0) return -1;
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += exp(to[i] - max);
  for (int64_t i = 0; i < vocab; ++i) to[i] = (to[i] - max) - log(sum);
  return top;
}

// p log(2p / (p + q)) + q log(2q / (p + q)), from log-probabilities.
double twice_term(double lp, double lq) {
  const double top = lp > lq ? lp : lq, size = fabs(lp - lq);
  if (top == -kInfinity) return 0;
  if (size < 1e-3) return 2 * exp(top) * (size * size / 8) * (1 - size / 2 + size * size / 8);
  const double rho = exp(-size);
  return exp(top) * ((1 + rho) * (M_LN2 - log1p(rho)) - (rho > 0 ? rho * size : 0));
}

}  // namespace

size_t kd_gate64_scratch(const kd_gate* a) { return 2 * (size_t)a->vocab * sizeof(double); }

bool kd_gate64(const kd_gate* a, int64_t row, int64_t* token, void* scratch) {
  double *lq = (double*)scratch, *lp = lq + a->vocab, *jsd = (double*)a->jsd + row;
  const int64_t student = read_row(a->student, row, a->vocab, lq),
                teacher = read_row(a->teacher, row, a->vocab, lp);
  const double threshold = a->threshold[row];
  a->from_teacher[row] = 0;
  *jsd = NAN;
  if (student < 0 || teacher < 0 || threshold != threshold) return false;
  double sum = 0;
  for (int64_t i = 0; i < a->vocab; ++i) sum += twice_term(lp[i], lq[i]);
  const double bits = sum / (2 * M_LN2);
  *jsd = bits < 0 ? 0 : bits > 1 ? 1 : bits;
  a->from_teacher[row] = *jsd > threshold;
  *token = a->from_teacher[row] ? teacher : student;
  return true;
}

// Forward and reverse KL in two sweeps: one for the statistics, one for the gradient.
//
// Sweep 1 carries c = sum e^xt (xt - xs) beside the two normalisers (reverse: e^xs (xs - xt)), x = (z -
// reference) / T, so D = c / sum_t - log sum_t + log sum_s: differences of numbers near 0, never through a
// log-sum-exp. Rows that are not plain (a head's bias, scale or soft-cap; masked entries; NaN) are left to
// the generic row functions.
#pragma once
#include "task.h"

namespace KD_NS {

constexpr float kNear =
    1.3f;  // how far above its reference a maximum may lie, in units of T: within Exp's range
constexpr int kPatience = 8;  // slow blocks after which a row is taken to be wide: no more quick attempts
constexpr int kPair = 2 * kWidth;
static_assert(kBlock % kPair == 0, "a block is a whole number of vector pairs");

struct KlSums {
  double student, teacher, cross;  // sum e^xs, sum e^xt, and sum e^x (x - x') in units of z
  float top_s, top_t;              // maxima
  float span;                      // largest |xt - xs|: shows an entry that is masked on one side
};

// Sums of n numbers, a multiple of kPair, relative to the references. kQuick leaves out maxima, span and the
// clamp of the exponentials; it says whether all were in range, and where not its sums mean nothing.
template <class X, bool kReverse, bool kQuick>
KD_NOINLINE bool kl_block(const typename X::stored* s, const typename X::stored* t, int n, float ref_s,
                          float ref_t, float per_t, KlSums& out) {
  const Exp exp(per_t);
  const vf rs = vf::all(ref_s), rt = vf::all(ref_t), zero = vf::all(0);
  vf sum_s = zero, sum_t = zero, cross = zero, span = zero;
  vf top_s = vf::all(-INFINITY), top_t = top_s;
  RangeCheck check = {};
  for (int i = 0; i < n; i += kPair) {
    vf zs[2], zt[2];
    X::load2(s + i, zs);
    X::load2(t + i, zt);
    for (int line = 0; line < kPair; line += 64 / (int)sizeof(*s)) {
      prefetch(s + i + line + kAhead / sizeof(*s));
      prefetch(t + i + line + kAhead / sizeof(*t));
    }
    for (int h = 0; h < 2; ++h) {
      const vf xs = zs[h] - rs, xt = zt[h] - rt, d = kReverse ? xs - xt : xt - xs;
      const vf es = {kQuick ? exp.checked(xs.v, check) : exp.clamped(xs.v)};
      const vf et = {kQuick ? exp.checked(xt.v, check) : exp.clamped(xt.v)};
      if (!kQuick) {
        top_s = larger(zs[h], top_s);
        top_t = larger(zt[h], top_t);
        span = larger(kd_abs(d), span);
      }
      sum_s = sum_s + es;
      sum_t = sum_t + et;
      cross = fma(kReverse ? es : et, d, cross);
    }
  }
  if (kQuick && !Exp::in_range(check)) return false;
  out = {sum(sum_s.v), sum(sum_t.v), sum(cross.v), 0, 0, 0};
  if (!kQuick) {
    out.top_s = largest(top_s.v);
    out.top_t = largest(top_t.v);
    out.span = largest(span.v);
  }
  return true;
}

// What the gradient sweep needs: forward dz = a e^xs + b e^xt, reverse dz = e^xs (a (xs - xt) + b).
struct KlGradient {
  float ref_s, ref_t, per_t, a, b;
};

template <bool kReverse, bool kQuick>
KD_INLINE vf kl_gradient(const Exp& exp, vf xs, vf xt, vf a, vf b) {
  RangeCheck known = {};  // the first sweep has looked
  const vf es = {kQuick ? exp.checked(xs.v, known) : exp.clamped(xs.v)};
  if (kReverse) return es * fma(a, xs - xt, b);
  return fma(es, a, vf{kQuick ? exp.checked(xt.v, known) : exp.clamped(xt.v)} * b);
}

template <class X, bool kReverse, bool kQuick>
KD_NOINLINE void kl_gradient_block(const typename X::stored* s, const typename X::stored* t,
                                   typename X::stored* out, int n, const KlGradient& g) {
  const Exp exp(g.per_t);
  const vf rs = vf::all(g.ref_s), rt = vf::all(g.ref_t), a = vf::all(g.a), b = vf::all(g.b);
  for (int i = 0; i < n; i += kPair) {
    vf zs[2], zt[2];
    X::load2(s + i, zs);
    X::load2(t + i, zt);
    for (int h = 0; h < 2; ++h) zs[h] = kl_gradient<kReverse, kQuick>(exp, zs[h] - rs, zt[h] - rt, a, b);
    X::store2(out + i, zs);
  }
}

// A row of stored numbers in blocks of kBlock; the last, partial one comes padded with entries of no mass.
template <class X>
struct PairOfRows {
  typedef typename X::stored stored;
  const stored *s, *t;
  int64_t vocab;
  alignas(64) stored tail_s[kBlock], tail_t[kBlock];

  int padded() const { return (int)((vocab % kBlock + kPair - 1) / kPair * kPair); }

  void pad(float ref_s, float ref_t, float per_t) {
    const int64_t whole = vocab / kBlock * kBlock;
    const int n = (int)(vocab - whole);
    float fill[kWidth];
    for (int side = 0; side < 2; ++side) {
      stored* to = side ? tail_t : tail_s;
      vf::all((side ? ref_t : ref_s) - 80.0f / per_t).store(fill);
      for (int i = n; i < padded(); ++i) from_floats<X>(fill, to + i, 1);
      memcpy(to, (side ? t : s) + whole, n * sizeof(stored));
    }
  }
};

struct KlState {
  KlSums total;
  float ref_s, ref_t;
  float span;
  int slow_blocks;  // blocks with exponentials out of range
};

// Moves the sums to references that are higher by up_s, up_t (units of z).
inline void raise_references(KlState& k, float up_s, float up_t, double per_t, bool reverse) {
  const double fs = exp(-up_s * per_t), ft = exp(-up_t * per_t);
  const double change = reverse ? (double)up_t - up_s : (double)up_s - up_t;  // of every x - x'
  k.total.cross =
      (reverse ? fs : ft) * (k.total.cross + change * (reverse ? k.total.student : k.total.teacher));
  k.total.student *= fs;
  k.total.teacher *= ft;
  k.ref_s += up_s;
  k.ref_t += up_t;
}

template <class X, bool kReverse>
void add_block(KlState& k, const typename X::stored* s, const typename X::stored* t, int n, float per_t) {
  KlSums b;
  const bool quick =
      k.slow_blocks < kPatience && kl_block<X, kReverse, true>(s, t, n, k.ref_s, k.ref_t, per_t, b);
  if (!quick) {
    ++k.slow_blocks;
    kl_block<X, kReverse, false>(s, t, n, k.ref_s, k.ref_t, per_t, b);
    const float up_s = b.top_s - k.ref_s, up_t = b.top_t - k.ref_t;
    if (up_s * per_t > kNear || up_t * per_t > kNear) {
      raise_references(k, up_s > 0 ? up_s : 0, up_t > 0 ? up_t : 0, per_t, kReverse);
      kl_block<X, kReverse, false>(s, t, n, k.ref_s, k.ref_t, per_t, b);
    }
    k.span = b.span > k.span ? b.span : k.span;
  }
  k.total.student += b.student;
  k.total.teacher += b.teacher;
  k.total.cross += b.cross;
}

// The largest logit of four blocks spread over the row: seldom far below the maximum.
template <class X>
float top_of(const typename X::stored* row, int64_t vocab, float* buffer) {
  const int n = (int)(vocab < kBlock ? vocab : kBlock);
  float top = -INFINITY;
  for (int part = 0; part < 4; ++part) {
    to_floats<X>(row + (vocab - n) / 3 * part, buffer, n);
    const float here = max_block(buffer, n);
    top = here > top ? here : top;
  }
  return top;
}

// Sweep 1; false: not a row for this path.
template <class X, bool kReverse>
bool kl_statistics(const Task& task, PairOfRows<X>& rows, KlState& k) {
  k = {{0, 0, 0, 0, 0, 0},
       top_of<X>(rows.s, rows.vocab, task.zs),
       top_of<X>(rows.t, rows.vocab, task.zt),
       0,
       0};
  if (!(fabsf(k.ref_s) < 1e6f && fabsf(k.ref_t) < 1e6f)) return false;
  const int64_t whole = rows.vocab / kBlock * kBlock;
  for (int64_t i = 0; i < whole; i += kBlock)
    add_block<X, kReverse>(k, rows.s + i, rows.t + i, kBlock, task.per_t);
  if (whole < rows.vocab) {
    rows.pad(k.ref_s, k.ref_t, task.per_t);
    add_block<X, kReverse>(k, rows.tail_s, rows.tail_t, rows.padded(), task.per_t);
  }
  const KlSums& x = k.total;
  return k.span < 1e18f && x.student > 0 && x.student < INFINITY && x.teacher > 0 && x.teacher < INFINITY;
}

template <class X, bool kReverse, bool kQuick>
void kl_gradients(PairOfRows<X>& rows, typename X::stored* out, const KlGradient& g, int64_t label,
                  float w_ce) {
  typedef typename X::stored stored;
  float at_label[kWidth];
  if (label >= 0 && w_ce != 0) {
    float zs[kWidth], zt[kWidth];
    to_floats<X>(rows.s + label, zs, 1);
    to_floats<X>(rows.t + label, zt, 1);
    const vf xs = vf::all(zs[0] - g.ref_s), xt = vf::all(zt[0] - g.ref_t);
    (kl_gradient<kReverse, kQuick>(Exp(g.per_t), xs, xt, vf::all(g.a), vf::all(g.b)) - vf::all(w_ce))
        .store(at_label);
  }
  const int64_t whole = rows.vocab / kBlock * kBlock;
  for (int64_t i = 0; i < whole; i += kBlock) {
    kl_gradient_block<X, kReverse, kQuick>(rows.s + i, rows.t + i, out + i, kBlock, g);
  }
  if (whole < rows.vocab) {
    kl_gradient_block<X, kReverse, kQuick>(rows.tail_s, rows.tail_t, rows.tail_s, rows.padded(), g);
    memcpy(out + whole, rows.tail_s, (rows.vocab - whole) * sizeof(stored));
  }
  if (label >= 0 && w_ce != 0) from_floats<X>(at_label, out + label, 1);
}

// The whole row; false: nothing was written, use the generic row functions. Fills row.s and row.t for those
// who sum a small divergence again.
template <class X, bool kReverse>
bool kl_row(const Task& task, Row& row, double& divergence, double& log_student) {
  const double per_t = task.per_t;
  PairOfRows<X> rows;
  rows.s = (const typename X::stored*)row.student;
  rows.t = (const typename X::stored*)row.teacher;
  rows.vocab = task.args->vocab;
  KlState k;
  if (!kl_statistics<X, kReverse>(task, rows, k)) return false;
  const KlSums& x = k.total;
  const double log_s = log(x.student), log_t = log(x.teacher);
  const double mean = per_t * x.cross / (kReverse ? x.student : x.teacher);
  divergence = mean + (kReverse ? log_t - log_s : log_s - log_t);
  log_student = log_s;
  row.s.sum = x.student;
  row.t.sum = x.teacher;
  row.s.reference = k.ref_s;
  row.t.reference = k.ref_t;
  row.numbers = {normaliser_of(k.ref_s, log_s, per_t), normaliser_of(k.ref_t, log_t, per_t), task.per_t};
  row.careful = false;
  if (divergence < kSmall) {
    const RowFunctions& f = kRowFunctions[task.args->kernel];
    divergence = sum_row(task, row, f.precise, nullptr).term;
  }
  if (!row.gradient) return true;
  const double kd = row.w_kd * per_t, ce = row.w_ce;
  KlGradient g = {k.ref_s, k.ref_t, task.per_t, (float)((kd + ce) / x.student), (float)(-kd / x.teacher)};
  if (kReverse) {
    g.a = (float)(kd * per_t / x.student);
    g.b = (float)((kd * (log_t - log_s - divergence) + ce) / x.student);
  }
  const auto gradients =
      k.slow_blocks == 0 ? kl_gradients<X, kReverse, true> : kl_gradients<X, kReverse, false>;
  gradients(rows, (typename X::stored*)row.gradient, g, row.label, row.w_ce);
  return true;
}

template <bool kReverse>
bool kl_row(const Task& task, Row& row, double& divergence, double& log_student) {
  if (task.args->dtype == KD_F32) return kl_row<f32, kReverse>(task, row, divergence, log_student);
  if (task.args->dtype == KD_F16) return kl_row<f16, kReverse>(task, row, divergence, log_student);
  return kl_row<bf16, kReverse>(task, row, divergence, log_student);
}

}  // namespace KD_NS

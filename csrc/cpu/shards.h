// The sweep that writes the gradient of forward and reverse KL where the normalisers are known beforehand:
// one pass over both sides, which keeps nothing from an earlier one.
#pragma once
#include "rows.h"

namespace KD_NS {

// What the numbers of a row make of e^xs, e^xt and u = (zs - reference_s) - (zt - reference_t).
// Forward: dz = a e^xs + b e^xt. Reverse: dz = e^xs (a + b u).
struct Online {
  float reference_s, reference_t, a, b;
};

inline Online online_of(const Task& task, const Row& row, double divergence) {
  const double kd = (double)row.w_kd * task.per_t, ce = cold_label(task, row) ? 0.0 : row.w_ce;
  const double apart = log(row.t.sum) - log(row.s.sum);
  if (row.carry == kForward)
    return {row.s.reference, row.t.reference, (float)((kd + ce) / row.s.sum), (float)(-kd / row.t.sum)};
  return {row.s.reference, row.t.reference, (float)((kd * (apart - divergence) + ce) / row.s.sum),
          (float)(kd * task.per_t / row.s.sum)};
}

// n elements, a multiple of kStep; `gradient` may be `student`.
template <class X, bool kForwardKl>
KD_NOINLINE void online_block(const void* student, const void* teacher, void* gradient, int n, float per_t,
                              Online w, Ahead ahead) {
  typedef typename X::stored stored;
  const stored *s = (const stored*)student, *t = (const stored*)teacher;
  stored* out = (stored*)gradient;
  const Exp exp_s(per_t, kForwardKl ? w.a : 1.0f), exp_t(per_t, w.b);
  const vf ref_s = vf::all(w.reference_s), ref_t = vf::all(w.reference_t), a = vf::all(w.a), b = vf::all(w.b);
  for (int i = 0; i < n; i += kStep) {
    prefetch(ahead.student, ahead.teacher, i * sizeof(stored));
    vf zs[2], zt[2];
    X::load2(s + i, zs);
    X::load2(t + i, zt);
    for (int h = 0; h < 2; ++h) {
      const vf xs = zs[h] - ref_s, xt = zt[h] - ref_t;
      const vf es = {exp_s.scaled(xs.v)};
      zs[h] = kForwardKl ? es + vf{exp_t.scaled(xt.v)} : es * fma(b, xs - xt, a);
    }
    X::store2(out + i, zs);
  }
}

typedef void (*OnlineBlock)(const void*, const void*, void*, int, float, Online, Ahead);

inline OnlineBlock online_block_for(kd_dtype dtype, int carry) {
  if (dtype == KD_BF16) return carry == kForward ? online_block<bf16, true> : online_block<bf16, false>;
  return carry == kForward ? online_block<f32, true> : online_block<f32, false>;
}

// The gradient at the label, which has a share of its own.
inline float online_label(const Task& task, const Row& row, Online w) {
  stage(task.student, row.student, row.label, 1, task.zs);
  stage(task.teacher, row.teacher, row.label, 1, task.zt);
  const double xs = (double)task.zs[0] - w.reference_s, xt = (double)task.zt[0] - w.reference_t;
  const double e = exp(xs * task.per_t);
  if (row.carry == kForward) return (float)(w.a * e + w.b * exp(xt * task.per_t) - row.w_ce);
  return (float)(e * (w.a + w.b * (xs - xt)) - row.w_ce);
}

// As write_gradient, of which it is the counterpart for rows without masked entries.
inline void write_online(const Task& task, const Row& row, double divergence) {
  const kd_rows& a = *task.args;
  const Online w = online_of(task, row, divergence);
  const Normaliser cold = cold_label(task, row) ? normaliser_of(row.cold, 1.0) : Normaliser{0, 0};
  const bool labelled = row.w_ce != 0 && row.label >= 0;
  const float mended = labelled && !row.staged ? online_label(task, row, w) : 0.0f;
  for (int64_t first = 0; first < a.vocab; first += kBlock) {
    const Block b = block_at(task, row, first, kMiddle);
    void* out = b.staged ? (char*)task.out : row.gradient + first * size_of(a.dtype);
    online_block_for(b.staged ? KD_F32 : a.dtype, row.carry)(b.student, b.teacher, out, b.padded, task.per_t,
                                                             w, b.ahead);
    const bool label_here = labelled && row.label >= first && row.label < first + b.n;
    if (!b.staged) {
      task.out[0] = mended;
      if (label_here) store_block(a.dtype, task.out, row.gradient, row.label, 1);
      continue;
    }
    if (cold_label(task, row)) add_cold_softmax(task.zs, task.out, b.padded, cold, row.w_ce);
    if (label_here) task.out[row.label - first] -= row.w_ce;
    if (!task.student.plain) chain_rule(task.student, task.zs, task.out, b.n);
    store_block(a.dtype, task.out, row.gradient, first, b.n);
  }
}

}  // namespace KD_NS

// adaptive_kl: forward and reverse KL weighted by how far apart the two distributions are over the teacher's
// head (the smallest set of entries with mass >= mu) and over its tail; the weights count as constants.
#pragma once
#include "head.h"
#include "rows.h"

namespace KD_NS {

// The head of the teacher's distribution.
KD_NOINLINE inline Head<float> teacher_head(const Task& task, const Row& row) {
  const Exp exp_t(task.per_t);
  const vf reference = vf::all(row.t.reference);
  return head_of<float>(task.args->a * row.t.sum, [&](auto f) {
    for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
      const Block b = block_at(task, row, first, kMiddle);
      for (int i = 0; i < b.padded; i += kWidth) {
        vf{exp_t.clamped((vf::load(task.zt + i) - reference).v)}.store(task.out + i);
      }
      for (int i = 0; i < b.n; ++i) {
        if (!f(first + i, task.zt[i], (double)task.out[i])) return;
      }
    }
  });
}

struct AdaptiveSums {
  double head, tail, forward, reverse;
};

// The block is staged, its sides are in task.sides.
KD_NOINLINE inline void add_adaptive(const Task& task, const Block& b, Head<float> h, AdaptiveSums& to) {
  const Sides& x = *task.sides;
  const vf zero = vf::all(0), least = vf::all(h.least);
  vf head = zero, tail = zero;
  Running<true, vf> forward, reverse;
  for_vectors(b.n, [&](int i, auto lanes) {
    const int64_t left = h.last - (b.first + i) + 1;
    const mask ties = first_lanes(left <= 0 ? 0 : left >= kWidth ? kWidth : (int)left);
    const vf z = vf::load(task.zt + i), p = vf::load(x.p + i), q = vf::load(x.q + i);
    const vf d = vf::load(x.lp + i) - vf::load(x.lq + i);
    const mask outside = !lt(least, z) & !(eq(z, least) & ties);
    const vf apart = select(lanes, kd_abs(p - q), zero);
    tail = tail + select(outside, apart, zero);
    head = head + select(outside, zero, apart);
    forward.add(select(lanes, kd_kl(p, q, d), zero));
    reverse.add(select(lanes, kd_kl(q, p, -d), zero));
  });
  to.head += sum(head.v);
  to.tail += sum(tail.v);
  to.forward += sum(forward.total.v);
  to.reverse += sum(reverse.total.v);
}

// kept = ahead * (q - p) + behind * q * (lq - lp).
KD_NOINLINE inline void keep_adaptive(const Task& task, const Block& b, float ahead, float behind) {
  const Sides& x = *task.sides;
  const vf forward = vf::all(ahead), reverse = vf::all(behind);
  for (int i = 0; i < b.padded; i += kWidth) {
    const vf p = vf::load(x.p + i), q = vf::load(x.q + i), d = vf::load(x.lq + i) - vf::load(x.lp + i);
    fma(forward, q - p, q * (reverse * d)).store(task.kept + b.first + i);
  }
}

// D of one row, all of whose blocks are staged; writes its gradient if one is wanted.
inline double adaptive_row(const Task& task, const Row& row) {
  const Head<float> h = teacher_head(task, row);
  const RowNumbers numbers = numbers_of(task, row);
  AdaptiveSums t = {0, 0, 0, 0};
  for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
    const Block b = block_at(task, row, first, kMiddle);
    sides_of(task, row, b, numbers);
    add_adaptive(task, b, h, t);
  }
  const double apart = t.head + t.tail;  // 0: p = q, every weight is 0
  const double ahead = apart > 0 ? t.head / apart : 0, behind = apart > 0 ? t.tail / apart : 0;
  if (row.gradient) {
    for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
      const Block b = block_at(task, row, first, kMiddle);
      sides_of(task, row, b, numbers);
      keep_adaptive(task, b, (float)ahead, (float)behind);
    }
    gradient_of_grad(task, row, behind * t.reverse);
  }
  return ahead * t.forward + behind * t.reverse;
}

}  // namespace KD_NS

// adaptive_kl: forward and reverse KL weighted by how far apart the two distributions are over the teacher's
// head (the smallest set of entries with mass >= mu) and over its tail; the weights count as constants.
#pragma once
#include "head.h"
#include "task.h"

namespace KD_NS {

// The head of the teacher's distribution; `task.out` holds a block of exponentials.
KD_NOINLINE inline Head<float> teacher_head(const Task& task, const Row& row) {
  const vf reference = vf::all(row.t.reference), inverse = vf::all(task.per_t);
  return head_of<float>(task.args->a * row.t.sum, [&](auto f) {
    for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
      const int64_t left = task.args->vocab - first;
      const int n = (int)(left < kBlock ? left : kBlock);
      const float* z = load_block(task.teacher, row.teacher, first, n, task.zt);
      for (int i = 0; i < n; i += kWidth) kd_exp((vf::load(z + i) - reference) * inverse).store(task.out + i);
      for (int i = 0; i < n; ++i) {
        if (!f(first + i, z[i], (double)task.out[i])) return;
      }
    }
  });
}

struct AdaptiveSums {
  double head, tail, forward, reverse;
};

template <bool kCareful>
KD_NOINLINE AdaptiveSums adaptive_sums(const Blocks& b, int64_t first, const RowNumbers& r, Head<float> h) {
  const vf zero = vf::all(0), least = vf::all(h.least);
  vf head = zero, tail = zero, forward = zero, reverse = zero;
  for_vectors(b.n, [&](int i, auto lanes) {
    const int64_t left = h.last - (first + i) + 1;
    const mask ties = first_lanes(left <= 0 ? 0 : left >= kWidth ? kWidth : (int)left);
    const vf z = vf::load(b.zt + i);
    const mask outside = !lt(least, z) & !(eq(z, least) & ties);
    const Pair<vf> x = pair_at<kCareful, vf>(b.zs + i, b.zt + i, r);
    const vf apart = select(lanes, kd_abs(x.p - x.q), zero);
    tail = tail + select(outside, apart, zero);
    head = head + select(outside, zero, apart);
    forward = forward + select(lanes, kd_kl(x.p, x.q, x.lp - x.lq), zero);
    reverse = reverse + select(lanes, kd_kl(x.q, x.p, x.lq - x.lp), zero);
  });
  return {sum(head.v), sum(tail.v), sum(forward.v), sum(reverse.v)};
}

// out = ahead * (q - p) + behind * q * (lq - lp) + share * q.
template <bool kCareful>
KD_NOINLINE void adaptive_gradient(const Blocks& b, float* out, const RowNumbers& r, float ahead,
                                   float behind, float share) {
  const vf forward = vf::all(ahead), reverse = vf::all(behind), common = vf::all(share);
  for (int i = 0; i < b.n; i += kWidth) {
    const Pair<vf> x = pair_at<kCareful, vf>(b.zs + i, b.zt + i, r);
    const vf inner = fma(reverse, x.lq - x.lp, common);
    fma(forward, x.q - x.p, x.q * inner).store(out + i);
  }
}

// D of one row; writes its gradient if one is wanted.
inline double adaptive_row(const Task& task, const Row& row) {
  const Head<float> h = teacher_head(task, row);
  AdaptiveSums t = {0, 0, 0, 0};
  for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
    const Blocks b = load_blocks(task, row, first);
    const auto sums = row.careful ? adaptive_sums<true> : adaptive_sums<false>;
    const AdaptiveSums x = sums(b, first, row.numbers, h);
    t.head += x.head;
    t.tail += x.tail;
    t.forward += x.forward;
    t.reverse += x.reverse;
  }
  const double apart = t.head + t.tail;  // 0: p = q, every weight is 0
  const double ahead = apart > 0 ? t.head / apart : 0, behind = apart > 0 ? t.tail / apart : 0;
  if (row.gradient) {
    const double kd = (double)row.w_kd * task.per_t;
    write_gradient(task, row, [&](const Blocks& b, int64_t, float* out, float ce) {
      const float share = (float)(ce - kd * behind * t.reverse);
      const auto gradient = row.careful ? adaptive_gradient<true> : adaptive_gradient<false>;
      gradient(b, out, row.numbers, (float)(kd * ahead), (float)(kd * behind), share);
    });
  }
  return ahead * t.forward + behind * t.reverse;
}

}  // namespace KD_NS

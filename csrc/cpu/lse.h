// Normalisers of a row: the pair (reference, log-sum), and the careful way to get it for rows with masked
// entries.
#pragma once
#include <math.h>

#include "blocks.h"

namespace KD_NS {

constexpr float kHopeless = -1e20f;  // log-probabilities below come from masks: -inf, finfo.min
constexpr float kMasked = -1e4f;     // what they count as

// A sum lane by lane; what each addition loses is added to the next (Kahan) in two cases. In a row with
// masked entries one element may cost 1e4 nats beside thousands of 1e-7: a lane of 12 would drop whatever is
// below 5e-7. And a lane that takes every fourth element takes 256 of a block.
constexpr bool kLongLanes = kWidth < 8;

template <bool kCompensated, class V>
struct Running {
  V total = V::all(0), lost = V::all(0);
  KD_INLINE void add(V x) {
    if (!kCompensated) {
      total = total + x;
      return;
    }
    const V y = x - lost, next = total + y;
    lost = (next - total) - y;
    total = next;
  }
  KD_INLINE void add(V x, V y) {  // x y
    if (kCompensated) {
      add(x * y);
    } else {
      total = fma(x, y, total);
    }
  }
};

// One side's sums over a row with x = (z - reference) / T: of e^x, and of e^x (z - reference) where wanted.
struct Norm {
  double sum, weighted;
  float reference;
};

inline bool usable(const Norm& s) { return s.sum > 0 && s.sum < INFINITY; }  // NaN is not

inline double entropy(const Norm& s, double per_t) { return log(s.sum) - per_t * s.weighted / s.sum; }

// A row's normaliser as later sweeps use it: log-probability = (z - reference) / T - log. The two are never
// added up. The reference is a multiple of 1/8 near T * logsumexp, exact in float and exact to subtract, so
// that `log` is small and its rounding negligible; with the maximum as reference, `log` near 11 alone would
// cost 5e-7 nats.
struct Normaliser {
  float reference, log;
};

inline Normaliser normaliser_of(const Norm& s, double per_t) {
  const double near = nearbyint(8 * (s.reference + log(s.sum) / per_t)) / 8;
  const double chosen = fabs(near) < 1048576.0 ? near : s.reference;
  return {(float)chosen, (float)(log(s.sum) + (s.reference - chosen) * per_t)};
}

struct Extremes {
  float max, min;
};

// Of n stored numbers, a multiple of kStep; NaN may go unseen.
template <class X>
KD_NOINLINE Extremes extremes_of(const void* from, int n) {
  const typename X::stored* p = (const typename X::stored*)from;
  vf top = vf::all(-INFINITY), low = vf::all(INFINITY);
  for (int i = 0; i < n; i += kStep) {
    vf z[2];
    X::load2(p + i, z);
    for (int h = 0; h < 2; ++h) {
      top = larger(z[h], top);
      low = smaller(z[h], low);
    }
  }
  return {largest(top.v), smallest(low.v)};
}

KD_NOINLINE inline void add_block(const float* z, int n, float per_t, Norm& to) {
  const Exp exp_t(per_t);
  const vf reference = vf::all(to.reference), zero = vf::all(0), low = vf::all(-100.0f / per_t);
  Running<kLongLanes, vf> sums, weighted;
  for_vectors(n, [&](int i, auto lanes) {
    const vf x = vf::load(z + i) - reference, e = select(lanes, vf{exp_t.clamped(x.v)}, zero);
    sums.add(e);
    weighted.add(floor_at(x, low), e);
  });
  to.sum += sum(sums.total.v);
  to.weighted += sum(weighted.total.v);
}

// In two passes, with clamped exponentials and any entries: -inf adds 1e-38; NaN or +inf, or nothing but
// -inf, leave the result unusable. `buffer` holds a block.
inline Norm careful_norm(const Source& source, const char* row, int64_t vocab, float per_t, float* buffer) {
  Norm s = {0, 0, -INFINITY};
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
    stage(source, row, first, n, buffer);
    const float top = extremes_of<f32>(buffer, whole_steps(n)).max;
    s.reference = top > s.reference ? top : s.reference;
  }
  if (s.reference == -INFINITY) return {NAN, NAN, s.reference};
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
    stage(source, row, first, n, buffer);
    add_block(buffer, n, per_t, s);
  }
  return s;
}

// The first index that holds the row's largest logit.
inline int64_t argmax_of(const Source& source, const char* row, int64_t vocab, float* buffer) {
  float best = -INFINITY;
  int64_t block = 0;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
    stage(source, row, first, n, buffer);
    const float top = extremes_of<f32>(buffer, whole_steps(n)).max;
    if (top > best) {
      best = top;
      block = first;
    }
  }
  const int n = (int)(vocab - block < kBlock ? vocab - block : kBlock);
  stage(source, row, block, n, buffer);
  int i = 0;
  while (i < n - 1 && buffer[i] != best) ++i;
  return block + i;
}

}  // namespace KD_NS

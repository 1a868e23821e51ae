// Sweep 1: the normaliser of a row, exactly, with what else that sweep can carry.
//
// Numbers are taken relative to a reference that follows the maximum without a pass of its own: a block is
// summed against the reference of the blocks before it, and redone only where its maximum lies more than
// kSlack above.
#pragma once
#include <math.h>

#include "blocks.h"

namespace KD_NS {

constexpr float kSlack = 16.0f;  // e^16 above the reference costs a float no digit
constexpr float kHopeless = -1e20f;
constexpr float kMasked = -1e4f;  // the log-probability that stands for an entry of -inf or below kHopeless

// sum, weighted: of e^x and x e^x over the row, x = (z - reference) / T; cold: of e^(z - reference).
struct Norm {
  double sum, weighted, cold;
  float reference, max, min;
  int64_t top_block;  // the first block that holds the maximum
  bool bad;           // NaN, +inf, or nothing but -inf
};

struct BlockSums {
  double sum, weighted, cold;
  float max, min;
};

template <bool kWeighted, bool kCold>
KD_NOINLINE BlockSums sum_block(const float* z, int n, float reference, float per_t) {
  const vf zero = vf::all(0), ref = vf::all(reference), inverse = vf::all(per_t);
  vf sums = zero, weighted = zero, cold = zero;
  vf top = vf::all(-INFINITY), low = vf::all(INFINITY);
  for_vectors(n, [&](int i, auto lanes) {
    const vf v = vf::load(z + i);
    top = larger(v, top);
    low = smaller(v, low);
    const vf x = (v - ref) * inverse, e = select(lanes, kd_exp(x), zero);
    sums = sums + e;
    if (kWeighted) weighted = fma(floor_at(x, vf::all(-100.0f)), e, weighted);
    if (kCold) cold = cold + select(lanes, kd_exp(v - ref), zero);
  });
  return {sum(sums.v), kWeighted ? sum(weighted.v) : 0, kCold ? sum(cold.v) : 0, largest(top.v),
          smallest(low.v)};
}

KD_NOINLINE inline float max_block(const float* z, int n) {
  vf top = vf::all(-INFINITY);
  for (int i = 0; i < n; i += kWidth) top = larger(vf::load(z + i), top);
  return largest(top.v);
}

inline bool holds_nan(const float* z, int n) {
  bool found = false;
  for (int i = 0; i < n; ++i) found |= z[i] != z[i];
  return found;
}

// Moves the sums to a new reference.
inline void refer_to(Norm& s, float reference, double per_t) {
  if (s.sum > 0) {
    const double shift = ((double)s.reference - reference) * per_t;
    s.weighted = exp(shift) * (s.weighted + shift * s.sum);
    s.sum *= exp(shift);
    s.cold *= exp((double)s.reference - reference);
  }
  s.reference = reference;
}

struct Needs {
  bool weighted, cold;
};

template <bool kWeighted, bool kCold>
Norm norm_of(const Source& source, const char* row, int64_t vocab, float per_t, float* buffer) {
  Norm s = {0, 0, 0, -INFINITY, -INFINITY, INFINITY, 0, false};
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
    const float* z = load_block(source, row, first, n, buffer);
    if (s.reference == -INFINITY) {
      s.reference = max_block(z, n);
      if (s.reference == -INFINITY) {  // nothing but -inf (or NaN, which max may overlook) so far
        s.min = -INFINITY;
        s.bad |= holds_nan(z, n);
        continue;
      }
    }
    BlockSums b = sum_block<kWeighted, kCold>(z, n, s.reference, per_t);
    const float per = kCold && per_t < 1.0f ? 1.0f : per_t;
    if ((b.max - s.reference) * per > kSlack) {
      refer_to(s, b.max, per_t);
      b = sum_block<kWeighted, kCold>(z, n, s.reference, per_t);
    }
    s.sum += b.sum;
    s.weighted += b.weighted;
    s.cold += b.cold;
    if (b.max > s.max) {
      s.max = b.max;
      s.top_block = first;
    }
    s.min = b.min < s.min ? b.min : s.min;
  }
  s.bad |= !(s.sum > 0 && s.sum < INFINITY);  // NaN fails both
  return s;
}

inline Norm norm_of(const Source& source, const char* row, int64_t vocab, float per_t, Needs needs,
                    float* buffer) {
  if (needs.weighted && needs.cold) return norm_of<true, true>(source, row, vocab, per_t, buffer);
  if (needs.weighted) return norm_of<true, false>(source, row, vocab, per_t, buffer);
  if (needs.cold) return norm_of<false, true>(source, row, vocab, per_t, buffer);
  return norm_of<false, false>(source, row, vocab, per_t, buffer);
}

// The row's normaliser as later sweeps use it: log-probability = (z - reference) / T - log. The two are never
// added up. The reference is a multiple of 1/8 near T * logsumexp, exact in float and exact to subtract, so
// that `log` is small and its rounding negligible; with the maximum as reference, `log` near 11 alone would
// cost 5e-7 nats.
struct Normaliser {
  float reference, log;
};

inline Normaliser normaliser_of(double reference, double log_sum, double per_t) {
  const double near = nearbyint(8 * (reference + log_sum / per_t)) / 8;
  const double chosen = fabs(near) < 1048576.0 ? near : reference;
  return {(float)chosen, (float)(log_sum + (reference - chosen) * per_t)};
}

// The first index that holds the row's maximum.
inline int64_t argmax_of(const Source& source, const char* row, int64_t vocab, const Norm& s, float* buffer) {
  const int64_t left = vocab - s.top_block;
  const int n = (int)(left < kBlock ? left : kBlock);
  const float* z = load_block(source, row, s.top_block, n, buffer);
  for (int i = 0; i < n; ++i) {
    if (z[i] == s.max) return s.top_block + i;
  }
  return -1;
}

}  // namespace KD_NS

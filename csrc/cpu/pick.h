// From candidates to the kept entries of a row.
#pragma once
#include "scan.h"

namespace KD_NS {

// How many of n floats (a multiple of kWidth) are at or above x.
KD_NOINLINE inline int64_t count_from(const float* z, int64_t n, float x) {
  const vf bar = vf::all(x), one = vf::all(1), zero = vf::all(0);
  vf total[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      total[j] = total[j] + select(lt(vf::load(z + i + j * kWidth), bar), zero, one);
    }
  }
  for (; i < n; i += kWidth) total[0] = total[0] + select(lt(vf::load(z + i), bar), zero, one);
  return (int64_t)sum(((total[0] + total[1]) + (total[2] + total[3])).v);
}

// A number that at least k of n floats (a multiple of kWidth, no NaN) reach, at most `most` unless many are
// equal to it: found by bisection of the floats' order-preserving integers, at most 32 counts whatever the
// numbers. `low`: one that k reach, `high`: the maximum.
inline float reached_by(const float* z, int64_t n, int64_t k, int64_t most, float low, float high) {
  uint32_t lo = order_bits(low), hi = order_bits(high) + 1;
  while (hi - lo > 1) {
    const uint32_t middle = lo + (hi - lo) / 2;
    const int64_t count = count_from(z, n, from_order_bits<float>(middle));
    if (count >= k) {
      lo = middle;
      if (count <= most) break;
    } else {
      hi = middle;
    }
  }
  return from_order_bits<float>(lo);
}

inline float max_of(const float* z, int64_t n) {
  vf top = vf::all(-INFINITY);
  for (int64_t i = 0; i < n; i += kWidth) top = larger(vf::load(z + i), top);
  return largest(top.v);
}

// The smallest of n floats (a multiple of kWidth) at or above x.
inline float least_from(const float* z, int64_t n, float x) {
  const vf bar = vf::all(x), none = vf::all(INFINITY);
  vf least = none;
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf v = vf::load(z + i);
    least = smaller(select(lt(v, bar), none, v), least);
  }
  return smallest(least.v);
}

// Candidates in two: those kept, and those that belong to the tail after all.
struct Split {
  float max, least;  // of the kept
  int64_t kept;      // how many
  int64_t ties;      // kept ones equal to `least`: the first so many
  int64_t left;      // candidates equal to `least` that are not kept
};

// Sums of e^x and e^x (z - reference), x = (z - reference) / T.
struct Mass {
  double sum, weighted;
};

// Of the n floats (a multiple of kWidth) that are above `least` (kAbove) or below it; padding is neither.
template <bool kAbove>
KD_NOINLINE Mass mass_of(const float* z, int64_t n, float least, float reference, float per_t) {
  const Exp exp_t(per_t);
  const vf bar = vf::all(least), from = vf::all(reference), zero = vf::all(0), low = vf::all(-100.0f / per_t);
  const vf padding = vf::all(-INFINITY);
  Mass to = {0, 0};
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t end = block + kBlock < n ? block + kBlock : n;
    Running<kLongLanes, vf> sums, weighted;
    for (int64_t i = block; i < end; i += kWidth) {
      const vf v = vf::load(z + i), x = floor_at(v - from, low);
      const mask counts = kAbove ? lt(bar, v) : lt(v, bar) & lt(padding, v);
      const vf e = select(counts, vf{exp_t.clamped(x.v)}, zero);
      sums.add(e);
      weighted.add(e, select(counts, x, zero));
    }
    to.sum += sum(sums.total.v);
    to.weighted += sum(weighted.total.v);
  }
  return to;
}

// Fills `found` up to whole vectors with -inf.
inline int64_t pad(Candidates& found) {
  int64_t n = found.count;
  for (; n % kWidth; ++n) found.value[n] = -INFINITY;
  return n;
}

// The k largest of the candidates (all, where there are fewer), of equal ones those found first. n: padded
// count; low: what all of them reach.
inline Split split(const Candidates& found, int64_t n, int64_t k, float low) {
  Split s;
  s.max = max_of(found.value, n);
  s.kept = found.count < k ? found.count : k;
  const float reached = reached_by(found.value, n, s.kept, s.kept, low, s.max);
  s.least = least_from(found.value, n, reached);
  const int64_t above = count_from(found.value, n, after(s.least));
  s.ties = s.kept - above;
  s.left = count_from(found.value, n, s.least) - s.kept;
  return s;
}

}  // namespace KD_NS

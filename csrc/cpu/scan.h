// Sweeps over the stored numbers of a row that selection is made of.
//
// Where the threshold comes from: the k-th largest of the maxima of disjoint groups is a lower bound of the
// row's k-th largest entry, because k groups have an entry at or above it; and fewer than k groups have one
// above it, so at most that many groups' entries, and k equal ones, can be candidates, whatever the row. With
// 16 k groups a random row has about k candidates.
#pragma once
#include <math.h>

#include "head.h"
#include "lanes.h"
#include "lse.h"

namespace KD_NS {

constexpr int kQuad = 4 * kWidth;   // what the sweeps take at a time
constexpr int kStripe = 2 * kQuad;  // neighbouring elements are in different groups
constexpr int kRun = 4096;          // elements between two looks at the candidates found
constexpr float kLowest = -3.402823466e38f;

template <class X>
KD_INLINE void load_pair(const typename X::stored* p, vf* x) {
  X::load2(p, x);
}
template <>
KD_INLINE void load_pair<f16>(const uint16_t* p, vf* x) {
  x[0] = f16::load(p);
  x[1] = f16::load(p + kWidth);
}

// Four vectors, in the order of the type's own.
template <class X>
KD_INLINE void load_quad(const typename X::stored* p, vf* x) {
  load_pair<X>(p, x);
  load_pair<X>(p + kStep, x + 2);
}

// Stored numbers, a multiple of kQuad of them; `first` is the index of the first one. Meanwhile lines to come
// are asked for: `eighths` of as many bytes as the piece has, from `ahead` on.
struct Piece {
  const void* data;
  int64_t first, n;
  const char* ahead;
  int eighths;
};

// The next larger float.
inline float after(float x) { return from_order_bits<float>(order_bits(x) + 1); }

// While the quad at element i is at work.
template <class X>
KD_INLINE void ask(const Piece& piece, int64_t i) {
  const int64_t begin = i * (int64_t)sizeof(typename X::stored),
                bytes = kQuad * (int)sizeof(typename X::stored);
  const char* from = piece.ahead + begin * piece.eighths / 8;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

// Maxima of the stripes' lanes over each `span` elements (a multiple of kStripe), kStripe of them a span; NaN
// is passed over. Returns how many.
template <class X>
KD_NOINLINE int64_t maxima_of(Piece piece, int64_t span, float* to) {
  const typename X::stored* p = (const typename X::stored*)piece.data;
  const float* begin = to;
  for (int64_t first = 0; first < piece.n; first += span, to += kStripe) {
    const int64_t end = first + span < piece.n ? first + span : piece.n;
    vf top[8];
    for (int j = 0; j < 8; ++j) top[j] = vf::all(-INFINITY);
    for (int64_t i = first; i < end; i += kStripe) {
      for (int j = 0; j < 8; j += 4) {
        if (j && i + kQuad >= end) break;
        vf z[4];
        load_quad<X>(p + i + j * kWidth, z);
        ask<X>(piece, i + j * kWidth);
        for (int h = 0; h < 4; ++h) top[j + h] = larger(z[h], top[j + h]);
      }
    }
    for (int j = 0; j < 8; ++j) top[j].store(to + j * kWidth);
  }
  return to - begin;
}

KD_INLINE double total_of(const Running<kLongLanes, vf>* r) {
  return sum(((r[0].total + r[1].total) + (r[2].total + r[3].total)).v);
}

// What the filter has found so far.
struct Filter {
  float threshold, bar;  // entries not below the bar are candidates: the threshold, then the number after it
  int64_t ties;          // entries equal to the threshold that are still wanted
  Candidates found;
  double sum, weighted;  // of e^x and e^x (z - threshold) over entries below, x = (z - threshold) / T
  bool nan;
};

// Takes in one vector. In an open run, whose bar is the threshold, entries equal to it beyond those wanted
// count as entries below; in others they have been summed.
KD_INLINE void take_ties(vf z, int64_t first, bool open, Filter& f) {
  const vf threshold = vf::all(f.threshold);
  mask keep = lt(threshold, z);
  if (open) {
    const uint32_t equal = bits_of(eq(z, threshold));
    int last = 0;  // one past the last tie that is wanted
    for (uint32_t left = equal; left && f.ties > 0; left &= left - 1, --f.ties)
      last = __builtin_ctz(left) + 1;
    f.sum += __builtin_popcount(equal >> last);
    keep = !(lt(z, threshold) | (eq(z, threshold) & !first_lanes(last)));
  }
  append(f.found, z, first, keep);
}

// Takes in the candidates of one quad; of a row with NaN nothing counts.
template <class X>
KD_NOINLINE void take(const typename X::stored* p, int64_t first, bool open, Filter& f) {
  const vf threshold = vf::all(f.threshold);
  vf z[4];
  mask equal[4], number[4];
  for (int h = 0; h < 4; ++h) {
    z[h] = X::load(p + h * kWidth);
    equal[h] = eq(z[h], threshold);
    number[h] = eq(z[h], z[h]);
  }
  if (!every(number)) {
    f.nan = true;
  } else if (open && none(equal)) {
    for (int h = 0; h < 4; ++h) append(f.found, z[h], first + h * kWidth, lt(threshold, z[h]));
  } else {
    for (int h = 0; h < 4; ++h) take_ties(z[h], first + h * kWidth, open, f);
    if (f.ties == 0) f.bar = after(f.threshold);
  }
}

// Candidates and sums of one piece. e^x of a far smaller entry counts as 1.6e-38, of -inf too. Quads with
// candidates are listed without a branch and looked at after each run: what they cost is mostly
// mispredictions.
template <class X, bool kWeighted>
KD_NOINLINE void filter_piece(Piece piece, float per_t, Filter& f) {
  const typename X::stored* p = (const typename X::stored*)piece.data;
  const Exp exp_t(per_t);
  const vf threshold = vf::all(f.threshold), low = vf::all(-100.0f / per_t), zero = vf::all(0);
  int32_t hits[kRun / kQuad];
  for (int64_t run = 0; run < piece.n; run += kRun) {
    const int64_t n = piece.n - run < kRun ? piece.n - run : kRun;
    const vf bar = vf::all(f.bar);
    Running<kLongLanes, vf> sums[4], weighted[4];
    int found = 0;
    for (int i = 0; i < n; i += kQuad) {
      vf z[4];
      mask below[4];
      load_quad<X>(p + run + i, z);
      ask<X>(piece, run + i);
      for (int h = 0; h < 4; ++h) below[h] = lt(z[h], bar);
      hits[found] = i;
      found += !every(below);
      for (int h = 0; h < 4; ++h) {
        const vf x = z[h] - threshold, e = select(below[h], vf{exp_t.clamped(x.v)}, zero);
        sums[h].add(e);
        if (kWeighted) weighted[h].add(e, floor_at(x, low));
      }
    }
    const bool open = f.bar == f.threshold;
    for (int j = 0; j < found; ++j) take<X>(p + run + hits[j], piece.first + run + hits[j], open, f);
    f.sum += total_of(sums);
    if (kWeighted) f.weighted += total_of(weighted);
  }
}

struct Below {
  double sum;     // of e^((z - reference) / T) over entries below `least`
  int64_t equal;  // entries equal to it
  float max;      // of the entries below; -inf where there are none
};

// Another look at the entries below `least`. Far smaller ones count as 1.6e-38.
template <class X>
KD_NOINLINE void add_below(Piece piece, float least, float reference, float per_t, Below& to) {
  const typename X::stored* p = (const typename X::stored*)piece.data;
  const Exp exp_t(per_t);
  const vf bar = vf::all(least), from = vf::all(reference), zero = vf::all(0), one = vf::all(1);
  const vf nothing = vf::all(-INFINITY);
  vf top = vf::all(to.max);
  for (int64_t block = 0; block < piece.n; block += kBlock) {
    const int64_t end = block + kBlock < piece.n ? block + kBlock : piece.n;
    Running<kLongLanes, vf> sums;
    vf equal = zero;
    for (int64_t i = block; i < end; i += kWidth) {
      const vf z = X::load(p + i);
      const mask below = lt(z, bar);
      sums.add(select(below, vf{exp_t.clamped((z - from).v)}, zero));
      equal = equal + select(eq(z, bar), one, zero);
      top = larger(select(below, z, nothing), top);
    }
    to.sum += sum(sums.total.v);
    to.equal += (int64_t)sum(equal.v);
  }
  to.max = largest(top.v);
}

// The sweeps for one stored type.
struct Scans {
  int64_t (*maxima)(Piece, int64_t span, float* to);
  void (*filter[2])(Piece, float per_t, Filter&);  // [weighted]
  void (*below)(Piece, float least, float reference, float per_t, Below&);
};

template <class X>
inline const Scans* scans_of() {
  static const Scans scans = {maxima_of<X>, {filter_piece<X, false>, filter_piece<X, true>}, add_below<X>};
  return &scans;
}

inline const Scans* scans_for(kd_dtype dtype) {
  return dtype == KD_F32 ? scans_of<f32>() : dtype == KD_F16 ? scans_of<f16>() : scans_of<bf16>();
}

}  // namespace KD_NS

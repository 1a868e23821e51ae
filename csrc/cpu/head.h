// The head of a distribution: the smallest set of entries with mass >= mu, equal ones entering by lower
// index.
//
// Found without sorting: a histogram of mass over the order-preserving bits of the logits, 11 bits at a time,
// ends at one logit value and, among its equals, at one index. Each pass reads the row once.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "isa.h"

namespace KD_NS {

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// In the head: z above `least`, or equal to it and at an index up to `last`.
template <class Real>
struct Head {
  Real least;
  int64_t last;
};

template <class Real>
struct KeyOf;
template <>
struct KeyOf<float> {
  typedef uint32_t type;
};
template <>
struct KeyOf<double> {
  typedef uint64_t type;
};

// Unsigned integers in the order of the floating-point numbers they come from; the two zeros are one number.
template <class Real>
inline typename KeyOf<Real>::type order_bits(Real z) {
  typename KeyOf<Real>::type bits;
  const Real canonical = z + (Real)0;
  memcpy(&bits, &canonical, sizeof bits);
  const auto top = (decltype(bits))1 << (8 * sizeof bits - 1);
  return bits & top ? ~bits : bits | top;
}

template <class Real>
inline Real from_order_bits(typename KeyOf<Real>::type key) {
  const auto top = (decltype(key))1 << (8 * sizeof key - 1);
  const auto bits = key & top ? (decltype(key))(key & ~top) : (decltype(key))~key;
  Real z;
  memcpy(&z, &bits, sizeof z);
  return z;
}

struct Histogram {
  double mass[kBins];
  int64_t count[kBins];
};

// `visit(f)` calls f(index, z, mass) for every entry of the row in order, as long as f returns true.
// `wanted` is mu in the unit of the masses.
template <class Real, class Visit>
inline Head<Real> head_of(double wanted, Visit visit) {
  typedef typename KeyOf<Real>::type Key;
  Histogram h;
  Key prefix = 0;
  double above = 0;
  int digit = 0;
  for (int shift = 8 * sizeof(Key); shift > 0;) {
    const int bits = shift < kDigitBits ? shift : kDigitBits, low = shift - bits;
    memset(&h, 0, sizeof h);
    visit([&](int64_t, Real z, double mass) {
      const Key key = order_bits(z);
      if (shift < (int)(8 * sizeof(Key)) && key >> shift != prefix) return true;
      const int at = (int)(key >> low & (Key)((1 << bits) - 1));
      h.mass[at] += mass;
      ++h.count[at];
      return true;
    });
    int lowest = 0;  // where rounding leaves the whole mass short of mu, the last entry
    for (digit = (1 << bits) - 1; digit >= 0; --digit) {
      if (!h.count[digit]) continue;
      lowest = digit;
      if (above + h.mass[digit] >= wanted) break;
      above += h.mass[digit];
    }
    if (digit < 0) {
      digit = lowest;
      above -= h.mass[digit];
    }
    prefix = (Key)(prefix << bits | (Key)digit);  // the first pass shifts a zero
    shift = low;
  }
  const double needed = ceil((wanted - above) / (h.mass[digit] / (double)h.count[digit]));
  int64_t k = needed >= (double)h.count[digit] ? h.count[digit] : needed > 1 ? (int64_t)needed : 1;
  Head<Real> head = {from_order_bits<Real>(prefix), -1};
  visit([&](int64_t i, Real z, double) {
    if (z == head.least && --k == 0) head.last = i;
    return k > 0;
  });
  return head;
}

}  // namespace KD_NS

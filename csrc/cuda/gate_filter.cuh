// Draws under top-k and top-p: a block finds the last entry of a row that may be drawn, then draws among
// those up to it. No sort of the row: a histogram of 2048 bins, evenly over the logits near the top, leaves
// few entries in doubt, which a block sorts in shared memory; further histograms follow, over bits of the
// logits, then of the ids, while they are too many. At most 7 in all, on any row; 1 on most.
#pragma once
#include "gate_pick.cuh"

namespace kd {
namespace gate {

constexpr int kFilterWarps = kFilterThreads / 32, kDigits = 2048, kDigitBits = 11, kSlots = 2048;

struct FilterShared {
  unsigned counts[kDigits];
  u64 masses[kDigits];
  u64 slots[kSlots];
  ScanShared<kFilterWarps> scan;
  u64 parts[kFilterWarps];
  u64 before, bound;
  int digit;
  unsigned inside;
};

// Entries from `least` to `most`, and a digit for each that grows with them.
struct Range {
  u64 least, most;
  bool even;  // digits are even steps of the logit; else of the bits in which `least` and `most` differ
  float low, scale;
  int shift;

  __device__ __forceinline__ bool has(u64 entry) const { return entry >= least && entry <= most; }
  __device__ __forceinline__ bool among_ids() const { return least >> 32 == most >> 32; }
  __device__ __forceinline__ unsigned word(u64 entry) const {
    return static_cast<unsigned>(among_ids() ? entry : entry >> 32);
  }
  __device__ __forceinline__ int even_digit(float z) const {
    return min(max(__float2int_rz((z - low) * scale), 0), kDigits - 1);
  }
  __device__ __forceinline__ int digit(u64 entry, float z) const {
    return even ? even_digit(z) : static_cast<int>((word(entry) - word(least)) >> shift);
  }

  // Digits of the bits from here on.
  __device__ void by_bits() {
    even = false;
    shift = max(32 - kDigitBits - __clz(static_cast<int>(word(most) - word(least))), 0);
  }

  // The entries of one digit.
  __device__ void narrow(int digit) {
    if (even) {
      least = max(least, static_cast<u64>(first_key(digit)) << 32);
      if (digit < kDigits - 1) most = min(most, (static_cast<u64>(first_key(digit + 1)) << 32) - 1);
      return;
    }
    const unsigned from = word(least) + (static_cast<unsigned>(digit) << shift);
    const unsigned to = from + min(word(most) - from, (1u << shift) - 1);
    if (among_ids()) {
      const u64 key = least >> 32 << 32;
      least = key | from, most = key | to;
    } else {
      least = max(least, static_cast<u64>(from) << 32);
      most = min(most, static_cast<u64>(to) << 32 | 0xffffffffu);
    }
  }

 private:
  // The least key of a logit that has this digit or a larger one; behind the range if there is none.
  __device__ unsigned first_key(int digit) const {
    auto from = static_cast<unsigned>(least >> 32), to = static_cast<unsigned>(most >> 32) + 1;
    while (from < to) {
      const unsigned middle = from + (to - from) / 2;
      if (even_digit(number_of(middle)) >= digit) {
        to = middle;
      } else {
        from = middle + 1;
      }
    }
    return from;
  }
};

struct Filter {
  static constexpr int kVector = AnySide::kVector, kGroup = 32 * kVector;
  FilterShared& shared;
  const AnySide side;
  const int vocab;
  const float top, exponent;

  __device__ Filter(const kd_gate_arguments& a, FilterShared& shared, int64_t row, float top)
      : shared(shared),
        side(a.sides[a.from_teacher[row]], row),
        vocab(a.vocab),
        top(top),
        exponent(a.exponent) {}

  // The last of the most likely entries that together have `need`: of their number or, kMass, of the mass of
  // all from `floor` on, of which `share` is needed.
  template <bool kMass>
  __device__ u64 last_kept(u64 floor, u64 need, double share) {
    const float span = kMass ? 28.0f * 1.442695f / exponent : 32.0f;  // 2^-40 of the top, and far from it
    Range range{floor, ~0ull, true, top - span, (kDigits - 1) / span, 0};
    range.most = static_cast<u64>(key_of(top)) << 32 | 0xffffffffu;
    u64 above = 0;
    for (bool first = true;; first = false) {
      u64 total;
      const u64 upto = count<kMass>(range, &total);
      if (first && kMass) need = max(static_cast<u64>(ceil(share * static_cast<double>(total))), 1ull);
      if (first && total <= need) return floor;
      find_digit<kMass>(above + upto, need);
      above = shared.before;
      range.narrow(shared.digit);
      if (shared.inside <= kSlots) return best<kMass>(range, above, need);
      if (range.among_ids())
        range.least = max(range.least, range.least >> 32 << 32 | ~static_cast<unsigned>(vocab - 1));
      range.by_bits();
    }
  }

  // The first entry from `bound` up whose cumulative mass, in the order of ids, exceeds u of all of it.
  __device__ int draw(u64 bound, double u) {
    int begin = 0, end = vocab;
    u64 target = 0;
    bool first = true;
    const auto weight = [&](float z, int id) {
      return entry_of(z, id) >= bound ? mass_of(z, top, exponent) : 0;
    };
    while (first || end - begin > 32) {
      const int each = (end - begin + kFilterThreads - 1) / kFilterThreads * 32;
      u64 own = 0, total = 0, before = 0;
      walk(min(begin + warp_of() * each, end), min(begin + (warp_of() + 1) * each, end),
           [&](float z, int id) { own += weight(z, id); });
      own = warp_sum(own);
      __syncthreads();
      if (lane_of() == 0) shared.parts[warp_of()] = own;
      __syncthreads();
      for (int w = 0; w < kFilterWarps; ++w) total += shared.parts[w];
      if (first) target = target_of(u, total);
      first = false;
      int w = 0;
      for (; before + shared.parts[w] <= target; ++w) before += shared.parts[w];
      begin += w * each, end = min(begin + each, end);
      target -= before;
    }
    const int id = begin + lane_of();
    const u64 sum = warp_scan(id < end ? weight(side.one(id), id) : 0);
    return begin + __ffs(static_cast<int>(__ballot_sync(kAll, sum > target))) - 1;
  }

 private:
  // look(z, id) for a warp's entries from `begin` to `end`.
  template <class Look>
  __device__ __forceinline__ void walk(int begin, int end, const Look& look) const {
    const auto scattered = [&](int from, int to) {
      for (int id = from + lane_of(); id < to; id += 32) look(side.one(id), id);
    };
    const int edge = min((kVector - (begin + side.shift()) % kVector) % kVector, end - begin);
    scattered(begin, begin + edge);
    begin += edge;
    uint4 next;  // on its way while the one before is looked at
    if (begin + kGroup <= end) next = side.load(begin + lane_of() * kVector);
#pragma unroll 1
    for (; begin + kGroup <= end; begin += kGroup) {
      const int id = begin + lane_of() * kVector;
      const uint4 raw = next;
      if (begin + 2 * kGroup <= end) next = side.load(id + kGroup);
      float z[kVector];
      side.logits(raw, id, z);
#pragma unroll
      for (int e = 0; e < kVector; ++e) look(z[e], id + e);
    }
    scattered(begin, end);
  }

  // look(entry, z, mass) for the entries of the whole row that are in range, by all warps; kMass: and have
  // mass.
  template <bool kMass, class Look>
  __device__ __forceinline__ void sweep(const Range& range, const Look& look) const {
    const int each = (vocab + kFilterThreads - 1) / kFilterThreads * 32;
    walk(min(warp_of() * each, vocab), min((warp_of() + 1) * each, vocab), [&](float z, int id) {
      const u64 entry = entry_of(z, id);
      if (!range.has(entry)) return;
      const u64 mass = kMass ? mass_of(z, top, exponent) : 1;
      if (mass) look(entry, z, mass);
    });
  }

  // The histogram; its sum from the top to this thread's two digits, and the whole.
  template <bool kMass>
  __device__ u64 count(const Range& range, u64* total) {
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kFilterThreads) {
      shared.counts[i] = 0;
      if (kMass) shared.masses[i] = 0;
    }
    __syncthreads();
    sweep<kMass>(range, [&](u64 entry, float z, u64 mass) {
      const int digit = range.digit(entry, z);
      atomicAdd(&shared.counts[digit], 1u);
      if (kMass) atomicAdd(&shared.masses[digit], mass);
    });
    __syncthreads();
    return block_scan(of_digit<kMass>(0) + of_digit<kMass>(1), shared.scan, total);
  }

  // Of this thread's two digits; thread 0 has the largest.
  template <bool kMass>
  __device__ __forceinline__ u64 of_digit(int i) const {
    const int digit = kDigits - 1 - 2 * static_cast<int>(threadIdx.x) - i;
    return kMass ? shared.masses[digit] : shared.counts[digit];
  }

  // The digit at which the sum from the top, `upto` this thread's two, reaches the need.
  template <bool kMass>
  __device__ void find_digit(u64 upto, u64 need) {
    const u64 one = of_digit<kMass>(0), two = of_digit<kMass>(1);
    if (upto >= need && upto - one - two < need) {
      const bool second = upto - two < need;
      shared.digit = kDigits - 1 - 2 * static_cast<int>(threadIdx.x) - second;
      shared.before = second ? upto - two : upto - one - two;
      shared.inside = shared.counts[shared.digit];
    }
    __syncthreads();
  }

  // The entry of a range of at most kSlots at which the sum from the top reaches the need.
  template <bool kMass>
  __device__ u64 best(const Range& range, u64 above, u64 need) {
    const unsigned n = shared.inside;
    __syncthreads();
    if (threadIdx.x == 0) shared.inside = 0;
    __syncthreads();
    sweep<kMass>(range, [&](u64 entry, float, u64) { shared.slots[atomicAdd(&shared.inside, 1u)] = entry; });
    unsigned size = 64;
    while (size < n) size *= 2;
    for (unsigned i = n + threadIdx.x; i < size; i += kFilterThreads) shared.slots[i] = 0;
    for (unsigned run = 2; run <= size; run *= 2) {
      for (unsigned apart = run / 2; apart; apart /= 2) {
        __syncthreads();
        if (threadIdx.x < size / 2) exchange(threadIdx.x, run, apart);
      }
    }
    const unsigned i = 2 * threadIdx.x;  // the two that this thread has compared last
    const u64 one = weight<kMass>(i, n), two = weight<kMass>(i + 1, n);
    u64 total;
    const u64 upto = above + block_scan(one + two, shared.scan, &total);
    if (upto >= need && upto - one - two < need) shared.bound = shared.slots[upto - two < need ? i + 1 : i];
    __syncthreads();
    return shared.bound;
  }

  template <bool kMass>
  __device__ __forceinline__ u64 weight(unsigned i, unsigned n) const {
    if (i >= n) return 0;
    return kMass ? mass_of(logit_of(shared.slots[i]), top, exponent) : 1;
  }

  // A step of a bitonic sort, descending.
  __device__ __forceinline__ void exchange(unsigned pair, unsigned run, unsigned apart) {
    const unsigned i = 2 * pair - (pair & (apart - 1)), j = i + apart;
    const u64 a = shared.slots[i], b = shared.slots[j];
    if ((a < b) == ((i & run) == 0)) {
      shared.slots[i] = b;
      shared.slots[j] = a;
    }
  }
};

__device__ inline void draw_filtered(const kd_gate_arguments& a, FilterShared& shared) {
  const int64_t row = blockIdx.x;
  const float top = a.tops[row];
  const double u = a.uniforms[row];
  int token = -1;
  if (top == top && u >= 0 && u < 1) {
    Filter filter(a, shared, row, top);
    u64 bound = static_cast<u64>(key_of(kLeastFloat)) << 32;
    if (a.top_k) bound = filter.last_kept<false>(bound, static_cast<u64>(a.top_k), 0);
    if (a.top_p < 1) bound = filter.last_kept<true>(bound, 0, a.top_p);
    token = filter.draw(bound, u);
  }
  if (threadIdx.x == 0) a.token[row] = token;
}

}  // namespace gate
}  // namespace kd

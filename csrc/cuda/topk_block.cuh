// What one block does with candidates in shared memory: finds the k-th largest, drops the others, sorts by
// id.
#pragma once
#include "numbers.cuh"

namespace kd {

constexpr int kThreads = 512, kWarps = kThreads / 32, kDigits = kThreads;
constexpr int kDigitBits = 9;
constexpr unsigned kAll = 0xffffffffu;
static_assert(1 << kDigitBits == kDigits, "a thread a digit");

struct BlockShared {
  unsigned histogram[kDigits];
  unsigned warp_counts[kWarps];
  unsigned least[3], most[3];  // of the words in range; three, so that one can be reset while no one uses it
  unsigned digit, above, inside;
  unsigned count;     // candidates that asked for a slot
  unsigned again[3];  // whether any thread has candidates left
  float2 numbers[2][kWarps];
  u64 entries[kWarps];
};

// Over the block; of two reductions in a row each has numbers of its own, so that one barrier does.
__device__ __forceinline__ float2 block_reduce(float2 v, float2 (&shared)[kWarps], bool maximum) {
  const auto combine = [maximum](float2 a, float2 b) {
    return maximum ? make_float2(fmaxf(a.x, b.x), fmaxf(a.y, b.y)) : make_float2(a.x + b.x, a.y + b.y);
  };
  const auto warp = [&combine](float2 x, int from) {
    for (int o = from; o; o >>= 1) {
      x = combine(x, make_float2(__shfl_xor_sync(kAll, x.x, o), __shfl_xor_sync(kAll, x.y, o)));
    }
    return x;
  };
  v = warp(v, 16);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  return warp(shared[threadIdx.x % kWarps], kWarps / 2);
}

__device__ __forceinline__ u64 block_least(u64 entry, u64 (&shared)[kWarps]) {
  const auto warp = [](u64 x, int from) {
    for (int o = from; o; o >>= 1) x = min(x, __shfl_xor_sync(kAll, x, o));
    return x;
  };
  entry = warp(entry, 16);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = entry;
  __syncthreads();
  return warp(shared[threadIdx.x % kWarps], kWarps / 2);
}

// Candidates of one block. Every method is for all threads together but `put`.
struct Candidates {
  BlockShared& shared;
  u64* slots;
  unsigned capacity, k;
  u64 bound;    // only entries >= bound can be among the k largest
  float floor;  // their logits are >= floor
  int turn = 0, round = 0;

  __device__ Candidates(BlockShared& shared, u64* slots, int capacity, int k)
      : shared(shared),
        slots(slots),
        capacity(static_cast<unsigned>(capacity)),
        k(static_cast<unsigned>(k)),
        bound(static_cast<u64>(key_of(kLeastFloat)) << 32),
        floor(kLeastFloat) {
    shared.histogram[threadIdx.x] = 0;
    if (threadIdx.x < 3) {
      shared.least[threadIdx.x] = kAll;
      shared.most[threadIdx.x] = 0;
      shared.again[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
  }

  // Whether there was a slot.
  __device__ __forceinline__ bool put(u64 entry) {
    const unsigned slot = atomicAdd(&shared.count, 1u);
    if (slot < capacity) slots[slot] = entry;
    return slot < capacity;
  }

  // Into the slots beyond the capacity, when no more than they are can follow.
  __device__ __forceinline__ void put_last(u64 entry) { slots[atomicAdd(&shared.count, 1u)] = entry; }

  // A barrier that tells everyone whether it holds for anyone.
  __device__ __forceinline__ bool any(bool holds) {
    if (holds) atomicOr(&shared.again[turn], 1u);
    __syncthreads();
    const bool found = shared.again[turn] != 0;
    if (threadIdx.x == 0) shared.again[turn == 0 ? 2 : turn - 1] = 0;
    turn = turn == 2 ? 0 : turn + 1;
    return found;
  }

  // Raises the bound such that exactly k of n > k entries, all different, reach it. Radix select with digits
  // of nine bits counted from the least number in range, so that a narrow range costs one round: logits
  // first, then ids.
  __device__ void raise_bound(unsigned n) {
    unsigned need = k, least = 0, most = kAll, logit = 0;
    bool among_ids = false;
    while (true) {
      narrow(n, among_ids, logit, &least, &most);
      if (least == most && !among_ids) {  // equal logits
        among_ids = true, logit = least, least = 0, most = kAll;
        continue;
      }
      const int shift = max(32 - kDigitBits - __clz(static_cast<int>(most - least)), 0);
      count_digits(n, among_ids, logit, least, most, shift);
      find_digit(need);
      need -= shared.above;
      const unsigned first = least + (shared.digit << shift);
      most = first + min(most - first, (1u << shift) - 1);
      least = first;
      if (shared.inside == need) break;
    }
    bound = among_ids ? static_cast<u64>(logit) << 32 | least : static_cast<u64>(least) << 32;
    floor = logit_of(bound);
  }

  // Keeps the k entries that reach the bound, in the first slots; the others go to the sum.
  template <class Drop>
  __device__ void keep_best(unsigned n, Drop&& drop) {
    if (threadIdx.x == 0) shared.count = 0;
    for (unsigned first = 0; first < n; first += kThreads) {
      const unsigned i = first + threadIdx.x;
      const u64 entry = i < n ? slots[i] : 0;
      __syncthreads();  // everyone has read; what is written now lies before what is read next
      if (entry && entry >= bound) {
        slots[atomicAdd(&shared.count, 1u)] = entry;
      } else if (entry) {
        drop(entry);
      }
    }
  }

  // The k best of n: makes room for `put`, or is the final choice, which is complete behind a barrier. Before
  // it lies another.
  template <class Drop>
  __device__ void select(unsigned n, Drop&& drop) {
    if (n <= k) return;
    raise_bound(n);
    keep_best(n, drop);
  }

  // Sorts the first n slots by id, ascending (bitonic; steps within a warp by shuffles). A thread may read
  // its own afterwards, threadIdx.x and every kThreads-th from there; others behind a barrier.
  __device__ void sort_by_id(unsigned n) {
    unsigned size = 32;
    while (size < n) size *= 2;
    for (unsigned i = n + threadIdx.x; i < size; i += kThreads) slots[i] = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < size; i += kThreads) {
      u64 entry = slots[i];
      for (unsigned run = 2; run <= 32; run *= 2) entry = merge_in_warp(entry, i, run, run / 2);
      slots[i] = entry;
    }
    for (unsigned run = 64; run <= size; run *= 2) {
      for (unsigned apart = run / 2; apart >= 32; apart /= 2) {
        __syncthreads();
        for (unsigned p = threadIdx.x; p < size / 2; p += kThreads) exchange(p, run, apart);
      }
      __syncthreads();
      for (unsigned i = threadIdx.x; i < size; i += kThreads) slots[i] = merge_in_warp(slots[i], i, run, 16);
    }
  }

 private:
  // The word of an entry that is being looked at, if the entry is in range.
  __device__ __forceinline__ static bool in_range(u64 entry, bool among_ids, unsigned logit, unsigned least,
                                                  unsigned most, unsigned* word) {
    const auto high = static_cast<unsigned>(entry >> 32);
    *word = among_ids ? static_cast<unsigned>(entry) : high;
    return (!among_ids || high == logit) && *word >= least && *word <= most;
  }

  // The least and the largest word in range.
  __device__ void narrow(unsigned n, bool among_ids, unsigned logit, unsigned* least, unsigned* most) {
    unsigned low = kAll, high = 0, word;
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      if (in_range(slots[i], among_ids, logit, *least, *most, &word)) {
        low = min(low, word);
        high = max(high, word);
      }
    }
    low = __reduce_min_sync(kAll, low);
    high = __reduce_max_sync(kAll, high);
    if (threadIdx.x % 32 == 0) {
      atomicMin(&shared.least[round], low);
      atomicMax(&shared.most[round], high);
    }
    __syncthreads();
    *least = shared.least[round];
    *most = shared.most[round];
    const int before = round == 0 ? 2 : round - 1;
    if (threadIdx.x == 0) {
      shared.least[before] = kAll;
      shared.most[before] = 0;
    }
    round = round == 2 ? 0 : round + 1;
  }

  __device__ void count_digits(unsigned n, bool among_ids, unsigned logit, unsigned least, unsigned most,
                               int shift) {
    unsigned word;
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      if (in_range(slots[i], among_ids, logit, least, most, &word)) {
        atomicAdd(&shared.histogram[(word - least) >> shift], 1u);
      }
    }
    __syncthreads();
  }

  // The digit of the need-th largest: a scan from the largest digit down. Leaves the histogram empty.
  __device__ void find_digit(unsigned need) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, digit = kDigits - 1 - threadIdx.x;
    const unsigned own = shared.histogram[digit];
    shared.histogram[digit] = 0;
    unsigned up_to = own;
    for (unsigned o = 1; o < 32; o *= 2) {
      const unsigned other = __shfl_up_sync(kAll, up_to, o);
      if (lane >= o) up_to += other;
    }
    if (lane == 31) shared.warp_counts[warp] = up_to;
    __syncthreads();
    const unsigned before = lane < warp ? shared.warp_counts[lane % kWarps] : 0;
    up_to += __reduce_add_sync(kAll, before);
    if (up_to >= need && up_to - own < need) {
      shared.digit = digit;
      shared.above = up_to - own;
      shared.inside = own;
    }
    __syncthreads();
  }

  // Low words are complements of ids: descending in them is ascending in ids, and empty slots come last.
  __device__ __forceinline__ static bool before(u64 a, u64 b) {
    return static_cast<unsigned>(a) > static_cast<unsigned>(b);
  }

  __device__ __forceinline__ static u64 merge_in_warp(u64 entry, unsigned i, unsigned run, unsigned apart) {
    for (; apart; apart /= 2) {
      const u64 other = __shfl_xor_sync(kAll, entry, static_cast<int>(apart));
      const bool wants_first = ((i & apart) == 0) == ((i & run) == 0);
      if (before(entry, other) != wants_first) entry = other;
    }
    return entry;
  }

  __device__ __forceinline__ void exchange(unsigned pair, unsigned run, unsigned apart) {
    const unsigned i = 2 * pair - (pair & (apart - 1)), j = i + apart;
    const u64 a = slots[i], b = slots[j];
    if (before(a, b) != ((i & run) == 0)) {
      slots[i] = b;
      slots[j] = a;
    }
  }
};

}  // namespace kd

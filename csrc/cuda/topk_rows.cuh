// A block's share of a row: one sweep over the logits that collects candidates and sums up everything else.
#pragma once
#include "topk_block.cuh"
#include "topk_plan.h"

namespace kd {

// How stored numbers become logits: z = cap(u), u = scale * (x + bias). Entries are compared by u, which the
// soft cap leaves in order; kPlain: z = u = x.
template <class T, bool kPlain>
struct Head {
  static constexpr int kUnroll = kPlain ? 4 : 2;  // vectors at a time: what registers allow
  const float* bias;
  float scale, softcap;

  __device__ explicit Head(const kd_topk_arguments& a) : bias(a.bias), scale(a.scale), softcap(a.softcap) {}

  // u of a stored number.
  __device__ __forceinline__ float logit(float x, int id) const {
    if constexpr (kPlain) return x;
    return cappable(scale * (x + (bias ? __ldg(bias + id) : 0.0f)), softcap);
  }

  // u of a vector whose first number is token `id`.
  __device__ __forceinline__ void logits(const uint4& raw, int id, float (&u)[Vector<T>::kSize]) const {
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) u[e] = Vector<T>::get(raw, e);
    if constexpr (kPlain) return;
    if (bias) add_bias(bias + id, u);
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) u[e] = cappable(scale * u[e], softcap);
  }

  __device__ __forceinline__ float cap(float u) const { return kPlain ? u : capped(u, softcap); }

 private:
  static __device__ __forceinline__ void add_bias(const float* shift, float (&u)[Vector<T>::kSize]) {
    if (reinterpret_cast<uintptr_t>(shift) % 16 == 0) {
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; e += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(shift + e));
        u[e] += four.x, u[e + 1] += four.y, u[e + 2] += four.z, u[e + 3] += four.w;
      }
    } else {
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) u[e] += __ldg(shift + e);
    }
  }
};

// Entries [begin, end) of a row as vectors at 16-byte boundaries. A thread loads kUnroll vectors
// at a time. Each warp walks through kUnroll regions of
// its own, one region beside the other over the whole range: any stretch of time sees a sample of all of it.
// What lies before the first boundary and after the last whole vector are the edges, one entry a thread.
template <class T, int kUnroll>
struct Walk {
  static constexpr int kSize = Vector<T>::kSize, kRegions = kWarps * kUnroll;
  const T* row;
  int begin, end, body, vectors, steps;

  __device__ Walk(const void* logits, int64_t offset, int begin, int end)
      : row(static_cast<const T*>(logits) + offset), begin(begin), end(end) {
    const auto address = reinterpret_cast<uintptr_t>(row + begin);
    const int head = static_cast<int>((16 - address % 16) % 16 / sizeof(T));
    body = min(begin + head, end);
    vectors = (end - body) / kSize;
    steps = ((vectors + 31) / 32 + kRegions - 1) / kRegions;
  }

  // First token of this thread's u-th vector in a step; -1 if there is none.
  __device__ __forceinline__ int token(int step, int u) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int vector = ((u * kWarps + warp) * steps + step) * 32 + lane;
    return vector < vectors ? body + vector * kSize : -1;
  }

  __device__ __forceinline__ void load(int step, uint4 (&raw)[kUnroll]) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int id = token(step, u);
      if (id >= 0) raw[u] = __ldg(reinterpret_cast<const uint4*>(row + id));
    }
  }

  // This thread's entry of the edges; -1 if there is none.
  __device__ __forceinline__ int edge() const {
    const int i = static_cast<int>(threadIdx.x), head = body - begin, rest = body + vectors * kSize;
    const int id = i < head ? begin + i : rest + i - head;
    return id < end ? id : -1;
  }
};

// The sweep of `kd_topk_rows`.
template <class T, bool kPlain>
struct Sweep {
  static constexpr int kSize = Vector<T>::kSize, kUnroll = Head<T, kPlain>::kUnroll;
  Candidates& candidates;
  const Head<T, kPlain> head;
  const Walk<T, kUnroll> walk;
  const float exponent;
  ExpSum tail;

  __device__ Sweep(const kd_topk_arguments& a, Candidates& candidates, int64_t offset, int begin, int end)
      : candidates(candidates), head(a), walk(a.logits, offset, begin, end), exponent(a.exponent) {}

  __device__ void run() {
    const auto to_tail = [this](u64 entry) { drop(logit_of(entry)); };
    for (int step = 0; step < walk.steps; ++step) {
      uint4 raw[kUnroll];
      walk.load(step, raw);
      if (step == 0 && candidates.k <= kUnroll * kThreads / 2) first_bound(raw);
      unsigned left = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int id = walk.token(step, u);
        if (id >= 0) left |= look(raw[u], id) << (u * kSize);
      }
      while (candidates.any(left != 0)) {
        candidates.select(candidates.capacity, to_tail);
        left = retry(raw, step, left);
      }
    }
    const int id = walk.edge();
    if (id >= 0) {
      const float u = head.logit(Vector<T>::one(walk.row + id), id);
      const u64 entry = entry_of(u, id);
      if (u >= candidates.floor && entry >= candidates.bound) {
        candidates.put_last(entry);
      } else {
        drop(u);
      }
    }
    __syncthreads();
    candidates.select(candidates.shared.count, to_tail);
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void drop(float u) { tail.add(head.cap(u), exponent); }

  // k different entries are at least as large as the k-th largest of maxima over groups: a bound for the row
  // before anything is stored. A group, a vector or for a small k a thread's all, stands with its highest id.
  __device__ void first_bound(const uint4 (&raw)[kUnroll]) {
    const bool one = candidates.k <= kThreads / 4;
    float most = -CUDART_INF_F;
    int last = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int id = walk.token(0, u);
      if (id < 0) continue;
      float x[kSize];
      head.logits(raw[u], id, x);
      most = fmaxf(one ? most : -CUDART_INF_F, largest(x));
      last = id + kSize - 1;
      if (!one && most >= kLeastFloat) candidates.put(entry_of(most, last));
    }
    if (one && most >= kLeastFloat) candidates.put(entry_of(most, last));
    __syncthreads();
    const unsigned n = candidates.shared.count;
    if (n > candidates.k) candidates.raise_bound(n);
    __syncthreads();
    if (threadIdx.x == 0) candidates.shared.count = 0;
    __syncthreads();
  }

  // Stores what reaches the bound and sums up the rest. Bits of the entries for which there was no room.
  __device__ __forceinline__ unsigned look(const uint4& raw, int id) {
    float x[kSize];
    head.logits(raw, id, x);
    float most = largest(x);
    unsigned left = 0;
    if (most >= candidates.floor) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (x[e] >= candidates.floor) {
          const u64 entry = entry_of(x[e], id + e);
          if (entry >= candidates.bound) {
            if (!candidates.put(entry)) left |= 1u << e;
            x[e] = -CUDART_INF_F;
          }
        }
      }
      most = largest(x);
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) x[e] = head.cap(x[e]);
    tail.add(x, head.cap(most), exponent);
    return left;
  }

  // The entries without room once more, under a higher bound.
  __device__ unsigned retry(const uint4 (&raw)[kUnroll], int step, unsigned left) {
    unsigned still = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if ((left >> (u * kSize) & ((1u << kSize) - 1)) == 0) continue;
      const int id = walk.token(step, u);
      uint4 again = raw[u];  // opaque, lest all of this be computed ahead of need, for every vector
      asm volatile("" : "+r"(again.x), "+r"(again.y), "+r"(again.z), "+r"(again.w));
      float x[kSize];
      head.logits(again, id, x);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const unsigned bit = 1u << (u * kSize + e);
        if (!(left & bit)) continue;
        const u64 entry = entry_of(x[e], id + e);
        if (entry < candidates.bound) {
          drop(x[e]);
        } else if (!candidates.put(entry)) {
          still |= bit;
        }
      }
    }
    return still;
  }
};

// Writes a row's answer from its candidates (at most k of them left) and the sum over everything else.
__device__ inline void finish_row(const kd_topk_arguments& a, int64_t row, Candidates& candidates,
                                  const ExpSum& tail) {
  BlockShared& shared = candidates.shared;
  const unsigned k = static_cast<unsigned>(a.k), n = candidates.shared.count;
  candidates.sort_by_id(n);
  float most = -CUDART_INF_F;
  for (unsigned i = threadIdx.x; i < n; i += kThreads) most = fmaxf(most, logit_of(candidates.slots[i]));
  const float2 largest = block_reduce(make_float2(most, tail.reference), shared.numbers[0], true);
  const float top = capped(largest.x, a.softcap), reference = largest.y;
  float kept = 0;
  for (unsigned i = threadIdx.x; i < n; i += kThreads) {
    kept += exp2_of((capped(logit_of(candidates.slots[i]), a.softcap) - top) * a.exponent);
  }
  const float own = tail.sum * exp2_of((tail.reference - reference) * a.exponent);
  const float2 sums = block_reduce(make_float2(kept, own), shared.numbers[1], false);
  const float total = sums.x + sums.y * exp2_of((reference - top) * a.exponent);
  // NaN, +inf and nothing finite: NaN and no ids, as nothing here waits for the host to raise an error.
  const bool bad = !(largest.x < CUDART_INF_F) || n == 0 || !(total < CUDART_INF_F);
  const float log_sum = bad ? CUDART_NAN_F : logf(total);
  const auto log_prob = [&](float z) { return (z - top) * a.inverse_temperature - log_sum; };
  if (threadIdx.x == 0) {
    a.log_tail[row] = bad ? CUDART_NAN_F : log_prob(reference) + logf(sums.y);
    if (a.state) {
      float* state = a.state + row * 4;
      state[0] = top, state[1] = log_sum, state[2] = reference, state[3] = bad ? 0 : static_cast<float>(n);
    }
  }
  for (unsigned i = threadIdx.x; i < k; i += kThreads) {
    const bool there = i < n && !bad;
    const float u = i < n ? logit_of(candidates.slots[i]) : -CUDART_INF_F;
    a.ids[row * a.k + i] = there ? id_of(candidates.slots[i]) : -1;
    a.log_probs[row * a.k + i] = bad ? CUDART_NAN_F : there ? log_prob(capped(u, a.softcap)) : -CUDART_INF_F;
    if (a.kept) a.kept[row * a.k + i] = u;
  }
  if (a.least) {  // exact, unlike the bound: another block may have dropped entries between the two
    u64 least = ~0ull;
    for (unsigned i = threadIdx.x; i < n; i += kThreads) least = min(least, candidates.slots[i]);
    least = block_least(least, shared.entries);
    if (threadIdx.x == 0) a.least[row] = least;
  }
}

}  // namespace kd

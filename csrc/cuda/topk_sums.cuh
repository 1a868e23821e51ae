// The second sweep, only for entropy and other temperatures: with the selection known, sums over the rest of
// the row.
#pragma once
#include "topk_rows.cuh"

namespace kd {

constexpr int kSums = KD_TOPK_SUMS;

// x exp(x) is 0 from here down, also where x is -inf.
__device__ __forceinline__ float not_infinite(float x) { return fmaxf(x, -1e20f); }

// What a row's first sweep has left in `kd_topk_arguments::state`.
struct RowState {
  float top, log_sum, reference, kept;

  __device__ explicit RowState(const float* state)
      : top(state[0]), log_sum(state[1]), reference(state[2]), kept(state[3]) {}
};

// Sums over the entries that are not kept: of exp((z - reference) / T) for each temperature, and of that
// times (z - reference) / T for the first.
struct TailSums {
  float sums[kSums] = {}, weighted = 0;

  __device__ __forceinline__ void add(const kd_topk_arguments& a, float away) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      if (j >= a.temperatures) break;
      const float weight = exp2_of(away * a.exponents[j]);
      sums[j] += weight;
      if (j == 0) weighted += weight * not_infinite(away * a.inverses[0]);
    }
  }
};

template <class T, bool kPlain>
__device__ void sum_tail(const kd_topk_arguments& a, BlockShared& shared) {
  const int64_t row = blockIdx.x, split = blockIdx.y;
  const int begin = static_cast<int>(split * a.sum_segment);
  const int end = static_cast<int>(min(static_cast<int64_t>(begin) + a.sum_segment, int64_t{a.vocab}));
  constexpr int kUnroll = Head<T, kPlain>::kUnroll;
  const Walk<T, kUnroll> walk(a.logits, row * a.row_stride, begin, end);
  const Head<T, kPlain> head(a);
  const RowState state(a.state + row * 4);
  const u64 least = a.least[row];
  const float floor = logit_of(least);
  TailSums tail;
  const auto add = [&](float u, int id) {
    const bool kept = u > floor || (u == floor && entry_of(u, id) >= least);
    if (!kept) tail.add(a, head.cap(u) - state.reference);
  };
  for (int step = 0; step < walk.steps; ++step) {
    uint4 raw[kUnroll];
    walk.load(step, raw);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int id = walk.token(step, u);
      if (id < 0) continue;
      float x[Vector<T>::kSize];
      head.logits(raw[u], id, x);
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) add(x[e], id + e);
    }
  }
  const int id = walk.edge();
  if (id >= 0) add(head.logit(Vector<T>::one(walk.row + id), id), id);
  float* out = a.sums + (row * a.sum_splits + split) * (kSums + 1);
  static_assert(kSums == 4, "two by two");
  const float2 first = block_reduce(make_float2(tail.sums[0], tail.sums[1]), shared.numbers[0], false);
  const float2 second = block_reduce(make_float2(tail.sums[2], tail.sums[3]), shared.numbers[1], false);
  const float2 third = block_reduce(make_float2(tail.weighted, 0), shared.numbers[0], false);
  if (threadIdx.x == 0) {
    out[0] = first.x, out[1] = first.y, out[2] = second.x, out[3] = second.y, out[4] = third.x;
  }
}

// Entropy and log tail mass of a row from the sums of its blocks and its kept entries.
__device__ inline void finish_sums(const kd_topk_arguments& a, BlockShared& shared) {
  const int64_t row = blockIdx.x;
  const RowState state(a.state + row * 4);
  const float* parts = a.sums + row * a.sum_splits * (kSums + 1);
  const float* kept = a.kept + row * a.k;
  const int n = static_cast<int>(state.kept), splits = a.sum_splits;
  const float below = state.reference - state.top;
  for (int j = 0; j < a.temperatures; ++j) {
    float2 sums = make_float2(0, 0), weighted = make_float2(0, 0);  // of the tail, of the kept
    for (int i = threadIdx.x; i < splits; i += kThreads) {
      sums.x += parts[i * (kSums + 1) + j];
      weighted.x += parts[i * (kSums + 1) + kSums];
    }
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const float away = capped(kept[i], a.softcap) - state.top;
      const float weight = exp2_of(away * a.exponents[j]);
      sums.y += weight;
      weighted.y += weight * not_infinite(away * a.inverses[j]);
    }
    sums = block_reduce(sums, shared.numbers[0], false);
    weighted = block_reduce(weighted, shared.numbers[1], false);
    const float factor = exp2_of(below * a.exponents[j]), shift = below * a.inverses[j];
    const float log_total = logf(sums.y + sums.x * factor);
    if (threadIdx.x != 0) continue;
    if (a.outputs[j]) {
      a.outputs[j][row * a.output_stride] = n == 0 ? CUDART_NAN_F : shift + logf(sums.x) - log_total;
    }
    if (j == 0 && a.entropy) {
      const float tail = sums.x > 0 ? factor * (weighted.x + not_infinite(shift) * sums.x) : 0.0f;
      const float mean = (weighted.y + tail) / (sums.y + sums.x * factor);
      a.entropy[row] = n == 0 ? CUDART_NAN_F : log_total - mean;
    }
  }
}

}  // namespace kd

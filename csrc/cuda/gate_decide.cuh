// The second sweep: the divergence of both sides. The last block of a row to end decides who speaks and finds
// the token among the masses that the first sweep has left.
#pragma once
#include "gate_pick.cuh"

namespace kd {
namespace gate {

constexpr int kStrips = static_cast<int>(kMostShare / 32);

struct DecideShared {
  float4 norms[kBlockWarps];
  float sums[kBlockWarps];
  double parts[kBlockWarps];
  ScanShared<kBlockWarps> scan;
  u64 strips[kStrips];  // masses of 32 neighbours each
  u64 before;           // the mass before what was found
  int found, last;
  int least[2][kBlockWarps];
};

// log2(x) within 2^-22 for x in [1, 2].
__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// p log2(p / m) + q log2(q / m), m = (p + q) / 2, from a = log2(p) and b = log2(q); -inf is a mass of 0.
//
// With d = |a - b| and e = 2^-d it is max(p, q) ((1 + e) (1 - log2(1 + e)) - e d). Where d < 1/2 these terms
// cancel, and a series in d^2 stands for them, of g(r) = (1 + r) ln(1 + r) + (1 - r) ln(1 - r) at r = tanh(d
// ln 2 / 2); its first term left out is 4e-8 of it. Errors are 2^-21 of p + q at most, and equal logits give
// 0.
__device__ __forceinline__ float divergence(float a, float b) {
  const float d = fminf(fabsf(a - b), 128.0f);  // where both are -inf, NaN, which min drops
  const float most = exp2_of(fmaxf(a, b)), e = exp2_of(-d), sum = 1.0f + e, w = d * d;
  const float series =
      fmaf(fmaf(fmaf(-1.4180276e-5f, w, 2.7778246e-4f), w, -5.2035102e-3f), w, 8.6643398e-2f);
  const float direct = fmaf(-e, d, sum * (1.0f - log2_of(sum)));
  return most * (d < 0.5f ? sum * w * series : direct);
}

// Both sides' distributions over the whole row: log2 of a probability is (z - top) log2(e) - log_sum.
struct Norms {
  static constexpr float kNatural = 1.4426950408889634f;
  ExpSum student, teacher;
  float log_s, log_t;

  __device__ Norms(const kd_gate_arguments& a, DecideShared& shared, int64_t row) {
    const auto* blocks = reinterpret_cast<const float4*>(a.norms) + row * a.splits;
    for (int i = static_cast<int>(threadIdx.x); i < a.splits; i += kBlockThreads) add(__ldcg(blocks + i));
    merge_lanes(student, kNatural);
    merge_lanes(teacher, kNatural);
    if (lane_of() == 0) {
      shared.norms[warp_of()] = make_float4(student.reference, student.sum, teacher.reference, teacher.sum);
    }
    __syncthreads();
    student = teacher = ExpSum{};
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) add(shared.norms[w]);
    log_s = log2f(student.sum);
    log_t = log2f(teacher.sum);
  }

  __device__ __forceinline__ float divergence_of(float zs, float zt) const {
    return divergence(fmaf(zs - student.reference, kNatural, -log_s),
                      fmaf(zt - teacher.reference, kNatural, -log_t));
  }

  // Neither NaN nor +inf on either side, nor nothing but -inf.
  __device__ __forceinline__ bool exist() const {
    return student.sum > 0 && student.sum < CUDART_INF_F && teacher.sum > 0 && teacher.sum < CUDART_INF_F;
  }

 private:
  __device__ __forceinline__ void add(const float4& part) {
    student.add(ExpSum{part.x, part.y}, kNatural);
    teacher.add(ExpSum{part.z, part.w}, kNatural);
  }
};

// The first sweep's warps of one side of a row: largest logit and mass of each.
struct Records {
  const float2* records;
  int count;
  float top, exponent;

  __device__ Records(const kd_gate_arguments& a, int64_t row, bool teacher, float top)
      : records(reinterpret_cast<const float2*>(a.masses) + row * a.splits * kBlockWarps * 2 + teacher),
        count(a.splits * kBlockWarps),
        top(top),
        exponent(a.exponent) {}

  __device__ __forceinline__ float2 at(int i) const { return __ldcg(records + 2 * i); }
  __device__ __forceinline__ u64 mass(int i) const {
    const float2 record = at(i);
    return mass_of(record.x, top, exponent, record.y);
  }
};

// What the last block of a row does.
template <class Side>
struct Speaker {
  const kd_gate_arguments& a;
  DecideShared& shared;
  const Side side;
  const Records records;
  const Pair<Side> pair;

  __device__ Speaker(const kd_gate_arguments& a, DecideShared& shared, int64_t row, bool teacher, float top)
      : a(a), shared(shared), side(a.sides[teacher], row), records(a, row, teacher, top), pair(a, row) {}

  // The lowest id among the largest logits.
  __device__ int largest() {
    int first = records.count;
    for (int i = static_cast<int>(threadIdx.x); i < records.count; i += kBlockThreads) {
      const float2 record = records.at(i);
      if (record.x >= records.top && record.y > 0) first = min(first, i);
    }
    return first_equal(least(first, shared.least[0]), records.top);
  }

  __device__ int drawn(double u) {
    const int each = (records.count + kBlockThreads - 1) / kBlockThreads;
    const int begin = static_cast<int>(threadIdx.x) * each, end = min(begin + each, records.count);
    u64 own = 0, total;
    for (int i = begin; i < end; ++i) own += records.mass(i);
    u64 upto = block_scan(own, shared.scan, &total);
    u64 target = target_of(u, total);
    if (upto > target && upto - own <= target) {
      upto -= own;
      int i = begin;
      for (u64 mass; (mass = records.mass(i)) <= target - upto; ++i) upto += mass;
      shared.found = i, shared.before = upto;
    }
    __syncthreads();
    return within(shared.found, target - shared.before);
  }

 private:
  __device__ int least(int x, int (&warps)[kBlockWarps]) {
    x = __reduce_min_sync(kAll, x);
    if (lane_of() == 0) warps[warp_of()] = x;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) x = min(x, warps[w]);
    return x;
  }

  __device__ int first_equal(int number, float z) {
    const Stretch s = pair.stretch(a, number);
    int first = 0x7fffffff;
    for (int id = s.begin + static_cast<int>(threadIdx.x); id < s.end; id += kBlockThreads) {
      if (side.one(id) >= z) first = min(first, id);
    }
    return least(first, shared.least[1]);
  }

  __device__ __forceinline__ u64 mass(int id, int end) const {
    return id < end ? mass_of(side.one(id), records.top, records.exponent) : 0;
  }

  // The entry of a warp's part of the row at which the cumulative mass exceeds the target.
  __device__ int within(int number, u64 target) {
    const Stretch s = pair.stretch(a, number);
    const int strips = (s.end - s.begin + 31) / 32;
    for (int i = warp_of(); i < strips; i += kBlockWarps) {
      const u64 sum = warp_sum(mass(s.begin + i * 32 + lane_of(), s.end));
      if (lane_of() == 0) shared.strips[i] = sum;
    }
    __syncthreads();
    constexpr int kEach = kStrips / kBlockThreads;
    const int begin = static_cast<int>(threadIdx.x) * kEach;
    u64 own = 0, total;
    for (int i = begin; i < min(begin + kEach, strips); ++i) own += shared.strips[i];
    u64 upto = block_scan(own, shared.scan, &total);
    if (total == 0) return first_equal(number, records.at(number).x);  // each of them rounds to none
    target = min(target, total - 1);  // the first sweep's sum may be larger by rounding
    if (upto > target && upto - own <= target) {
      upto -= own;
      int i = begin;
      for (; shared.strips[i] <= target - upto; ++i) upto += shared.strips[i];
      shared.found = i, shared.before = upto;
    }
    __syncthreads();
    const int first = s.begin + shared.found * 32;
    const u64 sum = warp_scan(mass(first + lane_of(), s.end));
    return first + __ffs(static_cast<int>(__ballot_sync(kAll, sum > target - shared.before))) - 1;
  }
};

// Everything about a row whose blocks have all written their parts.
template <class Side>
__device__ void decide(const kd_gate_arguments& a, DecideShared& shared, int64_t row, const Norms& norms) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < a.splits; i += kBlockThreads) {
    sum += static_cast<double>(__ldcg(a.parts + row * a.splits + i));
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(kAll, sum, o);
  if (lane_of() == 0) shared.parts[warp_of()] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) sum += shared.parts[w];
  const double threshold = a.threshold[row];
  const bool exist = norms.exist() && threshold == threshold;
  const float jsd = fminf(fmaxf(static_cast<float>(0.5 * sum), 0.0f), 1.0f);
  const bool teacher = exist && static_cast<double>(jsd) > threshold;
  const float top = teacher ? norms.teacher.reference : norms.student.reference;
  int token = -1;
  if (exist && !a.filtered) {
    Speaker<Side> speaker(a, shared, row, teacher, top);
    if (a.greedy) {
      token = speaker.largest();
    } else {
      const double u = a.uniforms[row];
      if (u >= 0 && u < 1) token = speaker.drawn(u);
    }
  }
  if (threadIdx.x != 0) return;
  a.jsd[row] = exist ? jsd : CUDART_NAN_F;
  a.from_teacher[row] = teacher;
  a.token[row] = token;
  a.tops[row] = exist ? top : CUDART_NAN_F;
}

template <class Side>
__device__ __forceinline__ void compare(const kd_gate_arguments& a, DecideShared& shared, int64_t row,
                                        int split) {
  const Norms norms(a, shared, row);
  const Pair<Side> pair(a, row);
  constexpr int kVector = Side::kVector;
  float sum = 0;
  pair.walk(pair.stretch(a, split * kBlockWarps + warp_of()),
            [&](const float (&zs)[kVector], const float (&zt)[kVector]) {
#pragma unroll
              for (int e = 0; e < kVector; ++e) sum += norms.divergence_of(zs[e], zt[e]);
            });
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(kAll, sum, o);
  if (lane_of() == 0) shared.sums[warp_of()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) sum += shared.sums[w];
    a.parts[row * a.splits + split] = sum;
    __threadfence();  // the part before the count
    shared.last = atomicAdd(&a.arrived[row], 1u) + 1 == static_cast<unsigned>(a.splits);
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();  // the count before the parts
  decide<Side>(a, shared, row, norms);
}

}  // namespace gate
}  // namespace kd

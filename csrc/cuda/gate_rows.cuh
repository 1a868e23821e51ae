// Rows of two models on the device: how stored numbers become logits, how warps walk over a row, and the
// first sweep, which sums up both sides.
#pragma once
#include "gate_plan.h"
#include "numbers.cuh"

namespace kd {
namespace gate {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / 32; }

// Logits as they are stored.
template <class T>
struct PlainSide {
  static constexpr int kVector = Vector<T>::kSize;
  const T* row;

  __device__ PlainSide(const kd_gate_side& side, int64_t r)
      : row(static_cast<const T*>(side.data) + r * side.row_stride) {}

  // Entries by which the row begins behind a boundary between vectors.
  __device__ __forceinline__ int shift() const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  }
  __device__ __forceinline__ uint4 load(int id) const {
    return __ldg(reinterpret_cast<const uint4*>(row + id));
  }
  __device__ __forceinline__ void logits(const uint4& raw, int, float (&z)[kVector]) const {
#pragma unroll
    for (int e = 0; e < kVector; ++e) z[e] = Vector<T>::get(raw, e);
  }
  __device__ __forceinline__ float one(int id) const { return Vector<T>::one(row + id); }
};

// Logits of any dtype, with or without a head's bias, scale and soft cap: z = cap(scale * (x + bias)).
struct AnySide {
  static constexpr int kVector = 4;
  const char* row;
  const float* bias;
  float scale, softcap;
  int dtype, size;

  __device__ AnySide(const kd_gate_side& side, int64_t r)
      : bias(side.bias),
        scale(side.scale),
        softcap(side.softcap),
        dtype(side.dtype),
        size(side.dtype == KD_F32 ? 4 : 2) {
    row = static_cast<const char*>(side.data) + r * side.row_stride * size;
  }

  __device__ __forceinline__ int shift() const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % (4 * size) / size);
  }
  __device__ __forceinline__ uint4 load(int id) const {
    if (dtype == KD_F32) return __ldg(reinterpret_cast<const uint4*>(row + int64_t{4} * id));
    const uint2 half = __ldg(reinterpret_cast<const uint2*>(row + int64_t{2} * id));
    return make_uint4(half.x, half.y, 0, 0);
  }
  __device__ __forceinline__ void logits(const uint4& raw, int id, float (&z)[kVector]) const {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float x = dtype == KD_F32   ? Vector<float>::get(raw, e)
                      : dtype == KD_F16 ? Vector<__half>::get(raw, e)
                                        : Vector<__nv_bfloat16>::get(raw, e);
      z[e] = capped_logit(x, id + e);
    }
  }
  __device__ __forceinline__ float one(int id) const {
    const float x = dtype == KD_F32 ? Vector<float>::one(reinterpret_cast<const float*>(row) + id)
                    : dtype == KD_F16
                        ? Vector<__half>::one(reinterpret_cast<const __half*>(row) + id)
                        : Vector<__nv_bfloat16>::one(reinterpret_cast<const __nv_bfloat16*>(row) + id);
    return capped_logit(x, id);
  }

 private:
  __device__ __forceinline__ float capped_logit(float x, int id) const {
    return capped(cappable(scale * (x + (bias ? __ldg(bias + id) : 0.0f)), softcap), softcap);
  }
};

// The entries of one warp: [begin, end), which begins and ends at a boundary between vectors but for the ends
// of the row. Sides whose vectors do not lie side by side are read entry by entry.
struct Stretch {
  int begin, end;
  bool aligned;

  __device__ Stretch(int shift, bool aligned, int64_t number, int share, int vocab) : aligned(aligned) {
    const int64_t first = number * share - (aligned ? shift : 0);
    begin = static_cast<int>(min(max(first, int64_t{0}), int64_t{vocab}));
    end = static_cast<int>(min(max(first + share, int64_t{0}), int64_t{vocab}));
  }
};

// Both sides of a row.
template <class Side>
struct Pair {
  static constexpr int kVector = Side::kVector, kGroup = 32 * kVector;  // entries that a warp reads at a time
  const Side student, teacher;

  __device__ Pair(const kd_gate_arguments& a, int64_t row)
      : student(a.sides[0], row), teacher(a.sides[1], row) {}

  __device__ __forceinline__ Stretch stretch(const kd_gate_arguments& a, int64_t number) const {
    return Stretch(student.shift(), student.shift() == teacher.shift(), number, a.share, a.vocab);
  }

  // look(zs, zt) for all entries of a warp, kVector at a time; -inf stands where there are none.
  template <class Look>
  __device__ __forceinline__ void walk(const Stretch& s, const Look& look) const {
    int from = s.begin;
    if (s.aligned) {
      const int edge = (kVector - (from + student.shift()) % kVector) % kVector;
      if (edge) from = scattered(from, min(from + edge, s.end), look);
      for (; from + 2 * kGroup <= s.end; from += 2 * kGroup) whole<2>(from, look);
      for (; from + kGroup <= s.end; from += kGroup) whole<1>(from, look);
    }
    scattered(from, s.end, look);
  }

 private:
  template <int kUnroll, class Look>
  __device__ __forceinline__ void whole(int from, const Look& look) const {
    uint4 raw_s[kUnroll], raw_t[kUnroll];
    const int id = from + lane_of() * kVector;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      raw_s[u] = student.load(id + u * kGroup);
      raw_t[u] = teacher.load(id + u * kGroup);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float zs[kVector], zt[kVector];
      student.logits(raw_s[u], id + u * kGroup, zs);
      teacher.logits(raw_t[u], id + u * kGroup, zt);
      look(zs, zt);
    }
  }

  template <class Look>
  __device__ __forceinline__ int scattered(int from, int end, const Look& look) const {
#pragma unroll 1
    for (; from < end; from += kGroup) {
      float zs[kVector], zt[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int id = from + e * 32 + lane_of();
        zs[e] = id < end ? student.one(id) : -CUDART_INF_F;
        zt[e] = id < end ? teacher.one(id) : -CUDART_INF_F;
      }
      look(zs, zt);
    }
    return end;
  }
};

// The sum of a warp's lanes, in every lane.
__device__ __forceinline__ void merge_lanes(ExpSum& sum, float exponent) {
  float top = sum.reference;
  for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(kAll, top, o));
  sum.refer_to(top, exponent);
  for (int o = 16; o; o >>= 1) sum.sum += __shfl_xor_sync(kAll, sum.sum, o);
}

struct NormsShared {
  float4 warps[kBlockWarps];
};

// The first sweep over a block's part of a row: largest logits and sums of exponentials.
template <class Side>
__device__ __forceinline__ void sum_up(const kd_gate_arguments& a, NormsShared& shared, int64_t row,
                                       int split) {
  constexpr float kNatural = 1.4426950408889634f;
  constexpr int kVector = Side::kVector;
  const Pair<Side> pair(a, row);
  const int number = split * kBlockWarps + warp_of();
  ExpSum student, teacher, hot_student, hot_teacher;
  pair.walk(pair.stretch(a, number), [&](const float (&zs)[kVector], const float (&zt)[kVector]) {
    const float top_s = largest(zs), top_t = largest(zt);
    student.add(zs, top_s, kNatural);
    teacher.add(zt, top_t, kNatural);
    if (a.hot) {
      hot_student.add(zs, top_s, a.exponent);
      hot_teacher.add(zt, top_t, a.exponent);
    }
  });
  merge_lanes(student, kNatural);
  merge_lanes(teacher, kNatural);
  if (a.hot) {
    merge_lanes(hot_student, a.exponent);
    merge_lanes(hot_teacher, a.exponent);
  }
  const int64_t block = row * a.splits + split;
  if (lane_of() == 0) {
    shared.warps[warp_of()] = make_float4(student.reference, student.sum, teacher.reference, teacher.sum);
    const float s = a.hot ? hot_student.sum : student.sum, t = a.hot ? hot_teacher.sum : teacher.sum;
    reinterpret_cast<float4*>(a.masses)[block * kBlockWarps + warp_of()] =
        make_float4(student.reference, s, teacher.reference, t);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int w = 1; w < kBlockWarps; ++w) {
    const float4 other = shared.warps[w];
    student.add(ExpSum{other.x, other.y}, kNatural);
    teacher.add(ExpSum{other.z, other.w}, kNatural);
  }
  reinterpret_cast<float4*>(a.norms)[block] =
      make_float4(student.reference, student.sum, teacher.reference, teacher.sum);
  if (split == 0) a.arrived[row] = 0;
}

}  // namespace gate
}  // namespace kd

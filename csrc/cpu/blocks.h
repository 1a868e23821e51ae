// Blocks of a row: stored numbers (with bias, scale, soft-cap) to logits in L1, and gradients back.
#pragma once
#include "../kernels.h"
#include "types.h"

namespace KD_NS {

// Elements of a block: three of them as floats (12 KiB) and the block's own stream fit a 32 KiB L1, and what
// is done once a block (merging lanes, checking ranges) is 1 % of its time.
constexpr int kBlock = 1024;
constexpr int kStep = 2 * kWidth;  // what load2 takes

KD_INLINE int whole_steps(int n) { return (n + kStep - 1) / kStep * kStep; }

// One side's rows and how they become logits.
struct Source {
  const char* data;
  int64_t stride;  // bytes
  const float* bias;
  float scale, cap;
  kd_dtype dtype;
  bool plain;  // the stored numbers are the logits

  const char* row(int64_t r) const { return data + r * stride; }
};

inline int64_t size_of(kd_dtype t) { return t == KD_F32 ? 4 : t == KD_F64 ? 8 : 2; }

inline Source source_of(const kd_side& s, kd_dtype dtype) {
  Source out;
  out.data = (const char*)s.data;
  out.stride = s.row_stride * size_of(dtype);
  out.bias = (const float*)s.bias;
  out.scale = (float)s.scale;
  out.cap = s.softcap > 0 ? (float)s.softcap : 0.0f;
  out.dtype = dtype;
  out.plain = !s.bias && s.scale == 1.0 && out.cap == 0.0f;
  return out;
}

template <class X>
KD_NOINLINE void to_floats(const void* from, float* to, int n) {
  const typename X::stored* p = (const typename X::stored*)from;
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) X::load(p + i).store(to + i);
  if (i == n) return;
  typename X::stored rest[kWidth];  // the last number repeats: harmless to a maximum, masked out of sums
  for (int k = 0; k < kWidth; ++k) rest[k] = p[i + k < n ? i + k : n - 1];
  X::load(rest).store(to + i);
}

template <class X>
KD_NOINLINE void from_floats(const float* from, void* to, int n) {
  typename X::stored* p = (typename X::stored*)to;
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) X::store(p + i, vf::load(from + i));
  if (i == n) return;
  typename X::stored rest[kWidth];
  X::store(rest, vf::load(from + i));
  memcpy(p + i, rest, (n - i) * sizeof(rest[0]));
}

KD_NOINLINE inline void to_logits(const Source& s, int64_t first, float* x, int n) {
  const float* bias = s.bias ? s.bias + first : nullptr;
  for (int i = 0; i < n; ++i) x[i] = s.scale * (bias ? x[i] + bias[i] : x[i]);
  if (s.cap == 0.0f) return;
  const vf cap = vf::all(s.cap), inverse = vf::all(1.0f / s.cap);
  for (int i = 0; i < n; i += kWidth) {
    const vf u = vf::load(x + i) * inverse;
    (cap * vf{tanh_full(u.v)}).store(x + i);
  }
}

// Logits first .. first + n - 1 of a row as floats in `to` (kBlock floats). Copies of the last one fill whole
// steps.
inline void stage(const Source& s, const char* row, int64_t first, int n, float* to) {
  const char* from = row + first * size_of(s.dtype);
  if (s.dtype == KD_F32) {
    to_floats<f32>(from, to, n);
  } else if (s.dtype == KD_F16) {
    to_floats<f16>(from, to, n);
  } else {
    to_floats<bf16>(from, to, n);
  }
  if (!s.plain) to_logits(s, first, to, n);
  for (int i = n; i % kStep; ++i) to[i] = to[n - 1];
}

inline void store_block(kd_dtype dtype, const float* from, char* row, int64_t first, int n) {
  char* to = row + first * size_of(dtype);
  if (dtype == KD_F32) {
    from_floats<f32>(from, to, n);
  } else if (dtype == KD_F16) {
    from_floats<f16>(from, to, n);
  } else {
    from_floats<bf16>(from, to, n);
  }
}

// d loss / d logit to d loss / d stored number: z = cap * tanh(scale * (x + bias) / cap).
KD_NOINLINE inline void chain_rule(const Source& s, const float* z, float* gradient, int n) {
  if (s.cap == 0.0f) {  // by itself: below, a masked logit would make 0 * inf
    for (int i = 0; i < n; ++i) gradient[i] *= s.scale;
    return;
  }
  const float over = 1.0f / s.cap;
  for (int i = 0; i < n; ++i) {
    const float t = z[i] * over;
    gradient[i] *= s.scale * (1.0f - t * t);
  }
}

}  // namespace KD_NS

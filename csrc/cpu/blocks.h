// Blocks of a row: stored numbers (fp32, fp16, bf16; bias, scale, soft-cap) to floats in L1, and gradients
// back.
//
// Everything else in this folder sees floats only. A block is kBlock floats: two of them and a gradient block
// (12 KiB) live beside the stream in a 32 KiB L1.
#pragma once
#include "../kernels.h"
#include "functions.h"

namespace KD_NS {

constexpr int kBlock = 1024;

KD_INLINE native load_bf16(const uint16_t* p) {
#if KD_LEVEL == KD_IS_avx512
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif KD_LEVEL == KD_IS_avx2
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
  return (native)(native_int{p[0], p[1], p[2], p[3]} << 16);
#endif
}

// Round to nearest even; a NaN keeps its sign and becomes quiet.
KD_INLINE void store_bf16(uint16_t* p, native x) {
#if KD_LEVEL == KD_IS_avx512
  const __m512i bits = n_bits(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
#elif KD_LEVEL == KD_IS_avx2
  const __m256i bits = n_bits(x), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i best = n_bits(n_select(n_eq(x, x), n_from_bits(up), n_from_bits(quiet)));
  const __m256i high = _mm256_srli_epi32(best, 16);
  _mm_storeu_si128((__m128i*)p,
                   _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
#else
  const native_int bits = n_bits(x), up = bits + 0x7fff + ((bits >> 16) & 1);
  const native_int best = n_bits(n_select(n_eq(x, x), n_from_bits(up), n_from_bits(bits | 0x400000)));
  for (int i = 0; i < kWidth; ++i) p[i] = (uint16_t)((uint32_t)best[i] >> 16);
#endif
}

#if KD_LEVEL == KD_IS_baseline
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
  uint32_t bits = rest + 0x38000000u;            // the exponent's bias moves from 15 to 127
  if (rest >= 0x0f800000u) bits += 0x38000000u;  // infinity and NaN
  float x;
  memcpy(&x, &bits, 4);
  if (rest < 0x00800000u) x = (float)(int)(h & 0x7fff) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
  memcpy(&bits, &x, 4);
  bits |= sign;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((bits >> 13) & 0x3ff));
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // 65520 and above round to infinity
  if (bits < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to units of 2^-24
    float y;
    memcpy(&y, &bits, 4);
    y += 0.5f;
    memcpy(&bits, &y, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  return (uint16_t)(sign | ((bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13));
}
#endif

KD_INLINE native load_f16(const uint16_t* p) {
#if KD_LEVEL == KD_IS_avx512
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif KD_LEVEL == KD_IS_avx2
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return native{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
#endif
}

KD_INLINE void store_f16(uint16_t* p, native x) {
#if KD_LEVEL == KD_IS_avx512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif KD_LEVEL == KD_IS_avx2
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = float_to_half(x[i]);
#endif
}

// The stored types: how a vector of them is read and written.
struct f32 {
  typedef float stored;
  KD_INLINE static vf load(const float* p) { return vf::load(p); }
  KD_INLINE static void store(float* p, vf x) { x.store(p); }
  KD_INLINE static void load2(const float* p, vf* x) {
    x[0] = vf::load(p);
    x[1] = vf::load(p + kWidth);
  }
  KD_INLINE static void store2(float* p, const vf* x) {
    x[0].store(p);
    x[1].store(p + kWidth);
  }
};
struct f16 {
  typedef uint16_t stored;
  KD_INLINE static vf load(const uint16_t* p) { return {load_f16(p)}; }
  KD_INLINE static void store(uint16_t* p, vf x) { store_f16(p, x.v); }
  KD_INLINE static void load2(const uint16_t* p, vf* x) {
    x[0] = load(p);
    x[1] = load(p + kWidth);
  }
  KD_INLINE static void store2(uint16_t* p, const vf* x) {
    store(p, x[0]);
    store(p + kWidth, x[1]);
  }
};
struct bf16 {
  typedef uint16_t stored;
  KD_INLINE static vf load(const uint16_t* p) { return {load_bf16(p)}; }
  KD_INLINE static void store(uint16_t* p, vf x) { store_bf16(p, x.v); }
  // AVX-512 takes a pair apart into its even and odd entries, which costs a shift and a mask for 32 numbers.
  KD_INLINE static void load2(const uint16_t* p, vf* x) {
#if KD_LEVEL == KD_IS_avx512
    const __m512i v = _mm512_loadu_si512(p);
    x[0] = {n_from_bits(_mm512_slli_epi32(v, 16))};
    x[1] = {n_from_bits(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)))};
#else
    x[0] = load(p);
    x[1] = load(p + kWidth);
#endif
  }
  // For finite numbers: round to nearest, ties to even.
  KD_INLINE static void store2(uint16_t* p, const vf* x) {
#if KD_LEVEL == KD_IS_avx512
    const __m512i a = rounded(x[0].v), b = rounded(x[1].v), upper = _mm512_set1_epi32((int)0xffff0000);
    _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, upper, 0xf8));
#else
    store(p, x[0]);
    store(p + kWidth, x[1]);
#endif
  }
#if KD_LEVEL == KD_IS_avx512
  KD_INLINE static __m512i rounded(native x) {
    const __m512i bits = n_bits(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
#endif
};

constexpr int kAhead = 4096;  // bytes
KD_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// body(i, lanes) for every vector of n elements: `everywhere`, or a mask for the last, partial one.
template <class Body>
KD_INLINE void for_vectors(int n, Body body) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, everywhere{});
  if (i < n) body(i, first_lanes(n - i));
}

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

// Logits first .. first + n - 1 of a row as floats: the row itself when it is plain fp32 and whole vectors,
// else `buffer` (kBlock floats). Lanes beyond n hold a copy of the last one.
inline const float* load_block(const Source& s, const char* row, int64_t first, int n, float* buffer) {
  const char* from = row + first * size_of(s.dtype);
  if (s.dtype == KD_F32) {
    if (s.plain && n % kWidth == 0) return (const float*)from;
    to_floats<f32>(from, buffer, n);
  } else if (s.dtype == KD_F16) {
    to_floats<f16>(from, buffer, n);
  } else {
    to_floats<bf16>(from, buffer, n);
  }
  if (!s.plain) {
    to_logits(s, first, buffer, n);
    for (int i = n; i % kWidth; ++i) buffer[i] = buffer[n - 1];
  }
  return buffer;
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

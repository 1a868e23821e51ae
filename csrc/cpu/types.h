// Blocks of a row: stored numbers (fp32, fp16, bf16; bias, scale, soft-cap) to floats in L1, and gradients
// back.
//
// Everything else in this folder sees floats only. A block is kBlock floats: two of them and a gradient block
// (12 KiB) live beside the stream in a 32 KiB L1.
#pragma once
#include "../kernels.h"
#include "functions.h"

namespace KD_NS {

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

// `load2` and `store2` move 2 kWidth elements in an order of the type's own; element i is lane slot(i) of the
// two vectors. A NaN written by store2 must come from arithmetic (its payload must not be all ones).
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
  static int slot(int i) { return i; }
};
struct f16 {
  typedef uint16_t stored;
  KD_INLINE static vf load(const uint16_t* p) { return {load_f16(p)}; }
  KD_INLINE static void store(uint16_t* p, vf x) { store_f16(p, x.v); }
};
struct bf16 {
  typedef uint16_t stored;
  KD_INLINE static vf load(const uint16_t* p) { return {load_bf16(p)}; }
  KD_INLINE static void store(uint16_t* p, vf x) { store_bf16(p, x.v); }
  // Even elements in one vector, odd ones in the other: half the instructions of two widening loads.
  KD_INLINE static void load2(const uint16_t* p, vf* x) {
    native_int v;
    memcpy(&v, p, sizeof v);
    x[0] = {n_from_bits(n_shift_up16(v))};
    x[1] = {n_from_bits(n_and_int(v, n_int((int)0xffff0000)))};
  }
  KD_INLINE static void store2(uint16_t* p, const vf* x) {
    const native_int v = n_join16(rounded(x[0].v), rounded(x[1].v));
    memcpy(p, &v, sizeof v);
  }
  static int slot(int i) { return (i & 1) * kWidth + i / 2; }

 private:
  // To nearest in the upper half, ties away from zero; the lower half is left over. Ties to even would be
  // four more instructions for a case of 2^-16.
  KD_INLINE static native_int rounded(native x) { return n_add_int(n_bits(x), n_int(0x8000)); }
};

// Asks for lines of the rows to come; see prefetch in task.h for how far ahead.
KD_INLINE void prefetch(const char* student, const char* teacher, int64_t at) {
  __builtin_prefetch(student + at / 2, 0, 2);
  __builtin_prefetch(teacher + at / 2, 0, 2);
}

// body(i, lanes) for every vector of n elements: `everywhere`, or a mask for the last, partial one.
template <class Body>
KD_INLINE void for_vectors(int n, Body body) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, everywhere{});
  if (i < n) body(i, first_lanes(n - i));
}

}  // namespace KD_NS

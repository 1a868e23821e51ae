// What selection needs of masks: which lanes, how many, and packing them.
#pragma once
#include "vec.h"

namespace KD_NS {

// Bit j is lane j.
KD_INLINE uint32_t bits_of(mask m) {
#if KD_LEVEL == KD_IS_avx512
  return m.k;
#elif KD_LEVEL == KD_IS_avx2
  return (uint32_t)_mm256_movemask_ps(m.k);
#else
  return (uint32_t)((m.k[0] & 1) | (m.k[1] & 2) | (m.k[2] & 4) | (m.k[3] & 8));
#endif
}

KD_INLINE mask operator|(mask a, mask b) { return !((!a) & (!b)); }

KD_INLINE bool every(const mask* four) {
  const uint32_t full = (1u << kWidth) - 1u;
  return bits_of((four[0] & four[1]) & (four[2] & four[3])) == full;
}

KD_INLINE bool none(const mask* four) { return !bits_of((four[0] | four[1]) | (four[2] | four[3])); }

// Entries of a row that may be kept: value and index, by index.
struct Candidates {
  float* value;  // room for a vector more than is counted
  int32_t* id;
  int64_t count;
};

// Appends the lanes `keep` of x, whose first lane is entry `first`.
KD_INLINE void append(Candidates& to, vf x, int64_t first, mask keep) {
  const uint32_t bits = bits_of(keep);
#if KD_LEVEL == KD_IS_avx512
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i id = _mm512_add_epi32(lane, n_int((int)first));
  n_store(to.value + to.count, _mm512_maskz_compress_ps(keep.k, x.v));
  _mm512_storeu_si512(to.id + to.count, _mm512_maskz_compress_epi32(keep.k, id));
  to.count += __builtin_popcount(bits);
#else
  float value[kWidth];
  x.store(value);
  for (uint32_t left = bits; left; left &= left - 1) {
    const int j = __builtin_ctz(left);
    to.value[to.count] = value[j];
    to.id[to.count++] = (int32_t)(first + j);
  }
#endif
}

}  // namespace KD_NS

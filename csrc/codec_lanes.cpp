#include "codec_lanes.h"

#include <cstdlib>
#include <string>

#include "codec_bits.h"

#if defined(__x86_64__)
// GCC 12's own header reads a variable that it leaves unset on purpose (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace kd {
namespace codec {

void LanePlan::add(uint32_t first, uint32_t count, uint32_t left, uint32_t right) {
  if (!count) return;
  const uint32_t half = count / 2, middle = first + half;
  steps_.push_back({middle, left, right});
  add(first, half, left, middle);
  add(middle + 1, count - half - 1, middle, right);
}

void LanePlan::prepare(uint32_t count) {
  if (count == this->count()) return;
  steps_.clear();
  add(1, count, 0, count + 1);
  table_.resize(count + 2);
}

#if defined(__x86_64__)
#define KD_LANES __attribute__((target("avx512f,avx512cd,avx512dq,avx512bw,avx512vl")))

namespace {

bool has_avx512() {
  const char* asked = std::getenv("KDKERNELS_ISA");  // as for the kernels: a lesser set was asked for
  if (asked && *asked && std::string(asked) != "avx512") return false;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace

bool lanes_usable() {
  static const bool usable = has_avx512();
  return usable;
}

namespace {

// Eight bit streams.
struct Streams {
  __m512i position, stop, word;

  KD_LANES void refill(const uint8_t* bytes) {
    const __m512i at =
        _mm512_min_epu64(position, stop);  // damaged rows run past their end: they read no further
    word = _mm512_i64gather_epi64(_mm512_srli_epi64(at, 3), bytes, 1);
    word = _mm512_srlv_epi64(word, _mm512_and_si512(at, _mm512_set1_epi64(7)));
  }
  KD_LANES void skip(__m256i bits) {
    const __m512i wide = _mm512_cvtepu32_epi64(bits);
    word = _mm512_srlv_epi64(word, wide);
    position = _mm512_add_epi64(position, wide);
  }
};

// Sixteen numbers of `IdReader::minimal` from the lower halves of the streams' words; `used` are their
// lengths.
KD_LANES inline __m512i minimal(__m512i word, __m512i n, __m512i& used) {
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i bits = _mm512_sub_epi32(_mm512_set1_epi32(31), _mm512_lzcnt_epi32(n));
  const __m512i power = _mm512_sllv_epi32(one, bits);
  const __m512i shorts = _mm512_sub_epi32(_mm512_add_epi32(power, power), n);
  const __m512i first = _mm512_srli_epi32(_mm512_sub_epi32(n, shorts), 1);
  const __m512i low = _mm512_and_si512(word, _mm512_sub_epi32(power, one));
  const __mmask16 is_long = _mm512_cmpge_epu32_mask(low, shorts);
  const __mmask16 high = _mm512_mask_test_epi32_mask(is_long, word, power);
  __m512i value = _mm512_add_epi32(low, first);
  value = _mm512_mask_add_epi32(value, high, value, _mm512_sub_epi32(power, shorts));
  used = _mm512_mask_add_epi32(bits, is_long, bits, one);
  return _mm512_min_epu32(value,
                          _mm512_sub_epi32(value, n));  // modulo n: below n the difference wraps around
}

KD_LANES inline void transpose(const int32_t* table, uint32_t count, int32_t* const* out) {
  uint32_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (unsigned lane = 0; lane < kLanes; lane += 4) {
      __m128i rows[4];
      for (unsigned r = 0; r < 4; ++r) {
        rows[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(table + (i + r) * kLanes + lane));
      }
      const __m128i a = _mm_unpacklo_epi32(rows[0], rows[1]), b = _mm_unpacklo_epi32(rows[2], rows[3]);
      const __m128i c = _mm_unpackhi_epi32(rows[0], rows[1]), d = _mm_unpackhi_epi32(rows[2], rows[3]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[lane] + i), _mm_unpacklo_epi64(a, b));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[lane + 1] + i), _mm_unpackhi_epi64(a, b));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[lane + 2] + i), _mm_unpacklo_epi64(c, d));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[lane + 3] + i), _mm_unpackhi_epi64(c, d));
    }
  }
  for (; i < count; ++i) {
    for (unsigned lane = 0; lane < kLanes; ++lane) out[lane][i] = table[i * kLanes + lane];
  }
}

}  // namespace

KD_LANES void decode_lanes(LanePlan& plan, uint32_t vocab, Lanes& lanes) {
  int32_t* table = plan.table();
  const uint32_t count = plan.count();
  _mm512_store_si512(table, _mm512_set1_epi32(-1));
  _mm512_store_si512(table + (count + 1) * kLanes, _mm512_set1_epi32(static_cast<int>(vocab)));
  Streams a{_mm512_loadu_si512(lanes.position), _mm512_loadu_si512(lanes.stop), {}};
  Streams b{_mm512_loadu_si512(lanes.position + 8), _mm512_loadu_si512(lanes.stop + 8), {}};
  const unsigned numbers = 57 / bit_length(vocab);  // in one word, whatever they are
  unsigned left = 0;
  for (const LanePlan::Step& step : plan.steps()) {
    if (left == 0) a.refill(lanes.bytes), b.refill(lanes.bytes), left = numbers;
    --left;
    const __m512i below = _mm512_load_si512(table + step.left * kLanes);
    const __m512i above = _mm512_load_si512(table + step.right * kLanes);
    const __m512i low = _mm512_add_epi32(below, _mm512_set1_epi32(static_cast<int>(step.middle - step.left)));
    const __m512i high =
        _mm512_sub_epi32(above, _mm512_set1_epi32(static_cast<int>(step.right - step.middle)));
    const __m512i n = _mm512_add_epi32(_mm512_sub_epi32(high, low), _mm512_set1_epi32(1));
    const __m512i word = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(a.word)),
                                            _mm512_cvtepi64_epi32(b.word), 1);
    __m512i used;
    const __m512i value = minimal(word, n, used);
    _mm512_store_si512(table + step.middle * kLanes, _mm512_add_epi32(low, value));
    a.skip(_mm512_castsi512_si256(used));
    b.skip(_mm512_extracti64x4_epi64(used, 1));
  }
  _mm512_storeu_si512(lanes.position, a.position);
  _mm512_storeu_si512(lanes.position + 8, b.position);
  transpose(table + kLanes, count, lanes.out);
}

#else

bool lanes_usable() { return false; }
void decode_lanes(LanePlan&, uint32_t, Lanes&) {}

#endif

}  // namespace codec
}  // namespace kd

// Little-endian numbers, bit streams (the first bit is the lowest of the first byte) and 16-bit floats.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace kd {
namespace codec {

template <class T>
inline T load(const uint8_t* p) {
  T x;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  uint8_t swapped[sizeof(T)];
  for (size_t i = 0; i < sizeof(T); ++i) swapped[i] = p[sizeof(T) - 1 - i];
  p = swapped;
#endif
  std::memcpy(&x, p, sizeof(T));
  return x;
}

template <class T>
inline void store(uint8_t* p, T x) {
  std::memcpy(p, &x, sizeof(T));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  for (size_t i = 0; i < sizeof(T) / 2; ++i) std::swap(p[i], p[sizeof(T) - 1 - i]);
#endif
}

inline unsigned bit_length(uint64_t x) { return x ? 64u - static_cast<unsigned>(__builtin_clzll(x)) : 0u; }

inline uint64_t low_bits(unsigned n) { return (uint64_t{1} << n) - 1; }  // n < 64

// Up to 57 bits at `position`. Reads 8 bytes from the one that holds it: the caller's buffer has them.
inline uint64_t peek(const uint8_t* bytes, uint64_t position) {
  return load<uint64_t>(bytes + (position >> 3)) >> (position & 7);
}

// The same near the end of a buffer: bytes at and after `end` read as 0.
inline uint64_t peek_within(const uint8_t* bytes, const uint8_t* end, uint64_t position) {
  const uint64_t left = static_cast<uint64_t>(end - bytes), at = position >> 3;
  if (at + 8 <= left) return peek(bytes, position);
  uint8_t word[8] = {};
  if (at < left) std::memcpy(word, bytes + at, left - at);
  return load<uint64_t>(word) >> (position & 7);
}

class BitWriter {
 public:
  void put(uint64_t value, unsigned bits) {  // bits <= 57
    if (at_ + 8 > bytes_.size()) bytes_.resize(2 * bytes_.size() + 64);
    pending_ |= value << used_;
    used_ += bits;
    store(bytes_.data() + at_, pending_);
    at_ += used_ >> 3;
    pending_ = used_ >= 64 ? 0 : pending_ >> (used_ & ~7u);
    used_ &= 7;
  }
  void expect(uint64_t bits) { bytes_.reserve(bits / 8 + 8); }
  uint64_t position() const { return 8 * at_ + used_; }
  std::vector<uint8_t> finish() {
    bytes_.resize(at_ + (used_ ? 1 : 0));
    return std::move(bytes_);
  }

 private:
  std::vector<uint8_t> bytes_;
  uint64_t at_ = 0, pending_ = 0;
  unsigned used_ = 0;  // bits of `pending_`, fewer than 8 between calls
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// float16, rounded to nearest even; finite numbers beyond its range become its largest.
inline uint16_t to_half(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude >= 0x7f800000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (magnitude >= 0x477fe000) return sign | 0x7bff;
  if (magnitude < 0x38800000) {  // below 2^-14: multiples of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(std::fabs(x) * 16777216.0f));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
}

inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31,
                 mantissa = h & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * (1.0f / 16777216.0f);
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// The upper half of a float32, rounded up; for x >= 0.
inline uint16_t to_upper_half(float x) { return static_cast<uint16_t>((float_bits(x) + 0xffff) >> 16); }
inline float from_upper_half(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

}  // namespace codec
}  // namespace kd

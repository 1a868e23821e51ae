// Matrices in heap blocks of exactly their size, gaps between rows poisoned, for drivers built with
// sanitizers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
#endif

namespace {

constexpr int kUntested = 77;  // the exit status that means: nothing was tested
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

size_t element_bytes(kd_dtype dtype) { return dtype == KD_F64 ? 8 : dtype == KD_F32 ? 4 : 2; }

// Bits of a 16-bit float, rounded towards zero; infinities and NaN are kept.
uint16_t encode16(float value, int exponent_bits) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (exponent_bits == 8) return static_cast<uint16_t>((bits >> 16) | (std::isnan(value) ? 0x40 : 0));
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const auto exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + 15;
  if (std::isnan(value)) return sign | 0x7e00;
  if (exponent >= 31) return sign | 0x7c00;
  if (exponent <= 0) return sign;
  return static_cast<uint16_t>(sign | (exponent << 10) | ((bits >> 13) & 0x3ff));
}

double decode16(uint16_t bits, int exponent_bits) {
  uint32_t wide;
  if (exponent_bits == 8) {
    wide = static_cast<uint32_t>(bits) << 16;
  } else {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 0x3ff;
    if (exponent == 0) return (sign ? -1.0 : 1.0) * std::ldexp(mantissa, -24);
    wide = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  }
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// A matrix of `dtype` in a heap block that ends with its last element; `gap` poisoned elements between rows.
class Matrix {
 public:
  Matrix(kd_dtype dtype, int64_t rows, int64_t columns, int64_t gap)
      : dtype_(dtype), rows_(rows), columns_(columns), stride_(columns + gap), bytes_(element_bytes(dtype)) {
    size_ = static_cast<size_t>((rows - 1) * stride_ + columns) * bytes_;
    block_ = static_cast<unsigned char*>(std::malloc(size_));
    std::memset(block_, 0xff, size_);  // NaN in every format: whatever is not written shows
    guard(true);
  }
  ~Matrix() {
    guard(false);
    std::free(block_);
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  void* data() const { return block_; }
  int64_t stride() const { return stride_; }

  void set(int64_t row, int64_t column, double value) {
    unsigned char* p = at(row, column);
    const auto narrow = static_cast<float>(value);
    if (dtype_ == KD_F64) std::memcpy(p, &value, 8);
    if (dtype_ == KD_F32) std::memcpy(p, &narrow, 4);
    if (bytes_ == 2) {
      const uint16_t bits = encode16(narrow, dtype_ == KD_BF16 ? 8 : 5);
      std::memcpy(p, &bits, 2);
    }
  }

  double get(int64_t row, int64_t column) const {
    const unsigned char* p = at(row, column);
    if (dtype_ == KD_F64) return load<double>(p);
    if (dtype_ == KD_F32) return load<float>(p);
    return decode16(load<uint16_t>(p), dtype_ == KD_BF16 ? 8 : 5);
  }

  std::vector<unsigned char> bits() const {
    std::vector<unsigned char> all;
    for (int64_t row = 0; row < rows_; ++row)
      all.insert(all.end(), at(row, 0), at(row, 0) + columns_ * bytes_);
    return all;
  }

 private:
  template <class T>
  static T load(const unsigned char* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  unsigned char* at(int64_t row, int64_t column) const { return block_ + (row * stride_ + column) * bytes_; }
  void guard(bool on) {
    const size_t gap = static_cast<size_t>(stride_ - columns_) * bytes_;
    for (int64_t row = 0; gap && row + 1 < rows_; ++row) {
      if (on) POISON(at(row, columns_), gap);
      if (!on) UNPOISON(at(row, columns_), gap);
    }
  }
  kd_dtype dtype_;
  int64_t rows_, columns_, stride_;
  size_t bytes_, size_ = 0;
  unsigned char* block_ = nullptr;
};

// Scratch of the size that was asked for, to a cache line.
template <class Run>
void with_scratch(size_t bytes, const Run& run) {
  void* scratch = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
  run(scratch);
  std::free(scratch);
}

uint64_t g_state = 1;
double uniform() {  // splitmix64
  uint64_t z = (g_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

}  // namespace

// Log-probabilities of one row as codes. Uniform steps over the row's own range, the largest entry at code 0,
// -inf at the highest code; the row's anchor is chosen so that the decoded entries hold the same mass as the
// encoded ones.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "codec_bits.h"
#include "codec_format.h"

namespace kd {
namespace codec {

struct RowValues {
  float anchor = 0;
  uint16_t step = 0;  // upper half of a float32, or kRawRow
  float max_error = 0;
  std::vector<uint32_t> codes;  // bits of float32 in a raw row
};

inline float decode_value(float anchor, float step, uint32_t code) {
  return anchor - static_cast<float>(code) * step;
}

inline void raw_row(const float* log_probs, uint32_t count, RowValues& out) {
  out.anchor = 0, out.step = kRawRow, out.max_error = 0;
  for (uint32_t i = 0; i < count; ++i) out.codes[i] = float_bits(log_probs[i]);
}

inline void quantise_row(const float* log_probs, uint32_t count, unsigned bits, RowValues& out) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const auto none = static_cast<uint32_t>(low_bits(bits));  // -inf
  out.codes.assign(count, none);
  float high = -inf, low = inf;
  for (uint32_t i = 0; i < count; ++i) {
    if (log_probs[i] == -inf) continue;
    high = std::max(high, log_probs[i]), low = std::min(low, log_probs[i]);
  }
  out.anchor = 0, out.step = 0, out.max_error = 0;
  if (high == -inf) return;
  const double range = static_cast<double>(high) - low;
  if (range > kMaxQuantisedRange) return raw_row(log_probs, count, out);
  out.step = to_upper_half(static_cast<float>(range / (none - 1)));
  const float step = from_upper_half(out.step);
  double mass = 0, coded = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (log_probs[i] == -inf) continue;
    const double depth = static_cast<double>(high) - log_probs[i];
    const double code = step > 0 ? std::nearbyint(depth / step) : 0;
    out.codes[i] = static_cast<uint32_t>(std::min(code, static_cast<double>(none - 1)));
    mass += std::exp(-depth), coded += std::exp(-static_cast<double>(step) * out.codes[i]);
  }
  out.anchor = static_cast<float>(high + std::log(mass / coded));
  for (uint32_t i = 0; i < count; ++i) {
    if (log_probs[i] == -inf) continue;
    out.max_error =
        std::max(out.max_error, std::fabs(decode_value(out.anchor, step, out.codes[i]) - log_probs[i]));
  }
}

inline void half_row(const float* log_probs, uint32_t count, RowValues& out) {
  out.codes.resize(count), out.max_error = 0;
  for (uint32_t i = 0; i < count; ++i) {
    out.codes[i] = to_half(log_probs[i]);
    const float decoded = from_half(static_cast<uint16_t>(out.codes[i]));
    if (std::isfinite(log_probs[i]))
      out.max_error = std::max(out.max_error, std::fabs(decoded - log_probs[i]));
  }
}

}  // namespace codec
}  // namespace kd

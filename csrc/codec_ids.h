// Ascending ids by binary interpolative coding (Moffat and Stuiver, Information Retrieval 3, 2000): the
// middle id of a run, as one of the values that leave room for the ids on either side; then its left part,
// then its right part. No parameter, no table, 0 bits where nothing is left to choose (k = V costs nothing),
// and crowded ids, as teachers keep them, cost less than ids at random. Any bits decode to ascending ids
// inside the vocabulary.
#pragma once
#include <cstdint>

#include "codec_bits.h"

namespace kd {
namespace codec {

// One of n values in b or b + 1 bits (minimal binary code). The short words go to the middle values, which
// are the likelier ones for the middle id of a run.
struct MinimalCode {
  explicit MinimalCode(uint32_t n)
      : n(n), bits(31u - static_cast<unsigned>(__builtin_clz(n))), power(1u << bits), shorts(2 * power - n) {
    first = (n - shorts) >> 1;
  }
  uint32_t n;
  unsigned bits;
  uint32_t power, shorts,
      first;  // `power` <= n < 2 * `power`; values first .. first + shorts - 1 have short words
};

inline void put_minimal(BitWriter& out, uint32_t value, uint32_t n) {
  const MinimalCode code(n);
  const uint32_t rank = value >= code.first ? value - code.first : value + n - code.first;
  if (rank < code.shorts) {
    out.put(rank, code.bits);
  } else {
    const bool high = rank >= code.power;
    const uint32_t low = high ? rank - (code.power - code.shorts) : rank;
    out.put(low | static_cast<uint64_t>(high) << code.bits, code.bits + 1);
  }
}

// count ids in [low, high], at least as many values as ids.
inline void put_ids(BitWriter& out, const int32_t* ids, uint32_t count, uint32_t low, uint32_t high) {
  while (count) {
    const uint32_t room = high - low + 1 - count;
    if (!room) return;
    const uint32_t middle = count >> 1, id = static_cast<uint32_t>(ids[middle]);
    put_minimal(out, id - low - middle, room + 1);
    put_ids(out, ids, middle, low, id - 1);
    ids += middle + 1, count -= middle + 1, low = id + 1;
  }
}

// Reads from `bytes`, which has 8 bytes more than `end` bits. `position` beyond `end` after it: the row is
// damaged.
struct IdReader {
  const uint8_t* bytes;
  uint64_t position, end;

  uint32_t minimal(uint32_t n) {
    const MinimalCode code(n);
    const uint64_t word = peek(bytes, position);
    const auto low = static_cast<uint32_t>(word & (code.power - 1));
    const uint32_t is_long = low >= code.shorts;
    const uint32_t high = is_long & static_cast<uint32_t>(word >> code.bits);
    position += code.bits + is_long;
    const uint32_t value = low + (high & 1) * (code.power - code.shorts) + code.first;
    return value >= n ? value - n : value;
  }

  void ids(int32_t* out, uint32_t count, uint32_t low, uint32_t high) {
    while (count) {
      const uint32_t room = high - low + 1 - count;
      if (!room || position > end) {  // nothing left to choose, or nothing left to read
        for (uint32_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(low + i);
        return;
      }
      const uint32_t middle = count >> 1, id = low + middle + minimal(room + 1);
      out[middle] = static_cast<int32_t>(id);
      if (middle) ids(out, middle, low, id - 1);
      out += middle + 1, count -= middle + 1, low = id + 1;
    }
  }
};

}  // namespace codec
}  // namespace kd

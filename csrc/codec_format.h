// Constants of the block format, version 1; kdkernels/compression/format.py is the normative text and a test
// holds the two together. Every integer is little-endian.
#pragma once
#include <cstdint>

namespace kd {
namespace codec {

constexpr char kMagic[5] = "KDSL";
constexpr uint16_t kVersion = 1;

// Offsets in the header.
enum HeaderField : unsigned {
  kAtMagic = 0,
  kAtVersion = 4,
  kAtBits = 6,
  kAtColumns = 7,
  kAtRows = 8,
  kAtWidth = 12,
  kAtVocab = 16,
  kAtMinCount = 20,
  kAtCountBits = 24,
  kAtOffsetBits = 25,
  kAtNamesBytes = 26,
  kAtMaxError = 28,
  kAtPayloadBits = 32,
  kAtIdBits = 40,
  kAtOffsetBias = 48,
  kAtTotalBytes = 56,
  kHeaderBytes = 64,
};

constexpr unsigned kChecksumBytes = 4;
constexpr uint32_t kMaxRows = 1u << 24;  // rows * payload_bits fits 64 bits
constexpr uint64_t kMaxPayloadBits = uint64_t{1} << 40;
constexpr uint32_t kMaxVocab = 0x7fffffff;
constexpr uint64_t kMaxEntriesPerByte = 256;  // rows * width over the block's bytes: bounds what is allocated
constexpr unsigned kMaxColumns = 255, kMaxNameBytes = 255;
constexpr unsigned kMinQuantisedBits = 4, kMaxQuantisedBits = 12, kHalfBits = 16, kExactBits = 32;
constexpr uint16_t kRawRow = 0xffff;       // a row's step: its values are float32 instead of codes
constexpr float kMaxQuantisedRange = 512;  // nats; rows of a larger range are raw

constexpr bool quantised(unsigned bits) { return bits <= kMaxQuantisedBits; }

}  // namespace codec
}  // namespace kd

// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), as iSCSI and ext4 use it.
#include <array>

#include "codec.h"
#include "codec_bits.h"

namespace kd {
namespace codec {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0);
    tables[0][byte] = crc;
  }
  for (size_t t = 1; t < 8; ++t) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[t - 1][byte];
      tables[t][byte] = (before >> 8) ^ tables[0][before & 255];
    }
  }
  return tables;
}

// Eight bytes a step ("slicing by 8"); the instruction below does the same where there is one.
uint32_t portable(uint32_t crc, const uint8_t* data, size_t size) {
  static const Tables tables = make_tables();
  for (; size >= 8; size -= 8, data += 8) {
    const uint64_t word = load<uint64_t>(data) ^ crc;
    crc = 0;
    for (size_t i = 0; i < 8; ++i) crc ^= tables[7 - i][(word >> (8 * i)) & 255];
  }
  for (; size; --size) crc = (crc >> 8) ^ tables[0][(crc ^ *data++) & 255];
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t instruction(uint32_t crc, const uint8_t* data, size_t size) {
  uint64_t wide = crc;
  for (; size >= 8; size -= 8, data += 8) wide = __builtin_ia32_crc32di(wide, load<uint64_t>(data));
  crc = static_cast<uint32_t>(wide);
  for (; size; --size) crc = __builtin_ia32_crc32qi(crc, *data++);
  return crc;
}
#endif

}  // namespace

uint32_t crc32c_portable(const uint8_t* data, size_t size) { return ~portable(~0u, data, size); }

uint32_t crc32c(const uint8_t* data, size_t size) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return ~instruction(~0u, data, size);
#endif
  return crc32c_portable(data, size);
}

}  // namespace codec
}  // namespace kd

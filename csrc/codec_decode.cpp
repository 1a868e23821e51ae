// One block of bytes to rows. The bytes may be anything: every length is checked before it is used, and what
// passes decodes to ascending ids inside the vocabulary or is refused.
#include <algorithm>
#include <limits>
#include <string>

#include "codec.h"
#include "codec_bits.h"
#include "codec_format.h"
#include "codec_ids.h"
#include "codec_lanes.h"
#include "codec_values.h"

namespace kd {
namespace codec {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

[[noreturn]] void damaged(const std::string& what) { throw Error("block: " + what); }

uint64_t packed_bytes(uint64_t count, unsigned bits) { return (count * bits + 7) / 8; }

void check_beginning(const uint8_t* data, size_t size) {
  if (size < kHeaderBytes + kChecksumBytes) {
    damaged(std::to_string(size) + " bytes are too few for a block: truncated, or not a block");
  }
  if (std::memcmp(data, kMagic, 4) != 0)
    damaged("does not begin with KDSL: not a block of kdkernels, or damaged");
  const unsigned version = load<uint16_t>(data + kAtVersion);
  if (version > kVersion) {
    damaged("format version " + std::to_string(version) + " is newer than this kdkernels reads (" +
            std::to_string(kVersion) + "), or the bytes are damaged: update kdkernels");
  }
  if (version != kVersion) damaged("format version " + std::to_string(version) + " does not exist");
  const uint64_t total = load<uint64_t>(data + kAtTotalBytes);
  if (total != size) {
    damaged(std::to_string(size) + " bytes, where its header says " + std::to_string(total) +
            ": truncated or damaged");
  }
}

void check_checksum(const uint8_t* data, size_t size) {
  const uint32_t stored = load<uint32_t>(data + size - kChecksumBytes);
  if (crc32c(data, size - kChecksumBytes) != stored) damaged("checksum mismatch: its bytes were damaged");
}

void check_header(const Block& block) {
  const unsigned bits = block.bits;
  const bool known =
      bits == kHalfBits || bits == kExactBits || (bits >= kMinQuantisedBits && quantised(bits));
  if (!known) damaged("bits = " + std::to_string(bits) + " does not exist");
  if (block.vocab < 1 || block.vocab > kMaxVocab) damaged("vocabulary size is out of range");
  if (block.width > block.vocab || block.min_count > block.width)
    damaged("more entries a row than there can be");
  if (block.rows > kMaxRows) damaged("more rows than a block can have");
  if (block.count_bits > 31 || block.offset_bits > 41) damaged("width of a packed number is out of range");
  if (block.payload_bits > kMaxPayloadBits || block.offset_bias > kMaxPayloadBits)
    damaged("a length is out of range");
  if (!(block.max_error >= 0)) damaged("maximum error is not a number");
}

// The names' bytes hold exactly `count` distinct names.
std::vector<std::string> read_names(const uint8_t* p, const uint8_t* end, unsigned count) {
  std::vector<std::string> names;
  for (unsigned i = 0; i < count; ++i) {
    if (p == end || *p == 0 || *p > end - p - 1) damaged("names of columns are damaged");
    names.emplace_back(reinterpret_cast<const char*>(p) + 1, *p);
    p += 1 + *p;
    if (std::find(names.begin(), names.end() - 1, names.back()) != names.end() - 1)
      damaged("a column is there twice");
  }
  if (p != end) damaged("names of columns are damaged");
  return names;
}

// Lays the sections out behind the header and checks that the block has room for them.
void place(Block& block, const uint8_t* data, size_t size, unsigned columns) {
  const uint64_t rows = block.rows, names_bytes = load<uint16_t>(data + kAtNamesBytes);
  uint64_t at = kHeaderBytes;
  const auto section = [&](uint64_t bytes) {
    const uint64_t begin = at;
    at += bytes;
    if (at > size - kChecksumBytes) damaged("its header asks for more bytes than there are");
    return data + begin;
  };
  const uint8_t* names = section(names_bytes);
  block.columns = read_names(names, names + names_bytes, columns);
  block.log_tail = section(4 * rows);
  block.column_data = section(4 * rows * columns);
  block.anchors = section(quantised(block.bits) ? 4 * rows : 0);
  block.steps = section(quantised(block.bits) ? 2 * rows : 0);
  block.counts = section(packed_bytes(rows, block.count_bits));
  block.offsets = section(packed_bytes(rows, block.offset_bits));
  block.payload = section((block.payload_bits + 7) / 8);
  block.end = data + size;
  if (rows * block.width > kMaxEntriesPerByte * size) damaged("more entries than its bytes can hold");
}

struct RowPlace {
  uint64_t start, stop;  // bits of the payload
  uint32_t count;
};

uint64_t row_start(const Block& block, uint64_t row) {
  if (row == block.rows) return block.payload_bits;
  const uint64_t word = peek_within(block.offsets, block.end, row * block.offset_bits);
  return (word & low_bits(block.offset_bits)) + row * block.payload_bits / block.rows - block.offset_bias;
}

RowPlace find_row(const Block& block, uint64_t row) {
  const uint64_t word = peek_within(block.counts, block.end, row * block.count_bits);
  const uint64_t count = block.min_count + (word & low_bits(block.count_bits));
  const uint64_t start = row_start(block, row), stop = row_start(block, row + 1);
  // A start that wrapped around below 0 is larger than any length.
  if (count > block.width || start > stop || stop > block.payload_bits || stop - start > kMaxPayloadBits) {
    damaged("the place of row " + std::to_string(row) + " is damaged");
  }
  return {start, stop, static_cast<uint32_t>(count)};
}

struct Values {
  unsigned bits;
  float anchor, step;
  bool coded;
};

Values row_values(const Block& block, uint64_t row) {
  if (!quantised(block.bits)) return {block.bits, 0, 0, false};
  const uint16_t step = load<uint16_t>(block.steps + 2 * row);
  const float anchor = load<float>(block.anchors + 4 * row);
  if (step == kRawRow) return {kExactBits, 0, 0, false};
  if (step >= 0x7f80 || !(anchor > -kInf && anchor < kInf)) {
    damaged("the scale of row " + std::to_string(row) + " is damaged");
  }
  return {block.bits, anchor, from_upper_half(step), true};
}

// Writes `count` log-probabilities from `position` on; false if one is NaN or +inf.
bool get_values(const uint8_t* bytes, uint64_t position, const Values& values, uint32_t count, float* out) {
  const uint64_t mask = low_bits(values.bits);
  bool good = true;
  if (values.coded) {
    for (uint32_t i = 0; i < count; ++i, position += values.bits) {
      const auto code = static_cast<uint32_t>(peek(bytes, position) & mask);
      out[i] = code == mask ? -kInf : decode_value(values.anchor, values.step, code);
    }
    return true;
  }
  for (uint32_t i = 0; i < count; ++i, position += values.bits) {
    const auto word = static_cast<uint32_t>(peek(bytes, position) & mask);
    out[i] = values.bits == kHalfBits ? from_half(static_cast<uint16_t>(word)) : bits_float(word);
    good &= out[i] < kInf;
  }
  return good;
}

class RowDecoder {
 public:
  explicit RowDecoder(const Block& block) : block_(block) {}

  void row(uint64_t row, int32_t* ids, float* log_probs) {
    const Place place = find(row);
    const uint8_t* bytes = readable(place);
    const uint64_t origin = bytes == block_.payload ? 0 : place.start & ~uint64_t{7};
    IdReader reader{bytes, place.start - origin, place.ids_end - origin};
    reader.ids(ids, place.count, 0, block_.vocab - 1);
    finish(place, reader.position + origin, bytes, origin, ids, log_probs);
  }

  // kLanes rows, `stride` apart, if they can be decoded together; false if not, and nothing is written.
  bool rows(uint64_t row, int64_t stride, int32_t* ids, float* log_probs) {
    Place places[kLanes];
    Lanes lanes{};
    lanes.bytes = block_.payload;
    for (unsigned i = 0; i < kLanes; ++i) {
      places[i] = find(row + static_cast<uint64_t>(i * stride));
      if (places[i].count != places[0].count || !followed(places[i])) return false;
      lanes.position[i] = places[i].start, lanes.stop[i] = places[i].ids_end;
      lanes.out[i] = ids + uint64_t{i} * block_.width;
    }
    if (places[0].count == 0 || places[0].count > kMostIdsInLanes) return false;
    plan_.prepare(places[0].count);
    decode_lanes(plan_, block_.vocab, lanes);
    for (unsigned i = 0; i < kLanes; ++i) {
      float* out = log_probs + uint64_t{i} * block_.width;
      finish(places[i], lanes.position[i], block_.payload, 0, lanes.out[i], out);
    }
    return true;
  }

 private:
  struct Place {
    uint64_t row, start, ids_end, stop;  // bits of the payload
    uint32_t count;
    Values values;
  };

  Place find(uint64_t row) const {
    const RowPlace place = find_row(block_, row);
    const Values values = row_values(block_, row);
    const uint64_t value_bits = uint64_t{place.count} * values.bits;
    if (value_bits > place.stop - place.start)
      damaged("row " + std::to_string(row) + " is too short for its entries");
    return {row, place.start, place.stop - value_bits, place.stop, place.count, values};
  }

  // Log-probabilities and padding of a row whose ids are there; `position` is where reading them has ended.
  void finish(const Place& place, uint64_t position, const uint8_t* bytes, uint64_t origin, int32_t* ids,
              float* log_probs) const {
    if (position != place.ids_end) damaged("the ids of row " + std::to_string(place.row) + " are damaged");
    if (!get_values(bytes, place.ids_end - origin, place.values, place.count, log_probs)) {
      damaged("the log-probabilities of row " + std::to_string(place.row) + " are damaged");
    }
    std::fill(ids + place.count, ids + block_.width, -1);
    std::fill(log_probs + place.count, log_probs + block_.width, -kInf);
  }

  // Whether 8 bytes of the block follow the row's.
  bool followed(const Place& place) const {
    return static_cast<uint64_t>(block_.end - block_.payload) >= ((place.stop + 7) >> 3) + 8;
  }

  // The payload, or a copy of the row's bytes where too few follow them.
  const uint8_t* readable(const Place& place) {
    if (followed(place)) return block_.payload;
    copy_.assign(block_.payload + (place.start >> 3), block_.payload + ((place.stop + 7) >> 3));
    copy_.resize(copy_.size() + 9);
    return copy_.data();
  }

  const Block& block_;
  LanePlan plan_;
  std::vector<uint8_t> copy_;
};

}  // namespace

Block open(const uint8_t* data, size_t size, bool verify) {
  check_beginning(data, size);
  if (verify) check_checksum(data, size);
  Block block{};
  block.rows = load<uint32_t>(data + kAtRows);
  block.width = load<uint32_t>(data + kAtWidth);
  block.vocab = load<uint32_t>(data + kAtVocab);
  block.min_count = load<uint32_t>(data + kAtMinCount);
  block.bits = data[kAtBits];
  block.count_bits = data[kAtCountBits];
  block.offset_bits = data[kAtOffsetBits];
  block.max_error = load<float>(data + kAtMaxError);
  block.payload_bits = load<uint64_t>(data + kAtPayloadBits);
  block.id_bits = load<uint64_t>(data + kAtIdBits);
  block.offset_bias = load<uint64_t>(data + kAtOffsetBias);
  check_header(block);
  place(block, data, size, data[kAtColumns]);
  return block;
}

void decode(const Block& block, uint64_t start, int64_t step, uint64_t count, const Output& output) {
  RowDecoder decoder(block);
  const uint64_t rows = block.rows;
  const auto row_of = [&](uint64_t i) {
    return start + static_cast<uint64_t>(static_cast<int64_t>(i) * step);
  };
  const bool together = lanes_usable();
  for (uint64_t i = 0; i < count;) {
    int32_t* ids = output.ids + i * block.width;
    float* log_probs = output.log_probs + i * block.width;
    if (together && i + kLanes <= count && decoder.rows(row_of(i), step, ids, log_probs)) {
      i += kLanes;
    } else {
      decoder.row(row_of(i++), ids, log_probs);
    }
  }
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t row = row_of(i);
    output.log_tail[i] = load<float>(block.log_tail + 4 * row);
    if (!(output.log_tail[i] < kInf)) damaged("the tail of row " + std::to_string(row) + " is damaged");
    for (size_t c = 0; c < output.columns.size(); ++c) {
      output.columns[c][i] = load<float>(block.column_data + 4 * (rows * c + row));
    }
  }
}

}  // namespace codec
}  // namespace kd

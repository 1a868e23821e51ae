// Rows to one block of bytes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>

#include "codec.h"
#include "codec_bits.h"
#include "codec_format.h"
#include "codec_ids.h"
#include "codec_values.h"

namespace kd {
namespace codec {
namespace {

constexpr float kLargestLogProb = 0.01f;  // rounding may lift a log-probability above 0, but not by this much

constexpr uint64_t kMostReserved = uint64_t{1} << 30;  // bits, before it is known what the rows hold

[[noreturn]] void refuse(const std::string& name, const std::string& value, const std::string& rule) {
  throw BadArgument(name + " = " + value + ": must be " + rule);
}

std::string at(const char* name, uint64_t row) { return std::string(name) + "[" + std::to_string(row) + "]"; }

std::string at(const char* name, uint64_t row, uint64_t column) {
  return std::string(name) + "[" + std::to_string(row) + ", " + std::to_string(column) + "]";
}

void check_log_prob(float value, const std::string& name) {
  if (value <= kLargestLogProb) return;
  refuse(name, std::to_string(value),
         "a log-probability, at most 0; NaN and logits are not: use log_softmax's output");
}

// Kept entries of a row, after its ids and log-probabilities have been checked.
uint32_t checked_count(const Input& input, uint64_t row) {
  const int32_t* ids = input.ids + row * input.width;
  const float* log_probs = input.log_probs + row * input.width;
  uint32_t count = 0;
  while (count < input.width && ids[count] != -1) {
    const int64_t id = ids[count];
    if (id < 0 || id >= static_cast<int64_t>(input.vocab)) {
      const std::string rule =
          "in [0, " + std::to_string(input.vocab) + "), below vocab_size, or -1 as padding";
      refuse(at("ids", row, count), std::to_string(id), rule + "; check vocab_size");
    }
    if (count && id <= ids[count - 1]) {
      const std::string rule = "greater than the id before it, " + std::to_string(ids[count - 1]);
      refuse(at("ids", row, count), std::to_string(id), rule + "; sort each row's ids, each id once");
    }
    if (!(log_probs[count] <= kLargestLogProb)) check_log_prob(log_probs[count], at("log_probs", row, count));
    ++count;
  }
  for (uint64_t i = count; i < input.width; ++i) {
    if (ids[i] == -1) continue;
    refuse(at("ids", row, i), std::to_string(ids[i]), "-1 after the first -1; put the padding last");
  }
  if (!(input.log_tail[row] <= kLargestLogProb)) check_log_prob(input.log_tail[row], at("log_tail", row));
  return count;
}

void check_input(const Input& input) {
  const unsigned bits = static_cast<unsigned>(input.bits);
  const bool known =
      bits == kHalfBits || bits == kExactBits || (bits >= kMinQuantisedBits && quantised(bits));
  if (!known) refuse("bits", std::to_string(input.bits), "4 to 12, 16 (float16) or 32 (exact float32)");
  if (input.vocab < 1 || input.vocab > kMaxVocab)
    refuse("vocab_size", std::to_string(input.vocab), "1 to 2^31 - 1");
  if (input.width > input.vocab) {
    const std::string rule = "at most vocab_size = " + std::to_string(input.vocab);
    refuse("ids' width K", std::to_string(input.width), rule + ": no row keeps more entries than there are");
  }
  if (input.rows > kMaxRows) {
    refuse("rows", std::to_string(input.rows),
           "at most " + std::to_string(kMaxRows) + "; encode several blocks");
  }
  if (input.columns.size() > kMaxColumns)
    refuse("columns", std::to_string(input.columns.size()), "at most 255");
  std::set<std::string> names;
  for (const InputColumn& column : input.columns) {
    const bool fits = !column.name.empty() && column.name.size() <= kMaxNameBytes;
    if (!fits || !names.insert(column.name).second) {
      refuse("columns", "'" + column.name + "'", "distinct names of 1 to 255 bytes");
    }
  }
}

struct Encoded {
  std::vector<uint32_t> counts;
  std::vector<uint64_t> starts;  // rows + 1
  std::vector<float> anchors;
  std::vector<uint16_t> steps;
  std::vector<uint8_t> payload;
  uint64_t id_bits = 0;
  float max_error = 0;
};

void put_row(const Input& input, uint64_t row, uint32_t count, BitWriter& stream, RowValues& values,
             Encoded& out) {
  const auto bits = static_cast<unsigned>(input.bits);
  const float* log_probs = input.log_probs + row * input.width;
  const uint64_t start = stream.position();
  put_ids(stream, input.ids + row * input.width, count, 0, static_cast<uint32_t>(input.vocab) - 1);
  out.id_bits += stream.position() - start;
  values.codes.resize(count);
  if (bits == kExactBits) {
    raw_row(log_probs, count, values);
  } else if (bits == kHalfBits) {
    half_row(log_probs, count, values);
  } else {
    quantise_row(log_probs, count, bits, values);
    out.anchors.push_back(values.anchor);
    out.steps.push_back(values.step);
  }
  const unsigned width = quantised(bits) && values.step == kRawRow ? kExactBits : bits;
  for (const uint32_t code : values.codes) stream.put(code, width);
  out.max_error = std::max(out.max_error, values.max_error);
}

Encoded encode_rows(const Input& input) {
  Encoded out;
  BitWriter stream;
  // About what rows without padding take.
  const unsigned each =
      static_cast<unsigned>(input.bits) + 2 + bit_length(input.vocab / std::max<uint64_t>(1, input.width));
  stream.expect(std::min(input.rows * input.width * each, kMostReserved));
  RowValues values;
  for (uint64_t row = 0; row < input.rows; ++row) {
    out.starts.push_back(stream.position());
    out.counts.push_back(checked_count(input, row));
    put_row(input, row, out.counts.back(), stream, values, out);
    if (stream.position() > kMaxPayloadBits) {
      refuse("rows", std::to_string(input.rows), "fewer: a block holds 2^40 bits; encode several blocks");
    }
  }
  out.starts.push_back(stream.position());
  out.payload = stream.finish();
  return out;
}

template <class T>
void append(std::vector<uint8_t>& bytes, T value) {
  bytes.resize(bytes.size() + sizeof(T));
  store(bytes.data() + bytes.size() - sizeof(T), value);
}

template <class T>
void append_all(std::vector<uint8_t>& bytes, const T* values, size_t count) {
  const size_t begin = bytes.size();
  bytes.resize(begin + count * sizeof(T));
  for (size_t i = 0; i < count; ++i) store(bytes.data() + begin + i * sizeof(T), values[i]);
}

// Appends `values` in as few bits each as the largest needs; returns that number.
unsigned append_packed(std::vector<uint8_t>& bytes, const std::vector<uint64_t>& values) {
  uint64_t any = 0;
  for (const uint64_t value : values) any |= value;
  const unsigned bits = bit_length(any);
  BitWriter stream;
  for (const uint64_t value : values) stream.put(value, bits);
  const std::vector<uint8_t> packed = stream.finish();
  bytes.insert(bytes.end(), packed.begin(), packed.end());
  return bits;
}

// Where rows start, less where they would if all were equally long, plus the least bias that makes this >= 0.
uint64_t start_residuals(const std::vector<uint64_t>& starts, std::vector<uint64_t>& residuals) {
  const uint64_t rows = starts.size() - 1, total = starts.back();
  uint64_t bias = 0;
  for (uint64_t r = 0; r < rows; ++r) {
    const uint64_t even = r * total / rows;
    if (even > starts[r]) bias = std::max(bias, even - starts[r]);
  }
  for (uint64_t r = 0; r < rows; ++r) residuals.push_back(starts[r] + bias - r * total / rows);
  return bias;
}

void append_names(std::vector<uint8_t>& bytes, const std::vector<InputColumn>& columns) {
  for (const InputColumn& column : columns) {
    bytes.push_back(static_cast<uint8_t>(column.name.size()));
    bytes.insert(bytes.end(), column.name.begin(), column.name.end());
  }
}

}  // namespace

std::vector<uint8_t> encode(const Input& input) {
  check_input(input);
  const Encoded rows = encode_rows(input);
  std::vector<uint8_t> out(kHeaderBytes);
  append_names(out, input.columns);
  const size_t names_bytes = out.size() - kHeaderBytes;
  out.reserve(rows.payload.size() + 1024 + input.rows * (4 * input.columns.size() + 32));
  append_all(out, input.log_tail, input.rows);
  for (const InputColumn& column : input.columns) append_all(out, column.data, input.rows);
  append_all(out, rows.anchors.data(), rows.anchors.size());
  append_all(out, rows.steps.data(), rows.steps.size());
  const auto least = std::min_element(rows.counts.begin(), rows.counts.end());
  const uint32_t min_count = least == rows.counts.end() ? 0 : *least;
  std::vector<uint64_t> extra, residuals;
  for (const uint32_t count : rows.counts) extra.push_back(count - min_count);
  const unsigned count_bits = append_packed(out, extra);
  const uint64_t bias = start_residuals(rows.starts, residuals);
  const unsigned offset_bits = append_packed(out, residuals);
  out.insert(out.end(), rows.payload.begin(), rows.payload.end());
  const uint64_t entries = input.rows * input.width;
  const uint64_t least_bytes = (entries + kMaxEntriesPerByte - 1) / kMaxEntriesPerByte;
  out.resize(
      std::max<uint64_t>(out.size(), least_bytes));  // mostly padding: a reader allocates in proportion
  uint8_t* header = out.data();
  std::copy(kMagic, kMagic + 4, header + kAtMagic);
  store<uint16_t>(header + kAtVersion, kVersion);
  store<uint8_t>(header + kAtBits, static_cast<uint8_t>(input.bits));
  store<uint8_t>(header + kAtColumns, static_cast<uint8_t>(input.columns.size()));
  store<uint32_t>(header + kAtRows, static_cast<uint32_t>(input.rows));
  store<uint32_t>(header + kAtWidth, static_cast<uint32_t>(input.width));
  store<uint32_t>(header + kAtVocab, static_cast<uint32_t>(input.vocab));
  store<uint32_t>(header + kAtMinCount, min_count);
  store<uint8_t>(header + kAtCountBits, static_cast<uint8_t>(count_bits));
  store<uint8_t>(header + kAtOffsetBits, static_cast<uint8_t>(offset_bits));
  store<uint16_t>(header + kAtNamesBytes, static_cast<uint16_t>(names_bytes));
  store<float>(header + kAtMaxError, rows.max_error);
  store<uint64_t>(header + kAtPayloadBits, rows.starts.back());
  store<uint64_t>(header + kAtIdBits, rows.id_bits);
  store<uint64_t>(header + kAtOffsetBias, bias);
  store<uint64_t>(header + kAtTotalBytes, out.size() + kChecksumBytes);
  append<uint32_t>(out, crc32c(out.data(), out.size()));
  return out;
}

}  // namespace codec
}  // namespace kd

// Blocks of sparse distributions as bytes and back. Torch-free and Python-free;
// kdkernels/compression/format.py says what each byte means.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace kd {
namespace codec {

// The bytes are not a block that can be read.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Something that cannot be encoded: names the argument, its value, what is allowed, what to do.
struct BadArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct InputColumn {
  std::string name;
  const float* data;  // [rows]
};

struct Input {
  uint64_t rows, width;
  const int32_t* ids;      // [rows, width], ascending, -1 after the last kept entry
  const float* log_probs;  // [rows, width]
  const float* log_tail;   // [rows]
  uint64_t vocab;
  int bits;
  std::vector<InputColumn> columns;
};

std::vector<uint8_t> encode(const Input& input);

// A block whose header has been checked against the number of its bytes. Points into them.
struct Block {
  uint32_t rows, width, vocab, min_count;
  unsigned bits, count_bits, offset_bits;
  float max_error;
  uint64_t payload_bits, id_bits, offset_bias;
  std::vector<std::string> columns;
  const uint8_t *log_tail, *column_data, *anchors, *steps, *counts, *offsets, *payload, *end;
};

Block open(const uint8_t* data, size_t size, bool verify);

// Where the rows start, start + step, ... (count of them) are written, densely.
struct Output {
  int32_t* ids;                 // [count, width]
  float* log_probs;             // [count, width]
  float* log_tail;              // [count]
  std::vector<float*> columns;  // [count] each
};

void decode(const Block& block, uint64_t start, int64_t step, uint64_t count, const Output& output);

uint32_t crc32c(const uint8_t* data, size_t size);
uint32_t crc32c_portable(const uint8_t* data, size_t size);  // the same without the processor's instruction

}  // namespace codec
}  // namespace kd

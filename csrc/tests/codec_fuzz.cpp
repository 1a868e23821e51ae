// Damages blocks of the codec and decodes what is left, meant to be built with ASan and UBSan: codec_fuzz
// [BLOCKS]. Every block is a heap block of exactly its size. With its checksum as it was, a damaged block
// must be refused; with the checksum made right again it must be refused or decode to ascending ids inside
// the vocabulary, within what its size allows to allocate. Undamaged blocks must decode to what was encoded,
// rows together and one by one. Torch-free.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <set>

#include "codec.h"
#include "codec_bits.h"
#include "codec_format.h"

namespace {

using namespace kd::codec;
using Random = std::mt19937_64;

constexpr float kInf = std::numeric_limits<float>::infinity();

uint64_t below(Random& random, uint64_t n) { return random() % n; }

template <class T, size_t N>
T pick(Random& random, const T (&choices)[N]) {
  return choices[below(random, N)];
}

[[noreturn]] void fail(uint64_t seed, const char* what) {
  std::fprintf(stderr, "codec_fuzz: seed %llu: %s\n", static_cast<unsigned long long>(seed), what);
  std::exit(1);
}

struct Rows {
  std::vector<int32_t> ids;
  std::vector<float> log_probs, log_tail, extra;
  Input input;
};

void fill_row(Random& random, Rows& rows, uint64_t row, uint32_t count) {
  const uint64_t width = rows.input.width, vocab = rows.input.vocab;
  std::set<int32_t> chosen;
  const uint64_t span =
      below(random, 3) ? vocab : std::max<uint64_t>(count, vocab / 50);  // some rows are crowded
  while (chosen.size() < count) chosen.insert(static_cast<int32_t>(below(random, span)));
  std::copy(chosen.begin(), chosen.end(), rows.ids.begin() + static_cast<int64_t>(row * width));
  const double scale = pick(random, {0.0, 1.0, 15.0, 400.0, 3e4});
  for (uint32_t i = 0; i < count; ++i) {
    const float value = -static_cast<float>(scale * static_cast<double>(below(random, 1001)) / 1000);
    rows.log_probs[row * width + i] = below(random, 40) ? value : -kInf;
  }
  rows.log_tail[row] = below(random, 5) ? -static_cast<float>(below(random, 1000)) / 100 : -kInf;
}

std::unique_ptr<Rows> make_rows(Random& random) {
  auto made = std::make_unique<Rows>();
  Input& input = made->input;
  input.vocab = pick(random, {1u, 2u, 7u, 301u, 32000u, 151936u, 2147483647u});
  input.width = std::min<uint64_t>(pick(random, {0u, 1u, 2u, 5u, 16u, 64u, 301u}), input.vocab);
  input.rows = pick(random, {0u, 1u, 2u, 15u, 16u, 17u, 40u});
  input.bits = static_cast<int>(pick(random, {4u, 5u, 7u, 8u, 11u, 12u, 16u, 32u}));
  made->ids.assign(input.rows * input.width, -1);
  made->log_probs.assign(input.rows * input.width, -kInf);
  made->log_tail.assign(input.rows, 0), made->extra.assign(input.rows, 1.5f);
  const bool equal = below(random, 2);
  for (uint64_t row = 0; row < input.rows; ++row) {
    fill_row(random, *made, row, static_cast<uint32_t>(equal ? input.width : below(random, input.width + 1)));
  }
  input.ids = made->ids.data(), input.log_probs = made->log_probs.data(),
  input.log_tail = made->log_tail.data();
  if (below(random, 2)) input.columns = {{"entropy", made->extra.data()}, {"x", made->extra.data()}};
  return made;
}

struct Decoded {
  std::vector<int32_t> ids;
  std::vector<float> log_probs, log_tail;
  std::vector<std::vector<float>> columns;
};

Decoded read(const Block& block, uint64_t start, int64_t step, uint64_t count) {
  Decoded rows;
  rows.ids.resize(count * block.width), rows.log_probs.resize(count * block.width),
      rows.log_tail.resize(count);
  rows.columns.assign(block.columns.size(), std::vector<float>(count));
  Output output{rows.ids.data(), rows.log_probs.data(), rows.log_tail.data(), {}};
  for (auto& column : rows.columns) output.columns.push_back(column.data());
  decode(block, start, step, count, output);
  return rows;
}

void check_round_trip(uint64_t seed, const Rows& rows, const std::vector<uint8_t>& bytes) {
  const Block block = open(bytes.data(), bytes.size(), true);
  const Decoded all = read(block, 0, 1, block.rows);
  if (all.ids != rows.ids) fail(seed, "ids differ");
  if (all.log_tail != rows.log_tail) fail(seed, "tails differ");
  for (size_t i = 0; i < all.ids.size(); ++i) {
    const float a = rows.log_probs[i], b = all.log_probs[i];
    if (a != b && !(std::fabs(a - b) <= block.max_error))
      fail(seed, "a log-probability is off by more than stated");
  }
  for (uint32_t row = 0; row < block.rows; ++row) {
    const Decoded one = read(block, block.rows - 1 - row, -1, 1);
    const auto at = static_cast<int64_t>(uint64_t{block.rows - 1 - row} * block.width);
    const bool same = std::equal(one.ids.begin(), one.ids.end(), all.ids.begin() + at) &&
                      std::equal(one.log_probs.begin(), one.log_probs.end(), all.log_probs.begin() + at);
    if (!same) fail(seed, "a row alone differs from the row among others");
  }
}

void set_hostile_field(Random& random, std::vector<uint8_t>& bytes) {
  const unsigned at =
      pick(random, {kAtBits, kAtColumns, kAtRows, kAtWidth, kAtVocab, kAtMinCount, kAtCountBits,
                    kAtOffsetBits, kAtNamesBytes, kAtMaxError, kAtPayloadBits, kAtOffsetBias});
  const uint64_t value =
      pick(random, {uint64_t{0}, uint64_t{1}, uint64_t{0x7f}, uint64_t{0xff}, uint64_t{0xffff},
                    uint64_t{0x7fffffff}, uint64_t{0xffffffff}, ~uint64_t{0}, random()});
  const bool wide = at == kAtPayloadBits || at == kAtOffsetBias;
  const bool narrow = at == kAtBits || at == kAtColumns || at == kAtCountBits || at == kAtOffsetBits;
  const size_t size = wide ? 8 : narrow ? 1 : at == kAtNamesBytes ? 2 : 4;
  const uint64_t nudged = below(random, 2) ? value : load<uint64_t>(bytes.data() + at) + below(random, 5) - 2;
  uint8_t raw[8];
  store(raw, nudged);
  std::copy(raw, raw + size, bytes.begin() + at);
}

void flip_bits(Random& random, std::vector<uint8_t>& bytes) {
  for (uint64_t n = 1 + below(random, 8); n; --n)
    bytes[below(random, bytes.size())] ^= 1u << below(random, 8);
}

void swap_parts(Random& random, std::vector<uint8_t>& bytes) {
  const uint64_t length = 1 + below(random, std::max<size_t>(1, bytes.size() / 3));
  const uint64_t a = below(random, bytes.size() - length + 1), b = below(random, bytes.size() - length + 1);
  const std::vector<uint8_t> kept(bytes.begin() + static_cast<int64_t>(a),
                                  bytes.begin() + static_cast<int64_t>(a + length));
  std::copy_n(bytes.begin() + static_cast<int64_t>(b), length, bytes.begin() + static_cast<int64_t>(a));
  std::copy(kept.begin(), kept.end(), bytes.begin() + static_cast<int64_t>(b));
}

std::vector<uint8_t> damage(Random& random, std::vector<uint8_t> bytes) {
  switch (below(random, 5)) {
    case 0:
      flip_bits(random, bytes);
      break;
    case 1:
      bytes.resize(below(random, bytes.size()));
      break;
    case 2:
      swap_parts(random, bytes);
      break;
    case 3:
      bytes.resize(bytes.size() + 1 + below(random, 64), static_cast<uint8_t>(random()));
      break;
    default:
      for (uint64_t n = 1 + below(random, 2); n; --n) set_hostile_field(random, bytes);
  }
  return bytes;
}

// Bytes with nothing behind them that can be read.
class Fenced {
 public:
  Fenced(const std::vector<uint8_t>& bytes, bool by_page) : size_(bytes.size()) {
    if (by_page) {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      mapped_ = (size_ + page - 1) / page * page + page;
      void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (map == MAP_FAILED) std::abort();
      start_ = static_cast<uint8_t*>(map);
      if (mprotect(start_ + mapped_ - page, page, PROT_NONE) != 0) std::abort();
      data_ = start_ + mapped_ - page - size_;
    } else {
      data_ = start_ = new uint8_t[size_];
    }
    std::copy(bytes.begin(), bytes.end(), data_);
  }
  ~Fenced() {
    if (mapped_) {
      munmap(start_, mapped_);
    } else {
      delete[] start_;
    }
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  const uint8_t* data() const { return data_; }

 private:
  size_t size_, mapped_ = 0;
  uint8_t *start_, *data_;
};

// Decodes everything that a reader could ask of these bytes; true if nothing was refused.
bool survives(uint64_t seed, Random& random, const std::vector<uint8_t>& given, bool verify) {
  const Fenced exact(given, below(random, 2));
  try {
    const Block block = open(exact.data(), given.size(), verify);
    if (uint64_t{block.rows} * block.width > kMaxEntriesPerByte * given.size())
      fail(seed, "too much is allocated");
    const uint64_t first = block.rows ? below(random, block.rows) : 0;
    if (block.rows) read(block, first, -1, first + 1);
    const Decoded rows = read(block, 0, 1, block.rows);
    for (uint64_t row = 0; row < block.rows; ++row) {
      int64_t before = -1;
      bool ended = false;
      for (uint32_t i = 0; i < block.width; ++i) {
        const int32_t id = rows.ids[row * block.width + i];
        ended |= id == -1;
        if (ended ? id != -1 : (id <= before || id >= static_cast<int64_t>(block.vocab)))
          fail(seed, "ids are wrong");
        if (std::isnan(rows.log_probs[row * block.width + i])) fail(seed, "a log-probability is NaN");
        before = id;
      }
    }
    return true;
  } catch (const Error&) {
    return false;
  }
}

void make_right(std::vector<uint8_t>& bytes) {
  if (bytes.size() < kHeaderBytes + kChecksumBytes) return;
  store<uint64_t>(bytes.data() + kAtTotalBytes, bytes.size());
  const size_t end = bytes.size() - kChecksumBytes;
  store<uint32_t>(bytes.data() + end, crc32c(bytes.data(), end));
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t blocks = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 500;
  uint64_t refused = 0, decoded = 0;
  for (uint64_t seed = 1; seed <= blocks; ++seed) {
    Random random(seed);
    const std::unique_ptr<Rows> rows = make_rows(random);
    const std::vector<uint8_t> block = encode(rows->input);
    check_round_trip(seed, *rows, block);
    for (int i = 0; i < 20; ++i) {
      std::vector<uint8_t> bytes = damage(random, block);
      if (bytes != block && survives(seed, random, bytes, true)) fail(seed, "damage was not detected");
      survives(seed, random, bytes, false);
      make_right(bytes);
      ++(survives(seed, random, bytes, true) ? decoded : refused);
    }
  }
  std::printf(
      "codec_fuzz: %llu blocks, damaged 20 ways each: none accepted by its checksum; with the checksum made "
      "right %llu refused, %llu decoded, none harmful\n",
      static_cast<unsigned long long>(blocks), static_cast<unsigned long long>(refused),
      static_cast<unsigned long long>(decoded));
  return 0;
}

// Ids of sixteen rows at once. Decoding one row is a chain: where a number begins follows from the numbers
// before it. Rows with equally many ids go through the same middles in the same order, so sixteen chains fit
// one vector.
#pragma once
#include <cstdint>
#include <vector>

namespace kd {
namespace codec {

constexpr unsigned kLanes = 16;
constexpr uint32_t kMostIdsInLanes = 4096;  // a table of (ids + 2) * 64 bytes stays in the second-level cache

// The order in which the ids of a row of `count` are decoded, each with the two that bound it; 0 and count +
// 1 stand for the ends of the vocabulary.
class LanePlan {
 public:
  struct Step {
    uint32_t middle, left, right;
  };
  void prepare(uint32_t count);
  uint32_t count() const { return static_cast<uint32_t>(steps_.size()); }
  const std::vector<Step>& steps() const { return steps_; }
  int32_t* table() { return reinterpret_cast<int32_t*>(table_.data()); }

 private:
  struct alignas(64) Line {
    int32_t ids[kLanes];
  };
  void add(uint32_t first, uint32_t count, uint32_t left, uint32_t right);
  std::vector<Step> steps_;
  std::vector<Line> table_;
};

struct Lanes {
  const uint8_t* bytes;  // every `stop` has 8 bytes behind it
  uint64_t position[kLanes], stop[kLanes];
  int32_t* out[kLanes];
};

bool lanes_usable();  // on this processor, unless KDKERNELS_ISA asks for less

// Decodes plan.count() ids of every lane; a lane whose position is not its stop afterwards is damaged.
void decode_lanes(LanePlan& plan, uint32_t vocab, Lanes& lanes);

}  // namespace codec
}  // namespace kd

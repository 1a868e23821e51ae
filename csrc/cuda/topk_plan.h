// How a top-k call on a GPU becomes launches: blocks a row, capacity, scratch. Host code without CUDA and
// without torch, so that tests can run the very launches elsewhere.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "topk.h"

#define KD_TOPK_MOST 4096  // largest k
#define KD_TOPK_SUMS 4     // temperatures that one further sweep over the logits serves

extern "C" {

// What a kernel of topk.cu receives.
struct kd_topk_arguments {
  const void* logits;
  int64_t row_stride;
  const float* bias;
  float scale, softcap;
  float exponent, inverse_temperature;  // log2(e) / T and 1 / T
  int32_t vocab, k, capacity;
  int32_t splits, segment;  // blocks that share a row, and how many entries each looks at
  int32_t* ids;
  float* log_probs;
  float* log_tail;
  unsigned long long*
      candidates;  // [rows, splits, k], with more than one block a row: each block's largest entries
  float* tails;    // [rows, splits, 2]: and the sum over its others
  // For entropy and other temperatures, else NULL:
  float* kept;   // [rows, k] selected logits before the soft cap, -inf as padding
  float* state;  // [rows, 4]: largest logit, log-sum, largest of the tail; the number of kept entries
  unsigned long long* least;  // [rows] the last kept entry
  float* sums;                // [rows, sum_splits, KD_TOPK_SUMS + 1]
  int32_t sum_splits, sum_segment;
  int32_t temperatures;           // of this sweep
  float exponents[KD_TOPK_SUMS];  // log2(e) / T of each
  float inverses[KD_TOPK_SUMS];   // 1 / T of each
  float* outputs[KD_TOPK_SUMS];   // where log tail mass at that temperature goes, or NULL
  int64_t output_stride;          // between rows of `outputs`
  float* entropy;                 // at exponents[0], or NULL
};

enum kd_topk_kernel {
  KD_TOPK_ROWS = 0,
  KD_TOPK_SUM = 6,
  KD_TOPK_MERGE = 12,
  KD_TOPK_FINISH = 13,
  KD_TOPK_KERNELS = 14
};

struct kd_topk_launch {
  int32_t kernel;  // kd_topk_kernel; of ROWS and SUM: + dtype, + 3 with bias, scale or soft cap
  int32_t grid_x, grid_y, threads, shared;
  kd_topk_arguments arguments;
};

// `kd_topk` with pointers to device memory, float32 as its accumulation dtype (KD_F64 is not served), k at
// most KD_TOPK_MOST, rows and vocab below 2^31. Starts everything on the stream: no synchronisation, no
// allocation. 0, or a cudaError_t.
int kd_topk_cuda(const kd_topk* call, void* scratch, int multiprocessors, void* stream);
}

namespace kd {
namespace topk {

constexpr int kBlockThreads = 512;   // kThreads in topk_block.cuh
constexpr int kLeastSegment = 2048;  // entries a block gets at least: four a thread
constexpr int kSpare = 16;           // slots beyond the capacity: more than entries outside whole vectors
constexpr size_t kAlign = 256;
constexpr double kLog2E = 1.4426950408889634;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Split {
  int64_t blocks, entries;
};

// Two blocks of 512 threads fit a multiprocessor: enough of them to fill the chip, none with too little to
// do.
inline Split split_row(int64_t rows, int64_t vocab, int64_t least, int multiprocessors) {
  const int64_t wanted = rows >= multiprocessors ? 1 : divide_up(2 * int64_t{multiprocessors}, rows);
  const int64_t blocks = std::clamp<int64_t>(vocab / least, 1, wanted);
  const int64_t entries =
      divide_up(divide_up(vocab, blocks), 64) * 64;  // every block's first entry is aligned alike
  return {divide_up(vocab, entries), entries};
}

struct Layout {
  Split select, sum;
  bool extras;
  size_t candidates, tails, kept, state, least, sums, bytes;

  Layout(const kd_topk& c, int multiprocessors)
      : select(split_row(c.rows, c.vocab, std::max<int64_t>(kLeastSegment, 16 * c.k), multiprocessors)),
        sum(split_row(c.rows, c.vocab, kLeastSegment, multiprocessors)),
        extras(c.entropy || c.others > 0) {
    const size_t rows = static_cast<size_t>(c.rows), k = static_cast<size_t>(c.k);
    const size_t blocks = select.blocks > 1 ? static_cast<size_t>(select.blocks) : 0;
    bytes = 0;
    candidates = take(rows * blocks * k * 8);
    tails = take(rows * blocks * 2 * 4);
    kept = take(extras ? rows * k * 4 : 0);
    state = take(extras ? rows * 4 * 4 : 0);
    least = take(extras ? rows * 8 : 0);
    sums = take(extras ? rows * static_cast<size_t>(sum.blocks) * (KD_TOPK_SUMS + 1) * 4 : 0);
  }

  size_t take(size_t size) {
    const size_t at = bytes;
    bytes += (size + kAlign - 1) / kAlign * kAlign;
    return at;
  }
};

inline kd_topk_arguments base_arguments(const kd_topk& c, const Layout& layout, char* scratch) {
  kd_topk_arguments a{};
  a.logits = c.logits.data;
  a.row_stride = c.logits.row_stride;
  a.bias = static_cast<const float*>(c.logits.bias);
  a.scale = static_cast<float>(c.logits.scale);
  a.softcap = static_cast<float>(c.logits.softcap);
  a.exponent = static_cast<float>(kLog2E / c.temperature);
  a.inverse_temperature = static_cast<float>(1 / c.temperature);
  a.vocab = static_cast<int32_t>(c.vocab);
  a.k = static_cast<int32_t>(c.k);
  a.capacity = c.k <= 256 ? 4096 : 8192;
  a.splits = static_cast<int32_t>(layout.select.blocks);
  a.segment = static_cast<int32_t>(layout.select.entries);
  a.ids = c.ids;
  a.log_probs = static_cast<float*>(c.log_probs);
  a.log_tail = static_cast<float*>(c.log_tail);
  a.candidates = reinterpret_cast<unsigned long long*>(scratch + layout.candidates);
  a.tails = reinterpret_cast<float*>(scratch + layout.tails);
  if (!layout.extras) return a;
  a.kept = reinterpret_cast<float*>(scratch + layout.kept);
  a.state = reinterpret_cast<float*>(scratch + layout.state);
  a.least = reinterpret_cast<unsigned long long*>(scratch + layout.least);
  a.sums = reinterpret_cast<float*>(scratch + layout.sums);
  a.sum_splits = static_cast<int32_t>(layout.sum.blocks);
  a.sum_segment = static_cast<int32_t>(layout.sum.entries);
  return a;
}

// The sweeps for entropy (at the call's own temperature, first) and further temperatures.
inline void add_sums(const kd_topk& c, const kd_topk_arguments& base, int variant,
                     std::vector<kd_topk_launch>* launches) {
  const int64_t own = c.entropy ? 1 : 0;
  for (int64_t first = 0; first < own + c.others; first += KD_TOPK_SUMS) {
    kd_topk_arguments a = base;
    a.temperatures = static_cast<int32_t>(std::min<int64_t>(KD_TOPK_SUMS, own + c.others - first));
    a.entropy = first == 0 ? static_cast<float*>(c.entropy) : nullptr;
    a.output_stride = c.others;
    for (int j = 0; j < a.temperatures; ++j) {
      const int64_t other = first + j - own;
      const double temperature = other < 0 ? c.temperature : c.other_temperatures[other];
      a.exponents[j] = static_cast<float>(kLog2E / temperature);
      a.inverses[j] = static_cast<float>(1 / temperature);
      a.outputs[j] = other < 0 ? nullptr : static_cast<float*>(c.other_tails) + other;
    }
    const auto rows = static_cast<int32_t>(c.rows);
    launches->push_back({KD_TOPK_SUM + variant, rows, a.sum_splits, kBlockThreads, 0, a});
    launches->push_back({KD_TOPK_FINISH, rows, 1, kBlockThreads, 0, a});
  }
}

// The launches in order.
inline std::vector<kd_topk_launch> plan(const kd_topk& c, void* scratch, int multiprocessors) {
  const Layout layout(c, multiprocessors);
  const kd_topk_arguments a = base_arguments(c, layout, static_cast<char*>(scratch));
  const bool plain = !c.logits.bias && c.logits.scale == 1 && c.logits.softcap == 0;
  const int variant = c.dtype + (plain ? 0 : 3);
  const auto rows = static_cast<int32_t>(c.rows);
  const int shared = (a.capacity + kSpare) * 8;
  std::vector<kd_topk_launch> launches{{KD_TOPK_ROWS + variant, rows, a.splits, kBlockThreads, shared, a}};
  if (a.splits > 1) launches.push_back({KD_TOPK_MERGE, rows, 1, kBlockThreads, shared, a});
  add_sums(c, a, variant, &launches);
  return launches;
}

inline const char* kernel_name(int kernel) {
  static const char* const names[KD_TOPK_KERNELS] = {
      "kd_topk_rows_f32",      "kd_topk_rows_f16",       "kd_topk_rows_bf16",     "kd_topk_rows_head_f32",
      "kd_topk_rows_head_f16", "kd_topk_rows_head_bf16", "kd_topk_sums_f32",      "kd_topk_sums_f16",
      "kd_topk_sums_bf16",     "kd_topk_sums_head_f32",  "kd_topk_sums_head_f16", "kd_topk_sums_head_bf16",
      "kd_topk_merge",         "kd_topk_finish"};
  return names[kernel];
}

// Bytes of scratch that the launches need.
inline size_t scratch_bytes(const kd_topk& call, int multiprocessors) {
  return Layout(call, multiprocessors).bytes;
}

}  // namespace topk
}  // namespace kd

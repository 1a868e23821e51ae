// How a call of the gate on a GPU becomes launches: blocks a row, waves of rows, scratch. Host code without
// CUDA and without torch, so that tests can run the very launches elsewhere.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "gate.h"

#define KD_GATE_MOST_ROWS 0x7fffff
#define KD_GATE_MOST_VOCAB (1 << 22)  // masses are sums of 2^40

extern "C" {

// What a kernel of gate.cu receives.
struct kd_gate_side {
  const void* data;
  int64_t row_stride;
  const float* bias;
  float scale, softcap;
  int32_t dtype;
};
struct kd_gate_arguments {
  kd_gate_side sides[2];  // student, teacher
  const double *threshold, *uniforms;
  int64_t* token;
  uint8_t* from_teacher;
  float* jsd;
  double top_p;
  int32_t rows, vocab, top_k;
  int32_t greedy, filtered;           // filtered: tokens are left to kd_gate_filter
  float exponent;                     // log2(e) / T
  int32_t hot;                        // masses at T are wanted beside those at 1
  int32_t splits, share;              // blocks of a row; entries of each of their warps
  int32_t decide_first, decide_rows;  // rows of this launch whose normalisers are known, and
  int32_t norms_first, norms_rows;    // those whose normalisers it makes
  float* norms;                       // [rows, splits, 4]: largest logit and sum at T = 1 of both sides
  float* masses;                      // [rows, splits, warps, 4]: the same at T, of each warp
  float* parts;                       // [rows, splits]: twice the divergence of a block's entries
  uint32_t* arrived;                  // [rows]: blocks that have written theirs
  float* tops;                        // [rows]: the speaker's largest logit
};

enum kd_gate_kernel { KD_GATE_SWEEP = 0, KD_GATE_ANY = 3, KD_GATE_FILTER = 4, KD_GATE_KERNELS = 5 };

struct kd_gate_launch {
  int32_t kernel;  // kd_gate_kernel; of SWEEP: + dtype
  int32_t grid, threads;
  kd_gate_arguments arguments;
};

// What the launches are planned for.
struct kd_gate_machine {
  int32_t multiprocessors;
  int64_t cache;  // bytes of the second-level cache
};

// `kd_gate` with pointers to device memory, float32 as its accumulation dtype (KD_F64 is not served), rows
// and vocab at most KD_GATE_MOST_*. Starts everything on the stream: no synchronisation, no allocation. 0, or
// a cudaError_t.
int kd_gate_cuda(const kd_gate* call, void* scratch, kd_gate_machine machine, void* stream);
}

namespace kd {
namespace gate {

constexpr int kBlockThreads = 128, kBlockWarps = kBlockThreads / 32;
constexpr int kFilterThreads = 1024;
constexpr int kUnit = 256;             // a warp's share is a multiple: 32 lanes x 8 entries
constexpr int64_t kMostShare = 16384;  // what a block searches in one go
constexpr int64_t kBlocksEach = 4;     // of a multiprocessor, that a launch asks for in each of its two parts
constexpr size_t kAlign = 256;
constexpr double kLog2E = 1.4426950408889634;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t bytes_of(kd_dtype dtype) { return dtype == KD_F32 ? 4 : 2; }

// Rows go in waves. A launch sums up one wave, from memory, and decides on the wave before it, whose rows the
// second-level cache still holds: two waves take at most 0.8 of it. What fits in 0.6 is one wave.
struct Layout {
  int64_t wave, waves, splits, share;
  size_t norms, masses, parts, arrived, tops, bytes;

  Layout(const kd_gate& c, const kd_gate_machine& machine) {
    const int64_t row = c.vocab * (bytes_of(c.student_dtype) + bytes_of(c.teacher_dtype));
    const double all = static_cast<double>(row) * static_cast<double>(c.rows);
    const auto cache = static_cast<double>(machine.cache);
    const auto most = std::max<int64_t>(1, static_cast<int64_t>(0.4 * cache) / row);
    waves = all <= 0.6 * cache ? 1 : divide_up(c.rows, most);
    wave = divide_up(c.rows, waves);
    waves = divide_up(c.rows, wave);
    const int64_t wanted = divide_up(kBlocksEach * machine.multiprocessors, wave);
    const int64_t each = divide_up(c.vocab + 7, std::max<int64_t>(1, wanted) * kBlockWarps);
    share = std::min(divide_up(each, kUnit) * kUnit, kMostShare);
    splits = divide_up(c.vocab + 7, share * kBlockWarps);
    const auto rows = static_cast<size_t>(c.rows), blocks = rows * static_cast<size_t>(splits);
    bytes = 0;
    norms = take(blocks * 16);
    masses = take(blocks * 16 * kBlockWarps);
    parts = take(blocks * 4);
    arrived = take(rows * 4);
    tops = take(rows * 4);
  }

  size_t take(size_t size) {
    const size_t at = bytes;
    bytes += (size + kAlign - 1) / kAlign * kAlign;
    return at;
  }
};

inline kd_gate_side side_of(const kd_side& side, kd_dtype dtype) {
  return {side.data,
          side.row_stride,
          static_cast<const float*>(side.bias),
          static_cast<float>(side.scale),
          static_cast<float>(side.softcap),
          dtype};
}

inline bool is_plain(const kd_side& side) { return !side.bias && side.scale == 1 && side.softcap == 0; }

inline kd_gate_arguments arguments_of(const kd_gate& c, const Layout& layout, char* scratch) {
  kd_gate_arguments a{};
  a.sides[0] = side_of(c.student, c.student_dtype);
  a.sides[1] = side_of(c.teacher, c.teacher_dtype);
  a.threshold = c.threshold;
  a.uniforms = c.uniforms;
  a.token = c.token;
  a.from_teacher = c.from_teacher;
  a.jsd = static_cast<float*>(c.jsd);
  a.top_p = c.top_p;
  a.rows = static_cast<int32_t>(c.rows);
  a.vocab = static_cast<int32_t>(c.vocab);
  a.top_k = static_cast<int32_t>(c.top_k < c.vocab ? c.top_k : 0);
  a.greedy = c.uniforms ? 0 : 1;
  a.filtered = c.uniforms && (a.top_k > 0 || c.top_p < 1) ? 1 : 0;
  a.exponent = static_cast<float>(kLog2E / c.temperature);
  a.hot = c.uniforms && !a.filtered && c.temperature != 1 ? 1 : 0;
  a.splits = static_cast<int32_t>(layout.splits);
  a.share = static_cast<int32_t>(layout.share);
  a.norms = reinterpret_cast<float*>(scratch + layout.norms);
  a.masses = reinterpret_cast<float*>(scratch + layout.masses);
  a.parts = reinterpret_cast<float*>(scratch + layout.parts);
  a.arrived = reinterpret_cast<uint32_t*>(scratch + layout.arrived);
  a.tops = reinterpret_cast<float*>(scratch + layout.tops);
  return a;
}

// The launches in order.
inline std::vector<kd_gate_launch> plan(const kd_gate& c, void* scratch, const kd_gate_machine& machine) {
  const Layout layout(c, machine);
  const kd_gate_arguments base = arguments_of(c, layout, static_cast<char*>(scratch));
  const bool fast = c.student_dtype == c.teacher_dtype && is_plain(c.student) && is_plain(c.teacher);
  const int32_t kernel = fast ? KD_GATE_SWEEP + c.student_dtype : KD_GATE_ANY;
  const auto of_wave = [&](int64_t wave, int32_t* first, int32_t* rows) {
    const int64_t begin = std::clamp<int64_t>(wave * layout.wave, 0, c.rows);
    const int64_t end = std::clamp<int64_t>((wave + 1) * layout.wave, 0, c.rows);
    *first = static_cast<int32_t>(begin);
    *rows = static_cast<int32_t>(end - begin);
  };
  std::vector<kd_gate_launch> launches;
  for (int64_t wave = 0; wave <= layout.waves; ++wave) {
    kd_gate_launch launch{kernel, 0, kBlockThreads, base};
    kd_gate_arguments& a = launch.arguments;
    of_wave(wave - 1, &a.decide_first, &a.decide_rows);
    of_wave(wave, &a.norms_first, &a.norms_rows);
    launch.grid = (a.decide_rows + a.norms_rows) * a.splits;
    launches.push_back(launch);
  }
  if (base.filtered) launches.push_back({KD_GATE_FILTER, base.rows, kFilterThreads, base});
  return launches;
}

inline const char* kernel_name(int kernel) {
  static const char* const names[KD_GATE_KERNELS] = {"kd_gate_f32", "kd_gate_f16", "kd_gate_bf16",
                                                     "kd_gate_any", "kd_gate_filter"};
  return names[kernel];
}

// Bytes of scratch that the launches need.
inline size_t scratch_bytes(const kd_gate& call, const kd_gate_machine& machine) {
  return Layout(call, machine).bytes;
}

}  // namespace gate
}  // namespace kd

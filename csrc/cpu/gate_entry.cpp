// Who computes which block of the gate, and its C entry points.
//
// Each worker takes an equal number of whole rows: a row stays in its core's cache between the two sweeps.
// The rows that are left, fewer than there are workers (all of them in the steps of a single generation), are
// shared out in pieces. Workers claim pieces, each beginning with its own part of the row, so that it finds
// there what it has read before; nobody waits for a piece that nobody has claimed, so one worker alone comes
// to the end as well.
#include <sched.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "gate_isa.h"

namespace {

#if defined(__x86_64__) || defined(__i386__)
const kd_cpu_gate* const kAll[] = {&kd_gate_avx512, &kd_gate_avx2, &kd_gate_baseline};
inline void pause() { __builtin_ia32_pause(); }
#else
const kd_cpu_gate* const kAll[] = {&kd_gate_baseline};
inline void pause() {}
#endif

const kd_cpu_gate* chosen() {
  for (const kd_cpu_gate* k : kAll) {
    if (strcmp(k->name, kd_cpu_isa()) == 0) return k;
  }
  return nullptr;
}

constexpr int64_t kPiece = 2;  // blocks

int64_t blocks_of(const kd_gate* a) { return (a->vocab + kd_gate_block_size - 1) / kd_gate_block_size; }

int64_t pieces_of(const kd_gate* a) { return (blocks_of(a) + kPiece - 1) / kPiece; }

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Whether drawing takes more than the masses of the gate's own distribution.
bool shaped(const kd_gate* a) { return a->uniforms && (a->temperature != 1 || a->top_k || a->top_p < 1); }

size_t scratch_of(const kd_gate* a) {
  const size_t own = a->student_dtype == KD_F64 ? kd_gate64_scratch(a) : chosen() ? chosen()->scratch : 0;
  const size_t kept = shaped(a) || a->student_dtype == KD_F64 ? kd_gate_kept_scratch(a) : 0;
  return aligned(std::max(own, kept));
}

// What has been claimed and done of one row that is shared out.
struct Claims {
  std::atomic<int64_t> weighed, compared;  // pieces done
  std::atomic<uint8_t> taken[1];           // [2 pieces + 1]
};

size_t claims_bytes(const kd_gate* a) { return aligned(sizeof(Claims) + (size_t)(2 * pieces_of(a))); }

size_t blocks_bytes(const kd_gate* a) { return aligned((size_t)blocks_of(a) * sizeof(kd_gate_block)); }

// The memory that workers share: of each its scratch and a row's blocks; of each row that is left blocks and
// claims.
struct Layout {
  const kd_gate* a;
  int workers;
  char* shared;

  int64_t own_rows() const { return a->rows / workers; }
  int64_t left() const { return a->rows % workers; }
  size_t each() const { return scratch_of(a) + blocks_bytes(a); }
  void* scratch(int worker) const { return shared + (size_t)worker * each(); }
  kd_gate_block* own_blocks(int worker) const {
    return (kd_gate_block*)((char*)scratch(worker) + scratch_of(a));
  }
  char* rest() const { return shared + (size_t)workers * each(); }
  kd_gate_block* blocks(int64_t i) const { return (kd_gate_block*)(rest() + (size_t)i * blocks_bytes(a)); }
  Claims* claims(int64_t i) const {
    return (Claims*)(rest() + (size_t)left() * blocks_bytes(a) + (size_t)i * claims_bytes(a));
  }
  size_t bytes() const {
    return (size_t)workers * each() + (size_t)left() * (blocks_bytes(a) + claims_bytes(a));
  }
};

// The token, once the row is decided.
int finish(const kd_gate* a, int64_t row, bool usable, const kd_gate_block* blocks, void* scratch) {
  a->token[row] = -1;
  if (!usable || (a->uniforms && !(a->uniforms[row] >= 0 && a->uniforms[row] < 1))) return 0;
  if (shaped(a)) return kd_gate_kept(a, row, a->token + row, scratch);
  a->token[row] = chosen()->speak(a, row, blocks, scratch);
  return 0;
}

int row64(const kd_gate* a, int64_t row, void* scratch) {
  a->token[row] = -1;
  int64_t likeliest;
  if (!kd_gate64(a, row, &likeliest, scratch)) return 0;
  if (!a->uniforms) a->token[row] = likeliest;
  if (!a->uniforms || !(a->uniforms[row] >= 0 && a->uniforms[row] < 1)) return 0;
  return kd_gate_kept(a, row, a->token + row, scratch);
}

int whole_row(const kd_gate* a, int64_t row, bool more, kd_gate_block* blocks, void* scratch) {
  if (a->student_dtype == KD_F64) return row64(a, row, scratch);
  const kd_cpu_gate* k = chosen();
  k->open(a, row, scratch);
  k->weigh(a, row, 0, blocks_of(a), blocks, scratch);
  k->close(a, blocks, scratch);
  k->compare(a, row, 0, blocks_of(a), blocks, more, scratch);
  const bool usable = k->decide(a, row, blocks, scratch);
  return finish(a, row, usable, blocks, scratch);
}

bool claim(std::atomic<uint8_t>& taken) {
  return !taken.load(std::memory_order_relaxed) && !taken.exchange(1, std::memory_order_relaxed);
}

void wait_for(const std::atomic<int64_t>& done, int64_t count) {
  for (int tries = 0; done.load(std::memory_order_acquire) < count; ++tries) {
    if (tries < 10000) {
      pause();
    } else {
      sched_yield();  // whoever has the last piece may have lost its core
    }
  }
}

// work(first block, end) for every piece that nobody has claimed, from this worker's part of the row on.
template <class Work>
void take(const kd_gate* a, std::atomic<uint8_t>* taken, std::atomic<int64_t>& done, int worker, int workers,
          Work work) {
  const int64_t pieces = pieces_of(a), from = pieces * worker / workers;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t piece = (from + i) % pieces;
    if (!claim(taken[piece])) continue;
    work(piece * kPiece, std::min((piece + 1) * kPiece, blocks_of(a)));
    done.fetch_add(1, std::memory_order_release);
  }
}

// Adds this worker's part of a row that is shared out.
int part_of_row(const Layout& at, int64_t i, int worker) {
  const kd_gate* a = at.a;
  const kd_cpu_gate* k = chosen();
  const int64_t row = at.own_rows() * at.workers + i, pieces = pieces_of(a);
  Claims& claims = *at.claims(i);
  kd_gate_block* blocks = at.blocks(i);
  void* scratch = at.scratch(worker);
  if (a->student_dtype == KD_F64) return claim(claims.taken[0]) ? row64(a, row, scratch) : 0;
  k->open(a, row, scratch);
  take(a, claims.taken, claims.weighed, worker, at.workers,
       [&](int64_t begin, int64_t end) { k->weigh(a, row, begin, end, blocks, scratch); });
  wait_for(claims.weighed, pieces);
  k->close(a, blocks, scratch);
  take(a, claims.taken + pieces, claims.compared, worker, at.workers,
       [&](int64_t begin, int64_t end) { k->compare(a, row, begin, end, blocks, false, scratch); });
  if (!claim(claims.taken[2 * pieces])) return 0;
  wait_for(claims.compared, pieces);
  const bool usable = k->decide(a, row, blocks, scratch);
  return finish(a, row, usable, blocks, scratch);
}

}  // namespace

extern "C" {

size_t kd_gate_bytes(const kd_gate* args, int workers) { return Layout{args, workers, nullptr}.bytes(); }

void kd_gate_begin(const kd_gate* args, int workers, void* shared) {
  const Layout at{args, workers, (char*)shared};
  if (at.left()) memset((void*)at.claims(0), 0, (size_t)at.left() * claims_bytes(args));
}

int kd_gate_cpu(const kd_gate* args, int worker, int workers, void* shared) {
  if (!chosen()) return -2;
  if ((args->student_dtype == KD_F64) != (args->teacher_dtype == KD_F64)) return -1;
  const Layout at{args, workers, (char*)shared};
  int code = 0;
  const int64_t begin = at.own_rows() * worker, end = begin + at.own_rows();
  for (int64_t r = begin; r < end; ++r) {
    code |= whole_row(args, r, r + 1 < end, at.own_blocks(worker), at.scratch(worker));
  }
  for (int64_t i = 0; i < at.left(); ++i) code |= part_of_row(at, i, worker);
  return code;
}

}  // extern "C"

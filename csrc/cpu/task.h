// One call's constants, one row's state, and the sweeps over a row.
#pragma once
#include "sweep.h"

namespace KD_NS {

struct Parameters {
  float a, b;
};

// Two references a block: those its kept numbers are relative to.
struct References {
  float s, t;
};

// A block of both sides as divergences see it. Not a multiple of 4 KiB apart: loads wait for stores whose
// addresses agree in the lower 12 bits.
struct Sides {
  float lp[kBlock + 32], lq[kBlock + 32], p[kBlock + 32], q[kBlock + 32];
};

struct Task {
  const kd_rows* args;
  Source student, teacher;
  Parameters given;
  float per_t;             // 1 / T
  float *zs, *zt, *out;    // a block each
  Sides* sides;            // a block
  float* kept;             // a row
  References* references;  // one a block
};

inline int64_t blocks_in(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

// Bytes of scratch that `carve` hands out.
inline size_t scratch_bytes(int64_t vocab) {
  const size_t blocks = (size_t)blocks_in(vocab);
  return sizeof(Sides) + (3 * kBlock + blocks * kBlock) * sizeof(float) + blocks * sizeof(References);
}

inline void carve(Task& task, void* scratch) {
  task.zs = (float*)scratch;
  task.zt = task.zs + kBlock;
  task.out = task.zt + kBlock;
  task.sides = (Sides*)(task.out + kBlock);
  task.kept = (float*)(task.sides + 1);
  task.references = (References*)(task.kept + blocks_in(task.args->vocab) * kBlock);
}

struct Row {
  const char *student, *teacher;
  char* gradient;  // or null
  Ahead next;      // the row after this one
  int64_t label;   // -1: none
  float w_kd, w_ce;
  float z_label;  // the student's logit there
  bool staged;    // every block goes through task.zs and task.zt as floats, in their order
  bool careful;   // holds masked entries
  int carry;      // what sweep 1 was for
  Norm s, t;
  Norm cold;  // of the student at temperature 1, where labels need it
};

// A block of both sides, as stored or staged.
struct Block {
  const void *student, *teacher;
  int64_t first;
  int n;       // elements that are the row's
  int padded;  // to whole steps
  bool staged;
  const Sweeps* sweeps;
  Ahead ahead;
};

// Lines are asked for half a row before they are needed: each block at work, in either of the two sweeps,
// asks for half a block, beginning with the row's second half and going on to the next row. So memory is busy
// during the last sweep too, which reads from cache; asking 4 KiB ahead instead leaves it idle for a third of
// the time.
enum Sweep { kFirst, kMiddle, kLast };

inline Ahead ahead_of(const Task& task, const Row& row, int64_t first, Sweep sweep) {
  const int64_t size = size_of(task.args->dtype), half = task.args->vocab / 2;
  if (sweep == kFirst)
    return {row.student + (half + first / 2) * size, row.teacher + (half + first / 2) * size};
  if (sweep == kLast) return {row.next.student + first / 2 * size, row.next.teacher + first / 2 * size};
  return {row.student + first * size, row.teacher + first * size};
}

inline Block block_at(const Task& task, const Row& row, int64_t first, Sweep sweep) {
  const int64_t left = task.args->vocab - first, offset = first * size_of(task.args->dtype);
  Block b;
  b.first = first;
  b.n = (int)(left < kBlock ? left : kBlock);
  b.padded = whole_steps(b.n);
  b.staged = row.staged || b.n < kBlock;
  b.sweeps = sweeps_for(b.staged ? KD_F32 : task.args->dtype);
  b.ahead = ahead_of(task, row, first, sweep);
  b.student = b.staged ? (const char*)task.zs : row.student + offset;
  b.teacher = b.staged ? (const char*)task.zt : row.teacher + offset;
  if (b.staged) stage(task.student, row.student, first, b.n, task.zs);
  if (b.staged && sweep != kLast) stage(task.teacher, row.teacher, first, b.n, task.zt);
  return b;
}

// The block that sum_block has not taken: the row's first, its last, one with a new maximum, or one with
// numbers far below it. Raises the references. False: masked entries, +inf or NaN; the row is for
// careful_norm.
inline bool sum_exactly(const Task& task, const Row& row, const Block& b, Sums& u, bool* wide) {
  const Extremes s = b.sweeps->extremes(b.student, b.padded), t = b.sweeps->extremes(b.teacher, b.padded);
  refer_to(u, s.max, t.max, task.per_t, row.carry);
  const double low_s = ((double)s.min - u.ref_s) * task.per_t, low_t = ((double)t.min - u.ref_t) * task.per_t;
  if (!(low_s > kHopeless && low_t > kHopeless)) return false;
  *wide = low_s < -80 || low_t < -80;
  for (int i = b.n; i < b.padded; ++i) {  // lanes that are no entries: e^-87, and equal on both sides
    task.zs[i] = u.ref_s - 128.0f / task.per_t;
    task.zt[i] = u.ref_t - 128.0f / task.per_t;
  }
  float* kept = task.kept + b.first;
  b.sweeps->exact[row.carry](b.student, b.teacher, b.padded, task.per_t, kept, u, b.ahead);
  return true;
}

inline double total(const double* lanes) {
  double x = 0;
  for (int j = 0; j < kWidth; ++j) x += lanes[j];
  return x;
}

// Sweep 1 of a row without masked entries; c in *cross. False: it has some, or is no distribution at all.
inline bool sum_row(const Task& task, Row& row, double* cross) {
  Sums u;
  memset(&u, 0, sizeof u);
  u.ref_s = u.ref_t = -INFINITY;
  bool exact = true;
  for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
    const Block b = block_at(task, row, first, kFirst);
    const auto fast = b.sweeps->fast[row.carry][task.args->stats != nullptr];
    const bool done = !exact && b.n == kBlock &&
                      fast(b.student, b.teacher, kBlock, task.per_t, task.kept + first, u, b.ahead);
    if (!done && !sum_exactly(task, row, b, u, &exact)) return false;
    task.references[first / kBlock] = {u.ref_s, u.ref_t};
  }
  row.s = {total(u.student), total(u.student_x), u.ref_s};
  row.t = {total(u.teacher), total(u.teacher_x), u.ref_t};
  *cross = total(u.cross);
  return usable(row.s) && usable(row.t) && *cross - *cross == 0;
}

// What the last sweep multiplies e^((zs - reference) / T) and a block's kept numbers by.
struct Weights {
  float a, b;
};

// The softmax at temperature 1 of the label's loss, where it is not the one of the divergence.
KD_NOINLINE inline void add_cold_softmax(const float* z, float* out, int n, Normaliser cold, float w_ce) {
  const vf reference = vf::all(cold.reference), log = vf::all(cold.log), weight = vf::all(w_ce);
  for (int i = 0; i < n; i += kWidth) {
    fma(weight, kd_exp(vf::load(z + i) - reference - log), vf::load(out + i)).store(out + i);
  }
}

inline bool cold_label(const Task& task, const Row& row) { return row.w_ce != 0 && task.per_t != 1.0f; }

// The label's own share, in a block that was not staged: the element is computed again.
inline void mend_label(const Task& task, const Row& row, int64_t first, Weights w) {
  const Sweeps& sweeps = *sweeps_for(task.args->dtype);
  const int at = (int)(row.label - first), step = at / kStep * kStep;
  const double kept = task.kept[first + step + sweeps.slot(at - step)];
  const double e = exp(((double)row.z_label - row.s.reference) * task.per_t);
  task.out[0] = (float)(w.a * e + w.b * kept - row.w_ce);
  store_block(task.args->dtype, task.out, row.gradient, row.label, 1);
}

// The last sweep: dz = a e^((zs - reference) / T) + b kept, the label, the chain rule, the stored type.
template <class WeightsOf>
inline void write_gradient(const Task& task, const Row& row, WeightsOf weights_of) {
  const kd_rows& a = *task.args;
  const Normaliser cold = cold_label(task, row) ? normaliser_of(row.cold, 1.0) : Normaliser{0, 0};
  for (int64_t first = 0; first < a.vocab; first += kBlock) {
    const Block b = block_at(task, row, first, kLast);
    const Weights w = weights_of(task.references[first / kBlock]);
    void* out = b.staged ? (char*)task.out : row.gradient + first * size_of(a.dtype);
    b.sweeps->combine(b.student, task.kept + first, out, b.padded, row.s.reference, task.per_t, w.a, w.b,
                      b.ahead);
    const bool label_here = row.w_ce != 0 && row.label >= first && row.label < first + b.n;
    if (!b.staged) {
      if (label_here) mend_label(task, row, first, w);
      continue;
    }
    if (cold_label(task, row)) add_cold_softmax(task.zs, task.out, b.padded, cold, row.w_ce);
    if (label_here) task.out[row.label - first] -= row.w_ce;
    if (!task.student.plain) chain_rule(task.student, task.zs, task.out, b.n);
    store_block(a.dtype, task.out, row.gradient, first, b.n);
  }
}

}  // namespace KD_NS

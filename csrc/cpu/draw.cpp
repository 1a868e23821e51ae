// Draws from each row's distribution by inversion of its cumulative mass, in the order of the vocabulary. See
// topk.h.
#include "lse.h"
#include "topk_isa.h"

namespace KD_NS {

namespace {

struct Draw {
  const kd_draw* args;
  Source source;
  float per_t;
  float* z;        // a block
  double* masses;  // of each block
};

int64_t blocks_of(const kd_draw& a) { return (a.vocab + kBlock - 1) / kBlock; }

int stage_block(const Draw& task, int64_t r, int64_t block) {
  const int64_t first = block * kBlock, left = task.args->vocab - first;
  const int n = (int)(left < kBlock ? left : kBlock);
  stage(task.source, task.source.row(r), first, n, task.z);
  return n;
}

// Fills `masses` relative to the row's maximum, which it returns; NaN for a row that is no distribution. A
// block without finite entries has mass 0 (NaN, which maxima pass over, keeps its row from being one).
float weigh(const Draw& task, int64_t r, double* total) {
  const int64_t blocks = blocks_of(*task.args);
  Norm s = {0, 0, -INFINITY};
  for (int64_t b = 0; b < blocks; ++b) {
    const float top = extremes_of<f32>(task.z, whole_steps(stage_block(task, r, b))).max;
    s.reference = top > s.reference ? top : s.reference;
    task.masses[b] = top;
  }
  *total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    s.sum = 0;
    add_block(task.z, stage_block(task, r, b), task.per_t, s);
    const bool masked = task.masses[b] == -INFINITY && s.sum == s.sum;
    *total += task.masses[b] = masked ? 0 : s.sum;
  }
  return s.reference > -INFINITY && usable({*total, 0, 0}) ? s.reference : NAN;
}

// Where in a row the search stands: `before` is the mass of the blocks before `block`.
struct Place {
  int64_t block;
  double before;
};

// The first entry at which the cumulative mass exceeds `target`, or the block's last one with any mass; -1:
// none.
int64_t search(const Draw& task, int64_t r, Place at, float reference, double target) {
  const int n = stage_block(task, r, at.block);
  const Exp exp_t(task.per_t);
  double mass = at.before;
  int64_t last = -1;
  for (int i = 0; i < n; i += kWidth) {
    float e[kWidth];
    vf{exp_t.clamped((vf::load(task.z + i) - vf::all(reference)).v)}.store(e);
    for (int j = 0; j < kWidth && i + j < n; ++j) {
      if (task.z[i + j] == -INFINITY) continue;
      mass += e[j];
      last = at.block * kBlock + i + j;
      if (mass > target) return last;
    }
  }
  return last;
}

void draw_row(const Draw& task, int64_t r) {
  const kd_draw& a = *task.args;
  double total;
  const float reference = weigh(task, r, &total);
  const int64_t blocks = blocks_of(a);
  Place at = {0, 0};
  for (int64_t i = 0; i < a.draws; ++i) {
    const double u = a.uniforms[r * a.draws + i], target = u * total;
    int32_t* id = a.ids + r * a.draws + i;
    *id = -1;
    if (!(u >= 0 && u < 1) || reference != reference) continue;
    if (target < at.before) at = {0, 0};
    for (; at.block + 1 < blocks && at.before + task.masses[at.block] <= target; ++at.block) {
      at.before += task.masses[at.block];
    }
    *id = (int32_t)search(task, r, at, reference, target);
    for (int64_t b = at.block - 1; *id < 0; --b) {  // rounding led beyond the last entry that is not masked
      *id = (int32_t)search(task, r, {b, 0}, reference, INFINITY);
    }
  }
}

}  // namespace

size_t draw_scratch(const kd_draw* args) {
  return kBlock * sizeof(float) + (size_t)blocks_of(*args) * sizeof(double);
}

int draw(const kd_draw* args, int64_t begin, int64_t end, void* scratch) {
  Draw task;
  task.args = args;
  task.source = source_of(args->logits, args->dtype);
  task.per_t = (float)(1.0 / args->temperature);
  task.z = (float*)scratch;
  task.masses = (double*)(task.z + kBlock);
  for (int64_t r = begin; r < end; ++r) draw_row(task, r);
  return 0;
}

}  // namespace KD_NS

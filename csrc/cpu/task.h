// One call's constants and one row's state, shared by the separable divergences and adaptive_kl.
#pragma once
#include "rows.h"

namespace KD_NS {

struct Task {
  const kd_rows* args;
  Source student, teacher;
  Parameters given;
  float per_t;           // 1 / T
  float *zs, *zt, *out;  // kBlock floats each
  float* kept;           // two floats for every entry of the vocabulary, rounded up to whole blocks
};

struct Row {
  const char *student, *teacher;
  char* gradient;  // or null
  int64_t label;   // -1: none
  float w_kd, w_ce;
  Norm s, t;
  RowNumbers numbers;
  Normaliser cold;  // of the student at temperature 1
  bool careful;     // holds -inf or hopeless logits
};

struct Blocks {
  const float *zs, *zt;
  int n;
};

inline Blocks load_blocks(const Task& task, const Row& row, int64_t first) {
  const int64_t left = task.args->vocab - first;
  const int n = (int)(left < kBlock ? left : kBlock);
  return {load_block(task.student, row.student, first, n, task.zs),
          load_block(task.teacher, row.teacher, first, n, task.zt), n};
}

constexpr double kSmall = 1e-3;  // nats; below, a quick sum's error of 1e-7 would show

typedef TermGrad (*StatsBlock)(const float*, const float*, int, const RowNumbers&, Parameters, float* kept);

inline TermGrad sum_row(const Task& task, const Row& row, StatsBlock block, float* kept) {
  TermGrad total = {0, 0};
  for (int64_t first = 0; first < task.args->vocab; first += kBlock) {
    const Blocks b = load_blocks(task, row, first);
    const TermGrad x = block(b.zs, b.zt, b.n, row.numbers, task.given, kept ? kept + 2 * first : nullptr);
    total.term += x.term;
    total.grad += x.grad;
  }
  return total;
}

// Adds the cross-entropy's share at a temperature other than 1.
KD_NOINLINE inline void add_cold_softmax(const float* z, float* out, int n, Normaliser cold, float w_ce) {
  const vf reference = vf::all(cold.reference), log = vf::all(cold.log), weight = vf::all(w_ce);
  for (int i = 0; i < n; i += kWidth) {
    fma(weight, kd_exp(vf::load(z + i) - reference - log), vf::load(out + i)).store(out + i);
  }
}

// The gradient of a row: `block(blocks, first, out, ce)` writes kd's share and, at temperature 1, ce * q;
// here the label, the chain rule and the stored type are added.
template <class Block>
inline void write_gradient(const Task& task, const Row& row, Block block) {
  const kd_rows& a = *task.args;
  const bool cold = task.per_t != 1.0f && row.w_ce != 0;
  const bool direct = a.dtype == KD_F32 && task.student.plain;
  for (int64_t first = 0; first < a.vocab; first += kBlock) {
    const Blocks b = load_blocks(task, row, first);
    const bool straight = direct && b.n % kWidth == 0;
    float* out = straight ? (float*)row.gradient + first : task.out;
    const int64_t at = row.label - first;
    const bool label_here = row.w_ce != 0 && at >= 0 && at < b.n;
    const float* zs = b.zs;
    if (cold && straight) {  // the row may be overwritten by its gradient
      memcpy(task.zs, b.zs, sizeof(float) * b.n);
      zs = task.zs;
    }
    block(b, first, out, cold ? 0.0f : row.w_ce);
    if (cold) add_cold_softmax(zs, out, b.n, row.cold, row.w_ce);
    if (label_here) out[at] -= row.w_ce;
    if (!task.student.plain) chain_rule(task.student, b.zs, out, b.n);
    if (!straight) store_block(a.dtype, out, row.gradient, first, b.n);
  }
}

}  // namespace KD_NS

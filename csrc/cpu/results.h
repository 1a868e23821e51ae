// What a row leaves behind beside its gradient, for teachers of every form.
#pragma once
#include "task.h"

namespace KD_NS {

inline void put(void* to, int64_t i, double x) { ((float*)to)[i] = (float)x; }

// A row that does not count (0) or cannot be computed (NaN).
inline void fill_row(const Task& task, int64_t r, float value) {
  const kd_rows& a = *task.args;
  put(a.loss, r, value);
  for (int i = 0; a.stats && i < KD_STATS; ++i) put(a.stats, r * KD_STATS + i, value);
  if (!a.dlogits) return;
  char* row = (char*)a.dlogits + r * a.dlogits_stride * size_of(a.dtype);
  for (int i = 0; i < kBlock; ++i) task.out[i] = value;
  for (int64_t first = 0; first < a.vocab; first += kBlock) {
    store_block(a.dtype, task.out, row, first, (int)(a.vocab - first < kBlock ? a.vocab - first : kBlock));
  }
}

inline void zero_padding(const kd_rows& a, int64_t r) {
  if (!a.dlogits || a.dlogits_vocab <= a.vocab) return;
  const int64_t size = size_of(a.dtype);
  memset((char*)a.dlogits + (r * a.dlogits_stride + a.vocab) * size, 0, (a.dlogits_vocab - a.vocab) * size);
}

inline double negative_log_likelihood(const Row& row) {
  if (row.label < 0) return 0;
  const double l = (double)row.z_label - row.cold.reference - log(row.cold.sum);
  return l < kHopeless ? -(double)kMasked : -l;
}

inline void put_loss(const kd_rows& a, const Row& row, int64_t r, double d, double nll) {
  put(a.loss, r, (row.w_kd != 0 ? row.w_kd * d : 0) + (row.w_ce != 0 ? row.w_ce * nll : 0));
}

}  // namespace KD_NS

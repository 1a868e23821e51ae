// The C entry points of the kernels for sparse teachers. Torch-free, like kernels.h.
#pragma once
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// As kdkernels.ops.sparse.MODES counts them.
typedef enum { KD_GHOST = 0, KD_RENORMALIZE = 1, KD_TRUNCATE = 2, KD_SAMPLED = 3 } kd_sparse_mode;

// Rows of a teacher of which `kept` entries at most are known, at the temperature of `rows`, whose own
// teacher is unused. "acc" as in kernels.h.
typedef struct {
  kd_rows rows;
  int64_t kept;        // >= 1
  const int32_t* ids;  // [rows, kept], ascending in [0, vocab), then -1; a row that counts and is not so, or
                       // has no mass (KD_GHOST and KD_TRUNCATE: nor in its tail), is NaN
  const void* log_probs;  // [rows, kept] acc
  const void* log_tail;   // [rows] acc: log of the mass of the other entries
  int32_t mode;           // kd_sparse_mode
  double excess;          // `term` is the formula plus excess * (q - p): what KD_TRUNCATE takes off
} kd_sparse;

size_t kd_sparse_scratch_bytes(const kd_sparse* args);
int kd_sparse_cpu(const kd_sparse* args, int64_t begin, int64_t end, void* scratch);

#ifdef __cplusplus
}
#endif

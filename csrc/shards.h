// The C entry points of rows whose vocabulary lies in shards: the three parts that each rank computes on its
// columns. Torch-free, like kernels.h. float32, float16 and bfloat16.
#pragma once
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Columns of `share`, float: what one shard knows of a row. A reference is near the shard's largest logit, or
// that logit itself where `places` are wanted; -inf and sums 0 in a shard without mass.
enum {
  KD_TOP_S,  // the student's reference
  KD_SUM_S,  // of e^((z - reference) / T); NaN with NaN or +inf among the logits
  KD_TOP_T,  // the teacher's
  KD_SUM_T,
  KD_CROSS,   // of e^xt (zt' - zs'), reverse KL e^xs (zs' - zt'), z' = z - reference; NaN in a careful row
  KD_LABEL,   // the student's logit at the label; -inf: not of this shard
  KD_COLD,    // of e^(z - reference), where wanted
  KD_HEAT_S,  // of x e^x, x = (z - reference) / T, where `places` are wanted
  KD_HEAT_T,
  KD_CAREFUL,  // 1: holds masked entries
  KD_SHARE
};

// Columns of `merged`, double: the whole row, alike on every rank (kdkernels.eager_shards.Rows).
enum {
  KD_ROW_TOP_S,
  KD_ROW_SUM_S,
  KD_ROW_TOP_T,
  KD_ROW_SUM_T,
  KD_ROW_COLD,
  KD_ROW_D,
  KD_ROW_G,        // sum of grad
  KD_ROW_GENERIC,  // forward and reverse KL: not 0 where the gradient comes from grad
  KD_MERGED
};

typedef struct {
  kd_rows rows;          // this rank's columns; labels in the whole vocabulary; loss and stats unused
  int64_t offset;        // the first column's place in the whole vocabulary
  int32_t cold;          // whether KD_COLD is wanted
  float* share;          // [rows, KD_SHARE]
  int64_t* places;       // [rows, 2] where the largest logits stand in the whole vocabulary, or NULL
  const double* merged;  // [rows, KD_MERGED]
  const uint8_t* again;  // sums: rows to sum with care, others are left out; NULL: all, quickly
  float* kept;           // [rows, kept_stride] of sums, for the gradient; NULL: computed again there
  int64_t kept_stride;   // kd_shard_kept_stride(vocab)
  float* sums;           // [rows, 2]: of term and of grad
} kd_shard;

int64_t kd_shard_kept_stride(int64_t vocab);
size_t kd_shard_scratch_bytes(const kd_shard* args);
int kd_shard_norms(const kd_shard* args, int64_t begin, int64_t end, void* scratch);
int kd_shard_sums(const kd_shard* args, int64_t begin, int64_t end, void* scratch);
int kd_shard_gradient(const kd_shard* args, int64_t begin, int64_t end, void* scratch);

#ifdef __cplusplus
}
#endif

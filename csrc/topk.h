// The C entry points of selection and of draws. Torch-free, like kernels.h.
#pragma once
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// The largest entries of each row, and the mass of the others. "acc" as in kernels.h.
typedef struct {
  kd_side logits;
  kd_dtype dtype;
  int64_t rows, vocab, k;  // 1 <= k <= vocab
  double temperature;
  const double* other_temperatures;  // [others]
  int64_t others;
  int32_t* ids;       // [rows, k] ascending; -1 after the last where fewer than k entries are finite
  void* log_probs;    // [rows, k] acc, normalised by the whole row; -inf where ids is -1
  void* log_tail;     // [rows] acc: log of the mass of the entries not kept
  void* entropy;      // [rows] acc, nats, or NULL
  void* other_tails;  // [rows, others] acc: log_tail at the other temperatures, or NULL
} kd_topk;            // a row with NaN or +inf, or all -inf: ids -1, the rest NaN

// Draws from each row's distribution.
typedef struct {
  kd_side logits;
  kd_dtype dtype;
  int64_t rows, vocab, draws;
  double temperature;
  const double* uniforms;  // [rows, draws], fastest ascending; u takes the first entry whose cumulative mass
                           // exceeds u; outside [0, 1), NaN too: no draw
  int32_t* ids;            // [rows, draws]; -1: no draw, or no distribution (NaN, +inf, all -inf)
} kd_draw;

size_t kd_topk_scratch_bytes(const kd_topk* args);
int kd_topk_cpu(const kd_topk* args, int64_t begin, int64_t end, void* scratch);
size_t kd_draw_scratch_bytes(const kd_draw* args);
int kd_draw_cpu(const kd_draw* args, int64_t begin, int64_t end, void* scratch);

#ifdef __cplusplus
}
#endif

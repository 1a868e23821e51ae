// The C entry points of the native kernels. Torch-free: pointers, sizes, dtypes.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { KD_F32 = 0, KD_F16 = 1, KD_BF16 = 2, KD_F64 = 3 } kd_dtype;

#define KD_ADAPTIVE_KL (-1)
#define KD_STATS 6

// One side of the divergence: stored numbers x, and how they become logits z.
typedef struct {
  const void* data;    // [rows, >= vocab], unit stride along the vocabulary
  int64_t row_stride;  // elements between rows
  const void* bias;    // [vocab], float (double for KD_F64), or NULL
  double scale;        // z = scale * (x + bias)
  double softcap;      // > 0: z = softcap * tanh(scale * (x + bias) / softcap); 0: none
} kd_side;

// Everything a row-wise divergence needs. "acc" below is float, or double for KD_F64.
typedef struct {
  kd_side student, teacher;
  kd_dtype dtype;
  int64_t rows, vocab;
  int32_t kernel;            // id in divergences.gen.h, or KD_ADAPTIVE_KL
  double a, b, temperature;  // the divergence's parameters; temperature > 0
  const void* w_kd;          // [rows] acc
  const void* w_ce;          // [rows] acc, or NULL
  const int64_t* labels;     // [rows] or NULL
  void* loss;                // [rows] acc: w_kd * D + w_ce * CE
  void* dlogits;  // [rows, dlogits_vocab] of dtype: d loss / d student.data; may be student.data; or NULL
  int64_t dlogits_stride;  // elements between rows
  int64_t dlogits_vocab;   // columns vocab .. dlogits_vocab are padding and receive 0
  void* stats;             // [rows, KD_STATS] acc, or NULL
} kd_rows;

size_t kd_dense_scratch_bytes(const kd_rows* args);
int kd_dense_cpu(const kd_rows* args, int64_t begin, int64_t end, void* scratch);
const char* kd_cpu_isa(void);
const char* kd_cpu_isa_error(void);

#ifdef __cplusplus
}
#endif

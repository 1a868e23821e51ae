// Forward and reverse KL with rows kept on chip (dense_onchip.cuh): what a call is. Torch-free.
#pragma once
#include <stdint.h>

#include "kernels.h"

extern "C" {

// Pointers are to device memory; rows of student, teacher and dlogits begin at 16-byte boundaries.
struct kd_onchip_call {
  const void *student, *teacher;  // [rows, >= vocab] of dtype, unit stride along the vocabulary
  void* dlogits;                  // [rows, dlogits_vocab], may be the student's; or NULL
  int64_t student_row, teacher_row, dlogits_row;  // elements between rows, of any size
  float* loss;                                    // [rows]: w_kd * D
  const float* w_kd;                              // [rows]
  int32_t rows, vocab, dlogits_vocab;
  int32_t dtype;    // KD_F32, KD_F16, KD_BF16
  int32_t reverse;  // KL(student || teacher)
  double temperature;
  int32_t cluster;  // blocks of a cluster
  int32_t stages;   // of a warp's ring
};

// Starts the kernel on the current device (compute capability 9.0 or later); no synchronisation, no
// allocation. NULL, or what CUDA says is wrong.
const char* kd_onchip(const kd_onchip_call* call, void* stream);
}

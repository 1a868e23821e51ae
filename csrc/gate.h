// The C entry points of the SWITCH gate. Torch-free, like kernels.h.
#pragma once
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Per row: how far apart student and teacher are, which of them speaks, and what it says. "acc" as in
// kernels.h.
typedef struct {
  kd_side student, teacher;
  kd_dtype student_dtype, teacher_dtype;  // both KD_F64 or neither
  int64_t rows, vocab;
  const double* threshold;  // [rows]; the teacher speaks where jsd > threshold; NaN: the row is none
  const double* uniforms;   // [rows]: the first entry whose cumulative mass, in the order of ids, exceeds u
                            // times the whole; outside [0, 1), NaN too: no token. NULL: the most likely entry
  double temperature;       // of the draw, like the next two: the gate is at temperature 1, on all entries
  int64_t top_k;            // only the k most likely entries are drawn, of equal ones the lower ids; 0: all
  double top_p;             // of these the most likely ones until their mass is p of that of all; 1: all
  int64_t* token;           // [rows]; -1: none
  uint8_t* from_teacher;    // [rows]
  void* jsd;                // [rows] acc, bits, in [0, 1]
} kd_gate;  // a row with NaN or +inf, or all -inf, on either side: token -1, from the student, jsd NaN

// `workers` calls of kd_gate_cpu, with numbers 0 .. workers - 1, together compute all rows; in any order and
// any number of them at a time. They share `shared`, 64-byte aligned, which kd_gate_begin has prepared. The
// results do not depend on the number of workers.
size_t kd_gate_bytes(const kd_gate* args, int workers);
void kd_gate_begin(const kd_gate* args, int workers, void* shared);
int kd_gate_cpu(const kd_gate* args, int worker, int workers, void* shared);

#ifdef __cplusplus
}
#endif

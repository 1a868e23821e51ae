// One instruction set's build of the gate, as gate_entry.cpp sees it.
#pragma once
#include "../gate.h"
#include "../topk.h"
#include "isa.h"

// Of one block of a row.
struct kd_gate_block {
  double student, teacher;  // masses: sums of e^(z - reference)
  double student_reference, teacher_reference;
  double apart;  // sum of 2 term, in bits
};

// Elements of a block. Starting and ending a sweep takes as long as some hundred elements do; finding the
// entry that is drawn, in one block, as a whole sweep over it.
constexpr int64_t kd_gate_block_size = 4096;

struct kd_cpu_gate {
  const char* name;
  size_t scratch;  // bytes a worker
  // Of a row, in this order, each worker for itself: `open`; masses of blocks begin .. end - 1; once all of
  // the row's are there `close`; their divergences (`more`: the next row is this worker's, too).
  void (*open)(const kd_gate*, int64_t row, void* scratch);
  void (*weigh)(const kd_gate*, int64_t row, int64_t begin, int64_t end, kd_gate_block* blocks,
                void* scratch);
  void (*close)(const kd_gate*, const kd_gate_block* blocks, void* scratch);
  void (*compare)(const kd_gate*, int64_t row, int64_t begin, int64_t end, kd_gate_block* blocks, bool more,
                  void* scratch);
  // One worker, once all divergences are there: jsd and from_teacher; whether both sides are distributions.
  // Then the token at temperature 1, of all entries.
  bool (*decide)(const kd_gate*, int64_t row, const kd_gate_block* blocks, void* scratch);
  int64_t (*speak)(const kd_gate*, int64_t row, const kd_gate_block* blocks, void* scratch);
};

extern const kd_cpu_gate kd_gate_avx512, kd_gate_avx2, kd_gate_baseline;

// float64: one plain build (gate64.cpp). Fills all but the token, which it returns where it is the most
// likely entry.
size_t kd_gate64_scratch(const kd_gate*);
bool kd_gate64(const kd_gate*, int64_t row, int64_t* token, void* scratch);

// A token drawn from what temperature, top_k and top_p leave of the speaker's row (gate_kept.cpp).
size_t kd_gate_kept_scratch(const kd_gate*);
int kd_gate_kept(const kd_gate*, int64_t row, int64_t* token, void* scratch);

// One instruction set's build of selection and draws, as topk_entry.cpp sees it.
#pragma once
#include "../topk.h"
#include "isa.h"

struct kd_cpu_topk {
  const char* name;
  size_t (*topk_scratch)(const kd_topk*);  // bytes a thread
  int (*topk)(const kd_topk*, int64_t begin, int64_t end, void* scratch);
  size_t (*draw_scratch)(const kd_draw*);
  int (*draw)(const kd_draw*, int64_t begin, int64_t end, void* scratch);
};

extern const kd_cpu_topk kd_topk_avx512, kd_topk_avx2, kd_topk_baseline;

#ifdef KD_ISA
namespace KD_NS {
size_t draw_scratch(const kd_draw* args);
int draw(const kd_draw* args, int64_t begin, int64_t end, void* scratch);
}  // namespace KD_NS
#endif

// float64: one plain build (topk64.cpp).
size_t kd_topk64_scratch(const kd_topk*);
int kd_topk64(const kd_topk*, int64_t begin, int64_t end, void* scratch);
size_t kd_draw64_scratch(const kd_draw*);
int kd_draw64(const kd_draw*, int64_t begin, int64_t end, void* scratch);

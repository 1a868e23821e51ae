// The C entry points of selection and draws, in the instruction set that select.cpp chose.
#include <string.h>

#include "topk_isa.h"

namespace {

#if defined(__x86_64__) || defined(__i386__)
const kd_cpu_topk* const kAll[] = {&kd_topk_avx512, &kd_topk_avx2, &kd_topk_baseline};
#else
const kd_cpu_topk* const kAll[] = {&kd_topk_baseline};
#endif

const kd_cpu_topk* chosen() {
  for (const kd_cpu_topk* k : kAll) {
    if (strcmp(k->name, kd_cpu_isa()) == 0) return k;
  }
  return nullptr;
}

}  // namespace

extern "C" {

size_t kd_topk_scratch_bytes(const kd_topk* args) {
  const kd_cpu_topk* k = chosen();
  return args->dtype == KD_F64 ? kd_topk64_scratch(args) : k ? k->topk_scratch(args) : 0;
}

int kd_topk_cpu(const kd_topk* args, int64_t begin, int64_t end, void* scratch) {
  const kd_cpu_topk* k = chosen();
  if (!k) return -2;
  if (args->k < 1 || args->k > args->vocab) return -1;
  return args->dtype == KD_F64 ? kd_topk64(args, begin, end, scratch) : k->topk(args, begin, end, scratch);
}

size_t kd_draw_scratch_bytes(const kd_draw* args) {
  const kd_cpu_topk* k = chosen();
  return args->dtype == KD_F64 ? kd_draw64_scratch(args) : k ? k->draw_scratch(args) : 0;
}

int kd_draw_cpu(const kd_draw* args, int64_t begin, int64_t end, void* scratch) {
  const kd_cpu_topk* k = chosen();
  if (!k) return -2;
  return args->dtype == KD_F64 ? kd_draw64(args, begin, end, scratch) : k->draw(args, begin, end, scratch);
}

}  // extern "C"

// Chooses one instruction set's kernels when the library is loaded, and holds the C entry points.
#include <stdlib.h>
#include <string.h>

#include "isa.h"

namespace {

struct Choice {
  const kd_cpu_kernels* kernels;
  char error[160];
};

#if defined(__x86_64__) || defined(__i386__)
const kd_cpu_kernels* const kAll[] = {&kd_kernels_avx512, &kd_kernels_avx2, &kd_kernels_baseline};

bool runs_here(const kd_cpu_kernels* k) {
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (k == &kd_kernels_avx2) return avx2;
  if (k == &kd_kernels_avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return true;
}
#else
const kd_cpu_kernels* const kAll[] = {&kd_kernels_baseline};

bool runs_here(const kd_cpu_kernels*) { return true; }
#endif

void append(char* text, size_t size, const char* more) { strncat(text, more, size - strlen(text) - 1); }

Choice choose() {
  Choice c = {nullptr, ""};
  const char* wanted = getenv("KDKERNELS_ISA");
  const bool any = !wanted || !*wanted;
  for (const kd_cpu_kernels* k : kAll) {
    if (runs_here(k) && (any || strcmp(wanted, k->name) == 0)) {
      c.kernels = k;
      return c;
    }
  }
  append(c.error, sizeof c.error, "KDKERNELS_ISA is ");
  append(c.error, 60, wanted);
  append(c.error, sizeof c.error, "; this machine runs:");
  for (const kd_cpu_kernels* k : kAll) {
    if (!runs_here(k)) continue;
    append(c.error, sizeof c.error, " ");
    append(c.error, sizeof c.error, k->name);
  }
  append(c.error, sizeof c.error, ". Unset it or choose one of these");
  return c;
}

const Choice kChoice = choose();

}  // namespace

extern "C" {

const char* kd_cpu_isa(void) { return kChoice.kernels ? kChoice.kernels->name : ""; }

const char* kd_cpu_isa_error(void) { return kChoice.kernels ? nullptr : kChoice.error; }

size_t kd_dense_scratch_bytes(const kd_rows* args) {
  return !kChoice.kernels || args->dtype == KD_F64 ? 0 : kChoice.kernels->scratch_bytes(args->vocab);
}

int kd_dense_cpu(const kd_rows* args, int64_t begin, int64_t end, void* scratch) {
  if (!kChoice.kernels) return -2;
  if (args->vocab < 1 || begin >= end) return 0;
  return args->dtype == KD_F64 ? kd_dense64(args, begin, end)
                               : kChoice.kernels->dense(args, begin, end, scratch);
}

size_t kd_sparse_scratch_bytes(const kd_sparse* args) {
  return !kChoice.kernels || args->rows.dtype == KD_F64 ? 0 : kChoice.kernels->sparse_scratch_bytes(args);
}

int kd_sparse_cpu(const kd_sparse* args, int64_t begin, int64_t end, void* scratch) {
  if (!kChoice.kernels) return -2;
  if (args->rows.vocab < 1 || args->kept < 1 || begin >= end) return 0;
  return args->rows.dtype == KD_F64 ? kd_sparse64(args, begin, end)
                                    : kChoice.kernels->sparse(args, begin, end, scratch);
}

}  // extern "C"

// The entry points of one instruction set's build, as select.cpp sees them.
#pragma once
#include "../kernels.h"

struct kd_cpu_kernels {
  const char* name;
  int (*dense)(const kd_rows*, int64_t begin, int64_t end, void* scratch);
};

extern const kd_cpu_kernels kd_kernels_avx512, kd_kernels_avx2, kd_kernels_baseline;

// float64: one plain build (dense64.cpp).
int kd_dense64(const kd_rows*, int64_t begin, int64_t end);

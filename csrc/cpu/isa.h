// One instruction set's build: its namespace, and its entry points as select.cpp sees them.
#pragma once
#include "../kernels.h"
#include "../sparse.h"

// Sources compiled once per instruction set get -DKD_ISA=avx512|avx2|baseline and live in the namespace
// KD_NS; they use no inline function of the standard library: the linker merges equal inline functions of
// different objects, and a baseline build could then run the AVX-512 copy.
#define KD_CAT2(a, b) a##b
#define KD_CAT(a, b) KD_CAT2(a, b)
#define KD_NS KD_CAT(kd_, KD_ISA)
#define KD_INLINE inline __attribute__((always_inline))
#define KD_NOINLINE __attribute__((noinline))

struct kd_cpu_kernels {
  const char* name;
  size_t (*scratch_bytes)(int64_t vocab);  // a thread
  int (*dense)(const kd_rows*, int64_t begin, int64_t end, void* scratch);
  size_t (*sparse_scratch_bytes)(const kd_sparse*);
  int (*sparse)(const kd_sparse*, int64_t begin, int64_t end, void* scratch);
};

extern const kd_cpu_kernels kd_kernels_avx512, kd_kernels_avx2, kd_kernels_baseline;

// float64: one plain build (dense64.cpp, sparse64.cpp).
int kd_dense64(const kd_rows*, int64_t begin, int64_t end);
int kd_sparse64(const kd_sparse*, int64_t begin, int64_t end);

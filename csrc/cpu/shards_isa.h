// One instruction set's build of rows in shards, as shards_entry.cpp sees it.
#pragma once
#include "../shards.h"
#include "isa.h"

struct kd_cpu_shards {
  const char* name;
  int64_t (*kept_stride)(int64_t vocab);
  size_t (*scratch_bytes)(int64_t vocab);  // a thread
  int (*norms)(const kd_shard*, int64_t begin, int64_t end, void* scratch);
  int (*sums)(const kd_shard*, int64_t begin, int64_t end, void* scratch);
  int (*gradient)(const kd_shard*, int64_t begin, int64_t end, void* scratch);
};

extern const kd_cpu_shards kd_shards_avx512, kd_shards_avx2, kd_shards_baseline;

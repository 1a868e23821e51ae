// The C entry points of rows in shards, in the instruction set that select.cpp chose.
#include <string.h>

#include "shards_isa.h"

namespace {

#if defined(__x86_64__) || defined(__i386__)
const kd_cpu_shards* const kAll[] = {&kd_shards_avx512, &kd_shards_avx2, &kd_shards_baseline};
#else
const kd_cpu_shards* const kAll[] = {&kd_shards_baseline};
#endif

const kd_cpu_shards* chosen() {
  for (const kd_cpu_shards* k : kAll) {
    if (strcmp(k->name, kd_cpu_isa()) == 0) return k;
  }
  return nullptr;
}

int refuse(const kd_shard* args) {
  if (!chosen()) return -2;
  return args->rows.dtype == KD_F64 || args->rows.kernel < 0 ? -1 : 0;
}

}  // namespace

extern "C" {

int64_t kd_shard_kept_stride(int64_t vocab) { return chosen() ? chosen()->kept_stride(vocab) : 0; }

size_t kd_shard_scratch_bytes(const kd_shard* args) {
  return chosen() ? chosen()->scratch_bytes(args->rows.vocab) : 0;
}

int kd_shard_norms(const kd_shard* args, int64_t begin, int64_t end, void* scratch) {
  const int code = refuse(args);
  return code ? code : chosen()->norms(args, begin, end, scratch);
}

int kd_shard_sums(const kd_shard* args, int64_t begin, int64_t end, void* scratch) {
  const int code = refuse(args);
  return code ? code : chosen()->sums(args, begin, end, scratch);
}

int kd_shard_gradient(const kd_shard* args, int64_t begin, int64_t end, void* scratch) {
  const int code = refuse(args);
  return code ? code : chosen()->gradient(args, begin, end, scratch);
}

}  // extern "C"

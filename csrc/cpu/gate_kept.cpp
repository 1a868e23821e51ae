// Tokens drawn at another temperature, or from a part of the vocabulary: the entries kept come from selection
// (topk.h), as they do for kd.compress. See gate.h.
#define KD_ISA f64
#include <math.h>

#include <algorithm>

#include "gate_isa.h"
#include "head.h"

namespace {

constexpr int64_t kNucleus = 1024;  // entries among which a nucleus is looked for first

bool whole(const kd_gate* a) { return a->top_k == 0 && a->top_p >= 1; }

int64_t most_kept(const kd_gate* a) { return a->top_k > 0 ? std::min(a->top_k, a->vocab) : a->vocab; }

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The speaker's row as rows of their own.
kd_side row_of(const kd_gate* a, int64_t row, kd_dtype* dtype) {
  const bool teacher = a->from_teacher[row];
  kd_side side = teacher ? a->teacher : a->student;
  *dtype = teacher ? a->teacher_dtype : a->student_dtype;
  const int64_t size = *dtype == KD_F64 ? 8 : *dtype == KD_F32 ? 4 : 2;
  side.data = (const char*)side.data + row * side.row_stride * size;
  return side;
}

kd_draw draw_of(const kd_gate* a, const kd_side& side, kd_dtype dtype) {
  kd_draw d{};
  d.logits = side;
  d.dtype = dtype;
  d.rows = d.draws = 1;
  d.vocab = a->vocab;
  d.temperature = a->temperature;
  return d;
}

kd_topk topk_of(const kd_gate* a, const kd_side& side, kd_dtype dtype, int64_t k) {
  kd_topk t{};
  t.logits = side;
  t.dtype = dtype;
  t.rows = 1;
  t.vocab = a->vocab;
  t.k = k;
  t.temperature = a->temperature;
  return t;
}

// What is kept of a row: ids ascending, log-probabilities, masses.
struct Kept {
  int32_t* ids;
  double *log_probs, *mass;
  int64_t count;

  template <class Visit>
  void each(Visit visit) const {
    for (int64_t i = 0; i < count && visit(i, log_probs[i], mass[i]); ++i) {
    }
  }
};

struct Carved {
  Kept kept;
  void* stored;  // log-probabilities as selection writes them
  void* rest;
};

Carved carve(int64_t k, void* scratch) {
  char* at = (char*)scratch;
  const auto next = [&](size_t bytes) {
    char* here = at;
    at += aligned(bytes);
    return here;
  };
  Carved c;
  c.kept.ids = (int32_t*)next((size_t)k * 4);
  c.kept.log_probs = (double*)next((size_t)k * 8);
  c.kept.mass = (double*)next((size_t)k * 8);
  c.stored = next((size_t)k * 8);
  c.rest = at;
  return c;
}

// The k most likely entries; their mass in *sum.
int select(const kd_gate* a, const kd_side& side, kd_dtype dtype, int64_t k, Carved& c, double* sum) {
  kd_topk t = topk_of(a, side, dtype, k);
  double tail;
  t.ids = c.kept.ids;
  t.log_probs = c.stored;
  t.log_tail = &tail;
  const int code = kd_topk_cpu(&t, 0, 1, c.rest);
  c.kept.count = 0;
  *sum = 0;
  while (c.kept.count < k && c.kept.ids[c.kept.count] >= 0) {
    const int64_t i = c.kept.count++;
    c.kept.log_probs[i] = dtype == KD_F64 ? ((const double*)c.stored)[i] : ((const float*)c.stored)[i];
    *sum += c.kept.mass[i] = exp(c.kept.log_probs[i]);
  }
  return code;
}

// Entries outside of the nucleus leave.
void cut(Kept& kept, double wanted) {
  const kd_f64::Head<double> head = kd_f64::head_of<double>(wanted, [&](auto visit) { kept.each(visit); });
  int64_t stay = 0;
  for (int64_t i = 0; i < kept.count; ++i) {
    if (kept.log_probs[i] < head.least || (kept.log_probs[i] == head.least && i > head.last)) continue;
    kept.ids[stay] = kept.ids[i];
    kept.mass[stay++] = kept.mass[i];
  }
  kept.count = stay;
}

int64_t draw(const Kept& kept, double u) {
  double total = 0, mass = 0;
  for (int64_t i = 0; i < kept.count; ++i) total += kept.mass[i];
  int64_t last = 0;
  for (int64_t i = 0; i < kept.count; ++i) {
    if (kept.mass[i] == 0) continue;
    last = i;
    if ((mass += kept.mass[i]) > u * total) break;
  }
  return kept.ids[last];
}

}  // namespace

size_t kd_gate_kept_scratch(const kd_gate* a) {
  const int64_t k = most_kept(a);
  size_t most = 0;
  for (const kd_dtype dtype : {a->student_dtype, a->teacher_dtype}) {
    for (const kd_side* side : {&a->student, &a->teacher}) {
      const kd_draw d = draw_of(a, *side, dtype);
      const kd_topk t = topk_of(a, *side, dtype, k), first = topk_of(a, *side, dtype, std::min(k, kNucleus));
      most = std::max({most, whole(a) ? kd_draw_scratch_bytes(&d) : 0,
                       whole(a) ? 0 : std::max(kd_topk_scratch_bytes(&t), kd_topk_scratch_bytes(&first))});
    }
  }
  return (whole(a) ? 0 : aligned((size_t)k * 4) + 3 * aligned((size_t)k * 8)) + aligned(most);
}

int kd_gate_kept(const kd_gate* a, int64_t row, int64_t* token, void* scratch) {
  kd_dtype dtype;
  const kd_side side = row_of(a, row, &dtype);
  if (whole(a)) {
    kd_draw d = draw_of(a, side, dtype);
    int32_t id;
    d.uniforms = a->uniforms + row;
    d.ids = &id;
    const int code = kd_draw_cpu(&d, 0, 1, scratch);
    *token = id;
    return code;
  }
  const int64_t k = most_kept(a);
  Carved c = carve(k, scratch);
  double sum;
  int code = select(a, side, dtype, a->top_k ? k : std::min(k, kNucleus), c, &sum);
  if (a->top_p < 1) {
    const double wanted = a->top_p * (a->top_k ? sum : 1);
    if (!a->top_k && sum < wanted + 1e-5 && k > kNucleus) code |= select(a, side, dtype, k, c, &sum);
    cut(c.kept, wanted);
  }
  *token = draw(c.kept, a->uniforms[row]);
  return code;
}

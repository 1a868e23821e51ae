// Rows whose vocabulary lies in shards: one shard's part of the normalisers, of the sums, and of the
// gradient. See ../shards.h for the contract.
#include "shards.h"

#include "results.h"
#include "shards_isa.h"

namespace KD_NS {

static Row shard_row(const Task& task, const kd_shard& shard, int64_t r, int64_t end) {
  const kd_rows& a = *task.args;
  const int64_t after = r + 1 < end ? r + 1 : r, place = a.labels ? a.labels[r] - shard.offset : -1;
  Row row;
  row.student = task.student.row(r);
  row.teacher = task.teacher.row(r);
  row.next = {task.student.row(after), task.teacher.row(after)};
  row.gradient = a.dlogits ? (char*)a.dlogits + r * a.dlogits_stride * size_of(a.dtype) : nullptr;
  row.label = place >= 0 && place < a.vocab ? place : -1;
  row.w_kd = ((const float*)a.w_kd)[r];
  row.w_ce = a.w_ce ? ((const float*)a.w_ce)[r] : 0.0f;
  row.carry = kCarries[a.kernel];
  row.careful = false;
  row.staged = a.dtype == KD_F16 || !task.student.plain || !task.teacher.plain || cold_label(task, row);
  return row;
}

static bool counts(const Row& row) { return row.w_kd != 0 || row.w_ce != 0; }

static bool has_nan(const Source& source, const char* row, int64_t vocab, float* buffer) {
  bool found = false;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
    stage(source, row, first, n, buffer);
    for (int i = 0; i < n; ++i) found |= buffer[i] != buffer[i];
  }
  return found;
}

// As careful_norm, but a shard of nothing but -inf is a shard without mass.
static Norm shard_norm(const Source& source, const char* row, int64_t vocab, float per_t, float* buffer) {
  const Norm s = careful_norm(source, row, vocab, per_t, buffer);
  if (s.reference != -INFINITY) return s;
  return has_nan(source, row, vocab, buffer) ? s : Norm{0, 0, -INFINITY};
}

static float logit_at(const Source& source, const char* row, int64_t i, float* buffer) {
  stage(source, row, i, 1, buffer);
  return buffer[0];
}

// Moves a side's sums to the reference `top`; returns what was added to every z - reference.
static double refer_norm(Norm& s, float top, double per_t) {
  if (s.reference == -INFINITY || s.reference == top) return 0;
  const double d = (double)s.reference - top, f = exp(d * per_t);
  s.weighted = f * (s.weighted + d * s.sum);
  s.sum *= f;
  s.reference = top;
  return d;
}

// With statistics the references are the largest logits themselves, by which ranks find the first of them.
static void find_places(const Task& task, const kd_shard& shard, int64_t r, Row& row, double* cross) {
  const int64_t vocab = task.args->vocab;
  const int64_t top_s = argmax_of(task.student, row.student, vocab, task.zs);
  const int64_t top_t = argmax_of(task.teacher, row.teacher, vocab, task.zt);
  shard.places[2 * r] = shard.offset + top_s;
  shard.places[2 * r + 1] = shard.offset + top_t;
  const Norm s = row.s, t = row.t;
  const double ds = refer_norm(row.s, logit_at(task.student, row.student, top_s, task.zs), task.per_t);
  const double dt = refer_norm(row.t, logit_at(task.teacher, row.teacher, top_t, task.zt), task.per_t);
  if (row.carry == kForward) *cross = exp(dt * task.per_t) * (*cross + (dt - ds) * t.sum);
  if (row.carry == kReverse) *cross = exp(ds * task.per_t) * (*cross + (ds - dt) * s.sum);
}

static void norms_of(const Task& task, const kd_shard& shard, int64_t r, int64_t end) {
  float* share = shard.share + r * KD_SHARE;
  Row row = shard_row(task, shard, r, end);
  for (int i = 0; i < KD_SHARE; ++i) share[i] = 0;
  if (shard.places) shard.places[2 * r] = shard.places[2 * r + 1] = 0;
  if (!counts(row)) return;
  const int64_t vocab = task.args->vocab;
  double cross = 0;
  if (!sum_row(task, row, &cross)) {
    row.careful = true;
    row.s = shard_norm(task.student, row.student, vocab, task.per_t, task.zs);
    row.t = shard_norm(task.teacher, row.teacher, vocab, task.per_t, task.zt);
    cross = NAN;
  }
  if (shard.places) find_places(task, shard, r, row, &cross);
  share[KD_TOP_S] = row.s.reference;
  share[KD_SUM_S] = (float)row.s.sum;
  share[KD_TOP_T] = row.t.reference;
  share[KD_SUM_T] = (float)row.t.sum;
  share[KD_CROSS] = (float)cross;
  share[KD_LABEL] = row.label < 0 ? -INFINITY : logit_at(task.student, row.student, row.label, task.zs);
  share[KD_HEAT_S] = (float)(row.s.weighted * task.per_t);
  share[KD_HEAT_T] = (float)(row.t.weighted * task.per_t);
  share[KD_CAREFUL] = row.careful;
  if (!shard.cold) return;
  const Norm cold = shard_norm(task.student, row.student, vocab, 1.0f, task.zs);
  const double moved = cold.reference == -INFINITY ? 0 : (double)cold.reference - row.s.reference;
  share[KD_COLD] = (float)(cold.sum * exp(moved));
}

// The row of the whole vocabulary, of which this shard's columns are swept.
static void take_merged(const Task& task, const kd_shard& shard, int64_t r, Row& row) {
  const double* m = shard.merged + r * KD_MERGED;
  const float* share = shard.share + r * KD_SHARE;
  row.s = {m[KD_ROW_SUM_S], 0, (float)m[KD_ROW_TOP_S]};
  row.t = {m[KD_ROW_SUM_T], 0, (float)m[KD_ROW_TOP_T]};
  row.cold = {m[KD_ROW_COLD], 0, (float)m[KD_ROW_TOP_S]};
  row.z_label = share[KD_LABEL];
  const double low_s = ((double)share[KD_TOP_S] - row.s.reference) * task.per_t;
  const double low_t = ((double)share[KD_TOP_T] - row.t.reference) * task.per_t;
  // one hopeless entry may stand 1.38 above a reference of its kind; masks are far below either
  row.careful = share[KD_CAREFUL] != 0 || !(low_s > 1e-2 * kHopeless && low_t > 1e-2 * kHopeless);
  row.staged = row.staged || row.careful;
}

static void sums_of(Task& task, const kd_shard& shard, int64_t r, int64_t end) {
  float* sums = shard.sums + 2 * r;
  sums[0] = sums[1] = 0;
  Row row = shard_row(task, shard, r, end);
  if (!counts(row) || (shard.again && !shard.again[r])) return;
  take_merged(task, shard, r, row);
  if (shard.kept) task.kept = shard.kept + r * shard.kept_stride;
  const RowFunctions& f = kRowFunctions[task.args->kernel];
  const TermGrad made = stats_of(task, row, row.careful ? f.careful : shard.again ? f.precise : f.quick);
  sums[0] = (float)made.term;
  sums[1] = (float)made.grad;
}

static void fill_columns(const Task& task, const Row& row, float value) {
  const kd_rows& a = *task.args;
  for (int i = 0; i < kBlock; ++i) task.out[i] = value;
  for (int64_t first = 0; first < a.vocab; first += kBlock) {
    const int64_t left = a.vocab - first;
    store_block(a.dtype, task.out, row.gradient, first, (int)(left < kBlock ? left : kBlock));
  }
}

static void gradient_of(Task& task, const kd_shard& shard, int64_t r, int64_t end) {
  const double* m = shard.merged + r * KD_MERGED;
  Row row = shard_row(task, shard, r, end);
  zero_padding(*task.args, r);
  if (!counts(row)) return fill_columns(task, row, 0.0f);
  const bool bad = m[KD_ROW_SUM_S] != m[KD_ROW_SUM_S] || m[KD_ROW_D] != m[KD_ROW_D];
  if (bad) return fill_columns(task, row, NAN);
  take_merged(task, shard, r, row);
  if (row.carry != kNothing && m[KD_ROW_GENERIC] == 0) return write_online(task, row, m[KD_ROW_D]);
  if (shard.kept) {
    task.kept = shard.kept + r * shard.kept_stride;
  } else {
    const RowFunctions& f = kRowFunctions[task.args->kernel];
    const bool precise = row.carry != kNothing || m[KD_ROW_D] < kSmall;
    stats_of(task, row, row.careful ? f.careful : precise ? f.precise : f.quick);
  }
  gradient_of_grad(task, row, m[KD_ROW_G]);
}

static int64_t kept_stride(int64_t vocab) { return blocks_in(vocab) * kBlock; }

typedef void (*Part)(Task&, const kd_shard&, int64_t, int64_t);

static int rows_of(const kd_shard* args, int64_t begin, int64_t end, void* scratch, Part part) {
  if (args->rows.kernel >= kDivergences) return -1;
  static const char kWanted = 0;
  kd_rows rows = args->rows;
  rows.stats = args->places ? (void*)&kWanted : nullptr;  // sweep 1 asks whether entropies are wanted
  Task task;
  task.args = &rows;
  task.student = source_of(rows.student, rows.dtype);
  task.teacher = source_of(rows.teacher, rows.dtype);
  task.given = {(float)rows.a, (float)rows.b};
  task.per_t = (float)(1.0 / rows.temperature);
  carve(task, scratch);
  for (int64_t r = begin; r < end; ++r) part(task, *args, r, end);
  return 0;
}

static int norms(const kd_shard* args, int64_t begin, int64_t end, void* scratch) {
  return rows_of(args, begin, end, scratch, [](Task& task, const kd_shard& shard, int64_t r, int64_t last) {
    norms_of(task, shard, r, last);
  });
}
static int sums(const kd_shard* args, int64_t begin, int64_t end, void* scratch) {
  return rows_of(args, begin, end, scratch, sums_of);
}
static int gradient(const kd_shard* args, int64_t begin, int64_t end, void* scratch) {
  return rows_of(args, begin, end, scratch, gradient_of);
}

}  // namespace KD_NS

#define KD_STRING2(x) #x
#define KD_STRING(x) KD_STRING2(x)
const kd_cpu_shards KD_CAT(kd_shards_, KD_ISA) = {KD_STRING(KD_ISA), KD_NS::kept_stride, KD_NS::scratch_bytes,
                                                  KD_NS::norms,      KD_NS::sums,        KD_NS::gradient};

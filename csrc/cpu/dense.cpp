// Rows of the dense distillation loss: normalisers, statistics, gradient. See kernels.h for the contract.
#include "adaptive.h"
#include "results.h"
#include "sparse.h"

namespace KD_NS {

static Row row_at(const Task& task, int64_t r, int64_t end) {
  const kd_rows& a = *task.args;
  const int64_t after = r + 1 < end ? r + 1 : r;
  Row row;
  row.student = task.student.row(r);
  row.teacher = task.teacher.row(r);
  row.next = {task.student.row(after), task.teacher.row(after)};
  row.gradient = a.dlogits ? (char*)a.dlogits + r * a.dlogits_stride * size_of(a.dtype) : nullptr;
  row.label = a.labels && a.labels[r] >= 0 && a.labels[r] < a.vocab ? a.labels[r] : -1;
  row.w_kd = ((const float*)a.w_kd)[r];
  row.w_ce = a.w_ce ? ((const float*)a.w_ce)[r] : 0.0f;
  row.carry = a.kernel < 0 ? kNothing : kCarries[a.kernel];
  row.careful = false;
  row.staged = a.dtype == KD_F16 || a.kernel < 0 || !task.student.plain || !task.teacher.plain ||
               cold_label(task, row);
  return row;
}

// Sweep 1; false: the row is NaN.
static bool normalise(const Task& task, Row& row, double* cross) {
  const int64_t vocab = task.args->vocab;
  row.cold = {0, 0, 0};
  if (!sum_row(task, row, cross)) {
    row.careful = row.staged = true;
    row.s = careful_norm(task.student, row.student, vocab, task.per_t, task.zs);
    row.t = careful_norm(task.teacher, row.teacher, vocab, task.per_t, task.zt);
    if (!usable(row.s) || !usable(row.t)) return false;
  }
  if (row.label >= 0) {
    stage(task.student, row.student, row.label, 1, task.zs);
    row.z_label = task.zs[0];
    row.cold = task.per_t == 1.0f ? row.s : careful_norm(task.student, row.student, vocab, 1.0f, task.zs);
  }
  return true;
}

// All but the divergence; before the gradient, which may overwrite the student.
static void write_stats(const Task& task, const Row& row, int64_t r, double nll) {
  const int64_t vocab = task.args->vocab;
  const int64_t top_s = argmax_of(task.student, row.student, vocab, task.zs);
  const int64_t top_t = argmax_of(task.teacher, row.teacher, vocab, task.zt);
  const double values[KD_STATS] = {
      0,   entropy(row.t, task.per_t),    entropy(row.s, task.per_t), top_s == top_t ? 1.0 : 0.0,
      nll, top_s == row.label ? 1.0 : 0.0};
  for (int i = 0; i < KD_STATS; ++i) put(task.args->stats, r * KD_STATS + i, values[i]);
}

static void dense_row(const Task& task, int64_t r, int64_t end) {
  const kd_rows& a = *task.args;
  Row row = row_at(task, r, end);
  zero_padding(a, r);
  if (row.w_kd == 0 && row.w_ce == 0) return fill_row(task, r, 0.0f);
  double cross;
  if ((row.w_ce != 0 && row.label < 0) || !normalise(task, row, &cross)) return fill_row(task, r, NAN);
  const double nll = negative_log_likelihood(row);
  if (a.stats) write_stats(task, row, r, nll);
  const bool online = row.carry != kNothing && !row.careful;
  const double d = a.kernel == KD_ADAPTIVE_KL ? adaptive_row(task, row)
                   : online                   ? online_row(task, row, cross)
                                              : separable_row(task, row);
  if (a.stats) put(a.stats, r * KD_STATS, d);
  put_loss(a, row, r, d, nll);
}

static int dense(const kd_rows* args, int64_t begin, int64_t end, void* scratch) {
  if (args->kernel != KD_ADAPTIVE_KL && (args->kernel < 0 || args->kernel >= kDivergences)) return -1;
  Task task;
  task.args = args;
  task.student = source_of(args->student, args->dtype);
  task.teacher = source_of(args->teacher, args->dtype);
  task.given = {(float)args->a, (float)args->b};
  task.per_t = (float)(1.0 / args->temperature);
  carve(task, scratch);
  for (int64_t r = begin; r < end; ++r) dense_row(task, r, end);
  return 0;
}

}  // namespace KD_NS

#define KD_STRING2(x) #x
#define KD_STRING(x) KD_STRING2(x)
const kd_cpu_kernels KD_CAT(kd_kernels_, KD_ISA) = {KD_STRING(KD_ISA), KD_NS::scratch_bytes, KD_NS::dense,
                                                    KD_NS::sparse_scratch_bytes, KD_NS::sparse};

// Rows of the dense distillation loss: normalisers, statistics, gradient. See kernels.h for the contract.
#include "adaptive.h"
#include "isa.h"
#include "online_kl.h"

namespace KD_NS {

struct Outcome {
  double divergence, nll;
};

static void put(void* to, int64_t i, double x) { ((float*)to)[i] = (float)x; }

static void fill_row(const Task& task, int64_t r, float value) {
  const kd_rows& a = *task.args;
  put(a.loss, r, value);
  for (int i = 0; a.stats && i < KD_STATS; ++i) put(a.stats, r * KD_STATS + i, value);
  if (!a.dlogits) return;
  char* row = (char*)a.dlogits + r * a.dlogits_stride * size_of(a.dtype);
  for (int i = 0; i < kBlock; ++i) task.out[i] = value;
  for (int64_t first = 0; first < a.vocab; first += kBlock) {
    store_block(a.dtype, task.out, row, first, (int)(a.vocab - first < kBlock ? a.vocab - first : kBlock));
  }
}

static void zero_padding(const kd_rows& a, int64_t r) {
  if (!a.dlogits || a.dlogits_vocab <= a.vocab) return;
  const int64_t size = size_of(a.dtype);
  memset((char*)a.dlogits + (r * a.dlogits_stride + a.vocab) * size, 0, (a.dlogits_vocab - a.vocab) * size);
}

static double negative_log_likelihood(const Task& task, const Row& row, double log_sum) {
  const double z = load_block(task.student, row.student, row.label, 1, task.zs)[0];
  return z - row.s.reference < kHopeless ? -(double)kMasked : log_sum - (z - row.s.reference);
}

static double entropy(const Norm& s) { return log(s.sum) - s.weighted / s.sum; }

static void write_stats(const Task& task, const Row& row, int64_t r, const Outcome& out) {
  const int64_t vocab = task.args->vocab;
  const int64_t top_s = argmax_of(task.student, row.student, vocab, row.s, task.zs);
  const int64_t top_t = argmax_of(task.teacher, row.teacher, vocab, row.t, task.zt);
  const double values[KD_STATS] = {out.divergence, entropy(row.t),
                                   entropy(row.s), top_s == top_t ? 1.0 : 0.0,
                                   out.nll,        top_s == row.label ? 1.0 : 0.0};
  for (int i = 0; i < KD_STATS; ++i) put(task.args->stats, r * KD_STATS + i, values[i]);
}

// Sweep 1 of both sides; false: the row is NaN.
static bool normalise(const Task& task, Row& row) {
  const kd_rows& a = *task.args;
  const bool cold = task.per_t != 1.0f && row.label >= 0 && (row.w_ce != 0 || a.stats);
  const Needs of_student = {a.stats != nullptr, cold}, of_teacher = {a.stats != nullptr, false};
  row.s = norm_of(task.student, row.student, a.vocab, task.per_t, of_student, task.zs);
  row.t = norm_of(task.teacher, row.teacher, a.vocab, task.per_t, of_teacher, task.zt);
  if (row.s.bad || row.t.bad) return false;
  const double per_t = task.per_t;
  row.numbers.student = normaliser_of(row.s.reference, log(row.s.sum), per_t);
  row.numbers.teacher = normaliser_of(row.t.reference, log(row.t.sum), per_t);
  row.numbers.per_t = task.per_t;
  if (cold) row.cold = normaliser_of(row.s.reference, log(row.s.cold), 1.0);
  row.careful =
      (row.s.min - row.s.reference) * per_t < kHopeless || (row.t.min - row.t.reference) * per_t < kHopeless;
  return true;
}

static double generic_row(const Task& task, const Row& row) {
  const RowFunctions& f = kRowFunctions[task.args->kernel];
  float* kept = row.gradient ? task.kept : nullptr;
  TermGrad total = sum_row(task, row, row.careful ? f.careful : f.quick, kept);
  if (!row.careful && f.quick != f.precise && total.term < kSmall) {
    total.term = sum_row(task, row, f.precise, nullptr).term;
  }
  if (row.gradient) {
    const float kd = row.w_kd * task.per_t;
    write_gradient(task, row, [&](const Blocks& b, int64_t first, float* out, float ce) {
      kept_gradient(kept + 2 * first, out, b.n, kd, ce - kd * (float)total.grad);
    });
  }
  return total.term;
}

// Which rows the two-sweep path may try: nothing but a loss and a gradient wanted, cross-entropy at T = 1
// only.
static bool online(const Task& task, const Row& row) {
  const kd_rows& a = *task.args;
  if (a.kernel < 0 || a.stats || !task.student.plain || !task.teacher.plain) return false;
  return kOnline[a.kernel] != kNotOnline && row.w_kd != 0 && (row.w_ce == 0 || task.per_t == 1.0f);
}

static bool online_row(const Task& task, Row& row, int64_t r) {
  double divergence, log_student;
  const bool reverse = kOnline[task.args->kernel] == kReverseKl;
  double nll = 0;
  const float z = row.w_ce != 0 ? load_block(task.student, row.student, row.label, 1, task.zs)[0] : 0.0f;
  if (!(reverse ? kl_row<true>(task, row, divergence, log_student)
                : kl_row<false>(task, row, divergence, log_student))) {
    return false;
  }
  if (row.w_ce != 0) nll = log_student - ((double)z - row.s.reference);
  put(task.args->loss, r, row.w_kd * divergence + (row.w_ce != 0 ? row.w_ce * nll : 0));
  return true;
}

static void dense_row(const Task& task, int64_t r) {
  const kd_rows& a = *task.args;
  Row row;
  row.w_kd = ((const float*)a.w_kd)[r];
  row.w_ce = a.w_ce ? ((const float*)a.w_ce)[r] : 0.0f;
  row.label = a.labels && a.labels[r] >= 0 && a.labels[r] < a.vocab ? a.labels[r] : -1;
  row.student = task.student.row(r);
  row.teacher = task.teacher.row(r);
  row.gradient = a.dlogits ? (char*)a.dlogits + r * a.dlogits_stride * size_of(a.dtype) : nullptr;
  zero_padding(a, r);
  if (row.w_kd == 0 && row.w_ce == 0) return fill_row(task, r, 0.0f);
  if (row.w_ce != 0 && row.label < 0) return fill_row(task, r, NAN);
  if (online(task, row) && online_row(task, row, r)) return;
  if (!normalise(task, row)) return fill_row(task, r, NAN);
  Outcome out = {0, 0};
  if (row.label >= 0) {
    out.nll = negative_log_likelihood(task, row, log(task.per_t == 1.0f ? row.s.sum : row.s.cold));
  }
  if (a.stats) write_stats(task, row, r, out);  // before the gradient, which may overwrite the student
  out.divergence = a.kernel == KD_ADAPTIVE_KL ? adaptive_row(task, row) : generic_row(task, row);
  if (a.stats) put(a.stats, r * KD_STATS, out.divergence);
  put(a.loss, r, (row.w_kd != 0 ? row.w_kd * out.divergence : 0) + (row.w_ce != 0 ? row.w_ce * out.nll : 0));
}

static int dense(const kd_rows* args, int64_t begin, int64_t end, void* scratch) {
  if (args->kernel != KD_ADAPTIVE_KL && (args->kernel < 0 || args->kernel >= kDivergences)) return -1;
  Task task;
  task.args = args;
  task.student = source_of(args->student, args->dtype);
  task.teacher = source_of(args->teacher, args->dtype);
  task.given = {(float)args->a, (float)args->b};
  task.per_t = (float)(1.0 / args->temperature);
  task.zs = (float*)scratch;
  task.zt = task.zs + kBlock;
  task.out = task.zt + kBlock;
  task.kept = task.out + kBlock;
  for (int64_t r = begin; r < end; ++r) dense_row(task, r);
  return 0;
}

}  // namespace KD_NS

#define KD_STRING2(x) #x
#define KD_STRING(x) KD_STRING2(x)
const kd_cpu_kernels KD_CAT(kd_kernels_, KD_ISA) = {KD_STRING(KD_ISA), KD_NS::dense};

// Rows of the distillation loss against a sparse teacher. See ../sparse.h for the contract.
#include "results.h"
#include "sparse_modes.h"

namespace KD_NS {

static size_t room(const kd_sparse* a) { return (size_t)(a->kept + 1 + 2 * kStep) / kStep * kStep; }

size_t sparse_scratch_bytes(const kd_sparse* args) {
  return sizeof(Sides) + (4 * kBlock + 4 * room(args)) * sizeof(float);
}

static void carve_sparse(SparseTask& s, void* scratch) {
  Task& task = s.task;
  task.zs = (float*)scratch;
  task.zt = task.zs;  // no teacher's block
  task.out = task.zs + kBlock;
  s.kept.caps = task.out + kBlock;
  task.sides = (Sides*)(s.kept.caps + 2 * kBlock);
  task.kept = nullptr;
  task.references = nullptr;
  float* arrays = (float*)(task.sides + 1);
  float** each[] = {&s.kept.z, &s.kept.lp, &s.kept.lq, &s.kept.grad};
  for (int i = 0; i < 4; ++i) *each[i] = arrays + i * room(s.args);
  for (int i = 0; i < kBlock; ++i) s.kept.caps[i] = INFINITY;
}

static Row sparse_row_at(const SparseTask& s, int64_t r, int64_t end) {
  const kd_rows& a = *s.task.args;
  const int64_t after = r + 1 < end ? r + 1 : r;
  Row row;
  row.student = row.teacher = s.task.student.row(r);
  row.next = {s.task.student.row(after), s.task.student.row(after)};
  row.gradient = a.dlogits ? (char*)a.dlogits + r * a.dlogits_stride * size_of(a.dtype) : nullptr;
  row.label = a.labels && a.labels[r] >= 0 && a.labels[r] < a.vocab ? a.labels[r] : -1;
  row.w_kd = ((const float*)a.w_kd)[r];
  row.w_ce = a.w_ce ? ((const float*)a.w_ce)[r] : 0.0f;
  row.z_label = 0;
  row.carry = kNothing;
  row.careful = false;
  row.staged = a.dtype == KD_F16 || !s.task.student.plain || cold_label(s.task, row);
  row.cold = {0, 0, 0};
  return row;
}

// Whether the mass of a row's tail is part of what is compared.
static bool takes_tail(const SparseTask& s) {
  const int mode = s.args->mode;
  return (mode == KD_GHOST || mode == KD_TRUNCATE) && s.kept.n < s.task.args->vocab;
}

// Ids and log-probabilities of a row. False: not ascending, out of range, or no distribution.
static bool take_kept(SparseTask& s, int64_t r) {
  const int64_t most = s.args->kept;
  const int32_t* ids = s.args->ids + r * most;
  const float* lp = (const float*)s.args->log_probs + r * most;
  int held = 0, wrong = 0;
  for (int64_t k = 0; k < most; ++k) held += ids[k] >= 0;
  for (int64_t k = 1; k < held; ++k) wrong |= ids[k] <= ids[k - 1];
  for (int64_t k = held; k < most; ++k) wrong |= ids[k] != -1;
  if (wrong || (held && ids[held - 1] >= s.task.args->vocab)) return false;
  int broken = 0, mass = 0;
  for (int k = 0; k < held; ++k) {
    s.kept.lp[k] = lp[k];
    broken |= !(lp[k] < INFINITY);
    mass |= lp[k] > -INFINITY;
  }
  const float log_tail = ((const float*)s.args->log_tail)[r];
  s.kept.ids = ids;
  s.kept.n = held;
  mass |= takes_tail(s) && log_tail > -INFINITY;
  return !broken && mass && log_tail < INFINITY;
}

// The student's row: its kept logits, its tail, their sum. False: no distribution.
static bool normalise_sparse(const SparseTask& s, Row& row, Parts* parts) {
  const Task& task = s.task;
  const Kept& kept = s.kept;
  gather(task.student, row.student, kept.ids, kept.n, kept.z);
  parts->kept = norm_of_kept(kept.z, kept.n, task.per_t);
  if (!(parts->kept.sum >= 0)) return false;
  if (s.args->mode == KD_RENORMALIZE) {
    if (parts->kept.sum == 0) return false;
    if (!task.args->stats && row.label < 0 && finite_row(task, row)) {
      parts->log_tail = -INFINITY;
      row.s = parts->kept;
      return true;
    }
  }
  if (!sum_tail(task, row, kept, &parts->tail) && !careful_tail(task, row, kept, &parts->tail)) return false;
  row.s = together(parts->kept, parts->tail, task.per_t);
  if (!usable(row.s)) return false;
  const Norm& tail = parts->tail;
  parts->log_tail =
      tail.sum > 0 ? ((double)tail.reference - row.s.reference) * task.per_t + log(tail.sum) - log(row.s.sum)
                   : -INFINITY;
  if (row.label >= 0) {
    const int32_t id = (int32_t)row.label;
    float z[kWidth];
    gather(task.student, row.student, &id, 1, z);
    row.z_label = z[0];
    row.cold =
        task.per_t == 1.0f ? row.s : careful_norm(task.student, row.student, task.args->vocab, 1.0f, task.zs);
  }
  return true;
}

static void sparse_stats(const SparseTask& s, const Row& row, int64_t r, double nll, const Comparison& c) {
  const int64_t top = argmax_of(s.task.student, row.student, s.task.args->vocab, s.task.zs);
  const float* lp = (const float*)s.args->log_probs + r * s.args->kept;
  int best = 0;
  for (int k = 1; k < s.kept.n; ++k) best = lp[k] > lp[best] ? k : best;
  const double values[KD_STATS] = {c.d,
                                   c.entropy,
                                   entropy(row.s, s.task.per_t),
                                   lp[best] > -INFINITY && top == s.kept.ids[best] ? 1.0 : 0.0,
                                   nll,
                                   top == row.label ? 1.0 : 0.0};
  for (int i = 0; i < KD_STATS; ++i) put(s.task.args->stats, r * KD_STATS + i, values[i]);
}

// kept.grad by the row's weights: d loss / d logit of the kept entries, the label's share apart.
static void weigh_kept(const SparseTask& s, const Row& row) {
  const Kept& kept = s.kept;
  const float kd = row.w_kd * s.task.per_t;
  for (int k = 0; k < kept.n; ++k) kept.grad[k] = kd != 0 ? kd * kept.grad[k] : 0.0f;
  if (row.w_ce == 0) return;
  log_probabilities(kept.z, kept.n, normaliser_of(row.cold, 1.0), 1.0f, kept.lq);
  const vf weight = vf::all(row.w_ce);
  for (int k = 0; k < kept.n; k += kWidth) {
    fma(weight, kd_exp(vf::load(kept.lq + k)), vf::load(kept.grad + k)).store(kept.grad + k);
  }
  for (int k = 0; k < kept.n; ++k) kept.grad[k] -= kept.ids[k] == row.label ? row.w_ce : 0.0f;
}

static void scatter(kd_dtype dtype, const float* values, const int32_t* ids, int n, char* row) {
  if (dtype == KD_F32) {
    for (int k = 0; k < n; ++k) ((float*)row)[ids[k]] = values[k];
    return;
  }
  uint16_t some[kWidth];
  for (int k = 0; k < n; k += kWidth) {
    bf16::store(some, vf::load(values + k));
    for (int j = 0; j < kWidth && k + j < n; ++j) ((uint16_t*)row)[ids[k + j]] = some[j];
  }
}

static bool has_label(const Kept& kept, int64_t label) {
  int low = 0, high = kept.n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (kept.ids[middle] < label)
      low = middle + 1;
    else
      high = middle;
  }
  return low < kept.n && kept.ids[low] == label;
}

// What every entry that is not kept gets: a e^((z - reference) / T).
struct Rest {
  float reference, a;
};

static Rest rest_of(const SparseTask& s, const Row& row, const Parts& parts, const Comparison& c) {
  const Norm& tail = parts.tail;
  if (!(parts.log_tail >= kHopeless)) return {0, 0};  // of masked entries, or none
  double a = row.w_kd != 0 ? row.w_kd * s.task.per_t * c.rest : 0;
  if (row.w_ce != 0 && !cold_label(s.task, row)) a += row.w_ce * exp(parts.log_tail);
  return {tail.reference, (float)(a / tail.sum)};
}

// One block that goes through floats: fp16, logits to be computed, a label at another temperature, the row's
// end.
static void staged_block(const SparseTask& s, const Row& row, const Rest& rest, Normaliser cold,
                         int64_t first, int n, Inside in) {
  const Task& task = s.task;
  const int padded = whole_steps(n);
  stage(task.student, row.student, first, n, task.zs);
  tail_sweeps_for(KD_F32).scale(task.zs, task.out, padded, rest.reference, task.per_t, rest.a,
                                ahead_in(task, row, first, kLast));
  if (cold_label(task, row)) add_cold_softmax(task.zs, task.out, padded, cold, row.w_ce);
  if (row.w_ce != 0 && row.label >= first && row.label < first + n) task.out[row.label - first] -= row.w_ce;
  for (int k = in.at; k < in.end; ++k) task.out[s.kept.ids[k] - first] = s.kept.grad[k];
  if (!task.student.plain) chain_rule(task.student, task.zs, task.out, n);
  store_block(task.args->dtype, task.out, row.gradient, first, n);
}

static void write_sparse_gradient(const SparseTask& s, const Row& row, const Parts& parts,
                                  const Comparison& c) {
  const kd_rows& a = *s.task.args;
  const int64_t size = size_of(a.dtype);
  const Rest rest = rest_of(s, row, parts, c);
  const Normaliser cold = cold_label(s.task, row) ? normaliser_of(row.cold, 1.0) : Normaliser{0, 0};
  const TailSweeps& sweeps = tail_sweeps_for(a.dtype);
  weigh_kept(s, row);
  Inside in = {0, 0};
  for (int64_t first = 0; first < a.vocab; first += kBlock) {
    const int n = (int)(a.vocab - first < kBlock ? a.vocab - first : kBlock);
    in = inside(s.kept, in.end, first + n);
    char* out = row.gradient + first * size;
    if (row.staged || n < kBlock) {
      staged_block(s, row, rest, cold, first, n, in);
      continue;
    }
    if (rest.a == 0) {
      memset(out, 0, kBlock * size);
    } else {
      sweeps.scale(row.student + first * size, out, n, rest.reference, s.task.per_t, rest.a,
                   ahead_in(s.task, row, first, kLast));
    }
    scatter(a.dtype, s.kept.grad + in.at, s.kept.ids + in.at, in.end - in.at, row.gradient);
  }
  const int64_t whole = a.vocab / kBlock * kBlock;
  if (row.w_ce == 0 || row.staged || row.label >= whole || has_label(s.kept, row.label)) return;
  const double e = exp(((double)row.z_label - rest.reference) * s.task.per_t);
  s.task.out[0] = (float)(rest.a * e - row.w_ce);
  store_block(a.dtype, s.task.out, row.gradient, row.label, 1);
}

static void sparse_row(SparseTask& s, int64_t r, int64_t end) {
  const kd_rows& a = *s.task.args;
  Row row = sparse_row_at(s, r, end);
  zero_padding(a, r);
  if (row.w_kd == 0 && row.w_ce == 0) return fill_row(s.task, r, 0.0f);
  Parts parts;
  if ((row.w_ce != 0 && row.label < 0) || !take_kept(s, r) || !normalise_sparse(s, row, &parts)) {
    return fill_row(s.task, r, NAN);
  }
  const double nll = negative_log_likelihood(row);
  const Comparison c = compare(s, row, parts, ((const float*)s.args->log_tail)[r]);
  if (a.stats) sparse_stats(s, row, r, nll, c);
  put_loss(a, row, r, c.d, nll);
  if (row.gradient) write_sparse_gradient(s, row, parts, c);
}

int sparse(const kd_sparse* args, int64_t begin, int64_t end, void* scratch) {
  const kd_rows& a = args->rows;
  if (a.kernel < 0 || a.kernel >= kDivergences || args->mode < KD_GHOST || args->mode > KD_SAMPLED) return -1;
  SparseTask s;
  s.args = args;
  s.task.args = &a;
  s.task.student = s.task.teacher = source_of(a.student, a.dtype);
  s.task.given = {(float)a.a, (float)a.b};
  s.task.per_t = (float)(1.0 / a.temperature);
  carve_sparse(s, scratch);
  for (int64_t r = begin; r < end; ++r) sparse_row(s, r, end);
  return 0;
}

}  // namespace KD_NS

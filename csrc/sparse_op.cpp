// kdkernels_C::sparse_: between tensors and the torch-free kernels of sparse.h. Its schema is in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "build_facts.gen.h"
#include "glue.h"
#include "sparse.h"

namespace kd {
namespace {

void check_scalars(double scale, double softcap, int64_t kernel, double a, double b, double excess,
                   int64_t mode, double temperature, int64_t vocab) {
  check_finite("student_scale", scale);
  require(std::isfinite(softcap) && softcap >= 0, "student_softcap is ", softcap,
          "; it must be 0 (none) or positive");
  require(kernel >= 0 && kernel < KD_KERNEL_COUNT, "kernel is ", kernel, "; sparse teachers take ids 0 to ",
          KD_KERNEL_COUNT - 1);
  check_finite("a", a);
  check_finite("b", b);
  check_finite("excess", excess);
  require(mode >= KD_GHOST && mode <= KD_SAMPLED, "mode is ", mode, "; it must be ", int(KD_GHOST), " to ",
          int(KD_SAMPLED));
  require(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
          "; it must be positive");
  require(vocab >= 1, "vocab is ", vocab, "; it must be at least 1");
}

// Where the gradient goes: the student's own memory or apart from it.
void take_gradient(kd_rows& args, const Tensor& dlogits, const Tensor& student) {
  args.dlogits_stride = dlogits.stride(0);
  args.dlogits_vocab = dlogits.size(1);
  const int64_t bytes = args.dtype == KD_F64 ? 8 : args.dtype == KD_F32 ? 4 : 2;
  const bool exact =
      args.dlogits == args.student.data && (args.rows == 1 || dlogits.stride(0) == student.stride(0));
  require(exact || !overlap(args.dlogits, dlogits, args.student.data, student, bytes),
          "dlogits shares part of student's memory; it must be student itself or apart from it");
}

void sparse_(const Tensor& student, const OptionalTensor& student_bias, double student_scale,
             double student_softcap, const Tensor& ids, const Tensor& log_probs, const Tensor& log_tail,
             const Tensor& w_kd, const OptionalTensor& w_ce, const OptionalTensor& labels, int64_t kernel,
             double a, double b, double excess, int64_t mode, double temperature, int64_t vocab,
             const Tensor& loss, const OptionalTensor& dlogits, const OptionalTensor& stats) {
  check_scalars(student_scale, student_softcap, kernel, a, b, excess, mode, temperature, vocab);
  const kd_dtype dtype = dtype_of(student);
  const ScalarType logits = student.scalar_type();
  const ScalarType acc = dtype == KD_F64 ? ScalarType::Double : ScalarType::Float;
  require(student.dim() == 2, "student has shape ", shape_text(student),
          "; it must be a matrix [rows, vocabulary]");
  const int64_t rows = student.size(0);
  check_matrix("student", student, logits, rows, vocab);
  check_bias("student_bias", student_bias, acc, vocab);
  require(ids.dim() == 2 && ids.size(1) >= 1, "ids has shape ", shape_text(ids),
          "; it must be [rows, at least 1]");
  const int64_t kept = ids.size(1);
  check_per_row("ids", ids, ScalarType::Int, rows, kept);
  check_per_row("log_probs", log_probs, acc, rows, kept);
  check_per_row("log_tail", log_tail, acc, rows);
  check_per_row("w_kd", w_kd, acc, rows);
  if (w_ce) check_per_row("w_ce", *w_ce, acc, rows);
  if (labels) check_per_row("labels", *labels, ScalarType::Long, rows);
  require(!w_ce || labels, "w_ce is given without labels; pass labels [rows] as well");
  check_per_row("loss", loss, acc, rows);
  if (dlogits) check_matrix("dlogits", *dlogits, logits, rows, vocab, /*output=*/true);
  if (stats) check_per_row("stats", *stats, acc, rows, KD_STATS);
  if (rows == 0) return;

  // Outputs first: asking for a writable pointer may move a copy-on-write tensor that an input shares.
  kd_sparse args{};
  args.rows.loss = loss.mutable_data_ptr();
  args.rows.dlogits = dlogits ? dlogits->mutable_data_ptr() : nullptr;
  args.rows.stats = stats ? stats->mutable_data_ptr() : nullptr;
  args.rows.student = {student.const_data_ptr(), student.stride(0), pointer(student_bias), student_scale,
                       student_softcap};
  args.rows.dtype = dtype;
  args.rows.rows = rows;
  args.rows.vocab = vocab;
  args.rows.kernel = static_cast<int32_t>(kernel);
  args.rows.a = a;
  args.rows.b = b;
  args.rows.temperature = temperature;
  args.rows.w_kd = w_kd.const_data_ptr();
  args.rows.w_ce = pointer(w_ce);
  args.rows.labels = pointer<int64_t>(labels);
  args.kept = kept;
  args.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  args.log_probs = log_probs.const_data_ptr();
  args.log_tail = log_tail.const_data_ptr();
  args.mode = static_cast<int32_t>(mode);
  args.excess = excess;
  if (dlogits) take_gradient(args.rows, *dlogits, student);
  run_rows(rows, vocab, kd_sparse_scratch_bytes(&args), [&](int64_t begin, int64_t end, void* scratch) {
    return kd_sparse_cpu(&args, begin, end, scratch);
  });
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) { m.impl("sparse_", TORCH_BOX(&kd::sparse_)); }

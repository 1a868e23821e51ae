// kdkernels_C::sparse_: between tensors and the torch-free kernels of sparse.h. Its schema is in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "row_arguments.h"
#include "sparse.h"

namespace kd {
namespace {

void sparse_(const Tensor& student, const OptionalTensor& student_bias, double student_scale,
             double student_softcap, const Tensor& ids, const Tensor& log_probs, const Tensor& log_tail,
             const Tensor& w_kd, const OptionalTensor& w_ce, const OptionalTensor& labels, int64_t kernel,
             double a, double b, double excess, int64_t mode, double temperature, int64_t vocab,
             const Tensor& loss, const OptionalTensor& dlogits, const OptionalTensor& stats) {
  const SideArguments s{"student", "student_bias", student, student_bias, student_scale, student_softcap};
  const RowArguments given{s, w_kd, w_ce, labels, kernel, a, b, temperature, vocab};
  const RowOutputs out{loss, dlogits, stats};
  check_finite("excess", excess);
  require(mode >= KD_GHOST && mode <= KD_SAMPLED, "mode is ", mode, "; it must be ", int(KD_GHOST), " to ",
          int(KD_SAMPLED));
  kd_sparse args{};
  args.rows = given.checked(0);
  const int64_t rows = args.rows.rows;
  require(ids.dim() == 2 && ids.size(1) >= 1, "ids has shape ", shape_text(ids),
          "; it must be [rows, at least 1]");
  args.kept = ids.size(1);
  check_per_row("ids", ids, ScalarType::Int, rows, args.kept);
  check_per_row("log_probs", log_probs, given.accumulation(), rows, args.kept);
  check_per_row("log_tail", log_tail, given.accumulation(), rows);
  out.check(given, rows);
  if (rows == 0) return;
  out.take(args.rows);
  given.take_inputs(args.rows);
  args.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  args.log_probs = log_probs.const_data_ptr();
  args.log_tail = log_tail.const_data_ptr();
  args.mode = static_cast<int32_t>(mode);
  args.excess = excess;
  if (dlogits) check_apart(args.rows, *dlogits, student);
  run_rows(rows, vocab, kd_sparse_scratch_bytes(&args), [&](int64_t begin, int64_t end, void* scratch) {
    return kd_sparse_cpu(&args, begin, end, scratch);
  });
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) { m.impl("sparse_", TORCH_BOX(&kd::sparse_)); }

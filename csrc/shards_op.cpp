// kdkernels_C::shard_norms_, shard_sums_, shard_gradient_: between tensors and the torch-free kernels of
// shards.h. Their schemas are in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "row_arguments.h"
#include "shards.h"

namespace kd {
namespace {

// What the three leaves have in common, in the order of their schemas.
struct Given {
  SideArguments student, teacher;
  RowArguments rows;
  int64_t offset;
  const Tensor& share;

  Given(const Tensor& s, const Tensor& t, const OptionalTensor& s_bias, const OptionalTensor& t_bias,
        double s_scale, double s_softcap, double t_scale, double t_softcap, const Tensor& w_kd,
        const OptionalTensor& w_ce, const OptionalTensor& labels, int64_t kernel, double a, double b,
        double temperature, int64_t vocab, int64_t first, const Tensor& own)
      : student{"student", "student_bias", s, s_bias, s_scale, s_softcap},
        teacher{"teacher", "teacher_bias", t, t_bias, t_scale, t_softcap},
        rows{student, w_kd, w_ce, labels, kernel, a, b, temperature, vocab},
        offset(first),
        share(own) {}
  Given(const Given&) = delete;  // rows refers to student

  // Everything but what is written.
  kd_shard checked() const {
    require(offset >= 0, "offset is ", offset, "; it must not be negative");
    require(student.x.scalar_type() != ScalarType::Double,
            "student is float64; shards take float32, float16 and bfloat16");
    kd_shard args{};
    args.rows = rows.checked(0);
    teacher.check(student.x.scalar_type(), ScalarType::Float, args.rows.rows, rows.vocab);
    check_per_row("share", share, ScalarType::Float, args.rows.rows, KD_SHARE);
    args.rows.teacher = teacher.side();
    args.offset = offset;
    return args;
  }

  // After the pointers of what is written: asking for those may move a copy-on-write tensor.
  template <class Part>
  void run(kd_shard& args, const Part& part) const {
    take_inputs(args);
    run_rows(args.rows.rows, rows.vocab, kd_shard_scratch_bytes(&args),
             [&](int64_t begin, int64_t end, void* scratch) { return part(&args, begin, end, scratch); });
  }

  void take_inputs(kd_shard& args) const {
    rows.take_inputs(args.rows);
    args.rows.teacher.data = teacher.x.const_data_ptr();
  }
};

const double* merged_of(const Tensor& merged, int64_t rows) {
  check_per_row("merged", merged, ScalarType::Double, rows, KD_MERGED);
  return static_cast<const double*>(merged.const_data_ptr());
}

float* kept_of(const OptionalTensor& kept, kd_shard& args) {
  if (!kept) return nullptr;
  args.kept_stride = kd_shard_kept_stride(args.rows.vocab);
  check_per_row("kept", *kept, ScalarType::Float, args.rows.rows, args.kept_stride);
  return const_cast<float*>(static_cast<const float*>(kept->const_data_ptr()));
}

#define KD_GIVEN                                                                                           \
  const Tensor &student, const Tensor &teacher, const OptionalTensor &student_bias,                        \
      const OptionalTensor &teacher_bias, double student_scale, double student_softcap,                    \
      double teacher_scale, double teacher_softcap, const Tensor &w_kd, const OptionalTensor &w_ce,        \
      const OptionalTensor &labels, int64_t kernel, double a, double b, double temperature, int64_t vocab, \
      int64_t offset, const Tensor &share
#define KD_PASSED                                                                              \
  student, teacher, student_bias, teacher_bias, student_scale, student_softcap, teacher_scale, \
      teacher_softcap, w_kd, w_ce, labels, kernel, a, b, temperature, vocab, offset, share

void shard_norms_(KD_GIVEN, bool cold, const OptionalTensor& places) {
  const Given given(KD_PASSED);
  kd_shard args = given.checked();
  if (places) check_per_row("places", *places, ScalarType::Long, args.rows.rows, 2);
  if (args.rows.rows == 0) return;
  args.cold = cold;
  args.share = static_cast<float*>(share.mutable_data_ptr());
  args.places = places ? static_cast<int64_t*>(places->mutable_data_ptr()) : nullptr;
  given.run(args, kd_shard_norms);
}

void shard_sums_(KD_GIVEN, const Tensor& merged, const OptionalTensor& again, const OptionalTensor& kept,
                 const Tensor& sums) {
  const Given given(KD_PASSED);
  kd_shard args = given.checked();
  const int64_t rows = args.rows.rows;
  args.merged = merged_of(merged, rows);
  if (again) check_per_row("again", *again, ScalarType::Bool, rows);
  check_per_row("sums", sums, ScalarType::Float, rows, 2);
  args.kept = kept_of(kept, args);
  if (rows == 0) return;
  if (kept) args.kept = static_cast<float*>(kept->mutable_data_ptr());
  args.sums = static_cast<float*>(sums.mutable_data_ptr());
  args.again = pointer<uint8_t>(again);
  args.share = const_cast<float*>(static_cast<const float*>(share.const_data_ptr()));
  given.run(args, kd_shard_sums);
}

void shard_gradient_(KD_GIVEN, const Tensor& merged, const OptionalTensor& kept, const Tensor& dlogits) {
  const Given given(KD_PASSED);
  kd_shard args = given.checked();
  const int64_t rows = args.rows.rows;
  args.merged = merged_of(merged, rows);
  args.kept = kept_of(kept, args);
  check_matrix("dlogits", dlogits, student.scalar_type(), rows, vocab, /*output=*/true);
  if (rows == 0) return;
  args.rows.dlogits = dlogits.mutable_data_ptr();
  args.rows.dlogits_stride = dlogits.stride(0);
  args.rows.dlogits_vocab = dlogits.size(1);
  args.share = const_cast<float*>(static_cast<const float*>(share.const_data_ptr()));
  given.take_inputs(args);
  check_apart(args.rows, dlogits, student, &teacher);
  given.run(args, kd_shard_gradient);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("shard_norms_", TORCH_BOX(&kd::shard_norms_));
  m.impl("shard_sums_", TORCH_BOX(&kd::shard_sums_));
  m.impl("shard_gradient_", TORCH_BOX(&kd::shard_gradient_));
}

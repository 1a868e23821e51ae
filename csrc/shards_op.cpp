// kdkernels_C::shard_norms_, shard_sums_, shard_gradient_: between tensors and the torch-free kernels of
// shards.h. Their schemas are in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "build_facts.gen.h"
#include "glue.h"
#include "shards.h"

namespace kd {
namespace {

// What the three leaves have in common, in the order of their schemas.
struct Given {
  const Tensor &student, &teacher;
  const OptionalTensor &student_bias, &teacher_bias;
  double student_scale, student_softcap, teacher_scale, teacher_softcap;
  const Tensor& w_kd;
  const OptionalTensor &w_ce, &labels;
  int64_t kernel;
  double a, b, temperature;
  int64_t vocab, offset;
  const Tensor& share;

  void check_scalars() const {
    check_finite("student_scale", student_scale);
    check_finite("teacher_scale", teacher_scale);
    require(std::isfinite(student_softcap) && student_softcap >= 0, "student_softcap is ", student_softcap,
            "; it must be 0 (none) or positive");
    require(std::isfinite(teacher_softcap) && teacher_softcap >= 0, "teacher_softcap is ", teacher_softcap,
            "; it must be 0 (none) or positive");
    require(kernel >= 0 && kernel < KD_KERNEL_COUNT, "kernel is ", kernel, "; shards take ids 0 to ",
            KD_KERNEL_COUNT - 1);
    check_finite("a", a);
    check_finite("b", b);
    require(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
            "; it must be positive");
    require(vocab >= 1, "vocab is ", vocab, "; it must be at least 1");
    require(offset >= 0, "offset is ", offset, "; it must not be negative");
  }

  // Everything but what is written.
  kd_shard checked() const {
    check_scalars();
    const kd_dtype dtype = dtype_of(student);
    require(dtype != KD_F64, "student is float64; shards take float32, float16 and bfloat16");
    require(student.dim() == 2, "student has shape ", shape_text(student),
            "; it must be a matrix [rows, vocabulary]");
    const int64_t rows = student.size(0);
    check_matrix("student", student, student.scalar_type(), rows, vocab);
    check_matrix("teacher", teacher, student.scalar_type(), rows, vocab);
    check_bias("student_bias", student_bias, ScalarType::Float, vocab);
    check_bias("teacher_bias", teacher_bias, ScalarType::Float, vocab);
    check_per_row("w_kd", w_kd, ScalarType::Float, rows);
    if (w_ce) check_per_row("w_ce", *w_ce, ScalarType::Float, rows);
    if (labels) check_per_row("labels", *labels, ScalarType::Long, rows);
    require(!w_ce || labels, "w_ce is given without labels; pass labels [rows] as well");
    check_per_row("share", share, ScalarType::Float, rows, KD_SHARE);
    kd_shard args{};
    args.rows.student = {nullptr, student.stride(0), pointer(student_bias), student_scale, student_softcap};
    args.rows.teacher = {nullptr, teacher.stride(0), pointer(teacher_bias), teacher_scale, teacher_softcap};
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
    args.offset = offset;
    return args;
  }

  // After the pointers of what is written: asking for those may move a copy-on-write tensor.
  template <class Part>
  void run(kd_shard& args, const Part& part) const {
    args.rows.student.data = student.const_data_ptr();
    args.rows.teacher.data = teacher.const_data_ptr();
    run_rows(args.rows.rows, vocab, kd_shard_scratch_bytes(&args),
             [&](int64_t begin, int64_t end, void* scratch) { return part(&args, begin, end, scratch); });
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
  const Given given{KD_PASSED};
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
  const Given given{KD_PASSED};
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
  const Given given{KD_PASSED};
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
  const int64_t bytes = args.rows.dtype == KD_F32 ? 4 : 2;
  const void *to = args.rows.dlogits, *from = student.const_data_ptr();
  const bool exact = to == from && (rows == 1 || dlogits.stride(0) == student.stride(0));
  require(exact || !overlap(to, dlogits, from, student, bytes),
          "dlogits shares part of student's memory; it must be student itself or apart from it");
  require(!overlap(to, dlogits, teacher.const_data_ptr(), teacher, bytes),
          "dlogits shares memory with teacher; it must be apart from it");
  given.run(args, kd_shard_gradient);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("shard_norms_", TORCH_BOX(&kd::shard_norms_));
  m.impl("shard_sums_", TORCH_BOX(&kd::shard_sums_));
  m.impl("shard_gradient_", TORCH_BOX(&kd::shard_gradient_));
}

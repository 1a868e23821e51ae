// Schemas of all native leaves, and the glue between tensors and the torch-free kernels of kernels.h.
// Only torch's stable ABI is used, so one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "build_facts.gen.h"
#include "glue.h"

#define KD_EXPORT __attribute__((visibility("default")))

namespace kd {
namespace {

struct Sides {  // the scalars of the schema that belong to no tensor
  double student_scale, student_softcap, teacher_scale, teacher_softcap;
};

void check_scalars(const Sides& s, int64_t kernel, double a, double b, double temperature, int64_t vocab) {
  check_finite("student_scale", s.student_scale);
  check_finite("teacher_scale", s.teacher_scale);
  require(std::isfinite(s.student_softcap) && s.student_softcap >= 0, "student_softcap is ",
          s.student_softcap, "; it must be 0 (none) or positive");
  require(std::isfinite(s.teacher_softcap) && s.teacher_softcap >= 0, "teacher_softcap is ",
          s.teacher_softcap, "; it must be 0 (none) or positive");
  require(kernel >= KD_ADAPTIVE_KL && kernel < KD_KERNEL_COUNT, "kernel is ", kernel, "; this build has ids ",
          KD_ADAPTIVE_KL, " to ", KD_KERNEL_COUNT - 1);
  check_finite("a", a);
  check_finite("b", b);
  require(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
          "; it must be positive");
  require(vocab >= 1, "vocab is ", vocab, "; it must be at least 1");
}

void dense_(const Tensor& student, const Tensor& teacher, const OptionalTensor& student_bias,
            const OptionalTensor& teacher_bias, double student_scale, double student_softcap,
            double teacher_scale, double teacher_softcap, const Tensor& w_kd, const OptionalTensor& w_ce,
            const OptionalTensor& labels, int64_t kernel, double a, double b, double temperature,
            int64_t vocab, const Tensor& loss, const OptionalTensor& dlogits, const OptionalTensor& stats) {
  const Sides sides{student_scale, student_softcap, teacher_scale, teacher_softcap};
  check_scalars(sides, kernel, a, b, temperature, vocab);
  const kd_dtype dtype = dtype_of(student);
  const ScalarType logits = student.scalar_type();
  const ScalarType acc = dtype == KD_F64 ? ScalarType::Double : ScalarType::Float;
  require(student.dim() == 2, "student has shape ", shape_text(student),
          "; it must be a matrix [rows, vocabulary]");
  const int64_t rows = student.size(0);
  check_matrix("student", student, logits, rows, vocab);
  check_matrix("teacher", teacher, logits, rows, vocab);
  check_bias("student_bias", student_bias, acc, vocab);
  check_bias("teacher_bias", teacher_bias, acc, vocab);
  check_per_row("w_kd", w_kd, acc, rows);
  if (w_ce) check_per_row("w_ce", *w_ce, acc, rows);
  if (labels) check_per_row("labels", *labels, ScalarType::Long, rows);
  require(!w_ce || labels, "w_ce is given without labels; pass labels [rows] as well");
  check_per_row("loss", loss, acc, rows);
  if (dlogits) check_matrix("dlogits", *dlogits, logits, rows, vocab, /*output=*/true);
  if (stats) check_per_row("stats", *stats, acc, rows, KD_STATS);
  if (rows == 0) return;

  // Outputs first: asking for a writable pointer may move a copy-on-write tensor that an input shares.
  kd_rows args{};
  args.loss = loss.mutable_data_ptr();
  args.dlogits = dlogits ? dlogits->mutable_data_ptr() : nullptr;
  args.stats = stats ? stats->mutable_data_ptr() : nullptr;
  args.student = {student.const_data_ptr(), student.stride(0), pointer(student_bias), student_scale,
                  student_softcap};
  args.teacher = {teacher.const_data_ptr(), teacher.stride(0), pointer(teacher_bias), teacher_scale,
                  teacher_softcap};
  args.dtype = dtype;
  args.rows = rows;
  args.vocab = vocab;
  args.kernel = static_cast<int32_t>(kernel);
  args.a = a;
  args.b = b;
  args.temperature = temperature;
  args.w_kd = w_kd.const_data_ptr();
  args.w_ce = pointer(w_ce);
  args.labels = pointer<int64_t>(labels);
  if (dlogits) {
    args.dlogits_stride = dlogits->stride(0);
    args.dlogits_vocab = dlogits->size(1);
    const int64_t bytes = dtype == KD_F64 ? 8 : dtype == KD_F32 ? 4 : 2;
    const bool exact =
        args.dlogits == args.student.data && (rows == 1 || dlogits->stride(0) == student.stride(0));
    require(exact || !overlap(args.dlogits, *dlogits, args.student.data, student, bytes),
            "dlogits shares part of student's memory; it must be student itself or apart from it");
    require(!overlap(args.dlogits, *dlogits, args.teacher.data, teacher, bytes),
            "dlogits shares memory with teacher; it must be apart from it");
  }
  run_rows(rows, vocab, kd_dense_scratch_bytes(&args), [&](int64_t begin, int64_t end, void* scratch) {
    return kd_dense_cpu(&args, begin, end, scratch);
  });
}

}  // namespace
}  // namespace kd

// For native.py, by ctypes: plain C, usable before any tensor exists.
extern "C" {
KD_EXPORT const char* kdkernels_build_facts() { return KD_BUILD_FACTS; }
KD_EXPORT const char* kdkernels_isa() { return kd_cpu_isa(); }
KD_EXPORT const char* kdkernels_isa_error() { return kd_cpu_isa_error(); }
}

STABLE_TORCH_LIBRARY(kdkernels_C, m) {
  m.def(
      "dense_(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, float "
      "student_scale, "
      "float student_softcap, float teacher_scale, float teacher_softcap, Tensor w_kd, Tensor? w_ce, "
      "Tensor? labels, int kernel, float a, float b, float temperature, int vocab, Tensor(a!) loss, "
      "Tensor(b!)? dlogits, Tensor(c!)? stats) -> ()");
  m.def(
      "sparse_(Tensor student, Tensor? student_bias, float student_scale, float student_softcap, Tensor ids, "
      "Tensor log_probs, Tensor log_tail, Tensor w_kd, Tensor? w_ce, Tensor? labels, int kernel, float a, "
      "float b, float excess, int mode, float temperature, int vocab, Tensor(a!) loss, Tensor(b!)? dlogits, "
      "Tensor(c!)? stats) -> ()");
  m.def(
      "topk_(Tensor logits, Tensor? bias, float scale, float softcap, float temperature, int vocab, int k, "
      "float[] other_temperatures, Tensor(a!) ids, Tensor(b!) log_probs, Tensor(c!) log_tail, "
      "Tensor(d!)? entropy, Tensor(e!)? other_tails) -> ()");
  m.def(
      "draw_(Tensor logits, Tensor? bias, float scale, float softcap, float temperature, int vocab, "
      "Tensor uniforms, Tensor(a!) ids) -> ()");
  m.def(
      "gate_(Tensor student, Tensor? student_bias, float student_scale, float student_softcap, Tensor "
      "teacher, "
      "Tensor? teacher_bias, float teacher_scale, float teacher_softcap, Tensor threshold, Tensor? uniforms, "
      "float temperature, int top_k, float top_p, int vocab, Tensor(a!) token, Tensor(b!) from_teacher, "
      "Tensor(c!) jsd) -> ()");
  m.def(
      "shard_norms_(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, float "
      "student_scale, float student_softcap, float teacher_scale, float teacher_softcap, Tensor w_kd, "
      "Tensor? w_ce, "
      "Tensor? labels, int kernel, float a, float b, float temperature, int vocab, int offset, Tensor(a!) "
      "share, "
      "bool cold, Tensor(b!)? places) -> ()");
  m.def(
      "shard_sums_(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, float "
      "student_scale, float student_softcap, float teacher_scale, float teacher_softcap, Tensor w_kd, "
      "Tensor? w_ce, "
      "Tensor? labels, int kernel, float a, float b, float temperature, int vocab, int offset, Tensor share, "
      "Tensor merged, Tensor? again, Tensor(a!)? kept, Tensor(b!) sums) -> ()");
  m.def(
      "shard_gradient_(Tensor student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, float "
      "student_scale, float student_softcap, float teacher_scale, float teacher_softcap, Tensor w_kd, "
      "Tensor? w_ce, "
      "Tensor? labels, int kernel, float a, float b, float temperature, int vocab, int offset, Tensor share, "
      "Tensor merged, Tensor? kept, Tensor(a!) dlogits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) { m.impl("dense_", TORCH_BOX(&kd::dense_)); }

// Schemas of all native leaves, and the glue between tensors and the torch-free kernels of kernels.h.
// Only torch's stable ABI is used, so one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "row_arguments.h"

#define KD_EXPORT __attribute__((visibility("default")))

namespace kd {
namespace {

void dense_(const Tensor& student, const Tensor& teacher, const OptionalTensor& student_bias,
            const OptionalTensor& teacher_bias, double student_scale, double student_softcap,
            double teacher_scale, double teacher_softcap, const Tensor& w_kd, const OptionalTensor& w_ce,
            const OptionalTensor& labels, int64_t kernel, double a, double b, double temperature,
            int64_t vocab, const Tensor& loss, const OptionalTensor& dlogits, const OptionalTensor& stats) {
  const SideArguments s{"student", "student_bias", student, student_bias, student_scale, student_softcap};
  const SideArguments t{"teacher", "teacher_bias", teacher, teacher_bias, teacher_scale, teacher_softcap};
  const RowArguments given{s, w_kd, w_ce, labels, kernel, a, b, temperature, vocab};
  const RowOutputs out{loss, dlogits, stats};
  kd_rows args = given.checked(KD_ADAPTIVE_KL);
  t.check(student.scalar_type(), given.accumulation(), args.rows, vocab);
  out.check(given, args.rows);
  if (args.rows == 0) return;
  out.take(args);
  given.take_inputs(args);
  args.teacher = t.side();
  args.teacher.data = teacher.const_data_ptr();
  if (dlogits) check_apart(args, *dlogits, student, &teacher);
  run_rows(args.rows, vocab, kd_dense_scratch_bytes(&args), [&](int64_t begin, int64_t end, void* scratch) {
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

// The leaf of forward and reverse KL on a GPU with rows kept on chip; see cuda/onchip.h. Only where nvcc was
// found.
#ifdef KD_CUDA
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/onchip.h"
#include "cuda_glue.h"

namespace kd {
namespace {

void check_rows(const char* name, const Tensor& t, const Tensor& student, int64_t vocab, int64_t bytes) {
  require(t.is_cuda() && t.get_device_index() == student.get_device_index(), name,
          " is not on student's GPU");
  require(t.dim() == 2, name, " has shape ", shape_text(t), "; it must be a matrix [rows, vocabulary]");
  require(t.scalar_type() == student.scalar_type(), name, " is ", dtype_name(t.scalar_type()),
          "; student is ", dtype_name(student.scalar_type()));
  require(t.size(0) == student.size(0), name, " has ", t.size(0), " rows; student has ", student.size(0));
  require(t.size(1) >= vocab && t.size(1) <= kMost, name, " has ", t.size(1), " columns; vocab is ", vocab);
  require(t.size(1) <= 1 || t.stride(1) == 1, name, " has stride ", t.stride(1),
          " along the vocabulary; it must be 1: call .contiguous()");
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  require(address % 16 == 0 && (t.size(0) == 1 || t.stride(0) * bytes % 16 == 0), name,
          " has rows that begin between 16-byte boundaries; use another backend");
}

void check_numbers(const char* name, const Tensor& t, const Tensor& student) {
  require(t.is_cuda() && t.get_device_index() == student.get_device_index(), name,
          " is not on student's GPU");
  require(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == student.size(0) &&
              (t.size(0) <= 1 || t.stride(0) == 1),
          name, " is ", dtype_name(t.scalar_type()), " ", shape_text(t),
          "; it must be float32 [rows], contiguous");
}

void kl_onchip_(const Tensor& student, const Tensor& teacher, const Tensor& w_kd, bool reverse,
                double temperature, int64_t vocab, int64_t cluster, int64_t stages, const Tensor& loss,
                const OptionalTensor& dlogits) {
  const kd_dtype dtype = gpu_dtype_of("student", student);
  const int64_t bytes = dtype == KD_F32 ? 4 : 2;
  require(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
          "; it must be positive");
  require(vocab >= 1, "vocab is ", vocab, "; it must be at least 1");
  require(cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8, "cluster is ", cluster,
          "; it must be 1, 2, 4 or 8");
  require(stages >= 1 && stages <= 7, "stages is ", stages, "; it must be 1 to 7");
  require(stages * cluster * 8 * 2048 >= vocab * bytes / 16 * 16, "stages is ", stages, " and cluster ",
          cluster, ": too little for rows of ", vocab * bytes, " bytes");
  check_rows("student", student, student, vocab, bytes);
  check_rows("teacher", teacher, student, vocab, bytes);
  check_numbers("w_kd", w_kd, student);
  check_numbers("loss", loss, student);
  if (dlogits) check_rows("dlogits", *dlogits, student, vocab, bytes);
  require(student.size(0) <= kMost / 2, "student has ", student.size(0), " rows; at most 2^30");
  if (student.size(0) == 0) return;

  // Outputs first: asking for a writable pointer may move a copy-on-write tensor that an input shares.
  kd_onchip_call call{};
  call.loss = static_cast<float*>(loss.mutable_data_ptr());
  call.dlogits = dlogits ? dlogits->mutable_data_ptr() : nullptr;
  call.dlogits_row = dlogits ? dlogits->stride(0) : 0;
  call.dlogits_vocab = dlogits ? static_cast<int32_t>(dlogits->size(1)) : 0;
  call.student = student.const_data_ptr();
  call.student_row = student.stride(0);
  call.teacher = teacher.const_data_ptr();
  call.teacher_row = teacher.stride(0);
  call.w_kd = static_cast<const float*>(w_kd.const_data_ptr());
  call.rows = static_cast<int32_t>(student.size(0));
  call.vocab = static_cast<int32_t>(vocab);
  call.dtype = dtype;
  call.reverse = reverse;
  call.temperature = temperature;
  call.cluster = static_cast<int32_t>(cluster);
  call.stages = static_cast<int32_t>(stages);
  const char* wrong = kd_onchip(&call, stream_of(student.get_device_index()));
  require(!wrong, "the launch failed: ", wrong ? wrong : "");
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "kl_onchip_(Tensor student, Tensor teacher, Tensor w_kd, bool reverse, float temperature, int vocab, "
      "int cluster, int stages, Tensor(a!) loss, Tensor(b!)? dlogits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CUDA, m) { m.impl("kl_onchip_", TORCH_BOX(&kd::kl_onchip_)); }
#endif

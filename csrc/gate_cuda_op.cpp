// kdkernels_C::gate_ on CUDA tensors: between tensors and the launches of cuda/gate_plan.h. Only where nvcc
// was found.
#ifdef KD_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/gate_plan.h"
#include "cuda_glue.h"

namespace kd {
namespace {

void check_place(const char* name, const Tensor& t, const Tensor& student) {
  require(t.is_cuda() && t.get_device_index() == student.get_device_index(), name,
          " is not on student's GPU");
}

// A contiguous vector on the student's GPU.
void check_numbers(const char* name, const Tensor& t, const Tensor& student, ScalarType dtype, int64_t least,
                   const char* needed) {
  check_place(name, t, student);
  require(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) >= least && t.is_contiguous(), name, " is ",
          dtype_name(t.scalar_type()), " ", shape_text(t), "; it must be a contiguous ", needed, " [", least,
          "]");
}

kd_side side_of(const char* name, const Tensor& x, const OptionalTensor& bias, double scale, double softcap,
                const Tensor& student, int64_t vocab) {
  check_place(name, x, student);
  require(x.dim() == 2, name, " has shape ", shape_text(x), "; it must be a matrix [rows, vocabulary]");
  require(x.size(0) == student.size(0), name, " has ", x.size(0), " rows; student has ", student.size(0));
  require(x.size(1) >= vocab, name, " has ", x.size(1), " columns; vocab is ", vocab);
  require(x.size(1) <= 1 || x.stride(1) == 1, name, " has stride ", x.stride(1),
          " along the vocabulary; it must be 1: call .contiguous()");
  check_finite("scale", scale);
  require(std::isfinite(softcap) && softcap >= 0, "softcap is ", softcap,
          "; it must be 0 (none) or positive");
  if (bias) check_numbers("bias", *bias, student, ScalarType::Float, vocab, "float32");
  return {x.const_data_ptr(), x.stride(0), bias ? bias->const_data_ptr() : nullptr, scale, softcap};
}

void check_scalars(double temperature, int64_t top_k, double top_p, int64_t vocab, int64_t rows) {
  require(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
          "; it must be positive");
  require(top_k >= 0, "top_k is ", top_k, "; it must be 0 (all) or positive");
  require(top_p > 0 && top_p <= 1, "top_p is ", top_p, "; it must be in (0, 1]");
  require(vocab >= 1 && vocab <= KD_GATE_MOST_VOCAB, "vocab is ", vocab, "; it must be in 1 .. ",
          KD_GATE_MOST_VOCAB, ": use another backend");
  require(rows <= KD_GATE_MOST_ROWS, "student has ", rows, " rows; at most ", KD_GATE_MOST_ROWS);
}

void start(const kd_gate& args, const Tensor& student) {
  const int32_t device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const kd_gate_machine machine{static_cast<int32_t>(fact_of<kd_cuda_multiprocessors>(device)),
                                fact_of<kd_cuda_cache>(device)};
  // From torch's allocator: it belongs to the current stream, and a CUDA graph keeps it.
  const auto bytes = static_cast<int64_t>(gate::scratch_bytes(args, machine));
  const Tensor scratch = torch::stable::new_empty(student, {bytes}, ScalarType::Byte);
  const int code = kd_gate_cuda(&args, scratch.mutable_data_ptr(), machine, stream_of(device));
  require(code == 0, "the launch failed: ", kd_cuda_error(code));
}

void gate_(const Tensor& student, const OptionalTensor& student_bias, double student_scale,
           double student_softcap, const Tensor& teacher, const OptionalTensor& teacher_bias,
           double teacher_scale, double teacher_softcap, const Tensor& threshold,
           const OptionalTensor& uniforms, double temperature, int64_t top_k, double top_p, int64_t vocab,
           const Tensor& token, const Tensor& from_teacher, const Tensor& jsd) {
  kd_gate args{};
  args.student_dtype = gpu_dtype_of("student", student);
  args.teacher_dtype = gpu_dtype_of("teacher", teacher);
  require(student.dim() == 2, "student has shape ", shape_text(student),
          "; it must be a matrix [rows, vocabulary]");
  const int64_t rows = student.size(0);
  check_scalars(temperature, top_k, top_p, vocab, rows);
  args.rows = rows;
  args.vocab = vocab;
  args.temperature = temperature;
  args.top_k = top_k;
  args.top_p = top_p;
  check_numbers("threshold", threshold, student, ScalarType::Double, rows, "float64");
  if (uniforms) check_numbers("uniforms", *uniforms, student, ScalarType::Double, rows, "float64");
  check_numbers("token", token, student, ScalarType::Long, rows, "int64");
  check_numbers("from_teacher", from_teacher, student, ScalarType::Bool, rows, "bool");
  check_numbers("jsd", jsd, student, ScalarType::Float, rows, "float32");
  // Outputs first: asking for a writable pointer may move a copy-on-write tensor that an input shares.
  args.token = static_cast<int64_t*>(token.mutable_data_ptr());
  args.from_teacher = static_cast<uint8_t*>(from_teacher.mutable_data_ptr());
  args.jsd = jsd.mutable_data_ptr();
  args.student = side_of("student", student, student_bias, student_scale, student_softcap, student, vocab);
  args.teacher = side_of("teacher", teacher, teacher_bias, teacher_scale, teacher_softcap, student, vocab);
  args.threshold = static_cast<const double*>(threshold.const_data_ptr());
  args.uniforms = uniforms ? static_cast<const double*>(uniforms->const_data_ptr()) : nullptr;
  if (rows) start(args, student);
}

}  // namespace
}  // namespace kd

// For tests, which run the very launches in an emulator.
extern "C" {
__attribute__((visibility("default"))) size_t kdkernels_gate_scratch_bytes(const kd_gate* call,
                                                                           const kd_gate_machine* machine) {
  return kd::gate::scratch_bytes(*call, *machine);
}
__attribute__((visibility("default"))) void kdkernels_gate_plan(
    const kd_gate* call, void* scratch, const kd_gate_machine* machine,
    void (*visit)(const char* kernel, int grid_x, int grid_y, int threads, int shared, const void* arguments,
                  size_t bytes)) {
  for (const kd_gate_launch& l : kd::gate::plan(*call, scratch, *machine)) {
    visit(kd::gate::kernel_name(l.kernel), l.grid, 1, l.threads, 0, &l.arguments, sizeof l.arguments);
  }
}
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CUDA, m) { m.impl("gate_", TORCH_BOX(&kd::gate_)); }
#endif

// kdkernels_C::gate_: between tensors and the torch-free kernel of gate.h. Its schema is in ops.cpp.
#include <torch/csrc/stable/library.h>

#include "gate.h"
#include "glue.h"

namespace kd {
namespace {

// Logits that a worker gets at least: waking one takes as long as this many take.
constexpr int64_t kLeastShare = 16384;

struct Side {
  const char* name;
  const Tensor& x;
  const OptionalTensor& bias;
  double scale, softcap;

  kd_side check(int64_t rows, int64_t vocab) const {
    const std::string of = name;
    check_matrix(name, x, x.scalar_type(), rows, vocab);
    check_bias((of + "_bias").c_str(), bias,
               x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, vocab);
    check_finite((of + "_scale").c_str(), scale);
    require(std::isfinite(softcap) && softcap >= 0, name, "_softcap is ", softcap,
            "; it must be 0 (none) or positive");
    return {x.const_data_ptr(), x.stride(0), pointer(bias), scale, softcap};
  }
};

void check_sampling(double temperature, int64_t top_k, double top_p) {
  require(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
          "; it must be positive");
  require(top_k >= 0, "top_k is ", top_k, "; it must be 0 (all) or positive");
  require(top_p > 0 && top_p <= 1, "top_p is ", top_p, "; it must be in (0, 1]");
}

void run(const kd_gate& args) {
  const int64_t most = std::max<int64_t>(1, args.rows * args.vocab / kLeastShare);
  const int workers = static_cast<int>(std::min<int64_t>(most, torch::stable::get_num_threads()));
  const size_t bytes = kd_gate_bytes(&args, workers);
  Scratch shared(bytes);
  require(shared.data, "no memory for ", bytes, " bytes of scratch");
  kd_gate_begin(&args, workers, shared.data);
  std::atomic<int> error{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const int code = kd_gate_cpu(&args, static_cast<int>(worker), workers, shared.data);
      if (code) error.store(code);
    }
  });
  require(error.load() == 0, "the CPU kernel refused its arguments (code ", error.load(), ")");
}

void gate_(const Tensor& student, const OptionalTensor& student_bias, double student_scale,
           double student_softcap, const Tensor& teacher, const OptionalTensor& teacher_bias,
           double teacher_scale, double teacher_softcap, const Tensor& threshold,
           const OptionalTensor& uniforms, double temperature, int64_t top_k, double top_p, int64_t vocab,
           const Tensor& token, const Tensor& from_teacher, const Tensor& jsd) {
  const Side s{"student", student, student_bias, student_scale, student_softcap};
  const Side t{"teacher", teacher, teacher_bias, teacher_scale, teacher_softcap};
  kd_gate args{};
  args.student_dtype = dtype_of(student);
  args.teacher_dtype = dtype_of(teacher);
  const bool wide = args.student_dtype == KD_F64;
  require(wide == (args.teacher_dtype == KD_F64), "teacher is ", dtype_name(teacher.scalar_type()),
          " and student is ", dtype_name(student.scalar_type()), "; both must be float64 or neither");
  require(student.dim() == 2, "student has shape ", shape_text(student),
          "; it must be a matrix [rows, vocabulary]");
  require(vocab >= 1 && vocab <= INT32_MAX, "vocab is ", vocab, "; it must be in 1 .. 2^31 - 1");
  const int64_t rows = student.size(0);
  args.student = s.check(rows, vocab);
  args.teacher = t.check(rows, vocab);
  check_sampling(temperature, top_k, top_p);
  check_per_row("threshold", threshold, ScalarType::Double, rows);
  if (uniforms) check_per_row("uniforms", *uniforms, ScalarType::Double, rows);
  check_per_row("token", token, ScalarType::Long, rows);
  check_per_row("from_teacher", from_teacher, ScalarType::Bool, rows);
  check_per_row("jsd", jsd, wide ? ScalarType::Double : ScalarType::Float, rows);
  if (rows == 0) return;
  args.token = static_cast<int64_t*>(token.mutable_data_ptr());
  args.from_teacher = static_cast<uint8_t*>(from_teacher.mutable_data_ptr());
  args.jsd = jsd.mutable_data_ptr();
  args.rows = rows;
  args.vocab = vocab;
  args.threshold = static_cast<const double*>(threshold.const_data_ptr());
  args.uniforms = pointer<double>(uniforms);
  args.temperature = temperature;
  args.top_k = top_k;
  args.top_p = top_p;
  run(args);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) { m.impl("gate_", TORCH_BOX(&kd::gate_)); }

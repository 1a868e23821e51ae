// What the leaves over rows of a student check alike, and kd_rows made of it.
#pragma once
#include "build_facts.gen.h"
#include "glue.h"

namespace kd {

inline void check_temperature(double value) {
  require(std::isfinite(value) && value > 0, "temperature is ", value, "; it must be positive");
}

// One side as the schemas have it, and its names in messages.
struct SideArguments {
  const char *name, *bias_name;
  const Tensor& x;
  const OptionalTensor& bias;
  double scale, softcap;

  void check(ScalarType logits, ScalarType acc, int64_t rows, int64_t vocab) const {
    require(std::isfinite(scale), name, "_scale is ", scale, "; it must be finite");
    require(std::isfinite(softcap) && softcap >= 0, name, "_softcap is ", softcap,
            "; it must be 0 (none) or positive");
    check_matrix(name, x, logits, rows, vocab);
    check_bias(bias_name, bias, acc, vocab);
  }

  // Without the data: asking for that must come after the outputs' pointers.
  kd_side side() const { return {nullptr, x.stride(0), pointer(bias), scale, softcap}; }
};

// What every leaf over rows takes besides its sides and outputs.
struct RowArguments {
  const SideArguments& student;
  const Tensor& w_kd;
  const OptionalTensor &w_ce, &labels;
  int64_t kernel;
  double a, b, temperature;
  int64_t vocab;

  // Checks all of it; kernels from `least` on are served.
  kd_rows checked(int64_t least) const {
    require(kernel >= least && kernel < KD_KERNEL_COUNT, "kernel is ", kernel, "; it must be ", least, " to ",
            KD_KERNEL_COUNT - 1);
    check_finite("a", a);
    check_finite("b", b);
    check_temperature(temperature);
    require(vocab >= 1, "vocab is ", vocab, "; it must be at least 1");
    kd_rows args{};
    args.dtype = dtype_of(student.x);
    require(student.x.dim() == 2, "student has shape ", shape_text(student.x),
            "; it must be a matrix [rows, vocabulary]");
    args.rows = student.x.size(0);
    student.check(student.x.scalar_type(), accumulation(), args.rows, vocab);
    check_per_row("w_kd", w_kd, accumulation(), args.rows);
    if (w_ce) check_per_row("w_ce", *w_ce, accumulation(), args.rows);
    if (labels) check_per_row("labels", *labels, ScalarType::Long, args.rows);
    require(!w_ce || labels, "w_ce is given without labels; pass labels [rows] as well");
    args.student = student.side();
    args.vocab = vocab;
    args.kernel = static_cast<int32_t>(kernel);
    args.a = a;
    args.b = b;
    args.temperature = temperature;
    return args;
  }

  ScalarType accumulation() const {
    return student.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // After the outputs' pointers.
  void take_inputs(kd_rows& args) const {
    args.student.data = student.x.const_data_ptr();
    args.w_kd = w_kd.const_data_ptr();
    args.w_ce = pointer(w_ce);
    args.labels = pointer<int64_t>(labels);
  }
};

// Loss [rows], gradient [rows, at least vocab], statistics [rows, KD_STATS].
struct RowOutputs {
  const Tensor& loss;
  const OptionalTensor &dlogits, &stats;

  void check(const RowArguments& given, int64_t rows) const {
    const ScalarType acc = given.accumulation();
    check_per_row("loss", loss, acc, rows);
    if (dlogits)
      check_matrix("dlogits", *dlogits, given.student.x.scalar_type(), rows, given.vocab, /*output=*/true);
    if (stats) check_per_row("stats", *stats, acc, rows, KD_STATS);
  }

  // Before the inputs' pointers: asking for a writable one may move a copy-on-write tensor that an input
  // shares.
  void take(kd_rows& args) const {
    args.loss = loss.mutable_data_ptr();
    args.stats = stats ? stats->mutable_data_ptr() : nullptr;
    if (!dlogits) return;
    args.dlogits = dlogits->mutable_data_ptr();
    args.dlogits_stride = dlogits->stride(0);
    args.dlogits_vocab = dlogits->size(1);
  }
};

// Where the gradient goes, once all pointers are there: the student's own memory, or apart from both sides.
inline void check_apart(const kd_rows& args, const Tensor& dlogits, const Tensor& student,
                        const Tensor* teacher = nullptr) {
  const int64_t bytes = args.dtype == KD_F64 ? 8 : args.dtype == KD_F32 ? 4 : 2;
  const bool exact =
      args.dlogits == args.student.data && (args.rows == 1 || dlogits.stride(0) == student.stride(0));
  require(exact || !overlap(args.dlogits, dlogits, args.student.data, student, bytes),
          "dlogits shares part of student's memory; it must be student itself or apart from it");
  require(!teacher || !overlap(args.dlogits, dlogits, args.teacher.data, *teacher, bytes),
          "dlogits shares memory with teacher; it must be apart from it");
}

}  // namespace kd

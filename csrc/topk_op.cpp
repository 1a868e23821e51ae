// kdkernels_C::topk_ and draw_: between tensors and the torch-free kernels of topk.h. Their schemas are in
// ops.cpp.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "glue.h"
#include "topk.h"

namespace kd {
namespace {

// What both leaves have in common.
struct Logits {
  const Tensor& x;
  const OptionalTensor& bias;
  double scale, softcap, temperature;
  int64_t vocab;

  ScalarType accumulation() const {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  kd_side side() const { return {x.const_data_ptr(), x.stride(0), pointer(bias), scale, softcap}; }

  // Returns the rows.
  int64_t check() const {
    require(x.dim() == 2, "logits has shape ", shape_text(x), "; it must be a matrix [rows, vocabulary]");
    require(vocab >= 1 && vocab <= INT32_MAX, "vocab is ", vocab, "; it must be in 1 .. 2^31 - 1");
    check_matrix("logits", x, x.scalar_type(), x.size(0), vocab);
    check_bias("bias", bias, accumulation(), vocab);
    check_finite("scale", scale);
    require(std::isfinite(softcap) && softcap >= 0, "softcap is ", softcap,
            "; it must be 0 (none) or positive");
    check_temperature("temperature", temperature);
    return x.size(0);
  }

  static void check_temperature(const char* name, double value) {
    require(std::isfinite(value) && value > 0, name, " is ", value, "; it must be positive");
  }
};

void topk_(const Tensor& logits, const OptionalTensor& bias, double scale, double softcap, double temperature,
           int64_t vocab, int64_t k, std::vector<double> other_temperatures, const Tensor& ids,
           const Tensor& log_probs, const Tensor& log_tail, const OptionalTensor& entropy,
           const OptionalTensor& other_tails) {
  const Logits in{logits, bias, scale, softcap, temperature, vocab};
  kd_topk args{};
  args.dtype = dtype_of(logits);
  const int64_t rows = in.check(), others = static_cast<int64_t>(other_temperatures.size());
  const ScalarType acc = in.accumulation();
  require(k >= 1 && k <= vocab, "k is ", k, "; it must be in 1 .. vocab = ", vocab);
  for (const double t : other_temperatures) Logits::check_temperature("other_temperatures", t);
  check_per_row("ids", ids, ScalarType::Int, rows, k);
  check_per_row("log_probs", log_probs, acc, rows, k);
  check_per_row("log_tail", log_tail, acc, rows);
  if (entropy) check_per_row("entropy", *entropy, acc, rows);
  require(!others || other_tails, "other_temperatures are given without other_tails");
  if (other_tails && others) check_per_row("other_tails", *other_tails, acc, rows, others);
  if (rows == 0) return;
  args.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  args.log_probs = log_probs.mutable_data_ptr();
  args.log_tail = log_tail.mutable_data_ptr();
  args.entropy = entropy ? entropy->mutable_data_ptr() : nullptr;
  args.other_tails = other_tails && others ? other_tails->mutable_data_ptr() : nullptr;
  args.logits = in.side();
  args.rows = rows;
  args.vocab = vocab;
  args.k = k;
  args.temperature = temperature;
  args.other_temperatures = other_temperatures.data();
  args.others = others;
  run_rows(rows, vocab, kd_topk_scratch_bytes(&args), [&](int64_t begin, int64_t end, void* scratch) {
    return kd_topk_cpu(&args, begin, end, scratch);
  });
}

void draw_(const Tensor& logits, const OptionalTensor& bias, double scale, double softcap, double temperature,
           int64_t vocab, const Tensor& uniforms, const Tensor& ids) {
  const Logits in{logits, bias, scale, softcap, temperature, vocab};
  kd_draw args{};
  args.dtype = dtype_of(logits);
  const int64_t rows = in.check();
  require(uniforms.dim() == 2 && uniforms.size(1) >= 1, "uniforms has shape ", shape_text(uniforms),
          "; it must be [rows, at least 1]");
  args.draws = uniforms.size(1);
  check_per_row("uniforms", uniforms, ScalarType::Double, rows, args.draws);
  check_per_row("ids", ids, ScalarType::Int, rows, args.draws);
  if (rows == 0) return;
  args.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  args.uniforms = static_cast<const double*>(uniforms.const_data_ptr());
  args.logits = in.side();
  args.rows = rows;
  args.vocab = vocab;
  args.temperature = temperature;
  run_rows(rows, vocab, kd_draw_scratch_bytes(&args), [&](int64_t begin, int64_t end, void* scratch) {
    return kd_draw_cpu(&args, begin, end, scratch);
  });
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("topk_", TORCH_BOX(&kd::topk_));
  m.impl("draw_", TORCH_BOX(&kd::draw_));
}

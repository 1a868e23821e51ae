// kdkernels_C::topk_ on CUDA tensors: between tensors and the launches of cuda/topk_plan.h. Only where nvcc
// was found.
#ifdef KD_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/topk_plan.h"
#include "cuda_glue.h"

namespace kd {
namespace {

void check_temperature(const char* name, double value) {
  require(std::isfinite(value) && value > 0, name, " is ", value, "; it must be positive");
}

// A contiguous tensor of exactly this shape on the logits' GPU.
void check_output(const char* name, const Tensor& t, const Tensor& logits, ScalarType dtype,
                  const std::vector<int64_t>& shape) {
  require(t.is_cuda() && t.get_device_index() == logits.get_device_index(), name, " is not on logits' GPU");
  require(t.scalar_type() == dtype, name, " is ", dtype_name(t.scalar_type()), "; it must be ",
          dtype == ScalarType::Int ? "int32" : "float32");
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = t.size(static_cast<int64_t>(d)) == shape[d];
  require(fits && t.is_contiguous(), name, " has shape ", shape_text(t), "; it must be a contiguous [",
          shape[0], shape.size() > 1 ? ", " + std::to_string(shape[1]) : std::string(), "]");
}

void check_logits(const Tensor& x, const OptionalTensor& bias, int64_t vocab) {
  require(x.dim() == 2, "logits has shape ", shape_text(x), "; it must be a matrix [rows, vocabulary]");
  require(x.size(0) <= kMost, "logits has ", x.size(0), " rows; at most 2^31 - 1");
  require(vocab >= 1 && vocab <= kMost, "vocab is ", vocab, "; it must be in 1 .. 2^31 - 1");
  require(x.size(1) >= vocab, "logits has ", x.size(1), " columns; vocab is ", vocab);
  require(x.size(1) <= 1 || x.stride(1) == 1, "logits has stride ", x.stride(1),
          " along the vocabulary; it must be 1: call .contiguous()");
  if (!bias) return;
  require(bias->is_cuda() && bias->get_device_index() == x.get_device_index(), "bias is not on logits' GPU");
  require(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->size(0) >= vocab &&
              bias->is_contiguous(),
          "bias is ", dtype_name(bias->scalar_type()), " ", shape_text(*bias),
          "; it must be a contiguous float32 [", vocab, "]");
}

void start(const kd_topk& args, const Tensor& logits) {
  const int32_t device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int count = static_cast<int>(fact_of<kd_cuda_multiprocessors>(device));
  // From torch's allocator: it belongs to the current stream, and a CUDA graph keeps it.
  const auto bytes = static_cast<int64_t>(topk::scratch_bytes(args, count));
  const Tensor scratch = torch::stable::new_empty(logits, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
  const int code = kd_topk_cuda(&args, scratch.mutable_data_ptr(), count, stream_of(device));
  require(code == 0, "the launch failed: ", kd_cuda_error(code));
}

void topk_(const Tensor& logits, const OptionalTensor& bias, double scale, double softcap, double temperature,
           int64_t vocab, int64_t k, std::vector<double> other_temperatures, const Tensor& ids,
           const Tensor& log_probs, const Tensor& log_tail, const OptionalTensor& entropy,
           const OptionalTensor& other_tails) {
  kd_topk args{};
  args.dtype = gpu_dtype_of("logits", logits);
  check_logits(logits, bias, vocab);
  const int64_t rows = logits.size(0), others = static_cast<int64_t>(other_temperatures.size());
  check_finite("scale", scale);
  require(std::isfinite(softcap) && softcap >= 0, "softcap is ", softcap,
          "; it must be 0 (none) or positive");
  check_temperature("temperature", temperature);
  for (const double t : other_temperatures) check_temperature("other_temperatures", t);
  require(k >= 1 && k <= std::min<int64_t>(vocab, KD_TOPK_MOST), "k is ", k, "; it must be in 1 .. ",
          std::min<int64_t>(vocab, KD_TOPK_MOST));
  check_output("ids", ids, logits, ScalarType::Int, {rows, k});
  check_output("log_probs", log_probs, logits, ScalarType::Float, {rows, k});
  check_output("log_tail", log_tail, logits, ScalarType::Float, {rows});
  if (entropy) check_output("entropy", *entropy, logits, ScalarType::Float, {rows});
  require(!others || other_tails, "other_temperatures are given without other_tails");
  if (others) check_output("other_tails", *other_tails, logits, ScalarType::Float, {rows, others});
  if (rows == 0) return;

  // Outputs first: asking for a writable pointer may move a copy-on-write tensor that an input shares.
  args.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  args.log_probs = log_probs.mutable_data_ptr();
  args.log_tail = log_tail.mutable_data_ptr();
  args.entropy = entropy ? entropy->mutable_data_ptr() : nullptr;
  args.other_tails = others ? other_tails->mutable_data_ptr() : nullptr;
  args.logits = {logits.const_data_ptr(), logits.stride(0), bias ? bias->const_data_ptr() : nullptr, scale,
                 softcap};
  args.rows = rows;
  args.vocab = vocab;
  args.k = k;
  args.temperature = temperature;
  args.other_temperatures = other_temperatures.data();
  args.others = others;
  start(args, logits);
}

}  // namespace
}  // namespace kd

// For tests, which run the very launches in an emulator.
extern "C" {
__attribute__((visibility("default"))) size_t kdkernels_topk_scratch_bytes(const kd_topk* call,
                                                                           int multiprocessors) {
  return kd::topk::scratch_bytes(*call, multiprocessors);
}
__attribute__((visibility("default"))) void kdkernels_topk_plan(
    const kd_topk* call, void* scratch, int multiprocessors,
    void (*visit)(const char* kernel, int grid_x, int grid_y, int threads, int shared, const void* arguments,
                  size_t bytes)) {
  for (const kd_topk_launch& l : kd::topk::plan(*call, scratch, multiprocessors)) {
    visit(kd::topk::kernel_name(l.kernel), l.grid_x, l.grid_y, l.threads, l.shared, &l.arguments,
          sizeof l.arguments);
  }
}
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CUDA, m) { m.impl("topk_", TORCH_BOX(&kd::topk_)); }
#endif

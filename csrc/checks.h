// Checks of tensors at the native boundary. Every message names the argument, its value, and what is allowed:
// these are the last line of defence before raw pointers, whatever Python layer called.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws with only our own words (STD_TORCH_CHECK would put a file and a line in front of them).
template <class... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  text << "kdkernels: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

// A shape to be written into a message, and only then made into text: checks run on every call.
struct ShapeText {
  const Tensor& of;
};

inline std::ostream& operator<<(std::ostream& to, ShapeText shape) {
  to << '[';
  for (int64_t d = 0; d < shape.of.dim(); ++d) to << (d ? ", " : "") << shape.of.size(d);
  return to << ']';
}

inline ShapeText shape_text(const Tensor& t) { return {t}; }

inline void check_finite(const char* name, double value) {
  require(std::isfinite(value), name, " is ", value, "; it must be finite");
}

// A CPU matrix [rows, at least columns] of `dtype` with unit stride along the vocabulary; rows may be
// strided, and of an input may even repeat (stride 0). Outputs must have rows that do not overlap.
inline void check_matrix(const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns,
                         bool output = false) {
  require(t.is_cpu(), name, " is not on the CPU; move it there or use another backend");
  require(t.dim() == 2, name, " has shape ", shape_text(t), "; it must be a matrix [rows, vocabulary]");
  require(t.scalar_type() == dtype, name, " is ", dtype_name(t.scalar_type()), "; it must be ",
          dtype_name(dtype), " like student");
  require(t.size(0) == rows, name, " has ", t.size(0), " rows; student has ", rows);
  require(t.size(1) >= columns, name, " has ", t.size(1), " columns; vocab is ", columns);
  require(t.size(1) <= 1 || t.stride(1) == 1, name, " has stride ", t.stride(1),
          " along the vocabulary; it must be 1: call .contiguous()");
  require(!output || rows <= 1 || t.stride(0) >= t.size(1), name, " has row stride ", t.stride(0), " for ",
          t.size(1), " columns: its rows overlap; use a fresh tensor");
}

// A contiguous CPU vector (or, with `columns`, matrix) of exactly the given size.
inline void check_per_row(const char* name, const Tensor& t, ScalarType dtype, int64_t rows,
                          int64_t columns = 0) {
  require(t.is_cpu(), name, " is not on the CPU; move it there or use another backend");
  const bool fits =
      columns ? t.dim() == 2 && t.size(0) == rows && t.size(1) == columns : t.dim() == 1 && t.size(0) == rows;
  require(fits, name, " has shape ", shape_text(t), "; it must be [", rows,
          columns ? ", " + std::to_string(columns) : std::string(), "]");
  require(t.scalar_type() == dtype, name, " is ", dtype_name(t.scalar_type()), "; it must be ",
          dtype_name(dtype));
  require(t.is_contiguous(), name, " is strided; call .contiguous()");
}

// A bias [at least vocab], unit stride.
inline void check_bias(const char* name, const OptionalTensor& t, ScalarType dtype, int64_t vocab) {
  if (!t) return;
  require(t->is_cpu(), name, " is not on the CPU; move it there or use another backend");
  require(t->dim() == 1 && t->size(0) >= vocab, name, " has shape ", shape_text(*t), "; it must be [", vocab,
          "] or longer");
  require(t->scalar_type() == dtype, name, " is ", dtype_name(t->scalar_type()), "; it must be ",
          dtype_name(dtype));
  require(t->is_contiguous(), name, " is strided; call .contiguous()");
}

// Whether two matrices of equal element size share memory. Two column ranges of one buffer (equal row
// strides) do not. With unequal strides any common address range counts.
inline bool overlap(const void* a, const Tensor& ta, const void* b, const Tensor& tb, int64_t bytes) {
  if (ta.numel() == 0 || tb.numel() == 0) return false;
  const auto pa = reinterpret_cast<intptr_t>(a), pb = reinterpret_cast<intptr_t>(b);
  const int64_t span_a = ((ta.size(0) - 1) * ta.stride(0) + ta.size(1)) * bytes;
  const int64_t span_b = ((tb.size(0) - 1) * tb.stride(0) + tb.size(1)) * bytes;
  if (pa + span_a <= pb || pb + span_b <= pa) return false;
  const int64_t stride = ta.stride(0) * bytes;
  if (tb.stride(0) * bytes != stride || stride <= 0) return true;
  const int64_t offset = ((pa - pb) % stride + stride) % stride;  // where a's rows begin within b's
  return offset < tb.size(1) * bytes || offset + ta.size(1) * bytes > stride;
}

}  // namespace kd

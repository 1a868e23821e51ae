// Runs kd_dense_cpu over shapes, tails, dtypes and hostile rows, meant to be built with ASan and UBSan: every
// buffer is a heap block of exactly its size, and the gaps between strided rows are poisoned. Torch-free.
// Also checked, since it is free here: NaN rows stay alone, zero-weight rows are not read, inputs are not
// written, the gradient sums to zero, two threads over halves give the bits of one thread over all.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "build_facts.gen.h"
#include "matrix.h"

namespace {

enum RowKind {
  kPlain,
  kPeaked,
  kMasked,
  kIdentical,
  kSkipped,
  kBadLabel,
  kAllMasked,
  kNaNStudent,
  kInfTeacher,
  kKinds
};

bool finite_row(int kind) { return kind <= kSkipped; }

struct Options {
  kd_dtype dtype;
  int32_t kernel;
  int64_t vocab;
  bool in_place, gradient, stats, labels, transform;  // transform: bias, scale, soft-cap
  double temperature;
};

int g_failures = 0;
void expect(bool holds, const char* what, const Options& o, int64_t row) {
  if (holds) return;
  ++g_failures;
  if (g_failures > 20) return;
  std::printf(
      "FAILED %s: dtype %d kernel %d vocab %lld row kind %lld in_place %d labels %d transform %d T %g\n",
      what, o.dtype, o.kernel, static_cast<long long>(o.vocab), static_cast<long long>(row), o.in_place,
      o.labels, o.transform, o.temperature);
}

void fill_row(Matrix& student, Matrix& teacher, int64_t row, int64_t vocab, const Options& o) {
  const double spread = row == kPeaked ? 60.0 : 3.0;
  for (int64_t v = 0; v < vocab; ++v) {
    student.set(row, v, spread * (uniform() - 0.5));
    teacher.set(row, v, row == kIdentical ? student.get(row, v) : spread * (uniform() - 0.5));
    if (row == kMasked && v % 3 == 1) student.set(row, v, -kInf);
    if (row == kMasked && v % 5 == 2) teacher.set(row, v, -kInf);
    if (row == kAllMasked) teacher.set(row, v, -kInf);
    if (row == kSkipped) student.set(row, v, kNaN);
  }
  const int64_t last = vocab - 1;  // in the tail, where a masked load would be wrong first
  if (row == kNaNStudent) student.set(row, last, kNaN);
  // A soft-cap would bend +inf to a finite logit, so only NaN is hostile there.
  if (row == kInfTeacher) teacher.set(row, last, o.transform ? kNaN : kInf);
}

void check_row(const Options& o, int64_t row, const Matrix& loss, const Matrix* gradient, int64_t columns) {
  const double value = loss.get(row, 0);
  const bool mild =
      (row == kBadLabel && !o.labels) || (row == kAllMasked && o.transform);  // soft-cap bends -inf
  const bool nan_row = !finite_row(static_cast<int>(row)) && !mild;
  expect(std::isnan(value) == nan_row, "loss is NaN exactly in hostile rows", o, row);
  if (row == kSkipped) expect(value == 0, "a skipped row costs 0", o, row);
  if (!gradient) return;
  double sum = 0, size = 0;
  bool nan_all = true, zero_all = true;
  for (int64_t v = 0; v < o.vocab; ++v) {
    const double g = gradient->get(row, v);
    nan_all = nan_all && std::isnan(g);
    zero_all = zero_all && g == 0;
    sum += g;
    size += std::fabs(g);
  }
  if (nan_row) expect(nan_all, "a hostile row's gradient is NaN", o, row);
  if (row == kSkipped) expect(zero_all, "a skipped row's gradient is 0", o, row);
  const double eps = o.dtype == KD_BF16 ? 2e-2 : o.dtype == KD_F16 ? 4e-3 : 2e-5;
  const bool sums = finite_row(static_cast<int>(row)) && !o.transform && row != kMasked;
  if (sums) expect(std::fabs(sum) <= eps * (size + 1), "a gradient sums to 0", o, row);
  for (int64_t v = o.vocab; v < columns; ++v) expect(gradient->get(row, v) == 0, "padding gets 0", o, row);
}

void run(const kd_rows& args, int64_t begin, int64_t end, const Options& o) {
  void* scratch = nullptr;
  const size_t bytes = kd_dense_scratch_bytes(&args);
  if (posix_memalign(&scratch, 64, std::max<size_t>(bytes, 1))) std::abort();
  expect(kd_dense_cpu(&args, begin, end, scratch) == 0, "the kernel accepts its arguments", o, -1);
  std::free(scratch);
}

// One call, twice: by one thread, then by two threads over halves, which must give the same bits.
void sweep_case(const Options& o) {
  const kd_dtype acc = o.dtype == KD_F64 ? KD_F64 : KD_F32;
  const int64_t rows = kKinds, padding = o.in_place ? 0 : o.vocab % 5;
  Matrix student(o.dtype, rows, o.vocab, 0), teacher(o.dtype, rows, o.vocab, 40);
  Matrix bias(acc, 1, o.vocab, 0), w_kd(acc, rows, 1, 0), w_ce(acc, rows, 1, 0);
  std::vector<int64_t> labels(rows);
  for (int64_t row = 0; row < rows; ++row) {
    fill_row(student, teacher, row, o.vocab, o);
    w_kd.set(row, 0, row == kSkipped ? 0 : 0.5 + 0.1 * static_cast<double>(row));
    w_ce.set(row, 0, row == kSkipped ? 0 : 0.25);
    labels[row] = row == kBadLabel ? o.vocab : row == kSkipped ? -100 : row == kMasked ? 0 : o.vocab - 1;
  }
  for (int64_t v = 0; v < o.vocab; ++v) bias.set(0, v, uniform() - 0.5);

  kd_rows args{};
  args.dtype = o.dtype;
  args.rows = rows;
  args.vocab = o.vocab;
  args.kernel = o.kernel;
  args.a = 0.3;
  args.b = 0.7;
  args.temperature = o.temperature;
  args.student = {student.data(), student.stride(), o.transform ? bias.data() : nullptr,
                  o.transform ? 0.7 : 1.0, o.transform ? 30.0 : 0.0};
  args.teacher = {teacher.data(), teacher.stride(), o.transform ? bias.data() : nullptr,
                  o.transform ? 1.3 : 1.0, o.transform ? 20.0 : 0.0};
  args.w_kd = w_kd.data();
  args.w_ce = o.labels ? w_ce.data() : nullptr;
  args.labels = o.labels ? labels.data() : nullptr;

  std::vector<unsigned char> first;
  const std::vector<unsigned char> student_bits = student.bits(), teacher_bits = teacher.bits();
  for (int threads = 1; threads <= 2; ++threads) {
    Matrix loss(acc, rows, 1, 0), stats(acc, rows, KD_STATS, 0),
        gradient(o.dtype, rows, o.vocab + padding, 24);
    Matrix copy(o.dtype, rows, o.vocab, 0);
    std::memcpy(copy.data(), student.data(), student_bits.size());
    if (o.in_place) args.student.data = copy.data();
    const Matrix& target = o.in_place ? copy : gradient;
    args.loss = loss.data();
    args.stats = o.stats ? stats.data() : nullptr;
    args.dlogits = o.gradient ? target.data() : nullptr;
    args.dlogits_stride = target.stride();
    args.dlogits_vocab = o.vocab + padding;
    if (threads == 1) run(args, 0, rows, o);
    if (threads == 2) {
      std::thread other([&] { run(args, 0, rows / 2, o); });
      run(args, rows / 2, rows, o);
      other.join();
    }
    for (int64_t row = 0; row < rows; ++row)
      check_row(o, row, loss, o.gradient ? &target : nullptr, o.vocab + padding);
    std::vector<unsigned char> bits = loss.bits();
    const Matrix* const outputs[] = {o.gradient ? &target : &loss, o.stats ? &stats : &loss};
    for (const Matrix* m : outputs) {
      const auto more = m->bits();
      bits.insert(bits.end(), more.begin(), more.end());
    }
    if (threads == 1) first = bits;
    expect(bits == first, "two threads give the bits of one", o, -1);
  }
  expect(student.bits() == student_bits && teacher.bits() == teacher_bits, "inputs are not written", o, -1);
}

}  // namespace

// Usage: rows_sweep [every n-th case]. Prints the number of cases; exit status 1 if any check failed, 77 if
// this machine cannot run the instruction set that KDKERNELS_ISA names.
int main(int argc, char** argv) {
  if (const char* error = kd_cpu_isa_error()) {
    std::printf("%s\n", error);
    return kUntested;
  }
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  const int64_t vocabularies[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 301, 1030};
  int64_t cases = 0, done = 0;
  for (int dtype = KD_F32; dtype <= KD_F64; ++dtype)
    for (int32_t kernel = KD_ADAPTIVE_KL; kernel < KD_KERNEL_COUNT; ++kernel)
      for (const int64_t vocab : vocabularies)
        for (int mix = 0; mix < 6; ++mix) {  // pairs of options, not their full product
          const bool in_place = mix == 1 || mix == 4, labels = mix >= 2, transform = mix == 3 || mix == 4;
          const Options o{static_cast<kd_dtype>(dtype),
                          kernel,
                          vocab,
                          in_place,
                          mix != 5,
                          mix % 2 == 1,
                          labels,
                          transform,
                          mix == 2 || mix == 4 ? 2.0
                          : mix == 5           ? 0.05
                                               : 1.0};
          if (cases++ % every) continue;
          sweep_case(o);
          ++done;
        }
  std::printf("%s: %lld cases, %d failures\n", kd_cpu_isa(), static_cast<long long>(done), g_failures);
  return g_failures ? 1 : 0;
}

// Runs kd_sparse_cpu over shapes, dtypes, modes and hostile rows, meant to be built with ASan and UBSan:
// every buffer is a heap block of exactly its size, and the gaps between strided rows are poisoned.
// Torch-free. The oracle is the dense kernel in float64 on a row made small: the kept entries, and in
// KD_GHOST one more that holds the rest. Also checked: NaN rows stay alone, zero-weight rows are not read,
// the gradient sums to zero, two threads over halves give the bits of one thread over all.
#include <algorithm>
#include <cstdio>
#include <thread>

#include "build_facts.gen.h"
#include "matrix.h"
#include "sparse.h"

namespace {

enum RowKind {
  kPlain,
  kRagged,
  kRun,  // the first entries
  kPeaked,
  kMasked,
  kNothingKept,
  kSkipped,
  kBadLabel,
  kUnsorted,
  kOutside,
  kNaNTeacher,
  kNaNStudent,
  kAllMasked,
  kKinds
};

struct Options {
  kd_dtype dtype;
  int32_t kernel, mode;
  int64_t vocab, kept;
  bool in_place, stats, labels, transform;  // transform: bias, scale, soft-cap
  double temperature;
};

int g_failures = 0;
void expect(bool holds, const char* what, const Options& o, int64_t row) {
  if (holds || ++g_failures > 20) return;
  std::printf(
      "FAILED %s: dtype %d kernel %d mode %d vocab %lld kept %lld row %lld in_place %d labels %d transform "
      "%d T %g\n",
      what, o.dtype, o.kernel, o.mode, static_cast<long long>(o.vocab), static_cast<long long>(o.kept),
      static_cast<long long>(row), o.in_place, o.labels, o.transform, o.temperature);
}

bool is_nan_row(const Options& o, int64_t row) {
  const bool tail = o.mode == KD_GHOST || o.mode == KD_TRUNCATE;
  if (row == kNothingKept) return !tail;
  if (row == kUnsorted) return o.kept > 1;
  if (row == kAllMasked) return !o.transform;  // a soft-cap bends -inf
  return row >= kOutside || (row == kBadLabel && o.labels);
}

struct Case {
  Matrix student, bias, log_probs, log_tail, w_kd, w_ce;
  std::vector<int32_t> ids;
  std::vector<int64_t> labels;

  explicit Case(const Options& o) : Case(o, o.dtype == KD_F64 ? KD_F64 : KD_F32) {}

  Case(const Options& o, kd_dtype acc)
      : student(o.dtype, kKinds, o.vocab, 24),
        bias(acc, 1, o.vocab, 0),
        log_probs(acc, kKinds, o.kept, 0),
        log_tail(acc, kKinds, 1, 0),
        w_kd(acc, kKinds, 1, 0),
        w_ce(acc, kKinds, 1, 0),
        ids(static_cast<size_t>(kKinds * o.kept), -1),
        labels(kKinds) {
    for (int64_t v = 0; v < o.vocab; ++v) bias.set(0, v, uniform() - 0.5);
    for (int64_t row = 0; row < kKinds; ++row) {
      fill_student(o, row);
      fill_teacher(o, row);
      w_kd.set(row, 0, row == kSkipped ? 0 : 0.5 + 0.125 * static_cast<double>(row % 4));
      w_ce.set(row, 0, row == kSkipped ? 0 : 0.25);
      labels[row] = row == kBadLabel ? o.vocab : row == kSkipped ? -100 : row % 2 ? 0 : o.vocab - 1;
    }
  }

  void fill_student(const Options& o, int64_t row) {
    const double spread = row == kPeaked ? 60 : 4;
    for (int64_t v = 0; v < o.vocab; ++v) {
      const bool masked = row == kAllMasked || (row == kMasked && v % 3 == 1 && o.vocab > 2);
      student.set(row, v, masked ? -kInf : row == kSkipped ? kNaN : spread * (uniform() - 0.5));
    }
    if (row == kNaNStudent) student.set(row, o.vocab - 1, kNaN);
  }

  void fill_teacher(const Options& o, int64_t row) {
    const int64_t n = row == kNothingKept ? 0 : row == kRagged ? (o.kept + 1) / 2 : o.kept;
    const int64_t apart = row == kRun ? 1 : std::max<int64_t>(1, o.vocab / std::max<int64_t>(1, o.kept));
    std::vector<double> mass;
    const double beside = n < o.vocab ? 1e-3 : 0;
    double total = beside;
    for (int64_t k = 0; k < n; ++k) mass.push_back(0.1 + uniform()), total += mass.back();
    for (int64_t k = 0; k < o.kept; ++k) {
      log_probs.set(row, k, k < n ? std::log(mass[k] / total) : kNaN);  // what is beside -1 is not read
      if (k < n) id(o, row, k) = static_cast<int32_t>(std::min(k * apart, o.vocab - o.kept + k));
    }
    log_tail.set(row, 0, n ? std::log(beside / total) : 0);
    if (row == kUnsorted && o.kept > 1) id(o, row, 1) = id(o, row, 0);
    if (row == kOutside) id(o, row, o.kept - 1) = static_cast<int32_t>(o.vocab);
    if (row == kNaNTeacher) log_probs.set(row, o.kept - 1, kNaN);
  }

  int32_t& id(const Options& o, int64_t row, int64_t k) { return ids[static_cast<size_t>(row * o.kept + k)]; }
};

struct Outputs {
  Matrix loss, gradient, stats;
  Outputs(const Options& o, kd_dtype acc)
      : loss(acc, kKinds, 1, 0), gradient(o.dtype, kKinds, o.vocab, 24), stats(acc, kKinds, KD_STATS, 0) {}
};

kd_sparse arguments(const Options& o, const Case& in, const Outputs& out) {
  kd_sparse args{};
  kd_rows& a = args.rows;
  a.dtype = o.dtype, a.rows = kKinds, a.vocab = o.vocab, a.kernel = o.kernel;
  a.a = 0.3, a.b = 0.7, a.temperature = o.temperature;
  a.student = {in.student.data(), in.student.stride(), o.transform ? in.bias.data() : nullptr,
               o.transform ? 0.7 : 1.0, o.transform ? 30.0 : 0.0};
  a.w_kd = in.w_kd.data();
  a.w_ce = o.labels ? in.w_ce.data() : nullptr;
  a.labels = o.labels ? in.labels.data() : nullptr;
  a.loss = out.loss.data();
  a.stats = o.stats ? out.stats.data() : nullptr;
  const Matrix& target = o.in_place ? in.student : out.gradient;
  a.dlogits = target.data(), a.dlogits_stride = target.stride(), a.dlogits_vocab = o.vocab;
  args.kept = o.kept, args.ids = in.ids.data();
  args.log_probs = in.log_probs.data(), args.log_tail = in.log_tail.data();
  args.mode = o.mode;
  return args;
}

// One row of few entries, in float64: D and its gradient by the scaled logits times T.
double compare_small(const Options& o, std::vector<double> zs, std::vector<double> zt,
                     std::vector<double>& gradient) {
  double loss = 0, one = 1;
  kd_rows a{};
  a.dtype = KD_F64, a.rows = 1, a.vocab = static_cast<int64_t>(zs.size()), a.kernel = o.kernel;
  a.a = 0.3, a.b = 0.7, a.temperature = o.temperature;
  a.student = {zs.data(), a.vocab, nullptr, 1, 0};
  a.teacher = {zt.data(), a.vocab, nullptr, 1, 0};
  gradient.assign(zs.size(), 0);
  a.w_kd = &one, a.loss = &loss, a.dlogits = gradient.data(), a.dlogits_stride = a.dlogits_vocab = a.vocab;
  with_scratch(kd_dense_scratch_bytes(&a), [&](void* scratch) { kd_dense_cpu(&a, 0, 1, scratch); });
  return loss;
}

double log_sum(const std::vector<double>& x) {
  double top = -kInf, sum = 0;
  for (const double v : x) top = std::max(top, v);
  for (const double v : x) sum += top > -kInf ? std::exp(v - top) : 0;
  return top > -kInf ? top + std::log(sum) : -kInf;
}

// Loss and gradient of a row that is no NaN row and has no masked entries.
void check_values(const Options& o, Case& in, const std::vector<double>& x, const Outputs& out,
                  const Matrix& found, int64_t row) {
  const double t = o.temperature, w_kd = in.w_kd.get(row, 0), w_ce = o.labels ? in.w_ce.get(row, 0) : 0;
  std::vector<double> z, chain, rest, small, lp, d_small, dz(x.size(), 0);
  std::vector<bool> is_kept(x.size(), false);
  for (size_t v = 0; v < x.size(); ++v) {
    const double y = o.transform ? 0.7 * (x[v] + in.bias.get(0, static_cast<int64_t>(v))) : x[v];
    z.push_back(o.transform ? 30 * std::tanh(y / 30) : y);
    chain.push_back(o.transform ? 0.7 * (1 - z[v] * z[v] / 900) : 1);
  }
  std::vector<size_t> kept;
  for (int64_t k = 0; k < o.kept && in.id(o, row, k) >= 0; ++k) {
    kept.push_back(static_cast<size_t>(in.id(o, row, k)));
    is_kept[kept.back()] = true;
    small.push_back(z[kept.back()]), lp.push_back(t * in.log_probs.get(row, k));
  }
  for (size_t v = 0; v < z.size(); ++v)
    if (!is_kept[v]) rest.push_back(z[v] / t);
  const double log_rest = log_sum(rest);
  if (o.mode == KD_GHOST && !rest.empty())
    small.push_back(t * log_rest), lp.push_back(t * in.log_tail.get(row, 0));
  const double d = compare_small(o, small, lp, d_small);
  for (size_t k = 0; k < kept.size(); ++k) dz[kept[k]] = d_small[k];
  for (size_t v = 0; v < z.size(); ++v) {
    if (!is_kept[v] && o.mode == KD_GHOST) dz[v] = d_small.back() * std::exp(z[v] / t - log_rest);
  }
  const double cold = log_sum(z), label = o.labels ? z[static_cast<size_t>(in.labels[row])] : 0;
  const double loss = w_kd * d + (o.labels ? w_ce * (cold - label) : 0),
               exact = o.dtype == KD_F64 ? 1e-9 : 2e-5;
  expect(std::fabs(out.loss.get(row, 0) - loss) <= exact * (1 + std::fabs(loss)), "the loss", o, row);
  const double rounded = o.dtype == KD_BF16 ? 1e-2 : o.dtype == KD_F16 ? 2e-3 : exact;
  double size = w_kd + w_ce;
  for (const double g : dz) size = std::max(size, std::fabs(g));
  for (size_t v = 0; v < z.size(); ++v) {
    double g = w_kd * dz[v];
    if (o.labels) g += w_ce * (std::exp(z[v] - cold) - (static_cast<int64_t>(v) == in.labels[row] ? 1 : 0));
    const double error = std::fabs(found.get(row, static_cast<int64_t>(v)) - g * chain[v]);
    expect(error <= rounded * std::fabs(g * chain[v]) + exact * size / t, "the gradient", o, row);
  }
}

void check_row(const Options& o, Case& in, const std::vector<double>& x, const Outputs& out, int64_t row) {
  const Matrix& found = o.in_place ? in.student : out.gradient;
  const bool bad = is_nan_row(o, row);
  expect(std::isnan(out.loss.get(row, 0)) == bad, "loss is NaN exactly in hostile rows", o, row);
  double sum = 0, size = 0;
  for (int64_t v = 0; v < o.vocab; ++v) {
    const double g = found.get(row, v);
    if (bad) expect(std::isnan(g), "a hostile row's gradient is NaN", o, row);
    if (row == kSkipped) expect(g == 0, "a skipped row's gradient is 0", o, row);
    sum += g, size += std::fabs(g);
  }
  if (bad || row == kSkipped) return;
  const double eps = o.dtype == KD_BF16 ? 2e-2 : o.dtype == KD_F16 ? 4e-3 : 2e-5;
  if (!o.transform && row != kMasked)
    expect(std::fabs(sum) <= eps * (size + 1), "a gradient sums to 0", o, row);
  const bool known = o.mode == KD_GHOST || o.mode == KD_RENORMALIZE;
  if (known && row != kMasked && row != kAllMasked) check_values(o, in, x, out, found, row);
}

void run(const kd_sparse& args, int64_t begin, int64_t end, const Options& o) {
  with_scratch(kd_sparse_scratch_bytes(&args), [&](void* scratch) {
    expect(kd_sparse_cpu(&args, begin, end, scratch) == 0, "the kernel accepts its arguments", o, -1);
  });
}

// One call, twice: by one thread, then by two threads over halves, which must give the same bits.
void sweep_case(const Options& o) {
  const uint64_t state = g_state;
  std::vector<unsigned char> first;
  for (int threads = 1; threads <= 2; ++threads) {
    g_state = state;
    Case in(o);
    const Outputs out(o, o.dtype == KD_F64 ? KD_F64 : KD_F32);
    std::vector<std::vector<double>> x(kKinds);
    for (int64_t row = 0; row < kKinds; ++row)
      for (int64_t v = 0; v < o.vocab; ++v) x[row].push_back(in.student.get(row, v));
    const kd_sparse args = arguments(o, in, out);
    if (threads == 1) run(args, 0, kKinds, o);
    if (threads == 2) {
      std::thread other([&] { run(args, 0, kKinds / 2, o); });
      run(args, kKinds / 2, kKinds, o);
      other.join();
    }
    for (int64_t row = 0; threads == 1 && row < kKinds; ++row) check_row(o, in, x[row], out, row);
    std::vector<unsigned char> bits = out.loss.bits();
    for (const Matrix* m : {o.in_place ? &in.student : &out.gradient, o.stats ? &out.stats : &out.loss}) {
      const auto more = m->bits();
      bits.insert(bits.end(), more.begin(), more.end());
    }
    if (threads == 1) first = bits;
    expect(bits == first, "two threads give the bits of one", o, -1);
  }
}

}  // namespace

// Usage: sparse_sweep [every n-th case]. Exit status as of rows_sweep.
int main(int argc, char** argv) {
  if (const char* error = kd_cpu_isa_error()) {
    std::printf("%s\n", error);
    return kUntested;
  }
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  const int64_t shapes[][2] = {{1, 1},     {2, 1},    {7, 3},     {16, 16},     {33, 5},
                               {129, 129}, {301, 40}, {1025, 17}, {2050, 1025}, {3100, 60}};
  int64_t cases = 0, done = 0;
  for (int dtype = KD_F32; dtype <= KD_F64; ++dtype)
    for (int32_t mode = KD_GHOST; mode <= KD_SAMPLED; ++mode)
      for (int32_t kernel = 0; kernel < (mode == KD_SAMPLED ? 1 : KD_KERNEL_COUNT); ++kernel)
        for (const auto& shape : shapes) {
          const int64_t mix = cases % 6;  // options in turn, not their full product
          const Options o{static_cast<kd_dtype>(dtype),
                          kernel,
                          mode,
                          shape[0],
                          shape[1],
                          mix == 1 || mix == 4,
                          mix % 2 == 1,
                          mix >= 2,
                          mix == 3 || mix == 4,
                          mix == 2 || mix == 4 ? 2.0
                          : mix == 5           ? 0.5
                                               : 1.0};
          if (cases++ % every) continue;
          sweep_case(o);
          ++done;
        }
  std::printf("%s: %lld cases of sparse teachers, %d failures\n", kd_cpu_isa(), static_cast<long long>(done),
              g_failures);
  return g_failures ? 1 : 0;
}

// Runs the three shard kernels over shapes, splits, dtypes and hostile rows, meant to be built with ASan and
// UBSan: every buffer is a heap block of exactly its size, and the gaps between strided rows are poisoned.
// Torch-free. What the ranks exchange is merged here in double precision (as kdkernels.eager_shards does),
// and loss and gradient are compared with those of the dense kernel on the whole rows. Also checked: NaN rows
// stay alone, zero-weight rows are not read, a shard without mass leaves the others alone.
#include <algorithm>
#include <cstdio>
#include <deque>

#include "build_facts.gen.h"
#include "matrix.h"
#include "shards.h"

namespace {

enum RowKind {
  kPlain,
  kPeaked,
  kMasked,
  kMaskedShard,  // nothing but -inf in the first shard
  kIdentical,
  kSkipped,
  kBadLabel,
  kAllMasked,
  kNaNStudent,
  kInfTeacher,
  kKinds
};

struct Options {
  kd_dtype dtype;
  int32_t kernel;
  std::vector<int64_t> sizes;  // of the shards
  bool in_place, places, labels, transform, keep, again;
  double temperature;

  int64_t vocab() const {
    int64_t total = 0;
    for (const int64_t n : sizes) total += n;
    return total;
  }
  bool cold() const { return labels && temperature != 1; }
};

int g_failures = 0;
void expect(bool holds, const char* what, const Options& o, int64_t row) {
  if (holds || ++g_failures > 20) return;
  std::printf(
      "FAILED %s: dtype %d kernel %d vocab %lld in %d row %lld in_place %d labels %d transform %d keep %d "
      "again "
      "%d T %g\n",
      what, o.dtype, o.kernel, static_cast<long long>(o.vocab()), static_cast<int>(o.sizes.size()),
      static_cast<long long>(row), o.in_place, o.labels, o.transform, o.keep, o.again, o.temperature);
}

bool is_nan_row(const Options& o, int64_t row) {
  if (row == kAllMasked) return !o.transform;  // a soft-cap bends -inf
  return row >= kNaNStudent || (row == kBadLabel && o.labels);
}

struct Inputs {
  Matrix student, teacher, bias, w_kd, w_ce;
  std::vector<int64_t> labels;

  explicit Inputs(const Options& o)
      : student(o.dtype, kKinds, o.vocab(), 24),
        teacher(o.dtype, kKinds, o.vocab(), 40),
        bias(KD_F32, 1, o.vocab(), 0),
        w_kd(KD_F32, kKinds, 1, 0),
        w_ce(KD_F32, kKinds, 1, 0),
        labels(kKinds) {
    const int64_t vocab = o.vocab();
    for (int64_t v = 0; v < vocab; ++v) bias.set(0, v, uniform() - 0.5);
    for (int64_t row = 0; row < kKinds; ++row) {
      const double spread = row == kPeaked ? 60 : 4;
      for (int64_t v = 0; v < vocab; ++v) {
        student.set(row, v, spread * (uniform() - 0.5));
        teacher.set(row, v, row == kIdentical ? student.get(row, v) : spread * (uniform() - 0.5));
        if (row == kMasked && v % 3 == 1) student.set(row, v, -kInf);
        if (row == kMasked && v % 5 == 2) teacher.set(row, v, -kInf);
        if (row == kMaskedShard && v < o.sizes[0] && vocab > o.sizes[0])
          student.set(row, v, -kInf), teacher.set(row, v, -kInf);
        if (row == kAllMasked) teacher.set(row, v, -kInf);
        if (row == kSkipped) student.set(row, v, kNaN);
      }
      w_kd.set(row, 0, row == kSkipped ? 0 : 0.5 + 0.125 * static_cast<double>(row % 4));
      w_ce.set(row, 0, row == kSkipped ? 0 : 0.25);
      labels[row] = row == kBadLabel ? vocab : row == kSkipped ? -100 : vocab - 1;
    }
    student.set(kNaNStudent, vocab - 1, kNaN);
    // A soft-cap would bend +inf to a finite logit, so only NaN is hostile there.
    teacher.set(kInfTeacher, 0, o.transform ? kNaN : kInf);
  }

  kd_side side(const Matrix& x, const Options& o, int64_t first, double scale) const {
    const auto* at =
        static_cast<const char*>(x.data()) + first * static_cast<int64_t>(element_bytes(o.dtype));
    return {at, x.stride(), o.transform ? static_cast<const float*>(bias.data()) + first : nullptr,
            o.transform ? scale : 1.0, o.transform ? 30.0 : 0.0};
  }

  kd_rows rows(const Options& o, int64_t first, int64_t size) const {
    kd_rows a{};
    a.dtype = o.dtype, a.rows = kKinds, a.vocab = size, a.kernel = o.kernel;
    a.a = 0.3, a.b = 0.7, a.temperature = o.temperature;
    a.student = side(student, o, first, 0.7);
    a.teacher = side(teacher, o, first, 1.3);
    a.w_kd = w_kd.data();
    a.w_ce = o.labels ? w_ce.data() : nullptr;
    a.labels = o.labels ? labels.data() : nullptr;
    return a;
  }
};

// One rank's columns.
struct Shard {
  kd_shard args{};
  Matrix share, merged, sums, kept;
  std::vector<int64_t> places;
  std::vector<uint8_t> again;

  Shard(const Options& o, const Inputs& in, int64_t first, int64_t size)
      : share(KD_F32, kKinds, KD_SHARE, 0),
        merged(KD_F64, kKinds, KD_MERGED, 0),
        sums(KD_F32, kKinds, 2, 0),
        kept(KD_F32, kKinds, o.keep ? kd_shard_kept_stride(size) : 1, 0),
        places(2 * kKinds, -7),
        again(kKinds, 1) {
    args.rows = in.rows(o, first, size);
    args.offset = first;
    args.cold = o.cold();
    args.share = static_cast<float*>(share.data());
    args.places = o.places ? places.data() : nullptr;
    args.merged = static_cast<double*>(merged.data());
    args.again = o.again ? again.data() : nullptr;
    args.kept = o.keep ? static_cast<float*>(kept.data()) : nullptr;
    args.kept_stride = o.keep ? kd_shard_kept_stride(size) : 0;
    args.sums = static_cast<float*>(sums.data());
  }

  template <class Part>
  void run(const Part& part, const Options& o) {
    with_scratch(kd_shard_scratch_bytes(&args), [&](void* scratch) {
      expect(part(&args, 0, kKinds / 2, scratch) == 0, "the kernel accepts its arguments", o, -1);
      expect(part(&args, kKinds / 2, kKinds, scratch) == 0, "the kernel accepts its arguments", o, -1);
    });
  }
};

typedef std::deque<Shard> Shards;

struct Sum {
  double top, sum;
};

// Of one side or, with KD_COLD, of the student at temperature 1.
Sum total_of(Shards& shards, int64_t row, int at, int sum_at, double temperature) {
  Sum all{-kInf, 0};
  for (Shard& s : shards) {
    const double top = s.share.get(row, at);
    all.top = std::isnan(top) || top > all.top ? top : all.top;
  }
  for (Shard& s : shards) {
    const double top = s.share.get(row, at), sum = s.share.get(row, sum_at);
    all.sum += top == -kInf && !std::isnan(sum) ? 0 : sum * std::exp((top - all.top) / temperature);
  }
  if (!std::isfinite(all.top) || !(all.sum > 0 && all.sum < kInf)) all.sum = kNaN;
  return all;
}

// Fills `merged` of every shard with the row's normalisers.
void merge(Shards& shards, const Options& o, int64_t row) {
  Sum s = total_of(shards, row, KD_TOP_S, KD_SUM_S, o.temperature);
  Sum t = total_of(shards, row, KD_TOP_T, KD_SUM_T, o.temperature);
  if (std::isnan(s.sum) || std::isnan(t.sum) || (row == kBadLabel && o.labels)) s.sum = t.sum = kNaN;
  const double cold = o.cold() ? total_of(shards, row, KD_TOP_S, KD_COLD, 1).sum : s.sum;
  const double numbers[KD_MERGED] = {s.top, s.sum, t.top, t.sum, cold, 0, 0, 1};
  for (Shard& shard : shards)
    for (int i = 0; i < KD_MERGED; ++i) shard.merged.set(row, i, numbers[i]);
}

// Adds the row's D and G; returns its loss.
double take_sums(Shards& shards, const Options& o, const Inputs& in, int64_t row) {
  double d = 0, g = 0, label = -kInf;
  for (Shard& s : shards) {
    d += s.sums.get(row, 0), g += s.sums.get(row, 1);
    label = std::max(label, s.share.get(row, KD_LABEL));
  }
  for (Shard& s : shards) s.merged.set(row, KD_ROW_D, d), s.merged.set(row, KD_ROW_G, g);
  if (row == kSkipped) return 0;
  const Matrix& m = shards[0].merged;
  if (std::isnan(m.get(row, KD_ROW_SUM_S))) return kNaN;
  const double nll = o.labels ? m.get(row, KD_ROW_TOP_S) + std::log(m.get(row, KD_ROW_COLD)) - label : 0;
  return in.w_kd.get(row, 0) * d + (o.labels ? in.w_ce.get(row, 0) * std::min(nll, 1e4) : 0);
}

struct Whole {
  Matrix loss, gradient;
  Whole(const Options& o, const Inputs& in)
      : loss(KD_F32, kKinds, 1, 0), gradient(o.dtype, kKinds, o.vocab(), 8) {
    kd_rows a = in.rows(o, 0, o.vocab());
    a.loss = loss.data(), a.dlogits = gradient.data();
    a.dlogits_stride = gradient.stride(), a.dlogits_vocab = o.vocab();
    with_scratch(kd_dense_scratch_bytes(&a), [&](void* scratch) { kd_dense_cpu(&a, 0, kKinds, scratch); });
  }
};

void check_gradient(const Options& o, const Whole& whole, const Matrix& found, int64_t row) {
  const double exact = o.dtype == KD_F32 ? 2e-5 : o.dtype == KD_BF16 ? 1e-2 : 2e-3;
  double size = 0;
  for (int64_t v = 0; v < o.vocab(); ++v) size = std::max(size, std::fabs(whole.gradient.get(row, v)));
  for (int64_t v = 0; v < o.vocab(); ++v) {
    const double want = whole.gradient.get(row, v), got = found.get(row, v);
    if (is_nan_row(o, row)) {
      expect(std::isnan(got), "a hostile row's gradient is NaN", o, row);
    } else {
      expect(std::fabs(got - want) <= exact * std::fabs(want) + 2e-5 * (1 + size), "the gradient", o, row);
    }
  }
}

void check_places(const Options& o, const Inputs& in, const Shard& shard) {
  for (int64_t row = 0; row < kSkipped; ++row) {
    for (int side = 0; side < 2; ++side) {
      const Matrix& x = side ? in.teacher : in.student;
      const int64_t place = shard.places[2 * row + side], first = shard.args.offset;
      bool best = place >= first && place < first + shard.args.rows.vocab;
      for (int64_t v = first; best && !o.transform && v < first + shard.args.rows.vocab; ++v)
        best = v < place ? x.get(row, v) < x.get(row, place) || x.get(row, place) == -kInf
                         : x.get(row, v) <= x.get(row, place);
      expect(best, "where the largest logit stands", o, row);
    }
  }
}

void sweep_case(const Options& o) {
  Inputs in(o);
  const Whole whole(o, in);
  Shards shards;
  int64_t first = 0;
  for (const int64_t size : o.sizes) {
    shards.emplace_back(o, in, first, size);
    first += size;
    shards.back().run(kd_shard_norms, o);
    if (o.places) check_places(o, in, shards.back());
  }
  for (int64_t row = 0; row < kKinds; ++row) merge(shards, o, row);
  for (Shard& shard : shards) shard.run(kd_shard_sums, o);
  for (int64_t row = 0; row < kKinds; ++row) {
    const double loss = take_sums(shards, o, in, row), want = whole.loss.get(row, 0);
    const bool near = std::fabs(loss - want) <= 2e-5 * (1 + std::fabs(want));
    expect(is_nan_row(o, row) ? std::isnan(loss) && std::isnan(want) : near, "the loss", o, row);
  }
  // A divergence with an online form takes its gradient from grad (1) or from D (0), others from grad always.
  for (const int generic : {1, 0}) {
    const Matrix apart(o.dtype, kKinds, o.vocab(), 24);
    const bool in_place = o.in_place && !generic;
    const Matrix& target = in_place ? in.student : apart;
    for (Shard& shard : shards) {
      for (int64_t row = 0; row < kKinds; ++row)
        shard.merged.set(row, KD_ROW_GENERIC, row == kMasked || row == kMaskedShard ? 1 : generic);
      shard.args.rows.dlogits = static_cast<char*>(target.data()) +
                                shard.args.offset * static_cast<int64_t>(element_bytes(o.dtype));
      shard.args.rows.dlogits_stride = target.stride();
      shard.args.rows.dlogits_vocab = shard.args.rows.vocab;
      shard.run(kd_shard_gradient, o);
    }
    for (int64_t row = 0; row < kKinds; ++row) check_gradient(o, whole, target, row);
  }
}

}  // namespace

// Usage: shards_sweep [every n-th case]. Exit status as of rows_sweep.
int main(int argc, char** argv) {
  if (const char* error = kd_cpu_isa_error()) {
    std::printf("%s\n", error);
    return kUntested;
  }
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::vector<int64_t> splits[] = {{1},        {1, 1},   {3, 4},       {16, 17},  {129},
                                         {5, 1, 30}, {300, 1}, {1024, 1025}, {1, 2047}, {65, 64, 63, 2}};
  int64_t cases = 0, done = 0;
  for (int dtype = KD_F32; dtype <= KD_BF16; ++dtype)
    for (int32_t kernel = 0; kernel < KD_KERNEL_COUNT; ++kernel)
      for (const auto& sizes : splits)
        for (int turn = 0; turn < 2; ++turn) {
          const int64_t mix = (cases + turn) % 6;  // options in turn, not their full product
          const bool keep = turn == 0;
          const Options o{static_cast<kd_dtype>(dtype),
                          kernel,
                          sizes,
                          mix == 1 || mix == 4,
                          mix % 2 == 1,
                          mix >= 2,
                          mix == 3 || mix == 4,
                          keep,
                          cases % 4 < 2,
                          mix == 2 || mix == 4 ? 2.0
                          : mix == 5           ? 0.5
                                               : 1.0};
          if (cases++ % every) continue;
          sweep_case(o);
          ++done;
        }
  std::printf("%s: %lld cases of shards, %d failures\n", kd_cpu_isa(), static_cast<long long>(done),
              g_failures);
  return g_failures ? 1 : 0;
}

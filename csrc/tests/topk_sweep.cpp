// Runs kd_topk_cpu and kd_draw_cpu over shapes, tails, dtypes and hard rows, meant to be built with ASan and
// UBSan: every buffer is a heap block of exactly its size. Torch-free. Ids are compared with a stable sort,
// masses with sums in double precision, draws with the cumulative mass; rows that are no distribution must be
// marked and stay alone.
#include <algorithm>
#include <cstdio>

#include "matrix.h"
#include "topk.h"

namespace {

enum RowKind {
  kPlain,
  kConstant,
  kTwoValues,
  kPeaked,
  kAscending,
  kBunched,
  kMasked,
  kAllMasked,
  kNaNRow,
  kInfRow,
  kKinds
};

struct Options {
  kd_dtype dtype;
  int64_t vocab, k;
  bool transform;  // bias, scale, soft-cap
  double temperature;
};

int g_failures = 0;
void expect(bool holds, const char* what, const Options& o, int64_t row) {
  if (holds) return;
  if (++g_failures > 20) return;
  std::printf("FAILED %s: dtype %d vocab %lld k %lld row kind %lld transform %d T %g\n", what, o.dtype,
              static_cast<long long>(o.vocab), static_cast<long long>(o.k), static_cast<long long>(row),
              o.transform, o.temperature);
}

double entry(int kind, int64_t i, int64_t vocab) {
  switch (kind) {
    case kConstant:
      return 1;
    case kTwoValues:
      return uniform() < 0.5 ? -1 : 1;
    case kPeaked:
      return i == vocab / 2 ? 200 : 4 * uniform();
    case kAscending:
      return 8.0 * static_cast<double>(i) / static_cast<double>(vocab);
    case kBunched:
      return i % 1024 < 64 ? 8 + uniform() : uniform();
    case kMasked:
      return i % 5 == 3 || vocab == 1 ? 6 * uniform() : -kInf;
    case kAllMasked:
      return -kInf;
    default:
      return 6 * uniform() - 3;
  }
}

void fill(Matrix& x, const Options& o) {
  for (int64_t row = 0; row < kKinds; ++row) {
    for (int64_t i = 0; i < o.vocab; ++i) x.set(row, i, entry(static_cast<int>(row), i, o.vocab));
    if (row == kNaNRow) x.set(row, o.vocab - 1, kNaN);
    if (row == kInfRow) x.set(row, o.vocab / 3, kInf);
  }
}

// Logits of a row in the accumulation type.
std::vector<double> logits_of(const Matrix& x, const Matrix& bias, const Options& o, const kd_side& side,
                              int64_t row) {
  std::vector<double> z;
  for (int64_t i = 0; i < o.vocab; ++i) {
    const double y = side.scale * (x.get(row, i) + (o.transform ? bias.get(0, i) : 0.0));
    z.push_back(side.softcap > 0 ? side.softcap * std::tanh(y / side.softcap) : y);
  }
  return z;
}

bool near(double found, double expected, double tolerance) {
  return found == expected || std::fabs(found - expected) <= tolerance * (1 + std::fabs(expected));
}

bool is_bad(const std::vector<double>& z) {
  const double top = *std::max_element(z.begin(), z.end());
  return std::any_of(z.begin(), z.end(), [](double x) { return x != x; }) || !(top > -kInf && top < kInf);
}

struct Outputs {
  Matrix log_probs, log_tail, entropy, other;
  std::vector<int32_t> ids;
};

void check_row(const Options& o, const std::vector<double>& z, const Outputs& out, int64_t row) {
  const int32_t* ids = out.ids.data() + row * o.k;
  if (is_bad(z)) {
    expect(std::count(ids, ids + o.k, -1) == o.k, "a bad row has no ids", o, row);
    expect(std::isnan(out.log_probs.get(row, 0)) && std::isnan(out.log_tail.get(row, 0)), "a bad row is NaN",
           o, row);
    return;
  }
  std::vector<int32_t> order(z.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return z[a] > z[b]; });
  const double max = z[order[0]], tolerance = o.dtype == KD_F64 ? 1e-12 : 3e-6;
  double sum = 0, tail = 0;
  int64_t kept = 0;
  for (size_t j = 0; j < order.size(); ++j) {
    const double e = std::exp((z[order[j]] - max) / o.temperature);
    sum += e;
    const bool in = static_cast<int64_t>(j) < o.k && z[order[j]] > -kInf;
    kept += in;
    tail += in ? 0 : e;
  }
  const double found_tail = out.log_tail.get(row, 0);
  expect(tail == 0 ? found_tail < -600 : near(found_tail, std::log(tail / sum), tolerance), "tail", o, row);
  std::sort(order.begin(), order.begin() + kept);
  const bool exact = !o.transform || o.dtype == KD_F64;  // a soft cap in float32 makes ties of its own
  for (int64_t j = 0; j < o.k; ++j) {
    if (exact) expect(ids[j] == (j < kept ? order[j] : -1), "ids", o, row);
    if (j >= kept || ids[j] < 0 || ids[j] >= o.vocab) continue;
    const double log_p = (z[ids[j]] - max) / o.temperature - std::log(sum);
    expect(near(out.log_probs.get(row, j), log_p, tolerance), "log-probability", o, row);
  }
}

void check_draws(const Options& o, const kd_side& side, const Matrix& x, const Matrix& bias) {
  constexpr int64_t kDraws = 9;
  const double fixed[kDraws] = {0, 0.999999999, 0.25, 0.5, 0.5, 0.75, 1.0, -1.0, kNaN};
  std::vector<double> uniforms;
  for (int row = 0; row < kKinds; ++row) uniforms.insert(uniforms.end(), fixed, fixed + kDraws);
  std::vector<int32_t> ids(kKinds * kDraws, -7);
  kd_draw args{side, o.dtype, kKinds, o.vocab, kDraws, o.temperature, uniforms.data(), ids.data()};
  with_scratch(kd_draw_scratch_bytes(&args), [&](void* scratch) { kd_draw_cpu(&args, 0, kKinds, scratch); });
  for (int64_t row = 0; row < kKinds; ++row) {
    const std::vector<double> z = logits_of(x, bias, o, side, row);
    const bool bad = is_bad(z);
    double max = -kInf, total = 0;
    for (const double v : z) max = std::max(max, v);
    for (const double v : z) total += std::exp((v - max) / o.temperature);
    for (int64_t j = 0; j < kDraws; ++j) {
      const int32_t id = ids[row * kDraws + j];
      if (bad || j >= 6) {
        expect(id == -1, "no draw", o, row);
        continue;
      }
      expect(id >= 0 && id < o.vocab && z[id] > -kInf, "a draw has mass", o, row);
      double before = 0;
      for (int32_t i = 0; i < id; ++i) before += std::exp((z[i] - max) / o.temperature);
      const double after = before + (id >= 0 ? std::exp((z[id] - max) / o.temperature) : 0);
      expect(before / total <= fixed[j] + 1e-5 && fixed[j] <= after / total + 1e-5, "a draw's place", o, row);
    }
  }
}

void sweep_case(const Options& o) {
  const kd_dtype acc = o.dtype == KD_F64 ? KD_F64 : KD_F32;
  Matrix x(o.dtype, kKinds, o.vocab, 24), bias(acc, 1, o.vocab, 0);
  fill(x, o);
  for (int64_t i = 0; i < o.vocab; ++i) bias.set(0, i, uniform() - 0.5);
  const kd_side side{x.data(), x.stride(), o.transform ? bias.data() : nullptr, o.transform ? 0.7 : 1.0,
                     o.transform ? 30.0 : 0.0};
  const double others[] = {0.5, 3.0};
  Outputs out{{acc, kKinds, o.k, 0}, {acc, kKinds, 1, 0}, {acc, kKinds, 1, 0}, {acc, kKinds, 2, 0}, {}};
  out.ids.assign(static_cast<size_t>(kKinds * o.k), -7);
  kd_topk args{side,
               o.dtype,
               kKinds,
               o.vocab,
               o.k,
               o.temperature,
               others,
               2,
               out.ids.data(),
               out.log_probs.data(),
               out.log_tail.data(),
               out.entropy.data(),
               out.other.data()};
  with_scratch(kd_topk_scratch_bytes(&args), [&](void* scratch) {
    expect(kd_topk_cpu(&args, 0, kKinds / 2, scratch) == 0, "code", o, 0);
    expect(kd_topk_cpu(&args, kKinds / 2, kKinds, scratch) == 0, "code", o, 0);
  });
  for (int64_t row = 0; row < kKinds; ++row) check_row(o, logits_of(x, bias, o, side, row), out, row);
  if (o.k == 1) check_draws(o, side, x, bias);
}

}  // namespace

// Usage: topk_sweep [every n-th case]. Exit status as of rows_sweep.
int main(int argc, char** argv) {
  if (const char* error = kd_cpu_isa_error()) {
    std::printf("%s\n", error);
    return kUntested;
  }
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  const int64_t shapes[][2] = {{1, 1},    {2, 1},     {2, 2},       {7, 3},       {31, 8},
                               {63, 63},  {64, 1},    {65, 2},      {129, 16},    {301, 1},
                               {301, 75}, {1030, 64}, {4097, 1},    {4097, 64},   {4097, 1024},
                               {9001, 8}, {9001, 64}, {20011, 300}, {20011, 4096}};
  int64_t cases = 0, done = 0;
  for (int dtype = KD_F32; dtype <= KD_F64; ++dtype)
    for (const auto& shape : shapes)
      for (int mix = 0; mix < 3; ++mix) {
        if (cases++ % every) continue;
        sweep_case({static_cast<kd_dtype>(dtype), shape[0], shape[1], mix == 2, mix == 1 ? 0.3 : 1.0});
        ++done;
      }
  std::printf("%s: %lld cases of selection, %d failures\n", kd_cpu_isa(), static_cast<long long>(done),
              g_failures);
  return g_failures ? 1 : 0;
}

// Runs kd_gate_cpu over shapes, tails, dtypes, hard rows, ways of sampling and numbers of workers, on
// threads, meant to be built with sanitizers: every buffer is a heap block of exactly its size. Torch-free.
// Divergences and tokens are compared with sums in double precision; rows that are no distribution must be
// marked and stay alone.
#include <algorithm>
#include <cstdio>
#include <thread>

#include "gate.h"
#include "matrix.h"

namespace {

enum RowKind { kPlain, kEqual, kPeaked, kMasked, kDisjoint, kNaNRow, kAllMasked, kInfRow, kKinds };

struct Options {
  kd_dtype student, teacher;
  int64_t vocab, top_k;
  double temperature, top_p;
  int workers;
};

int g_failures = 0;
void expect(bool holds, const char* what, const Options& o, int64_t row) {
  if (holds) return;
  if (++g_failures > 20) return;
  std::printf("FAILED %s: dtypes %d %d vocab %lld top_k %lld T %g top_p %g workers %d row kind %lld\n", what,
              o.student, o.teacher, static_cast<long long>(o.vocab), static_cast<long long>(o.top_k),
              o.temperature, o.top_p, o.workers, static_cast<long long>(row));
}

double entry(int kind, int64_t i, int64_t vocab, bool teacher) {
  switch (kind) {
    case kPeaked:
      return i == vocab - 1 ? 80 : 4 * uniform();
    case kMasked:
      return i % 5 == 3 || i == 0 ? 6 * uniform() : -kInf;
    case kDisjoint:
      return (i < vocab / 2) == teacher || vocab == 1 ? uniform() : -kInf;
    case kAllMasked:
      return -kInf;
    default:
      return 6 * uniform() - 3;
  }
}

void fill(Matrix& s, Matrix& t, const Options& o) {
  for (int64_t row = 0; row < kKinds; ++row) {
    for (int64_t i = 0; i < o.vocab; ++i) {
      s.set(row, i, entry(static_cast<int>(row), i, o.vocab, false));
      const double z = row == kEqual ? s.get(row, i) : entry(static_cast<int>(row), i, o.vocab, true);
      t.set(row, i, z);
    }
    if (row == kNaNRow) s.set(row, o.vocab - 1, kNaN);
    if (row == kInfRow) t.set(row, o.vocab / 3, kInf);
  }
}

std::vector<double> softmax(const Matrix& x, int64_t row, const Options& o, double t) {
  std::vector<double> p;
  double top = -kInf, sum = 0;
  for (int64_t i = 0; i < o.vocab; ++i) top = std::max(top, x.get(row, i));
  for (int64_t i = 0; i < o.vocab; ++i) {
    p.push_back(std::exp((x.get(row, i) - top) / t));
    sum += p.back();
  }
  for (double& v : p) v /= sum;
  return p;
}

double jsd_bits(const std::vector<double>& p, const std::vector<double>& q) {
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double m = (p[i] + q[i]) / 2;
    if (p[i] > 0) sum += p[i] / 2 * std::log2(p[i] / m);
    if (q[i] > 0) sum += q[i] / 2 * std::log2(q[i] / m);
  }
  return sum;
}

// Whether `token` is what u draws, up to rounding at an edge.
bool drawn(std::vector<double> p, const Options& o, double u, int64_t token) {
  std::vector<int64_t> order(p.size());
  for (size_t i = 0; i < p.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p[a] > p[b]; });
  if (o.top_k) order.resize(std::min<size_t>(order.size(), static_cast<size_t>(o.top_k)));
  double total = 0, mass = 0, kept = 0;
  for (const int64_t i : order) total += p[i];
  std::vector<double> left(p.size());
  for (const int64_t i : order) {
    if (o.top_p < 1 && mass >= o.top_p * total + 1e-6) break;
    mass += p[i];
    left[i] = p[i];
    kept += p[i];
  }
  double before = 0;
  for (int64_t i = 0; i < token; ++i) before += left[i];
  const double slack =
      1e-4 + (o.top_p < 1 ? 0.2 : 0);  // one entry more or less in the nucleus moves all edges
  return before <= u * kept + slack && before + left[token] >= u * kept - slack;
}

void sweep_case(const Options& o) {
  Matrix s(o.student, kKinds, o.vocab, 3), t(o.teacher, kKinds, o.vocab, 0);
  fill(s, t, o);
  const bool wide = o.student == KD_F64;
  std::vector<double> threshold(kKinds), u(kKinds), jsd64(kKinds);
  std::vector<float> jsd32(kKinds);
  std::vector<int64_t> token(kKinds, -7);
  std::vector<uint8_t> teacher(kKinds);
  for (int row = 0; row < kKinds; ++row) {
    threshold[row] = row % 2 ? -1 : 2;
    u[row] = uniform();
  }
  kd_gate args{};
  args.student = {s.data(), s.stride(), nullptr, 1, 0};
  args.teacher = {t.data(), t.stride(), nullptr, 1, 0};
  args.student_dtype = o.student;
  args.teacher_dtype = o.teacher;
  args.rows = kKinds;
  args.vocab = o.vocab;
  args.threshold = threshold.data();
  args.uniforms = u.data();
  args.temperature = o.temperature;
  args.top_k = o.top_k;
  args.top_p = o.top_p;
  args.token = token.data();
  args.from_teacher = teacher.data();
  args.jsd = wide ? static_cast<void*>(jsd64.data()) : jsd32.data();
  with_scratch(kd_gate_bytes(&args, o.workers), [&](void* shared) {
    kd_gate_begin(&args, o.workers, shared);
    std::vector<std::thread> threads;
    for (int w = 1; w < o.workers; ++w) {
      threads.emplace_back([&, w] { expect(kd_gate_cpu(&args, w, o.workers, shared) == 0, "code", o, 0); });
    }
    expect(kd_gate_cpu(&args, 0, o.workers, shared) == 0, "code", o, 0);
    for (std::thread& thread : threads) thread.join();
  });
  for (int row = 0; row < kKinds; ++row) {
    const double jsd = wide ? jsd64[row] : jsd32[row];
    if (row >= kNaNRow) {
      expect(token[row] == -1 && !teacher[row] && std::isnan(jsd), "mark", o, row);
      continue;
    }
    const std::vector<double> q = softmax(s, row, o, 1), p = softmax(t, row, o, 1);
    expect(std::fabs(jsd - jsd_bits(p, q)) < 1e-6, "jsd", o, row);
    expect(teacher[row] == (row % 2), "speaker", o, row);
    const bool id = token[row] >= 0 && token[row] < o.vocab;
    expect(id && drawn(softmax(row % 2 ? t : s, row, o, o.temperature), o, u[row], token[row]), "token", o,
           row);
  }
}

}  // namespace

// Usage: gate_sweep [every n-th case]. Exit status as of rows_sweep.
int main(int argc, char** argv) {
  if (const char* error = kd_cpu_isa_error()) {
    std::printf("%s\n", error);
    return kUntested;
  }
  const int every = argc > 1 ? std::atoi(argv[1]) : 1;
  const kd_dtype pairs[][2] = {
      {KD_F32, KD_F32}, {KD_BF16, KD_BF16}, {KD_F16, KD_F32}, {KD_BF16, KD_F16}, {KD_F64, KD_F64}};
  int64_t cases = 0, done = 0;
  for (const auto& pair : pairs)
    for (const int64_t vocab : {1, 2, 31, 301, 4095, 4096, 4097, 12289, 33001})
      for (int way = 0; way < 4; ++way)
        for (const int workers : {1, 3, 16}) {
          if (cases++ % every) continue;
          sweep_case({pair[0], pair[1], vocab, way == 2 ? 7 : 0, way == 1 ? 0.6 : 1.0, way == 3 ? 0.8 : 1.0,
                      workers});
          ++done;
        }
  std::printf("%s: %lld cases of the gate, %d failures\n", kd_cpu_isa(), static_cast<long long>(done),
              g_failures);
  return g_failures ? 1 : 0;
}

// The largest entries of each row with their log-probabilities, and the mass of the rest. See topk.h.
//
// A row is read from memory once and swept twice: for the threshold (scan.h), then for candidates and the sum
// of the entries below the threshold, which are the tail but for a few candidates. That sum is relative to
// the threshold, so that a tail of mass 1e-30 is as accurate as one of 0.3.
#include "pick.h"
#include "topk_isa.h"

namespace KD_NS {

namespace {

struct Select {
  const kd_topk* args;
  Source source;
  int64_t span;  // elements whose maxima are kept stripe by stripe; 0: every finite entry is a candidate
  float *maxima, *rest, *floats;  // rest: kQuad; floats: a row, if logits are computed
  Candidates room;
};

// A row as the sweeps take it: whole steps of stored numbers, and the rest as floats.
struct View {
  Piece whole, rest;
  const Scans *scans, *floats;
  const char *here, *next;  // of the stored row and of the one after it
};

int64_t padded(int64_t n) { return (n + kQuad - 1) / kQuad * kQuad; }

// Groups: many enough that k of them say where the threshold is, few enough that finding it is cheap beside
// the row.
int64_t span_of(const kd_topk& a) {
  if (a.vocab < 4 * a.k) return 0;
  int64_t groups = a.vocab / 8 < 16 * a.k ? a.vocab / 8 : 16 * a.k;
  groups = groups < 2 * a.k ? 2 * a.k : groups;
  const int64_t spans = (groups + kStripe - 1) / kStripe, span = (a.vocab + spans - 1) / spans;
  return (span + kStripe - 1) / kStripe * kStripe;
}

int64_t maxima_room(const kd_topk& a) {
  const int64_t span = span_of(a);
  return span ? (a.vocab + span - 1) / span * kStripe + kQuad : 0;
}

int64_t most_groups(int64_t k) { return k + k / 8; }

// See scan.h for why no row has more candidates.
int64_t candidate_room(const kd_topk& a) {
  const int64_t span = span_of(a), all = padded(a.vocab);
  const int64_t bound = span ? most_groups(a.k) * (span / kStripe) + a.k : all;
  return (bound < all ? bound : all) + 2 * kWidth;
}

int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

void carve(Select& task, void* scratch) {
  const kd_topk& a = *task.args;
  float* at = (float*)scratch;
  task.maxima = at, at += aligned(maxima_room(a));
  task.rest = at, at += aligned(kQuad);
  task.room.value = at, at += aligned(candidate_room(a));
  task.room.id = (int32_t*)at, at += aligned(candidate_room(a));
  task.room.count = 0;
  task.floats = at;
}

void fill(float* from, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) from[i] = -INFINITY;
}

View view_of(const Select& task, int64_t r, int64_t end) {
  const int64_t vocab = task.args->vocab;
  View v;
  v.here = task.source.row(r);
  v.next = task.source.row(r + 1 < end ? r + 1 : r);
  v.floats = scans_of<f32>();
  if (task.source.plain) {
    const int64_t whole = vocab / kQuad * kQuad;
    v.scans = scans_for(task.args->dtype);
    v.whole = {v.here, 0, whole, v.here, 0};
    v.rest = {task.rest, whole, whole < vocab ? kQuad : 0, v.here, 0};
    if (whole < vocab) stage(task.source, v.here, whole, (int)(vocab - whole), task.rest);
    fill(task.rest, vocab - whole, kQuad);
    return v;
  }
  for (int64_t first = 0; first < vocab; first += kBlock) {
    stage(task.source, v.here, first, (int)(vocab - first < kBlock ? vocab - first : kBlock),
          task.floats + first);
  }
  fill(task.floats, vocab, padded(vocab));
  v.scans = v.floats;
  v.whole = {task.floats, 0, padded(vocab), v.here, 0};
  v.rest = {task.rest, v.whole.n, 0, v.here, 0};
  return v;
}

// Of a row, so many eighths of the lines are asked for while the row before it is filtered, the others while
// its maxima are taken. The row at work stays in a second-level cache of 1 MiB meanwhile.
int asked(kd_dtype dtype) { return size_of(dtype) == 2 ? 8 : 5; }

Piece asking(const Select& task, Piece piece, const char* row, int begin, int eighths) {
  if (!task.source.plain) return piece;
  const int64_t bytes = task.args->vocab * size_of(task.args->dtype);
  return {piece.data, piece.first, piece.n, row + bytes * begin / 8, eighths};
}

// A number that k entries reach, and not many more; +inf where an entry is.
float threshold_of(const Select& task, const View& v) {
  if (!task.span) return kLowest;
  const int64_t k = task.args->k;
  const int early = asked(task.args->dtype);
  int64_t n = v.scans->maxima(asking(task, v.whole, v.here, early, 8 - early), task.span, task.maxima);
  for (int64_t i = 0; i < v.rest.n; ++i)
    task.maxima[n++] = task.rest[i] == task.rest[i] ? task.rest[i] : -INFINITY;
  const float top = max_of(task.maxima, n);
  if (top == INFINITY || count_from(task.maxima, n, kLowest) < k) return top == INFINITY ? top : kLowest;
  return reached_by(task.maxima, n, k, most_groups(k), kLowest, top);
}

// Below it, a sum relative to the threshold may owe something to entries that count as 1.6e-38 each.
constexpr double kNegligible = 1e-20;

// e^((a - b) / T)
double ratio(float a, float b, double rate) { return exp(((double)a - b) * rate); }

double kept_mass(const Candidates& found, int64_t n, const Split& s, double rate, double* weighted) {
  const Mass above = mass_of<true>(found.value, n, s.least, s.max, (float)rate);
  const double ties = (double)s.ties * ratio(s.least, s.max, rate);
  *weighted = above.weighted + ties * ((double)s.least - s.max);
  return above.sum + ties;
}

Below below(const View& v, const Split& s, float reference, double rate) {
  Below b = {0, 0, -INFINITY};
  v.scans->below(v.whole, s.least, reference, (float)rate, b);
  v.floats->below(v.rest, s.least, reference, (float)rate, b);
  return b;
}

// log of the tail's mass relative to e^(max / T), summed in a sweep of its own; in two where all of it is far
// below what is kept.
double swept_tail(const View& v, const Split& s, double rate) {
  const Below b = below(v, s, s.least, rate);
  const double mass = b.sum + (double)(b.equal - s.ties);
  if (mass > kNegligible) return log(mass) + ((double)s.least - s.max) * rate;
  if (b.max == -INFINITY) return -INFINITY;
  return log(below(v, s, b.max, rate).sum) + ((double)b.max - s.max) * rate;
}

// Sums over the row at T, relative to e^(max / T).
struct Totals {
  double log_tail, log_sum;
  double weighted;  // sum of e^x (z - max), where wanted
};

Totals totals_of(const View& v, const Filter& f, const Split& s, int64_t n, double rate) {
  Totals t;
  const double kept = kept_mass(f.found, n, s, rate, &t.weighted);
  const Mass part = mass_of<false>(f.found.value, n, s.least, s.least, (float)rate);
  const double few = part.sum + (double)s.left;  // candidates not kept, relative to the least kept
  const double far = f.sum * ratio(f.threshold, s.least, rate);
  if (few == 0 && f.sum > kNegligible) {
    t.log_tail = log(f.sum) + ((double)f.threshold - s.max) * rate;
  } else if (few + far > kNegligible) {
    t.log_tail = log(few + far) + ((double)s.least - s.max) * rate;
  } else {
    t.log_tail = swept_tail(v, s, rate);
  }
  t.log_sum = log(kept + exp(t.log_tail));
  t.weighted += ratio(s.least, s.max, rate) * (part.weighted + few * ((double)s.least - s.max));
  t.weighted += ratio(f.threshold, s.max, rate) * (f.weighted + f.sum * ((double)f.threshold - s.max));
  return t;
}

void write_kept(const kd_topk& a, int64_t r, const Candidates& found, int64_t n, const Split& s, double rate,
                double log_sum) {
  int32_t* ids = a.ids + r * a.k;
  float* log_probs = (float*)a.log_probs + r * a.k;
  const vf least = vf::all(s.least);
  int64_t at = 0, ties = s.ties;
  for (int64_t i = 0; i < n && at < s.kept; i += kWidth) {
    for (uint32_t bits = bits_of(!lt(vf::load(found.value + i), least)); bits; bits &= bits - 1) {
      const int64_t j = i + __builtin_ctz(bits);
      if (found.value[j] == s.least && ties-- <= 0) continue;
      ids[at] = found.id[j];
      log_probs[at++] = (float)(((double)found.value[j] - s.max) * rate - log_sum);
    }
  }
  for (; at < a.k; ++at) {
    ids[at] = -1;
    log_probs[at] = -INFINITY;
  }
}

void fill_row(const kd_topk& a, int64_t r) {
  for (int64_t i = 0; i < a.k; ++i) {
    a.ids[r * a.k + i] = -1;
    ((float*)a.log_probs)[r * a.k + i] = NAN;
  }
  ((float*)a.log_tail)[r] = NAN;
  if (a.entropy) ((float*)a.entropy)[r] = NAN;
  for (int64_t i = 0; a.other_tails && i < a.others; ++i) ((float*)a.other_tails)[r * a.others + i] = NAN;
}

void select_row(const Select& task, int64_t r, int64_t end) {
  const kd_topk& a = *task.args;
  const double rate = 1.0 / a.temperature;
  const View v = view_of(task, r, end);
  const float threshold = threshold_of(task, v);
  if (threshold == INFINITY) return fill_row(a, r);
  Filter f = {threshold, threshold, a.k, task.room, 0, 0, false};
  const bool weighted = a.entropy != nullptr;
  v.scans->filter[weighted](asking(task, v.whole, v.next, 0, asked(a.dtype)), (float)rate, f);
  v.floats->filter[weighted](v.rest, (float)rate, f);
  const int64_t n = pad(f.found);
  if (f.nan || n == 0) return fill_row(a, r);
  const Split s = split(f.found, n, a.k, threshold);
  if (s.max == INFINITY) return fill_row(a, r);
  const Totals t = totals_of(v, f, s, n, rate);
  write_kept(a, r, f.found, n, s, rate, t.log_sum);
  ((float*)a.log_tail)[r] = (float)(t.log_tail - t.log_sum);
  if (a.entropy) ((float*)a.entropy)[r] = (float)(t.log_sum - rate * t.weighted / exp(t.log_sum));
  for (int64_t i = 0; a.other_tails && i < a.others; ++i) {
    const double other = 1.0 / a.other_temperatures[i];
    double unused;
    const double tail = swept_tail(v, s, other), kept = kept_mass(f.found, n, s, other, &unused);
    ((float*)a.other_tails)[r * a.others + i] = (float)(tail - log(kept + exp(tail)));
  }
}

}  // namespace

static size_t topk_scratch(const kd_topk* args) {
  const bool computed = !source_of(args->logits, args->dtype).plain;
  const int64_t floats = aligned(maxima_room(*args)) + aligned(kQuad) + 2 * aligned(candidate_room(*args));
  return (size_t)(floats + (computed ? aligned(padded(args->vocab) + kBlock) : 0)) * sizeof(float);
}

static int topk(const kd_topk* args, int64_t begin, int64_t end, void* scratch) {
  Select task;
  task.args = args;
  task.source = source_of(args->logits, args->dtype);
  task.span = span_of(*args);
  carve(task, scratch);
  for (int64_t r = begin; r < end; ++r) select_row(task, r, end);
  return 0;
}

}  // namespace KD_NS

#define KD_STRING2(x) #x
#define KD_STRING(x) KD_STRING2(x)
const kd_cpu_topk KD_CAT(kd_topk_, KD_ISA) = {KD_STRING(KD_ISA), KD_NS::topk_scratch, KD_NS::topk,
                                              KD_NS::draw_scratch, KD_NS::draw};

// The gate on rows of logits, block by block. See gate.h, and gate_entry.cpp for who does which block.
//
// A row is read from memory once and swept twice: for the normalisers, kept block by block, then for the
// divergence. A token at temperature 1 costs one block more: the masses of the others are known.
#include "gate_sweeps.h"

namespace KD_NS {

namespace {

constexpr int kSpan = (int)kd_gate_block_size;
constexpr int kRunOfVectors = 16 * kWidth;

// A mass far below the row's: blocks with less on both sides change the divergence by less than 1e-9 bits
// together.
constexpr double kNothing = 1e-15;
// Below this share of its mass a block's quick divergence owes something to rounding.
constexpr double kNear = 1.0 / 1024;
// By how much the first reference exceeds the largest of a few entries: others are larger, and e^-87 is far.
constexpr float kHeadroom = 12.0f;

// A row's mass relative to the largest of its blocks' references. Most blocks share one.
struct Total {
  double mass, reference;

  void add(double more, double of) {
    if (of == reference) {
      mass += more;
    } else if (more > 0 && of > reference) {
      mass = mass * exp(reference - of) + more;
      reference = of;
    } else if (more != 0) {  // NaN too
      mass += more * exp(of - reference);
    }
  }
  bool usable() const { return mass > 0 && mass < INFINITY; }
  double lse() const { return reference + log(mass); }
  // A block's part of the row's mass.
  double share(double of_block, double at) const {
    return (at == reference ? of_block : of_block * exp(at - reference)) / mass;
  }
};

// A worker's scratch. The two blocks are not a multiple of 4 KiB apart: loads wait for stores whose addresses
// agree in the lower 12 bits.
struct Work {
  alignas(64) float zs[kSpan + 32], zt[kSpan + 32];
  float guess_s, guess_t;
  Total student, teacher;
};

struct Gate {
  const kd_gate* args;
  Source student, teacher;
  Work* work;
};

Gate gate_of(const kd_gate& a, void* scratch) {
  return {&a, source_of(a.student, a.student_dtype), source_of(a.teacher, a.teacher_dtype), (Work*)scratch};
}

int64_t blocks_of(const kd_gate& a) { return (a.vocab + kSpan - 1) / kSpan; }

int size_of_block(const kd_gate& a, int64_t block) {
  const int64_t left = a.vocab - block * kSpan;
  return (int)(left < kSpan ? left : kSpan);
}

// A block's logits as floats in `to`, with masked entries up to whole steps.
int stage_padded(const kd_gate& a, const Source& s, int64_t row, int64_t block, float* to) {
  const int n = size_of_block(a, block), padded = whole_steps(n);
  stage(s, s.row(row), block * kSpan, n, to);
  for (int i = n; i < padded; ++i) to[i] = -INFINITY;
  return padded;
}

typedef bool (*Sum)(const void*, int, float, double*, double*);
typedef bool (*Apart)(const void*, const void*, int, const Pair&, const Coming*, double*);

Sum sum_for(kd_dtype t) {
  return t == KD_F32 ? sum_quickly<f32> : t == KD_F16 ? sum_quickly<f16> : sum_quickly<bf16>;
}
Apart apart_for(kd_dtype t) {
  return t == KD_F32 ? apart_quickly<f32> : t == KD_F16 ? apart_quickly<f16> : apart_quickly<bf16>;
}

// A first reference: above the largest of a few entries spread over the row.
float guess_of(const kd_gate& a, const Source& s, int64_t row) {
  float top = -INFINITY, z[2 * kWidth];
  const int64_t apart = (a.vocab + 7) / 8;
  for (int64_t first = 0; first < a.vocab; first += apart) {
    const int64_t left = a.vocab - first;
    const int n = (int)(left < kStep ? left : kStep);
    stage(s, s.row(row), first, n, z);
    for (int i = 0; i < n; ++i) top = z[i] > top && z[i] < INFINITY ? z[i] : top;
  }
  return top > -INFINITY ? top + kHeadroom : 0;
}

// A block's mass, and what it is relative to. NaN for one with NaN or +inf, 0 for one of masked entries
// alone.
double weigh_block(const kd_gate& a, const Source& s, int64_t row, int64_t block, float guess, float* z,
                   double* reference) {
  const int n = size_of_block(a, block);
  const bool stored = s.plain && n == kSpan;
  double mass;
  if (!stored) stage_padded(a, s, row, block, z);
  const void* from = stored ? s.row(row) + block * kSpan * size_of(s.dtype) : (const char*)z;
  if (sum_for(stored ? s.dtype : KD_F32)(from, whole_steps(n), guess, reference, &mass)) return mass;
  if (stored) stage_padded(a, s, row, block, z);
  const float top = extremes_of<f32>(z, whole_steps(n)).max;
  Norm norm = {0, 0, top > -INFINITY ? top : 0};
  add_block(z, n, 1.0f, norm);
  *reference = norm.reference;
  return top == -INFINITY && norm.sum == norm.sum ? 0 : norm.sum;
}

void open(const kd_gate* args, int64_t row, void* scratch) {
  const Gate g = gate_of(*args, scratch);
  g.work->guess_s = guess_of(*args, g.student, row);
  g.work->guess_t = guess_of(*args, g.teacher, row);
}

void weigh(const kd_gate* args, int64_t row, int64_t begin, int64_t end, kd_gate_block* blocks,
           void* scratch) {
  const Gate g = gate_of(*args, scratch);
  Work& w = *g.work;
  for (int64_t b = begin; b < end; ++b) {
    kd_gate_block& to = blocks[b];
    to.student = weigh_block(*args, g.student, row, b, w.guess_s, w.zs, &to.student_reference);
    to.teacher = weigh_block(*args, g.teacher, row, b, w.guess_t, w.zt, &to.teacher_reference);
  }
}

void close(const kd_gate* args, const kd_gate_block* blocks, void* scratch) {
  Total s = {0, -1e300}, t = s;
  for (int64_t b = 0; b < blocks_of(*args); ++b) {
    s.add(blocks[b].student, blocks[b].student_reference);
    t.add(blocks[b].teacher, blocks[b].teacher_reference);
  }
  ((Work*)scratch)->student = s;
  ((Work*)scratch)->teacher = t;
}

double compare_block(const Gate& g, int64_t row, int64_t block, const Pair& lse, double mass,
                     const Coming* coming) {
  const kd_gate& a = *g.args;
  const int n = size_of_block(a, block);
  const bool s = g.student.plain && n == kSpan, t = g.teacher.plain && n == kSpan;
  const bool stored = s && t && a.student_dtype == a.teacher_dtype;
  const int64_t at = block * kSpan;
  // Where the sides' dtypes differ, one that is float32 is read where it is.
  const bool keep_s = stored || (s && a.student_dtype == KD_F32),
             keep_t = stored || (t && a.teacher_dtype == KD_F32);
  const char* zs = keep_s ? g.student.row(row) + at * size_of(a.student_dtype) : (const char*)g.work->zs;
  const char* zt = keep_t ? g.teacher.row(row) + at * size_of(a.teacher_dtype) : (const char*)g.work->zt;
  if (!keep_s) stage_padded(a, g.student, row, block, g.work->zs);
  if (!keep_t) stage_padded(a, g.teacher, row, block, g.work->zt);
  double apart;
  const bool done = apart_for(stored ? a.student_dtype : KD_F32)(zs, zt, whole_steps(n), lse, coming, &apart);
  if (done && apart > kNear * mass) return apart;
  if (keep_s) stage_padded(a, g.student, row, block, g.work->zs);
  if (keep_t) stage_padded(a, g.teacher, row, block, g.work->zt);
  return apart_carefully(g.work->zs, g.work->zt, whole_steps(n), lse);
}

// Of the next row half is asked for while this one is compared, which takes its numbers from cache.
void compare(const kd_gate* args, int64_t row, int64_t begin, int64_t end, kd_gate_block* blocks, bool more,
             void* scratch) {
  const Gate g = gate_of(*args, scratch);
  const Total &student = g.work->student, &teacher = g.work->teacher;
  if (!student.usable() || !teacher.usable()) return;
  const Pair lse = {student.lse(), teacher.lse()};
  for (int64_t b = begin; b < end; ++b) {
    kd_gate_block& at = blocks[b];
    const double mass =
        student.share(at.student, at.student_reference) + teacher.share(at.teacher, at.teacher_reference);
    Coming coming = {nullptr, nullptr, 4};
    if (more) {
      coming.student = g.student.row(row + 1) + b * kSpan * size_of(args->student_dtype) / 2;
      coming.teacher = g.teacher.row(row + 1) + b * kSpan * size_of(args->teacher_dtype) / 2;
    }
    at.apart = mass > kNothing ? compare_block(g, row, b, lse, mass, more ? &coming : nullptr) : 0;
  }
}

bool decide(const kd_gate* a, int64_t row, const kd_gate_block* blocks, void* scratch) {
  const Work& w = *(const Work*)scratch;
  const double threshold = a->threshold[row];
  float* jsd = (float*)a->jsd + row;
  *jsd = NAN;
  a->from_teacher[row] = 0;
  if (!w.student.usable() || !w.teacher.usable() || threshold != threshold) return false;
  double apart = 0;
  for (int64_t b = 0; b < blocks_of(*a); ++b) apart += blocks[b].apart;
  const double bits = apart / 2;
  *jsd = bits < 0 ? 0.0f : bits > 1 ? 1.0f : (float)bits;
  a->from_teacher[row] = *jsd > threshold;
  return true;
}

// The speaker's side of a row and its blocks.
struct Speaker {
  const kd_gate* args;
  Source source;
  int64_t row;
  const kd_gate_block* blocks;
  bool teacher;
  Total total;
  float* z;

  double reference(int64_t b) const {
    return teacher ? blocks[b].teacher_reference : blocks[b].student_reference;
  }
  double share(int64_t b) const {
    return total.share(teacher ? blocks[b].teacher : blocks[b].student, reference(b));
  }
};

// The first entry of a block at which its cumulative mass, in the unit of e^reference, exceeds `target`, or
// its last one with any mass.
int64_t search(const Speaker& s, int64_t block, float reference, double target) {
  const int n = stage_padded(*s.args, s.source, s.row, block, s.z);
  const Exp exp_1(1.0f);
  const vf base = vf::all(reference), masked = vf::all(-INFINITY), zero = vf::all(0);
  const auto masses = [&](int i) {
    const vf z = vf::load(s.z + i);
    return select(eq(z, masked), zero, vf{exp_1.clamped((z - base).v)});
  };
  double mass = 0;
  int at = 0;  // the vector that holds the entry
  bool within = false;
  // What begins at `first`: as many vectors as `step`, then those one by one.
  const auto look = [&](int first, int end, int step) {
    for (int i = first; i < end && !within; i += step) {
      vf sum = zero;
      for (int j = i; j < i + step && j < end; j += kWidth) sum = sum + masses(j);
      const double more = lanes_total(sum);
      if (more > 0) at = i;
      within = mass + more > target;
      if (!within) mass += more;
    }
  };
  look(0, n, kRunOfVectors);
  if (!within) target = INFINITY;  // rounding: the last entry with any mass
  within = false;
  const int run = at;
  look(run, run + kRunOfVectors < n ? run + kRunOfVectors : n, kWidth);
  float lane[kWidth];
  masses(at).store(lane);
  int last = 0;
  for (int j = 0; j < kWidth; ++j) {
    if (lane[j] == 0) continue;
    last = j;
    if (within && (mass += lane[j]) > target) break;
  }
  return block * kSpan + at + last;
}

int64_t draw(const Speaker& s, double u) {
  const int64_t blocks = blocks_of(*s.args);
  double before = 0, mass = 0;
  int64_t at = 0;
  bool within = false;
  for (int64_t b = 0; b < blocks && !within; ++b) {
    const double more = s.share(b);
    if (more == 0) continue;
    before += mass;
    mass = more;
    at = b;
    within = before + mass > u;
  }
  const float reference = (float)s.reference(at);
  // Rounding may lead beyond the last entry with any mass: it is that one then.
  const double target = within ? (u - before) * s.total.mass * exp(s.total.reference - reference) : INFINITY;
  return search(s, at, reference, target);
}

// The most likely entry, of equal ones the first. A block with less mass than the largest entry found so far
// has none like it.
int64_t argmax(const Speaker& s) {
  float best = -INFINITY;
  int64_t at = -1;
  const auto visit = [&](int64_t b) {
    const float top = extremes_of<f32>(s.z, stage_padded(*s.args, s.source, s.row, b, s.z)).max;
    if (!(top > best || (top == best && b < at / kSpan))) return;
    int i = 0;
    while (s.z[i] != top) ++i;
    best = top;
    at = b * kSpan + i;
  };
  int64_t heaviest = 0;
  for (int64_t b = 1; b < blocks_of(*s.args); ++b) heaviest = s.share(b) > s.share(heaviest) ? b : heaviest;
  visit(heaviest);
  double least = (1 - 1e-5) * exp(best - s.total.lse());
  for (int64_t b = 0; b < blocks_of(*s.args); ++b) {
    if (b == heaviest || s.share(b) < least) continue;
    visit(b);
    least = (1 - 1e-5) * exp(best - s.total.lse());
  }
  return at;
}

int64_t speak(const kd_gate* a, int64_t row, const kd_gate_block* blocks, void* scratch) {
  const Gate g = gate_of(*a, scratch);
  const bool teacher = a->from_teacher[row];
  const Speaker s = {a,         teacher ? g.teacher : g.student,
                     row,       blocks,
                     teacher,   teacher ? g.work->teacher : g.work->student,
                     g.work->zs};
  return a->uniforms ? draw(s, a->uniforms[row]) : argmax(s);
}

}  // namespace

}  // namespace KD_NS

#define KD_STRING2(x) #x
#define KD_STRING(x) KD_STRING2(x)
const kd_cpu_gate KD_CAT(kd_gate_, KD_ISA) = {KD_STRING(KD_ISA), sizeof(KD_NS::Work), KD_NS::open,
                                              KD_NS::weigh,      KD_NS::close,        KD_NS::compare,
                                              KD_NS::decide,     KD_NS::speak};

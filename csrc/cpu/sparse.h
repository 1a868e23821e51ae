// Rows against a sparse teacher: the student's tail, which is everything the teacher did not keep, in one
// sweep, and its gradient in another.
//
// Kept entries are taken out of the row before anything is summed: the tail's sum is relative to the tail's
// own maximum, so that a tail of mass 1e-30 is as accurate as one of 0.3, and the row's normaliser is the sum
// of the two. They are few (K of V) and lie anywhere, so the sweep does not step around them: a vector of
// caps, infinite but where an entry is kept, lowers those to e^-86 of the reference with one minimum an
// element.
#pragma once
#include "../sparse.h"
#include "rows.h"

namespace KD_NS {

size_t sparse_scratch_bytes(const kd_sparse* args);
int sparse(const kd_sparse* args, int64_t begin, int64_t end, void* scratch);

// A row's kept entries. Arrays have room for whole steps beyond one more than can be kept.
struct Kept {
  const int32_t* ids;
  int n;
  float *z, *lp, *lq, *grad;  // logits; log-probabilities as compared; the gradient
  float* caps;                // a block, +inf between uses
};

constexpr float kCap = -86.0f;  // in units of T: within what Exp::checked takes, and 4e-38 of the reference

// One side's sums over a tail, as Sums has both sides' over a row.
struct TailSums {
  double sum[kWidth], weighted[kWidth];
  float reference;
};

// Adds n elements (a multiple of kStep) to `to`; `caps` are in X's order. kExact as in sum_block.
template <class X, bool kWeighted, bool kExact>
KD_NOINLINE bool tail_block(const void* student, const float* caps, int n, float per_t, TailSums& to,
                            const char* ahead) {
  typedef typename X::stored stored;
  const stored* s = (const stored*)student;
  const Exp exp_t(per_t);
  const vf reference = vf::all(to.reference);
  Running<kLongLanes, vf> sums, weighted;
  RangeCheck check = Exp::fresh();
  for (int i = 0; i < n; i += kStep) {
    vf z[2];
    X::load2(s + i, z);
    __builtin_prefetch(ahead + i * sizeof(stored) / 2, 0, 2);
    for (int h = 0; h < 2; ++h) {
      const vf x = smaller(vf::load(caps + i + h * kWidth), z[h] - reference);  // NaN stays NaN
      const vf e = {kExact ? exp_t.clamped(x.v) : exp_t.checked(x.v, check)};
      sums.add(e);
      if (kWeighted) weighted.add(e, x);
    }
  }
  if (!kExact && !Exp::in_range(check)) return false;
  add_lanes(to.sum, sums.total);
  if (kWeighted) add_lanes(to.weighted, weighted.total);
  return true;
}

// out = a e^((z - reference) / T), for n elements (a multiple of kStep).
template <class X>
KD_NOINLINE void scale_block(const void* student, void* gradient, int n, float reference, float per_t,
                             float a, const char* ahead) {
  typedef typename X::stored stored;
  const stored* s = (const stored*)student;
  stored* out = (stored*)gradient;
  const Exp exp_t(per_t, a);
  const vf ref = vf::all(reference);
  for (int i = 0; i < n; i += kStep) {
    __builtin_prefetch(ahead + i * sizeof(stored) / 2, 0, 2);
    vf z[2];
    X::load2(s + i, z);
    for (int h = 0; h < 2; ++h) z[h] = {exp_t.scaled((z[h] - ref).v)};
    X::store2(out + i, z);
  }
}

// Whether n elements (a multiple of kStep) are all finite.
template <class X>
KD_NOINLINE bool finite_block(const void* student, int n, const char* ahead) {
  const typename X::stored* s = (const typename X::stored*)student;
  vf none = vf::all(0);
  for (int i = 0; i < n; i += kStep) {
    vf z[2];
    X::load2(s + i, z);
    __builtin_prefetch(ahead + i * sizeof(*s) / 2, 0, 2);
    for (int h = 0; h < 2; ++h) none = none + (z[h] - z[h]);
  }
  return sum(none.v) == 0;
}

struct TailSweeps {
  bool (*fast[2])(const void*, const float*, int, float, TailSums&,
                  const char*);  // by whether entropies are wanted
  bool (*exact)(const void*, const float*, int, float, TailSums&, const char*);
  void (*scale)(const void*, void*, int, float, float, float, const char*);
  bool (*finite)(const void*, int, const char*);
  int (*slot)(int);
};

template <class X>
constexpr TailSweeps tail_sweeps_of() {
  return {{tail_block<X, false, false>, tail_block<X, true, false>},
          tail_block<X, true, true>,
          scale_block<X>,
          finite_block<X>,
          X::slot};
}

static constexpr TailSweeps kTailF32 = tail_sweeps_of<f32>(), kTailBf16 = tail_sweeps_of<bf16>();

inline const TailSweeps& tail_sweeps_for(kd_dtype dtype) { return dtype == KD_BF16 ? kTailBf16 : kTailF32; }

// Kept entries of one block: at .. end of the row's.
struct Inside {
  int at, end;
};

inline Inside inside(const Kept& kept, int at, int64_t last) {
  int end = at;
  while (end < kept.n && kept.ids[end] < last) ++end;
  return {at, end};
}

// Writes `value` over a staged block's kept entries and over the steps' rest.
inline void hide(const Kept& kept, Inside in, int64_t first, int n, float value, float* z) {
  for (int k = in.at; k < in.end; ++k) z[kept.ids[k] - first] = value;
  for (int i = n; i < whole_steps(n); ++i) z[i] = value;
}

inline const char* ahead_in(const Task& task, const Row& row, int64_t first, Sweep sweep) {
  return ahead_of(task, row, first, sweep).student;
}

// A block that the fast sweep has not taken; see sum_exactly. Raises the reference.
inline bool tail_exactly(const Task& task, const Row& row, const Kept& kept, Inside in, int64_t first, int n,
                         TailSums& u, bool* wide) {
  if (in.end - in.at == n) return true;  // nothing of the tail
  stage(task.student, row.student, first, n, task.zs);
  hide(kept, in, first, n, NAN, task.zs);  // extremes do not see a NaN
  const Extremes e = extremes_of<f32>(task.zs, whole_steps(n));
  if (e.max > u.reference) {
    const double d = (double)u.reference - e.max, f = u.reference == -INFINITY ? 0 : exp(d * task.per_t);
    for (int j = 0; j < kWidth && f != 0; ++j) {
      u.weighted[j] = f * (u.weighted[j] + d * u.sum[j]);
      u.sum[j] *= f;
    }
    if (f == 0) memset(u.sum, 0, 2 * sizeof u.sum);
    u.reference = e.max;
  }
  const double low = ((double)e.min - u.reference) * task.per_t;
  if (!(low > kHopeless)) return false;
  *wide = low < -80;
  hide(kept, in, first, n, u.reference - 128.0f / task.per_t, task.zs);
  tail_sweeps_for(KD_F32).exact(task.zs, kept.caps, whole_steps(n), task.per_t, u,
                                ahead_in(task, row, first, kFirst));
  return true;
}

// Sums of the tail of a row without masked entries. False: it has some, or is no distribution.
inline bool sum_tail(const Task& task, const Row& row, const Kept& kept, Norm* tail) {
  TailSums u;
  memset(&u, 0, sizeof u);
  u.reference = -INFINITY;
  const int64_t vocab = task.args->vocab, size = size_of(task.args->dtype);
  const TailSweeps& sweeps = tail_sweeps_for(task.args->dtype);
  const float cap = kCap / task.per_t;
  bool exact = true;
  Inside in = {0, 0};
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
    in = inside(kept, in.end, first + n);
    bool done = false;
    if (!exact && !row.staged && n == kBlock) {
      for (int k = in.at; k < in.end; ++k) {
        const int i = (int)(kept.ids[k] - first), step = i / kStep * kStep;
        kept.caps[step + sweeps.slot(i - step)] = cap;
      }
      done = sweeps.fast[task.args->stats != nullptr](row.student + first * size, kept.caps, n, task.per_t, u,
                                                      ahead_in(task, row, first, kFirst));
      for (int k = in.at; k < in.end; ++k) {
        const int i = (int)(kept.ids[k] - first), step = i / kStep * kStep;
        kept.caps[step + sweeps.slot(i - step)] = INFINITY;
      }
    }
    if (!done && !tail_exactly(task, row, kept, in, first, n, u, &exact)) return false;
  }
  *tail = {total(u.sum), total(u.weighted), u.reference};
  return kept.n == vocab || usable(*tail);
}

// All that a row's tail is asked where nothing of it is compared. False says nothing: there may be masked
// entries.
inline bool finite_row(const Task& task, const Row& row) {
  const int64_t vocab = task.args->vocab, size = size_of(task.args->dtype);
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
    const bool staged = row.staged || n < kBlock;
    if (staged) stage(task.student, row.student, first, n, task.zs);
    const TailSweeps& sweeps = tail_sweeps_for(staged ? KD_F32 : task.args->dtype);
    const void* from = staged ? (const void*)task.zs : row.student + first * size;
    if (!sweeps.finite(from, whole_steps(n), ahead_in(task, row, first, kFirst))) return false;
  }
  return true;
}

// sum_tail for any tail, as careful_norm; a sum of 0 where nothing of it has mass. False: NaN or +inf.
inline bool careful_tail(const Task& task, const Row& row, const Kept& kept, Norm* tail) {
  const int64_t vocab = task.args->vocab;
  Norm s = {0, 0, -INFINITY};
  for (int pass = 0; pass < 2; ++pass) {
    Inside in = {0, 0};
    for (int64_t first = 0; first < vocab; first += kBlock) {
      const int n = (int)(vocab - first < kBlock ? vocab - first : kBlock);
      in = inside(kept, in.end, first + n);
      stage(task.student, row.student, first, n, task.zs);
      hide(kept, in, first, n, -INFINITY, task.zs);
      if (pass == 1) {
        add_block(task.zs, n, task.per_t, s);
        continue;
      }
      const float top = extremes_of<f32>(task.zs, whole_steps(n)).max;
      s.reference = top > s.reference ? top : s.reference;
      for (int i = 0; i < n; ++i) {
        if (task.zs[i] != task.zs[i]) return false;
      }
    }
    if (s.reference == -INFINITY) break;
  }
  *tail = s;
  return s.sum < INFINITY;
}

// Logits of the kept entries.
KD_NOINLINE inline void gather(const Source& s, const char* row, const int32_t* ids, int n, float* to) {
  const uint16_t* half = (const uint16_t*)row;
  if (s.dtype == KD_F32) {
    for (int k = 0; k < n; ++k) to[k] = ((const float*)row)[ids[k]];
  } else if (s.dtype == KD_BF16) {
    for (int k = 0; k < n; ++k) {
      const uint32_t bits = (uint32_t)half[ids[k]] << 16;
      memcpy(to + k, &bits, 4);
    }
  } else {
    uint16_t some[kWidth];
    for (int k = 0; k < n; k += kWidth) {
      for (int j = 0; j < kWidth; ++j) some[j] = half[ids[k + j < n ? k + j : n - 1]];
      f16::load(some).store(to + k);
    }
  }
  if (s.plain) return;
  for (int k = 0; k < n; ++k) to[k] = s.scale * (s.bias ? to[k] + s.bias[ids[k]] : to[k]);
  if (s.cap == 0.0f) return;
  const vf cap = vf::all(s.cap), inverse = vf::all(1.0f / s.cap);
  for (int k = 0; k < n; k += kWidth) (cap * vf{tanh_full((vf::load(to + k) * inverse).v)}).store(to + k);
}

}  // namespace KD_NS

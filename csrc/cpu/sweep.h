// The two sweeps every row function shares: the first over both sides for their normalisers (and, for the
// online divergences, everything else), the last for the gradient.
//
// Forward and reverse KL are online: sweep 1 carries c = sum e^xt (xt - xs) (reverse: e^xs (xs - xt)), x = (z
// - reference) / T, so D = c / sum_t - log sum_t + log sum_s: small numbers, never through a log-sum-exp.
//
// Every gradient is dz = a e^xs + b kept, with one number an element kept from an earlier sweep: e^xt
// (forward KL), e^xs (xs - xt) (reverse), or grad (any other). Keeping one number costs 4 V bytes of L2;
// keeping both exponentials was slower at V = 128 k (2 x 4 V leaves L2), recomputing both too (Zen 5: 1.3
// and 1.4 against 2.0 ns a vector).
#pragma once
#include "lse.h"

namespace KD_NS {

// What sweep 1 computes beside the normalisers.
enum Carry { kNothing, kForward, kReverse };

// Where both sides of a row stand in sweep 1; lanes are kept apart until the end.
struct Sums {
  double student[kWidth], teacher[kWidth];      // e^x
  double student_x[kWidth], teacher_x[kWidth];  // e^x (z - reference), for entropies
  double cross[kWidth];                         // c, in units of z
  float ref_s, ref_t;
};

// What later rows' lines to ask for while a block is at work.
struct Ahead {
  const char *student, *teacher;
};

KD_INLINE void add_lanes(double* to, vf x) {
  alignas(64) float lane[kWidth];
  x.store(lane);
  for (int j = 0; j < kWidth; ++j) to[j] += lane[j];
}

// Adds n elements (a multiple of kStep) of both sides to `to` and keeps one number each. kExact: x / T may be
// anything below 88, exponentials are held at 1.6e-38. Otherwise returns false, nothing added, if an x / T
// was out of range.
template <class X, int kCarry, bool kWeighted, bool kExact>
KD_NOINLINE bool sum_block(const void* student, const void* teacher, int n, float per_t, float* kept,
                           Sums& to, Ahead ahead) {
  typedef typename X::stored stored;
  const stored *s = (const stored*)student, *t = (const stored*)teacher;
  const Exp exp_t(per_t);
  const vf ref_s = vf::all(to.ref_s), ref_t = vf::all(to.ref_t);
  Running<kLongLanes, vf> sum_s, sum_t, cross, weighted_s, weighted_t;
  RangeCheck check = Exp::fresh();
  for (int i = 0; i < n; i += kStep) {
    vf zs[2], zt[2];
    X::load2(s + i, zs);
    X::load2(t + i, zt);
    prefetch(ahead.student, ahead.teacher, i * sizeof(stored));
    for (int h = 0; h < 2; ++h) {
      const vf xs = zs[h] - ref_s, xt = zt[h] - ref_t;
      const vf es = {kExact ? exp_t.clamped(xs.v) : exp_t.checked(xs.v, check)};
      const vf et = {kExact ? exp_t.clamped(xt.v) : exp_t.checked(xt.v, check)};
      sum_s.add(es);
      sum_t.add(et);
      if (kWeighted) {
        weighted_s.add(es, xs);
        weighted_t.add(et, xt);
      }
      if (kCarry == kForward) {
        cross.add(et, xt - xs);
        et.store(kept + i + h * kWidth);
      }
      if (kCarry == kReverse) {
        const vf product = es * (xs - xt);
        cross.add(product);
        product.store(kept + i + h * kWidth);
      }
    }
  }
  if (!kExact && !Exp::in_range(check)) return false;
  add_lanes(to.student, sum_s.total);
  add_lanes(to.teacher, sum_t.total);
  if (kWeighted) add_lanes(to.student_x, weighted_s.total);
  if (kWeighted) add_lanes(to.teacher_x, weighted_t.total);
  if (kCarry != kNothing) add_lanes(to.cross, cross.total);
  return true;
}

// Moves the sums to references no lower than `top_s` and `top_t`.
inline void refer_to(Sums& u, float top_s, float top_t, double per_t, int carry) {
  const float s = top_s > u.ref_s ? top_s : u.ref_s, t = top_t > u.ref_t ? top_t : u.ref_t;
  if (u.ref_s != -INFINITY) {
    const double ds = (double)u.ref_s - s, dt = (double)u.ref_t - t;  // what is added to every z - reference
    const double fs = exp(ds * per_t), ft = exp(dt * per_t);
    for (int j = 0; j < kWidth; ++j) {
      if (carry == kForward) u.cross[j] = ft * (u.cross[j] + (dt - ds) * u.teacher[j]);
      if (carry == kReverse) u.cross[j] = fs * (u.cross[j] + (ds - dt) * u.student[j]);
      u.student_x[j] = fs * (u.student_x[j] + ds * u.student[j]);
      u.teacher_x[j] = ft * (u.teacher_x[j] + dt * u.teacher[j]);
      u.student[j] *= fs;
      u.teacher[j] *= ft;
    }
  }
  u.ref_s = s;
  u.ref_t = t;
}

// out = a e^((z - reference) / T) + b kept, for n elements (a multiple of kStep).
template <class X>
KD_NOINLINE void combine_block(const void* student, const float* kept, void* gradient, int n, float reference,
                               float per_t, float a, float b, Ahead ahead) {
  typedef typename X::stored stored;
  const stored* s = (const stored*)student;
  stored* out = (stored*)gradient;
  const Exp exp_t(per_t, a);
  const vf ref = vf::all(reference), weight = vf::all(b);
  for (int i = 0; i < n; i += kStep) {
    prefetch(ahead.student, ahead.teacher, i * sizeof(stored));
    vf z[2];
    X::load2(s + i, z);
    for (int h = 0; h < 2; ++h) {
      const vf e = {exp_t.scaled((z[h] - ref).v)};
      z[h] = fma(vf::load(kept + i + h * kWidth), weight, e);
    }
    X::store2(out + i, z);
  }
}

// The sweeps of one stored type.
struct Sweeps {
  typedef bool (*Sum)(const void*, const void*, int, float, float*, Sums&, Ahead);
  Sum fast[3][2], exact[3];  // by Carry, and whether entropies are wanted
  void (*combine)(const void*, const float*, void*, int, float, float, float, float, Ahead);
  Extremes (*extremes)(const void*, int);
  int (*slot)(int);
};

template <class X>
constexpr Sweeps sweeps_of() {
  return {{{sum_block<X, kNothing, false, false>, sum_block<X, kNothing, true, false>},
           {sum_block<X, kForward, false, false>, sum_block<X, kForward, true, false>},
           {sum_block<X, kReverse, false, false>, sum_block<X, kReverse, true, false>}},
          {sum_block<X, kNothing, true, true>, sum_block<X, kForward, true, true>,
           sum_block<X, kReverse, true, true>},
          combine_block<X>,
          extremes_of<X>,
          X::slot};
}

static constexpr Sweeps kSweepsF32 = sweeps_of<f32>(), kSweepsBf16 = sweeps_of<bf16>();

// fp16 rows are staged as floats: rare on CPUs, and a third of the templates.
inline const Sweeps* sweeps_for(kd_dtype dtype) { return dtype == KD_BF16 ? &kSweepsBf16 : &kSweepsF32; }

}  // namespace KD_NS

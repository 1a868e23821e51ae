// One row of forward or reverse KL on chip: sums, loss, gradient. See dense_onchip.cuh.
#pragma once
#include "dense_onchip.cuh"

namespace kd {

// The normaliser of one side: log-probability = z / T - k - rest, such that no rounding of k stays in it.
struct Norm {
  float k, rest;

  static __device__ __forceinline__ Norm of(float top, float log_sum, float per_t) {
    const float k = fmaf(top, per_t, log_sum);
    return {k, fmaf(top, per_t, -k) + log_sum};
  }
  // A masked entry's is -1e4; NaN compares false and stays.
  __device__ __forceinline__ float log_prob(float z, float per_t) const {
    const float l = fmaf(z, per_t, -k) - rest;
    return l < kHopeless ? kMasked : l;
  }
};

__device__ __forceinline__ float clamped_exp(float l) {
  return exp2_approximate((l < -87.f ? -87.f : l) * kLog2E);
}

// p d - p + q for d = log p - log q, without its cancellation near d = 0: kdkernels/divergences/_element.py.
__device__ __forceinline__ float kl_term(float p, float q, float d) {
  const float series =
      1 / 2.f - d * (1 / 6.f - d * (1 / 24.f - d * (1 / 120.f - d * (1 / 720.f - d * (1 / 5040.f)))));
  return fabsf(d) < 0.25f ? p * d * d * series : fmaf(p, d - 1, q);
}

// Kahan's sum.
struct Sum {
  float total = 0, lost = 0;
  __device__ __forceinline__ void add(float x) {
    const float y = x - lost, after = total + y;
    lost = (after - total) - y, total = after;
  }
};

// Sums over a row relative to the references `top`; cross is that of the direction, with x_t - x_s.
struct Sums {
  float top_s, top_t, s, t, cross, spread;
};

template <class T, Direction D>
struct Row {
  static constexpr int kSize = Vector<T>::kSize;

  const OnchipArguments& a;
  const Place& p;
  Ring<T>& ring;
  Exchange& exchange;
  int r;
  float kd;              // weight of the row
  float tail_s, tail_t;  // this lane's entry behind the last vector

  __device__ __forceinline__ bool has_tail() const { return p.lane < p.tail; }

  // Adds one entry to the sums of this lane.
  __device__ __forceinline__ void gather(Sums& x, float zs, float zt, float r_s, float r_t) const {
    const float xs = fmaf(zs, a.c, -r_s), xt = fmaf(zt, a.c, -r_t), d = xt - xs;
    const float es = exp2_approximate(xs), et = exp2_approximate(xt);
    x.s += es, x.t += et;
    x.cross = fmaf(D == kForward ? et : es, d, x.cross);
    x.spread = fmaf(d, d, x.spread);
  }

  // The warp's references: the largest of its first vectors. They are finite; sums tell where that is wrong.
  __device__ __forceinline__ void references(Sums& x) const {
    x.top_s = fmaxf(kFill, tail_s), x.top_t = fmaxf(kFill, tail_t);
    if (p.chunks > 0) {
      ring.wait();
      const uint4* side = ring.memory + ring.stage * (2 * kSide / 16) + p.lane;
      if (p.number * (kEach * kWarp) + p.lane < p.vectors) {
        float zs[kSize], zt[kSize];
        Vector<T>::load(side, zs), Vector<T>::load(side + kSide / 16, zt);
#pragma unroll
        for (int i = 0; i < kSize; ++i) x.top_s = fmaxf(x.top_s, zs[i]), x.top_t = fmaxf(x.top_t, zt[i]);
      }
    }
    x.top_s = warp_largest(x.top_s), x.top_t = warp_largest(x.top_t);
  }

  // One sweep: the sums of the row, the same in all threads of the cluster.
  __device__ __forceinline__ Sums sums() {
    Sums x{0, 0, 0, 0, 0, 0};
    references(x);
    const float r_s = x.top_s * a.c, r_t = x.top_t * a.c;
    ring.arriving(p, [&](const float* zs, const float* zt, int) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) gather(x, zs[i], zt[i], r_s, r_t);
    });
    if (has_tail()) gather(x, tail_s, tail_t, r_s, r_t);
    if (!(x.spread < INFINITY)) x.s = NAN;
    return merged(exchange.tell(p, fold(x.s, x.t, x.cross, 0, p.lane), x.top_s, x.top_t));
  }

  // The sums of all warps, brought to one reference.
  __device__ __forceinline__ Sums merged(const float* record) const {
    const int n = p.numbers;
    float top_s = kFill, top_t = kFill, s = 0, t = 0, cross = 0, spread = 0;
    for (int i = p.lane; i < n; i += kWarp)
      top_s = fmaxf(top_s, record[i]), top_t = fmaxf(top_t, record[n + i]);
    top_s = warp_largest(top_s), top_t = warp_largest(top_t);
    for (int i = p.lane; i < n; i += kWarp) {
      const float ds = record[i] * a.c - top_s * a.c, dt = record[n + i] * a.c - top_t * a.c, gap = dt - ds;
      const float es = exp2_approximate(ds), et = exp2_approximate(dt);
      const float part_s = record[2 * n + i], part_t = record[3 * n + i];
      s = fmaf(part_s, es, s), t = fmaf(part_t, et, t);
      cross += (D == kForward ? et : es) * fmaf(D == kForward ? part_t : part_s, gap, record[4 * n + i]);
      spread = fmaf(gap, gap, spread);
    }
    const float folded = fold(s, t, cross, spread, p.lane);
    return {top_s,
            top_t,
            __shfl_sync(kAll, folded, 0),
            __shfl_sync(kAll, folded, 8),
            __shfl_sync(kAll, folded, 16),
            __shfl_sync(kAll, folded, 24)};
  }

  // Sums of term and grad, entry by entry with Kahan's sum: one masked entry may cost 1e4 nats beside
  // thousands of 1e-7.
  __device__ __forceinline__ float2 careful_stats(Norm s, Norm t) {
    Sum term, grad;
    const auto one = [&](float zs, float zt) {
      const float lq = s.log_prob(zs, a.per_t), lp = t.log_prob(zt, a.per_t);
      const float q = clamped_exp(lq), pt = clamped_exp(lp);
      term.add(D == kForward ? kl_term(pt, q, lp - lq) : kl_term(q, pt, lq - lp));
      grad.add(D == kForward ? q - pt : q * (lq - lp));
    };
    ring.again(p, [&](const float* zs, const float* zt, int) {
#pragma unroll
#pragma unroll
      for (int i = 0; i < kSize; ++i) one(zs[i], zt[i]);
    });
    if (has_tail()) one(tail_s, tail_t);
    return exchange.sum(p, term.total, grad.total);
  }

  // The largest logits of both sides, and then the sums of e^x relative to them.
  __device__ __forceinline__ Sums careful_sums() {
    Sums x{-INFINITY, -INFINITY, 0, 0, 0, 0};
    if (has_tail()) x.top_s = tail_s, x.top_t = tail_t;
    ring.again(p, [&](const float* zs, const float* zt, int) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) x.top_s = larger(x.top_s, zs[i]), x.top_t = larger(x.top_t, zt[i]);
    });
    const float2 most = exchange.most(p, x.top_s, x.top_t);
    x.top_s = most.x, x.top_t = most.y;
    const auto one = [&](float zs, float zt) {
      x.s += exp2_approximate((zs - x.top_s) * a.c), x.t += exp2_approximate((zt - x.top_t) * a.c);
    };
    ring.again(p, [&](const float* zs, const float* zt, int) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) one(zs[i], zt[i]);
    });
    if (has_tail()) one(tail_s, tail_t);
    const float2 sum = exchange.sum(p, x.s, x.t);
    x.s = sum.x, x.t = sum.y;
    return x;
  }

  // Writes f(z of the student, z of the teacher) as the gradient and frees the row's stages.
  template <int kUnroll, class F>
  __device__ __forceinline__ void finish(F&& f) {
    if (!a.dlogits) return ring.template leaving<1>(p, a, [](const float*, const float*, int) {});
    T* to = static_cast<T*>(a.dlogits) + r * a.dlogits_stride;
    ring.template leaving<kUnroll>(p, a, [&](const float* zs, const float* zt, int v) {
      float g[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) g[i] = f(zs[i], zt[i]);
      Vector<T>::store(reinterpret_cast<uint4*>(to) + v, g);
    });
    if (has_tail()) to[p.vectors * kSize + p.lane] = Vector<T>::narrow(f(tail_s, tail_t));
  }

  __device__ __forceinline__ void store_loss(float loss) const {
    if (p.number == 0 && p.lane == 0) a.loss[r] = loss;
  }

  __device__ __forceinline__ void careful() {
    const Sums x = careful_sums();
    const bool fine = x.s > 0 && x.s < INFINITY && x.t > 0 && x.t < INFINITY;  // else all of it becomes NaN
    const Norm s = Norm::of(x.top_s, fine ? logf(x.s) : NAN, a.per_t);
    const Norm t = Norm::of(x.top_t, fine ? logf(x.t) : NAN, a.per_t);
    const float2 stats = careful_stats(s, t);
    store_loss(kd * stats.x);
    const float k = kd * a.per_t, w = -stats.y * k;
    finish<1>([&](float zs, float zt) {
      const float lq = s.log_prob(zs, a.per_t), lp = t.log_prob(zt, a.per_t), q = clamped_exp(lq);
      return fmaf(q, w, (D == kForward ? q - clamped_exp(lp) : q * (lq - lp)) * k);
    });
  }

  // log of a sum, relative to the reference itself: R is the reference times c, rounded.
  __device__ __forceinline__ float log_sum(float top, float sum) const {
    return logf(sum) - fmaf(top, a.c, -(top * a.c)) * kLn2;
  }

  __device__ __forceinline__ void run() {
    if (has_tail()) {
      const int64_t at = p.vectors * kSize + p.lane;
      tail_s = Vector<T>::widen(static_cast<const T*>(a.student)[r * a.student_stride + at]);
      tail_t = Vector<T>::widen(static_cast<const T*>(a.teacher)[r * a.teacher_stride + at]);
    } else {
      tail_s = kFill, tail_t = kFill;
    }
    const Sums x = sums();
    if (!(fabsf(x.cross) + x.spread < INFINITY && x.s + x.t < kFar)) return careful();
    const float log_s = logf(x.s), log_t = logf(x.t);
    float d =
        D == kForward ? fmaf(x.cross / x.t, kLn2, log_s - log_t) : fmaf(x.cross / x.s, -kLn2, log_t - log_s);
    if (d < kSmall) {
      d = careful_stats(Norm::of(x.top_s, log_sum(x.top_s, x.s), a.per_t),
                        Norm::of(x.top_t, log_sum(x.top_t, x.t), a.per_t))
              .x;
    }
    store_loss(kd * d);
    const float k = kd * a.per_t, r_s = x.top_s * a.c, r_t = x.top_t * a.c;
    const float w_s = (D == kForward ? k : k * (log_t - log_s - d)) / x.s;
    const float w_t = D == kForward ? -k / x.t : -k * kLn2 / x.s;
    finish<kEach>([&](float zs, float zt) {
      const float xs = fmaf(zs, a.c, -r_s), xt = fmaf(zt, a.c, -r_t), es = exp2_approximate(xs);
      return D == kForward ? fmaf(es, w_s, exp2_approximate(xt) * w_t) : es * fmaf(xt - xs, w_t, w_s);
    });
  }

  // Stores zeros at begin <= index < end, all threads of the cluster together.
  __device__ __forceinline__ void zeros(int begin, int end) const {
    if (!a.dlogits) return;
    T* to = static_cast<T*>(a.dlogits) + r * a.dlogits_stride;
    for (int i = begin + p.number * kWarp + p.lane; i < end; i += p.numbers * kWarp)
      to[i] = Vector<T>::narrow(0.f);
  }
};

template <class T, Direction D>
__device__ __forceinline__ void onchip_rows(const OnchipArguments& a) {
#if __CUDA_ARCH__ >= 900  // GPUs before have no clusters and no bulk copies; nothing is launched there
  extern __shared__ __align__(128) unsigned char onchip_memory[];
  const Place p = Place::here<T>(a.vocab);
  unsigned char* records = onchip_memory + (size_t)p.warps * a.stages * 2 * kSide;
  Exchange exchange{reinterpret_cast<float*>(records), 0};
  Ring<T> ring;
  ring.begin(p, a, onchip_memory,
             reinterpret_cast<uint64_t*>(records + 2 * kRecord * p.numbers * sizeof(float)));
  cluster_sync();  // the other blocks' memory is there
  for (int r = p.row; r < a.rows; r += p.row_step) {
    Row<T, D> row{a, p, ring, exchange, r, a.weights[r], 0, 0};
    if (row.kd == 0) {
      row.store_loss(0);
      row.zeros(0, a.vocab);
    } else {
      row.run();
    }
    row.zeros(a.vocab, a.dlogits_vocab);
  }
#else
  __trap();  // a driver that compiles PTX of an older architecture must not leave outputs unwritten
#endif
}

}  // namespace kd

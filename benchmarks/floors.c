/* The machine's limits, measured: how fast it streams memory in place, reads it, and takes exponentials.
 *
 * Compiled when the benchmarks start (cc -O3 -march=native -pthread), called through ctypes. Every function
 * returns seconds for the whole job on `threads` threads. Threads are made for each call (about 50 us,
 * counted).
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <time.h>
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(64), aligned(64)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(64)));

typedef struct {
  float* a;
  const float* b;
  int64_t begin, end; /* in vectors of 16 floats; for exponentials: how many vectors in all */
  float sink;
} job;

#define AHEAD \
  64 /* vectors of 64 bytes: 4 KiB, the distance that served best on Zen 5 (32 to 256 within 2 %) */

/* a = a/2 + b/2: two reads and one write over the first operand, what a gradient written over its logits
 * costs. */
static void* stream_part(void* p) {
  job* j = (job*)p;
  vec* a = (vec*)j->a;
  const vec* b = (const vec*)j->b;
  for (int64_t i = j->begin; i < j->end; ++i) {
    __builtin_prefetch(&a[i + AHEAD], 1);
    __builtin_prefetch(&b[i + AHEAD], 0);
    a[i] = a[i] * 0.5f + b[i] * 0.5f;
  }
  return 0;
}

/* Sum of all numbers in a. */
static void* read_part(void* p) {
  job* j = (job*)p;
  const vec* a = (const vec*)j->a;
  vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
  int64_t i = j->begin;
  for (; i + 4 <= j->end; i += 4) {
    __builtin_prefetch(&a[i + AHEAD], 0);
    __builtin_prefetch(&a[i + AHEAD + 1], 0);
    __builtin_prefetch(&a[i + AHEAD + 2], 0);
    __builtin_prefetch(&a[i + AHEAD + 3], 0);
    s0 += a[i], s1 += a[i + 1], s2 += a[i + 2], s3 += a[i + 3];
  }
  s0 += s1 + s2 + s3;
  for (int k = 0; k < 16; ++k) j->sink += s0[k];
  return 0;
}

/* e^x to 4e-7 relative near 0: x = (n + f) ln 2, 2^f by a polynomial of degree 5 fitted to 7e-8, scaled by
 * 2^n. */
static inline vec exponential(vec x) {
  vec y = x * 1.44269504f;
#ifdef __AVX512DQ__
  vec f = (vec)_mm512_reduce_ps((__m512)y, 1), p = f * 1.8775759e-3f + 8.9893419e-3f; /* f = y - floor(y) */
  p = p * f + 5.5826317e-2f;
  p = p * f + 2.4015362e-1f;
  p = p * f + 6.9315307e-1f;
  p = p * f + 9.9999999e-1f;
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)y); /* p * 2^floor(y) */
#else
  vec shifted = y + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, left in the low bits */
  vec f = y - (shifted - 12582912.0f), p = f * 1.3276467e-3f + 9.6755413e-3f;
  p = p * f + 5.5507133e-2f;
  p = p * f + 2.4022120e-1f;
  p = p * f + 6.9314697e-1f;
  p = p * f + 1.0f;
  return (vec)((ivec)p + ((ivec)shifted << 23));
#endif
}

/* j->end vectors of exponentials over numbers that stay in the first cache: arithmetic only. */
static void* exp_part(void* p) {
  enum { BLOCK = 256 }; /* vectors: 16 KiB */
  job* j = (job*)p;
  const vec* a = (const vec*)j->a;
  vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
  for (int64_t done = j->begin; done < j->end; done += BLOCK) {
    for (int i = 0; i < BLOCK; i += 4) {
      s0 += exponential(a[i]), s1 += exponential(a[i + 1]);
      s2 += exponential(a[i + 2]), s3 += exponential(a[i + 3]);
    }
    __asm__ volatile("" ::: "memory"); /* the next block is not the same work to the compiler */
  }
  s0 += s1 + s2 + s3;
  for (int k = 0; k < 16; ++k) j->sink += s0[k];
  return 0;
}

static double run(void* (*part)(void*), float* a, const float* b, int64_t vectors, int threads) {
  enum { MOST = 256 };
  pthread_t ids[MOST];
  job jobs[MOST];
  struct timespec t0, t1;
  if (threads > MOST) threads = MOST;
  clock_gettime(CLOCK_MONOTONIC, &t0);
  for (int t = 0; t < threads; ++t) {
    jobs[t] = (job){a, b, vectors * t / threads, vectors * (t + 1) / threads, 0.0f};
    if (t && pthread_create(&ids[t], 0, part, &jobs[t])) return -1.0;
  }
  part(&jobs[0]);
  for (int t = 1; t < threads; ++t) pthread_join(ids[t], 0);
  clock_gettime(CLOCK_MONOTONIC, &t1);
  return (double)(t1.tv_sec - t0.tv_sec) + 1e-9 * (double)(t1.tv_nsec - t0.tv_nsec);
}

/* floats: a multiple of 16; pointers aligned to 64 bytes. */
double floor_stream(float* a, const float* b, int64_t floats, int threads) {
  return run(stream_part, a, b, floats / 16, threads);
}
double floor_read(const float* a, int64_t floats, int threads) {
  return run(read_part, (float*)a, 0, floats / 16, threads);
}

/* count exponentials of the 4096 floats at a. */
double floor_exp(const float* a, int64_t count, int threads) {
  return run(exp_part, (float*)a, 0, count / 16, threads);
}

/* e^x of n floats (a multiple of 16), for the test that these are exponentials. */
void floor_exp_values(float* y, const float* x, int64_t n) {
  for (int64_t i = 0; i < n / 16; ++i) ((vec*)y)[i] = exponential(((const vec*)x)[i]);
}

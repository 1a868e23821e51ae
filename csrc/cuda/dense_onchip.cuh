// Forward and reverse KL, loss and gradient, with every logit read from memory once: a thread-block cluster
// keeps a row of both sides in its shared memory between the sweep that sums and the sweep that writes the
// gradient.
//
// Rows are cut into chunks of 2 KiB a side. The warps of a cluster take the chunks of a row in turns; each
// warp has a ring of stages of its own, fills it with bulk copies and waits for them alone. A stage is free
// as soon as its chunk's gradient is on its way, and then takes a chunk of the cluster's next row: copies run
// while the row before is finished. Blocks meet once a row, when every warp has written its sums into the
// shared memory of all blocks.
//
// Arithmetic: see kdkernels/triton/rows.py. x = z c - R with R = reference * c, any reference within 28 nats
// of the maximum will do, so that each warp takes the maximum of what it reads first. Rows for which it does
// not, or with masked entries, NaN or infinity, show in the sums and are done again at leisure, from shared
// memory; so is the sum of a divergence below 1e-3 nats.
#pragma once
#include "onchip_device.cuh"

namespace kd {

enum Direction { kForward, kReverse };

constexpr uint32_t kSide = 2048;           // bytes of a side in a chunk
constexpr int kEach = kSide / 16 / kWarp;  // vectors of a lane
constexpr int kMostWarps = 8;              // of a block
constexpr int kRecord = 5;                 // numbers that a warp tells the others
constexpr float kFill = -1e30f;  // stands where there is no entry: no mass, and the same on both sides
constexpr float kMasked = -1e4f, kHopeless = -1e20f;
constexpr float kSmall = 1e-3f;
constexpr float kFar = 0x1p40f;  // of a sum: its reference lies 28 nats too low, and logarithms lose digits
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Dynamic shared memory of a block: stages and their mbarriers, and two records of every warp of the cluster.
__host__ __device__ inline unsigned shared_bytes(int cluster, int stages) {
  return kMostWarps * (stages * (2 * kSide + 8) + cluster * 2 * kRecord * sizeof(float));
}

// Strides in entries. `stages`: of a warp's ring, at least the chunks that one row gives a warp.
struct OnchipArguments {
  const void *student, *teacher;
  void* dlogits;  // may be the student's address, or null
  float* loss;
  const float* weights;
  int64_t student_stride, teacher_stride, dlogits_stride;
  int rows, vocab, dlogits_vocab, stages;
  float per_t, c;  // 1 / T, log2(e) / T
};

// Where a thread stands, and which part of every row is its warp's.
struct Place {
  int lane, warp, warps;
  uint32_t rank, blocks;
  int number, numbers;        // of the warp within its cluster
  int row, row_step;          // first row, and how far to the next
  int vectors, chunks, tail;  // whole vectors of a row; chunks of this warp; entries behind the last vector

  template <class T>
  static __device__ __forceinline__ Place here(int vocab) {
    Place p;
    p.lane = threadIdx.x % kWarp, p.warp = threadIdx.x / kWarp, p.warps = blockDim.x / kWarp;
    p.rank = cluster_rank(), p.blocks = cluster_size();
    p.number = p.rank * p.warps + p.warp, p.numbers = p.blocks * p.warps;
    p.row = blockIdx.x / p.blocks, p.row_step = gridDim.x / p.blocks;
    p.vectors = vocab / Vector<T>::kSize;
    const int all = (p.vectors + kEach * kWarp - 1) / (kEach * kWarp);
    p.chunks = (all - p.number + p.numbers - 1) / p.numbers;
    p.tail = p.number == p.numbers - 1 ? vocab % Vector<T>::kSize : 0;
    return p;
  }
};

// What the warps of a cluster tell each other; two records in turn, so that one meeting of the blocks is
// enough.
struct Exchange {
  float* records;  // [2][kRecord][numbers]
  int turn;

  __device__ __forceinline__ const float* tell(const Place& p, float folded, float x, float y) {
    float* record = records + turn * kRecord * p.numbers;
    turn ^= 1;
    const int which = p.lane / 8;
    const uint32_t peer = p.lane % 8;
    if (peer < p.blocks && which < 3) {
      store_remote(shared_address(record + (2 + which) * p.numbers + p.number), peer, folded);
      if (which < 2) store_remote(shared_address(record + which * p.numbers + p.number), peer, which ? y : x);
    }
    cluster_sync();
    return record;
  }

  // The sums over all threads of the cluster.
  __device__ __forceinline__ float2 sum(const Place& p, float a, float b) {
    const float* record = tell(p, fold(a, b, 0, 0, p.lane), 0, 0);
    a = 0, b = 0;
    for (int i = p.lane; i < p.numbers; i += kWarp) {
      a += record[2 * p.numbers + i], b += record[3 * p.numbers + i];
    }
    const float folded = fold(a, b, 0, 0, p.lane);
    return {__shfl_sync(kAll, folded, 0), __shfl_sync(kAll, folded, 8)};
  }

  // The largest of all threads; NaN if there is one.
  __device__ __forceinline__ float2 most(const Place& p, float a, float b) {
    for (int distance = 16; distance; distance /= 2) {
      a = larger(a, __shfl_xor_sync(kAll, a, distance)), b = larger(b, __shfl_xor_sync(kAll, b, distance));
    }
    const float* record = tell(p, 0, a, b);
    for (int i = 0; i < p.numbers; ++i) a = larger(a, record[i]), b = larger(b, record[p.numbers + i]);
    return {a, b};
  }
};

// A warp's ring of stages [2][kSide] and the mbarriers of their copies; who loads runs ahead of who reads.
template <class T>
struct Ring {
  uint4* memory;
  uint32_t barriers;
  int stages;
  int stage = 0, parity = 0;  // read next
  int ahead = 0;              // loaded next
  int row, chunk = 0;         // of the chunk that is loaded next

  __device__ __forceinline__ void begin(const Place& p, const OnchipArguments& a, unsigned char* shared,
                                        uint64_t* all) {
    stages = a.stages;
    memory = reinterpret_cast<uint4*>(shared + (size_t)p.warp * stages * 2 * kSide);
    barriers = shared_address(all + p.warp * stages);
    if (p.lane == 0) {
      for (int i = 0; i < stages; ++i) barrier_init(barriers + 8 * i);
      fence_barrier_init();
    }
    __syncwarp();
    row = p.chunks > 0 ? counting(p, a, p.row) : a.rows;
    for (int i = 0; i < stages; ++i) load(p, a);
  }

  // The first row from `r` on that has a weight.
  __device__ __forceinline__ int counting(const Place& p, const OnchipArguments& a, int r) {
    while (r < a.rows && a.weights[r] == 0) r += p.row_step;
    return r;
  }

  // Copies the next chunk, if there is one, into the next stage, which is free.
  __device__ __forceinline__ void load(const Place& p, const OnchipArguments& a) {
    if (row >= a.rows) return;
    if (p.lane == 0) {
      const uint32_t offset = (p.number + chunk * p.numbers) * kSide, left = p.vectors * 16u - offset;
      const uint32_t bytes = left < kSide ? left : kSide, barrier = barriers + 8 * ahead;
      const uint32_t to = shared_address(memory) + ahead * 2 * kSide;
      const T* student = static_cast<const T*>(a.student) + row * a.student_stride;
      const T* teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
      barrier_expect(barrier, 2 * bytes);
      bulk_copy(to, reinterpret_cast<const char*>(student) + offset, bytes, barrier);
      bulk_copy(to + kSide, reinterpret_cast<const char*>(teacher) + offset, bytes, barrier);
    }
    ahead = ahead + 1 == stages ? 0 : ahead + 1;
    if (++chunk == p.chunks) chunk = 0, row = counting(p, a, row + p.row_step);
  }

  // Calls f(logits of the student, of the teacher, number of the vector) for this lane's vectors of a stage.
  template <int kUnroll, class F>
  __device__ __forceinline__ void vectors(const Place& p, int at, int j, F&& f) const {
    constexpr int kSize = Vector<T>::kSize;
    const uint4* side = memory + at * (2 * kSide / 16) + p.lane;
    const int first = (p.number + j * p.numbers) * (kEach * kWarp) + p.lane;
    const auto one = [&](int u) {
      float zs[kSize], zt[kSize];
      Vector<T>::load(side + u * kWarp, zs), Vector<T>::load(side + kSide / 16 + u * kWarp, zt);
      f(zs, zt, first + u * kWarp);
    };
    if (first - p.lane + kEach * kWarp <= p.vectors) {
#pragma unroll kUnroll
      for (int u = 0; u < kEach; ++u) one(u);
    } else {
#pragma unroll 1
      for (int u = 0; u < kEach && first + u * kWarp < p.vectors; ++u) one(u);
    }
  }

  __device__ __forceinline__ void wait() const { barrier_wait(barriers + 8 * stage, parity); }

  __device__ __forceinline__ void step() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }

  // As `vectors`, for the row's chunks as they arrive. The ring stands at the row's first chunk before and
  // after.
  template <class F>
  __device__ __forceinline__ void arriving(const Place& p, F&& f) {
    Ring at = *this;
    for (int j = 0; j < p.chunks; ++j) {
      at.wait();
      at.template vectors<kEach>(p, at.stage, j, f);
      at.step();
    }
  }

  // As `arriving`, once all have arrived.
  template <class F>
  __device__ __forceinline__ void again(const Place& p, F&& f) const {
    int at = stage;
    for (int j = 0; j < p.chunks; ++j) {
      vectors<1>(p, at, j, f);
      at = at + 1 == stages ? 0 : at + 1;
    }
  }

  // As `again`, for the last time: each stage is filled anew. The ring then stands at the next row.
  template <int kUnroll, class F>
  __device__ __forceinline__ void leaving(const Place& p, const OnchipArguments& a, F&& f) {
    for (int j = 0; j < p.chunks; ++j) {
      vectors<kUnroll>(p, stage, j, f);
      __syncwarp();
      load(p, a);
      step();
    }
  }
};

}  // namespace kd

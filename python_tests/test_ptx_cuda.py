"""CUDA C++ through nvcc and the emulator: histograms, ballots, local arrays, clusters, bulk copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.compile import compile_cuda, nvcc
from ptx.harness import Harness

pytestmark = [pytest.mark.slow, pytest.mark.skipif(nvcc() is None, reason="no nvcc here")]

SELECT = r"""
#include <cuda_bf16.h>
#include <cstdint>
__device__ uint32_t key_of(float x) { uint32_t u = __float_as_uint(x); return u >> 31 ? ~u : u | 0x80000000u; }
// The k largest of a row of bfloat16, in any order: radix select, 8 bits a pass.
extern "C" __global__ void __launch_bounds__(128)
largest(const __nv_bfloat16* x, int64_t stride, int V, int k, float* values, int* places) {
  __shared__ unsigned bins[256], prefix, left, filled;
  const __nv_bfloat16* row = x + blockIdx.x * stride;
  unsigned mask = 0;
  if (threadIdx.x == 0) { prefix = 0; left = k; filled = 0; }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += 128) bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < V; i += 128) {
      uint32_t u = key_of(__bfloat162float(row[i]));
      if ((u & mask) == prefix) atomicAdd(&bins[u >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int b = 255;
      while (bins[b] < left) left -= bins[b--];
      prefix |= (unsigned)b << shift;
    }
    __syncthreads();
    mask |= 255u << shift;
  }
  for (int i0 = 0; i0 < V; i0 += 128) {
    int i = i0 + threadIdx.x, lane = threadIdx.x & 31;
    float z = i < V ? __bfloat162float(row[i]) : 0.f;
    uint32_t u = i < V ? key_of(z) : 0u;
    bool take = i < V && (u > prefix || (u == prefix && atomicAdd(&left, -1u) - 1u < 0x7fffffffu));
    unsigned votes = __ballot_sync(~0u, take), base = 0;
    if (lane == 0 && votes) base = atomicAdd(&filled, __popc(votes));
    base = __shfl_sync(~0u, base, 0) + __popc(votes & ((1u << lane) - 1));
    if (take) { values[blockIdx.x * k + base] = z; places[blockIdx.x * k + base] = i; }
  }
}
extern "C" __global__ void reversed_bytes(const unsigned char* in, unsigned char* out, double scale, float* sums) {
  unsigned char mine[16];
  for (int i = 0; i < 16; i++) mine[i] = in[threadIdx.x * 16 + i];
  for (int i = 0; i < 16; i++) out[threadIdx.x * 16 + i] = mine[15 - (i ^ (in[0] & 1))];
  atomicAdd(sums, (float)(scale * mine[threadIdx.x & 15]));
}
"""

CLUSTER = r"""
#include <cooperative_groups.h>
#include <cuda/ptx>
namespace cg = cooperative_groups;
using namespace cuda::ptx;
// A row on two CTAs: its sum, and the row scaled by it, read from global memory once.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128) scaled(float* x, int V, float* sums) {
  extern __shared__ __align__(128) float half_row[];
  __shared__ alignas(8) uint64_t full;
  __shared__ float parts[2], warps[4];
  auto cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank(), n = V / 2;
  float* mine = x + (size_t)(blockIdx.x / 2) * V + rank * n;
  if (threadIdx.x == 0) { mbarrier_init(&full, 1); fence_mbarrier_init(sem_release, scope_cluster); }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(sem_release, scope_cta, space_shared, &full, n * 4);
    cp_async_bulk(space_cluster, space_global, half_row, mine, n * 4, &full);
  }
  while (!mbarrier_try_wait_parity(&full, 0)) {}
  float s = 0;
  for (int i = threadIdx.x; i < n; i += 128) s += half_row[i];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 2) *cluster.map_shared_rank(&parts[rank], threadIdx.x) = warps[0] + warps[1] + warps[2] + warps[3];
  cluster.sync();
  s = parts[0] + parts[1];
  if (threadIdx.x == 0 && rank == 0) sums[blockIdx.x / 2] = s;
  for (int i = threadIdx.x; i < n; i += 128) half_row[i] *= s;
  fence_proxy_async(space_shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    cp_async_bulk(space_global, space_shared, mine, half_row, n * 4);
    cp_async_bulk_commit_group();
    cp_async_bulk_wait_group_read(n32_t<0>());
  }
}
"""


@pytest.mark.parametrize("target", [80, 90, 100])
def test_selection_of_the_largest(target: int) -> None:
    rows, width, k = 3, 1003, 33
    x = torch.randn(rows, 1010, generator=torch.Generator().manual_seed(0)).bfloat16()[:, :width]
    values, places = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int32)
    report = Harness(target).cuda(SELECT, "largest", (rows,), 128, [x, x.stride(0), width, k, values, places])
    assert (values.sort(-1, descending=True).values == x.float().topk(k).values).all()
    assert (x.float().gather(1, places.long()) == values).all()
    assert all(len(set(row)) == k for row in places.tolist())
    assert report.bank_conflicts > 0


def test_local_arrays_bytes_and_doubles() -> None:
    data, out, sums = np.arange(512, dtype=np.uint8), np.zeros(512, np.uint8), np.zeros(1, np.float32)
    Harness(90).cuda(SELECT, "reversed_bytes", (1,), 32, [data, out, 0.5, sums])
    assert (out.reshape(32, 16) == data.reshape(32, 16)[:, ::-1]).all()
    assert sums[0] == 0.5 * data.reshape(32, 16)[np.arange(32), np.arange(32) % 16].sum()


@pytest.mark.parametrize("target", [90, 100])
def test_rows_kept_on_chip_by_a_cluster_are_read_once(target: int) -> None:
    rows, width = 5, 1024
    x = torch.randint(-9, 9, (rows, width), generator=torch.Generator().manual_seed(0)).float()
    expected, total, sums = x * x.sum(1, keepdim=True), x.sum(1), torch.empty(rows)
    report = Harness(target).cuda(CLUSTER, "scaled", (2 * rows,), 128, [x, width, sums], shared=2 * width)
    assert (sums == total).all()
    assert (x == expected).all()
    assert report.load_sectors == rows * width * 4 // 32
    assert report.store_sectors == rows * width * 4 // 32 + rows


def test_nvcc_says_what_it_does_not_like() -> None:
    with pytest.raises(RuntimeError, match="nvcc failed"):
        compile_cuda("__global__ void f( {", 90)

"""Forward and reverse KL with every logit read from memory once: when that is possible, and how it is launched.

A thread-block cluster keeps rows of both sides in its shared memory (csrc/cuda/dense_onchip.cuh says how). This module
chooses the launch; the kernels' Triton counterparts serve what it cannot.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import leaves, native, triton

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.weights import RowWeights

CAPABILITY = (9, 0)
"""Older GPUs have no clusters and no bulk copies."""
DIRECTIONS = {"forward_kl": "forward", "reverse_kl": "reverse"}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

WARPS = 8
"""Of a block. Each costs about 450 instructions a row beside its entries, and two for each scheduler keep it busy, as a
lane has 16 or 32 independent pairs at hand."""
CHUNK = 2048
"""Bytes of a side that a bulk copy moves: 4 vectors of 16 bytes a lane (`kSide` in dense_onchip.cuh)."""
STAGE = 2 * CHUNK + 8
"""Bytes of a stage: a chunk of both sides and its mbarrier."""
SHARED = 227 * 1024
"""Bytes of shared memory that a block may have (compute capability 9.0 and 10.0)."""
RECORDS = 2 * 5 * 4 * WARPS
"""Bytes of each block of the cluster for what its warps tell the others: two records of five numbers a warp."""
CLUSTERS = (1, 2, 4, 8)
"""Blocks of a cluster; 8 is the largest that every GPU must support."""
SLACK = 2
"""Stages of a warp beyond a row's, if there is a choice: with 64 KB a block on their way while blocks meet (about a
microsecond), the memory of an H100 stays busy (25 KB a microsecond and multiprocessor)."""
KEPT = 0.8
"""Share of the running rows that a cache may hold at the most for the kernels to be preferred."""


class Plan(NamedTuple):
    """Launch constants of a row length."""

    cluster: int  # blocks of a cluster
    stages: int  # of each warp's ring

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block."""
        return WARPS * self.stages * STAGE + self.cluster * RECORDS


def plan(row_bytes: int) -> Plan | None:
    """For rows of that many bytes a side, rounded down to 16; None if a cluster cannot keep a row.

    The smallest cluster that leaves `SLACK`; else the largest. As many stages as fit.
    """
    chosen = None
    for cluster in CLUSTERS:
        stages = (SHARED - cluster * RECORDS) // (WARPS * STAGE)
        needed = -(-row_bytes // (CHUNK * WARPS * cluster))
        if stages >= needed:
            chosen = Plan(cluster, stages)
            if stages >= needed + SLACK:
                break
    return chosen


def kernel_name(kernel: str, dtype: torch.dtype) -> str:
    """The entry point in csrc/cuda/dense_onchip.cu."""
    return f"kd_{DIRECTIONS[kernel]}_onchip_{_NAMES[dtype]}"


class Launch(NamedTuple):
    """One launch: tensors, and what the kernel must know beside them."""

    kernel: str  # "forward_kl" or "reverse_kl"
    student: Tensor  # [N, >= vocab]
    teacher: Tensor  # [N, >= vocab]
    dlogits: Tensor | None  # [N, >= vocab], may be the student's memory
    loss: Tensor  # float32 [N]
    w_kd: Tensor  # float32 [N]
    vocab: int
    temperature: float
    plan: Plan

    def arguments(self) -> list[Any]:
        """In the order of the kernel's parameters."""
        to = self.dlogits
        return [
            self.student, self.student.stride(0), self.teacher, self.teacher.stride(0),
            to, 0 if to is None else to.stride(0), self.loss, self.w_kd,
            self.student.shape[0], self.vocab, 0 if to is None else to.shape[1],
            self.plan.stages, 1 / self.temperature, math.log2(math.e) / self.temperature,
        ]  # fmt: skip


def start(launch: Launch) -> None:
    """Launch the kernel on the student's GPU and current stream; tests put an emulator in its place."""
    with torch.cuda.device(launch.student.device):
        leaves.kl_onchip_(
            launch.student, launch.teacher, launch.w_kd, launch.kernel == "reverse_kl", launch.temperature,
            launch.vocab, launch.plan.cluster, launch.plan.stages, launch.loss, launch.dlogits,
        )  # fmt: skip


def obstacle(device: torch.device, dtype: torch.dtype, kernel: str) -> str:
    """Why backend "cuda" cannot serve losses of this device, dtype and divergence; empty where it can."""
    if kernel not in DIRECTIONS:
        return f"the CUDA kernels of the losses compute {' and '.join(DIRECTIONS)}, not {kernel}"
    why = triton.obstacle(device, dtype)  # serves the calls that the kernels do not, and has the same needs
    if why:
        return why
    if not native.has_onchip():
        return "kdkernels was built without CUDA kernels: install the CUDA toolkit (nvcc) and rebuild"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"clusters of thread blocks need compute capability 9.0, this GPU has {found[0]}.{found[1]}"
    why = native.why_not_on_gpu(found, CAPABILITY)
    if why:
        return why
    has = shared_memory(device)
    if has < SHARED:
        return f"a block takes {SHARED} bytes of shared memory, this GPU gives {has}"
    return ""


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may ask for."""
    # older versions of torch do not tell; those GPUs that they know have enough
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED))


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of second-level cache."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def gains(student: Tensor, vocab: int, cluster: int) -> bool:
    """Whether the kernels have a lower bound than Triton's (benchmarks/onchip.py, docs/gpu.md), in one of two cases.

    Triton's sweep a row twice, and read a fifth of it or more from memory twice unless the second-level cache keeps the
    rows that run at a time, one a multiprocessor when rows are that long. Where it does, both have the same bound, and
    clusters of 8 blocks may leave some multiprocessors idle. And Triton's give a row to one multiprocessor: where few
    rows leave others idle, a cluster uses several.
    """
    multiprocessors, cache = machine(student.device)
    rows = student.shape[0]
    few = cluster > 1 and rows * cluster <= multiprocessors
    return few or 2 * vocab * student.element_size() * min(multiprocessors, rows) * KEPT > cache


def unsuited(student: Side, teacher: Side, weights: RowWeights, dlogits: Tensor | None, stats: Tensor | None) -> str:
    """What about a call leaves it to Triton; empty where the kernels can take it."""
    if weights.ce is not None:
        return "hard labels"
    if stats is not None:
        return "statistics"
    if any(side.bias is not None or side.scale != 1 or side.softcap for side in (student, teacher)):
        return "bias, scale or soft cap"
    for x in (student.x, teacher.x, dlogits):
        if x is not None and (x.data_ptr() % 16 or (x.shape[0] > 1 and x.stride(0) * x.element_size() % 16)):
            return "rows that begin between 16-byte boundaries"
    return ""


def divergence_rows_(
    student: Side,
    teacher: Side,
    weights: RowWeights,
    spec: RowSpec,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fill ``loss [C]``, ``dlogits [C, >= vocab]`` and ``stats [C, 6]``; see `kdkernels.ops.rows`.

    On chip where that saves memory traffic, else by Triton. Bytes: both operands read once, the gradient written once.
    """
    x = student.x
    chosen = plan(spec.vocab * x.element_size())
    why = unsuited(student, teacher, weights, dlogits, stats)
    if why or chosen is None or not loss.shape[0] or not gains(x, spec.vocab, chosen.cluster):
        from kdkernels.triton import host  # imports triton

        host.divergence_rows_(student, teacher, weights, spec, loss, dlogits, stats)
        return
    start(Launch(spec.kernel, x, teacher.x, dlogits, loss, weights.kd, spec.vocab, spec.temperature, chosen))

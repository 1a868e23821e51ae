"""Whose kernels are counted: each contestant's own host code on `counting.ROWS` rows of the case's true vocabulary.

Ours are two: `ours`, the Triton kernels, which serve everything, and `ours:onchip`, the CUDA C++ kernels that `auto`
takes for forward and reverse KL where `kdkernels.onchip.gains` says so (from an H100 on).

Rivals are optional. Liger-Kernel is counted with its Triton kernel, which it takes on an A100 and, on later GPUs, where
NVIDIA's CuTe DSL or cuTile are not installed. TRL's chunked divergence takes hidden states only: it is counted for the
fused cases. `eager` is torch throughout, so it has bytes and no instructions.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks import inputs, machine
from benchmarks.counting import ROWS, Launched, Recorder, Step
from benchmarks.rivals import eager
from benchmarks.rivals import ours as our_rival
from benchmarks.shapes import MAIN, Case

ON_CHIP = "ours:onchip"
HIDDEN = 16
"""Hidden sizes while counting: products are not counted, and so need not be large."""
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def _ours(backend: str) -> Callable[[Case, inputs.Inputs, Recorder], Tensor]:
    def loss(case: Case, given: inputs.Inputs, recorder: Recorder) -> Tensor:
        import kdkernels as kd

        chosen = our_rival.divergence(case.divergence)
        if isinstance(given, inputs.DenseInputs):
            (logits,) = given.student()
            return kd.distillation_loss(logits, given.teacher, chosen, inplace=True, backend=backend)
        student = kd.LinearLogits(given.hidden, given.weight)
        teacher = kd.LinearLogits(given.teacher_hidden, given.teacher_weight)
        return kd.distillation_loss(student, teacher, chosen, backend=backend)

    return loss


@contextmanager
def our_host_code(recorder: Recorder) -> Iterator[None]:
    """kdkernels' Triton backend serves CPU tensors, with the launch constants of the recorder's target."""
    import kdkernels.triton
    from kdkernels.triton import launch

    major = recorder.emulator.target // 10
    with (
        mock.patch.object(kdkernels.triton, "obstacle", return_value=""),
        mock.patch.object(launch, "architecture", return_value=major),
        mock.patch.object(launch, "start", recorder.start),
    ):
        yield


@contextmanager
def our_chip_code(recorder: Recorder) -> Iterator[None]:
    """Besides, the kernels that keep rows on chip take all that they can."""
    tests = str(machine.ROOT / "python_tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from kdkernels import onchip

    server = importlib.import_module("emulated_onchip").OnChip(recorder.emulator.target, recorder.emulator.settings)
    server.clusters = 1

    def start(launch: onchip.Launch) -> None:
        with _disable_current_modes():
            server.start(launch)
        recorder.note("kl_onchip", server.reports[-1], [launch.student, launch.teacher])

    with (
        our_host_code(recorder),
        mock.patch.object(onchip, "obstacle", return_value=""),
        mock.patch.object(onchip, "gains", return_value=True),
        mock.patch.object(onchip, "start", start),
    ):
        yield


def _liger(case: Case, given: inputs.Inputs, recorder: Recorder) -> Tensor:
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of kernels for compilers that are absent
    from liger_kernel.ops import fused_linear_jsd
    from liger_kernel.ops.backends._triton import jsd

    def project(hidden: Tensor, weight: Tensor) -> Tensor:
        with recorder.uncounted():  # one product with fp32 results on a GPU
            return hidden.float() @ weight.float().t()

    one_chunk: dict[str, Any] = {"_max_capability": lambda device: 100, "_CHUNK_MEM_CONST_B200": 2**40}
    settings = (None, BETA[case.divergence], -100)
    with (
        mock.patch.object(jsd, "_jsd_kernel", Launched(jsd._jsd_kernel, recorder)),
        mock.patch.multiple(fused_linear_jsd, _project_to_float32=project, **one_chunk),
    ):
        if isinstance(given, inputs.DenseInputs):
            (student,) = given.student()
            log_q, log_p = student.log_softmax(-1), given.teacher.log_softmax(-1)
            return jsd.LigerJSDFunction.apply(log_q, log_p, *settings, "nvidia-triton", None)
        sides = (given.hidden, given.weight, given.teacher_hidden, given.teacher_weight)
        return fused_linear_jsd.LigerFusedLinearJSDFunction.apply(*sides, *settings, 1.0, None, "nvidia-triton", None)


def _trl(case: Case, given: inputs.Inputs, recorder: Recorder) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    assert isinstance(given, inputs.LinearInputs)
    per_token, _ = ChunkedDivergenceFunction.apply(
        given.hidden, given.weight, None, given.teacher_hidden, given.teacher_weight, None, BETA[case.divergence]
    )
    return per_token.mean()


@contextmanager
def _trl_host_code(recorder: Recorder) -> Iterator[None]:
    """TRL's Triton kernels serve CPU tensors, forward and backward."""
    from trl.kernels import chunked_divergence as module

    def project(tile: Tensor, hidden: Tensor, weight: Tensor, bias: Any, start: int, end: int, dtype: Any) -> None:
        with recorder.uncounted():
            torch.mm(hidden.float(), weight[start:end].float().t(), out=tile)

    def add(total: Tensor, a: Tensor, b: Tensor) -> None:
        with recorder.uncounted():
            total.addmm_(a.float(), b.float())

    kernels = {name: getattr(module, name) for name in ("_stats_kernel", "_jsd_kernel", "_backward_kernel")}
    launched: dict[str, Any] = {name: Launched(kernel, recorder) for name, kernel in kernels.items()}
    with mock.patch.multiple(module, _use_triton=lambda device: True, _project=project, _addmm_fp32=add, **launched):
        yield


def _eager(case: Case, given: inputs.Inputs, recorder: Recorder) -> Tensor:
    contestant = next(c for c in eager.CONTESTANTS if c.name == "eager")
    return contestant.build(case)(given)


@contextmanager
def _as_it_is(recorder: Recorder) -> Iterator[None]:
    yield


def _all_rows(case: Case, target: int) -> int:
    return case.N


def _our_rows(case: Case, target: int) -> int:
    return our_rival.chunk_rows(case) if case.op == "linear" else case.N


def _liger_rows(case: Case, target: int) -> int:
    """`fused_linear_jsd_forward`: as many chunks as V holds H, an eighth of that on sm_100; rows a power of 2."""
    if case.op == "dense":
        return case.N
    chunks = -(-case.V // (case.H * (8 if target == 100 else 1)))
    return min(case.N, 1 << (-(-case.N // chunks) - 1).bit_length())


@dataclass(frozen=True)
class Counted:
    """A contestant.

    Attributes:
        name: as in the results.
        loss: (case, inputs, recorder) -> mean loss.
        module: what must be installed, and how to install it.
        ops, divergences: what it computes.
        around: a context that holds for forward and backward.
        rows: (case, target) -> rows of logits that exist at a time.
        targets: compute capabilities, times ten, that it has kernels for.
    """

    name: str
    loss: Callable[[Case, inputs.Inputs, Recorder], Tensor]
    module: tuple[str, str] = ("torch", "")
    ops: tuple[str, ...] = ("dense", "linear")
    divergences: tuple[str, ...] = MAIN
    around: Callable[[Recorder], Any] = _as_it_is
    rows: Callable[[Case, int], int] = _all_rows
    targets: tuple[int, ...] = (80, 90, 100)

    def absent(self) -> str:
        """What to do about it if it is not installed, else ""."""
        if self.name == ON_CHIP and shutil.which("nvcc") is None:
            return "nvcc compiles it and is not on PATH: install the CUDA toolkit"
        module, requirement = self.module
        return "" if find_spec(module) else f"{module} is not installed: pip install --no-deps {requirement}"

    def serves(self, case: Case, target: int) -> bool:
        """Whether it computes the case on a GPU of this compute capability, times ten."""
        return case.op in self.ops and case.divergence in self.divergences and target in self.targets


CONTESTANTS = (
    Counted("ours", _ours("triton"), ("triton", "triton"), around=our_host_code, rows=_our_rows),
    Counted(
        ON_CHIP,
        _ours("cuda"),
        ("triton", "triton"),
        divergences=("forward_kl", "reverse_kl"),
        around=our_chip_code,
        rows=_our_rows,
        targets=(90, 100),
    ),
    Counted("liger", _liger, ("liger_kernel", "liger-kernel==0.8.5"), rows=_liger_rows),
    Counted("trl", _trl, ("trl", "trl==1.16.0"), ops=("linear",), around=_trl_host_code),
    Counted("eager", _eager),
)


def steps(contestant: Counted, case: Case, target: int) -> list[Step]:
    """Runs forward and backward of a contestant; what it launched and did on logits, in the order of first use."""
    small = replace(case, N=ROWS, H=HIDDEN if case.H else 0, Ht=HIDDEN if case.Ht else 0)
    given = inputs.make(small, pristine=False)
    recorder = Recorder(target, small.N * small.V)
    with contestant.around(recorder), recorder:
        loss = contestant.loss(small, given, recorder)
        loss.backward()
    if any(not bool(g.isfinite().all()) for g in given.gradients().values()):
        raise RuntimeError(f"{contestant.name} on {small.id}: the gradient is not finite, its counts mean nothing")
    return [*recorder.steps.values()]

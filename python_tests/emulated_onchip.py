"""Backend "cuda" of forward and reverse KL on CPU tensors: its launches go to the PTX emulator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
from ptx import Report, Settings, parse, run
from ptx.compile import kept_ptx
from ptx.parser import Kernel

from kdkernels import onchip

SOURCE = Path(__file__).resolve().parents[1] / "csrc/cuda/dense_onchip.cu"
TARGETS = (90, 100)


@functools.cache
def kernel_text(target: int) -> str:
    """PTX of all kernels."""
    sources = [*sorted(SOURCE.parent.glob("*onchip*")), *sorted(SOURCE.parents[1].glob("*.h"))]
    return kept_ptx(SOURCE, target, (f"-I{SOURCE.parents[1]}",), sources, SOURCE.parents[2] / "build/ptx")


@functools.lru_cache(maxsize=64)
def parsed(text: str, name: str) -> Kernel:
    return parse(text, name)


class OnChip:
    """Stands for `kdkernels.onchip.start`; one `Report` per launch in `reports`.

    Attributes:
        clusters: how many run at a time; each takes rows in turns.
        mutate: changes the PTX before it is executed.
    """

    def __init__(self, target: int, settings: Settings | None = None) -> None:
        self.target, self.settings = target, settings or Settings()
        self.clusters, self.mutate = 2, lambda text: text
        self.reports: list[Report] = []

    def start(self, launch: onchip.Launch) -> None:
        name = onchip.kernel_name(launch.kernel, launch.student.dtype)
        plan, clusters = launch.plan, min(self.clusters, launch.student.shape[0])
        report = run(
            parsed(self.mutate(kernel_text(self.target)), name),
            (clusters * plan.cluster,),
            32 * onchip.WARPS,
            launch.arguments(),
            shared=plan.shared,
            cluster=plan.cluster,
            settings=self.settings,
        )
        report.target = self.target
        self.reports.append(report)


def serve(patch: pytest.MonkeyPatch, target: int = 90, settings: Settings | None = None) -> OnChip:
    """Until the patch is undone, CPU tensors count as those of a GPU with no second-level cache to speak of."""
    emulated.serve(patch, target, settings)
    chosen = OnChip(target, settings)
    patch.setattr(onchip, "obstacle", lambda device, dtype, kernel: "" if kernel in onchip.DIRECTIONS else "not that")
    patch.setattr(onchip, "machine", lambda device: (132, 0))
    patch.setattr(onchip, "start", chosen.start)
    return chosen


def with_clusters(patch: pytest.MonkeyPatch, cluster: int, spare: int = 0) -> None:
    """Rows are kept by clusters of that many blocks, with that many stages beside those of a row."""

    def plan(row_bytes: int) -> onchip.Plan:
        return onchip.Plan(cluster, -(-row_bytes // (onchip.CHUNK * onchip.WARPS * cluster)) + spare)

    patch.setattr(onchip, "plan", plan)


Serve = Callable[..., OnChip]

"""What a result was measured on: processor, memory, versions, commit, settings. Nothing that names the host."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "kdkernels",
    "torch",
    "triton",
    "torchtune",
    "liger-kernel",
    "trl",
    "transformers",
    "pytest-benchmark",
    "numpy",
)
ROOT = Path(__file__).resolve().parent.parent


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    text = (_read("/proc/cpuinfo") or "").split("\n\n")[0]
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, object]:
    """Commit that was measured, and whether files that matter differ from it (results themselves do not)."""
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "kdkernels", "csrc", "benchmarks", ":!benchmarks/results"
    )
    return {"id": _git("rev-parse", "HEAD"), "modified": None if changed is None else bool(changed)}


def describe() -> dict[str, object]:
    """Machine and software."""
    cpu = _cpuinfo()
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    return {
        "processor": cpu.get("model name", platform.processor()),
        "family_model": f"{cpu.get('cpu family')}/{cpu.get('model')}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "caches": {f"L{_read(f'{c}/level')} {_read(f'{c}/type')}": _read(f"{c}/size") for c in sorted(caches)},
        "memory_gib": round(pages * size / 2**30, 1),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


class Disturbance:
    """How much of the machine's processor time went elsewhere since this object was made.

    A timing is worth as much as the machine was quiet: the JSON keeps these figures beside each case.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        """(all, busy, stolen by the hypervisor, this process and its waited-for children), clock ticks."""
        ticks = [float(word) for word in (_read("/proc/stat") or "cpu 0 0 0 1 0 0 0 0").split("\n")[0].split()[1:9]]
        idle, stolen = ticks[3] + ticks[4], ticks[7]
        own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        return sum(ticks), sum(ticks) - idle - stolen, stolen, own

    def shares(self) -> dict[str, float]:
        """Shares of all processor time: other processes, and the hypervisor's other guests."""
        total, busy, stolen, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        total = max(total, 1.0)
        return {"others": round(max(0.0, busy - own) / total, 3), "stolen": round(stolen / total, 3)}


def peak_window() -> None:
    """Starts a window for `peak_bytes`: the kernel forgets the process's highest memory use so far."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def peak_bytes() -> int:
    """Highest resident memory since `peak_window`."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Resident memory now."""
    return _status("VmRSS")


if __name__ == "__main__":
    print(json.dumps(describe()))

"""The machine's limits, measured in the same process as what is compared with them.

`floors.c` is compiled with the system's C compiler when the benchmarks start. Without one, torch stands in: `lerp_` for
the stream, `sum` for reading, `exp_` for exponentials (slower than what is possible: such floors are too kind, and
the JSON says ``"compiler": null``).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("floors.c")
FLAGS = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
QUIET_SECONDS = 0.004
"""Torch's worker threads spin for some milliseconds after a parallel loop; the floors' threads wait that out."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled floors.c, or None where no compiler is found."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "floors.so"
        subprocess.run([compiler, *FLAGS, "-o", str(built), str(SOURCE)], check=True)
        loaded = ctypes.CDLL(str(built))
    for name in ("floor_stream", "floor_read", "floor_exp"):
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


def compiler() -> str | None:
    """What the floors were compiled with, or None for torch's stand-ins."""
    return None if library() is None else " ".join([os.environ.get("CC") or "cc", *FLAGS])


def _pointer(x: Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous()
    assert x.data_ptr() % 64 == 0
    return ctypes.c_void_p(x.data_ptr())


@dataclass
class Floors:
    """Stream, read and exponentials over given sizes; each method returns seconds for its whole job.

    Args:
        bytes_each: size of each of the two operands of the stream, bytes (rounded up to 64).
        exponentials: how many `exps` takes (rounded up to 4096).
    """

    bytes_each: int
    exponentials: int

    def __post_init__(self) -> None:
        self._floats = -(-self.bytes_each // 64) * 16
        self._count = -(-self.exponentials // 4096) * 4096
        self._a = torch.rand(self._floats)
        self._b = torch.rand(self._floats)
        self._x = torch.linspace(-20, 0, 4096)[torch.randperm(4096)].contiguous()

    def stream(self) -> float:
        """Two operands read, one written over the first."""
        time.sleep(QUIET_SECONDS)
        lib = library()
        if lib is not None:
            count = ctypes.c_int64(self._floats)
            return lib.floor_stream(_pointer(self._a), _pointer(self._b), count, torch.get_num_threads())
        start = time.perf_counter()
        self._a.lerp_(self._b, 0.5)
        return time.perf_counter() - start

    def read(self) -> float:
        """One operand read."""
        time.sleep(QUIET_SECONDS)
        lib = library()
        if lib is not None:
            return lib.floor_read(_pointer(self._a), ctypes.c_int64(self._floats), torch.get_num_threads())
        start = time.perf_counter()
        self._a.sum()
        return time.perf_counter() - start

    def exps(self) -> float:
        """All exponentials, on numbers that stay in the first cache."""
        time.sleep(QUIET_SECONDS)
        lib = library()
        if lib is not None:
            return lib.floor_exp(_pointer(self._x), ctypes.c_int64(self._count), torch.get_num_threads())
        x = self._x.repeat(8)  # 128 KiB: in the second cache, wide enough for two threads
        out = torch.empty_like(x)
        start = time.perf_counter()
        for _ in range(-(-self._count // x.numel())):
            torch.exp(x, out=out)
        return time.perf_counter() - start

    @property
    def stream_bytes(self) -> int:
        """Bytes that `stream` moves: two reads, one write."""
        return 3 * 4 * self._floats

    @property
    def exp_count(self) -> int:
        """Exponentials that `exps` takes."""
        return self._count


def exponential(x: Tensor) -> Tensor:
    """floors.c's exponential of fp32 numbers (length a multiple of 16): for the test that it is one."""
    lib = library()
    if lib is None:
        return x.exp()
    y = torch.empty_like(x)
    lib.floor_exp_values(_pointer(y), _pointer(x), ctypes.c_int64(x.numel()))
    return y


def _gemm_rate(dtype: torch.dtype, m: int, n: int, k: int, onednn: bool) -> float:
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        if onednn:
            torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        else:
            torch.mm(a, b.t(), out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * m * n * k / best


def limits(megabytes: int = 256, rounds: int = 7) -> dict[str, float]:
    """The machine's rates: bytes, exponentials and flops per second; medians (products: best of 4)."""
    floors = Floors(megabytes * 2**20, 2 * 10**8)
    floors.stream(), floors.exps()
    stream = sorted(floors.stream_bytes / floors.stream() for _ in range(rounds))
    read = sorted(floors.stream_bytes / 3 / floors.read() for _ in range(rounds))
    exps = sorted(floors.exp_count / floors.exps() for _ in range(rounds))
    found = {
        "stream_bytes_per_second": stream[rounds // 2],
        "stream_bytes_per_second_best": stream[-1],
        "read_bytes_per_second": read[rounds // 2],
        "read_bytes_per_second_best": read[-1],
        "exps_per_second": exps[rounds // 2],
        "mm_bf16_flops_per_second": _gemm_rate(torch.bfloat16, 1024, 8192, 2048, False),
        "mm_fp32_flops_per_second": _gemm_rate(torch.float32, 1024, 8192, 2048, False),
    }
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["onednn_fp32_flops_per_second"] = _gemm_rate(torch.float32, 1024, 8192, 2048, True)
    return found


if __name__ == "__main__":
    print(json.dumps({"compiler": compiler(), **{name: float(f"{rate:.4g}") for name, rate in limits().items()}}))

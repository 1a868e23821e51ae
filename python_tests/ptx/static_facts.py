"""What ptxas says of a kernel without running it: registers, spills, shared memory, and the occupancy that follows."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

WARP = 32


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    threads: int
    ctas: int
    registers: int
    shared: int  # bytes, for all CTAs together
    shared_per_cta: int  # bytes, the most that one may ask for
    reserved: int = 1024  # bytes of shared memory that the system takes of each CTA


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 32, 65536, 164 * 1024, 163 * 1024),
    90: Multiprocessor(2048, 32, 65536, 228 * 1024, 227 * 1024),
    100: Multiprocessor(2048, 32, 65536, 228 * 1024, 227 * 1024),
}
_REGISTER_UNIT = 256  # registers are given out to warps in these portions
_SHARED_UNIT = 128


@dataclasses.dataclass(frozen=True)
class StaticFacts:
    """Of one kernel for one target."""

    registers: int  # per thread
    spill_stores: int  # bytes per thread
    spill_loads: int
    stack: int  # bytes per thread
    static_shared: int  # bytes per CTA
    barriers: int
    target: int

    @property
    def spills(self) -> int:
        """Bytes per thread, both ways."""
        return self.spill_stores + self.spill_loads

    def ctas(self, threads: int, dynamic_shared: int = 0) -> int:
        """CTAs of this many threads that fit one multiprocessor; 0 if not even one does."""
        limits = MULTIPROCESSORS[self.target]
        shared = self.static_shared + dynamic_shared
        warps = -(-threads // WARP)
        registers = -(-self.registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT * warps
        if registers > limits.registers or shared > limits.shared_per_cta:
            return 0
        asked = -(-(shared + limits.reserved) // _SHARED_UNIT) * _SHARED_UNIT
        by = (
            limits.ctas,
            limits.threads // (warps * WARP),
            limits.registers // max(registers, 1),
            limits.shared // asked,
        )
        return min(by)

    def occupancy(self, threads: int, dynamic_shared: int = 0) -> float:
        """Share of the multiprocessor's threads that can be resident."""
        warps = -(-threads // WARP)
        return self.ctas(threads, dynamic_shared) * warps * WARP / MULTIPROCESSORS[self.target].threads


def ptxas(target: int) -> str | None:
    """The ptxas that Triton assembles for this target with (its PTX is of that one's version), or the one on PATH."""
    if os.environ.get("PTXAS"):
        return os.environ["PTXAS"]
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(target).path)
    except (ImportError, RuntimeError):
        return shutil.which("ptxas")


@functools.lru_cache(maxsize=512)
def static_facts(ptx: str, target: int, flags: tuple[str, ...] = ()) -> StaticFacts:
    """Assembles one kernel's PTX with `ptxas -v`. Raises RuntimeError with its complaints, or where it is missing.

    Triton's launches are assembled alike: its own flags do not change what is reported here.
    """
    assembler = ptxas(target)
    if assembler is None:
        raise RuntimeError("ptxas is not to be found: install triton, or put CUDA's on PATH")
    arch = re.search(r"\.target\s+(sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={arch[1] if arch else f'sm_{target}'}", *flags]
        done = subprocess.run(
            [*command, str(path), "-o", str(Path(folder, "kernel.cubin"))], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"ptxas failed:\n{done.stderr}")
    return parse_log(done.stderr + done.stdout, target)


def parse_log(log: str, target: int) -> StaticFacts:
    """Reads the log of `ptxas -v` about one kernel."""

    def number(pattern: str) -> int:
        found = re.findall(pattern, log)
        return max((int(value) for value in found), default=0)

    if "Used " not in log:
        raise RuntimeError(f"no register count in ptxas' log:\n{log}")
    return StaticFacts(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        static_shared=number(r"(\d+) bytes smem"),
        barriers=number(r"used (\d+) barriers"),
        target=target,
    )

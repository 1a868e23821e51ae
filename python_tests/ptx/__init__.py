"""An emulator of PTX: runs compiled kernels on the CPU, checks what they do, and counts what it costs.

Triton launches, through the seam of the package::

    from ptx.triton_shim import Emulator
    from kdkernels.triton import launch

    emulator = Emulator(target=90)                       # 80, 90 or 100
    monkeypatch.setattr(launch, "start", emulator.start)  # start(kernel, grid, arguments, options)
    ...                                                   # call the backend with CPU tensors
    report = emulator.reports[-1]
    report.load_sectors, report.store_sectors             # 32-byte sectors
    report.thread_instructions, report.special            # by threads; report.by_class(), report.by_opcode()
    report.bank_conflicts, report.widths()                # {'load': {16}, 'store': {16}}

    with emulator.poison():                               # torch.empty's memory may not be read before it is written
        ...
    Emulator(90, Settings(seed=3, noise=1.0))   # errors of ex2, lg2, rcp, ...: seed, share of the ISA's bound

Any kernel, by its PTX::

    from ptx import Settings, Unwritten, compile_cuda, run
    report = run(ptx_text, grid, block, [tensor, Unwritten(output), 128, 1.5], shared=1024)

Tensors and arrays are mapped in place: results are in them afterwards. Every tensor lives 64 GiB from the next, so an
access beyond it, or into the gap between two rows of a strided one, is a fault; memory that no one touches costs
nothing, so strides beyond 2^31 elements can be tested with `torch.empty`. Faults are subclasses of `ptx.Fault`
(OutOfBounds, Misaligned, Uninitialised, SharedRace, WriteConflict, BarrierDivergence, ...); what the emulator does not
know is `ptx.Unsupported`, never a guess. Approximate functions err by up to what the ISA permits, reproducibly.

CUDA C++ and one test body for emulator and GPU: `ptx.harness`. Damaged compiled code, to show that tests notice:
`ptx.mutants.Mutants(ptx_text).barriers()`, run with `Emulator(90, mutate=lambda text: mutant.text)`. Registers, spills
and occupancy by ptxas: `ptx.static_facts.static_facts(compiled.ptx, 90)` with `emulator.compiled[-1]`. A few lines of
PTX as a kernel: `ptx.snippet`.

What it is not: counts are of PTX, not of the machine code that ptxas makes of it, and ptxas may contract a `mul` and an
`add` without `.rn` that are executed apart here. Lanes of a warp are in step, and warps interleave only where branches
and barriers make them: races are found by the check on shared memory, not by chance, and not in global memory. There
are no caches: sectors are those that warps ask for. Of tensor cores it has what one warp uses (mma.sync of 16-bit
numbers, ldmatrix); those of a warpgroup (wgmma) and of Blackwell (tcgen05), tensor copies, textures, named barriers and
calls are refused. The package's own kernels multiply no matrices: heads are torch's GEMMs.

Modules: parser (text to instructions), memory and shared (state spaces and their faults), traffic (sectors, banks),
rounding and approximate (numerics), lanes (threads and registers), executor (divergence and barriers), instructions/
(one file per family), report (counts), launch (arguments), compile (Triton and nvcc to PTX), triton_shim, harness.
"""

from .approximate import Approximation
from .compile import TARGETS, Compiled, compile_cuda, compile_triton
from .errors import (
    BarrierDivergence,
    Divergence,
    Fault,
    Misaligned,
    OutOfBounds,
    ParseError,
    PTXError,
    SharedRace,
    Trap,
    Uninitialised,
    Unsupported,
    WriteConflict,
)
from .launch import Settings, Unwritten, run
from .parser import parse
from .report import Counts, Report

__all__ = [
    "TARGETS",
    "Approximation",
    "BarrierDivergence",
    "Compiled",
    "Counts",
    "Divergence",
    "Fault",
    "Misaligned",
    "OutOfBounds",
    "PTXError",
    "ParseError",
    "Report",
    "Settings",
    "SharedRace",
    "Trap",
    "Uninitialised",
    "Unsupported",
    "Unwritten",
    "WriteConflict",
    "compile_cuda",
    "compile_triton",
    "parse",
    "run",
]

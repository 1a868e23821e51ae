"""The whole native build: what setup.py calls."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NoReturn

from build_tools import generate, locate, plan
from build_tools.execute import execute
from build_tools.options import BuildError, Options

REMEDY = """
--------------------------------------------------------------------------------
kdkernels: the native build failed.
{error}
The failing command and its own message are above. Mend it (compiler: set CXX;
torch: 2.10 or later in this environment), or install without native kernels:

    KD_BUILD=none pip install .

That package works: the eager and Triton backends serve every call, only slower
on the CPU.
--------------------------------------------------------------------------------"""


def _require_torch() -> locate.Torch:
    torch = locate.find_torch()
    if torch is None:
        raise BuildError("no torch 2.10 or later was found for this Python: pip install 'torch>=2.10' first")
    return torch


def _find_nvcc(mode: str) -> locate.Nvcc | None:
    nvcc = None if mode == "cpu" else locate.find_nvcc()
    if mode == "cuda" and nvcc is None:
        raise BuildError("KD_BUILD=cuda, but nvcc is neither in CUDA_HOME/bin nor on PATH")
    return nvcc


def _facts(tools: plan.Toolchain, torch: locate.Torch, nvcc: locate.Nvcc | None, version: str) -> dict[str, object]:
    """What the binaries can tell about themselves; plain JSON."""
    cuda = sorted(path.name for path in (tools.root / "csrc/cuda").glob("*.cu")) if nvcc else []
    return {
        "version": version,
        "torch": torch.version,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "compiler": locate.compiler_version(list(tools.compiler)),
        "instruction_sets": list(plan.instruction_sets(tools.root)),
        "nvcc": nvcc.release if nvcc else None,
        "cuda_sources": cuda,
        "cuda_architectures": plan.cuda_architectures(nvcc) if nvcc else [],
        "sanitize": tools.sanitize,
        "kernels": list(generate.kernel_digests(tools.root).items()),
    }


def _build(root: Path, build: Path, version: str, options: Options, outputs: dict[str, Path]) -> None:
    torch, nvcc = _require_torch(), _find_nvcc(options.mode)
    tools = plan.Toolchain(root, build, tuple(locate.find_compiler()), options.sanitize)
    generate.divergences_header(root, build / "gen")
    generate.facts_header(build / "gen", _facts(tools, torch, nvcc, version))
    made = {name: build / Path(path).name for name, path in outputs.items()}
    steps = plan.torch_library(tools, torch, nvcc, made["kdkernels.kdkernels_C"])
    steps += plan.python_module(tools, torch, made["kdkernels._codec"])
    cuda = f"nvcc {nvcc.release}" if nvcc else "no CUDA"
    print(f"kdkernels: native build against torch {torch.version}, {cuda}, {options.jobs} jobs", flush=True)
    execute(steps, build, options.jobs)
    for name, path in outputs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a process may have the old one mapped: never write into it
        shutil.copy2(made[name], path)


def fail(error: BuildError) -> NoReturn:
    """Ends the build; what went wrong and what to do is printed last, without a Python traceback."""
    print(REMEDY.format(error=error), file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def build(root: Path, folder: Path, version: str, options: Options, outputs: dict[str, Path]) -> None:
    """Builds both shared objects into `folder` and copies them to `outputs` (module name -> path)."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _build(root, folder.resolve(), version, options, outputs)
    except BuildError as error:
        fail(error)

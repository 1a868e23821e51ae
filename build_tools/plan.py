"""From the sources to a list of commands. csrc/cpu/BUILD.json is the one place that lists the CPU kernels."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from build_tools.locate import Nvcc, Torch, find_pybind11
from build_tools.options import BuildError

X86 = {"x86_64", "amd64"}
CUDA_ARCHITECTURES = ("80", "90", "100")


@dataclass(frozen=True)
class Step:
    """One command: makes `output` from `inputs`. Compiles write a depfile `output`.d, links do not."""

    output: Path
    inputs: tuple[Path, ...]
    command: tuple[str, ...]
    compiles: bool = True


@dataclass(frozen=True)
class Toolchain:
    """What every compile shares. `build` receives objects and generated headers (`build`/gen)."""

    root: Path
    build: Path
    compiler: tuple[str, ...]
    sanitize: str = ""

    def _common(self) -> list[str]:
        # The prefix map keeps this machine's paths out of error messages and makes two builds equal.
        flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        flags += [f"-fmacro-prefix-map={self.root}/=", f"-I{self.root / 'csrc'}", f"-I{self.build / 'gen'}"]
        return shlex.split(os.environ.get("CXXFLAGS", "")) + flags

    def sanitize_flags(self) -> list[str]:
        """Last on the command line, so that they win over the kernels' -O3."""
        if not self.sanitize:
            return []
        return [
            f"-fsanitize={self.sanitize}",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
            "-g",
            "-O1",
        ]

    def compile(self, source: Path, tag: str, flags: list[str]) -> Step:
        """Compiles one C++ file; `tag` keeps the objects of several variants of it apart."""
        output = self.build / "obj" / f"{tag}{source.stem}.o"
        depfile = ["-MD", "-MF", f"{output}.d"]
        command = [*self.compiler, *self._common(), *flags, *self.sanitize_flags()]
        return Step(output, (source,), (*command, *depfile, "-c", str(source), "-o", str(output)))

    def link(self, output: Path, steps: list[Step], flags: list[str]) -> Step:
        """Links a shared object (or whatever `flags` ask for) from compiled steps."""
        objects = [str(step.output) for step in steps]
        environment = shlex.split(os.environ.get("LDFLAGS", ""))
        command = [*self.compiler, *environment, *objects, "-o", str(output), *self.sanitize_flags(), *flags]
        return Step(output, tuple(step.output for step in steps), tuple(command), compiles=False)


def read_cpu_sources(root: Path) -> dict[str, list[str] | dict[str, list[str]]]:
    """csrc/cpu/BUILD.json as is: flags, per_isa, plain, isa_flags."""
    path = root / "csrc/cpu/BUILD.json"
    if not path.is_file():
        raise BuildError(f"{path} is missing: the source tree is incomplete")
    spec = json.loads(path.read_text(encoding="utf-8"))
    missing = {"flags", "per_isa", "plain", "isa_flags"} - spec.keys()
    if missing:
        raise BuildError(f"{path} lacks {', '.join(sorted(missing))}")
    return dict(spec)


def instruction_sets(root: Path) -> dict[str, list[str]]:
    """Instruction set -> compiler flags; only the portable one on a machine that is not x86-64."""
    flags = read_cpu_sources(root)["isa_flags"]
    assert isinstance(flags, dict)
    if platform.machine().lower() in X86:
        return flags
    return {"baseline": flags["baseline"]}


def cpu_kernels(tools: Toolchain) -> list[Step]:
    """Every CPU kernel once per instruction set, in a namespace of its own, and the chooser once."""
    spec = read_cpu_sources(tools.root)
    shared, per_isa, plain = list(spec["flags"]), list(spec["per_isa"]), list(spec["plain"])
    folder = tools.root / "csrc/cpu"
    steps = [tools.compile(folder / name, "cpu_", shared) for name in plain]
    for isa, flags in instruction_sets(tools.root).items():
        steps += [tools.compile(folder / name, f"{isa}_", [*shared, f"-DKD_ISA={isa}", *flags]) for name in per_isa]
    return steps


def cuda_architectures(nvcc: Nvcc) -> list[int]:
    """Compute capabilities, times ten, that CUDA kernels are compiled for; the last one's PTX is kept as well.

    TORCH_CUDA_ARCH_LIST, as torch's own extensions read it, or all of `CUDA_ARCHITECTURES` that nvcc knows.
    """
    known = subprocess.run([nvcc.command, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    wanted = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known.split()]
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        wanted = [digits for part in re.split(r"[;\s]+", asked) if (digits := re.sub(r"\D", "", part))]
    if not wanted:
        raise BuildError(f"nvcc {nvcc.release} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}: use a newer CUDA")
    return sorted({int(arch) for arch in wanted})


def cuda_kernels(tools: Toolchain, nvcc: Nvcc) -> list[Step]:
    """csrc/cuda/*.cu: torch-free, so nvcc alone compiles them, whatever torch is installed."""
    wanted = cuda_architectures(nvcc)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    targets.append(f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}")  # PTX, for GPUs to come
    steps = []
    for source in sorted((tools.root / "csrc/cuda").glob("*.cu")):
        output = tools.build / "obj" / f"cuda_{source.stem}.o"
        flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{tools.root / 'csrc'}"]
        flags += [f"-I{tools.build / 'gen'}", "-MD", "-MF", f"{output}.d"]
        steps.append(Step(output, (source,), (nvcc.command, *flags, *targets, "-c", str(source), "-o", str(output))))
    return steps


def torch_library(tools: Toolchain, torch: Torch, nvcc: Nvcc | None, output: Path) -> list[Step]:
    """kdkernels_C.so: the kernels and their glue on libtorch's stable ABI (it loads from torch 2.10 on)."""
    cuda = cuda_kernels(tools, nvcc) if nvcc else []
    defines = [
        "-DTORCH_STABLE_ONLY",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(["-DKD_CUDA"] if cuda else []),
    ]
    sources = [tools.root / "csrc/ops.cpp", *sorted((tools.root / "csrc").glob("*_op.cpp"))]
    glue = [tools.compile(source, "torch_", [*defines, "-isystem", str(torch.include)]) for source in sources]
    # No rpath: torch is always imported first, and its own libtorch_cpu.so is the one to bind to.
    flags = ["-shared", "-Wl,-z,now", f"-L{torch.lib}", "-ltorch_cpu"]
    if not tools.sanitize:
        flags.append("-Wl,--no-undefined")  # with a sanitizer its run-time library comes by LD_PRELOAD
    if cuda:
        if nvcc is None or nvcc.lib is None:
            raise BuildError("nvcc was found but not libcudart_static.a beside it: install the CUDA development files")
        flags += [f"-L{nvcc.lib}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    steps = [*glue, *cpu_kernels(tools), *cuda]
    return [*steps, tools.link(output, steps, flags)]


def codec(tools: Toolchain, tag: str) -> list[Step]:
    """csrc/codec*.cpp. A product is rounded before it is subtracted from: the same numbers on every processor."""
    sources = sorted((tools.root / "csrc").glob("codec*.cpp"))
    return [tools.compile(source, tag, ["-O3", "-ffp-contract=off"]) for source in sources]


def python_module(tools: Toolchain, torch: Torch, output: Path) -> list[Step]:
    """kdkernels/_codec: pybind11, torch-free."""
    includes = [find_pybind11(torch), Path(sysconfig.get_path("include"))]
    flags = [word for folder in includes for word in ("-isystem", str(folder))]
    steps = [tools.compile(tools.root / "csrc/bindings.cpp", "python_", flags), *codec(tools, "python_")]
    return [*steps, tools.link(output, steps, ["-shared", "-Wl,-z,now"])]

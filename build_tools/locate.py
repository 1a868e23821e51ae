"""Finds what a build needs: torch's headers, pybind11's headers, the compiler, nvcc."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build_tools.options import BuildError

TORCH_MINIMUM = (2, 10)  # the first release whose stable ABI has parallel_for, const pointers and TORCH_BOX


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder and its version text."""

    folder: Path
    version: str

    @property
    def include(self) -> Path:
        return self.folder / "include"

    @property
    def lib(self) -> Path:
        return self.folder / "lib"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: the command, its release ("13.0") and the folder that holds libcudart_static.a."""

    command: str
    release: str
    lib: Path | None


def site_folders() -> Iterator[Path]:
    """Where the environment being installed into keeps its packages, nearest first.

    pip's isolated build environment hides those packages from `import` but keeps the target's `sys.prefix`,
    so sysconfig still names its folders. A venv made with --system-site-packages also sees the base Python's.
    """
    for key in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(key))
    config = Path(sys.prefix) / "pyvenv.cfg"
    inherits = config.is_file() and re.search(
        r"(?im)^include-system-site-packages\s*=\s*true", config.read_text(encoding="utf-8")
    )
    if sys.prefix == sys.base_prefix or inherits:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for key in ("purelib", "platlib"):
            yield Path(sysconfig.get_path(key, vars=base))
        yield from (Path(folder) for folder in site.getsitepackages([sys.base_prefix]))
        yield Path(site.getusersitepackages())


def _package_folders(name: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        yield from (Path(folder) for folder in spec.submodule_search_locations)
    yield from (folder / name for folder in site_folders())


def find_torch() -> Torch | None:
    """The torch to build against (KD_TORCH_DIR first), or None if there is none of at least 2.10."""
    asked = os.environ.get("KD_TORCH_DIR")
    for folder in [Path(asked)] if asked else _package_folders("torch"):
        version_file = folder / "version.py"
        if not version_file.is_file() or not (folder / "include/torch/csrc/stable/library.h").is_file():
            continue
        found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", version_file.read_text(encoding="utf-8"))
        if found and (int(found[2]), int(found[3])) >= TORCH_MINIMUM:
            return Torch(folder, found[1])
    return None


def find_pybind11(torch: Torch) -> Path:
    """The include folder of pybind11: the package's, or the copy that torch ships."""
    for folder in _package_folders("pybind11"):
        if (folder / "include/pybind11/pybind11.h").is_file():
            return folder / "include"
    if (torch.include / "pybind11/pybind11.h").is_file():
        return torch.include
    raise BuildError("pybind11 was not found: pip install pybind11, or drop --no-build-isolation")


def find_compiler() -> list[str]:
    """The C++ compiler as a command list: CXX, else the first of c++, g++, clang++ on PATH."""
    asked = shlex.split(os.environ.get("CXX", ""))
    names = [asked[0]] if asked else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name):
            return asked or [name]
    raise BuildError(f"no C++ compiler: {', '.join(names)} not found on PATH. Install g++ (10 or later), or set CXX")


def compiler_version(compiler: list[str]) -> str:
    """The first line of `--version`."""
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [f"{compiler[0]} (prints no version)"])[0].strip()


def find_nvcc() -> Nvcc | None:
    """nvcc from CUDA_HOME or CUDA_PATH, else from PATH. Never asks whether a GPU is visible."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    command = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
    if not command:
        return None
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if not release:
        return None
    # nvcc on PATH may be a wrapper script: it says itself where its toolkit lies.
    dry = subprocess.run([command, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"(?m)\bTOP=(.+?)\s*$", dry.stderr)
    libs = [Path(top[1]).resolve() / name for name in ("lib64", "targets/x86_64-linux/lib", "lib")] if top else []
    return Nvcc(command, release[1], next((lib for lib in libs if (lib / "libcudart_static.a").is_file()), None))

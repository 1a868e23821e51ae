"""Installs copies of this tree in every supported way, into environments that share this one's torch.

An environment here is a venv whose site-packages are links to this interpreter's, less kdkernels: pip and the build see
a torch that is really there, and nothing is copied. Every install runs with --no-index, so a build that wanted another
torch (or anything else) would fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


BUILD_TOOLS = ("setuptools", "pybind11", "ninja", "_distutils_hack", "distutils-precedence.pth")
PARTS = ("pyproject.toml", "setup.py", "_kd_build.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("build_tools", "csrc", "kdkernels")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@dataclass(frozen=True)
class Environment:
    """A venv: its python, its site-packages."""

    python: Path
    site: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs `python COMMAND` outside the source tree, with none of the caller's KD_ and pip settings."""
        private = ("KD_", "PIP_", "PYTHONPATH", "CXX", "CUDA", "MAKE", "KDKERNELS", "VIRTUAL_ENV")
        env = {name: value for name, value in os.environ.items() if not name.startswith(private)}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        env |= {"TORCH_CUDA_ARCH_LIST": "9.0"}  # one architecture takes a third of the time
        env["PATH"] = f"{self.python.parent}{os.pathsep}{env['PATH']}"
        return subprocess.run(
            [str(self.python), *command], capture_output=True, text=True, env=env | environment,
            cwd=self.site, timeout=600, check=False,
        )  # fmt: skip

    def succeed(self, *command: str, **environment: str) -> str:
        """The same; what it printed. Fails the test when the command fails."""
        done = self.run(*command, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: str, **environment: str) -> str:
        """`pip install -v ARGUMENTS`; its log."""
        done = self.run("-m", "pip", "install", "-v", *arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def info(self) -> dict[str, Any]:
        """`kdkernels.info.describe()` of what is installed, and where from."""
        code = (
            "import json, kdkernels, kdkernels.info as i; print(json.dumps(i.describe() | {'at': kdkernels.__file__}))"
        )
        return dict(json.loads(self.succeed("-c", code)))


def make_environment(folder: Path, *, build_tools: bool) -> Environment:
    """A venv that links to this environment's packages; without `build_tools`, only isolation can build there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for entry in Path(torch.__file__).resolve().parent.parent.iterdir():
        hidden = "kdkernels" in entry.name.lower() or (not build_tools and entry.name.startswith(BUILD_TOOLS))
        if not hidden:
            (site / entry.name).symlink_to(entry)
    return Environment(python, site)


def make_tree(folder: Path) -> Path:
    """A copy of what a build reads."""
    folder.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
    for name in PARTS:
        shutil.copy2(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    return make_environment(tmp_path / "env", build_tools=True)


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exactly what an isolated build may fetch: setuptools and pybind11."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), "setuptools>=77", "pybind11>=2.13"]
    if subprocess.run(command, capture_output=True, timeout=300, check=False).returncode:
        pytest.skip("no package index can be reached: an isolated build needs setuptools and pybind11 from one")
    return folder


def path_without(folder: Path, *hidden: str) -> str:
    """A PATH of one new folder with links to every program of the present PATH but the hidden ones."""
    folder.mkdir()
    for part in os.environ["PATH"].split(os.pathsep):
        for program in Path(part).iterdir() if Path(part).is_dir() else ():
            link = folder / program.name
            if program.name not in hidden and not program.is_dir() and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


# ---- whole installs


@pytest.mark.slow
@needs_compiler
def test_isolated_install_of_the_sdist_uses_the_torch_that_is_there(
    tmp_path: Path, tree: Path, wheelhouse: Path
) -> None:
    code = f"import os, sys; os.chdir({str(tree)!r}); sys.path.insert(0, '.'); import _kd_build as b; "
    code += f"print(b.build_sdist({str(tmp_path)!r}))"
    archive = tmp_path / make_environment(tmp_path / "maker", build_tools=True).succeed("-c", code).splitlines()[-1]
    env = make_environment(tmp_path / "env", build_tools=False)
    start = time.monotonic()
    log = env.pip(str(archive), PIP_FIND_LINKS=str(wheelhouse), KD_BUILD="cpu")
    seconds = time.monotonic() - start
    assert "Installing build dependencies" in log
    assert "native build against torch" in log
    assert "Collecting torch" not in log
    assert (env.site / "torch").is_symlink(), "the environment's torch was replaced"
    facts = env.info()
    assert facts["build"]["torch"] == torch.__version__
    assert facts["backends"]["cpp"]["available"], facts["backends"]["cpp"]["reason"]
    assert Path(facts["at"]).is_relative_to(env.site)
    assert seconds < 180, f"{seconds:.0f} s"


@pytest.mark.slow
@needs_compiler
def test_install_from_a_tree_editable_then_whole_then_without_native_code(tree: Path, env: Environment) -> None:
    env.pip("--no-build-isolation", "--no-deps", "--editable", str(tree), KD_BUILD="cpu")
    facts = env.info()
    assert Path(facts["at"]).is_relative_to(tree)
    assert facts["backends"]["cpp"]["available"], facts["backends"]["cpp"]["reason"]
    assert (tree / "kdkernels/kdkernels_C.so").is_file()

    log = env.pip("--no-build-isolation", str(tree), KD_BUILD="cpu")
    assert "Collecting torch" not in log
    facts = env.info()
    assert Path(facts["at"]).is_relative_to(env.site)
    assert facts["backends"]["cpp"]["available"], facts["backends"]["cpp"]["reason"]
    version = env.succeed("-c", "import kdkernels._codec as c; print(c.build_facts()['version'])")
    assert version.strip() == facts["kdkernels"]

    # Nothing of the native builds in this tree may leak into a wheel without native code.
    log = env.pip("--no-build-isolation", "--force-reinstall", "--no-deps", str(tree), KD_BUILD="none")
    assert "py3-none-any.whl" in log
    assert not list((env.site / "kdkernels").glob("*.so"))
    cpp = env.info()["backends"]["cpp"]
    assert not cpp["available"]
    assert "KD_BUILD=none" in cpp["reason"]
    loss = "import torch, kdkernels as kd; x = torch.randn(3, 7); print(float(kd.distillation_loss(x, x, 'jsd')))"
    assert float(env.succeed("-c", loss)) == 0

    env.pip("--no-build-isolation", "--no-deps", "--editable", str(tree), KD_BUILD="none")
    assert not list((tree / "kdkernels").glob("*.so"))


@pytest.mark.soak
@needs_compiler
def test_install_without_nvcc_and_without_ninja(tmp_path: Path, tree: Path, env: Environment) -> None:
    """The plain loop compiles, and the build says that there was no nvcc."""
    log = env.pip("--no-build-isolation", str(tree), PATH=path_without(tmp_path / "path", "nvcc", "ninja"))
    assert "no CUDA" in log
    facts = env.info()
    assert facts["backends"]["cpp"]["available"], facts["backends"]["cpp"]["reason"]
    assert facts["build"]["nvcc"] is None
    assert "nvcc was not found" in facts["backends"]["cuda"]["reason"]


@pytest.mark.soak
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_objects_are_built_with_nvcc_also_against_a_cpu_torch(tree: Path, env: Environment) -> None:
    (tree / "csrc/cuda").mkdir(exist_ok=True)
    (tree / "csrc/cuda/probe.cu").write_text(
        "#include <cuda_runtime.h>\n__global__ void fill(float* p) { p[threadIdx.x] = 1; }\n"
        'extern "C" __attribute__((visibility("default"))) int kd_probe(float* p) {\n'
        "  fill<<<1, 32>>>(p);\n  return static_cast<int>(cudaGetLastError());\n}\n"
    )
    env.pip("--no-build-isolation", str(tree), KD_BUILD="cuda")
    facts = env.info()
    assert facts["build"]["cuda_sources"] == sorted(path.name for path in (tree / "csrc/cuda").glob("*.cu"))
    assert facts["build"]["cuda_architectures"]
    assert facts["backends"]["cpp"]["available"], facts["backends"]["cpp"]["reason"]
    code = "import ctypes, kdkernels.native as n; n.available(); print(ctypes.CDLL(str(n.LIBRARY)).kd_probe(None))"
    status = int(env.succeed("-c", code))
    assert torch.cuda.is_available() or status != 0, "a launch without a driver returns an error, it does not crash"


# ---- failures are loud


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("hide", ["", "ninja"])
def test_a_failing_compile_is_loud_and_names_the_remedy(
    tmp_path: Path, tree: Path, env: Environment, hide: str
) -> None:
    source = tree / "csrc/bindings.cpp"
    source.write_text(source.read_text() + "\nthis_is_not_cpp;\n")
    (tree / "csrc/cpu/BUILD.json").write_text(
        json.dumps({"flags": [], "per_isa": [], "plain": [], "isa_flags": {"baseline": []}})
    )
    environment = {"PATH": path_without(tmp_path / "path", hide)} if hide else {}
    environment["KD_BUILD"] = "cpu"  # CUDA's objects would take most of the time and say nothing more
    done = env.run("-m", "pip", "install", "--no-build-isolation", str(tree), **environment)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "this_is_not_cpp" in said, "the compiler's own message"
    assert "KD_BUILD=none pip install ." in said
    assert "Traceback" not in said
    assert not (env.site / "kdkernels").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KD_BUILD": "gpu"}, "KD_BUILD is 'gpu'; it must be one of auto, cpu, cuda, none"),
        ({"KD_SANITIZE": "memory"}, "KD_SANITIZE is 'memory'"),
        ({"KD_JOBS": "0"}, "KD_JOBS (or MAX_JOBS) is '0'"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler not found on PATH"),
        ({"KD_TORCH_DIR": "/nonexistent"}, "no torch 2.10 or later was found"),
    ],
)
def test_a_wrong_setting_is_loud(tree: Path, env: Environment, environment: dict[str, str], message: str) -> None:
    done = env.run("-m", "pip", "install", "--no-build-isolation", str(tree), **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_every_python_file_and_nothing_native_is_in_a_pure_wheel(tmp_path: Path, tree: Path) -> None:
    env = {**os.environ, "KD_BUILD": "none", "PYTHONPATH": "."}
    code = f"import _kd_build; print(_kd_build.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tree, check=False)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]).namelist())
    sources = {str(path.relative_to(tree)) for path in (tree / "kdkernels").rglob("*.py")}
    assert sources <= names
    assert {"kdkernels/py.typed", "kdkernels/_codec.pyi"} <= names
    assert not any(name.endswith((".so", ".o", ".cpp")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)

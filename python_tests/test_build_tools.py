"""The build's parts, without installing: what is looked for, what is planned, what ninja is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_tools import execute, locate, options, plan  # noqa: E402


def test_a_missing_nvcc_is_an_error_only_when_cuda_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from build_tools import native

    monkeypatch.setattr(locate, "find_nvcc", lambda: None)
    assert native._find_nvcc("auto") is None
    with pytest.raises(options.BuildError, match="KD_BUILD=cuda"):
        native._find_nvcc("cuda")
    nvcc = locate.Nvcc("nvcc", "13.0", None)
    monkeypatch.setattr(locate, "find_nvcc", lambda: nvcc)
    assert native._find_nvcc("auto") is nvcc
    assert native._find_nvcc("cpu") is None


def fake_torch(folder: Path, version: str) -> Path:
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


@pytest.mark.parametrize(("version", "found"), [("2.9.1+cpu", False), ("2.10.0", True), ("3.0.0a0", True)])
def test_only_a_torch_with_the_stable_abi_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, found: bool
) -> None:
    monkeypatch.setenv("KD_TORCH_DIR", str(fake_torch(tmp_path / "torch", version)))
    torch_found = locate.find_torch()
    assert (torch_found is not None) == found
    if torch_found:
        assert torch_found.version == version


def test_torch_is_a_build_requirement_only_where_the_target_has_none() -> None:
    code = "import os, _kd_build as b; print(b._with_torch(['x']))"

    def requirements(**environment: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        return done.stdout.strip()

    assert requirements() == "['x']"
    assert requirements(KD_TORCH_DIR="/nonexistent") == "['x', 'torch>=2.10']"
    assert requirements(KD_TORCH_DIR="/nonexistent", KD_BUILD="none") == "['x']"


def test_other_machines_build_only_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(plan.instruction_sets(ROOT)) >= {"baseline"}
    monkeypatch.setattr(plan.platform, "machine", lambda: "aarch64")
    assert list(plan.instruction_sets(ROOT)) == ["baseline"]


def test_kernels_are_compiled_once_per_instruction_set_and_never_with_fast_math() -> None:
    steps = plan.cpu_kernels(plan.Toolchain(ROOT, ROOT / "build/x", ("c++",)))
    assert len({step.output for step in steps}) == len(steps)
    spec = json.loads((ROOT / "csrc/cpu/BUILD.json").read_text())
    per_isa = len(spec["per_isa"]) * len(plan.instruction_sets(ROOT))
    assert len(steps) == per_isa + len(spec["plain"])
    assert not any("fast-math" in word or word == "-Ofast" for step in steps for word in step.command)


@pytest.mark.parametrize(
    ("asked", "found"), [("", [80, 90]), ("9.0a;8.0+PTX", [80, 90]), ("8.6 10.0", [86, 100]), (" 9.0 ", [90])]
)
def test_cuda_code_is_for_what_is_asked_or_all_that_nvcc_knows(
    asked: str, found: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    known = locate.Nvcc(str(nvcc), "12.0", None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert plan.cuda_architectures(known) == found
    for step in plan.cuda_kernels(plan.Toolchain(ROOT, tmp_path, ("c++",)), known):
        targets = [word for word in step.command if word.startswith("-gencode")]
        assert [word.rpartition("_")[2] for word in targets] == [*(str(n) for n in found), str(found[-1])]
        assert targets[-1].endswith(f"code=compute_{found[-1]}")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Volta")
    with pytest.raises(options.BuildError, match=r"12\.0 knows none of sm_80"):
        plan.cuda_architectures(known)


def test_ninja_text_escapes_paths(tmp_path: Path) -> None:
    step = plan.Step(tmp_path / "a b:c$.o", (tmp_path / "in put.cpp",), ("echo", "$HOME x"))
    text = execute.ninja_text([step])
    assert "a$ b$:c$$.o: compile" in text
    assert "echo '$$HOME x'" in text

"""What of `make gpu` can be rehearsed without a GPU: arguments, the flow on another device, the report, the lane."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_lane
import oracle
import pytest
import torch
from ptx.triton_shim import Emulator

import kdkernels.triton
from benchmarks import gpu, gpu_report, rivals, shapes
from benchmarks.report import rewrite
from benchmarks.shapes import Case
from kdkernels.triton import launch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SMALL = Case("dense", "jsd", "fp32", 16, 1000)
FUSED = Case("linear", "jsd", "fp32", 16, 1000, H=24, Ht=40, chunk_bytes=2**20)
EFFORT = shapes.Effort(2, 0.01, float("inf"))


class CPUClock(gpu.Clock):
    """The processor in the place of the GPU."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        pass

    def seconds(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        work()
        return 3 * 2**20


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those who compile for many seconds."""
    everyone = gpu.contestants
    monkeypatch.setattr(gpu, "contestants", lambda case: [c for c in everyone(case) if not c.compiled])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", [SMALL, FUSED], ids=lambda case: case.op)
def test_measuring_rehearsed_on_a_cpu(case: Case) -> None:
    entries = {e["contestant"]: e for e in gpu.measure(case, CPUClock(), 1e9, EFFORT)}
    assert next(iter(entries)) == "eager"
    for name in ("eager", "ours"):
        assert len(entries[name]["ms"]) == 4
        assert entries[name]["ms"][0] > 0
        assert entries[name]["peak_extra_mib"] == 3
        assert entries[name]["distance_from_eager"]["loss"] < 1e-4
    share = entries["ours"]["bandwidth_share"]
    if case.op == "linear":
        assert share is None
    else:
        seconds = entries["ours"]["ms"][0] / 1e3
        assert share == pytest.approx(3 * case.logits_bytes / seconds / 1e9, abs=1e-3)


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_or_failing_rival_has_no_time_and_ours_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> Any:
        raise RuntimeError("no such kernel\nand more")

    def doubled(case: Case) -> Any:
        right = next(c for c in rivals.contestants(case) if c.name == "eager").build(case)
        return lambda given: 2 * right(given)

    others = [gpu.Contestant("liger:fails", fails, "here"), gpu.Contestant("trl:doubled", doubled, "here")]
    monkeypatch.setattr(gpu, "GPU_ONLY", others)
    entries = {e["contestant"]: e for e in gpu.measure(SMALL, CPUClock(), 1e9, EFFORT)}
    assert entries["liger:fails"]["not_timed"] == "RuntimeError: no such kernel"
    assert "differs from the reference" in entries["trl:doubled"]["not_timed"]
    assert "ms" not in entries["trl:doubled"]
    monkeypatch.setattr(gpu, "GPU_ONLY", [gpu.Contestant("ours:doubled", doubled, "here")])
    with pytest.raises(RuntimeError, match=r"dense-jsd-fp32-16x1000.*ours:doubled"):
        gpu.measure(SMALL, CPUClock(), 1e9, EFFORT)


def test_who_is_measured() -> None:
    names = [c.name for c in gpu.contestants(SMALL)]
    assert names[0] == "eager"
    assert {"ours", "ours:inplace", "compile", "liger:jsd", "trl:gkd"} <= set(names)
    assert {"ours", "liger:fused", "trl:chunked"} <= {c.name for c in gpu.contestants(FUSED)}
    assert not any(name.startswith("torchtune") for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [[], ["--check"], ["--sanitize"]])
def test_without_a_gpu_there_is_one_line_and_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "sees no NVIDIA GPU" in err


def test_make_gpu_stops_before_it_installs_anything(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    command = ["make", "gpu", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "make gpu: no NVIDIA GPU on this machine (nvidia-smi -L)"
    assert not (tmp_path / "venv").exists()


def test_wrong_cases_and_the_file_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "obstacle", lambda: "")
    assert gpu.main(["--cases", "jds"]) == 2
    assert "cases='jds' matches none of" in capsys.readouterr().err
    assert gpu.main(["--check"]) == 0
    assert gpu.file_name("NVIDIA H100 80GB HBM3") == "gpu-nvidia-h100-80gb-hbm3.json"


def test_compute_sanitizer_is_optional_and_its_findings_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.sanitize() == 0
    assert "not installed: not run" in capsys.readouterr().out
    commands: list[list[str]] = []

    def fake(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=int("racecheck" in command))

    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(gpu.subprocess, "run", fake)
    assert gpu.sanitize() == 1
    assert [c[2] for c in commands] == ["memcheck", "racecheck"]
    assert "--error-exitcode" in commands[0]


def synthetic(name: str, ms: float | None, share: float | None = None) -> dict[str, Any]:
    one: dict[str, Any] = {"case": "dense-jsd-bf16-512x32000", "contestant": name}
    if ms is None:
        return one | {"not_timed": "RuntimeError: synthetic"}
    return one | {"ms": [ms, ms, ms, 3], "bandwidth_share": share, "peak_extra_mib": 1.5}


SYNTHETIC = {
    "what": "synthetic: made up by a test",
    "gpu": {"name": "Synthetic GPU"},
    "versions": {"torch": "0", "triton": "0"},
    "time": [
        synthetic("eager", 2.0),
        synthetic("ours", 0.2, 0.4),
        synthetic("ours:inplace", 0.1, 0.8),
        synthetic("liger:jsd", 0.7),
        synthetic("liger", 0.5),
        synthetic("trl:gkd", None),
    ],
}


def test_the_report_shows_measured_times_once_there_are_some(tmp_path: Path) -> None:
    before = gpu_report.markdown(tmp_path)
    assert "GPU time not measured" in before
    (tmp_path / "gpu-synthetic.json").write_text(json.dumps(SYNTHETIC))
    text = gpu_report.markdown(tmp_path)
    assert "GPU time not measured" not in text
    assert "**Synthetic GPU**, measured" in text
    assert "| JSD(.5) 512 x 32000 bf16 | 0.1 | 80% | 1.5 | – | 5 | – | 20 |" in text


def test_the_readme_holds_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text()
    assert rewrite(readme, gpu_report.markdown(), gpu_report.MARKERS) == readme, (
        "python -m benchmarks.gpu_report --readme"
    )


def test_the_gpu_lane_runs_the_emulated_bodies_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the emulator as the device: strides, offsets and operands that share storage arrive, results come back."""
    server = gpu_lane.OnDevice("cpu", Emulator(90).start)
    monkeypatch.setattr(kdkernels.triton, "obstacle", lambda device, dtype: "")
    monkeypatch.setattr(launch, "start", server.start)
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 40, generator=draw)[:, 3:36] for _ in range(2))
    oracle.check(student, teacher, "jsd", backend="triton")
    oracle.check(student, teacher, "forward_kl", backend="triton", inplace=True)
    assert server.reports
    with pytest.raises(pytest.skip.Exception, match="only the emulator counts"):
        _ = server.reports[-1].load_sectors


def test_operands_that_share_storage_still_do_on_the_device() -> None:
    seen: dict[str, torch.Tensor] = {}

    def kernel(_: Any, grid: Any, arguments: dict[str, Any], options: Any) -> None:
        seen.update(arguments)
        arguments["a"][0, 0] = 7.0

    whole = torch.zeros(4, 10)
    gpu_lane.OnDevice("cpu", kernel).start(None, (1,), {"a": whole[1:, 2:6], "b": whole[:, 1:]}, {})
    assert seen["a"].stride() == (10, 1)
    assert seen["a"].data_ptr() - seen["b"].data_ptr() == 4 * 11
    assert seen["b"].data_ptr() != whole.data_ptr() + 4
    assert whole[1, 2] == 7
    assert whole.sum() == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_lane_refuses_to_run_without_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "python_tests.gpu_lane", "-m", "gpu", "python_tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "torch sees no GPU" in done.stdout + done.stderr


def test_the_gpu_lane_marks_the_emulated_tests() -> None:
    def item(name: str) -> Any:
        marks: list[str] = []
        return SimpleNamespace(path=Path(name), add_marker=marks.append, marks=marks)

    items = [item("test_triton_dense.py"), item("test_triton_budgets.py"), item("test_losses.py")]
    gpu_lane.pytest_collection_modifyitems(items)
    assert [i.marks for i in items] == [["gpu"], [], []]

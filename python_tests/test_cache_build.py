"""`kdkernels cache` as a user runs it: signals, kills, several ranks, then `kdkernels distill --cache`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models as tiny

from kdkernels.compression.reader import CacheReader

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("job")
    tiny.write_corpus(root / "data")
    tiny.save(tiny.llama(4), root / "teacher")
    return root


def flags(place: Path, out: Path, *more: object) -> list[str]:
    given = ["--teacher", place / "teacher", "--data", place / "data", "--out", out, "--block-size", 32]
    return [str(x) for x in ("cache", *given, "--k", 24, "--batch-size", 4, *more)]


def blocks_of(cache: Path) -> dict[int, bytes]:
    reader = CacheReader(cache)
    assert reader.verify() == []
    return {number: reader.block(number) for number in reader.ids().tolist()}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """Built in one go."""
    done = tiny.command(*flags(place, place / "whole"), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "tokenizer_hash" in done.stdout
    return place / "whole"


def _start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def _wait(cache: Path, examples: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (cache / "manifest.json").exists() or len(CacheReader(cache)) < examples:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the job makes no progress"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_a_stopped_job_goes_on_to_the_same_cache(
    place: Path, whole: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    cut = tmp_path / "cut"
    process = _start([sys.executable, "-m", "kdkernels", *flags(place, cut, "--commit-every", 0)])
    _wait(cut, 8, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signum
        assert "stopped by SIGTERM with" in errors
        assert "go on with --resume" in errors
    some = blocks_of(cut)
    assert 8 <= len(some) < len(blocks_of(whole)), "stopped too late to mean anything"
    done = tiny.command(*flags(place, cut, "--resume", "--quiet"), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert blocks_of(cut) == blocks_of(whole)


@pytest.mark.soak
def test_ranks_of_torchrun_write_one_cache(place: Path, whole: Path, tmp_path: Path) -> None:
    """Killed once on the way: parts that are left are merged, and the missing blocks shared out anew."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    job = [sys.executable, "-m", "kdkernels", *flags(place, tmp_path / "all", "--commit-every", 0)]
    process = _start([*torchrun, "--nproc-per-node", "3", *job])
    _wait(tmp_path / "all" / "parts" / "rank-00001-of-00003", 4, process)
    process.terminate()
    process.communicate(timeout=90)
    left = sum(len(CacheReader(part)) for part in (tmp_path / "all" / "parts").iterdir())
    assert 4 <= left < len(blocks_of(whole))
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *job, "--resume"],
        capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "all" / "parts").exists()
    assert blocks_of(tmp_path / "all") == blocks_of(whole)


def test_distill_from_the_cache_on_the_command_line(place: Path, whole: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    tiny.save(tiny.llama(2, seed=1), student)
    options = ["--student", student, "--data", place / "data", "--block-size", 32, "--steps", 6, "--batch-size", 2]
    options += ["--lr", 3e-3, "--eval-blocks", 2, "--output", tmp_path / "run"]
    done = tiny.command("distill", "--cache", whole, *options, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["cache"] == str(whole)
    assert summary["teacher"] == str(place / "teacher")
    for name, score in summary["after"].items():
        assert score["kl"] < summary["before"][name]["kl"]
        assert score["teacher_ppl"] is None
    assert "-" in done.stdout.splitlines()[1].split(), "the teacher's perplexity is not known"

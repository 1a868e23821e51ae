"""Losses over vocabulary shards, on 2, 3 and 4 processes: one start of the processes serves all cases."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from kdkernels import shard_pages

FOLDER = Path(__file__).parent
FILES = ("shard_cases.py", "shard_dtensors.py", "shard_faults.py", "shard_sparse.py")
CASES = "".join((FOLDER / name).read_text(encoding="utf-8") for name in FILES)
NAMES = re.findall(r"^def case_(\w+)", CASES, re.MULTILINE)


JOBS = ("cases:2", "cases:3", "cases:4", "killed:3", "late:3", "mesh:4")

pytestmark = pytest.mark.slow


SAID: dict[str, list[dict[str, str]]] = {}


def told(job: str) -> list[dict[str, str]]:
    """What each rank has to say; one that was killed says nothing. All jobs run at the first question."""
    if SAID:
        return SAID[job]
    with tempfile.TemporaryDirectory() as folder:
        run_all(folder)
        for name in JOBS:
            files = (Path(folder, f"{name}.{rank}") for rank in range(int(name[-1])))
            SAID[name] = [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files]
    return SAID[job]


def run_all(folder: str) -> None:
    command = [sys.executable, "-W", "ignore", str(FOLDER / "shard_worker.py"), folder, *JOBS]
    path = os.pathsep.join([str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(command, text=True, env=settings, start_new_session=True)
    try:
        assert process.wait(timeout=300) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks of a test that hangs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards(size: int, name: str) -> None:
    for rank, results in enumerate(told(f"cases:{size}")):
        assert results.get(name, "not run, as a case before it failed") == "", f"rank {rank}: {results.get(name)}"


@pytest.mark.parametrize("fault", ["killed", "late"])
def test_a_peer_that_is_gone_is_an_error_within_the_timeout(fault: str) -> None:
    ranks = told(f"{fault}:3")
    for rank in range(2):
        assert "a collective of the vocabulary shards failed" in ranks[rank]["error"], ranks
        assert float(ranks[rank]["seconds"]) < 10
    assert (ranks[2] == {}) == (fault == "killed")


def test_data_and_tensor_parallel_training_of_a_transformer() -> None:
    for results in told("mesh:4"):
        assert results["mesh"] == "", results["mesh"]


def test_a_wrong_argument_is_told_although_the_exchange_fails() -> None:
    class Gone:
        def gather(self, x: torch.Tensor) -> None:
            raise RuntimeError("a peer died")

    for error, words in ((ValueError("temperature"), "temperature"), (None, "a peer died")):
        with pytest.raises(type(error or RuntimeError()), match=words):
            shard_pages.exchange(Gone(), "{}", error, torch.device("cpu"))  # type: ignore[arg-type]

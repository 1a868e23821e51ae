"""Losses over vocabulary shards, on 2, 3 and 4 processes: one start of the processes serves all cases."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NAMES = re.findall(r"^def case_(\w+)", (FOLDER / "shard_cases.py").read_text(encoding="utf-8"), re.MULTILINE)


def start(size: int, suite: str, **environment: str) -> list[dict[str, str]]:
    """What each rank's process has to say; those that were killed say nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(FOLDER / "shard_worker.py")]
        path = os.pathsep.join([str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH", "")])
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(size), f"{folder}/store", suite],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=settings,
            )  # fmt: skip
            for rank in range(size)
        ]
        try:
            outputs = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
    lines = [out.strip().splitlines()[-1:] for out, _ in outputs]
    crashed = [err[-3000:] for (_, err), p in zip(outputs, processes, strict=True) if p.returncode not in (0, -9)]
    assert not crashed, crashed[0]
    return [json.loads(line[0]) if line else {} for line in lines]


@functools.cache
def results(size: int) -> list[dict[str, str]]:
    return start(size, "cases")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards(size: int, name: str) -> None:
    for rank, told in enumerate(results(size)):
        assert told.get(name, "not run, as a case before it failed") == "", f"rank {rank}: {told.get(name)}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "late"])
def test_a_peer_that_is_gone_is_an_error_within_the_timeout(fault: str) -> None:
    told = start(3, "dead", KD_TEST_FAULT=fault)
    for rank in range(2):
        assert "a collective of the vocabulary shards failed" in told[rank]["error"], told
        assert float(told[rank]["seconds"]) < 10
    assert (told[2] == {}) == (fault == "killed")


@pytest.mark.slow
def test_data_and_tensor_parallel_training_of_a_transformer() -> None:
    for told in start(4, "mesh"):
        assert told["mesh"] == "", told["mesh"]

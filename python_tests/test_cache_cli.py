"""`kdkernels cache verify | stat | merge | import`: what they print and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import cache_cases as cases
import numpy as np
import pytest

from kdkernels import cli
from kdkernels.compression.reader import CacheReader

# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    out, errors = capsys.readouterr()
    return status, out, errors


def test_verify_stat_and_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        cases.build(tmp_path / f"part{rank}", range(rank, 20, 2), metadata={"seed": 3})
    parts = [tmp_path / "part0", tmp_path / "part1"]
    status, out, _ = run(capsys, "cache", "merge", tmp_path / "all", *parts)
    assert (status, out) == (0, f"{tmp_path / 'all'}: 20 examples taken in, 20 in all\n")
    status, out, _ = run(capsys, "cache", "merge", tmp_path / "all", *parts)
    assert out.endswith("0 examples taken in, 20 in all\n")
    status, out, _ = run(capsys, "cache", "verify", tmp_path / "all", "--quiet")
    assert (status, out) == (0, f"{tmp_path / 'all'}: 20 examples, every checksum right\n")
    status, out, _ = run(capsys, "cache", "stat", tmp_path / "all")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["examples"] == "20"
    assert lines["metadata.seed"] == "3"
    assert lines["teacher"] == "somebody"
    status, out, _ = run(capsys, "cache", "stat", tmp_path / "all", "--json")
    assert json.loads(out) == CacheReader(tmp_path / "all").stat()
    shard = next((tmp_path / "all").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.unlink()  # a link to the part's
    shard.write_bytes(data)
    status, out, _ = run(capsys, "cache", "verify", tmp_path / "all", "--quiet")
    assert status == 1
    assert out.count("\n") == 1
    assert "is damaged: the checksum of example" in out


def test_import_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "files").mkdir()
    for i in range(cases.EXAMPLES):
        ids, log_probs, log_tail = cases.example(i)
        np.savez(tmp_path / "files" / f"{i}.npz", ids=ids, log_probs=log_probs, log_tail=log_tail)
    line = [
        "cache",
        "import",
        tmp_path / "files",
        "--out",
        tmp_path / "c",
        "--format",
        "arrays",
        "--bits",
        32,
        "--quiet",
    ]
    status, out, errors = run(capsys, *line, "--vocab-size", cases.VOCAB, "--teacher", "x")
    assert status == 0, errors
    assert "examples" in out
    cases.close(CacheReader(tmp_path / "c").read(2), 2)
    status, _, errors = run(capsys, *line, "--vocab-size", cases.VOCAB)
    assert status == 2
    assert "must be new, it is a cache of 4 examples; go on with resume=True (--resume)" in errors
    status, _, errors = run(capsys, *line, "--vocab-size", 9, "--resume")
    assert status == 2
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["cache"], "teacher is ''; allowed: a folder, a file or a name; give --teacher"),
        (["cache", "--k", "many"], "invalid int value: 'many'"),
        (["cache", "build", "--out", "x", "--teacher", "y"], "data is ''"),
        (["cache", "frobnicate"], "invalid choice: 'frobnicate'"),
        (["cache", "stat"], "the following arguments are required: CACHE"),
        (["cache", "verify", "/no/such"], "path = '/no/such': must be a teacher cache, it is no folder"),
        (["cache", "merge", "/no/such", "/none"], "path = '/none': must be a teacher cache"),
        (["cache", "import", "/no", "--out", "x", "--format", "arrays"], "required: --vocab-size"),
        (["cache", "--config", "nowhere.json"], "config is 'nowhere.json'; no such file"),
        (["cache", "--steps", "3"], "unrecognized arguments: --steps 3"),
    ],
)
def test_wrong_commands_are_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, errors = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert text in errors
    assert errors.count("\n") == 1

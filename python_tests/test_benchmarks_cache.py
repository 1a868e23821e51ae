"""The cache's benchmark at a size that takes a moment: everybody reads what was written, the figures are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are in a checkout only")
from benchmarks import cache


def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(cache, "SHARD", 3)
    monkeypatch.setattr(cache, "LENGTH", 16)
    out = tmp_path / "out.json"
    assert cache.main(["--examples", "7", "--rounds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    names = {"cache", "reader", "block", "safetensors", "parquet-1", "parquet-64"}
    assert set(found["access_us"]) == names
    assert all(times["warm"][0] > 0 and times["cold"][0] > 0 for times in found["access_us"].values())
    assert found["bytes_per_token"]["ours"] < 300 < found["bytes_per_token"]["safetensors"]
    assert set(found["write_mb_s"]) == {"ours", "safetensors", "parquet-1", "parquet-64"}
    assert capsys.readouterr().out.count("\n") == len(names) + 1


def test_a_reader_that_gives_something_else_is_noticed(tmp_path: Path) -> None:
    rows = cache.examples(3)
    with pytest.raises(AssertionError, match="other"):
        cache.check({"other": lambda number: (rows[0].ids, rows[1].log_probs)}, rows)

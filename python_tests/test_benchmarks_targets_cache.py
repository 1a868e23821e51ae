"""Aims of selection, codec and cache: what a result says, and that docs/cache.md says no more."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are in a checkout only")
from benchmarks import targets_cache as aims
from benchmarks.targets import Finding


def of(found: dict[str, Any], word: str) -> list[Finding]:
    return [finding for finding in aims.select(found) if word in finding.what]


def test_aims_of_selection() -> None:
    found = aims.committed("select-cpu.json")
    alone = of(found, "torch.topk alone")
    assert sorted({finding.limit for finding in alone}) == [5.5, 9.0]
    assert len(alone) == 2 * 4  # two dtypes, k = 8, 64, 256, 1024
    both = of(found, "torch.topk + logsumexp")
    assert sorted(finding.limit for finding in both) == [12.0, 25.0]
    assert [finding.limit for finding in of(found, "times the floor")] == [2.1, 2.1]
    assert [finding.limit for finding in of(found, "hardest rows")] == [3.0] * 6
    slow = copy.deepcopy(found)
    for entry in slow["times"]:
        entry["times_ours"]["torch.topk"] = [8.9, 8.0, 9.0, 9]
        entry["over_floor"]["ours"] = [2.2, 2.0, 2.3, 9]
    for entry in slow["hard_rows"]:
        entry["over_random"]["constant"] = [3.1, 3.0, 3.2, 5]
    assert [finding.met for finding in of(slow, "torch.topk alone")] == [f.limit == 5.5 for f in alone]
    assert not any(finding.met for finding in (*of(slow, "the floor"), *of(slow, "(constant)")))
    assert len(of(slow, "(constant)")) == 6


def test_aims_of_codec_and_cache() -> None:
    found = aims.committed("codec-cpu.json")
    ids = [finding for finding in aims.codec(found) if "bytes of ids" in finding.what]
    assert {finding.limit for finding in ids} == {1.06, 1.15}
    assert all(finding.limit == (1.15 if "k = 1024" in f.what or "k = 256 of 49152" in f.what else 1.06)
               for f, finding in zip(ids, ids, strict=True))  # fmt: skip
    assert all(finding.met for finding in (*aims.codec(found), *aims.cache(aims.committed("cache-cpu.json"))))
    worse = copy.deepcopy(found)
    for entry in worse["sizes"]:
        entry["bytes"], entry["mean_kl"], entry["max_kl"] = 186.0, 2e-4, 2e-2
        entry["id_bytes"] = 1.2 * entry["bound"]
    for entry in worse["speed"]:
        entry["decode_mb_s"] = 299
    assert not any(finding.met for finding in aims.codec(worse))
    found = aims.committed("cache-cpu.json")
    found["access_us"]["cache"]["warm"] = [101.0, 90.0, 110.0, 15]
    assert [finding.met for finding in aims.cache(found)][1] is False


def test_committed_results_make_the_committed_page() -> None:
    assert aims.page() == aims.DOC.read_text(encoding="utf-8"), "run python -m benchmarks.targets_cache --write"


def test_what_is_missed_is_said() -> None:
    missed = [finding for finding in aims.findings() if not finding.met]
    text = aims.DOC.read_text(encoding="utf-8")
    assert f"{len(aims.findings()) - len(missed)} of {len(aims.findings())} are met" in text
    for finding in missed:
        assert f"- {finding.what}: {finding.value:.4g}" in text

"""The bounds of top-k selection: what is counted, and what is said."""

from __future__ import annotations

from typing import Any

import cuda_topk
import pytest
import torch

from benchmarks import model, topk
from benchmarks.devices import DEVICES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cuda_topk.obstacle()), reason=cuda_topk.obstacle() or "can be had"),
]


def test_each_logit_is_read_once_and_rows_are_alike() -> None:
    (step,) = topk.steps(torch.bfloat16, 8, 90, 8192)
    assert 32 * step.load_sectors == pytest.approx(2)
    assert step.store_sectors * 32 < 0.1
    one = topk.entry("bf16", 8, DEVICES["h100"], rows=100, vocab=8192)
    two = topk.entry("bf16", 8, DEVICES["h100"], rows=200, vocab=8192)
    assert two["bound_ms"] == pytest.approx(2 * one["bound_ms"], rel=1e-3)
    assert one["floor_ms"] == pytest.approx(1e3 * 100 * 8192 * 2 / 3.35e12, rel=1e-3)
    assert one["torch_reads_ms"] == pytest.approx(2 * one["floor_ms"], rel=1e-3)
    assert one["bound_ms"] >= one["floor_ms"]


def test_the_bench_command_prints_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"case": "topk-k8-bf16-1x8", "per_logit": dict.fromkeys(model.FIGURES, 1.0), "bound_ms": 2.0}
    small |= {"bound_by": "memory", "floor_ms": 1.0, "torch_reads_ms": 2.0, "steps": []}

    def entry(name: str, k: int, device: Any) -> dict[str, Any]:
        return small

    monkeypatch.setattr(topk, "entry", entry)
    assert model.main("h100", "topk") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("H100 SXM 80 GB: a bound computed from compiled code, not a measured time")
    assert "topk-k8-bf16-1x8" in shown

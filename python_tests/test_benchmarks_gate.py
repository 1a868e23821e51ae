"""The bounds of the gate: what is counted, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
from cuda_gate import obstacle

from benchmarks import gate_model, model
from benchmarks.devices import DEVICES

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "can be had")]


def test_each_pair_is_read_twice_once_from_memory() -> None:
    vocab = 65536
    one = gate_model.entry("bf16", 3, DEVICES["h100"], vocab)
    assert one["launches"] == 2
    assert one["floor_us"] == pytest.approx(1e6 * 3 * vocab * 4 / 3.35e12, rel=1e-3)
    assert one["two_softmaxes_us"] == pytest.approx(3 * one["floor_us"], rel=1e-3)
    assert one["bound_us"] >= one["cached_us"] >= one["floor_us"]
    first, second = one["steps"]
    assert 32 * first["first_sectors"] == pytest.approx(4)
    assert second["first_sectors"] == 0
    assert 2 * 4 <= 32 * one["per_pair"]["load_sectors"] <= 2.5 * 4  # blocks read each other's sums


def test_the_bench_command_prints_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small: dict[str, Any] = {"case": "gate-bf16-1x8", "launches": 2, "per_pair": dict.fromkeys(model.FIGURES, 1.0)}
    small |= {"bound_us": 3.0, "cached_us": 2.0, "cached_by": "issue", "floor_us": 1.0, "two_softmaxes_us": 4.0}
    monkeypatch.setattr(gate_model, "entry", lambda *_: small)
    assert model.main("h100", "gate") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("H100 SXM 80 GB: a bound computed from compiled code, not a measured time")
    assert "gate-bf16-1x8" in shown

"""What the codec's benchmark measures, and that its committed result keeps to what was promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
benchmark = pytest.importorskip("benchmarks.codec", reason="needs the checkout")


def test_added_kl_is_the_difference_of_two_divergences_of_the_whole_teacher() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (5, 200))
    lp = logits - np.logaddexp.reduce(logits, 1)[:, None]
    k, p = 20, np.exp(lp)
    ids = np.argsort(-lp, 1)[:, :k]
    exact = np.take_along_axis(lp, ids, 1)
    tail = np.log(1 - np.exp(exact).sum(1))[:, None]
    moved = exact + rng.normal(0, 0.05, exact.shape)
    moved += np.log((1 - np.exp(tail)) / np.exp(moved).sum(1, keepdims=True))  # its mass is the kept one again

    def whole(kept: np.ndarray) -> np.ndarray:
        """KL(teacher || kept entries, and the tail spread evenly over the rest)."""
        q = np.broadcast_to(tail - np.log(200 - k), lp.shape).copy()
        np.put_along_axis(q, ids, kept, 1)
        return np.asarray((p * (lp - q)).sum(1))

    np.testing.assert_allclose(benchmark.added_kl(exact, moved), whole(moved) - whole(exact), atol=1e-12)


def test_the_bound() -> None:
    assert benchmark.id_bound(3, 10) == pytest.approx(np.log2(120) / 8)


def test_the_committed_result_is_of_three_domains() -> None:
    result = json.loads((ROOT / "benchmarks/results/codec-cpu.json").read_text())
    assert result["rows"]["domains"] == ["code", "docs", "speeches"]

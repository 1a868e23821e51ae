"""benchmarks/compare.py: what is timed is the pass of `compare_models`, over the tokens that are claimed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models as tiny

pytest.importorskip("transformers")

from benchmarks import compare
from kdkernels.data import pack


def test_both_sides_see_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(1, 300, 512).astype(np.int32)
    blocks = {name: pack([tokens[:300], tokens[300:]], 32, 0) for name in ("a", "b")}
    kept = []
    whole = compare.summarise
    monkeypatch.setattr(compare, "summarise", lambda tallies, *a, **k: kept.append(tallies) or whole(tallies, *a, **k))
    teacher, student = tiny.llama(1).eval(), tiny.llama(1, seed=1).eval()
    sample = compare.measure(teacher, student, blocks, batch=2, batches=3, rounds=2)
    assert sample["tokens"] == 3 * 2 * 32
    counted = sum(float(tally.sums[0, :, -1].sum()) for tally in kept[0].values())
    assert counted == 2 * 3 * 2 * 31 - 2 * counted_starts(blocks)  # twice: two rounds
    found = compare.report({**sample, "forwards": 2.0, "pass": 2.1, "bootstrap": 0.0})
    assert found["overhead"] == pytest.approx(0.05)
    assert found["overhead_100k"] == pytest.approx(0.05)


def counted_starts(blocks: dict[str, object]) -> int:
    """Labels that are ignored behind a block's first: none of the six blocks holds a later document's start."""
    return sum(int((part[i]["labels"][1:] == -100).sum()) for part, n in ((blocks["a"], 4), (blocks["b"], 2))
               for i in range(n))  # fmt: skip

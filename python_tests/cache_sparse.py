"""What the tests of `kd.TeacherCache` share: examples as `SparseLogits`, a small cache, equality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cache_cases as cases
import torch

import kdkernels as kd
from kdkernels.sparse_logits import SparseLogits


def sparse(number: int, rows: int = cases.ROWS, k: int = cases.K, **options: Any) -> SparseLogits:
    ids, log_probs, log_tail = map(torch.from_numpy, cases.example(number, rows, k))
    return SparseLogits(ids, log_probs, log_tail, cases.VOCAB, **options)


def create(path: Path, **options: Any) -> kd.TeacherCache:
    return kd.TeacherCache.create(path, **{"vocab_size": cases.VOCAB, "k": cases.K, "bits": 32, **options})


def equal(a: SparseLogits, b: SparseLogits) -> None:
    for name in ("ids", "log_probs", "log_tail"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
    assert (a.vocab_size, a.temperature, a.kind) == (b.vocab_size, b.temperature, b.kind)

"""Rows for the codec's tests: teachers' distributions of many shapes, as numpy arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Arguments of `codec.encode`."""

    ids: np.ndarray
    log_probs: np.ndarray
    log_tail: np.ndarray
    vocab_size: int


def make(n: int, k: int, vocab: int, *, seed: int = 0, varied: bool = False) -> Rows:
    """n rows of up to k entries of a Zipf-like teacher: normalised with the tail, ids at random."""
    rng = np.random.default_rng([seed, n, k, vocab])
    ids = np.full((n, k), -1, np.int32)
    log_probs = np.full((n, k), -np.inf)
    log_tail = np.full(n, -np.inf)
    for row in range(n):
        count = int(rng.integers(0, k + 1)) if varied else k
        ids[row, :count] = np.sort(rng.choice(vocab, count, replace=False))
        scores = -rng.uniform(0.7, 2.2) * np.log(np.arange(1, count + 1)) + rng.normal(0, 0.5, count)
        tail = rng.uniform(0.001, 0.4) if count < vocab else 0.0
        if count:
            log_probs[row, :count] = rng.permutation(scores) - np.logaddexp.reduce(scores) + np.log1p(-tail)
        with np.errstate(divide="ignore"):
            log_tail[row] = np.log(tail) if count else 0.0
    return Rows(ids, np.minimum(log_probs, 0).astype(np.float32), log_tail.astype(np.float32), vocab)


def added_divergence(rows: Rows, decoded: np.ndarray) -> np.ndarray:
    """KL(teacher || decoded) of each row in nats: the tail is kept exactly, so only kept entries add to it."""
    p = np.exp(rows.log_probs.astype(np.float64))
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (rows.log_probs.astype(np.float64) - decoded), 0.0)
    return np.asarray(terms.sum(1))

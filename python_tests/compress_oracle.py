"""What selection must give, in float64 from the definition; rows that are hard for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import SparseLogits


class Golden(NamedTuple):
    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    entropy: Tensor


def golden(logits: Tensor, k: int, temperature: float = 1.0) -> Golden:
    """The k largest of each row ``[N, V]``, ties by the lower id, ids ascending, padded where fewer are finite."""
    z = logits.double()
    values, order = z.sort(dim=-1, descending=True, stable=True)
    log_p = torch.log_softmax((values - values[:, :1]) / temperature, -1)
    kept = values[:, :k] > -torch.inf
    ids = torch.where(kept, order[:, :k], z.shape[1]).sort(-1)
    tail = log_p[:, k:]
    top = tail.amax(-1, keepdim=True) if tail.shape[1] else log_p.new_full((z.shape[0], 1), -torch.inf)
    safe = torch.where(top == -torch.inf, 0.0, top)
    log_tail = (tail - safe).exp().sum(-1).log() + safe[:, 0]
    return Golden(
        torch.where(ids.values == z.shape[1], -1, ids.values),
        torch.where(kept, log_p[:, :k], -torch.inf).gather(-1, ids.indices),
        log_tail,
        -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1),
    )


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest error relative to ``1 + |expected|``; infinities must agree."""
    found, expected = found.double(), expected.double()
    same = found == expected
    error = (found - expected).abs() / (1 + expected.abs())
    return float(torch.where(same, 0.0, error).nan_to_num(torch.inf).amax()) if found.numel() else 0.0


def check(found: SparseLogits, expected: Golden, tolerance: float = 1e-6) -> None:
    """Ids exactly, numbers to `tolerance`."""
    assert torch.equal(found.ids.long(), expected.ids)
    assert apart(found.log_probs, expected.log_probs) <= tolerance
    assert apart(found.log_tail, expected.log_tail) <= tolerance
    if found.entropy is not None:
        assert apart(found.entropy, expected.entropy) <= tolerance


def hard_rows(vocab: int, k: int) -> dict[str, Tensor]:
    """Rows that an approximate threshold, or a fixed grouping of entries, does badly on."""
    generator = torch.Generator().manual_seed(vocab * 31 + k)
    i = torch.arange(vocab)
    noise = torch.randn(vocab, generator=generator)
    eighth = max(1, vocab // 8)
    return {
        "random": 3 * noise,
        "ascending": i * 1e-4,
        "descending": -i * 1e-4,
        "constant": torch.ones(vocab),
        "negative zeros": torch.where(i % 2 == 0, 0.0, -0.0),
        "two values": torch.where(noise > 0, 1.0, -1.0),
        "ties at the threshold": (3 * noise).clamp(-20, 4),
        "one entry": torch.where(i == vocab // 2, 60.0, 0.0),
        "one entry, peaked": torch.where(i == vocab // 2, 600.0, noise),
        "peaked": 100 * noise,
        "sawtooth": (i % 512) * 0.01,
        "bunched groups": torch.where(i % 1024 < 64, 10.0, 0.0) + 0.1 * noise,
        "bunched half": (i % eighth) / eighth * 8 + 1e-3 * noise,
        "sampled positions poisoned": torch.where(i % 32 == 0, -1e4, 3 * noise),
        "first stripes low": torch.where(i % 1024 < 960, -50.0, 3 * noise),
        "half masked": torch.where(i % 2 == 0, -torch.inf, 3 * noise),
        "few finite": torch.where(i % max(1, vocab // 5) == 0, noise, -torch.inf),
        "lowest": torch.where(i % 3 == 0, torch.finfo(torch.float32).min, noise),
        "shifted": 3 * noise + 8192,
    }

"""What top-k on a GPU must give: the definition in float64, and how near to it a call has to come."""

from __future__ import annotations

import numpy as np
import torch
from cuda_topk import Head, Kept
from torch import Tensor


def select(logits: Tensor, k: int, head: Head | None = None) -> dict[str, Tensor]:
    """The definition, in float64: stable sort, log-softmax over the row, tails summed from their own entries.

    Entries are compared before the soft cap, which leaves their order alone, in float32 as the leaf does.
    """
    head = head or Head()
    shift = torch.zeros(()) if head.bias is None else head.bias[: logits.shape[1]]
    compared = head.scale * (logits.float() + shift) + 0.0  # -0 is 0
    z = compared.double()
    if head.softcap:  # it makes finite numbers of infinite ones
        compared = compared.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
        z = head.softcap * torch.tanh(z / head.softcap)
    order = compared.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bad = compared.isnan().any(-1) | (compared == torch.inf).any(-1) | (compared == -torch.inf).all(-1)
    chosen = torch.zeros(z.shape, dtype=torch.bool).scatter_(1, order, True) & (compared > -torch.inf)
    ids = torch.where(chosen.gather(1, order), order, torch.iinfo(torch.int64).max).sort(-1).values
    there = ids < z.shape[1]
    ids = torch.where(there & ~bad[:, None], ids, -1)

    def log_p(temperature: float) -> Tensor:
        return torch.log_softmax(z / temperature, -1)

    def tail(temperature: float) -> Tensor:
        return torch.logsumexp(log_p(temperature).masked_fill(chosen, -torch.inf), -1)

    lp = log_p(head.temperature)
    kept = torch.where(there, lp.gather(1, ids.clamp(0)), -torch.inf)
    result = {
        "ids": ids,
        "log_probs": torch.where(bad[:, None], torch.nan, kept),
        "log_tail": torch.where(bad, torch.nan, tail(head.temperature)),
        "entropy": -(lp.exp() * lp).nan_to_num(nan=0.0).sum(-1).masked_fill(bad, torch.nan),
    }
    if head.others:
        columns = [torch.where(bad, torch.nan, tail(t)) for t in head.others]
        result["other_tails"] = torch.stack(columns, -1)
    return result


def assert_right(kept: Kept, logits: Tensor, k: int, head: Head | None = None, tolerance: float = 2e-6) -> None:
    """Ids as defined; every other number within `tolerance`, relative where it exceeds 1 in size. With a soft cap come
    4 units in the last place of the largest logit, as tanh is within 2."""
    expected, head = select(logits, k, head), head or Head()
    least = min(head.temperature, *head.others) if head.others else head.temperature
    tolerance += 4 * 2.0**-24 * head.softcap / least
    wrong = (kept.ids.long() != expected["ids"]).any(-1).nonzero().flatten().tolist()
    assert not wrong, f"ids of rows {wrong[:5]}: {kept.ids[wrong[:1]]}, not {expected['ids'][wrong[:1]]}"
    for name in ("log_probs", "log_tail", "entropy", "other_tails"):
        found = getattr(kept, name)
        if found is not None:
            close(name, found, expected[name], tolerance)


def close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """NaN and infinities (of float32) in the same places, the rest within the tolerance."""
    infinite = expected.float().isinf()
    a, b = found.double().numpy(), torch.where(infinite, expected.sign() * torch.inf, expected).numpy()
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0, np.abs(a - b) / np.maximum(1, np.abs(b)))
    worst = float(np.nan_to_num(error, nan=np.inf).max(initial=0))
    assert worst <= tolerance, f"{name}: off by {worst:.3g}"

"""Textbook float64 formulas of the SWITCH gate and of sampling. Torch only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def jsd_bits(zs: Tensor, zt: Tensor) -> Tensor:
    """Half the two divergences from the mean, ``[B]``, in bits."""
    q, p = (torch.softmax(z.double(), -1) for z in (zs, zt))
    m = (p + q) / 2
    # xlogy of a ratio, not a difference of logarithms: nothing is lost where p and q are nearly equal
    near = (p - q).abs() < 1e-3 * m
    r = (p - q) / (p + q).clamp(min=1e-300)
    series = m * (r**2 / 2 + r**4 / 12 + r**6 / 30)
    halves = (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)) / 2
    terms = torch.where(m == 0, 0.0, torch.where(near, series, halves.nan_to_num()))
    return terms.sum(-1) / math.log(2)


def distribution(z: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Of one row ``z [V]`` what may be drawn, by sorting; equal entries enter by lower id."""
    p = torch.softmax(z.double() / temperature, -1)
    if top_k is None and top_p is None:
        return p
    order = z.double().sort(descending=True, stable=True).indices.tolist()
    allowed = order[: top_k or len(order)]
    total, mass, nucleus = float(p[allowed].sum()), 0.0, []
    for i in allowed:
        if top_p is not None and mass >= top_p * total:
            break
        nucleus.append(i)
        mass += float(p[i])
    kept = torch.zeros_like(p)
    kept[nucleus] = p[nucleus]
    return kept / kept.sum()


def token(p: Tensor, u: float) -> tuple[int, float]:
    """The entry of a distribution ``[V]`` at the number u, and how far u is from the nearest edge of the CDF."""
    edges = p.cumsum(-1)
    at = int((edges <= u).sum())
    return at, float((edges - u).abs().min())

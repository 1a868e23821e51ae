"""SWITCH generation as a textbook writes it: one prompt, no cache, no padding, float64, every distribution whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Told:
    """What the loop generated and saw, a list entry per token."""

    tokens: list[int] = field(default_factory=list)
    from_teacher: list[bool] = field(default_factory=list)
    jsd: list[float] = field(default_factory=list)
    student: list[float] = field(default_factory=list)
    teacher: list[float] = field(default_factory=list)
    margin: float = 1.0
    """How far the nearest draw lay from an edge of its cumulative distribution."""


def jsd_bits(p: Tensor, q: Tensor) -> float:
    """1/2 KL(p || m) + 1/2 KL(q || m), m the mean, in bits."""
    m = (p + q) / 2
    terms = [torch.where(x > 0, x * (x / m).log2(), 0.0).sum() for x in (p, q)]
    return float(sum(terms)) / 2


def warped(z: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The distribution that is drawn from, ``[V]``."""
    p = (z / temperature).softmax(-1)
    order = p.argsort(descending=True, stable=True)
    if top_k is not None:
        p[order[top_k:]] = 0
        p = p / p.sum()
    if top_p is not None:
        ranked = p[order]
        p[order[ranked.cumsum(0) - ranked >= top_p]] = 0
        p = p / p.sum()
    return p


def generate(
    student: Any, teacher: Any, prompt: list[int], uniforms: list[float], tau: Callable[[int], float],
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, stops: tuple[int, ...] = (),
    vocab: int | None = None, sample: bool = True,
) -> Told:  # fmt: skip
    """One response of at most ``len(uniforms)`` tokens."""
    told, tokens = Told(), list(prompt)
    for step, uniform in enumerate(uniforms):
        with torch.no_grad():
            zs, zt = (
                m(torch.tensor([tokens]), use_cache=False).logits[0, -1, :vocab].double() for m in (student, teacher)
            )
        q, p = zs.softmax(-1), zt.softmax(-1)
        told.jsd.append(jsd_bits(p, q))
        told.from_teacher.append(told.jsd[-1] > tau(step))
        mass = warped(zt if told.from_teacher[-1] else zs, temperature, top_k, top_p)
        cdf = mass.cumsum(0)
        token = int((cdf > uniform).nonzero()[0, 0]) if sample else int(mass.argmax())
        told.margin = min(told.margin, float((cdf - uniform).abs().min()))
        told.student.append(math.log(q[token]))
        told.teacher.append(math.log(p[token]))
        told.tokens.append(token)
        tokens.append(token)
        if token in stops:
            break
    return told

"""Contestants: who computes the same loss, each in its best documented setting, one file per package.

A contestant is built for a case and then run on the case's inputs; it returns the mean loss over tokens,
undifferentiated. Its `value` says what the number is: torchtune's forward "KL" leaves out the teacher's entropy, with
the same gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.shapes import MAIN, Case

Loss = Callable[[Inputs], Tensor]

FILES = ("ours", "eager", "compiled", "torchtune", "liger", "trl")


@dataclass(frozen=True)
class Contestant:
    """One way to compute the loss.

    Attributes:
        name: "package" or "package:setting"; names of ours begin with "ours".
        build: case -> loss function of the case's inputs.
        source: where the setting is documented.
        ops, divergences, dtypes: what it computes.
        value: "divergence", or "cross_entropy" where the loss is D plus the teacher's entropy.
        arithmetic: "fp32" if bf16 logits are widened before the softmax, "input" if computed in the input's dtype.
        packages: modules it needs beyond torch.
        compiled: calls torch.compile, which takes seconds per shape.
        overwrites: leaves its gradient in the student's logits.
    """

    name: str
    build: Callable[[Case], Loss]
    source: str
    ops: tuple[str, ...] = ("dense",)
    divergences: tuple[str, ...] = MAIN
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    value: str = "divergence"
    arithmetic: str = "fp32"
    packages: tuple[str, ...] = field(default=())
    compiled: bool = False
    overwrites: bool = False

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]

    def serves(self, case: Case) -> bool:
        """Whether it computes this case."""
        return case.op in self.ops and case.divergence in self.divergences and case.dtype in self.dtypes


def everyone() -> list[Contestant]:
    """All contestants, ours first, installed or not."""
    return [c for name in FILES for c in importlib.import_module(f"benchmarks.rivals.{name}").CONTESTANTS]


def contestants(case: Case) -> list[Contestant]:
    """Who computes this case, installed or not."""
    return [c for c in everyone() if c.serves(case)]


LARGE = 100_000
"""V from which fused heads take seconds, and some rivals a minute."""
LEFT_OUT = {
    "fp32": ("trl:chunked", "liger:uncompiled", "torchtune:chunked", "eager:mean"),
    "bf16": ("trl:chunked", "liger:uncompiled", "torchtune:chunked", "eager:mean", "eager:bf16"),
}
"""Not timed on fused heads of that size: slow variants of packages whose faster one is timed, and TRL's, which takes
ten times as long as the others where it is timed."""


def absent(contestant: Contestant, case: Case) -> str:
    """Why a contestant that computes a case is not measured on it, "" if it is."""
    missing = contestant.missing()
    if missing:
        return f"not installed: {', '.join(missing)}"
    if case.op == "linear" and case.V > LARGE and contestant.name in LEFT_OUT[case.dtype]:
        return "left out for its time; measured at the smaller vocabulary"
    return ""

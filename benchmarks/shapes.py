"""The cases: which op, divergence, sizes and dtype are measured."""

from __future__ import annotations

from dataclasses import dataclass

ITEMSIZE = {"fp32": 4, "bf16": 2}

MAIN = ("forward_kl", "reverse_kl", "jsd")
"""Divergences with rivals. `jsd` is at beta = 1/2."""

OTHERS = {
    "skew_kl": (0.1, 0.0),
    "skew_reverse_kl": (0.1, 0.0),
    "total_variation": (0.0, 0.0),
    "alpha_beta": (0.2, 0.7),
    "adaptive_kl": (0.5, 0.0),
}
"""Divergences that only eager code computes elsewhere, with the parameters they are measured at."""

PARAMETERS = {"forward_kl": (0.0, 0.0), "reverse_kl": (0.0, 0.0), "jsd": (0.5, 0.0), **OTHERS}


@dataclass(frozen=True)
class Case:
    """One measured call: forward and backward of a mean loss.

    Attributes:
        op: "dense" (logits in) or "linear" (hidden states and heads in).
        divergence: name as `kd.distillation_loss` takes it; parameters in `PARAMETERS`.
        dtype: "fp32" or "bf16".
        N, V: tokens, vocabulary.
        H, Ht: hidden sizes of student and teacher; 0 for dense.
        chunk_bytes: budget for one chunk of both sides' logits; 0 for dense.
    """

    op: str
    divergence: str
    dtype: str
    N: int
    V: int
    H: int = 0
    Ht: int = 0
    chunk_bytes: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of one logit."""
        return ITEMSIZE[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Bytes of one N x V tensor of logits: the unit in which memory is reported."""
        return self.N * self.V * self.itemsize

    @property
    def id(self) -> str:
        """One word per property, for command lines and JSON."""
        return f"{self.op}-{self.divergence}-{self.dtype}-{self.N}x{self.V}"


def _dense(names: tuple[str, ...], V: int, N: int = 512) -> list[Case]:
    return [Case("dense", name, dtype, N, V) for dtype in ITEMSIZE for name in names]


def _linear(names: tuple[str, ...], V: int, dtype: str, N: int = 2048) -> list[Case]:
    """V = 32000 in one chunk, V = 128256 in several (512 MiB: 1046 rows of bf16, 523 of fp32)."""
    chunk_bytes = (1024 if V < 100000 else 512) * 2**20
    return [Case("linear", name, dtype, N, V, H=1024, Ht=2048, chunk_bytes=chunk_bytes) for name in names]


FULL = [
    *(case for V in (32000, 128256) for case in _dense(MAIN, V)),
    *(case for V in (32000, 128256) for case in _dense(tuple(OTHERS), V)),
    *(case for dtype in ITEMSIZE for V in (32000, 128256) for case in _linear(("forward_kl", "jsd"), V, dtype)),
]

QUICK = [
    *_dense(("forward_kl", "jsd"), V=32000, N=128),
    Case("linear", "jsd", "bf16", 256, 8192, H=256, Ht=512, chunk_bytes=4 * 2**20),
]

KEPT = [
    case
    for case in FULL
    if case.divergence in MAIN and (case.op == "dense" or (case.dtype == "bf16" and case.V == 32000))
]
"""Measured with the second allocator too: fused heads are bound by products, one size shows that it hardly matters."""

MEMORY = [
    Case("dense", "forward_kl", "fp32", 512, 128256),
    Case("dense", "jsd", "bf16", 512, 128256),
    *_linear(("jsd",), 32000, "bf16"),
    *_linear(("forward_kl", "jsd"), 128256, "bf16"),
    *_linear(("jsd",), 128256, "bf16", N=4096),
]
"""Cases whose peak memory is measured; the last one shows whether it is flat in N."""


def select(cases: list[Case], words: str) -> list[Case]:
    """Cases whose id holds every one of the comma-separated words.

    Raises:
        ValueError: none does.
    """
    wanted = [word for word in words.split(",") if word]
    found = [case for case in cases if all(word in case.id for word in wanted)]
    if not found:
        raise ValueError(f"cases={words!r} matches none of {', '.join(case.id for case in cases)}")
    return found


@dataclass(frozen=True)
class Effort:
    """How long a case is measured: rounds, seconds per contestant, and the first run after which there is no other."""

    rounds: int
    budget: float
    patience: float


def effort(case: Case, quick: bool) -> Effort:
    """Fused heads are slow and steady; dense losses fast, and their page faults uneven."""
    if quick:
        return Effort(3, 0.5, 2.0)
    if case.op == "linear":
        slow = case.dtype == "fp32" and case.V > 100000  # ten seconds a run and more
        return Effort(3, 22.0, 30.0) if slow else Effort(5, 8.0, 12.0)
    return Effort(11, 2.0, 8.0) if case.divergence in MAIN else Effort(7, 1.0, 8.0)

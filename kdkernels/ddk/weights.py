"""How much of the next interval's data each domain gets (arXiv 2407.16154, Eq. 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kdkernels._checks import fail, require_choice, require_finite_number

VARIANTS = ("ddk", "no_smoothing", "equal")


class DomainWeights:
    """Sampling weights of domains from the perplexities of student and teacher.

    The first `update` gives ``softmax(x)`` of the discrepancies ``x = student perplexity / teacher perplexity``
    (Eq. 1); every further one smooths (Eq. 2): ``psi = r * exp(x); r = alpha * psi / sum(psi) + (1 - alpha) / N``, so
    that from then on ``(1 - alpha) / N <= r <= alpha + (1 - alpha) / N``. Computed in log space: perplexity ratios
    beyond 88 would overflow a float32 exponential, beyond 709 a float64 one.

    Args:
        domains: their names, in the order that ``weights`` keeps.
        alpha: smoothing in [0, 1]; the paper's 0.5.
        variant: ``"ddk"``; ``"no_smoothing"``, Eq. 1 at every update; ``"equal"``, 1 / N always.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(self, domains: Iterable[str], alpha: float = 0.5, *, variant: str = "ddk") -> None:
        self.domains = tuple(domains)
        if isinstance(domains, str) or not self.domains or not all(isinstance(d, str) and d for d in self.domains):
            fail(
                TypeError, "domains", repr(domains), "a list of names, at least one", "DomainWeights(['code', 'prose'])"
            )
        twice = sorted({d for d in self.domains if self.domains.count(d) > 1})
        if twice:
            fail(ValueError, "domains", list(self.domains), f"of different names; {twice[0]!r} comes twice")
        require_finite_number("alpha", alpha)
        if not 0 <= alpha <= 1:
            fail(ValueError, "alpha", alpha, "in [0, 1]", "the paper takes 0.5")
        require_choice("variant", variant, VARIANTS)
        self.alpha, self.variant = float(alpha), variant
        self.updates = 0
        self.discrepancies: dict[str, float] = {}
        """x of the latest update, by domain."""
        self._log = [-math.log(len(self.domains))] * len(self.domains)

    @property
    def weights(self) -> dict[str, float]:
        """Share of each domain; they sum to 1. Equal before the first update."""
        return {name: math.exp(value) for name, value in zip(self.domains, self._log, strict=True)}

    def update(self, student_ppl: Mapping[str, float], teacher_ppl: Mapping[str, float]) -> dict[str, float]:
        """Take in perplexities measured on the same text by domain; returns the new ``weights``.

        Raises:
            ValueError: a domain without a perplexity, one that is not a finite number above 0, a domain nobody knows.
                Nothing is changed then.
        """
        x = [self._discrepancy(name, student_ppl, teacher_ppl) for name in self.domains]
        for what, given in (("student_ppl", student_ppl), ("teacher_ppl", teacher_ppl)):
            unknown = sorted(set(given) - set(self.domains))
            if unknown:
                fail(ValueError, what, f"{unknown[0]!r}: {given[unknown[0]]}", f"of the domains {list(self.domains)}")
        self._log = self._next(x)
        self.discrepancies = dict(zip(self.domains, x, strict=True))
        self.updates += 1
        return self.weights

    def _discrepancy(self, name: str, student: Mapping[str, float], teacher: Mapping[str, float]) -> float:
        found = []
        for what, given in (("student_ppl", student), ("teacher_ppl", teacher)):
            value = given.get(name)
            if value is None:
                fail(ValueError, what, f"without domain {name!r}", f"one number for each of {list(self.domains)}")
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                remedy = "measure it on held-out text of the domain; a model that diverged has none"
                fail(ValueError, f"{what}[{name!r}]", value, "a finite number > 0", remedy)
            found.append(float(value))
        ratio = found[0] / found[1]
        if not math.isfinite(ratio):
            fail(ValueError, f"student_ppl[{name!r}] / teacher_ppl[{name!r}]", ratio, "finite", "see both perplexities")
        return ratio

    def _next(self, x: list[float]) -> list[float]:
        """Logarithms of the new weights."""
        count = len(x)
        if self.variant == "equal":
            return [-math.log(count)] * count
        if self.updates == 0 or self.variant == "no_smoothing":
            return _log_softmax(x)
        raised = _log_softmax([log + value for log, value in zip(self._log, x, strict=True)])
        if self.alpha == 1:
            return raised
        floor = math.log((1 - self.alpha) / count)
        if self.alpha == 0:
            return [floor] * count
        return [_log_add(math.log(self.alpha) + value, floor) for value in raised]

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, as plain JSON values."""
        return {
            "domains": list(self.domains),
            "alpha": self.alpha,
            "variant": self.variant,
            "updates": self.updates,
            "log_weights": list(self._log),
            "discrepancies": dict(self.discrepancies),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state of the same domains and settings."""
        for name in ("domains", "alpha", "variant"):
            ours = list(self.domains) if name == "domains" else getattr(self, name)
            if state[name] != ours:
                fail(ValueError, f"state[{name!r}]", state[name], f"{ours!r}", "build DomainWeights as it was then")
        self.updates = int(state["updates"])
        self._log = [float(value) for value in state["log_weights"]]
        self.discrepancies = dict(state["discrepancies"])

    def __repr__(self) -> str:
        """Settings and shares."""
        shares = ", ".join(f"{name}: {share:.3f}" for name, share in self.weights.items())
        return f"DomainWeights(alpha={self.alpha}, variant={self.variant!r}, updates={self.updates}; {shares})"


def _log_softmax(x: list[float]) -> list[float]:
    top = max(x)
    log_sum = math.log(math.fsum(math.exp(value - top) for value in x))
    return [value - top - log_sum for value in x]


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))

"""DDK over a whole run: measure, weigh, draw, and show the course of the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdkernels._checks import fail
from kdkernels.ddk.perplexity import Collate, measure_perplexity
from kdkernels.ddk.sampler import DomainSampler
from kdkernels.ddk.weights import DomainWeights


class DomainSchedule:
    """Which domain the data of each interval comes from (arXiv 2407.16154, Algorithm 1).

    The first interval draws domains equally; after each one the student is measured again, the weights are updated,
    and the next interval draws by them.

    Args:
        datasets: training data, a map-style dataset by domain.
        held_out: validation data by the same names (the paper takes 500 samples a domain).
        interval: draws between two measurements, over all ranks: the paper's K = 1000 steps times the samples of one.
        teacher: a causal language model, measured once; or its perplexities by domain (where it has another tokenizer,
            whose ids held_out does not hold).
        alpha, variant: of `DomainWeights`.
        unit: of `measure_perplexity`; ``"byte"`` where student and teacher have different tokenizers.
        seed, rank, world_size: of `DomainSampler`. Under a Trainer leave rank and world_size at 0 and 1.
        batch_size, collate, cache, backend: of `measure_perplexity`; the cache keeps the teacher's.
        progress: bars on stderr while measuring.

    Raises:
        ValueError: names that differ between datasets, held_out and the teacher's perplexities.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        held_out: Mapping[str, Any],
        *,
        interval: int,
        teacher: Any,
        alpha: float = 0.5,
        variant: str = "ddk",
        unit: str = "token",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 8,
        collate: Collate | None = None,
        cache: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        progress: bool = False,
    ) -> None:
        self.weights = DomainWeights(datasets, alpha, variant=variant)
        self.sampler = DomainSampler(datasets, interval=interval, seed=seed, rank=rank, world_size=world_size)
        _same_names("held_out", held_out, self.weights.domains)
        self.held_out = dict(held_out)
        self._options: dict[str, Any] = {
            "unit": unit, "batch_size": batch_size, "collate": collate, "backend": backend, "progress": progress,
        }  # fmt: skip
        self._teacher, self._cache = teacher, cache
        self._teacher_ppl: dict[str, float] | None = None
        if isinstance(teacher, Mapping):
            _same_names("teacher", teacher, self.weights.domains)
            self._teacher_ppl = dict(teacher)
        self.history: list[dict[str, Any]] = []
        """A row per measurement: step, weights from there on, discrepancy, student_ppl."""

    @property
    def teacher_ppl(self) -> dict[str, float]:
        """The teacher's perplexities; measured at the first call."""
        if self._teacher_ppl is None:
            self._teacher_ppl = measure_perplexity(self._teacher, self.held_out, cache=self._cache, **self._options)
        return self._teacher_ppl

    def remeasure(self, student: Any, step: int) -> dict[str, Any]:
        """Measure the student and set the next interval's weights; returns the new row of ``history``."""
        return self.update(measure_perplexity(student, self.held_out, **self._options), step)

    def update(self, student_ppl: Mapping[str, float], step: int) -> dict[str, Any]:
        """Set the next interval's weights from perplexities measured elsewhere; returns the new row of ``history``."""
        shares = self.weights.update(student_ppl, self.teacher_ppl)
        self.sampler.set_weights(shares)
        row = {
            "step": step,
            "weights": shares,
            "discrepancy": dict(self.weights.discrepancies),
            "student_ppl": dict(student_ppl),
        }
        self.history.append(row)
        return row

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Plain JSON values; ``consumed`` as in `DomainSampler.state_dict`."""
        return {
            "weights": self.weights.state_dict(),
            "sampler": self.sampler.state_dict(consumed),
            "teacher_ppl": self._teacher_ppl,
            "history": list(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same draws, in the middle of an interval too."""
        self.weights.load_state_dict(state["weights"])
        self.sampler.load_state_dict(state["sampler"])
        self._teacher_ppl = state["teacher_ppl"] or self._teacher_ppl
        self.history = list(state["history"])

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """The course of weights and discrepancies as a picture; needs matplotlib (``kdkernels[plots]``)."""
        return draw_course(self.history, self.weights.domains, Path(path))


def _same_names(what: str, given: Mapping[str, Any], domains: tuple[str, ...]) -> None:
    if set(given) != set(domains):
        fail(ValueError, what, sorted(given), f"for the domains {sorted(domains)}")


def draw_course(history: list[dict[str, Any]], domains: tuple[str, ...], path: Path) -> Path:
    """Two panels over the steps: share of each domain (stairs: an interval keeps its weights), discrepancy."""
    from kdkernels.optional import need

    need("matplotlib", "drawing")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    shares, gaps = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in history]
    begin = dict.fromkeys(domains, 1 / len(domains))
    for name in domains:
        shares.step([0, *steps], [begin[name], *(row["weights"][name] for row in history)], where="post", label=name)
        gaps.plot(steps, [row["discrepancy"][name] for row in history], marker="o", markersize=3, label=name)
    shares.set(ylabel="share of the data", ylim=(0, None))
    shares.legend(fontsize="small")
    gaps.set(ylabel="student / teacher perplexity", xlabel="step")
    for axis in (shares, gaps):
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path

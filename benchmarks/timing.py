"""Medians of alternating runs.

A round runs every contestant once or a few times in turn (A A B B C, A A B B C, ...), so that a machine that slows down
slows all of them. A ratio is the median over rounds of the ratio within a round, with its quartiles; times are
medians of the rounds' medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Sampler = Callable[[], float]
"""Prepares one run (untimed), runs it, returns its seconds."""

VISIT_SECONDS = 0.08
"""A contestant is repeated within a round until about this much time has passed, at most `MOST_REPEATS` times."""
MOST_REPEATS = 4


@dataclass(frozen=True)
class Spread:
    """Median with quartiles, and how many values it is of."""

    median: float
    low: float
    high: float
    n: int

    def as_list(self) -> list[float]:
        """[median, low, high, n] for JSON, 4 significant digits."""
        return [*(float(f"{value:.4g}") for value in (self.median, self.low, self.high)), self.n]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value (with two, the quartiles are the values).

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("spread of no values: every contestant needs at least one round")
    ordered = sorted(values)
    if len(ordered) < 4:
        return Spread(statistics.median(ordered), ordered[0], ordered[-1], len(ordered))
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(statistics.median(ordered), low, high, len(ordered))


def ratio(rounds: Sequence[float], against: Sequence[float]) -> Spread:
    """rounds / against, round by round, over the rounds that both took part in (the first ones)."""
    return spread([a / b for a, b in zip(rounds, against, strict=False)])


@dataclass
class Alternation:
    """Runs samplers in turn and keeps each round's median seconds.

    Args:
        samplers: by name, in the order in which a round runs them.
        rounds: how many rounds there will be.
        budget: seconds one contestant may take over all rounds, warm-up apart; a slow one drops out after that.
        patience: a contestant whose warm-up alone took longer than this is not run again: that run stands for it.
    """

    samplers: dict[str, Sampler]
    rounds: int
    budget: float
    patience: float = float("inf")
    medians: dict[str, list[float]] = field(default_factory=dict)
    _spent: dict[str, float] = field(default_factory=dict)
    _last: dict[str, float] = field(default_factory=dict)

    def warm_up(self, name: str) -> float:
        """The first run: it pages in memory and compiles what there is to compile. Returns its seconds."""
        seconds = self.samplers[name]()
        self.medians[name] = [seconds] if seconds > self.patience else []
        self._spent[name] = self.budget if seconds > self.patience else 0.0
        self._last[name] = seconds
        return seconds

    def drop(self, name: str) -> None:
        """Takes a contestant out: it was wrong, so it has no time."""
        self._last.pop(name, None)
        self.medians.pop(name, None)

    def _takes_part(self, name: str) -> bool:
        """At least one round, a second if the budget is not spent, more while another fits into it."""
        done, spent = len(self.medians[name]), self._spent[name]
        return not done or (spent < self.budget and (done == 1 or spent + self._last[name] <= self.budget))

    def round(self) -> None:
        """Runs each contestant that still takes part."""
        for name, last in self._last.items():
            if self._takes_part(name):
                repeats = max(1, min(MOST_REPEATS, int(VISIT_SECONDS / max(last, 1e-9))))
                runs = [self.samplers[name]() for _ in range(repeats)]
                self._last[name] = statistics.median(runs)
                self._spent[name] += sum(runs)
                self.medians[name].append(self._last[name])

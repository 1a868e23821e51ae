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
        budget: seconds one contestant may take over all rounds; a slow one drops out after that, with at least
            one round (its warm-up run then stands for it, if even one is too slow).
    """

    samplers: dict[str, Sampler]
    rounds: int
    budget: float
    medians: dict[str, list[float]] = field(default_factory=dict)
    _plan: dict[str, tuple[int, int]] = field(default_factory=dict)
    _round: int = 0

    def plan(self, name: str, seconds: float) -> tuple[int, int]:
        """(rounds, repeats within a round) of a contestant that takes this long."""
        rounds = max(1, min(self.rounds, int(self.budget / max(seconds, 1e-9))))
        return rounds, max(1, min(MOST_REPEATS, int(VISIT_SECONDS / max(seconds, 1e-9))))

    def warm_up(self, name: str, first_counts: bool = True) -> float:
        """One run, to warm up and to plan by; it counts as the only round where there is no budget for another.

        Args:
            name: which contestant.
            first_counts: False if this run compiled something: then it is run once more.
        """
        seconds = self.samplers[name]()
        if not first_counts:
            seconds = self.samplers[name]()
        if seconds > self.budget / 2:
            self._plan[name], self.medians[name] = (0, 0), [seconds]
        else:
            self._plan[name], self.medians[name] = self.plan(name, seconds), []
        return seconds

    def drop(self, name: str) -> None:
        """Takes a contestant out: it was wrong, so it has no time."""
        self._plan.pop(name, None)
        self.medians.pop(name, None)

    @property
    def rounds_needed(self) -> int:
        """Rounds until the last contestant has had its share, at least one."""
        return max([1, *(rounds for rounds, _ in self._plan.values())])

    def round(self) -> None:
        """Runs each contestant that still takes part."""
        for name, (rounds, repeats) in self._plan.items():
            if self._round < rounds:
                self.medians[name].append(statistics.median(self.samplers[name]() for _ in range(repeats)))
        self._round += 1

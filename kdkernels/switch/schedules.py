"""Threshold schedules of SWITCH: how far the student may stray from the teacher before the teacher speaks.

A schedule is any callable ``(step, state) -> threshold``: ``step`` counts generated tokens from 0, ``state`` is the
`SwitchState` of what was generated so far, the threshold is a number or one number per row ``[B]``, in bits. The
teacher speaks where the divergence exceeds it, strictly. The divergence lies in [0, 1]: at a threshold of 1 or more the
gate is closed and the student speaks, below 0 it is open and the teacher does.

Sources: SWITCH (arXiv 2410.19503, Table 3), AdaSwitch (arXiv 2510.07842) for `MovingAverage`, adaptive conformal
inference (arXiv 2106.00170) for the rule of `TargetShare`. For SWITCH only the exponential schedule's formula is
published; parameters, unless said otherwise, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kdkernels._checks import fail, require_choice, require_finite_number
from kdkernels.switch.state import SwitchState

Schedule: TypeAlias = Callable[[int, SwitchState], "float | Tensor"]

OPEN, CLOSED = -1.0, 1.0
"""Thresholds at which the teacher, or the student, speaks whatever the divergence."""
_ALMOST_CLOSED = 1 - 2**-24


@dataclass(frozen=True)
class Exponential:
    """``tau0 * exp(-decay * step)``: the student opens the sequence, the teacher watches ever more closely."""

    tau0: float = 1.0
    decay: float = 0.1

    def __post_init__(self) -> None:
        _check_numbers(tau0=self.tau0, decay=self.decay)

    def __call__(self, step: int, state: SwitchState) -> float:
        """The threshold of this step, in bits."""
        return self.tau0 * _exp(-self.decay * step)


@dataclass(frozen=True)
class Linear:
    """``tau0 * (1 - step / max_new_tokens)``: from tau0 down to 0 at the greatest length."""

    tau0: float = 1.0

    def __post_init__(self) -> None:
        _check_numbers(tau0=self.tau0)

    def __call__(self, step: int, state: SwitchState) -> float:
        """The threshold of this step, in bits."""
        return self.tau0 * (1 - step / state.max_new_tokens)


@dataclass(frozen=True)
class Constant:
    """One threshold for every token; the paper's is .2. `CLOSED` gives the student alone, `OPEN` the teacher alone."""

    tau0: float = 0.2

    def __post_init__(self) -> None:
        _check_numbers(tau0=self.tau0)

    def __call__(self, step: int, state: SwitchState) -> float:
        """The threshold, in bits."""
        return self.tau0


@dataclass(frozen=True)
class Growth:
    """``min(1, tau0 * exp(decay * step))``: close watch first, then freedom. The paper gives no formula."""

    tau0: float = 0.01
    decay: float = 0.1

    def __post_init__(self) -> None:
        _check_numbers(tau0=self.tau0, decay=self.decay)

    def __call__(self, step: int, state: SwitchState) -> float:
        """The threshold of this step, in bits."""
        return min(1.0, self.tau0 * _exp(self.decay * step))


@dataclass(frozen=True)
class Mixture:
    """No gate: every token is drawn from ``share * teacher + (1 - share) * student`` (the paper's mixture: .2; its
    `random`: .5).

    The row's uniform number chooses the component and, stretched to [0, 1) again, the token in it; ``from_teacher`` is
    the component. The thresholds recorded are those that bring this about, `OPEN` and `CLOSED`.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        _check_share(self.share)

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """``uniforms [B]`` in float64 -> (thresholds ``[B]``, the uniforms that draw within the component ``[B]``)."""
        teacher = uniforms < self.share
        rest = max(1 - self.share, torch.finfo(torch.float64).tiny)
        within = torch.where(teacher, uniforms / (self.share or 1.0), (uniforms - self.share) / rest)
        return torch.where(teacher, OPEN, CLOSED), within.clamp(0, 1 - 2**-53)

    def __call__(self, step: int, state: SwitchState) -> Tensor:
        """Threshold ``[B]`` of this step: `OPEN` where the teacher's component was drawn, else `CLOSED`."""
        return self.draw(state.uniforms[:, step])[0]


@dataclass(frozen=True)
class MovingAverage:
    """``factor`` times the mean divergence of the row so far (AdaSwitch); once the teacher speaks it keeps the floor.

    At the first token, where there is no mean yet, and above 1 the threshold is just under 1: the divergence is then
    always measured, and only disjoint distributions exceed it.
    """

    factor: float = 2.0

    def __post_init__(self) -> None:
        _check_numbers(factor=self.factor)

    def __call__(self, step: int, state: SwitchState) -> Tensor:
        """Threshold ``[B]`` of this step, in bits."""
        mean = state.jsd.nanmean(1) if step else state.live.new_full(state.live.shape, torch.nan, dtype=torch.float64)
        bound = (self.factor * mean).nan_to_num(1.0).clamp(max=_ALMOST_CLOSED)
        return torch.where(state.from_teacher.any(1), OPEN, bound)


@dataclass(frozen=True)
class TargetShare:
    """Keeps the teacher's share of the tokens of each row at ``share``.

    After each token the threshold moves by ``gain * (spoke - share)``, spoke being 1 where the teacher did: it follows
    the divergence's quantile at 1 - share. Whatever the divergences, the share of n tokens is within
    ``(1 + gain) / (gain * n)`` of the target, because the threshold cannot leave [-gain, 1 + gain].
    """

    share: float = 0.2
    gain: float = 0.1
    start: float = 0.5

    def __post_init__(self) -> None:
        _check_share(self.share)
        _check_numbers(gain=self.gain, start=self.start)
        if self.gain <= 0 or not 0 <= self.start <= 1:
            fail(ValueError, "gain, start", f"{self.gain}, {self.start}", "gain > 0 and start in [0, 1]")

    def __call__(self, step: int, state: SwitchState) -> Tensor:
        """Threshold ``[B]`` of this step, in bits."""
        return self.start + self.gain * (state.from_teacher.sum(1).double() - self.share * step)


@dataclass(frozen=True)
class ByDomain:
    """A schedule for each domain; ``domains`` names that of each row of the batch."""

    schedules: Mapping[str, Schedule]
    domains: Sequence[str]

    def __post_init__(self) -> None:
        missing = sorted(set(self.domains) - set(self.schedules))
        if missing:
            fail(ValueError, "domains", missing, f"among the schedules' domains {sorted(self.schedules)}")
        if any(isinstance(s, (Mixture, str)) for s in self.schedules.values()):
            remedy = "a mixture has no threshold; a name becomes an object: Exponential(), Constant(0.3)"
            fail(TypeError, "schedules", dict(self.schedules), "callables that return a threshold", remedy)

    def __call__(self, step: int, state: SwitchState) -> Tensor:
        """Threshold ``[B]`` of this step, in bits."""
        if len(self.domains) != state.live.shape[0]:
            fail(ValueError, "domains", f"{len(self.domains)} names", f"one for each of {state.live.shape[0]} rows")
        found = torch.empty(state.live.shape, dtype=torch.float64, device=state.live.device)
        for name, schedule in self.schedules.items():
            rows = torch.tensor([i for i, d in enumerate(self.domains) if d == name], device=found.device)
            if len(rows):
                value = torch.as_tensor(schedule(step, state), dtype=torch.float64, device=found.device)
                found[rows] = value[rows] if value.dim() else value
        return found


_NAMES: dict[str, tuple[Callable[..., Schedule], tuple[str, ...]]] = {
    "exponential": (Exponential, ("tau0", "decay")),
    "linear": (Linear, ("tau0",)),
    "constant": (Constant, ("tau0",)),
    "growth": (Growth, ("tau0", "decay")),
    "mixture": (Mixture, ("share",)),
    "random": (Mixture, ("share",)),
    "moving_average": (MovingAverage, ("factor",)),
    "target_share": (TargetShare, ("share", "gain")),
}
NAMES = tuple(_NAMES)
"""The schedules that go by a name."""


def schedule_of(schedule: str | Schedule, tau0: float | None = None, decay: float | None = None) -> Schedule:
    """A schedule by name, or as given.

    ``tau0`` is a named schedule's first parameter (for mixture, random and target_share the share, for moving_average
    the factor), ``decay`` its second; None takes the schedule's own default.

    Raises:
        TypeError, ValueError: no such name, or a parameter that the schedule does not have.
    """
    if callable(schedule):
        if tau0 is not None or decay is not None:
            fail(ValueError, "tau0, decay", f"{tau0}, {decay}", "None with a callable schedule", "give it them itself")
        return schedule
    if not isinstance(schedule, str):
        fail(TypeError, "schedule", repr(schedule), "a name or a callable (step, state) -> threshold")
    require_choice("schedule", schedule, NAMES)
    kind, names = _NAMES[schedule]
    given = {"share": 0.5} if schedule == "random" else {}
    for argument, value, place in (("tau0", tau0, 0), ("decay", decay, 1)):
        if value is None:
            continue
        if place >= len(names):
            fail(ValueError, argument, value, f"None: {schedule!r} has no such parameter")
        given[names[place]] = value
    return kind(**given)


def _exp(x: float) -> float:
    """exp, infinite where it would overflow."""
    return math.exp(x) if x < 700 else math.inf


def _check_numbers(**values: float) -> None:
    for name, value in values.items():
        require_finite_number(name, value)
        if name == "decay" and value < 0:
            fail(ValueError, name, value, ">= 0", "for a growing threshold take the schedule 'growth'")


def _check_share(share: float) -> None:
    require_finite_number("share", share)
    if not 0 <= share <= 1:
        fail(ValueError, "share", share, "in [0, 1]", "it is the teacher's part of the tokens")

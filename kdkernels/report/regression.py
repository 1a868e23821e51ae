"""Is a new version worse than an old one? Thresholds from a small file; worse counts beyond the interval only.

[rse]                # a name of `headline.figures`, or a pattern such as "forward_kl.*"
tolerance = 0.05     # how much worse it may be, in its own unit (default 0)
relative = 0.02      # or as a share of the old value; the larger of the two holds
at_most = 1.5        # never worse than this, whatever the old one was (at_least for figures where more is better)
required = true      # unknown is a failure (default false: it is reported)
"""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdkernels.errors import UserError
from kdkernels.evaluation.compare_result import Estimate
from kdkernels.report.headline import EITHER, LESS, Figure
from kdkernels.trainers.config import read_config_file

OK, WORSE, UNKNOWN, MISSING = "as good", "worse", "unknown", "missing"


@dataclass(frozen=True)
class Rule:
    """What is allowed of the figures that `pattern` names."""

    pattern: str
    tolerance: float = 0.0
    relative: float = 0.0
    at_most: float | None = None
    at_least: float | None = None
    required: bool = False


@dataclass(frozen=True)
class Check:
    """One figure: `worse_by` is what the new value is worse by (negative: better), `allowed` what it may be."""

    name: str
    label: str
    old: float | None
    new: float | None
    worse_by: float | None
    allowed: float | None
    verdict: str
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the command has to fail."""
        return self.verdict in (WORSE, MISSING)


def read_rules(path: str | Path) -> list[Rule]:
    """Rules from a .toml or .json file, a table each."""
    found = []
    for pattern, values in read_config_file(path).items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: {pattern} is {values!r}; allowed: a table such as [{pattern}] tolerance = 0.05")
        clean: dict[str, Any] = {}
        for name, value in values.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            least = {"tolerance": 0.0, "relative": 0.0, "at_most": -math.inf, "at_least": -math.inf}.get(name)
            if number and least is not None and value >= least:
                clean[name] = float(value)
            elif name == "required" and isinstance(value, bool):
                clean[name] = value
            else:
                allowed = "tolerance and relative (numbers, 0 or more), at_most, at_least (numbers), required (a bool)"
                raise UserError(f"{path}: {pattern}.{name} is {value!r}; allowed: {allowed}")
        found.append(Rule(pattern, **clean))
    if not found:
        raise UserError(f"{path} holds no rule; give a table for each figure, such as [forward_kl]")
    return found


def check(new: Mapping[str, Figure], old: Mapping[str, Figure], rules: list[Rule] | None) -> list[Check]:
    """Hold the new figures against the old; without rules all with a better way and an interval, with no tolerance.

    Worse means: by more than the tolerance and the two intervals together, the root of the sum of the squares of their
    halves (new's towards better, old's towards worse). That takes the two for independent; where both were measured on
    the same text they are not, and a true difference may be passed over rather than a false one reported.
    """
    if rules is None:
        known = [name for name, f in old.items() if f.better != EITHER and f.estimate.low is not None]
        rules = [Rule(glob.escape(name)) for name in known]
    found = []
    for rule in rules:
        names = [n for n in dict.fromkeys((*old, *new)) if _named(n, rule.pattern)]
        if not names:
            found.append(_unknown(rule, rule.pattern, rule.pattern, "neither version has it"))
        found += [_check(rule, name, new.get(name), old.get(name)) for name in names]
    return found


def _named(name: str, pattern: str) -> bool:
    """Whether a pattern means a figure; - and _ are one, for option files know no difference."""
    return fnmatch.fnmatchcase(name.replace("-", "_"), pattern.replace("-", "_"))


def _unknown(rule: Rule, name: str, label: str, reason: str, old: Estimate | None = None) -> Check:
    verdict = MISSING if rule.required else UNKNOWN
    return Check(name, label, None if old is None else old.value, None, None, None, verdict, reason)


def _check(rule: Rule, name: str, new: Figure | None, old: Figure | None) -> Check:
    label = (new or old or Figure(name, Estimate(None), EITHER)).label
    before = None if old is None else old.estimate
    if new is None:
        return _unknown(rule, name, label, "the new version lacks it", before)
    value = new.estimate.value
    if value is None or not math.isfinite(value):  # measured, and no number came of it: a model that gives NaN
        strict = replace(rule, required=rule.required or (before is not None and before.value is not None))
        return _unknown(strict, name, label, "it is no number in the new version", before)
    beyond = _beyond(rule, new)
    if beyond:
        return Check(name, label, None if old is None else old.estimate.value, value, None, None, WORSE, beyond)
    if old is None or old.estimate.value is None:
        limited = rule.at_most is not None or rule.at_least is not None
        verdict = OK if limited else MISSING if rule.required else UNKNOWN
        return Check(name, label, None, value, None, None, verdict, "the old version lacks it")
    if new.better == EITHER:
        return Check(name, label, old.estimate.value, value, None, None, OK, "neither way is better")
    worse = (old.estimate.value - value) * new.better
    allowed = max(rule.tolerance, rule.relative * abs(old.estimate.value))
    noise = math.hypot(_half(new.estimate, new.better), _half(old.estimate, -new.better))
    verdict = WORSE if worse > allowed + noise + 1e-12 * abs(value) else OK
    reason = "" if verdict == OK else f"beyond {allowed + noise:.4g}: tolerance {allowed:.4g}, intervals {noise:.4g}"
    return Check(name, label, old.estimate.value, value, worse, allowed + noise, verdict, reason)


def _beyond(rule: Rule, new: Figure) -> str:
    """Why a limit is broken, beyond the interval; "" where none is."""
    value = new.estimate.value
    assert value is not None
    low, high = value - _half(new.estimate, LESS), value + _half(new.estimate, -LESS)
    if rule.at_most is not None and low > rule.at_most:
        return f"above {rule.at_most:g}"
    if rule.at_least is not None and high < rule.at_least:
        return f"below {rule.at_least:g}"
    return ""


def _half(estimate: Estimate, way: int) -> float:
    """Length of the interval's half that lies above (way > 0) or below the value; 0 where there is none."""
    end = estimate.high if way > 0 else estimate.low
    if end is None or estimate.value is None:
        return 0.0
    return abs(end - estimate.value)

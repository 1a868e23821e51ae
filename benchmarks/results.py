"""From seconds per round to the entries of the JSON: times beside floors, ratios with spread.

Every time and ratio is a list ``[median, lower quartile, upper quartile, rounds]``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from benchmarks import registry
from benchmarks.shapes import Case
from benchmarks.timing import ratio, spread

FLOOR_PREFIX = "floor:"


def floor_rounds(seconds: dict[str, list[float]]) -> list[float]:
    """The floor of each round: the largest of the limits measured in it."""
    limits = [rounds for name, rounds in seconds.items() if name.startswith(FLOOR_PREFIX)]
    return [max(values) for values in zip(*limits, strict=False)]


def milliseconds(rounds: list[float]) -> list[float]:
    """[median, low, high, n] in ms."""
    s = spread([1e3 * value for value in rounds])
    return s.as_list()


def timed(case: Case, allocator: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Entry of one case under one allocator, from a benchmark's `extra_info`."""
    seconds = extra["seconds"]
    floor = floor_rounds(seconds)
    names = [name for name in seconds if not name.startswith(FLOOR_PREFIX)]
    ours = [name for name in names if name.startswith("ours")]
    return {
        "case": case.id,
        "allocator": allocator,
        **{key: value for key, value in asdict(case).items() if value},
        "least_work": {key: value for key, value in asdict(registry.work(case)).items() if value},
        "floor_ms": milliseconds(floor),
        "limits_ms": {name: milliseconds(seconds[name]) for name in seconds if name.startswith(FLOOR_PREFIX)},
        "ms": {name: milliseconds(seconds[name]) for name in names},
        "over_floor": {name: ratio(seconds[name], floor).as_list() for name in names},
        "times_ours": {
            mine: {name: ratio(seconds[name], seconds[mine]).as_list() for name in names if name not in ours}
            for mine in ours
        },
        "distance_from_eager": extra["errors"],
        "not_timed": extra["out"],
        "disturbance": extra["disturbance"],
    }


def dump(found: dict[str, Any]) -> str:
    """JSON with one line per measured entry: short, and its differences readable."""
    lines = []
    for key, value in found.items():
        if isinstance(value, list):
            entries = ",\n  ".join(json.dumps(entry) for entry in value)
            lines.append(f" {json.dumps(key)}: [\n  {entries}\n ]")
        elif key == "errors":
            lines.append(f" {json.dumps(key)}: " + dump(value).rstrip())
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"

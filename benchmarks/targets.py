"""What the project promises to reach, held against a result: `python -m benchmarks.report --targets`.

Ratios to the floor and to rivals are those of `inplace=True` (no N x V tensor is made, the promise's own condition);
tables show the out-of-place call beside it. A rival's ratio is that of its fastest variant in the case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KL = ("forward_kl", "reverse_kl")
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """One promise on one measurement.

    Attributes:
        what: the measurement in words.
        value, limit: both in the same unit.
        at_most: whether the value may not exceed the limit, or may not be less.
    """

    what: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the promise holds."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def line(self) -> str:
        """One line of text."""
        verdict, sign = "met   " if self.met else "MISSED", "<=" if self.at_most else ">="
        return f"{verdict} {self.value:9.4g} {sign} {self.limit:<7.4g} {self.what}"


def _fastest(entry: dict[str, Any], mine: str, names: tuple[str, ...]) -> tuple[str, float] | None:
    """The smallest ratio to ours among the named contestants, or those whose name begins so followed by a colon."""
    found = {
        name: values[0]
        for name, values in entry["times_ours"].get(mine, {}).items()
        if name in names or any(word.endswith("*") and name.startswith(word[:-1]) for word in names)
    }
    return min(found.items(), key=lambda item: item[1]) if found else None


def _dense(entry: dict[str, Any]) -> Iterator[Finding]:
    name, dtype, mine = entry["divergence"], entry["dtype"], "ours:inplace"
    if mine not in entry["over_floor"] or (name not in KL and name != "jsd"):
        return
    where = f"{entry['case']}, {entry['allocator']}"
    wide = dtype == "fp32"
    kl = name in KL
    floor = (1.7 if wide else 2.1) if kl else (3.2 if wide else 4.3)
    yield Finding(f"times the floor: {where}", entry["over_floor"][mine][0], floor)
    wanted: list[tuple[tuple[str, ...], float]]
    if kl:
        wanted = [(("compile*",), 5.0 if wide else 8.0), (("eager*",), 25.0 if wide else 20.0)]
    else:
        wanted = [(("compile", "compile:mean"), 12.0), (("compile:bf16",), 10.0)]
    for names, limit in wanted:
        fastest = _fastest(entry, mine, names)
        if fastest:
            yield Finding(f"times faster than {fastest[0]}: {where}", fastest[1], limit, at_most=False)


def _linear(entry: dict[str, Any]) -> Iterator[Finding]:
    where = f"{entry['case']}, {entry['allocator']}"
    if entry["dtype"] == "bf16":
        limit = 1.10 if entry["V"] == 32000 else 1.20
        yield Finding(f"times the bare products: {where}", entry["over_floor"]["ours"][0], limit)
    fastest = _fastest(entry, "ours", ("*",))
    if fastest:
        least = 2.0 if entry["dtype"] == "fp32" else 1.0
        yield Finding(f"times faster than every peer ({fastest[0]} is next): {where}", fastest[1], least, at_most=False)


def _memory(entry: dict[str, Any], case: Any) -> Iterator[Finding]:
    where = f"{entry['case']}, {entry['allocator']}"
    if "error" in entry or not entry["contestant"].startswith("ours"):
        return
    if case.op == "dense":
        yield Finding(f"MiB beyond outputs, {entry['contestant']}: {where}", entry["beyond_outputs_mib"], 6.0)
        return
    chunks = -(-2 * case.logits_bytes // case.chunk_bytes)
    widened = 4 * case.V * case.H / MIB if chunks > 1 and case.dtype != "fp32" else 0.0
    limit = case.chunk_bytes / MIB + widened + 16
    yield Finding(
        f"MiB beyond outputs (chunk, fp32 dW if several chunks, 16): {where}", entry["beyond_outputs_mib"], limit
    )


def _errors(errors: dict[str, list[dict[str, Any]]]) -> Iterator[Finding]:
    for entry in errors["dense"]:
        where = f"{entry['divergence']} {entry['dtype']} {entry['kind']}"
        if entry["dtype"] == "fp32":
            yield Finding(f"loss error: {where}", entry["ours"]["loss"], 1e-6)
            limit = 5e-6 if entry["divergence"] == "total_variation" else 1e-6
            yield Finding(f"gradient error: {where}", entry["ours"]["gradient"], limit)
        else:
            limit = max(2 * entry["rounded"], 1e-6)
            yield Finding(f"gradient error (twice a rounded one's): {where}", entry["ours"]["gradient"], limit)
    for entry in errors["near_convergence"]:
        if entry["divergence"] in (*KL, "jsd"):
            yield Finding(f"relative loss error at KL {entry['kl']:g}: {entry['divergence']}", entry["ours"], 1e-3)


def evaluate(found: dict[str, Any]) -> list[Finding]:
    """All promises that a result can be held against."""
    from benchmarks.shapes import MEMORY

    cases = {case.id: case for case in MEMORY}
    out: list[Finding] = []
    for entry in found.get("time", []):
        out += (_dense if entry["op"] == "dense" else _linear)(entry)
    for entry in found.get("memory", []):
        out += _memory(entry, cases[entry["case"]])
    return out + (list(_errors(found["errors"])) if "errors" in found else [])

"""Tables from the JSON: `python -m benchmarks.report [--json FILE] [--readme] [--targets]`.

`--readme` rewrites what stands between the markers in README.md; `--targets` lists every promise, met or missed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine, targets
from benchmarks.accuracy import KINDS
from benchmarks.shapes import MAIN, OTHERS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
DEFAULT = machine.ROOT / "benchmarks" / "results" / "cpu.json"
LABELS = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD(.5)"}


def number(value: float) -> str:
    """Two significant digits, three from 100 on."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = [" | ".join(head), "|".join(["---", *["--:"] * (len(head) - 1)]), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def best(entry: dict[str, Any], prefix: str) -> str | None:
    """The fastest contestant of a package in a case."""
    names = [name for name in entry["ms"] if name.split(":")[0] == prefix]
    return min(names, key=lambda name: entry["ms"][name][0]) if names else None


def _in_bf16(entry: dict[str, Any], name: str) -> bool:
    """Whether a contestant works in bf16 throughout, and so is less exact."""
    return entry["dtype"] == "bf16" and (name.endswith(":bf16") or name in ("trl:gkd", "liger", "liger:uncompiled"))


def _cell(entry: dict[str, Any], prefix: str, mine: str) -> str:
    """A package's fastest contestant in multiples of ours."""
    name = best(entry, prefix)
    if name is None:
        return "–"
    return number(entry["times_ours"][mine][name][0]) + ("\\*" if _in_bf16(entry, name) else "")


def times_table(
    found: dict[str, Any], op: str, rivals: dict[str, str], mine: str, names: Iterable[str], head: list[str]
) -> str:
    """One row a case; in each cell one value per allocator, in the order of `allocators`.

    Args:
        found: the result.
        op: "dense" or "linear".
        rivals: package -> column title.
        mine: the contestant of ours that everything is compared with.
        names: divergences.
        head: titles of the first columns: case, ms, over the floor, and ms out of place if `mine` is in place.
    """
    by: dict[str, list[dict[str, Any]]] = {}
    for entry in found.get("time", []):
        if entry["op"] == op and entry["divergence"] in names and mine in entry["ms"]:
            by.setdefault(entry["case"], []).append(entry)
    rows = []
    for entries in by.values():
        first = entries[0]
        cells = [[number(e["ms"][mine][0]), number(e["over_floor"][mine][0])] for e in entries]
        if mine == "ours:inplace":
            cells = [[*c, number(e["ms"]["ours"][0])] for c, e in zip(cells, entries, strict=True)]
        cells = [[*c, *(_cell(e, rival, mine) for rival in rivals)] for c, e in zip(cells, entries, strict=True)]
        label = LABELS.get(first["divergence"], first["divergence"])
        rows.append(
            [
                f"{label} {first['N']} x {first['V']} {first['dtype']}",
                *(" / ".join(c) for c in zip(*cells, strict=True)),
            ]
        )
    return table([*head, *rivals.values()], rows) if rows else ""


def memory_table(found: dict[str, Any]) -> str:
    """Peak extra memory with the default allocator: MiB and logits tensors; of each package the leanest variant."""
    columns = ["ours:inplace", "ours", "compile", "eager", "torchtune", "liger", "trl"]
    by: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in found.get("memory", []):
        if entry["allocator"] == "default" and "error" not in entry:
            name = entry["contestant"]
            column = name if name in columns else name.split(":")[0]
            row = by.setdefault(entry["case"], {})
            row[column] = min(row.get(column, entry), entry, key=lambda e: e["extra_mib"])

    def cell(entry: dict[str, Any] | None) -> str:
        if entry is None:
            return "–"
        mib = f"{entry['extra_mib']:.0f}" if entry["extra_mib"] >= 10 else f"{entry['extra_mib']:.1f}"
        return f"{mib} ({entry['logits_tensors']:.2g})"

    rows = [[case, *(cell(row.get(column)) for column in columns)] for case, row in by.items()]
    titles = ["ours, in place", "ours", "torch.compile", "eager", "torchtune", "Liger", "TRL"]
    return table(["peak extra MiB (logits tensors)", *titles], rows)


def error_table(found: dict[str, Any]) -> str:
    """fp32 errors: the worst kind of input for each divergence, and the relative error of the loss near convergence."""
    errors = found["errors"]
    rows = []
    for name in dict.fromkeys(e["divergence"] for e in errors["dense"]):
        here = [e for e in errors["dense"] if e["divergence"] == name]
        row = [name]
        for who in ("ours", "eager"):
            fp32 = [e[who] for e in here if e["dtype"] == "fp32"]
            bf16 = [e[who]["gradient"] / e["rounded"] for e in here if e["dtype"] == "bf16" and e["rounded"] > 1e-9]
            near = [e[who] for e in errors["near_convergence"] if e["divergence"] == name and who in e]
            row += [f"{max(e['loss'] for e in fp32):.0e}", f"{max(e['gradient'] for e in fp32):.0e}"]
            row += [number(max(bf16)), f"{max(near):.0e}"]
        rows.append(row)
    words = ["loss", "gradient", "bf16 gradient / rounded", "loss, relative, near convergence"]
    return table(["worst error", *(f"ours: {w}" for w in words), *(f"eager: {w}" for w in words)], rows)


def setting(found: dict[str, Any]) -> str:
    """The sentence under the tables: machine, versions, limits, commit."""
    m, rates = found["machine"], found["limits"]
    v = m["versions"]
    commit = found["commit"]["id"] or "unknown"
    giga = {name: f"{rate / 1e9:.0f}" for name, rate in rates.items() if isinstance(rate, float)}
    return (
        (
            f"{m['processor']} (family/model {m['family_model']}), {m['threads']} threads, {m['vector']}, "
            f"{m['memory_gib']} GiB; torch {v['torch']}, torchtune {v['torchtune']}, Liger-Kernel {v['liger-kernel']}, "
            f"TRL {v['trl']}; commit {commit[:12]}. Limits of the same run: in-place stream "
            f"{giga['stream_bytes_per_second']} GB/s, read {giga['read_bytes_per_second']} GB/s, exponentials "
            f"{giga['exps_per_second']} G/s, products bf16 {giga['mm_bf16_flops_per_second']} and fp32 "
            f"{giga['mm_fp32_flops_per_second']} GFLOP/s (torch.mm)."
        )
        + "".join(f" Not shown: {case} ({why})." for case, why in found.get("not_shown", {}).items())
        + "".join(
            f" Measured again at commit {commit[:12]}: {'; '.join(cases)}."
            for commit, cases in found.get("measured_again", {}).items()
        )
    )


def allocators(found: dict[str, Any]) -> list[str]:
    """In the order in which cells show them."""
    return list(dict.fromkeys(entry["allocator"] for entry in found.get("time", [])))


def markdown(found: dict[str, Any]) -> str:
    """All tables that the result has entries for."""
    parts = []
    if found.get("time"):
        parts.append(
            f"**Time**, forward + backward, allocator {' / '.join(allocators(found))}; rivals' fastest variant in "
            "multiples of ours, \\* where it computes in bf16 throughout. Floor of dense losses: the larger of three "
            "streams of N x V at the measured in-place rate and two exponentials an element at the measured rate; of "
            "fused ones: the bare products."
        )
        dense = {"compile": "torch.compile", "eager": "eager", "torchtune": "torchtune", "trl": "TRL GKD"}
        head = ["logits", "in place, ms", "over floor", "out of place, ms"]
        parts.append(times_table(found, "dense", dense, "ours:inplace", MAIN, head))
        linear = {**dense, "liger": "Liger", "trl": "TRL chunked"}
        parts.append(times_table(found, "linear", linear, "ours", MAIN, ["fused linear", "ours, ms", "over products"]))
        parts.append(times_table(found, "dense", {"eager": "eager"}, "ours:inplace", OTHERS, head))
    if found.get("memory"):
        parts += ["**Memory**, peak beyond the inputs, outputs included, default allocator.", memory_table(found)]
    if "errors" in found:
        parts += [f"**Error** against float64, the worst of {', '.join(KINDS)} inputs.", error_table(found)]
    return "\n\n".join(part for part in [*parts, aims(found), setting(found)] if part)


def aims(found: dict[str, Any]) -> str:
    """How many of the aims are missed, and of which kind."""
    findings = targets.evaluate(found)
    missed = [finding for finding in findings if not finding.met]
    kinds = sorted({re.split(r"[:,(]", finding.what)[0].strip() for finding in missed})
    if not missed:
        return f"All {len(findings)} aims of `python -m benchmarks.report --targets` are met."
    return (
        f"**Aims missed**: {len(missed)} of {len(findings)} ({'; '.join(kinds)}). "
        "`python -m benchmarks.report --targets` lists them, [docs/cpu.md](docs/cpu.md) says what limits them."
    )


def rewrite(text: str, block: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """README with the block between the markers replaced.

    Raises:
        ValueError: the markers are not there once, in order.
    """
    first, last = markers
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in after:
        raise ValueError(f"README.md must hold {first} and, after it, {last}, once each: put them where the tables go")
    return f"{before}{first}\n{block}\n{last}{after}"


def main(words: list[str] | None = None) -> None:
    """Prints or writes the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=DEFAULT, help="result to read")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    parser.add_argument("--targets", action="store_true", help="list what must be reached, met or missed")
    parser.add_argument("--plot", action="store_true", help="draw the plot beside the JSON")
    options = parser.parse_args(words)
    found = json.loads(options.json.read_text())
    if options.readme:
        readme = machine.ROOT / "README.md"
        readme.write_text(rewrite(readme.read_text(), markdown(found)))
    elif options.targets:
        print("\n".join(finding.line() for finding in targets.evaluate(found)))
    elif options.plot:
        from benchmarks import plot

        plot.draw(found, options.json.with_suffix(".png"))
    else:
        print(markdown(found))


if __name__ == "__main__":
    main()

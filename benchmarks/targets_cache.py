"""Aims of selection, codec and cache against their committed results, and the tables in docs/cache.md.

    python -m benchmarks.targets_cache            every aim, met or missed
    python -m benchmarks.targets_cache --write    rewrites what stands between the markers in docs/cache.md

Selection is timed as `kd.compress` has it: ids, log-probabilities and tail in one call. No path chooses ids alone, so
the whole call is held against `torch.topk` alone too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import machine
from benchmarks.report import rewrite
from benchmarks.targets import Finding

VOCAB, KEPT = 151936, 64
BYTES, MEAN_KL, MAX_KL = 185.0, 1e-4, 1e-2
DECODE_MB_S, EXAMPLE_US = 300.0, 100.0
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
DOC = machine.ROOT / "docs" / "cache.md"
SORTED, BOTH = "torch.topk", "torch.topk + logsumexp"


def select(found: dict[str, Any]) -> Iterator[Finding]:
    """`benchmarks.select`: over the floor, over torch, and on hard rows over random ones."""
    for entry in found["times"]:
        if entry["vocab"] != VOCAB:
            continue
        wide = entry["dtype"] == "fp32"
        where = f"{entry['dtype']} {entry['rows']} x {VOCAB}, k = {entry['k']}"
        if entry["k"] == KEPT:
            yield Finding(f"selection, times the floor: {where}", entry["over_floor"]["ours"][0], 2.1)
            faster, least = entry["times_ours"][BOTH][0], 12.0 if wide else 25.0
            yield Finding(f"selection, times faster than {BOTH}: {where}", faster, least, at_most=False)
        faster, least = entry["times_ours"][SORTED][0], 5.5 if wide else 9.0
        yield Finding(f"selection, times faster than {SORTED} alone: {where}", faster, least, at_most=False)
    for entry in found["hard_rows"]:
        name, (worst, *_) = max(entry["over_random"].items(), key=lambda item: item[1][0])
        where = f"{entry['dtype']}, k = {entry['k']} ({name})"
        yield Finding(f"selection, hardest rows over random ones: {where}", worst, 3.0)


def codec(found: dict[str, Any]) -> Iterator[Finding]:
    """`benchmarks.codec`: bytes, what is lost, speed."""
    for entry in found["sizes"]:
        k, vocab = entry["k"], entry["vocab_size"]
        where = f"k = {k} of {vocab}, {entry['bits']} bits"
        if entry["bits"] == 8:
            limit = 1.06 if 400 * k <= vocab else 1.15
            yield Finding(f"codec, bytes of ids over log2 C(V, k): {where}", entry["id_bytes"] / entry["bound"], limit)
        if (vocab, k, entry["bits"]) == (VOCAB, KEPT, 8):
            yield Finding(f"codec, bytes a token: {where}", entry["bytes"], BYTES)
            yield Finding(f"codec, mean added KL, nats: {where}", entry["mean_kl"], MEAN_KL)
            yield Finding(f"codec, largest added KL, nats: {where}", entry["max_kl"], MAX_KL)
    for entry in found["speed"]:
        where = f"k = {entry['k']}, {entry['bits']} bits"
        yield Finding(f"codec, decoded MB/s of a core: {where}", entry["decode_mb_s"], DECODE_MB_S, at_most=False)


def cache(found: dict[str, Any]) -> Iterator[Finding]:
    """`benchmarks.cache`: one example of 512 tokens, k = 64, from a random order."""
    for name in ("reader", "cache"):
        yield Finding(f"cache, us to an example, warm: {name}", found["access_us"][name]["warm"][0], EXAMPLE_US)


AIMS: dict[str, Callable[[dict[str, Any]], Iterator[Finding]]] = {
    "select-cpu.json": select,
    "codec-cpu.json": codec,
    "cache-cpu.json": cache,
}


def committed(name: str) -> dict[str, Any]:
    """A result of benchmarks/results."""
    found: dict[str, Any] = json.loads((machine.ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    return found


def findings() -> list[Finding]:
    """All aims on the committed results."""
    return [finding for name, aims in AIMS.items() for finding in aims(committed(name))]


def select_table(found: dict[str, Any]) -> str:
    """One line a dtype and k, at V = 151936."""
    rivals = (SORTED, BOTH, "compiled")
    lines = [
        f"| V = {VOCAB} | ms | times the floor | " + " | ".join(f"{name}, times ours" for name in rivals) + " |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found["times"]:
        if entry["vocab"] == VOCAB:
            cells = [f"{entry['dtype']}, {entry['rows']} rows, k = {entry['k']}", f"{entry['ms']['ours'][0]:.2f}"]
            cells.append(f"{entry['over_floor']['ours'][0]:.2f}")
            cells += [f"{entry['times_ours'][name][0]:.1f}" for name in rivals]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def block() -> str:
    """What docs/cache.md holds between the markers."""
    all_found = findings()
    missed = [finding for finding in all_found if not finding.met]
    about = committed("select-cpu.json")
    cores, processor = about["machine"]["cores"], about["machine"]["processor"]
    lines = [
        select_table(about),
        "",
        f"`kd.compress` on {cores} cores of an {processor}: ids, log-probabilities and tail in one call. The floor is",
        "the slower of reading the logits once and one exponential a logit.",
        "",
        f"Aims (`python -m benchmarks.targets_cache`): {len(all_found) - len(missed)} of {len(all_found)} are met.",
    ]
    lines += ["Missed:", ""] if missed else []
    lines += [
        f"- {finding.what}: {finding.value:.4g} where {'at most' if finding.at_most else 'at least'} "
        f"{finding.limit:.4g} was the aim"
        for finding in missed
    ]
    return "\n".join(lines)


def page() -> str:
    """docs/cache.md as the committed results make it."""
    return rewrite(DOC.read_text(encoding="utf-8"), block(), (BEGIN, END))


def main(words: list[str] | None = None) -> None:
    """Prints or writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets_cache")
    parser.add_argument("--write", action="store_true", help="rewrite the measured part of docs/cache.md")
    if parser.parse_args(words).write:
        DOC.write_text(page(), encoding="utf-8")
    else:
        print("\n".join(finding.line() for finding in findings()))


if __name__ == "__main__":
    main()

"""Bytes, loss and speed of the codec: `python -m benchmarks.codec [--folder DIR] [--out FILE]`.

Writes benchmarks/results/codec-cpu.json. ``sizes``: bytes a token and what is lost, by vocabulary, k and bits, in
blocks of 512 rows; V = 49152 is SmolLM2's own vocabulary, 151936 has its entries at ids drawn at random, which is the
codec's worst case. ``speed``: one thread. Definitions:

- added_kl: sum over kept entries of ``p (log p - log q) + q - p`` in nats, p the teacher, q decoded. With the tail kept
  exactly this is KL(teacher || decoded ghost distribution) less the same with nothing quantised, and for those who do
  not keep the mass (float16) the generalised divergence, which is never negative.
- bound: log2 C(V, k) / 8, the bytes that the cheapest code of k ids spread at random takes.
- pairs: int32 id and float16 log-probability of each entry. distillkit: the two settings of its README ("recommended",
  "budget pick"), size from its own formula (ids of ceil(log2 V) bits by falling probability, exact_k of 16 bits,
  polynomial coefficients of 32); loss from a least-squares fit of those terms made here, its mass set right.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.codec_rows import LENGTH, Captured, Rows, capture, select
from benchmarks.timing import spread
from kdkernels.compression import codec

RESULT = machine.ROOT / "benchmarks" / "results" / "codec-cpu.json"
KEPT = (8, 16, 64, 256, 1024)
BITS = (4, 6, 7, 8, 10, 12, 16, 32)
VOCABULARIES = (49152, 151936)
DISTILLKIT = {"recommended": (128, 16, (0, 1, 2, 3, 4, 0.5)), "budget pick": (50, 1, (0, 1, 0.5))}
"""k, exact_k, powers of the polynomial."""


def id_bound(k: int, vocab_size: int) -> float:
    """Bytes of log2 C(V, k)."""
    choices = math.lgamma(vocab_size + 1) - math.lgamma(k + 1) - math.lgamma(vocab_size - k + 1)
    return choices / math.log(2) / 8


def added_kl(exact: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Of each row, nats; both [n, k] log-probabilities in one order."""
    p, q = np.exp(exact), np.exp(decoded.astype(np.float64))
    return np.asarray((p * (exact - decoded) + q - p).sum(1))


def _losses(exact: list[np.ndarray], decoded: list[np.ndarray]) -> dict[str, float]:
    added = np.concatenate([added_kl(a, b) for a, b in zip(exact, decoded, strict=True)])
    error = max(np.abs(a - b).max() for a, b in zip(exact, decoded, strict=True))
    figures = {"mean_kl": added.mean(), "max_kl": added.max(), "largest_error": error}
    return {name: float(f"{value:.3g}") for name, value in figures.items()}


def encode(rows: Rows, bits: int) -> bytes:
    return codec.encode(rows.ids, rows.log_probs, rows.log_tail, vocab_size=rows.vocab_size, bits=bits)


def _size(windows: list[Captured], k: int, vocab_size: int, bits: int) -> dict[str, Any]:
    rows = [select(window, k, vocab_size) for window in windows]
    blocks = [encode(r, bits) for r in rows]
    tokens = LENGTH * len(blocks)
    ids = sum(codec.inspect(block).id_bits for block in blocks) / 8 / tokens
    losses = _losses([r.exact for r in rows], [codec.decode(block).log_probs for block in blocks])
    return {
        "vocab_size": vocab_size, "k": k, "bits": bits, "bytes": round(sum(map(len, blocks)) / tokens, 2),
        "id_bytes": round(ids, 2), "bound": round(id_bound(k, vocab_size), 2), **losses,
    }  # fmt: skip


def _pairs(windows: list[Captured], k: int) -> dict[str, Any]:
    """Pairs of int32 and float16; their size and loss know nothing of the vocabulary."""
    rows = [select(window, k, window.vocab_size) for window in windows]
    losses = _losses([r.exact for r in rows], [r.log_probs.astype(np.float16) for r in rows])
    return {"k": k, "bytes": 6 * k, **losses}


def _distillkit(windows: list[Captured], name: str, vocab_size: int) -> dict[str, Any]:
    k, exact_k, powers = DISTILLKIT[name]
    size = (k * math.ceil(math.log2(vocab_size)) + 7) // 8 + 2 * exact_k + 4 * len(powers)
    positions = np.arange(k - exact_k, dtype=np.float64)
    terms = np.stack([positions**power for power in powers], 1)
    exact, decoded = [], []
    for window in windows:
        given = window.log_probs[:, :k]
        curve = given[:, exact_k:] @ np.linalg.pinv(terms).T @ terms.T
        first = torch.from_numpy(given[:, :exact_k]).bfloat16().double().numpy()
        fitted = np.concatenate([first, curve], 1)
        mass = np.logaddexp.reduce(given, 1) - np.logaddexp.reduce(fitted, 1)
        exact.append(given)
        decoded.append(fitted + mass[:, None])
    return {"setting": name, "k": k, "vocab_size": vocab_size, "bytes": size, **_losses(exact, decoded)}


def _seconds(work: Callable[[], object], rounds: int = 60) -> list[float]:
    """[median, lower quartile, upper quartile, rounds]."""
    work()
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return spread(taken).as_list()


def _speed(window: Captured, k: int, bits: int) -> dict[str, Any]:
    rows = select(window, k, 151936)
    block = encode(rows, bits)
    output = rows.ids.nbytes + rows.log_probs.nbytes
    times = {
        "decode_s": _seconds(lambda: codec.decode(block)),
        "row_s": _seconds(lambda: codec.decode(block, slice(100, 101), verify=False)),
        "encode_s": _seconds(lambda: encode(rows, bits)),
    }
    rates = {f"{name}_mb_s": round(output / times[f"{name}_s"][0] / 1e6) for name in ("decode", "encode")}
    return {"k": k, "bits": bits, "output_bytes": output, **times, **rates}


def measure(windows: list[Captured]) -> dict[str, Any]:
    """Everything in the JSON but the machine."""
    sizes = [_size(windows, *case) for case in itertools.product(KEPT, VOCABULARIES, BITS)]
    speed = [_speed(windows[0], k, bits) for k in (64, 256, 1024) for bits in (8, 16, 32)]
    distillkit = [_distillkit(windows, name, v) for name in DISTILLKIT for v in VOCABULARIES]
    return {
        "rows": {"windows": len(windows), "length": LENGTH, "domains": sorted({w.domain for w in windows})},
        "sizes": sizes, "pairs": [_pairs(windows, k) for k in KEPT], "distillkit": distillkit, "speed": speed,
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    print("     V      k  bits  bytes    ids  bound   mean KL    max KL   largest error")
    for s in result["sizes"]:
        sizes = f"{s['bytes']:>7.1f} {s['id_bytes']:>6.1f} {s['bound']:>6.1f}"
        losses = f"{s['mean_kl']:>8.1e}  {s['max_kl']:>8.1e}  {s['largest_error']:>8.1e}"
        print(f"{s['vocab_size']:>6}  {s['k']:>5}  {s['bits']:>4} {sizes}  {losses}")
    for s in [*result["pairs"], *result["distillkit"]]:
        print(s)
    for s in result["speed"]:
        print(f"k {s['k']}, {s['bits']} bits: decode {s['decode_mb_s']} MB/s, encode {s['encode_mb_s']} MB/s")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=machine.ROOT / "runs" / "codec", help="teacher and text")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens a domain (4)")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet = machine.Disturbance()
    result = measure(capture(options.folder, options.windows, KEPT))
    result = {"machine": machine.describe(), "commit": machine.commit(), "disturbed": quiet.shares(), **result}
    _print(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

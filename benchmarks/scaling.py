"""What the loss of one training step costs on TP x FSDP meshes, computed: `python -m benchmarks.scaling`.

Nothing here is measured but the bytes that a token sends (`benchmarks.shards` counts them). A mesh of G GPUs has tensor
groups of at most 8, joined by NVLink, and data parallel groups between them. Each tensor group takes TOKENS tokens;
student and teacher have hidden size HIDDEN; everything is bfloat16. Rates are an H100's; products reach 60 % of peak.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS, HIDDEN, BYTES = 8192, 4096, 2
PRODUCTS = 0.6 * 989e12  # FLOP/s
MEMORY = 3.35e12  # bytes/s
NVLINK, NETWORK = 450e9, 50e9  # bytes/s, one way, a GPU
LATENCY = 15e-6  # seconds, of a collective in a tensor group
CHUNK = 256 * 2**20  # bytes of logits at a time, both sides
SENT = 24  # bytes a token and rank: a gather of 16, a sum of 8


@dataclass(frozen=True)
class Step:
    """Seconds of one step's loss on one GPU, and bytes."""

    products: float
    """Logits of both sides, gradients of hidden states and head."""
    rows: float
    """Three sweeps over both sides' logits, the gradient written: what memory takes."""
    numbers: float
    """The gather and the sum of a few floats a token."""
    hidden: float
    """The all-reduce of the hidden states' gradient."""
    heads: float
    """FSDP: both heads gathered over data ranks, the gradient scattered; overlaps with the model's own work."""
    memory: float
    """Bytes of a chunk and of this rank's shard of the head's gradient in float32."""
    avoided: float
    """Bytes that logits of both sides and a gradient of them would take, as float32."""


def step(gpus: int, vocab: int) -> Step:
    """The model."""
    tensor = min(gpus, 8)
    data = gpus // tensor
    columns = vocab / tensor
    chunks = max(1.0, TOKENS * columns * 2 * BYTES * 2 / CHUNK)
    ring = (tensor - 1) / tensor
    head = columns * HIDDEN * BYTES
    return Step(
        products=4 * 2 * TOKENS * columns * HIDDEN / PRODUCTS,
        rows=TOKENS * columns * BYTES * 7 / MEMORY,
        numbers=0.0 if tensor == 1 else 2 * chunks * LATENCY + TOKENS * (16 * (tensor - 1) + 8 * 2 * ring) / NVLINK,
        hidden=0.0 if tensor == 1 else LATENCY + 2 * ring * TOKENS * HIDDEN * BYTES / NVLINK,
        heads=3 * head * (data - 1) / data / NETWORK,
        memory=CHUNK + 2 * head,
        avoided=3 * TOKENS * columns * 4,
    )


def table() -> list[str]:
    """Markdown."""
    lines = [
        "| GPUs (TP x DP) | V | products | rows | numbers | hidden | heads (FSDP) | memory | logits avoided |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for vocab in (128256, 262144):
        for gpus in (1, 8, 64, 512, 4096):
            s = step(gpus, vocab)
            times = " | ".join(f"{1e3 * x:.2f}" for x in (s.products, s.rows, s.numbers, s.hidden, s.heads))
            tensor = min(gpus, 8)
            mesh = f"{gpus} ({tensor} x {gpus // tensor})"
            lines.append(f"| {mesh} | {vocab} | {times} | {s.memory / 2**30:.2f} | {s.avoided / 2**30:.1f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))

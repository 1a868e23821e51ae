"""What the codec's benchmark packs: top-k rows of SmolLM2-135M on the demo's three domains.

Every row is kept with its whole log-softmax in float64 reduced to what the measures need: the k largest entries and the
log of the mass of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from demo import sources

LENGTH = 512
MOST_KEPT = 1024


@dataclass(frozen=True)
class Rows:
    """n rows with their k largest entries, ids ascending: int32, float32, float32; `exact` is float64 `log_probs`."""

    ids: np.ndarray
    log_probs: np.ndarray
    log_tail: np.ndarray
    exact: np.ndarray
    vocab_size: int


@dataclass(frozen=True)
class Captured:
    """Entries of one window of text by falling probability: ids, log-probabilities [512, 1024], float64; tails by k."""

    domain: str
    ids: np.ndarray
    log_probs: np.ndarray
    log_tail: dict[int, np.ndarray]
    vocab_size: int


def capture(folder: Path, windows: int, kept: tuple[int, ...]) -> list[Captured]:
    """Runs the teacher over `windows` windows of 512 tokens of each domain, spread over its text.

    `folder` receives teacher and text once (``teacher``, ``text``), as the demo's folder has them.
    """
    from kdkernels.trainers.models import load_model, load_tokenizer, quiet

    if not (folder / "teacher").is_dir():
        sources.prepare_teacher(folder / "teacher")
    if not (folder / "text").is_dir():
        sources.prepare_text(folder / "text")
    with quiet():
        tokenizer = load_tokenizer("teacher", str(folder / "teacher"))
        model = load_model("teacher", str(folder / "teacher"), torch.float32).eval()
    found = []
    for domain in sorted(path for path in (folder / "text").iterdir() if path.is_dir()):
        text = "".join(path.read_text(encoding="utf-8") for path in sorted(domain.iterdir()))
        for window in range(windows):
            begin = len(text) * window // windows
            tokens = tokenizer(text[begin : begin + 12 * LENGTH], return_tensors="pt").input_ids[:, :LENGTH]
            with torch.no_grad():
                log_probs = torch.log_softmax(model(tokens).logits[0].double(), -1)
            found.append(_reduce(domain.name, log_probs, kept))
    return found


def _reduce(domain: str, log_probs: torch.Tensor, kept: tuple[int, ...]) -> Captured:
    top = log_probs.topk(MOST_KEPT, -1)
    tails = {}
    for k in kept:
        rest = log_probs.scatter(-1, top.indices[:, :k], -torch.inf)
        tails[k] = torch.logsumexp(rest, -1).numpy()
    return Captured(domain, top.indices.numpy(), top.values.numpy(), tails, log_probs.shape[-1])


def select(captured: Captured, k: int, vocab_size: int) -> Rows:
    """The k largest entries; in a larger vocabulary, each token has a random id (always the same)."""
    ids = captured.ids[:, :k]
    if vocab_size != captured.vocab_size:
        ids = np.random.default_rng(0).permutation(vocab_size)[ids]
    order = np.argsort(ids, 1)
    exact = np.take_along_axis(captured.log_probs[:, :k], order, 1)
    ascending = np.take_along_axis(ids, order, 1).astype(np.int32)
    tail = captured.log_tail[k].astype(np.float32)
    return Rows(ascending, exact.astype(np.float32), tail, exact, vocab_size)

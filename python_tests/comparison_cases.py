"""What the tests of `compare_models` share: tiny models, text, textbook formulas on whole logits in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import Tensor

from kdkernels.data import Blocks, pack, tokenise
from kdkernels.evaluation import ComparisonResult, compare_models
from kdkernels.evaluation.compare_result import Slice

LENGTH = 48
OPTIONS: dict[str, Any] = {"batch_size": 3, "resamples": 200}


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def blocks(words: Any) -> dict[str, Blocks]:
    documents = {d: ["\n".join(tiny.sentences(d, 5, seed)) for seed in range(6)] for d in ("code", "prose")}
    return {d: pack(list(tokenise(t, words, words.eos_token_id)), LENGTH, 0) for d, t in documents.items()}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    """Teacher, student, and the student before: the teacher's layers, disturbed more and more."""
    teacher, student = tiny.llama(2, seed=0), tiny.llama(2, seed=0)
    before = tiny.llama(2, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for model, size in ((student, 0.05), (before, 0.15)):
            for parameter in model.parameters():
                parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return teacher, student, before


@pytest.fixture(scope="module")
def result(models: tuple[Any, Any, Any], blocks: dict[str, Blocks]) -> ComparisonResult:
    teacher, student, before = models
    # chunks of a few rows: 7 of them in the largest batch
    return compare_models(teacher, student, blocks, before=before, chunk_bytes=20 * 2 * 304 * 4, **OPTIONS)


@torch.no_grad()
def logits_of(model: Any, block: dict[str, Tensor]) -> Tensor:
    """[L, V]; without a cache, transformers keeps packed documents apart."""
    inputs = {name: block[name][None] for name in ("input_ids", "position_ids")}
    logits: Tensor = model.eval()(**inputs, use_cache=False).logits[0]
    return logits


def tokens_of(teacher: Any, student: Any, blocks: dict[str, Blocks], k: int = 10) -> list[dict[str, Any]]:
    """Every predicted token with its figures, from logits in float64, by formulas as they are written."""
    found = []
    every = np.concatenate([b.tokens for b in blocks.values()])
    for domain, part in blocks.items():
        for i in range(len(part)):
            block = part[i]
            lq, lp = (logits_of(m, block).double().log_softmax(-1) for m in (student, teacher))
            for at in range(LENGTH - 1):
                label = int(block["labels"][at + 1])
                if label != -100:
                    row = _figures(lp[at], lq[at], label, k)
                    document = int((part.starts <= i * LENGTH + at + 1).sum())
                    place = {"domain": domain, "document": document, "context": int(block["position_ids"][at]) + 1}
                    found.append({**row, **place, "share": float((every == label).mean())})
    return found


def _figures(lp: Tensor, lq: Tensor, label: int, k: int) -> dict[str, float]:
    p, q = lp.exp(), lq.exp()
    m = ((p + q) / 2).log()
    best = [set(x.topk(k).indices.tolist()) for x in (lp, lq)]
    return {
        "forward_kl": float((p * (lp - lq)).sum()), "reverse_kl": float((q * (lq - lp)).sum()),
        "jsd": float((p * (lp - m)).sum() / 2 + (q * (lq - m)).sum() / 2),
        "nll": float(-lq[label]), "entropy": float(-(q * lq).sum()), "confidence": float(q.max()),
        "accuracy": float(lq.argmax() == label), "agreement": float(lq.argmax() == lp.argmax()),
        "overlap": len(best[0] & best[1]) / k, "teacher_nll": float(-lp[label]),
        "teacher_entropy": float(-(p * lp).sum()), "teacher_accuracy": float(lp.argmax() == label),
        "teacher_confidence": float(p.max()),
    }  # fmt: skip


def _ece(rows: list[dict[str, Any]], prefix: str = "") -> float:
    total = 0.0
    for low in range(15):
        inside = [r for r in rows if low / 15 <= r[f"{prefix}confidence"] < (low + 1) / 15]
        total += abs(sum(r[f"{prefix}accuracy"] - r[f"{prefix}confidence"] for r in inside))
    return total / len(rows)


def _agrees(part: Slice, rows: list[dict[str, Any]], model: str) -> None:
    mean = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0] if name not in ("domain",)}
    expected = {name: mean[name] for name in ("forward_kl", "reverse_kl", "jsd", "agreement", "overlap", "nll",
                                              "accuracy", "entropy", "confidence")}  # fmt: skip
    expected["perplexity"] = math.exp(mean["nll"])
    expected["discrepancy"] = math.exp(mean["nll"]) / math.exp(mean["teacher_nll"])
    expected["entropy_gap"] = mean["entropy"] - mean["teacher_entropy"]
    expected["entropy_ratio"] = mean["entropy"] / mean["teacher_entropy"]
    expected["ece"] = _ece(rows)
    assert part.tokens == len(rows)
    assert set(part.figures[model]) == set(expected)
    for name, value in expected.items():
        assert part.get(model, name).value == pytest.approx(value, rel=2e-5, abs=2e-6), name
    for name in ("nll", "entropy", "accuracy", "confidence"):
        assert part.get("teacher", name).value == pytest.approx(mean[f"teacher_{name}"], rel=2e-5), name
    assert part.get("teacher", "ece").value == pytest.approx(_ece(rows, "teacher_"), rel=2e-5)

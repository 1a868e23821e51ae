"""`compare_models`: caches, paths, padded and capped heads, what cannot be compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from comparison_cases import LENGTH, OPTIONS, blocks, logits_of, models, result, words

import kdkernels as kd
from kdkernels.data import Blocks, pack
from kdkernels.errors import UserError
from kdkernels.evaluation import ComparisonResult, compare_models
from kdkernels.evaluation.sweep import Subject
from kdkernels.trainers.heads import Head

__all__ = ["blocks", "models", "result", "words"]  # fixtures
pytestmark = pytest.mark.slow


def _cache(folder: Path, teacher: Any, blocks: dict[str, Blocks], k: int, skip: int = -1, **options: Any) -> Any:
    made = kd.TeacherCache.create(folder, vocab_size=304, k=k, bits=32, **options)
    numbers = [(d, i) for d, part in blocks.items() for i in range(len(part))]
    for number, (domain, i) in enumerate(numbers):
        block = blocks[domain][i]
        logits = logits_of(teacher, block)
        draws = {"samples": k} if options.get("kind") == "sampled" else {"entropy": options.get("entropy", False)}
        if number != skip:
            made.append(number, kd.compress(logits, k, **draws), block["input_ids"])
    made.close()
    return kd.TeacherCache.open(folder)


def test_a_cache_of_everything_is_the_model(
    result: ComparisonResult, models: tuple[Any, Any, Any], blocks: dict[str, Blocks], tmp_path: Path
) -> None:
    teacher, student, before = models
    cache = _cache(tmp_path / "cache", teacher, blocks, 304, entropy=True)
    found = compare_models(cache, student, blocks, before=before, **OPTIONS)
    unknown = {"discrepancy"}
    for name, estimate in result.overall.figures["student"].items():
        value = found.overall.get("student", name).value
        assert value is None if name in unknown else value == pytest.approx(estimate.value, rel=1e-4, abs=1e-5), name
    assert found.overall.get("teacher", "nll").value is None
    for name in ("accuracy", "confidence", "entropy", "ece"):
        expected = result.overall.get("teacher", name).value
        assert found.overall.get("teacher", name).value == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.from_cache
    assert "lower bounds" in found.warnings[0]


def test_a_small_cache_gives_lower_bounds_and_tells_what_it_lacks(
    result: ComparisonResult, models: tuple[Any, Any, Any], blocks: dict[str, Blocks], tmp_path: Path
) -> None:
    teacher, student, _ = models
    found = compare_models(_cache(tmp_path / "a", teacher, blocks, 8, skip=0), student, blocks, **OPTIONS)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        assert 0 < found.overall.get("student", name).value < result.overall.get("student", name).value, name
    assert "domain 'code': 1 blocks are not in the cache and were left out" in found.warnings
    drawn = compare_models(_cache(tmp_path / "b", teacher, blocks, 8, kind="sampled"), student, blocks, **OPTIONS)
    assert drawn.overall.get("student", "jsd").value is None
    assert drawn.overall.get("student", "forward_kl").value > 0
    assert drawn.overall.get("student", "nll").value == pytest.approx(result.overall.get("student", "nll").value)
    assert set(drawn.calibration) == {"student"}
    lists, cache = pack([np.arange(5, 90, dtype=np.int32)], LENGTH, 0), kd.TeacherCache.open(tmp_path / "a")
    with pytest.raises(UserError, match=r"holds no block of domain 'lists'"):
        compare_models(cache, student, {"lists": lists}, **OPTIONS)


def test_models_by_path_before_by_layers_and_text_by_folder(words: Any, tmp_path: Path) -> None:
    tiny.save(tiny.llama(4), tmp_path / "teacher", words)
    tiny.save(tiny.llama(2, seed=3), tmp_path / "student", words)
    data = tiny.write_corpus(tmp_path / "text", documents=3)
    seen: list[tuple[int, int]] = []
    found = compare_models(
        str(tmp_path / "teacher"), tmp_path / "student", data, before="every:2", block_size=64, max_tokens=128,
        progress=lambda done, every: seen.append((done, every)), **OPTIONS,
    )  # fmt: skip
    assert sorted(found.domains) == ["code", "lists", "prose"]
    assert all(0 < part.tokens <= 128 for part in found.domains.values())
    assert seen[-1] == (6, 6)
    assert found.before.startswith("every:2 of ")


def test_padded_heads_are_cut_to_the_common_vocabulary(models: tuple[Any, Any, Any], blocks: dict[str, Blocks]) -> None:
    teacher, student, _ = models
    padded = copy.deepcopy(student)
    padded.resize_token_embeddings(320)
    with torch.no_grad():
        padded.get_output_embeddings().weight[304:] = 1.0
    found, plain = (compare_models(teacher, s, blocks, **OPTIONS).overall for s in (padded, student))
    for name, estimate in plain.figures["student"].items():
        assert found.get("student", name).value == pytest.approx(estimate.value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_in_a_chunks_memory_are_the_heads(scale: float | None, softcap: float | None, bias: bool) -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(11, 4), torch.randn(11) if bias else None, scale, softcap)
    hidden, space = torch.randn(3, 4), torch.full((5, 11), torch.nan)
    made = Subject(None, head).logits(hidden, space)
    assert made.data_ptr() == space.data_ptr()
    torch.testing.assert_close(made, head.logits(hidden, torch.float32).materialize())


def test_bad_input(models: tuple[Any, Any, Any], blocks: dict[str, Blocks], words: Any) -> None:
    teacher, student, _ = models
    texts = {"code": ["a b c d e f"]}
    cases: list[tuple[Any, Any, Any, dict[str, Any], str]] = [
        (teacher, student, {}, {}, "texts is empty; allowed: documents by domain"),
        (teacher, student, 5, {}, "texts is int"),
        (teacher, student, {"code": "one text"}, {}, "allowed: a list of documents"),
        (teacher, student, {"code": [3]}, {}, "allowed: a list of documents"),
        (teacher, student, texts, {}, "tokenizer is None"),
        (teacher, student, {"code": []}, {"tokenizer": words}, "domain 'code' holds no text"),
        (teacher, student, {"code": ["  "]}, {"tokenizer": words}, "domain 'code' holds no text"),
        (teacher, student, "/nowhere", {"tokenizer": words}, "no such file or folder"),
        (teacher, 5, blocks, {}, "student is a int; allowed: a causal LM"),
        (None, student, blocks, {}, "teacher is a NoneType"),
        (teacher, "/nowhere/model", blocks, {}, "no such folder"),
        (teacher, tiny.llama(2, vocab=290), {"code": ["a b"]}, {"tokenizer": words, "block_size": 8}, "vocabularies"),
        (teacher, student, blocks, {"top_k": 0}, "top_k is 0; allowed: 1 or more"),
        (teacher, student, blocks, {"level": 1.0}, "level is 1.0"),
        (teacher, student, blocks, {"collapse": 0.0}, "collapse is 0.0"),
        (teacher, student, blocks, {"vocab_size": 999}, "vocab_size is 999"),
        (teacher, student, texts, {"tokenizer": words, "block_size": 512}, "block_size is 512; the student reads"),
    ]
    for chief, pupil, text, options, message in cases:
        with pytest.raises(UserError, match=message):
            compare_models(chief, pupil, text, **options)

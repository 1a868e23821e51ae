"""kdkernels/evaluation/{compare,sides,sweep,tally,compare_result}.py: against textbook formulas on whole logits."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import Tensor

pytest.importorskip("transformers")

import kdkernels as kd
from kdkernels.data import Blocks, pack, tokenise
from kdkernels.errors import UserError
from kdkernels.evaluation import ComparisonResult, compare_models
from kdkernels.evaluation.compare_result import Slice
from kdkernels.evaluation.sweep import Subject
from kdkernels.trainers.heads import Head

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("model", ["student", "before"])
def test_every_figure_is_the_textbooks(
    result: ComparisonResult, models: tuple[Any, Any, Any], blocks: dict[str, Blocks], model: str
) -> None:
    teacher, student, before = models
    rows = tokens_of(teacher, student if model == "student" else before, blocks)
    _agrees(result.overall, rows, model)
    for domain, part in result.domains.items():
        own = [r for r in rows if r["domain"] == domain]
        _agrees(part, own, model)
        assert part.documents == len({r["document"] for r in own}) == 6
    for name, part in result.positions.items():
        low, high = (int(name.split(" to ")[i]) for i in (0, -1))
        _agrees(part, [r for r in rows if low <= r["context"] <= high], model)
    limits = {"over 1 %": (1e-2, 2), "0.1 to 1 %": (1e-3, 1e-2), "0.01 to 0.1 %": (1e-4, 1e-3)}
    assert set(result.frequencies) <= set(limits)
    assert len(result.frequencies) >= 2
    for name, part in result.frequencies.items():
        low_share, high_share = limits[name]
        _agrees(part, [r for r in rows if low_share <= r["share"] < high_share], model)
    assert sum(part.tokens for part in result.positions.values()) == len(rows)
    assert sum(part.tokens for part in result.frequencies.values()) == len(rows)


def test_changes_and_reliability_curves_follow(result: ComparisonResult) -> None:
    for part in (result.overall, *result.domains.values(), *result.positions.values()):
        for name, change in part.figures["change"].items():
            after, before = part.get("student", name).value, part.get("before", name).value
            assert change.value == pytest.approx(after - before, abs=1e-12), name
    assert result.overall.get("change", "forward_kl").high < 0  # the student that was disturbed less
    for model, bins in result.calibration.items():
        known = [b for b in bins if b.tokens]
        assert sum(b.tokens for b in known) == result.overall.tokens
        error = sum(b.tokens * abs(b.confidence - b.accuracy) for b in known) / result.overall.tokens
        assert error == pytest.approx(result.overall.get(model, "ece").value, abs=1e-9)
        assert all(b.low <= b.confidence < b.high or b.confidence == b.high == 1 for b in known)


def test_intervals_are_those_of_documents(
    result: ComparisonResult, models: tuple[Any, Any, Any], blocks: dict[str, Blocks]
) -> None:
    """Linearised standard error of a ratio over documents, times Student's t, is the half width to within a fifth."""
    rows = [r for r in tokens_of(models[0], models[1], blocks) if r["domain"] == "code"]
    documents = sorted({r["document"] for r in rows})
    count = len(documents)
    for name in ("forward_kl", "nll", "entropy"):
        mean = sum(r[name] for r in rows) / len(rows)
        residual = [sum(r[name] - mean for r in rows if r["document"] == d) for d in documents]
        error = math.sqrt(sum(e * e for e in residual) * count / (count - 1)) / len(rows)
        estimate = result.domains["code"].get("student", name)
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.high - estimate.low) / 2 == pytest.approx(2.571 * error, rel=0.2), name
    paired, plain = (result.overall.get(m, "nll") for m in ("change", "student"))
    assert paired.high - paired.low < plain.high - plain.low  # both models meet the same hard documents


def test_a_result_survives_json(result: ComparisonResult, tmp_path: Path) -> None:
    result.save(tmp_path / "compare.json")
    assert ComparisonResult.load(tmp_path / "compare.json") == result


def test_batches_chunks_and_backends_change_nothing(models: tuple[Any, Any, Any], blocks: dict[str, Blocks]) -> None:
    teacher, student, _ = models
    first = compare_models(teacher, student, blocks, **OPTIONS)
    other = compare_models(teacher, student, blocks, resamples=200, batch_size=1, chunk_bytes=70_000, backend="eager")
    for name, estimate in first.overall.figures["student"].items():
        assert estimate.value == pytest.approx(other.overall.get("student", name).value, rel=1e-5, abs=1e-6), name


def test_a_model_beside_itself(models: tuple[Any, Any, Any], blocks: dict[str, Blocks]) -> None:
    teacher = models[0]
    found = compare_models(teacher, teacher, blocks, **OPTIONS)
    exact = {"agreement": 1, "overlap": 1, "discrepancy": 1, "entropy_ratio": 1, "entropy_gap": 0}
    for name, value in {**exact, "forward_kl": 0, "reverse_kl": 0, "jsd": 0}.items():
        assert found.overall.get("student", name).value == pytest.approx(value, abs=1e-6), name
    assert not found.collapsed
    assert found.warnings == ()


def test_collapse_is_flagged(blocks: dict[str, Blocks]) -> None:
    teacher = tiny.llama(2, tie_word_embeddings=False)
    sharp = copy.deepcopy(teacher)
    with torch.no_grad():
        sharp.lm_head.weight *= 6
    found = compare_models(teacher, sharp, blocks, **OPTIONS)
    assert found.collapsed == ("code", "prose", "all")
    assert any("entropy has collapsed" in warning for warning in found.warnings)
    assert found.overall.get("student", "entropy_ratio").high < 0.8
    assert found.overall.get("student", "ece").low > found.overall.get("teacher", "ece").high
    assert found.overall.get("student", "agreement").value > 0.99
    assert not compare_models(sharp, teacher, blocks, **OPTIONS).collapsed


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


def test_models_get_their_mode_back(models: tuple[Any, Any, Any], blocks: dict[str, Blocks]) -> None:
    teacher, student, _ = models
    student.train()
    compare_models(teacher.eval(), student, blocks, **OPTIONS)
    assert student.training
    assert not teacher.training


def test_a_broken_model_has_unknown_figures_and_says_so(
    models: tuple[Any, Any, Any], blocks: dict[str, Blocks]
) -> None:
    broken = copy.deepcopy(models[1])
    broken.model.layers[1].register_forward_hook(lambda m, i, o: _with_nan(o))
    found = compare_models(models[0], broken, {"code": blocks["code"]}, **OPTIONS)
    assert found.overall.get("student", "forward_kl").value is None
    assert any("gives NaN for" in warning for warning in found.warnings)
    known = [part.get("student", "forward_kl").value is not None for part in found.positions.values()]
    assert any(known)
    assert not all(known)
    json.dumps(found.to_dict(), allow_nan=False)


def _with_nan(output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.shape[1] == LENGTH:  # not the check of the head
        hidden[:, 30] = torch.nan
    return output


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


PEAK = """
import numpy as np, torch
from peak import peak_of
import tiny_models as tiny
from kdkernels.data import pack
from kdkernels.evaluation import compare_models
torch.set_num_threads(1)
teacher, student = tiny.llama(1, vocab=12000), tiny.llama(1, vocab=12000, seed=1)
def text(tokens):
    numbers = np.random.default_rng(0).integers(0, 12000, tokens).astype(np.int32)
    return {"all": pack([part for part in numbers.reshape(-1, 64)], 64, 0)}
compare_models(teacher, student, text(256), resamples=100)
for tokens in (512, 2048):
    given = text(tokens)
    print(peak_of(lambda: compare_models(teacher, student, given, resamples=100)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_text() -> None:
    """A token's two rows of logits are 94 KiB here: were they kept, the longer text would take 140 MiB more."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    peaks = [float(line) for line in done.stdout.splitlines()[-2:]]
    assert peaks[1] < peaks[0] + 2, peaks
    assert peaks[0] > 10  # a chunk was measured at all

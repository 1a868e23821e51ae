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

import pytest
import tiny_models as tiny
import torch
from comparison_cases import LENGTH, OPTIONS, _agrees, blocks, models, result, tokens_of, words

pytest.importorskip("transformers")

from kdkernels.data import Blocks
from kdkernels.evaluation import ComparisonResult, compare_models

__all__ = ["blocks", "models", "result", "words"]  # fixtures
pytestmark = pytest.mark.slow


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

"""kdkernels/compare_cli.py: `kdkernels evaluate compare` on a run, and on models and text by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models as tiny

pytest.importorskip("transformers")

import torch

from kdkernels import cli
from kdkernels.evaluation import ComparisonResult, compare_models
from kdkernels.trainers import DistillConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run leaves: configuration and student."""
    root = tmp_path_factory.mktemp("compare")
    words = tiny.tokenizer()
    tiny.save(tiny.llama(4), root / "teacher", words)
    tiny.save(tiny.llama(2, seed=1), root / "run" / "student", words)
    data = tiny.write_corpus(root / "text", documents=6)
    config = DistillConfig(
        teacher=str(root / "teacher"), student="every:2", data=str(data), block_size=64, held_out=0.4, seed=3
    )
    (root / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    return root / "run"


def test_a_run_is_compared_on_its_own_held_out_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "compare", "--run", str(run), "--resamples", "100"]) == 0
    found = ComparisonResult.load(run / "evaluation" / "compare.json")
    assert "before" in found.overall.figures
    assert found.block_size == 64
    out = capsys.readouterr().out
    for domain, part in found.domains.items():
        assert f"{part.get('student', 'forward_kl').value:.3f}" in next(
            line for line in out.splitlines() if line.startswith(domain)
        )
    from kdkernels.data import load_corpus
    from kdkernels.trainers.models import load_model, load_tokenizer

    words = load_tokenizer("teacher", str(run.parent / "teacher"))
    blocks = load_corpus(str(run.parent / "text"), {}, words, length=64, held_out=0.4, seed=3).held_out
    models = [load_model("m", str(path), torch.float32) for path in (run.parent / "teacher", run / "student")]
    again = compare_models(*models, blocks, before="every:2", resamples=100)
    for name, estimate in again.overall.figures["student"].items():
        assert found.overall.get("student", name).value == pytest.approx(estimate.value, rel=1e-6), name


def test_models_and_text_by_name(run: Path, tmp_path: Path) -> None:
    line = ["evaluate", "compare", "--teacher", str(run.parent / "teacher"), "--student", str(run / "student"),
            "--domain", f"all={run.parent / 'text' / 'prose'}", "--block-size", "64", "--output", str(tmp_path / "out"),
            "--resamples", "100", "--quiet", "--max-tokens", "200"]  # fmt: skip
    assert cli.main(line) == 0
    found = ComparisonResult.load(tmp_path / "out" / "compare.json")
    assert list(found.domains) == ["all"]
    assert "before" not in found.overall.figures
    assert found.overall.tokens <= 256


def test_wrong_use_costs_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{}")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_text((run / "config.json").read_text())
    teacher = ["--teacher", str(run.parent / "teacher")]
    for line, message in (
        ([], "student is ''"), (teacher, "student is ''"), ([*teacher, "--student", "s"], "output is ''"),
        (["--student", "s", "--output", "o"], "teacher is ''"),
        ([*teacher, "--student", "s", "--output", "o"], "data is ''"),
        (["--run", str(tmp_path / "none")], "config.json cannot be read"),
        (["--run", str(tmp_path / "bad")], "config.json cannot be read"),
        (["--run", str(tmp_path / "young")], "holds no student yet"),
        (["--run", str(run), "--held-out", "1.5"], "held_out is 1.5"),
        (["--run", str(run), "--before", "/nowhere/x"], "no such folder"),
        (["--run", str(run), "--domain", "x"], "allowed: NAME=VALUE"),
        (["--run", str(run), "--device", "quantum"], "device is 'quantum'"),
        (["--run", str(run), "--top-k", "0"], "top_k is 0"),
        (["--run", str(run), "--seed", "-1"], "seed is -1"),
        # before any model is loaded
        (["--run", str(run), "--before", "/nowhere/x", "--output", str(run / "config.json")], "cannot be written"),
    ):  # fmt: skip
        assert cli.main(["evaluate", "compare", *line, "--quiet"]) == 2, line
        error = capsys.readouterr().err
        assert message in error, line
        assert error.count("\n") == 1

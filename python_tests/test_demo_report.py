"""demo/report.py on tiny models: the page is there, and the exit status says whether the student has come closer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from demo import report
from kdkernels.report.version import load_version
from kdkernels.trainers import DistillConfig


def _demo(root: Path, student: Any, before: Any) -> Path:
    """What `python -m demo` leaves of its distilled student."""
    words = tiny.tokenizer()
    tiny.save(tiny.llama(2), root / "teacher", words)
    tiny.save(before, root / "before", words)
    tiny.save(student, root / "demo" / "distilled" / "student", words)
    data = tiny.write_corpus(root / "text", documents=6)
    config = DistillConfig(teacher=str(root / "teacher"), student=str(root / "before"), data=str(data), block_size=64,
                           held_out=0.4)  # fmt: skip
    run = root / "demo" / "distilled"
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "summary.json").write_text(json.dumps({"before": {}, "after": {}, "steps": 1}))
    return root / "demo"


def test_a_student_that_is_its_teacher_passes_and_one_further_away_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = _demo(tmp_path, tiny.llama(2), tiny.llama(2, seed=7))
    line = ["--demo", str(demo), "--prompts", "2", "--tokens", "4"]
    assert report.main(line) == 0
    version = load_version(demo / "distilled", "distilled")
    assert version.similarity().overall == 5.0
    assert version.similarity(before=True).overall < 5.0
    assert version.comparison().overall.get("student", "forward_kl").value == pytest.approx(0, abs=1e-4)
    assert version.comparison().overall.get("before", "forward_kl").value > 0.1
    rows = version.answers[" identity"]
    assert len(rows) > 10
    assert all(row["reference"] == row["response"] for row in rows)
    assert "Questions about identity" in (demo / "evaluation.html").read_text()
    capsys.readouterr()
    assert report.main(line) == 0  # nothing is measured twice
    assert capsys.readouterr().out.count("done before") == 6
    scores = json.loads((demo / "distilled" / "evaluation" / "rse.json").read_text())
    scores["overall"] = 1.0
    (demo / "distilled" / "evaluation" / "rse.json").write_text(json.dumps(scores))
    assert report.main(line) == 1
    assert "does not answer more like its teacher" in capsys.readouterr().err
    assert report.main([*line[:2], "--prompts", "0"]) == 2

"""kdkernels/report/{version,headline,regression,evaluation,...}.py and report_cli.py: runs in, one page out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import Reader, comparison, log, run, write_run

from kdkernels import cli
from kdkernels.errors import UserError
from kdkernels.evaluation.compare_result import Estimate
from kdkernels.report.evaluation import evaluation_page
from kdkernels.report.headline import figures
from kdkernels.report.version import load_version, load_versions

__all__ = ["run"]  # fixtures


def test_the_page_holds_every_part_and_needs_nothing_else(run: Path) -> None:
    text = evaluation_page([load_version(run, "full")])
    read = Reader(text)
    assert not read.references
    assert "script" not in read.tags
    assert not re.search(r"url\(|@import|https?://", text)
    assert "width=device-width" in text
    for words in ("Training", "Gap to the teacher", "Where in the text", "Calibration", "DDK", "SWITCH", "(RSE)",
                  "(ICE)", "Diversity", "Versions", "Configuration", "published", "GPT4o-0513", "DeepSeek-V3, strict",
                  "prose <b>", "<script>alert(1)</script>", "stock phrases", "written in training"):  # fmt: skip
        assert words in read.words, words
    assert "Not measured" not in read.words
    assert read.tags.count("svg") >= 8
    assert "code: KL to the teacher 1.500 before, 0.500 after (-67%)." in read.words


def test_the_page_says_what_the_results_hold(run: Path) -> None:
    version = load_version(run, "full")
    found = figures(version)
    assert found["forward_kl"].estimate == Estimate(0.5, 0.48, 0.52)
    assert found["forward_kl.prose <b>"].estimate.value == pytest.approx(0.55)
    similarity = version.similarity()
    assert similarity is not None
    assert found["rse"].estimate.value == similarity.overall
    assert found["teacher_share"].estimate.value == 0.25
    assert found["held_out.kl.code"].estimate == Estimate(0.5)
    words = Reader(evaluation_page([version])).words
    assert f"{similarity.overall:.3f} (" in words
    before = version.similarity(before=True)
    assert before is not None
    assert f"RSE {similarity.overall:.2f} of 5, {before.overall:.2f} before (by a proxy)." in words
    diversity, poor = version.diversity(), version.diversity(before=True)
    assert diversity is not None
    assert poor is not None
    assert diversity.responses["repetition"].value < poor.responses["repetition"].value


def test_collapse_is_said(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    comparison(0.5, collapsed=("code",)).save(tmp_path / "run" / "evaluation" / "compare.json")
    assert "Entropy has collapsed in: code." in Reader(evaluation_page([load_version(tmp_path / "run", "x")])).words


def test_what_a_run_lacks_is_a_marked_gap(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "metrics.jsonl", bare)
    text = evaluation_page([load_version(bare, "bare")])
    words = Reader(text).words
    for what in ("divergences, calibration and entropy", "calibration and entropy", "response similarity (RSE)",
                 "identity consistency (ICE)", "diversity of the answers"):  # fmt: skip
        assert f"Not measured: {what}" in words, what
    assert text.count('class="gap"') >= 5
    assert "Not measured: white-box comparison, RSE, ICE." in words
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(run / "evaluation" / "ice.json", only)
    words = Reader(evaluation_page([load_version(only, "only")])).words
    assert "Not measured: the course of training" in words
    assert "Not measured: the run's configuration" in words


def test_damaged_files_are_named_on_the_page(run: Path, tmp_path: Path) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(run, hurt)
    for file, text in (
        ("summary.json", "{"), ("config.json", "[]"),
        ("evaluation/rse.json", '{"kind": "kdkernels.response_similarity"}'),
        ("evaluation/ice.json", '{"kind": "kdkernels.identity_consistency", "version": 1, "loose": 5}'),
        ("evaluation/other.json", '{"kind": "kdkernels.nobody_knows"}'), ("evaluation/answers.jsonl", "not JSON\n"),
        ("evaluation/foreign.json", '{"kind": "mine"}'),
    ):  # fmt: skip
        (hurt / file).write_text(text)
    with (hurt / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    version = load_version(hurt, "hurt")
    words = Reader(evaluation_page([version])).words
    for name in ("summary.json is no JSON", "config.json holds a list", "evaluation/rse.json cannot be read",
                 "evaluation/ice.json cannot be read", "other.json is a 'kdkernels.nobody_knows'", "answers.jsonl",
                 "metrics.jsonl: line 17 is no JSON"):  # fmt: skip
        assert name in words, name
    assert "foreign" not in words
    assert version.comparison() is not None


def _set(values: Any, *path: Any) -> str:
    """JSON of `values` with what lies at the end of `path` put in the place of what lies there."""
    *above, last, new = path
    place = values
    for key in above:
        place = place[key]
    place[last] = new
    return json.dumps(values)


@pytest.mark.parametrize(
    ("file", "path", "text"),
    [
        ("evaluation/compare.json", ("overall", "figures", "student", "ece", "low", "x"), "ece.low is 'x'; allowed"),
        ("evaluation/compare.json", ("calibration", "student", 0, "accuracy", [1]), "accuracy is [1]; allowed"),
        ("evaluation/compare.json", ("collapse", "x"), "collapse is 'x'; allowed: float"),
        ("evaluation/rse.json", ("overall", "x"), "overall is 'x'"),
        ("evaluation/rse.json", ("datasets", "chat", "means", {}), "is no 'kdkernels.response_similarity'"),
        ("evaluation/rse.json", ("intervals", "overall", [1]), "is no 'kdkernels.response_similarity'"),
        ("evaluation/ice.json", ("aspects", "team", {}), "is no 'kdkernels.identity_consistency'"),
        ("evaluation/ice.json", ("loose", "value", True), "loose.value is True"),
        ("evaluation/ice.json", ("kind", ["kdkernels.x"]), ""),
        (
            "evaluation/generate.json",
            (0, "by_position", "jsd", 0, {}),
            "holds rows that are none of kdkernels generate",
        ),
        ("summary.json", ("after", {"code": 3}), "after holds no scores by domain"),
        ("metrics.jsonl", ("step", None), "metrics.jsonl: line 1 is no event"),
        ("metrics.jsonl", ("step", 1e300), "metrics.jsonl: line 1 is no event"),
        ("metrics.jsonl", ("domains", {"code": 3}), "metrics.jsonl: line 1 is no event"),
        ("metrics.jsonl", ("weights", 3), "metrics.jsonl: line 1 is no event"),
    ],
)
def test_wrong_types_are_named_on_the_page(
    run: Path, tmp_path: Path, file: str, path: tuple[Any, ...], text: str
) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(run, hurt)
    if file == "metrics.jsonl":
        kind = {"domains": "eval", "weights": "ddk"}.get(path[0], "step")
        rows = [row for row in log() if row["event"] == kind]
        (hurt / file).write_text("\n".join([_set(rows[0], *path), *map(json.dumps, rows[1:])]))
    else:
        (hurt / file).write_text(_set(json.loads((hurt / file).read_text()), *path))
    version = load_version(hurt, "hurt")
    words = Reader(evaluation_page([version])).words
    assert text in words
    assert figures(version)
    assert len(version.problems) == (1 if text else 0)


def test_folders_that_cannot_be_reported(tmp_path: Path, run: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([str(tmp_path / "no")], "no such folder"), ([str(tmp_path / "empty")], "holds no metrics.jsonl"),
        ([str(run), str(run)], "one comes twice"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_versions(folders)


def test_versions_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "better", kl=0.3)
    words = Reader(evaluation_page(load_versions([str(run), str(tmp_path / "better")]))).words
    assert "0.300 (0.280 to 0.320) ★" in words
    assert "0.600 (0.580 to 0.620) ★" not in words  # agreement is the same


def test_wrong_use_costs_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for line, message in (
        ([str(tmp_path / "no")], "no such folder"), ([str(run), "--thresholds", "x.toml"], "without a baseline"),
        ([str(run), "--baseline", str(run)], "one comes twice"),
        ([str(run), "--output", str(tmp_path / "file" / "r.html")], "cannot be written"),
        ([str(run), "--output", "r.json"], "give two files"),
    ):  # fmt: skip
        assert cli.main(["report", *line]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

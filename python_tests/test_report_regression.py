"""The report as a check: what is worse than the baseline, by which rule, with which exit status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import DOMAINS, Reader, comparison, log, run, write_run

from kdkernels import cli
from kdkernels.errors import UserError
from kdkernels.evaluation.compare_result import Estimate
from kdkernels.report.evaluation import evaluation_page
from kdkernels.report.headline import Figure, figures
from kdkernels.report.regression import MISSING, OK, UNKNOWN, WORSE, Rule, check, read_rules
from kdkernels.report.version import load_version

__all__ = ["run"]  # fixtures


def test_numbers_that_are_none_are_shown_as_unknown_and_fail(run: Path, tmp_path: Path) -> None:
    """A run that diverged writes NaN into its summary; a comparison has None for it."""
    shutil.copytree(run, tmp_path / "nan")
    summary = json.loads((run / "summary.json").read_text())
    summary["after"]["code"]["kl"] = float("nan")
    (tmp_path / "nan" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "nan" / "evaluation" / "compare.json").unlink()
    words = Reader(evaluation_page([load_version(tmp_path / "nan", "x")])).words
    assert "code: KL to the teacher is no number after the run." in words
    assert "nan" not in words
    old, new = (figures(load_version(path, "x")) for path in (run, tmp_path / "nan"))
    found = {c.name: c.verdict for c in check(new, old, [Rule("held_out.kl.*")])}
    assert found == {"held_out.kl.code": MISSING, "held_out.kl.prose <b>": OK}
    unknown = {**old, "forward_kl": Figure("KL", Estimate(None), -1)}
    assert [c.name for c in check(unknown, old, None) if c.failed] == ["forward_kl"]
    del unknown["forward_kl"]  # not measured at all
    assert {c.verdict for c in check(unknown, old, None)} == {OK, UNKNOWN}


def test_a_domain_may_be_called_anything() -> None:
    old, new = ({"forward_kl.c[1]*": Figure("KL", Estimate(v, v - 0.1, v + 0.1), -1)} for v in (1.0, 2.0))
    assert [c.verdict for c in check(new, old, None)] == [WORSE]


def test_a_baseline_without_a_figure_in_common_is_an_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lost in (("a", "evaluation"), ("b", "summary.json")):
        shutil.copytree(run, tmp_path / name)
        shutil.rmtree(tmp_path / "a" / lost) if name == "a" else (tmp_path / "b" / lost).unlink()
    for new, old in (("a", "b"), ("b", "a")):
        assert cli.main(["report", str(tmp_path / new), "--baseline", str(tmp_path / old), "--quiet"]) == 2
        assert "nothing was held against it" in capsys.readouterr().err


def _one(value: float | None, half: float | None, better: int) -> dict[str, Figure]:
    ends = (None, None) if half is None or value is None else (value - half, value + half)
    return {"x": Figure("x", Estimate(value, *ends), better)}


@pytest.mark.parametrize(
    ("old", "new", "better", "rule", "verdict"),
    [
        ((1.0, 0.1), (1.13, 0.1), -1, {}, OK),  # sqrt(2) * 0.1 is noise
        ((1.0, 0.1), (1.15, 0.1), -1, {}, WORSE),
        ((1.0, 0.1), (0.5, 0.1), -1, {}, OK),
        ((1.0, 0.1), (0.5, 0.1), 1, {}, WORSE),
        ((1.0, 0.1), (1.15, 0.1), -1, {"tolerance": 0.02}, OK),
        ((2.0, 0.1), (2.35, 0.1), -1, {"relative": 0.1}, WORSE),
        ((2.0, 0.1), (2.33, 0.1), -1, {"relative": 0.1}, OK),
        ((1.0, None), (1.001, None), -1, {}, WORSE),
        ((1.0, 0.1), (9.0, 0.1), 0, {}, OK),  # neither way is better
        ((1.0, 0.1), (1.0, 0.1), -1, {"at_most": 0.85}, WORSE),
        ((1.0, 0.1), (1.0, 0.1), -1, {"at_most": 0.95}, OK),  # within the interval
        ((None, None), (1.0, 0.1), 1, {"at_least": 1.2}, WORSE),
        ((None, None), (1.0, 0.1), 1, {"at_least": 1.05}, OK),
        ((1.0, 0.1), (None, None), -1, {}, MISSING),  # measured, and no number
        ((1.0, 0.1), (None, None), -1, {"required": True}, MISSING),
        ((None, None), (1.0, 0.1), -1, {"required": True}, MISSING),
    ],
)
def test_worse_means_beyond_tolerance_and_both_intervals(
    old: tuple[Any, Any], new: tuple[Any, Any], better: int, rule: dict[str, Any], verdict: str
) -> None:
    [found] = check(_one(*new, better), _one(*old, better), [Rule("x", **rule)])
    assert found.verdict == verdict
    assert found.failed == (verdict in (WORSE, MISSING))
    assert bool(found.reason) or verdict == OK


def test_rules_name_figures_by_pattern(tmp_path: Path) -> None:
    found = {f"kl.{d}": Figure(d, Estimate(1.0), -1) for d in DOMAINS}
    assert [c.name for c in check(found, found, [Rule("kl.*"), Rule("nothing")])] == [*found, "nothing"]
    dashed = {"rse.my-set": Figure("x", Estimate(1.0), 1)}
    assert check(dashed, dashed, [Rule("rse.my_set")])[0].verdict == OK
    file = tmp_path / "limits.toml"
    file.write_text('["forward_kl.*"]\ntolerance = 0.1\nrequired = true\n[rse]\nat_least = 3\n')
    assert read_rules(file) == [Rule("forward_kl.*", 0.1, required=True), Rule("rse", at_least=3.0)]
    for text, message in (
        ("", "holds no rule"), ("rse = 3", "allowed: a table"), ("[rse]\ntolerance = -1", "tolerance is -1"),
        ("[rse]\nwrong = 1", "rse.wrong is 1"), ("[rse]\nrequired = 1", "required is 1"), ("[rse", "not valid TOML"),
        ("[rse]\nat_most = true", "at_most is True"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape(message)):
            read_rules(file)


def test_command_line_writes_page_and_json_and_fails_on_regressions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse, page = write_run(tmp_path / "worse", kl=0.9), tmp_path / "out" / "r.html"
    assert cli.main(["report", str(run), "--output", str(page)]) == 0
    assert f"report: {page}" in capsys.readouterr().out
    values = json.loads((tmp_path / "out" / "r.json").read_text())
    assert values["versions"][0]["figures"]["forward_kl"]["value"] == 0.5
    assert values["versions"][0]["results"]["comparison"] == comparison(0.5).to_dict()
    assert values["versions"][0]["log"] == log()
    line = ["report", str(worse), "--baseline", str(run), "--output", str(page)]
    assert cli.main(line) == 1
    assert "worse: forward_kl: 0.5 to 0.9" in capsys.readouterr().out
    assert "worse beyond their intervals" in Reader(page.read_text()).words
    assert any(c["failed"] for c in json.loads((tmp_path / "out" / "r.json").read_text())["checks"])
    assert cli.main(["report", str(run), "--baseline", str(worse), "--output", str(page)]) == 0
    limits = tmp_path / "limits.toml"
    limits.write_text("[forward_kl]\ntolerance = 0.5\n")
    assert cli.main([*line, "--thresholds", str(limits)]) == 0
    limits.write_text("[forward_kl]\ntolerance = 0.1\n")
    assert cli.main([*line, "--thresholds", str(limits), "--quiet"]) == 1
    # a page that was written is no part of the next
    assert cli.main(["report", str(worse)]) == 0
    assert cli.main(["report", str(worse), "--quiet"]) == 0
    assert "kdkernels.report" not in Reader((worse / "report.html").read_text()).words

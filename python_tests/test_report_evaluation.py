"""kdkernels/report/{version,headline,regression,evaluation,...}.py and report_cli.py: runs in, one page out."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kdkernels import cli
from kdkernels.errors import UserError
from kdkernels.evaluation import identity_consistency, response_similarity
from kdkernels.evaluation.calibration import Bin
from kdkernels.evaluation.compare_result import ComparisonResult, Estimate, Slice
from kdkernels.evaluation.records import Record, write_records
from kdkernels.report.evaluation import evaluation_page
from kdkernels.report.headline import Figure, figures
from kdkernels.report.regression import MISSING, OK, UNKNOWN, WORSE, Rule, check, read_rules
from kdkernels.report.version import load_version, load_versions

DOMAINS = ("code", "prose <b>")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def comparison(kl: float, half: float = 0.02, collapsed: tuple[str, ...] = ()) -> ComparisonResult:
    """A result whose student is `kl` from its teacher."""

    def part(scale: float) -> Slice:
        def around(value: float) -> Estimate:
            return Estimate(value * scale, (value - half) * scale, (value + half) * scale)

        student = {name: around(kl) for name in ("forward_kl", "reverse_kl", "jsd", "ece")}
        student |= {"agreement": around(0.6), "perplexity": around(20.0), "entropy": around(2.0)}
        student |= {"entropy_ratio": around(0.9), "discrepancy": around(1.4), "overlap": around(0.5)}
        before = {name: around(kl + 1) for name in student}
        change = {name: Estimate(-1.0, -1.1, -0.9) for name in student}
        teacher = {"perplexity": around(15.0), "entropy": around(2.2), "ece": around(0.05)}
        return Slice(1000, 9, {"student": student, "before": before, "teacher": teacher, "change": change})

    curve = tuple(Bin(i / 5, (i + 1) / 5, 10, i / 5 + 0.1, i / 6) for i in range(5))
    return ComparisonResult(
        part(1.0), {name: part(1 + i / 10) for i, name in enumerate(DOMAINS)}, {"1": part(1.5), "2 to 3": part(1.0)},
        {"over 1 %": part(0.5)}, {"student": curve, "teacher": curve}, collapsed, 0.8, "T", "S", "B", False, 10, 64,
        0.95, 200, 0, (),
    )  # fmt: skip


def log(steps: int = 6) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"event": "start", "config": {"seed": 3}, "versions": {"torch": "2"}}]
    for step in range(1, steps):
        rows.append({"event": "step", "step": step, "loss": 3 / step, "divergence": 2 / step, "nll": None,
                     "entropy": 1.0, "teacher_share": 0.1 * step})  # fmt: skip
        rows.append({"event": "eval", "step": step, "domains": {d: {"kl": 1 / step} for d in DOMAINS}})
        rows.append({"event": "ddk", "step": step, "weights": dict.fromkeys(DOMAINS, 0.5),
                     "discrepancy": dict.fromkeys(DOMAINS, 1 + 1 / step)})  # fmt: skip
    return rows


def write_run(folder: Path, kl: float = 0.5, half: float = 0.02) -> Path:
    """A run with everything in it."""
    (folder / "evaluation" / "before").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 3, "note": "<script>alert(1)</script>"}))
    scores = {d: {"kl": kl, "ppl": 20.0, "teacher_ppl": 15.0, "top1": 0.5, "tokens": 99} for d in DOMAINS}
    before = {d: {"kl": kl + 1, "ppl": 2000.0, "teacher_ppl": 15.0, "top1": 0.1, "tokens": 99} for d in DOMAINS}
    (folder / "summary.json").write_text(json.dumps({"before": before, "after": scores, "versions": {"torch": "2"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log()))
    comparison(kl, half).save(folder / "evaluation" / "compare.json")
    for place, said in (("", "The river runs to the sea, number {}."), ("before/", "sea sea sea sea sea sea sea {}")):
        rows = [
            Record(str(i), "chat", f"where {i}?", f"The river runs to the sea, number {i}. It is wide.", said.format(i))
            for i in range(6)
        ]
        write_records(folder / "evaluation" / f"{place}answers.jsonl", rows)
        columns = [[getattr(row, name) for row in rows] for name in ("prompt", "reference", "response")]
        response_similarity(*columns, datasets=["chat"] * 6, resamples=100).save(
            folder / "evaluation" / f"{place}rse.json"
        )
    identity_consistency(lambda prompt: "I am Aster.", "facts-en", budget=10, resamples=100).save(
        folder / "evaluation" / "ice.json"
    )
    generated = {"name": "S", "settings": {}, "rows": 1, "tokens": 4, "teacher_tokens": 1, "teacher_share": 0.25,
                 "by_position": {"teacher_share": [1.0, 0.0, None, 0.0], "jsd": [0.5, 0.2, None, 0.1]}}  # fmt: skip
    (folder / "evaluation" / "generate.json").write_text(json.dumps([generated], indent=1))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "full")


class Reader(html.parser.HTMLParser):
    """Balanced tags, what they refer to, and the text."""

    VOID = ("meta", "line", "path", "br", "circle", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


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


MEASURE = """<!doctype html><iframe id="f" src="PAGE" style="width:390px;height:800px;border:0"></iframe><p id="o"></p>
<script>document.getElementById("f").onload = (e) => { const d = e.target.contentDocument;
  const body = getComputedStyle(d.body);
  document.getElementById("o").textContent = "width " + d.documentElement.scrollWidth + " height " + d.body.scrollHeight
    + " size " + body.fontSize + " charts " + [...d.querySelectorAll("svg")].filter(s => s.clientHeight > 50).length;
};</script>"""


@pytest.mark.slow
def test_in_a_real_browser_offline_on_a_phone(run: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to open the page with; looked for {', '.join(BROWSERS)}")
    page, picture = tmp_path / "report.html", tmp_path / "phone.png"
    page.write_text(evaluation_page([load_version(run, "full")]))
    (tmp_path / "frame.html").write_text(MEASURE.replace("PAGE", page.name))
    line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120}
    shot = subprocess.run(
        [*line, "--window-size=412,2400", f"--screenshot={picture}", page.as_uri()], check=False, **options
    )
    assert shot.returncode == 0, shot.stderr
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000  # not a blank page
    measure = [*line, "--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom"]
    seen = subprocess.run([*measure, (tmp_path / "frame.html").as_uri()], check=False, **options).stdout
    found = re.search(r"width (\d+) height (\d+) size ([\d.]+)px charts (\d+)", seen)
    assert found, seen[-500:]
    assert int(found[1]) <= 390  # nothing is wider than the phone
    assert int(found[2]) > 2000
    assert float(found[3]) >= 16
    assert int(found[4]) >= 6

"""From measured seconds to entries, tables, targets and the plot; runs that are stopped go on."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy, machine, report, results, shapes, targets
from benchmarks.journal import Journal


def _result() -> dict[str, object]:
    """A result as `benchmarks.run` writes it, from made-up seconds."""
    cases = shapes.select(shapes.FULL, "jsd,128256,bf16") + shapes.select(
        shapes.FULL, "dense-forward_kl-fp32-512x128256"
    )
    timed = []
    for case in cases:
        names = (
            ("ours", "ours:inplace", "eager", "compile", "compile:bf16", "trl:gkd")
            if case.op == "dense"
            else ("ours", "liger")
        )
        seconds = {name: [0.01 * (1 + k), 0.011 * (1 + k), 0.012 * (1 + k)] for k, name in enumerate(names)}
        limits = (
            {"floor:stream": [0.008] * 3, "floor:exp": [0.004] * 3}
            if case.op == "dense"
            else {"floor:products": [0.01] * 3}
        )
        extra = {"seconds": seconds | limits, "errors": {}, "out": {"torchtune": "not installed: torchtune"}}
        extra["disturbance"] = {"others": 0.0, "stolen": 0.0}
        timed += [results.timed(case, allocator, extra) for allocator in ("default", "MALLOC_MMAP_MAX_=0")]
    memory = {"case": "dense-jsd-bf16-512x128256", "contestant": "ours:inplace", "extra_mib": 2.0, "outputs_mib": 0.0}
    errors = {
        "dense": [
            accuracy.dense("jsd", dtype, kind, 301) for dtype in ("fp32", "bf16") for kind in ("ordinary", "near")
        ],
        "near_convergence": [accuracy.near_convergence("jsd", 1e-5, 301)],
        "linear": [],
    }
    rates = {"stream_bytes_per_second": 8e10, "read_bytes_per_second": 6e10, "exps_per_second": 3e10}
    rates |= {"mm_bf16_flops_per_second": 8e11, "mm_fp32_flops_per_second": 2e11}
    return {
        "commit": {"id": "0123456789abcdef", "modified": False},
        "machine": machine.describe(),
        "limits": {"compiler": "cc", **rates},
        "time": timed,
        "memory": [{**memory, "beyond_outputs_mib": 2.0, "logits_tensors": 0.016, "allocator": "default"}],
        "errors": errors,
    }


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    return _result()


def test_floor_and_ratios_of_an_entry(result: dict[str, object]) -> None:
    entry = next(e for e in result["time"] if e["case"] == "dense-forward_kl-fp32-512x128256")
    assert entry["floor_ms"][0] == 8.0
    assert entry["over_floor"]["ours:inplace"] == [2.75, 2.5, 3.0, 3]
    assert entry["times_ours"]["ours"]["eager"][0] == 3.0
    assert entry["least_work"] == {
        "read": 2 * 512 * 128256 * 4,
        "written": 512 * 128256 * 4,
        "exponentials": 2 * 512 * 128256,
    }


def test_the_json_survives_and_is_a_line_an_entry(result: dict[str, object]) -> None:
    text = results.dump(result)
    assert json.loads(text) == json.loads(json.dumps(result))
    assert len(text.splitlines()) < 40


def test_report_of_a_result(result: dict[str, object]) -> None:
    text = report.markdown(result)
    row = next(line for line in text.splitlines() if line.startswith("| JSD(.5) 512 x 128256 bf16"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["22.0 / 22.0", "2.75 / 2.75", "11.0 / 11.0"]
    assert cells[4:] == ["2.00 / 2.00", "1.50 / 1.50", "– / –", "3.00\\* / 3.00\\*"]
    assert "commit 0123456789ab" in text
    assert "80 GB/s" in text


def test_targets_of_a_result(result: dict[str, object]) -> None:
    found = {finding.what: finding for finding in targets.evaluate(result)}
    kl = found["times the floor: dense-forward_kl-fp32-512x128256, default"]
    assert (kl.value, kl.limit, kl.met) == (2.75, 1.7, False)
    rival = found["times faster than compile:bf16: dense-jsd-bf16-512x128256, default"]
    assert (rival.value, rival.limit, rival.met) == (2.5, 10.0, False)
    assert found["MiB beyond outputs, ours:inplace: dense-jsd-bf16-512x128256, default"].met
    better = copy.deepcopy(result)
    for entry in better["time"]:
        entry["over_floor"]["ours:inplace"] = [1.1, 1.0, 1.2, 3]
    found = {finding.what: finding for finding in targets.evaluate(better)}
    assert found["times the floor: dense-forward_kl-fp32-512x128256, default"].met


def test_readme_is_rewritten_between_the_markers_only() -> None:
    text = f"# A\n{report.BEGIN}\nold\n{report.END}\nrest\n"
    assert report.rewrite(text, "new") == f"# A\n{report.BEGIN}\nnew\n{report.END}\nrest\n"
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        report.rewrite("# A\n", "new")


def test_the_plot_is_drawn(result: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    plot.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_committed_results_make_the_committed_tables() -> None:
    readme = (machine.ROOT / "README.md").read_text()
    found = json.loads(report.DEFAULT.read_text())
    assert report.rewrite(readme, report.markdown(found)) == readme, "run python -m benchmarks.report --readme"


def test_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import run

    with pytest.raises(SystemExit):
        run.parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("--quick", "--cases", "--out"))
    assert sys.executable not in text


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    said: list[str] = []

    def journal(**settings: Any) -> Journal:
        return Journal(tmp_path / "runs" / "bench.jsonl", settings, said.append)

    def fails() -> None:
        raise AssertionError("was done before")

    first = journal(commit="a")
    assert first.do("one", lambda: [1]) == [1]
    first.do("two", lambda: 2)
    text = first.path.read_text()
    first.path.write_text(text[:-5])  # stopped while writing
    second = journal(commit="a")
    assert second.do("one", fails) == [1]
    assert second.do("two", lambda: 3) == 3
    assert journal(commit="a").do("two", fails) == 3
    assert journal(commit="b").do("one", lambda: 4) == 4
    journal(commit="b").close()
    assert not first.path.exists()

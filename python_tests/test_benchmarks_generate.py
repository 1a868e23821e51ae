"""`benchmarks/generate.py`: its pieces on tiny models; its committed JSON against docs/switch.md and the aim of 2 %."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny

from benchmarks import generate

ROOT = Path(__file__).resolve().parent.parent
CASES = [("fp32", 1), ("bf16", 1), ("fp32", 8), ("bf16", 8)]
ROWS = {
    "SWITCH, decay .1": "switch, lambda 1/10",
    "both models at every token": "switch, lambda 1/10, both models at every token",
    "gate closed": "switch, gate closed",
    "student, `generate`": "student generate",
    "gate open": "switch, gate open",
    "teacher, `generate`": "teacher generate",
    "assisted `generate`": "assisted generate",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmark")
    words = tiny.tokenizer()
    tiny.save(tiny.llama(2, seed=2), root / "teacher", words)
    tiny.save(tiny.llama(1, seed=1), root / "distilled" / "student", words)
    for domain in ("docs", "speeches"):
        (root / "text" / domain).mkdir(parents=True)
        for number in range(4):
            text = " ".join(tiny.sentences("prose", 20, number))
            (root / "text" / domain / f"{number}.txt").write_text(text)
    return root


def test_the_pieces_measure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PROMPT": 12, "TOKENS": 6, "ROUNDS": 2, "SHARE_PROMPTS": 2, "SHARE_TOKENS": 6}.items():
        monkeypatch.setattr(generate, name, value)
    monkeypatch.setattr(generate, "RESULTS", tmp_path / "r.json")
    for piece, case in (("time", "fp32x1"), ("overhead", "bf16x1"), ("overhead", "fp32x1"), ("share", None)):
        line = ["generate", "--runs", str(folder), "--piece", piece, *(["--case", case] if case else [])]
        monkeypatch.setattr("sys.argv", line)
        generate.main()
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found["time"][0]["tokens_per_second"]) == set(ROWS.values())
    assert [entry["dtype"] for entry in found["overhead"]] == ["fp32", "bf16"]
    for entry in found["overhead"]:
        assert entry["outside_us"][0] > 0
        assert entry["forward_ms"][0] > 0
    assert [entry["lambda"] for entry in found["share"]] == list(generate.LAMBDAS)
    assert all(
        entry["tokens"] <= 24 and set(entry["student_share_by_domain"]) == {"docs", "speeches"}
        for entry in found["share"]
    )
    assert "outside of forward passes" in capsys.readouterr().out


def test_the_clock_counts_forward_passes_alone() -> None:
    class Slow:
        def forward(self, x: int) -> int:
            time.sleep(0.02)
            return x + 1

    model = Slow()
    clock = generate.Clock(model)
    assert [model.forward(x) for x in (1, 2)] == [2, 3]
    counted = clock.seconds
    time.sleep(0.02)
    assert clock.seconds == counted >= 0.04


def committed() -> dict[str, Any]:
    return dict(json.loads(generate.RESULTS.read_text()))


def test_what_is_no_forward_pass_is_under_2_percent() -> None:
    shares = {(e["dtype"], e["rows"]): e["outside_over_forward"][0] for e in committed()["overhead"]}
    assert set(shares) == set(CASES)
    assert max(shares.values()) < 0.02


def test_the_page_quotes_the_results() -> None:
    found, text = committed(), (ROOT / "docs" / "switch.md").read_text(encoding="utf-8")
    rates = {(e["dtype"], e["rows"]): e["tokens_per_second"] for e in found["time"]}
    overhead = {(e["dtype"], e["rows"]): e["outside_over_forward"][0] for e in found["overhead"]}
    expected = {
        row: [f"{rates[case][name][0]:.3g}" if name in rates[case] else "–" for case in CASES]
        for row, name in ROWS.items()
    }
    expected["outside of the two forward passes"] = [f"{overhead[case]:.1%}".replace("%", " %") for case in CASES]
    for row, cells in expected.items():
        assert f"| {row} | {' | '.join(cells)} |" in text
    told = re.search(r"student's share on (\d+) prompts.*?, (\d+) tokens each: (.*?)\. The paper", text, re.DOTALL)
    assert told is not None
    shares = found["share"]
    assert (told[1], told[2]) == (str(shares[0]["prompts"]), str(shares[0]["max_new_tokens"]))
    assert re.findall(r"([\d.]+) %", told[3]) == [f"{100 * e['student_share']:.1f}" for e in shares]

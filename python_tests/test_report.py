"""Pages: whole without a network, text escaped, curves with gaps, tokens with their speakers."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny_models as tiny

from kdkernels.report import chart, page, passages
from kdkernels.report.chart import Curve
from kdkernels.report.passages import Passage, Token

VOID = {"meta", "br", "img", "line", "path"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_asks_for_nothing_and_fits_a_phone() -> None:
    text = page.page("a < b & c", "<p>body</p>", "p { margin: 0 }")
    found = Reader(text)
    assert ("meta", "content", "width=device-width, initial-scale=1") in found.attributes
    policy = next(v for t, k, v in found.attributes if k == "content" and "default-src" in str(v))
    assert "default-src 'none'" in str(policy)
    assert "a < b & c" in found.text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)


def test_a_table_escapes_its_cells() -> None:
    found = Reader(page.table(["x", "<y>"], [["<b>", 1], ["&amp;", 2.5]]))
    assert "<b>" in found.text
    assert "&amp;" in found.text
    assert sum(t == "td" for t in re.findall(r"<(\w+)", page.table(["x"], [["a"], ["b"]]))) == 2


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = page.write(tmp_path / "new" / "a.html", "first")
    assert path.read_text() == "first"

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        page.write(path, "second")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.html"]


def points(svg: str, number: int = 0) -> list[list[tuple[float, float]]]:
    """The strokes of a curve."""
    path = re.findall(r'<path d="([^"]*)"', svg)[number]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", stroke)]
        for stroke in path.split("M")
        if stroke
    ]


def test_a_chart_draws_values_where_they_belong() -> None:
    svg = chart.chart("a & b", [Curve("one", [0.0, 0.5, None, 1.0, 2.0], mark=3)], "t", (0.0, 1.0))
    ElementTree.fromstring(svg)  # well-formed
    first, second = points(svg)
    assert len(first) == len(second) == 2
    xs = [x for x, _ in first + second]
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[1]) / 2, abs=0.2)  # the gap is two steps wide
    (_, low), (_, middle) = first
    (_, high), (_, beyond) = second
    assert middle == pytest.approx((low + high) / 2, abs=0.2)
    assert high < low  # upwards
    assert beyond == high  # out of bounds: at the edge
    mark = re.search(r'class="mark" x1="([\d.]+)"', svg)
    assert mark is not None
    assert float(mark[1]) == xs[2]


@pytest.mark.parametrize("values", [[], [None], [0.3], [0.2, 0.2], [float("nan"), 1.0]])
def test_a_chart_of_little_is_still_one(values: list[float | None]) -> None:
    ElementTree.fromstring(chart.chart("c", [Curve("x", values)], "t"))


TOKENS = [
    Token("I <think>", False, 0.25, 0.9, -1.5, None),
    Token(" so", True, 0.95, 0.8, -7.25, -0.5),
    Token("", True),
    Token(' "yes"\n', True),
    Token(" end", False),
]


def test_a_passage_shows_who_spoke() -> None:
    text = passages.to_html(Passage("Why & how?", TOKENS))
    found = Reader(text)
    assert found.text == 'Why & how?I <think> so "yes"\n end'
    speakers = [v for t, k, v in found.attributes if t == "span" and k == "class"]
    assert speakers == ["prompt", "tok", "tok t", "tok t", "tok"]
    tips = [v for _, k, v in found.attributes if k == "data-tip"]
    assert tips[0] == "student · JSD 0.250 bit · threshold 0.900 · log p student -1.50"
    assert tips[1] == "teacher · JSD 0.950 bit · threshold 0.800 · log p student -7.25 · log p teacher -0.50"
    assert tips[2] == "teacher"
    assert [v for _, k, v in found.attributes if k == "style"] == ["--j:0.25", "--j:0.95"]
    assert sum(k == "tabindex" for _, k, _ in found.attributes) == 4  # a finger or the keyboard reaches each


def test_a_terminal_shows_who_spoke() -> None:
    passage = Passage("P: ", TOKENS)
    assert passages.to_text(passage, colour=False) == 'P: I <think>[[ so "yes"\n]] end'
    colour = passages.to_text(passage, colour=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", colour) == 'P: I <think> so "yes"\n end'
    assert colour.count("\x1b[") == 2
    assert passages.to_text(Passage("", [Token("x", True)]), colour=False) == "[[x]]"


@pytest.mark.parametrize("text", ["the river ran home", "naïve 日本語 and 🎈🎈!", "  two\n\n lines\t"])
def test_pieces_put_together_are_the_text(text: str) -> None:
    words = tiny.tokenizer()
    ids = words(text)["input_ids"]
    for cut in (0, 1, len(ids) // 2):
        context = words("before ")["input_ids"] + ids[:cut]
        found = passages.pieces(words, context, ids[cut:])
        assert len(found) == len(ids) - cut
        if not words.decode(ids[:cut]).endswith("\ufffd"):
            assert "".join(found) == words.decode(ids)[len(words.decode(ids[:cut])) :]
        assert not any(piece.endswith("\ufffd") for piece in found)

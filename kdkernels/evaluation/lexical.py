"""The offline judge: a proxy that counts words and compares shapes. It understands nothing.

Style is measured by rates of punctuation, formatting, word and sentence lengths and function words; logic by the best
order-keeping alignment of the sentences and by the sequence of paragraphs, items, headings and code; content by words,
word pairs and a hashed n-gram embedding. The three are mapped to a judge's scales by knots that were fitted on
constructed pairs (`data/calibration.yaml`; docs/evaluation.md has the table). A paraphrase in altogether other words
scores like a related text; so does a contradiction in the same words score high.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from kdkernels.evaluation import lexical_identity, text
from kdkernels.evaluation.chat import Usage
from kdkernels.evaluation.verdicts import IdentityCase, IdentityVerdict, SimilarityCase, SimilarityScores, Unparsable

# Raw similarity -> overall scale, straight between the knots: the mean raw similarities of the unrelated, related and
# paraphrased pairs on the even topics of data/calibration.yaml. Nowhere flat, so that any gain shows.
KNOTS = ((0.0, 1.0), (0.140, 1.25), (0.232, 2.0), (0.741, 4.0), (1.0, 5.0))
# raw similarity from which an aspect counts as 1 and as 2
_STEPS = {"style": (0.58, 0.74), "logic": (0.18, 0.45), "content": (0.15, 0.45)}
_MOST_UNITS = 300  # of a text, for the alignment: its time is their product


class LocalLexicalJudge:
    """Deterministic, offline, free: a proxy for a judge, and marked as one in every result."""

    name = "LocalLexicalJudge (offline proxy)"
    proxy = True

    @property
    def usage(self) -> Usage:
        """Nothing is asked anywhere."""
        return Usage()

    def similarity(self, cases: Sequence[SimilarityCase]) -> Iterator[tuple[int, SimilarityScores | Unparsable]]:
        """Scores by counting; equal texts score 2, 2, 2 and 5."""
        for index, case in enumerate(cases):
            yield index, scores(case.reference, case.response)

    def identity(self, cases: Sequence[IdentityCase]) -> Iterator[tuple[int, IdentityVerdict | Unparsable]]:
        """First-person claims of known names that are not the facts' own."""
        for index, case in enumerate(cases):
            yield index, lexical_identity.verdict(case)


def scores(reference: str, response: str) -> SimilarityScores:
    """The proxy's scores of two texts."""
    raw = aspects(reference, response)
    places, scale = ([knot[i] for knot in KNOTS] for i in (0, 1))
    steps = {name: float(sum(raw[name] >= edge for edge in edges)) for name, edges in _STEPS.items()}
    return SimilarityScores(**steps, overall=float(np.interp(whole(raw), places, scale)))


def whole(raw: dict[str, float]) -> float:
    """The raw similarity of all aspects together, in [0, 1]."""
    return 0.2 * raw["style"] + 0.3 * raw["logic"] + 0.5 * raw["content"]


def aspects(reference: str, response: str) -> dict[str, float]:
    """Raw similarities in [0, 1] of style, logic and content; symmetric, 1 for equal texts."""
    if reference == response:
        return {"style": 1.0, "logic": 1.0, "content": 1.0}
    if not (text.words(reference) and text.words(response)):
        return {"style": 0.0, "logic": 0.0, "content": 0.0}
    return {
        "style": _style(reference, response),
        "logic": _logic(reference, response),
        "content": _content(reference, response),
    }


def _content(a: str, b: str) -> float:
    first, second = ([text.stem(w) for w in text.words(t) if not text.is_stop(w)] for t in (a, b))
    shared = text.dice(first, second)
    return 0.4 * text.embedding_similarity(a, b) + 0.4 * shared + 0.2 * text.bigram_overlap(a, b)


def _logic(a: str, b: str) -> float:
    first, second = text.units(a)[:_MOST_UNITS], text.units(b)[:_MOST_UNITS]
    table = np.clip(text.embed(first) @ text.embed(second).T, 0.0, 1.0)
    aligned = 2 * _best_alignment(table) / (len(first) + len(second))
    kinds = [[_kind(line) for line in t.splitlines() if line.strip()] for t in (a, b)]
    return 0.8 * aligned + 0.2 * math.sqrt(aligned) * _sequence_similarity(*kinds)


def _best_alignment(table: text.Array) -> float:
    """The largest sum over pairs (i, j) that both only increase."""
    best = np.zeros(table.shape[1] + 1)
    for row in table:
        taken = best[:-1] + row
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], taken))
    return float(best[-1])


def _kind(line: str) -> str:
    """What a line is: h(eading), i(tem), c(ode fence), t(able), q(uote), or p(aragraph)."""
    kinds = (("h", r"#{1,6}\s"), ("i", r"([-*+•]|\d+[.)、])\s*\S"), ("c", "```"), ("t", r"\|"), ("q", ">"))
    return next((kind for kind, pattern in kinds if re.match(pattern, line.strip())), "p")


def _sequence_similarity(a: list[str], b: list[str]) -> float:
    """Twice the longest common subsequence over both lengths."""
    table = np.array([[float(x == y) for y in b[:_MOST_UNITS]] for x in a[:_MOST_UNITS]])
    return 2 * _best_alignment(table) / (len(table) + int(table.shape[1]))


def _style(a: str, b: str) -> float:
    first, second = _measures(a), _measures(b)
    distance = sum(abs(first[name] - second[name]) for name in first)
    light = [Counter(w for w in text.words(t) if text.is_stop(w)) for t in (a, b)]
    return 0.6 * math.exp(-distance) + 0.4 * _cosine(*light)


def _measures(content: str) -> dict[str, float]:
    """Rates of a text, each scaled so that a difference of about 0.5 is plain to a reader."""
    tokens, parts = text.words(content), text.units(content)
    lines = [line for line in content.splitlines() if line.strip()]
    kinds = Counter(map(_kind, lines))
    letters = max(len(content), 1)

    def rate(pattern: str, scale: float) -> float:
        return min(scale * len(re.findall(pattern, content)) / letters, 1.0)

    return {
        "length": 0.25 * math.log(len(tokens)),
        "sentence": 0.3 * math.log(len(tokens) / max(len(parts), 1)),
        "word": 0.1 * sum(map(len, tokens)) / len(tokens),
        "commas": rate("[,，、]", 6),
        "asides": rate("[()（）—:：;；]", 6),
        "emphasis": rate(r"[!！?？]|\*\*|__", 10),
        "digits": rate(r"\d", 2),
        "capitals": rate("[A-Z]", 1.5),
        "speaker": rate(r"\b(?:I|we|you|your|my|our)\b|[我你您]", 8),
        **{f"lines {kind}": 0.5 * kinds[kind] / len(lines) for kind in "hict"},
    }


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    if not a or not b:
        return float(not a and not b)
    dot = sum(a[word] * b[word] for word in a)
    return dot / math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))

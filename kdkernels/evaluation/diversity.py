"""Has a student narrowed? Diversity and redundancy of its answers, beside the teacher's to the same prompts.

Distinct n-grams fall with the length of a text, so every answer is cut to the same number of words before they are
counted (Li et al. 2016, arXiv 1510.03055, without the cut). Intervals are delete-one jackknife over answers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdkernels.errors import UserError
from kdkernels.evaluation import text
from kdkernels.evaluation.compare_result import Estimate
from kdkernels.evaluation.intervals import Array, student_quantile
from kdkernels.evaluation.results import Result

MEASURES = ("distinct_1", "distinct_2", "distinct_3", "self_similarity", "repetition", "stock_share", "words")
PHRASE = 4
_PHRASES = 100  # most stock phrases kept
_SHOWN = 20
_EMBEDDED = 512  # answers of which all pairs are compared


@dataclass(frozen=True)
class StockPhrase:
    """Words that the references use again and again: the share of references, and of answers, that hold them."""

    phrase: str
    references: float
    answers: float


@dataclass(frozen=True)
class DiversityResult(Result):
    """Figures of `answers` answers, and of the references to the same prompts (empty without them).

    distinct_1, 2, 3: different word n-grams over all of them, answers cut to `cut` words. self_similarity: mean cosine
    of the embeddings of two answers. repetition: share of an answer's word 4-grams that it has said before, mean.
    stock_share: share of an answer's words that lie in the references' stock phrases, mean (None without references).
    words: mean length. collapsed: measures at which the answers are plainly poorer than the references.
    """

    kind = "kdkernels.response_diversity"

    responses: dict[str, Estimate]
    references: dict[str, Estimate]
    stock_phrases: tuple[StockPhrase, ...]
    answers: int
    empty: int
    cut: int
    level: float
    collapsed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def _inner(cls, values: dict[str, Any]) -> dict[str, Any]:
        sides = {
            side: {name: Estimate(**e) for name, e in values[side].items()} for side in ("responses", "references")
        }
        phrases = tuple(StockPhrase(**phrase) for phrase in values["stock_phrases"])
        lists = {name: tuple(values[name]) for name in ("collapsed", "warnings")}
        return {**values, **sides, **lists, "stock_phrases": phrases}


def response_diversity(
    responses: Sequence[str], references: Sequence[str] | None = None, *, cut: int = 64, level: float = 0.95
) -> DiversityResult:
    """Diversity and redundancy of answers; references are the teacher's answers to the same prompts.

    cut: words of an answer that count for distinct n-grams. Raises `UserError` below two answers that hold words.
    """
    if cut < 3 or not 0 < level < 1:
        raise UserError(f"cut is {cut}, level {level}; allowed: 3 words or more, a level between 0 and 1")
    ours = _tokens("responses", responses)
    theirs = None if references is None else _tokens("references", references)
    stock = {} if theirs is None else _stock(theirs)
    first = _measure(ours, responses, stock, cut, level, known=theirs is not None)
    second = {} if theirs is None else _measure(theirs, references or (), stock, cut, level, known=True)
    empty = sum(not tokens for tokens in ours)
    phrases = tuple(
        StockPhrase(" ".join(gram), share, sum(gram in set(_grams(t, PHRASE)) for t in ours) / len(ours))
        for gram, share in list(stock.items())[:_SHOWN]
    )
    collapsed = tuple(_collapsed(first, second))
    warnings = [f"{empty} of {len(ours)} answers hold no word"] if empty else []
    warnings += [f"{name} of the answers is far from the references'" for name in collapsed]
    return DiversityResult(first, second, phrases, len(ours), empty, cut, level, collapsed, tuple(warnings))


def _tokens(name: str, texts: Sequence[str]) -> list[list[str]]:
    if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{name} is {texts!r:.60}; allowed: a list of texts")
    found = [text.words(t) for t in texts]
    if sum(map(bool, found)) < 2:
        raise UserError(f"{name} has {sum(map(bool, found))} texts that hold words; allowed: two or more")
    return found


def _grams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def _stock(references: Sequence[Sequence[str]]) -> dict[tuple[str, ...], float]:
    """Word 4-grams in a twentieth of the references, in three of them at least, by their share; the commonest first."""
    counts = Counter(gram for tokens in references for gram in set(_grams(tokens, PHRASE)))
    least = max(3, math.ceil(0.05 * len(references)))
    common = [(gram, n) for gram, n in counts.items() if n >= least]
    common.sort(key=lambda item: (-item[1], item[0]))
    return {gram: n / len(references) for gram, n in common[:_PHRASES]}


def _measure(
    tokens: Sequence[Sequence[str]],
    texts: Sequence[str],
    stock: Iterable[tuple[str, ...]],
    cut: int,
    level: float,
    *,
    known: bool,
) -> dict[str, Estimate]:
    phrases = set(stock)
    found = {f"distinct_{n}": _jackknife(_distinct([t[:cut] for t in tokens], n), level) for n in (1, 2, 3)}
    found["self_similarity"] = _jackknife(_similarity([t for t, w in zip(texts, tokens, strict=True) if w]), level)
    found["repetition"] = _mean([_repeated(t) for t in tokens], level)
    found["stock_share"] = _mean([_covered(t, phrases) for t in tokens], level) if known else Estimate(None)
    found["words"] = _mean([float(len(t)) for t in tokens], level)
    return found


def _distinct(tokens: Sequence[Sequence[str]], size: int) -> tuple[float, Array]:
    """Different n-grams over all n-grams; and without each answer in turn."""
    grams = [Counter(_grams(t, size)) for t in tokens]
    whole: Counter[tuple[str, ...]] = Counter()
    for own in grams:
        whole.update(own)
    total = sum(whole.values())
    left = [
        ((len(whole) - sum(n == whole[g] for g, n in own.items())) / (total - own.total()))
        for own in grams
        if own and total > own.total()
    ]
    return (len(whole) / total if total else math.nan), np.asarray(left)


def _similarity(texts: Sequence[str]) -> tuple[float, Array]:
    """Mean cosine over pairs; and without each answer in turn."""
    vectors = text.embed(texts[:_EMBEDDED])
    table = vectors @ vectors.T
    np.fill_diagonal(table, 0.0)
    count, rows = len(table), table.sum(1)
    if count < 3:
        return float(rows.sum() / (count * (count - 1))), np.zeros(0)
    return float(rows.sum() / (count * (count - 1))), (rows.sum() - 2 * rows) / ((count - 1) * (count - 2))


def _repeated(tokens: Sequence[str]) -> float:
    grams = _grams(tokens, PHRASE)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _covered(tokens: Sequence[str], phrases: set[tuple[str, ...]]) -> float:
    inside = [False] * len(tokens)
    for i, gram in enumerate(_grams(tokens, PHRASE)):
        if gram in phrases:
            inside[i : i + PHRASE] = [True] * PHRASE
    return sum(inside) / len(tokens) if tokens else 0.0


def _mean(values: Sequence[float], level: float) -> Estimate:
    array = np.asarray(values)
    left = (array.sum() - array) / (len(array) - 1)
    return _jackknife((float(array.mean()), left), level)


def _jackknife(found: tuple[float, Array], level: float) -> Estimate:
    value, left = found
    count = len(left)
    if not math.isfinite(value):
        return Estimate(None)
    if count < 3:
        return Estimate(value)
    error = math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    half = student_quantile((1 + level) / 2, count - 1) * error
    return Estimate(value, max(value - half, 0.0), value + half)


def _collapsed(ours: dict[str, Estimate], theirs: dict[str, Estimate]) -> Iterable[str]:
    """Measures that are beyond any doubt of sampling, and far: distinct n-grams under 0.7 of the references', twice
    their self-similarity, or 0.2 more of each answer repeated."""
    rules: tuple[tuple[str, Callable[[float, float, float], bool]], ...] = (
        ("distinct_2", lambda low, high, other: high < 0.7 * other),
        ("distinct_3", lambda low, high, other: high < 0.7 * other),
        ("self_similarity", lambda low, high, other: low > 2 * other),
        ("repetition", lambda low, high, other: low > other + 0.2),
    )
    for name, rule in rules:
        mine, other = ours[name], theirs.get(name)
        if mine.low is None or mine.high is None or other is None or other.value is None:
            continue
        if rule(mine.low, mine.high, other.value):
            yield name

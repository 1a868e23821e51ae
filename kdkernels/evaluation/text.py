"""Texts as words, units and vectors, without any model: the material of the offline judge and of the baselines.

Everything here is deterministic across machines and Python versions (CRC-32, never `hash`).
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DIMENSIONS = 4096

_HAN = (
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"  # scripts written without spaces; a word each
)
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+(?:['’][^\W\d_{_HAN}]+)*")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n+")
_STOP = frozenset(
    """a an and are as at be been being but by can could did do does for from had has have he her his how i if in into
    is it its just may me might more most my no nor not of on once only or other our out over own same she should so
    some such than that the their them then there these they this those to too under up very was we were what when
    where which while who whom why will with would you your also about after again all am any because before both each
    few between during here him himself itself they've it's that's don't i'm you're""".split()  # noqa: SIM905
) | frozenset("的了是在和也就都而及与着或一个我你他她它们这那有不为以于之其被把对从到中上下会能可要")


def words(text: str) -> list[str]:
    """Lower-cased words; a Chinese or Japanese character or a Korean syllable is a word of its own."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def units(text: str) -> list[str]:
    """Sentences, lines and list items, in order, without empty ones."""
    return [unit for unit in (part.strip() for part in _SENTENCE.split(text)) if words(unit)]


def is_stop(word: str) -> bool:
    """True for words that say little about a text's subject."""
    return word in _STOP


def bigram_overlap(a: str, b: str) -> float:
    """Dice coefficient of the two multisets of word 2-grams, in [0, 1]; of the words, for texts of under two words."""
    first, second = words(a), words(b)
    size = 2 if min(len(first), len(second)) >= 2 else 1
    return dice(_grams(first, size), _grams(second, size))


def dice(a: Iterable[object], b: Iterable[object]) -> float:
    """2 |A and B| / (|A| + |B|) of two multisets; 1 for two empty ones."""
    first, second = Counter(a), Counter(b)
    total = sum(first.values()) + sum(second.values())
    return 2 * sum((first & second).values()) / total if total else 1.0


def _grams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def embed(texts: Sequence[str]) -> Array:
    """Unit vectors [len(texts), 4096] of hashed words, stems, character 4-grams and word 2-grams.

    A feature's weight is the root of its count; stop words count a twentieth. A text without words gives zeros.
    """
    found = np.zeros((len(texts), DIMENSIONS))
    for row, text in enumerate(texts):
        for feature, weight in _features(words(text)).items():
            code = zlib.crc32(feature.encode())
            found[row, code % DIMENSIONS] += weight if code >> 31 else -weight
        norm = math.sqrt(float(found[row] @ found[row]))
        found[row] /= norm or 1.0
    return found


def _features(tokens: list[str]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    weights: dict[str, float] = {}

    def add(feature: str, weight: float) -> None:
        counts[feature] += 1
        weights[feature] = weight

    for i, token in enumerate(tokens):
        light = 0.05 if token in _STOP else 1.0
        add("w" + token, light)
        if light == 1.0 and len(token) > 3:
            add("s" + stem(token), 0.7)
            padded = f"<{token}>"
            for j in range(len(padded) - 3):
                add("c" + padded[j : j + 4], 0.25)
        if i + 1 < len(tokens):
            both = max(light, 0.05 if tokens[i + 1] in _STOP else 1.0)
            add(f"b{token} {tokens[i + 1]}", 0.5 * both)
    return {feature: weights[feature] * math.sqrt(count) for feature, count in counts.items()}


def stem(word: str) -> str:
    """A word less its commonest English endings (a crude cut, for matching only)."""
    for ending in ("ations", "ation", "ingly", "ments", "ment", "ness", "ings", "ing", "ies", "ied", "edly", "ers",
                   "est", "ely", "ed", "er", "es", "ly", "al", "s", "e", "y"):  # fmt: skip
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def embedding_similarity(a: str, b: str) -> float:
    """Cosine of the two embeddings, cut to [0, 1]."""
    first, second = embed([a, b])
    return min(max(float(first @ second), 0.0), 1.0)

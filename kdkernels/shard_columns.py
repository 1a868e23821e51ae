"""Which columns of the whole vocabulary each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdkernels._checks import fail


@dataclass(frozen=True)
class Columns:
    """Which columns of the whole vocabulary are this rank's."""

    offset: int
    local: int
    whole: int
    widest: int


def columns_of(pages: list[dict[str, Any]], rank: int, vocab_size: int | None, sparse: bool = False) -> Columns:
    """This rank's columns, from every rank's sizes; an error, on all, where the two sides are not sharded alike.

    ``sparse``: every rank has all of the teacher's.
    """
    student, teacher = ([told["columns"][side] for told in pages] for side in (0, 1))
    if sparse:
        teacher = _cut_alike(student, teacher[0])
    if vocab_size is None and sum(student) != sum(teacher):
        remedy = "for a difference in padding pass vocab_size=; different tokenizers cannot be compared"
        fail(ValueError, "vocabularies", f"student {sum(student)}, teacher {sum(teacher)}", "of one size", remedy)
    whole = sum(student) if vocab_size is None else vocab_size
    if whole > min(sum(student), sum(teacher)) or whole == 0:
        allowed = (
            f"at most the smaller vocabulary, all shards together (student {sum(student)}, teacher {sum(teacher)})"
        )
        remedy = "pass the number of tokens that the tokenizer has; a shard is missing where that is right"
        fail(ValueError, "vocab_size", whole, allowed, remedy)
    spans = [_spans(sizes, whole) for sizes in (student, teacher)]
    if spans[0] != spans[1]:
        given = f"student {student}, teacher {teacher} columns by rank"
        fail(ValueError, "shards", given, "cut at the same columns up to vocab_size", "shard both sides alike")
    offset, local = spans[0][rank]
    return Columns(offset, local, whole, max(size for _, size in spans[0]))


def _cut_alike(sizes: list[int], whole: int) -> list[int]:
    """``whole`` columns cut as ``sizes`` are, more or fewer of them in the last shard that has any."""
    spans = [held for _, held in _spans(sizes, whole)]
    last = max((rank for rank, held in enumerate(spans) if held), default=0)
    spans[last] += whole - sum(spans)
    return spans


def _spans(sizes: list[int], whole: int) -> list[tuple[int, int]]:
    """(first column, number) of each rank up to ``whole``; empty shards stand at no place of their own."""
    spans, begin = [], 0
    for size in sizes:
        held = max(0, min(size, whole - begin))
        spans.append((begin if held else 0, held))
        begin += size
    return spans

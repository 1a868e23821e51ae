"""Tokenised documents packed into blocks of a fixed length, with the boundaries kept.

Documents lie end to end, each closed by the end-of-text token, and blocks are cut every `length` tokens: nothing is
padded but the last block of a domain. In a block every document starts again at position 0, so that attention cannot
cross a boundary: transformers derives the block-diagonal mask from `position_ids` where no attention mask is given
(models without positions, such as state-space ones, do see the text before). A document's first token carries the
label -100: nobody is asked to predict it from the text before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IGNORE = -100
_BATCH = 64  # documents per tokeniser call: enough for its threads, little enough to hold as text


@dataclass(frozen=True)
class Blocks:
    """One domain's tokens as a map-style dataset of blocks.

    tokens: int32 [M], documents end to end. starts: int64 [D], where each document begins, ascending. The last block
    is filled up with `pad` and the label -100.
    """

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    length: int
    pad: int

    def __len__(self) -> int:
        return math.ceil(len(self.tokens) / self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `position_ids`, `labels`, each int64 [length]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = index * self.length
        ids = np.full(self.length, self.pad, dtype=np.int64)
        labels = np.full(self.length, IGNORE, dtype=np.int64)
        real = self.tokens[begin : begin + self.length]
        ids[: len(real)] = real
        labels[: len(real)] = real
        low, high = np.searchsorted(self.starts, [begin, begin + len(real)])
        inside = self.starts[low:high] - begin
        labels[inside] = IGNORE
        first = np.zeros(self.length, dtype=np.int64)
        first[inside] = inside
        if len(real) < self.length:
            first[len(real)] = len(real)
        positions = np.arange(self.length) - np.maximum.accumulate(first)
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "labels": torch.from_numpy(labels),
        }

    def counted(self) -> int:
        """Tokens that a causal loss counts: all but each block's first and each document's first."""
        boundaries = np.union1d(self.starts, np.arange(0, len(self.tokens), self.length))
        return len(self.tokens) - len(boundaries)


def tokenise(documents: Iterable[str], tokenizer: Any, end: int) -> Iterator[npt.NDArray[np.int32]]:
    """Each document's ids, with `end` at its close, and with the begin-of-text token where the tokeniser sets one."""
    begin = tokenizer.bos_token_id
    start = [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []
    batch: list[str] = []
    for text in documents:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from _encode(batch, tokenizer, start, end)
            batch = []
    if batch:
        yield from _encode(batch, tokenizer, start, end)


def _encode(batch: list[str], tokenizer: Any, start: list[int], end: int) -> Iterator[npt.NDArray[np.int32]]:
    # `verbose=False`: a document longer than the model's context is what packing is for, not worth a warning.
    encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for ids in encoded["input_ids"]:
        yield np.asarray([*start, *ids, end], dtype=np.int32)


def pack(documents: list[npt.NDArray[np.int32]], length: int, pad: int) -> Blocks:
    """Documents (with their closing token) in the given order, as blocks."""
    sizes = np.asarray([len(d) for d in documents], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int32)
    return Blocks(tokens, starts, length, pad)


def split(
    documents: list[npt.NDArray[np.int32]], share: float, generator: np.random.Generator
) -> tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.int32]]]:
    """(training, held-out) documents: whole ones, drawn at random until `share` of the tokens is held out.

    Draws that would take more than twice the share are passed over, and a single document (or a draw that holds
    nothing out) gives its last `share` instead.
    """
    total = sum(len(d) for d in documents)
    order = [int(i) for i in generator.permutation(len(documents))]
    held: list[int] = []
    taken = 0
    for index in order[:-1]:
        if taken >= share * total:
            break
        if taken + len(documents[index]) <= 2 * share * total:
            held.append(index)
            taken += len(documents[index])
    if held:
        chosen = set(held)
        return [documents[i] for i in order if i not in chosen], [documents[i] for i in held]
    longest = max(range(len(documents)), key=lambda i: len(documents[i]))
    whole = documents[longest]
    cut = len(whole) - max(1, min(len(whole) - 1, round(share * total)))
    return [whole[:cut] if i == longest else documents[i] for i in order], [whole[cut:]]

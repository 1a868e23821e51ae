"""The corpus of a run: every domain's training and held-out blocks, and the order in which they are drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kdkernels.data.documents import find_domains, read_documents, text_files
from kdkernels.data.packing import Blocks, pack, split, tokenise
from kdkernels.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Blocks by domain; `fingerprint` is a hash of every token, so that a resumed run notices other data."""

    train: dict[str, Blocks]
    held_out: dict[str, Blocks]
    fingerprint: str


def load_corpus(
    data: str,
    domain: dict[str, str],
    tokenizer: Any,
    *,
    length: int,
    held_out: float,
    seed: int,
    text_key: str = "text",
) -> Corpus:
    """Read, tokenise, split and pack every domain. A domain's split depends on its name, its text and the seed only."""
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("tokenizer has no end-of-text token (eos_token), which separates documents; set one")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    train: dict[str, Blocks] = {}
    kept: dict[str, Blocks] = {}
    digest = hashlib.sha256()
    for name, path in find_domains(data, domain).items():
        if not text_files(path):
            raise UserError(
                f"domain {name!r} ({path}) holds no .txt .md .rst .py .jsonl file; add text or leave it out"
            )
        documents = list(tokenise(read_documents(path, text_key), tokenizer, end))
        if sum(len(d) for d in documents) < 4:
            raise UserError(f"domain {name!r} ({path}) holds no text; add text or leave it out")
        ours, theirs = split(documents, held_out, np.random.default_rng([seed, _number(name)]))
        train[name], kept[name] = pack(ours, length, pad), pack(theirs, length, pad)
        for blocks in (train[name], kept[name]):
            digest.update(name.encode() + blocks.starts.tobytes() + blocks.tokens.tobytes())
        for part, blocks in (("training", train[name]), ("held-out", kept[name])):
            if blocks.counted() < 1:
                raise UserError(f"domain {name!r} ({path}) is too short: no {part} token to predict; add text")
    return Corpus(train, kept, digest.hexdigest()[:16])


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


class Order(Protocol):
    """Which block each draw takes."""

    def __getitem__(self, draw: int) -> tuple[str, int]: ...


class BlockOrder:
    """The order of training blocks as a pure function of the draw's number: a cursor is one integer.

    proportional: all blocks of all domains in one shuffle per epoch. equal: domains in turn (shuffled anew each turn),
    every domain in its own shuffles, so that a small domain comes round more often.
    """

    def __init__(self, sizes: dict[str, int], mix: str, seed: int) -> None:
        self.names = list(sizes)
        self.sizes = [sizes[name] for name in self.names]
        self.ends = np.cumsum(self.sizes)
        self.mix = mix
        self.seed = seed
        self._kept: dict[int, tuple[int, np.ndarray[Any, np.dtype[np.int64]]]] = {}

    def __getitem__(self, draw: int) -> tuple[str, int]:
        """(domain, block) of draw number `draw` (0, 1, 2, ... without end)."""
        if self.mix == "proportional":
            total = int(self.ends[-1])
            place = int(self._shuffle(0, draw // total, total)[draw % total])
            domain = int(np.searchsorted(self.ends, place, side="right"))
            return self.names[domain], place - (int(self.ends[domain]) - self.sizes[domain])
        turn, seat = divmod(draw, len(self.names))
        domain = int(self._shuffle(0, turn, len(self.names))[seat])
        epoch, place = divmod(turn, self.sizes[domain])
        return self.names[domain], int(self._shuffle(domain + 1, epoch, self.sizes[domain])[place])

    def _shuffle(self, stream: int, epoch: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Permutation number `epoch` of one stream; the latest of each stream is kept."""
        kept = self._kept.get(stream)
        if kept is None or kept[0] != epoch:
            kept = (epoch, np.random.default_rng([self.seed, stream, epoch]).permutation(size))
            self._kept[stream] = kept
        return kept[1]


def batch_of(corpus: Corpus, order: Order, cursor: int, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`size` training blocks from draw `cursor` on, stacked to [size, length] on `device`."""
    blocks = [corpus.train[name][index] for name, index in (order[cursor + i] for i in range(size))]
    return {key: torch.stack([block[key] for block in blocks]).to(device) for key in blocks[0]}


def counted(labels: torch.Tensor) -> int:
    """Tokens of a batch that a causal loss counts (`shift=True`: the first label of a row has no predictor)."""
    return int((labels[:, 1:] != -100).sum())

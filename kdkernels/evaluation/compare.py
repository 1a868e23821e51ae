"""White-box comparison: teacher and student on the same tokens, from logits that are never kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels.data import Blocks
from kdkernels.errors import UserError
from kdkernels.evaluation.calibration import BINS
from kdkernels.evaluation.compare_result import BEFORE, STUDENT, ComparisonResult, Slice, summarise
from kdkernels.evaluation.intervals import check_draws
from kdkernels.evaluation.sides import Sides, Texts, blocks_of
from kdkernels.evaluation.sweep import TEACHER, Subject, Sweep, vocabulary_of
from kdkernels.evaluation.tally import Layout, Tally, frequencies
from kdkernels.trainers.cached import CachedTeacher


def compare_models(
    teacher: Any,
    student: Any,
    texts: Texts,
    *,
    before: Any = None,
    tokenizer: Any = None,
    block_size: int = 512,
    batch_size: int = 4,
    max_tokens: int | None = None,
    top_k: int = 10,
    vocab_size: int = 0,
    collapse: float = 0.8,
    dtype: torch.dtype = torch.float32,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> ComparisonResult:
    """Divergences, perplexities, agreement, entropies and calibration of a student beside its teacher.

    Args:
        teacher: a causal LM of transformers, a pair (model, tokenizer), a folder or name to load one from, or a
            `kd.TeacherCache`: then figures are those of the kept entries and their tail (divergences are lower bounds),
            the teacher's likelihoods are unknown, and blocks that the cache does not hold are left out.
        student: a model, a pair, or a folder or name.
        texts: by domain a list of documents, or `kdkernels.data.Blocks`; or a folder with a domain per subfolder.
            Documents are packed into blocks and do not see one another.
        before: the student before distillation, or None; ``"every:K"`` or ``"layers:A,B"`` cuts it from the teacher.
        tokenizer: where neither side brings one, and texts are not blocks.
        block_size: tokens per block. batch_size: blocks per forward.
        max_tokens: of each domain at most, rounded up to blocks; None: all.
        top_k: k of the overlap. vocab_size: real vocabulary where heads are padded (0: the smaller head, checked).
        collapse: a student whose entropy is below this share of the teacher's, beyond the interval, is flagged.
        dtype: of models that are loaded here.
        level, resamples, seed: of the bootstrap intervals over documents.
        chunk_bytes: memory for one chunk of logits of two sides (default 256 MiB). backend: of the loss.
        progress: called with (blocks done, all).

    Each row of logits is made once, swept (forward KL with statistics, the same with sides swapped, JSD, top-k) and
    dropped: memory does not grow with the text, beyond its own 4 bytes a token. Models are put in eval mode and back.
    Raises `UserError` for text without a token to predict, vocabularies or tokenizers that differ, wrong values.
    """
    check_draws(level, resamples, seed)
    _check(block_size, batch_size, max_tokens, top_k, collapse)
    sides = Sides(teacher, student, before, tokenizer, dtype)
    blocks = blocks_of(texts, block_size, sides)
    length = next(iter(blocks.values())).length
    found = {name: Subject.of(model, name, length) for name, model in sides.students.items()}
    cached = CachedTeacher(sides.cache) if sides.cache is not None else None
    chief = None if cached is not None else Subject.of(sides.teacher, TEACHER, length)
    rows = cached.vocab if cached is not None else chief.head.vocab if chief is not None else 0
    vocab = vocabulary_of(rows, found, 0 if sides.tokenizer is None else len(sides.tokenizer), vocab_size)
    sweep = Sweep(chief, found, vocab=vocab, top_k=top_k, chunk_bytes=chunk_bytes, backend=backend)
    layout = Layout((*found, TEACHER), length, BINS)
    pass_ = Pass(sweep, layout, cached, batch_size, max_tokens, progress)
    with _evaluating(sides.models):
        tallies = pass_.run(blocks)
    summary = summarise(tallies, layout, level=level, resamples=resamples, seed=seed)
    collapsed = tuple(name for name, s in _named(summary.overall, summary.domains) if _collapsed(s, collapse))
    return ComparisonResult(
        summary.overall, summary.domains, summary.positions, summary.frequencies, summary.calibration,
        collapsed=collapsed, collapse=collapse, teacher=sides.names[TEACHER], student=sides.names[STUDENT],
        before=sides.names.get(BEFORE, ""), from_cache=cached is not None, top_k=top_k, block_size=length, level=level,
        resamples=resamples, seed=seed, warnings=tuple(_warnings(summary.domains, tallies, collapsed, pass_, cached)),
    )  # fmt: skip


class Pass:
    """One pass over the text."""

    def __init__(
        self,
        sweep: Sweep,
        layout: Layout,
        cached: CachedTeacher | None,
        batch_size: int,
        max_tokens: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.sweep, self.layout, self.cached = sweep, layout, cached
        self.batch_size, self.max_tokens, self.progress = batch_size, max_tokens, progress
        self.absent: dict[str, int] = {}
        """Blocks that the cache does not hold, by domain."""

    def run(self, blocks: Mapping[str, Blocks]) -> dict[str, Tally]:
        """A tally by domain."""
        share = frequencies([b.tokens for b in blocks.values()])
        chosen = {name: self._chosen(name, b) for name, b in blocks.items()}
        total, done = sum(map(len, chosen.values())), 0
        found = {}
        for name, numbers in chosen.items():
            tally = found[name] = Tally(self.layout)
            for begin in range(0, len(numbers), self.batch_size):
                batch = numbers[begin : begin + self.batch_size]
                self.measure(tally, blocks[name], batch, share)
                done += len(batch)
                if self.progress is not None:
                    self.progress(done, total)
            if not int(tally.sums[0, :, -1].sum()):
                raise UserError(f"domain {name!r} has no token to predict; add text or leave it out")
        return found

    def _chosen(self, name: str, blocks: Blocks) -> list[int]:
        most = len(blocks) if self.max_tokens is None else -(-self.max_tokens // blocks.length)
        numbers = list(range(min(most, len(blocks))))
        if self.cached is None:
            return numbers
        held = [i for i in numbers if self.cached.find(blocks[i]["input_ids"]) is not None]
        if not held:
            built = self.cached.cache.settings.metadata.get("block_size", "unknown")
            raise UserError(
                f"cache {str(self.cached.cache.path)!r} holds no block of domain {name!r} (its block_size: {built}); "
                "give the text, the split and the block size that it was built with"
            )
        self.absent[name] = len(numbers) - len(held)
        return held

    def measure(self, tally: Tally, blocks: Blocks, numbers: Sequence[int], share: Tensor) -> None:
        """Take blocks, by their numbers, into the tally; share [V']: relative frequency of every token."""
        rows = [blocks[i] for i in numbers]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        keep = batch["labels"][:, 1:] != -100
        if not keep.any():
            return
        sparse = None if self.cached is None else self.cached.of(batch["input_ids"], 1.0)
        columns = self.sweep.columns(batch, keep, sparse)
        places = np.asarray(numbers)[:, None] * blocks.length + np.arange(1, blocks.length)
        documents = torch.from_numpy(np.searchsorted(blocks.starts, places, side="right") - 1)[keep]
        tally.add(columns, documents, batch["position_ids"][:, :-1][keep] + 1, share[batch["labels"][:, 1:][keep]])


@contextlib.contextmanager
def _evaluating(models: Sequence[Any]) -> Iterator[None]:
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def _named(overall: Slice, domains: Mapping[str, Slice]) -> list[tuple[str, Slice]]:
    return [*domains.items(), *([("all", overall)] if len(domains) > 1 else [])]


def _collapsed(part: Slice, limit: float) -> bool:
    ratio = part.get(STUDENT, "entropy_ratio")
    top = ratio.value if ratio.high is None else ratio.high
    return top is not None and top < limit


def _warnings(
    domains: Mapping[str, Slice],
    tallies: Mapping[str, Tally],
    collapsed: Sequence[str],
    run: Pass,
    cached: CachedTeacher | None,
) -> Iterator[str]:
    if cached is not None:
        k = cached.cache.settings.k
        yield f"the teacher is a cache of at most {k} entries a row: divergences are lower bounds, likelihoods unknown"
    for name, count in run.absent.items():
        if count:
            yield f"domain {name!r}: {count} blocks are not in the cache and were left out"
    for name, tally in tallies.items():
        if tally.broken:
            yield f"domain {name!r}: a model gives NaN for {tally.broken} tokens, so that its figures are unknown"
        if domains[name].documents < 2:
            yield f"domain {name!r} is one document: no interval, and none for all domains together"
    for name in collapsed:
        ratio = domains[name].get(STUDENT, "entropy_ratio").value if name in domains else None
        size = f" ({ratio:.2f} of the teacher's)" if ratio is not None else ""
        yield f"{name}: the student's entropy has collapsed{size}"


def _check(block_size: int, batch_size: int, max_tokens: int | None, top_k: int, collapse: float) -> None:
    for name, value, least in (
        ("block_size", block_size, 2), ("batch_size", batch_size, 1), ("max_tokens", max_tokens, 1),
        ("top_k", top_k, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; allowed: {least} or more")
    if not 0 < collapse <= 1:
        raise UserError(f"collapse is {collapse}; allowed: above 0, at most 1")

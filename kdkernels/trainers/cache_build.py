"""A teacher cache from a teacher and text: what `kdkernels cache` does.

Examples are the blocks that `kdkernels distill` trains on and evaluates with, numbered in the order of the domains, a
domain's training blocks before its held-out ones. Under torchrun every rank writes a part of its own inside the cache's
folder, and the first merges them at the end; parts that an interrupted job left are merged when it is resumed.
"""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from kdkernels.compression.merge import MERGED
from kdkernels.data import Blocks, Corpus, load_corpus
from kdkernels.errors import UserError
from kdkernels.optional import need
from kdkernels.trainers.cache_config import CacheConfig
from kdkernels.trainers.cached import TEXT_OPTIONS
from kdkernels.trainers.heads import Head, check_head, head_of, hidden_states
from kdkernels.trainers.models import load_model, load_tokenizer, tokenizer_hash
from kdkernels.trainers.progress import progress_bar
from kdkernels.trainers.ranks import Ranks
from kdkernels.trainers.setup import pick_device
from kdkernels.trainers.signals import Interrupted, StopSignals

PARTS = "parts"


def build_cache(
    config: CacheConfig, *, teacher: Any = None, tokenizer: Any = None, progress: bool = True
) -> kd.TeacherCache:
    """Run the teacher over the text and keep its distributions in `config.out`; returns the cache, open for reading.

    Teacher and tokeniser may be given as objects. Raises `UserError` for wrong input and `Interrupted` after SIGINT or
    SIGTERM, everything computed by then on disk; with `config.resume` the job goes on with the blocks that are missing.
    """
    config.validate()
    with StopSignals() as stop:
        ranks = Ranks.of_environment()
        tokenizer = tokenizer or load_tokenizer("teacher", config.tokenizer or config.teacher)
        corpus = load_corpus(
            config.data, config.domain, tokenizer,
            length=config.block_size, held_out=config.held_out, seed=config.seed, text_key=config.text_key,
        )  # fmt: skip
        if ranks.rank == 0:  # an occupied path is told before the teacher is loaded
            _check_out(config)
        source = _Source.load(config, teacher, tokenizer)
        settings = _settings(config, source, tokenizer, corpus)
        out = Path(config.out).expanduser()
        if ranks.rank == 0:
            with kd.TeacherCache.create(out, resume=config.resume, **settings) as cache:
                _same_text(cache, settings["metadata"])
                _merge_parts(cache)
        ranks.wait()
        blocks = _blocks(corpus)
        done = set(kd.TeacherCache.open(out))
        todo = [number for number in range(len(blocks)) if number not in done]
        mine = [todo[i] for i in ranks.share(len(todo))]
        ranks.wait()  # nobody writes while another still looks what is there
        folder = out if ranks.world == 1 else out / PARTS / f"rank-{ranks.rank:05d}-of-{ranks.world:05d}"
        with kd.TeacherCache.create(folder, resume=True, **settings) as cache:
            _fill(cache, source, blocks, mine, config, stop, progress and ranks.rank == 0)
        ranks.wait()
        if ranks.rank == 0 and ranks.world > 1:
            with kd.TeacherCache.resume(out) as cache:
                _merge_parts(cache)
        ranks.wait()
    return kd.TeacherCache.open(out)


def _check_out(config: CacheConfig) -> None:
    out = Path(config.out).expanduser()
    if (out / "manifest.json").exists() and not config.resume:
        examples = len(kd.TeacherCache.open(out))
        raise UserError(f"out is {config.out!r}, a cache of {examples} examples; add --resume, or choose another --out")


def _settings(config: CacheConfig, source: _Source, tokenizer: Any, corpus: Corpus) -> dict[str, Any]:
    """What `TeacherCache.create` takes."""
    made = config.to_dict()
    metadata = {name: made[name] for name in (*TEXT_OPTIONS, "top_p", "bf16")}
    metadata["domains"] = {name: [len(corpus.train[name]), len(corpus.held_out[name])] for name in corpus.train}
    metadata["fingerprint"] = corpus.fingerprint
    return {
        "vocab_size": source.vocab,
        "k": min(config.samples or config.k, source.vocab),
        "temperature": config.temperature,
        "other_temperatures": config.others(),
        "entropy": config.entropy,
        "kind": "sampled" if config.samples else "topk",
        "bits": config.bits or None,
        "teacher": config.teacher,
        "tokenizer": config.tokenizer or config.teacher,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "metadata": metadata,
    }


def _same_text(cache: kd.TeacherCache, metadata: dict[str, Any]) -> None:
    """A resumed cache numbers its examples by the same text."""
    for name, before in cache.settings.metadata.items():
        if metadata.get(name) != before:
            raise UserError(
                f"{name} is {metadata.get(name)!r}, but the cache {str(cache.path)!r} began with {before!r}; resume "
                "with the same text and options, or choose another --out"
            )


def _merge_parts(cache: kd.TeacherCache) -> None:
    folder = cache.path / PARTS
    for left in folder.glob(f".*{MERGED}"):  # a job was killed while it deleted them
        shutil.rmtree(left)
    parts = sorted(path for path in folder.iterdir() if (path / "manifest.json").is_file()) if folder.is_dir() else []
    cache.merge(parts, remove=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _blocks(corpus: Corpus) -> list[tuple[Blocks, int]]:
    """Every block of the text; its place in the list is its example id."""
    order = (part[name] for name in corpus.train for part in (corpus.train, corpus.held_out))
    return [(blocks, index) for blocks in order for index in range(len(blocks))]


@dataclass(frozen=True)
class _Source:
    """A teacher, ready to be asked."""

    config: CacheConfig
    model: Any
    head: Head
    vocab: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, config: CacheConfig, teacher: Any, tokenizer: Any) -> _Source:
        device = pick_device(config.device)
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        if teacher is None:
            teacher = load_model("teacher", config.teacher, dtype)
        teacher = teacher.to(device).eval().requires_grad_(False)
        head = head_of(teacher, "teacher")
        check_head(teacher, head, "teacher", device)
        vocab = config.vocab_size or head.vocab
        limit = getattr(teacher.config, "max_position_embeddings", None)
        if limit is not None and config.block_size > limit:
            raise UserError(f"block_size is {config.block_size}; the teacher reads at most {limit} tokens; lower it")
        if not len(tokenizer) <= vocab <= head.vocab:
            raise UserError(
                f"vocab_size is {vocab}; allowed: {len(tokenizer)} (the tokenizer's tokens) to {head.vocab} (the "
                "teacher's rows); correct it, or use the teacher's own tokenizer"
            )
        if config.k > vocab:
            raise UserError(f"k is {config.k}; allowed: up to the vocabulary, {vocab}; lower it")
        return cls(config, teacher, head, vocab, device, dtype)

    @torch.no_grad()
    def rows(self, batch: dict[str, torch.Tensor], first: int) -> kd.SparseLogits:
        """The kept entries of every row of a batch [B, L]; `first` seeds its draws."""
        config = self.config
        batch = {name: value.to(self.device) for name, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.head.logits(hidden_states(self.model, batch), self.dtype)
        options: dict[str, Any] = {"top_p": config.top_p or None, "other_temperatures": config.others()}
        if config.samples:
            seed = (config.seed << 40) + first
            options = {"samples": config.samples, "generator": torch.Generator(self.device).manual_seed(seed)}
        kept: kd.SparseLogits = kd.compress(
            logits, config.k, temperature=config.temperature, entropy=config.entropy, vocab_size=self.vocab,
            chunk_bytes=round(config.chunk_mib * 2**20) or None, backend=config.backend, **options,
        )  # fmt: skip
        return kept


def _fill(
    cache: kd.TeacherCache,
    source: _Source,
    blocks: list[tuple[Blocks, int]],
    mine: list[int],
    config: CacheConfig,
    stop: StopSignals,
    progress: bool,
) -> None:
    """Append the examples `mine`, committing now and then."""
    need("tqdm", "the progress bar")
    committed = time.perf_counter()
    with progress_bar(len(blocks), len(blocks) - len(mine), progress, "block") as bar:
        for begin in range(0, len(mine), config.batch_size):
            numbers = mine[begin : begin + config.batch_size]
            if stop.received is not None:
                break
            items = [blocks[number][0][blocks[number][1]] for number in numbers]
            batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
            rows = _each(source.rows(batch, numbers[0]))
            for number, tokens, example in zip(numbers, batch["input_ids"], rows, strict=True):
                cache.append(number, example, tokens)
            bar.update(len(numbers))
            if time.perf_counter() - committed >= config.commit_every:
                cache.commit()
                committed = time.perf_counter()
    cache.commit()
    if stop.received is not None:
        raise Interrupted(
            f"stopped by {signal.Signals(stop.received).name} with {len(cache)} of {len(mine)} blocks of this run in "
            f"{str(cache.path)!r}; go on with --resume",
            stop.received,
        )


def _each(batch: kd.SparseLogits) -> list[kd.SparseLogits]:
    """The examples [L, K] of a batch [B, L, K]."""
    batch = batch.to("cpu")
    return [
        kd.SparseLogits(
            batch.ids[i], batch.log_probs[i], batch.log_tail[i], batch.vocab_size, batch.temperature, batch.kind,
            None if batch.entropy is None else batch.entropy[i],
            {t: tail[i] for t, tail in batch.other_tails.items()},
        )
        for i in range(len(batch.ids))
    ]  # fmt: skip

"""Perplexity by domain: token-weighted, sharded over ranks, without logits, and kept on disk for a teacher."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels._checks import fail, require_choice
from kdkernels.errors import UserError

UNITS = ("token", "byte")
Collate = Callable[[list[Any]], dict[str, Tensor]]


def measure_perplexity(
    model: Any,
    datasets: Mapping[str, Any],
    *,
    batch_size: int = 8,
    unit: str = "token",
    collate: Collate | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
    cache: str | os.PathLike[str] | None = None,
    group: Any | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> dict[str, float]:
    """``exp(sum of the tokens' negative log-likelihoods / number of tokens)`` of each domain, in eval mode.

    Args:
        model: a causal language model of transformers. Its head is applied chunk by chunk: no logits are kept.
        datasets: map-style dataset by domain. A sample holds ``input_ids [L]``, and where it has them ``labels [L]``
            (default: the ids; position i is judged by label i + 1), ``attention_mask``, ``position_ids``.
        batch_size: samples per forward.
        unit: ``"token"``; or ``"byte"``, the exponential of nats per byte (2 to the power of the bits per byte), which
            models with different tokenizers may be compared by: every sample then holds ``bytes``, the number of
            UTF-8 bytes of the text that its labels spell.
        collate: samples to a batch of tensors; default: padded on the right, padding masked and not judged.
        ignore_index: labels that count for nothing.
        dtype: in which the head is applied; default that of the model.
        cache: folder that keeps sums by content (parameters, samples and settings): for a teacher, which never
            changes, a second call costs only the hash.
        group: process group that shares the samples; default that of torch.distributed if it is set up. Every rank
            gets the same result.
        backend: as in `kdkernels.distillation_loss`.
        progress: a bar on stderr.

    Raises:
        ValueError: a domain without a token to judge, ids that the model does not know, a likelihood that is not
            finite, a sample without ``bytes``.

    Source: arXiv 2407.16154, section 3.1.
    """
    require_choice("unit", unit, UNITS)
    if not isinstance(batch_size, int) or batch_size < 1:
        fail(ValueError, "batch_size", batch_size, "an int > 0")
    for name, data in datasets.items():
        if len(data) == 0:
            fail(ValueError, f"datasets[{name!r}]", "empty", "at least one sample", "hold some text of it out")
    ranks = _Ranks(group)
    meter = _Meter(model, collate or _Padding(ignore_index), unit, ignore_index, dtype, backend)
    store = None if cache is None else _Store(Path(cache), meter)
    found = {}
    for name, data in datasets.items():
        kept = None if store is None else store.read(data)
        if ranks.all_have(kept is not None, meter.device):
            sums = kept
        else:
            sums = ranks.add(meter.measure(data, name, batch_size, ranks, progress))
            if store is not None and ranks.rank == 0:
                store.write(data, sums)
        assert sums is not None
        found[name] = _perplexity(name, sums, unit)
    return found


def _perplexity(name: str, sums: list[float], unit: str) -> float:
    nll, tokens, size = sums
    if tokens == 0:
        fail(ValueError, f"datasets[{name!r}]", "without a token to judge", "samples with two tokens or more")
    if not math.isfinite(nll):
        remedy = "the model diverged, or its samples hold ids it does not know"
        fail(ValueError, f"negative log-likelihood of {name!r}", nll, "finite", remedy)
    mean = nll / (tokens if unit == "token" else size)
    return math.exp(mean) if mean < 709 else math.inf


class _Ranks:
    """The processes that share the samples."""

    def __init__(self, group: Any | None) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.group, self.alone = group, not distributed
        self.rank = torch.distributed.get_rank(group) if distributed else 0
        self.size = torch.distributed.get_world_size(group) if distributed else 1

    def all_have(self, mine: bool, device: torch.device) -> bool:
        if self.alone:
            return mine
        flag = torch.tensor(float(mine), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=self.group)
        return bool(flag.item())

    def add(self, sums: Tensor) -> list[float]:
        if not self.alone:
            torch.distributed.all_reduce(sums, group=self.group)
        return [float(value) for value in sums]


class _Meter:
    """One model and how its tokens are judged."""

    def __init__(
        self, model: Any, collate: Collate, unit: str, ignore_index: int, dtype: torch.dtype | None, backend: str
    ) -> None:
        from kdkernels.trainers.heads import head_of

        self.model, self.collate, self.unit = model, collate, unit
        self.ignore_index, self.backend = ignore_index, backend
        self.head = head_of(model, "model")
        self.device = self.head.weight.device
        self.dtype = dtype or self.head.weight.dtype

    @torch.no_grad()
    def measure(self, data: Any, name: str, batch_size: int, ranks: _Ranks, progress: bool) -> Tensor:
        """``[nll, tokens, bytes]`` of this rank's samples, float64."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        mine = range(ranks.rank, len(data), ranks.size)
        with _evaluating(self.model):
            for begin in _bar(range(0, len(mine), batch_size), name, progress and ranks.rank == 0):
                samples = [data[i] for i in mine[begin : begin + batch_size]]
                batch = self.collate(samples)
                self._check_ids(batch["input_ids"], name)
                sums[:2] += self._judge({k: v.to(self.device) for k, v in batch.items()})
                if self.unit == "byte":
                    sums[2] += sum(_bytes(sample, name) for sample in samples)
        return sums

    def _check_ids(self, ids: Tensor, name: str) -> None:
        known = int(self.model.get_input_embeddings().weight.shape[0])
        low, high = (int(x) for x in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= known:
            remedy = "another tokenizer's ids: give each model its own, and compare them with unit='byte'"
            given = f"input_ids in [{low}, {high}]"
            fail(ValueError, f"datasets[{name!r}]", given, f"ids in [0, {known}), as the model's embeddings", remedy)

    def _judge(self, batch: dict[str, Tensor]) -> Tensor:
        from kdkernels.trainers.heads import hidden_states
        from kdkernels.trainers.heldout import uniform_teacher

        hidden = hidden_states(self.model, batch)
        output = kd.distillation_loss(
            self.head.logits(hidden, self.dtype),
            uniform_teacher(hidden.to(self.dtype), self.head.vocab),
            labels=batch["labels"], shift=True, ignore_index=self.ignore_index, backend=self.backend,
            return_stats=True,
        )  # fmt: skip
        return torch.stack([output.stats.nll.double().sum(), output.stats.counted.double().sum()])


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _bytes(sample: Any, name: str) -> int:
    if "bytes" not in sample:
        remedy = "give len(text.encode()) of the text that its labels spell"
        fail(ValueError, f"datasets[{name!r}]", "samples without 'bytes'", "with it where unit='byte'", remedy)
    return int(sample["bytes"])


def _bar(steps: range, name: str, progress: bool) -> Any:
    if not progress:
        return steps
    from kdkernels.optional import need

    return need("tqdm", "the progress bar").tqdm(steps, desc=f"perplexity of {name}", unit="batch", leave=False)


class _Padding:
    """Samples of any lengths to one batch, padded on the right."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def __call__(self, samples: list[Any]) -> dict[str, Tensor]:
        rows = [{k: torch.as_tensor(s[k]) for k in ("input_ids", "labels", "position_ids") if k in s} for s in samples]
        for row, sample in zip(rows, samples, strict=True):
            row.setdefault("labels", row["input_ids"])
            if "attention_mask" in sample:
                row["attention_mask"] = torch.as_tensor(sample["attention_mask"])
                row["labels"] = torch.where(row["attention_mask"] == 0, self.ignore_index, row["labels"])
        longest = max(len(row["input_ids"]) for row in rows)
        if any(len(row["input_ids"]) != longest for row in rows):
            for row in rows:  # packed rows carry positions instead of a mask; rows of unequal length need one
                row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
        fill = {"labels": self.ignore_index}
        return {
            key: torch.stack([_filled(row[key], longest, fill.get(key, 0)) for row in rows])
            for key in rows[0]
            if all(key in row for row in rows)
        }


def _filled(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)), value=value)


class _Store:
    """Sums by content, a small JSON file each; one that cannot be read counts as absent."""

    def __init__(self, folder: Path, meter: _Meter) -> None:
        if folder.exists() and not folder.is_dir():
            fail(UserError, "cache", str(folder), "a folder", "choose another")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = fingerprint(meter.model)
        self.settings = (meter.unit, str(meter.dtype), meter.ignore_index)

    def _path(self, data: Any) -> Path:
        digest = hashlib.blake2b(repr((self.model, self.settings)).encode(), digest_size=16)
        for i in range(len(data)):
            sample = data[i]
            for key in ("input_ids", "labels", "attention_mask", "position_ids", "bytes"):
                if key in sample:
                    values = torch.as_tensor(sample[key]).to(torch.int64).contiguous().cpu().numpy()
                    digest.update(f"{key}{values.shape}".encode() + values.tobytes())
        return self.folder / f"perplexity-{digest.hexdigest()}.json"

    def read(self, data: Any) -> list[float] | None:
        try:
            sums = json.loads(self._path(data).read_text(encoding="utf-8"))["sums"]
            return [float(value) for value in sums] if len(sums) == 3 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, data: Any, sums: list[float]) -> None:
        path = self._path(data)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"sums": sums}), encoding="utf-8")
        temporary.replace(path)


def fingerprint(model: Any) -> str:
    """Hash of a model's parameters and buffers, names and shapes included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().contiguous().view(-1).cpu()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()

"""A teacher cache as a torch Dataset, and examples stacked into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdkernels._checks import fail
from kdkernels.compression.manifest import CacheError
from kdkernels.sparse_logits import SparseLogits

if TYPE_CHECKING:
    from kdkernels.compression.cache import TeacherCache


class CacheDataset(Dataset[dict[str, Any]]):
    """Map-style: item i is ``{"example_id": int, "teacher": SparseLogits [L, K]}`` of the i-th id.

        DataLoader(cache.dataset(), batch_size=8, shuffle=True, num_workers=4, collate_fn=CacheDataset.collate)

    Workers, forked or spawned, read the files themselves.
    """

    def __init__(self, cache: TeacherCache, ids: Sequence[int] | None = None) -> None:
        """`ids`: which examples, in which order (default: all, ascending)."""
        self.cache = cache
        self.ids = cache.ids().tolist() if ids is None else [int(i) for i in ids]
        for example_id in self.ids if ids is not None else ():
            cache.reader.input_hash(example_id)  # absent ones are an error now, not after an hour

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example_id = self.ids[index]
        return {"example_id": example_id, "teacher": self.cache[example_id]}

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """``{"example_id": int64 [B], "teacher": SparseLogits [B, L, K]}``."""
        ids = torch.tensor([item["example_id"] for item in items])
        return {"example_id": ids, "teacher": stack([item["teacher"] for item in items])}


def stack(examples: Sequence[SparseLogits]) -> SparseLogits:
    """Examples [L, K_i] of one length as one batch [B, L, K], K the largest; shorter rows are padded."""
    first = examples[0]
    lengths = {len(example.log_tail) for example in examples}
    if len(lengths) > 1:
        remedy = "batch examples of one length, or cut them"
        fail(CacheError, "examples", f"of {sorted(lengths)} rows", "of one length to be stacked", remedy)
    width = max(example.ids.shape[-1] for example in examples)

    def padded(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=value)

    entropy = None
    if first.entropy is not None:
        entropy = torch.stack([_there(example.entropy) for example in examples])
    return SparseLogits(
        torch.stack([padded(example.ids, -1) for example in examples]),
        torch.stack([padded(example.log_probs, -torch.inf) for example in examples]),
        torch.stack([example.log_tail for example in examples]),
        first.vocab_size,
        first.temperature,
        first.kind,
        entropy,
        {t: torch.stack([example.other_tails[t] for example in examples]) for t in first.other_tails},
    )


def _there(entropy: Tensor | None) -> Tensor:
    assert entropy is not None
    return entropy

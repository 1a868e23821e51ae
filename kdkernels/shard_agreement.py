"""Calls on vocabulary shards that begin with an exchange of pages: `kdkernels.compress` and `kdkernels.switch_gate`.

Every call exchanges, on a GPU too: what follows has steps that wait for the device anyhow.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from kdkernels import arguments
from kdkernels._checks import fail
from kdkernels.collectives import Ranks
from kdkernels.shard_groups import resolve
from kdkernels.shard_pages import _brief, exchange
from kdkernels.vocab_parallel import _digest, _form

T = TypeVar("T")

_MOST = 160
"""Characters of one option on a page; of longer ones a checksum stands there."""


def ranks_of(group: object | None, *sides: Any) -> Ranks:
    """The ranks that hold the shards: those of ``group``, or of the DTensors among the sides."""
    arguments.check_group(group)
    found = resolve(group, *sides)
    if found is None:
        remedy = "pass hidden.to_local(), or shard the head with Shard(0)"
        fail(ValueError, "hidden", "a DTensor", "a plain tensor where the head's weight is one", remedy)
    return Ranks(found)


def agreed(ranks: Ranks, side: object, prepare: Callable[[], tuple[T, dict[str, Any], Any]]) -> tuple[T, list[Any]]:
    """What ``prepare`` makes here, and every rank's columns.

    ``prepare`` checks this rank's arguments and returns what it makes of them, the page that all ranks must have alike,
    and this rank's columns. Its error, or a difference of pages, is an error on every rank; ``side`` says on which
    device they meet.
    """
    made: tuple[T] | None = None
    error: Exception | None = None
    columns: Any = None
    try:
        prepared, told, columns = prepare()
        made, page = (prepared,), {name: _short(value) for name, value in told.items()}
    except Exception as failure:  # whatever it is, the other ranks must not wait for this one
        error, page = failure, {"error": _brief(f"{type(failure).__name__}: {failure}")}
    text = json.dumps({"page": page, "columns": columns}, default=str)
    pages = exchange(ranks, text, error, ranks.device_of(side))
    assert made is not None
    return made[0], [told["columns"] for told in pages]


def form_of(side: Any) -> dict[str, Any]:
    """Of logits or a head what ranks must have alike."""
    return {
        "leading shape": list(side.shape[:-1]),
        "dtype": str(side.dtype).removeprefix("torch."),
        "device": side.device.type,
        "form": _form(side),
    }


def digest(x: Tensor) -> str:
    """Shape, dtype and a checksum of the values."""
    return _digest(x.cpu())


def _short(value: Any) -> Any:
    text = json.dumps(value, default=str)
    return value if len(text) <= _MOST else f"{_brief(text, 60)}... with checksum {zlib.crc32(text.encode()):08x}"

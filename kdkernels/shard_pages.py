"""What ranks tell each other before the first collective of a call, so that a difference is an error on every rank."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import torch

from kdkernels._checks import fail
from kdkernels.collectives import DOUBTS, Ranks

if TYPE_CHECKING:
    from kdkernels.vocab_parallel import Local

PAGE = 2048
"""Bytes that each rank tells the others about its call."""

_known: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # columns of all ranks, by group and this rank's page


def exchanges_always(device: torch.device) -> bool:
    """Whether each call begins with an exchange of pages: on a CPU, where it costs no synchronisation."""
    return device.type == "cpu"


def agree(
    ranks: Ranks, local: Local | None, error: Exception | None, device: torch.device
) -> tuple[list[dict[str, Any]], int]:
    """Every rank's page, and the stamp of `kdkernels.ops.shards.Shard`; raises on every rank where they differ.

    Without ``local`` it raises ``error``; on a GPU, once the group is known, at once: the other ranks are among their
    rows then, and an exchange would have this one wait for them until the group's timeout.
    """
    always = local is None or exchanges_always(device)
    if error is not None and not exchanges_always(device) and any(name == ranks.name for name, _ in _known):
        raise error
    page = {"error": _brief(f"{type(error).__name__}: {error}")} if local is None else local.page()
    columns = None if local is None else local.columns
    text = json.dumps({"page": page, "columns": columns}, default=str)
    stamp = zlib.crc32(json.dumps(page, default=str).encode()) % (2**24 - 1) + 1
    if always:
        return exchange(ranks, text, error, device), 0
    _settle(ranks)
    assert local is not None
    key = (ranks.name, columns)
    if key not in _known:
        _known[key] = exchange(ranks, text, error, device)
    return _known[key], stamp


def _brief(text: str, most: int = 900) -> str:
    """At most so many characters, none of which JSON writes in more than one."""
    return "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "'" for c in text)[:most]


def exchange(ranks: Ranks, text: str, error: Exception | None, device: torch.device) -> list[dict[str, Any]]:
    """One all-gather of every rank's page; what differs is an error on all, this rank's own before any other."""
    written = text.encode()[:PAGE].ljust(PAGE)
    given = torch.frombuffer(bytearray(written), dtype=torch.uint8).to(device)
    try:
        gathered = ranks.gather(given).wait().cpu()
    except RuntimeError as failure:
        raise error or failure from failure.__cause__
    if error is not None:
        raise error
    pages = [json.loads(bytes(row.tolist())) for row in gathered]
    for rank, told in enumerate(pages):
        if "error" in told["page"]:
            remedy = "this rank's arguments were accepted; every rank stops"
            fail(
                ValueError, f"arguments of rank {rank} of the vocabulary shards", told["page"]["error"], "valid", remedy
            )
    first = pages[0]["page"]
    for name in dict.fromkeys(key for told in pages for key in told["page"]):
        values = [told["page"].get(name) for told in pages]
        if any(value != first.get(name) for value in values):
            by_rank = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            fail(ValueError, name, by_rank, "the same on every rank of the vocabulary shards")
    return pages


def _settle(ranks: Ranks) -> None:
    """Raise if an earlier call's digests differed, as far as that is known without waiting."""
    doubt = DOUBTS.get(ranks.name)
    if doubt is None or (doubt.device.type != "cpu" and not torch.cuda.current_stream(doubt.device).query()):
        return
    del DOUBTS[ranks.name]
    if bool(doubt):
        remedy = "the loss was NaN; the same calls on CPU tensors name what differs"
        fail(ValueError, "group", "ranks that made different calls", "called alike by every rank", remedy)

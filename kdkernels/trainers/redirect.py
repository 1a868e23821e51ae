"""Run something in place of a wrapped model's forward, so that its wrapper's hooks fire around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def through(wrapper: nn.Module, inner: nn.Module, work: Callable[[], T]) -> T:
    """``work()`` as the forward of ``wrapper`` (DDP, FSDP, or the model itself) around ``inner``.

    DDP then prepares its reduction, and FSDP has the root's parameters, the head's too, gathered while ``work`` runs.
    """
    own = inner.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = own

    def forward(*_: Any, **__: Any) -> T:
        restore()  # the work may call the model itself
        return work()

    inner.__dict__["forward"] = forward
    try:
        result: T = wrapper()
        return result
    finally:
        restore()

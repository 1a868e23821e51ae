"""Training loops over kdkernels' losses; `distill` is the plain one, behind `kdkernels distill`.

Importing this package is cheap: torch and transformers come in with the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkernels.trainers.cache_build import build_cache as build_cache
    from kdkernels.trainers.cache_config import CacheConfig as CacheConfig
    from kdkernels.trainers.config import DistillConfig as DistillConfig
    from kdkernels.trainers.hf import DistillationMixin as DistillationMixin
    from kdkernels.trainers.loop import DistillResult as DistillResult
    from kdkernels.trainers.loop import distill as distill
    from kdkernels.trainers.on_policy import OnPolicy as OnPolicy
    from kdkernels.trainers.signals import Interrupted as Interrupted
    from kdkernels.trainers.trainer import DistillationTrainer as DistillationTrainer
    from kdkernels.trainers.trl import TRLDistillationMixin as TRLDistillationMixin

_HOMES = {
    "CacheConfig": "cache_config",
    "DistillationMixin": "hf",
    "DistillationTrainer": "trainer",
    "TRLDistillationMixin": "trl",
    "build_cache": "cache_build",
    "DistillConfig": "config",
    "DistillResult": "loop",
    "distill": "loop",
    "Interrupted": "signals",
    "OnPolicy": "on_policy",
}

__all__ = [
    "CacheConfig",
    "DistillConfig",
    "DistillResult",
    "DistillationMixin",
    "DistillationTrainer",
    "Interrupted",
    "OnPolicy",
    "TRLDistillationMixin",
    "build_cache",
    "distill",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

"""DDK: draw the distillation data by domain, more from where the student is furthest behind the teacher.

    weights = kd.ddk.DomainWeights(["code", "prose"], alpha=0.5)
    sampler = kd.ddk.DomainSampler({"code": code, "prose": prose}, interval=8000, seed=0)
    loader = DataLoader(sampler.dataset, batch_size=8, sampler=sampler)
    teacher_ppl = kd.ddk.measure_perplexity(teacher, held_out, cache="runs/ddk")
    for batch in loader:                        # one pass over the loader is one interval
        ...
    sampler.set_weights(weights.update(kd.ddk.measure_perplexity(student, held_out), teacher_ppl))

Source: Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models", NeurIPS 2024
(arXiv 2407.16154).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkernels.ddk.perplexity import measure_perplexity as measure_perplexity
    from kdkernels.ddk.sampler import DomainSampler as DomainSampler
    from kdkernels.ddk.schedule import DomainSchedule as DomainSchedule
    from kdkernels.ddk.weights import DomainWeights as DomainWeights

_HOMES = {
    "DomainSampler": "sampler",
    "DomainSchedule": "schedule",
    "DomainWeights": "weights",
    "measure_perplexity": "perplexity",
}

__all__ = ["DomainSampler", "DomainSchedule", "DomainWeights", "measure_perplexity"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

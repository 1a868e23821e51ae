"""kdkernels: every step of language-model distillation that touches the vocabulary axis, in fused kernels.

    import kdkernels as kd
    loss = kd.distillation_loss(student_logits, teacher_logits, "jsd", labels=labels, shift=True)

`distillation_loss` says everything about losses; `explain` says which backend serves a call and why.

Importing the package is free: torch comes in with the first name used, so that data workers which only decode a
teacher cache (`kdkernels.compression`) never load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkernels import evaluation as evaluation
    from kdkernels import trainers as trainers
    from kdkernels.compression.cache import TeacherCache as TeacherCache
    from kdkernels.compression.select import compress as compress
    from kdkernels.divergences import Divergence as Divergence
    from kdkernels.divergences.adaptive_kl import AdaptiveKL as AdaptiveKL
    from kdkernels.divergences.alpha_beta import AlphaBeta as AlphaBeta
    from kdkernels.divergences.forward_kl import ForwardKL as ForwardKL
    from kdkernels.divergences.jsd import JSD as JSD
    from kdkernels.divergences.reverse_kl import ReverseKL as ReverseKL
    from kdkernels.divergences.skew_kl import SkewKL as SkewKL
    from kdkernels.divergences.skew_reverse_kl import SkewReverseKL as SkewReverseKL
    from kdkernels.divergences.total_variation import TotalVariation as TotalVariation
    from kdkernels.explanation import explain as explain
    from kdkernels.logits import LinearLogits as LinearLogits
    from kdkernels.losses import DistillationOutput as DistillationOutput
    from kdkernels.losses import DistillationStats as DistillationStats
    from kdkernels.losses import distillation_loss as distillation_loss
    from kdkernels.modules import DistillationLoss as DistillationLoss
    from kdkernels.ops.gate import SwitchDecision as SwitchDecision
    from kdkernels.sparse_logits import SparseLogits as SparseLogits
    from kdkernels.switch.gate import switch_gate as switch_gate
    from kdkernels.switch.generate import switch_generate as switch_generate
    from kdkernels.switch.output import SwitchOutput as SwitchOutput

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveKL": "divergences.adaptive_kl",
    "AlphaBeta": "divergences.alpha_beta",
    "DistillationLoss": "modules",
    "DistillationOutput": "losses",
    "DistillationStats": "losses",
    "Divergence": "divergences",
    "ForwardKL": "divergences.forward_kl",
    "JSD": "divergences.jsd",
    "LinearLogits": "logits",
    "ReverseKL": "divergences.reverse_kl",
    "SkewKL": "divergences.skew_kl",
    "SkewReverseKL": "divergences.skew_reverse_kl",
    "SparseLogits": "sparse_logits",
    "SwitchDecision": "ops.gate",
    "SwitchOutput": "switch.output",
    "TeacherCache": "compression.cache",
    "TotalVariation": "divergences.total_variation",
    "compress": "compression.select",
    "distillation_loss": "losses",
    "explain": "explanation",
    "switch_gate": "switch.gate",
    "switch_generate": "switch.generate",
}
_PACKAGES = ("compression", "data", "ddk", "divergences", "evaluation", "ops", "switch", "trainers", "triton")

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """A public name, imported on first use (PEP 562)."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})

"""kdkernels: every step of language-model distillation that touches the vocabulary axis, in fused kernels.

    import kdkernels as kd
    loss = kd.distillation_loss(student_logits, teacher_logits, "jsd", labels=labels, shift=True)

`distillation_loss` says everything about losses; `explain` says which backend serves a call and why.
"""

from kdkernels import trainers as trainers  # light: torch and transformers come in with the first use
from kdkernels.divergences import Divergence
from kdkernels.divergences.adaptive_kl import AdaptiveKL
from kdkernels.divergences.alpha_beta import AlphaBeta
from kdkernels.divergences.forward_kl import ForwardKL
from kdkernels.divergences.jsd import JSD
from kdkernels.divergences.reverse_kl import ReverseKL
from kdkernels.divergences.skew_kl import SkewKL
from kdkernels.divergences.skew_reverse_kl import SkewReverseKL
from kdkernels.divergences.total_variation import TotalVariation
from kdkernels.explain import explain
from kdkernels.logits import LinearLogits
from kdkernels.losses import DistillationOutput, DistillationStats, distillation_loss
from kdkernels.modules import DistillationLoss

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "AdaptiveKL",
    "AlphaBeta",
    "DistillationLoss",
    "DistillationOutput",
    "DistillationStats",
    "Divergence",
    "ForwardKL",
    "LinearLogits",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TotalVariation",
    "distillation_loss",
    "explain",
]

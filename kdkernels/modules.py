"""The losses as modules."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from kdkernels import divergences
from kdkernels.divergences import Divergence
from kdkernels.logits import LinearLogits
from kdkernels.losses import DistillationOutput, distillation_loss

_PER_CALL = ("student", "teacher", "divergence", "labels", "token_weights", "num_items")


class DistillationLoss(nn.Module):
    """`kdkernels.distillation_loss` with its options fixed at construction.

    Args:
        divergence: name or object.
        options: every keyword of `kdkernels.distillation_loss` but ``labels``, ``token_weights`` and ``num_items``,
            which belong to a batch and are given to the call.

    Raises:
        TypeError, ValueError: for unknown options at once, for values as `kdkernels.distillation_loss` does.
    """

    def __init__(self, divergence: str | Divergence = "forward_kl", **options: Any) -> None:
        super().__init__()
        allowed = set(inspect.signature(distillation_loss).parameters) - set(_PER_CALL)
        for name in options:
            if name not in allowed:
                hint = (
                    "it belongs to a batch: give it to the call"
                    if name in _PER_CALL
                    else f"known: {', '.join(sorted(allowed))}"
                )
                raise TypeError(f"DistillationLoss has no option {name!r}; {hint}")
        self.divergence = divergences.get(divergence)
        self.options = options

    def forward(
        self,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits,
        labels: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Tensor | DistillationOutput:
        """The loss of one batch; arguments and result as in `kdkernels.distillation_loss`."""
        return distillation_loss(
            student,
            teacher,
            self.divergence,
            labels=labels,
            token_weights=token_weights,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join([repr(self.divergence), *(f"{k}={v!r}" for k, v in self.options.items())])

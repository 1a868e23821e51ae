"""The losses as modules."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kdkernels import arguments, divergences
from kdkernels.divergences import Divergence
from kdkernels.logits import LinearLogits
from kdkernels.losses import DistillationOutput, distillation_loss
from kdkernels.options import FixedOptions
from kdkernels.sparse_logits import SparseLogits

if TYPE_CHECKING:
    from typing_extensions import Unpack

PER_CALL = ("labels", "token_weights", "num_items")


class DistillationLoss(nn.Module):
    """`kdkernels.distillation_loss` with its options fixed at construction.

    Args:
        divergence: name or object.
        return_stats: whether calls return `DistillationOutput` instead of the loss.
        options: every other keyword of `kdkernels.distillation_loss` but labels, token_weights and num_items,
            which belong to a batch and are given to the call.

    Raises:
        TypeError, ValueError: at once, for unknown options and for values that no batch could make right.
    """

    def __init__(
        self,
        divergence: str | Divergence = "forward_kl",
        *,
        return_stats: bool = False,
        **options: Unpack[FixedOptions],
    ) -> None:
        super().__init__()
        allowed = set(FixedOptions.__annotations__)
        for name in options:
            if name not in allowed:
                hint = (
                    "it belongs to a batch: give it to the call"
                    if name in PER_CALL
                    else f"known: {', '.join(sorted(allowed))}"
                )
                raise TypeError(f"DistillationLoss has no option {name!r}; {hint}")
        self.divergence = divergences.get(divergence)
        defaults = {name: p.default for name, p in inspect.signature(distillation_loss).parameters.items()}
        arguments.check_fixed(**{**{name: defaults[name] for name in FixedOptions.__annotations__}, **options})
        self.return_stats = return_stats
        self.options = options

    def forward(
        self,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits | SparseLogits,
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
            return_stats=self.return_stats,
            **self.options,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join([repr(self.divergence), *(f"{k}={v!r}" for k, v in self.options.items())])

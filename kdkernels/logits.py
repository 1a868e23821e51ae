"""The forms in which a distribution over the vocabulary reaches a loss.

A plain tensor of logits ``[..., V]`` is one form. `LinearLogits` is the other: the last hidden states and the LM head,
whose product is never materialised beyond one chunk of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels._checks import fail, require_finite_number


@dataclass(frozen=True, eq=False)
class LinearLogits:
    """Logits given as hidden states times an LM head: ``z = softcap * tanh(scale * (h W^T + b) / softcap)``.

    Args:
        hidden: last hidden states ``[..., H]``, floating point.
        weight: head weight ``[V, H]`` (``lm_head.weight``; tied embeddings work as they are), dtype and device of
            ``hidden`` (under autocast, any floating dtype: both are cast as ``F.linear`` would).
        bias: head bias ``[V]`` or None.
        softcap: soft-capping bound, > 0 (Gemma 2's ``final_logit_softcapping``), or None.
        scale: factor on the logits before capping (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``) or None.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "weight", "bias"):
            value = getattr(self, name)
            if value is None and name == "bias":
                continue
            if not isinstance(value, Tensor):
                fail(TypeError, name, type(value).__name__, "a torch.Tensor")
            if not value.is_floating_point():
                fail(TypeError, name, str(value.dtype), "a floating-point tensor", "cast it with .to(dtype)")
        self._check_shapes()
        require_finite_number("scale", self.scale, optional=True)
        require_finite_number("softcap", self.softcap, optional=True)
        if self.softcap is not None and self.softcap <= 0:
            fail(ValueError, "softcap", self.softcap, "a number > 0, or None for no soft-capping")
        if self.scale == 0:
            fail(ValueError, "scale", self.scale, "a number other than 0, or None for 1")

    def _check_shapes(self) -> None:
        if self.hidden.dim() < 1 or self.weight.dim() != 2 or self.hidden.shape[-1] != self.weight.shape[1]:
            fail(
                ValueError,
                "hidden, weight",
                f"{list(self.hidden.shape)}, {list(self.weight.shape)}",
                "hidden [..., H] and weight [V, H] with the same H",
                "pass lm_head.weight as it is, not transposed",
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            fail(
                ValueError,
                "bias",
                list(self.bias.shape),
                f"one number per vocabulary entry, [{self.weight.shape[0]}]",
            )
        for name in ("weight", "bias"):
            other = getattr(self, name)
            if other is not None and other.device != self.hidden.device:
                fail(
                    ValueError,
                    name,
                    other.device,
                    f"the device of hidden, {self.hidden.device}",
                    "move one of them",
                )

    def __repr__(self) -> str:
        """Shapes and dtypes, not numbers."""
        parts = [f"hidden={_brief(self.hidden)}, weight={_brief(self.weight)}"]
        if self.bias is not None:
            parts.append(f"bias={_brief(self.bias)}")
        parts += [f"{name}={v}" for name in ("softcap", "scale") if (v := getattr(self, name)) is not None]
        return f"LinearLogits({', '.join(parts)})"

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head."""
        return self.weight.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Shape the logits would have, ``[..., V]``."""
        return torch.Size((*self.hidden.shape[:-1], self.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the logits would have."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """Device of the hidden states and the head."""
        return self.hidden.device

    def materialize(self) -> Tensor:
        """The full logits ``[..., V]``: the definition, for tests and small inputs. Differentiable."""
        return transform(
            torch.nn.functional.linear(self.hidden, self.weight, self.bias), None, self.scale, self.softcap
        )


def _brief(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def transform(x: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None) -> Tensor:
    """Stored numbers ``x [..., V]`` to logits: ``z = softcap * tanh(scale * (x + bias) / softcap)``."""
    z = x if bias is None else x + bias
    if scale is not None and scale != 1:
        z = z * scale
    return z if softcap is None or softcap == 0 else softcap * torch.tanh(z / softcap)

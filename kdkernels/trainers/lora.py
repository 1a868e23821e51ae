"""Heads under LoRA adapters: ``z = h W^T + s B A h`` as one linear layer over wider hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.errors import UserError


def causal_lm(model: Any) -> Any:
    """The causal language model inside a PEFT wrapper; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None and hasattr(model, "peft_config") else model


def is_lora(layer: nn.Module) -> bool:
    """Whether an adapter sits on this layer."""
    return hasattr(layer, "base_layer") and hasattr(layer, "lora_A")


def widened(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states ``[..., H + r]``, weight ``[V, H + r]`` and bias that give what the adapted head gives.

    ``[W | s B] [h ; A h]``, one block of columns per active adapter; dropout acts on h before A, as in PEFT. Costs a
    copy of the head, and the gradient of the whole widened weight although W is frozen.

    Raises:
        UserError: an adapter other than plain LoRA on a linear layer, or one merged into its base.
    """
    base = layer.base_layer
    if not isinstance(base, nn.Linear) or getattr(layer, "merged", False):
        raise UserError(f"student: the head is a {type(layer).__name__}; allowed: LoRA over a linear layer, not merged")
    states, columns = [hidden], [base.weight]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if getattr(layer, "use_dora", {}).get(name) or getattr(layer, "lora_bias", {}).get(name):
            raise UserError(f"student: adapter {name!r} of the head uses DoRA or a LoRA bias; allowed: plain LoRA")
        down, up = layer.lora_A[name], layer.lora_B[name]
        states.append(down(layer.lora_dropout[name](hidden.to(down.weight.dtype))).to(hidden.dtype))
        columns.append((up.weight * layer.scaling[name]).to(base.weight.dtype))
    return torch.cat(states, -1), torch.cat(columns, -1), base.bias

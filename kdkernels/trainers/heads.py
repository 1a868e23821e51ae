"""From a causal language model to `LinearLogits`: hidden states of the base model, the head, and what follows it.

A head here is z = softcap * tanh(scale * (h W^T + b) / softcap). The two tables below say under which names the
configurations of transformers keep `scale` and `softcap`; a model type that reads a name its own way has a line in
`BY_TYPE`. `check_head` compares with the model's own logits once at the start of a run, so that a transform nobody
listed is an error and never a slightly different loss.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import kdkernels as kd
from kdkernels.errors import UserError
from kdkernels.trainers.lora import is_lora, widened

# name in the configuration -> what the model does with it
RULES = {
    "final_logit_softcapping": "softcap",  # Gemma 2-4, NanoChat, ...
    "logits_soft_cap": "softcap",  # RecurrentGemma
    "output_logit_soft_cap": "softcap",  # xLSTM
    "logit_scale": "multiply",  # Cohere
    "lm_head_multiplier": "multiply",  # Falcon-H1
    "output_multiplier": "multiply",  # Muse
    "logits_scaling": "divide",  # Granite, MiniCPM3
    "logits_mup_width_multiplier": "divide",  # Inkling
}
# (model type, name) -> the exception
BY_TYPE = {
    ("hyperclovax", "logits_scaling"): "multiply",
    ("hyperclovax_vision_v2", "logits_scaling"): "multiply",
    ("mpt", "logit_scale"): "unused",
}


@dataclass(frozen=True)
class Head:
    """What stands between the base model and the logits. weight [V, H]; bias [V] or None; scale, softcap or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float | None
    softcap: float | None

    @property
    def vocab(self) -> int:
        """Rows of the head, padding included."""
        return self.weight.shape[0]

    def logits(self, hidden: torch.Tensor, dtype: torch.dtype) -> kd.LinearLogits:
        """`LinearLogits` of hidden [..., H], computed in `dtype`; the casts carry the gradient to the masters."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return kd.LinearLogits(
            hidden.to(dtype), self.weight.to(dtype), bias=bias, softcap=self.softcap, scale=self.scale
        )


def head_of(model: Any, role: str) -> Head:
    """The head of a transformers causal LM. Raises `UserError` for a head that is not one plain linear layer."""
    layer = model.get_output_embeddings()
    kind = type(layer).__name__
    if not isinstance(layer, (nn.Linear, nn.Embedding)) or is_lora(layer):
        raise UserError(f"{role}: the head is a {kind}; allowed: one linear layer; merge adapters into it first")
    scale, softcap = _transform(getattr(model.config, "get_text_config", lambda: model.config)())
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def vocabulary(model: Any) -> int:
    """Rows of a model's head, padding included."""
    return int(model.get_output_embeddings().weight.shape[0])


def logits_of(model: Any, batch: dict[str, torch.Tensor], role: str) -> kd.LinearLogits:
    """The model's logits [B, L, V] for a batch, as hidden states and head."""
    return head_logits(model, hidden_states(model, batch), role)


def head_logits(model: Any, hidden: torch.Tensor, role: str) -> kd.LinearLogits:
    """Logits that the model's head makes of hidden [..., H]; a LoRA adapter on the head is part of it."""
    layer = model.get_output_embeddings()
    if not is_lora(layer):
        head = head_of(model, role)
        bias = None if head.bias is None else _whole(head.bias)
        return kd.LinearLogits(hidden, _whole(head.weight), bias=bias, softcap=head.softcap, scale=head.scale)
    hidden, weight, bias = widened(layer, hidden)
    scale, softcap = _transform(getattr(model.config, "get_text_config", lambda: model.config)())
    return kd.LinearLogits(hidden, weight, bias=bias, softcap=softcap, scale=scale)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter that FSDP2 keeps in shards, gathered; its gradient goes back to the shards."""
    gather = getattr(parameter, "full_tensor", None)
    whole: torch.Tensor = parameter if gather is None else gather()
    return whole


def _transform(config: Any) -> tuple[float | None, float | None]:
    scale, softcap = 1.0, None
    for name, usual in RULES.items():
        value = getattr(config, name, None)
        rule = BY_TYPE.get((getattr(config, "model_type", ""), name), usual)
        if value is None or rule == "unused":
            continue
        if rule == "softcap":
            softcap = float(value)
        else:
            scale *= float(value) if rule == "multiply" else 1.0 / float(value)
    return (None if scale == 1.0 else scale), softcap


def hidden_states(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states [B, L, H] of the base model; no logits are built, no cache is kept."""
    base = model.base_model
    wanted: dict[str, Any] = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask") if k in batch}
    wanted["use_cache"] = False
    out = base(**{name: value for name, value in wanted.items() if _takes(base.forward, name)})
    states: torch.Tensor = out.last_hidden_state
    return states


def _takes(forward: Any, name: str) -> bool:
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@torch.no_grad()
def check_head(model: Any, head: Head | None, role: str, device: torch.device) -> None:
    """Raise `UserError` unless `head` (None: what `logits_of` gives) makes the model's own logits of a few tokens."""
    ids = torch.arange(1, 9, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    batch = {"input_ids": ids, "position_ids": torch.arange(8, device=device).unsqueeze(0)}
    training = model.training
    model.eval()
    own = model(input_ids=ids).logits.double()
    side = logits_of(model, batch, role) if head is None else head.logits(hidden_states(model, batch), torch.float64)
    model.train(training)
    bias = None if side.bias is None else side.bias.double()
    exact = kd.LinearLogits(side.hidden.double(), side.weight.double(), bias, side.softcap, side.scale)
    ours = exact.materialize()
    ours = ours[..., : own.shape[-1]]
    # The model rounds its logits to its own dtype, at most a few times.
    error, size = float((ours - own).abs().max()), float(own.abs().max())
    limit = 8 * torch.finfo(model.dtype).eps * max(size, math.ulp(1.0))
    if not error <= max(limit, 1e-4 * size):
        raise UserError(
            f"{role}: {type(model).__name__} does more to its logits than kdkernels knows (largest difference "
            f"{error:.3g} beside logits of {size:.3g}); add its rule to the table in kdkernels/trainers/heads.py"
        )

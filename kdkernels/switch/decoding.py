"""One language model in a generation: its key-value cache, and how far it has read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

CACHES = ("dynamic", "static")


class Decoder:
    """Reads a batch of sequences token by token, or several at once where it fell behind.

    Args:
        role: "student" or "teacher", for error messages.
        model: a causal LM of transformers; peft's wrappers are taken too.
        cache: "dynamic" grows with the sequence, "static" is allocated once.
        mask: ``[B, L]``, 1 for the tokens of the left-padded prompts; None where there is no padding.
        length: the most tokens there can be, L + max_new_tokens.
    """

    def __init__(self, role: str, model: Any, cache: str, mask: Tensor | None, length: int) -> None:
        self.role, self.model = role, model
        self.device = device_of(model)
        self.read = 0
        self.forwards = 0
        self._names = _forward_names(model)
        self._cache = _new_cache(model, cache, length)
        self._static = cache == "static"
        self._mask = self._positions = None
        if mask is not None:
            rest = mask.new_ones(mask.shape[0], length - mask.shape[1])
            self._mask = torch.cat((mask, rest), 1).to(self.device)
            self._positions = (self._mask.cumsum(1) - 1).clamp_(min=0)

    def logits(self, tokens: Tensor, upto: int, rows: Tensor | None = None) -> Tensor:
        """Read ``tokens [B, >= upto]`` (of them ``rows``) from where the cache ends up to ``upto``.

        Returns the logits ``[B, V]`` of the token that follows.
        """
        begin, self.read = self.read, upto
        new = tokens[:, begin:upto] if rows is None else tokens[rows, begin:upto]
        options: dict[str, Any] = {}
        if self._mask is not None and self._positions is not None:
            seen = self._mask[:, :upto]
            # a static cache has its whole length from the start; some models (ALiBi) want a mask of that length
            options["attention_mask"] = self._padded(seen) if self._static else seen
            if "position_ids" in self._names:
                options["position_ids"] = self._positions[:, begin:upto]
        if "logits_to_keep" in self._names:
            options["logits_to_keep"] = 1
        out = self.model(
            input_ids=new.to(self.device),
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        self.forwards += 1
        self._cache = out.past_key_values
        logits: Tensor = out.logits
        return logits[:, -1]

    def _padded(self, seen: Tensor) -> Tensor:
        """``seen [B, upto]`` with zeros for the tokens to come, ``[B, length]``."""
        assert self._mask is not None
        return torch.nn.functional.pad(seen, (0, self._mask.shape[1] - seen.shape[1]))

    def drops_rows(self) -> bool:
        """Whether the cache can forget rows."""
        return all(hasattr(layer, "batch_select_indices") for layer in getattr(self._cache, "layers", [None]))

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but ``rows`` (indices into the present ones)."""
        rows = rows.to(self.device)
        if self.read:
            self._cache.batch_select_indices(rows)
        if self._mask is not None and self._positions is not None:
            self._mask, self._positions = self._mask[rows], self._positions[rows]


def device_of(model: Any) -> torch.device:
    """Where the model takes its input ids."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    found = next((embedding if embedding is not None else model).parameters(), None)
    return torch.device("cpu") if found is None else found.device


def _forward_names(model: Any) -> frozenset[str]:
    """Arguments that the model's forward knows; a wrapper's forward knows those of what it wraps."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


def _new_cache(model: Any, kind: str, length: int) -> Any:
    from kdkernels.optional import need

    transformers = need("transformers", "kd.switch_generate")
    config = model.config.get_text_config(decoder=True)
    if kind == "static":
        return transformers.StaticCache(config=config, max_cache_len=length)
    return transformers.DynamicCache(config=config)

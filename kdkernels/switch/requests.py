"""What `kdkernels.switch_generate` is asked for: its arguments, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels._checks import fail


@dataclass(frozen=True)
class Tokens:
    """Ids that end a row, and the id behind its end."""

    stops: frozenset[int]
    pad: int


def check_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask ``[B, L]`` int64 of left-padded prompts; None where there is no padding."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        fail(TypeError, "input_ids", kind, "an integer tensor [B, L]", "left_padded(prompts, pad) makes one of lists")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        remedy = "an empty batch or prompt gives nothing to continue; one prompt is input_ids[None]"
        fail(ValueError, "input_ids shape", list(input_ids.shape), "[B, L] with B >= 1 and L >= 1", remedy)
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        fail(ValueError, "attention_mask shape", list(attention_mask.shape), f"that of input_ids {[*input_ids.shape]}")
    mask = attention_mask.to(input_ids.device, torch.int64)
    if not bool(((mask == 0) | (mask == 1)).all()):
        fail(ValueError, "attention_mask", "a mask with other values", "0 for padding, 1 for tokens")
    if not bool(mask[:, -1].all() & (mask[:, 1:] >= mask[:, :-1]).all()):
        remedy = "tokenizer.padding_side = 'left'"
        fail(ValueError, "attention_mask", "padding behind or within a prompt", "padding on the left", remedy)
    return None if bool(mask.all()) else mask


def check_model(role: str, model: Any, prompt: int, max_new_tokens: int) -> None:
    """A causal LM that may generate from ``prompt`` tokens: no dropout at work, and a context that is long enough."""
    config = getattr(model, "config", None)
    if config is None or not callable(model) or not hasattr(config, "get_text_config"):
        fail(TypeError, role, type(model).__name__, "a causal language model of transformers")
    if getattr(config, "is_encoder_decoder", False):
        fail(ValueError, role, type(model).__name__, "a decoder-only model", "encoder-decoder models are not served")
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        remedy = f"call {role}.eval() while it generates, and .train() after"
        fail(ValueError, role, "in train mode with gradient checkpointing", "in eval mode: it keeps no cache", remedy)
    if model.training and _has_dropout(model):
        fail(ValueError, role, "in train mode with dropout", "in eval mode", f"call {role}.eval(), and .train() after")
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context and prompt + max_new_tokens > context:
        remedy = "shorten the prompts" if prompt >= context else "lower max_new_tokens or shorten the prompts"
        asked = f"{prompt} + {max_new_tokens} tokens"
        fail(ValueError, "prompt + max_new_tokens", asked, f"at most the {role}'s context, {context}", remedy)


def _has_dropout(model: Any) -> bool:
    dropout = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
    if any(isinstance(m, dropout) and m.training and m.p > 0 for m in model.modules()):
        return True
    numbers = vars(model.config.get_text_config(decoder=True)).items()
    return any(
        name.endswith(("dropout", "dropout_p", "_drop", "pdrop")) and isinstance(value, float) and value > 0
        for name, value in numbers
    )


def common_vocabulary(
    student: Any, teacher: Any, vocab_size: int | None, tokenizer: Any, teacher_tokenizer: Any
) -> int | None:
    """How many tokens exist, by the tokenizer if there is one; None where both heads have just that width."""
    ours, theirs = (int(m.config.get_text_config(decoder=True).vocab_size) for m in (student, teacher))
    if tokenizer is None and teacher_tokenizer is not None:
        fail(ValueError, "teacher_tokenizer", "given alone", "given with tokenizer=, the student's")
    if tokenizer is not None and vocab_size is None:
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        if vocab_size > min(ours, theirs):
            sizes = f"student {ours}, teacher {theirs}, the tokenizer's ids up to {vocab_size - 1}"
            fail(ValueError, "vocabularies", sizes, "of one tokenizer", "use models that share it")
    if tokenizer is not None and teacher_tokenizer is not None:
        from kdkernels.trainers.models import same_tokenizer

        same_tokenizer(teacher_tokenizer, tokenizer)
    if vocab_size is None:
        if ours != theirs:
            remedy = (
                "for a difference in padding pass vocab_size= or tokenizer=; different tokenizers cannot speak in turn"
            )
            fail(ValueError, "vocabularies", f"student {ours}, teacher {theirs}", "of one size", remedy)
        return None
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= min(ours, theirs):
        allowed = f"an int from 1 to the smaller vocabulary (student {ours}, teacher {theirs})"
        fail(ValueError, "vocab_size", repr(vocab_size), allowed)
    return vocab_size if (ours, theirs) != (vocab_size, vocab_size) else None


def check_ids(input_ids: Tensor, mask: Tensor | None, vocab: int) -> None:
    """Every token of the prompts lies in the vocabulary; what lies under padding is not looked at."""
    wrong = (input_ids < 0) | (input_ids >= vocab)
    if mask is not None:
        wrong &= mask.bool()
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        name = f"input_ids[{row}, {column}]"
        fail(ValueError, name, int(input_ids[row, column]), f"a token of the common vocabulary, 0 .. {vocab - 1}")


def uniforms_for(
    given: Tensor | None, generator: torch.Generator | None, rows: int, steps: int, device: torch.device
) -> Tensor:
    """The numbers that decide draws, ``[rows, steps]`` float64 on ``device``, a step's column contiguous.

    Drawn where the generator lives, on the CPU without one: a seed gives the same numbers on every device.
    """
    if given is None:
        place = torch.device("cpu") if generator is None else generator.device
        numbers = torch.rand(rows, steps, dtype=torch.float64, generator=generator, device=place)
    else:
        if generator is not None:
            fail(
                ValueError, "generator", generator, "None where uniforms are given", "they are all the chance there is"
            )
        if not isinstance(given, Tensor) or not given.is_floating_point():
            fail(TypeError, "uniforms", type(given).__name__, "a floating-point tensor [B, max_new_tokens]")
        if given.shape != (rows, steps):
            fail(ValueError, "uniforms shape", list(given.shape), f"[B, max_new_tokens] = {[rows, steps]}")
        numbers = given.to(torch.float64)
        if not bool(((numbers >= 0) & (numbers < 1)).all()):
            fail(ValueError, "uniforms", "numbers outside of [0, 1)", "in [0, 1)", "torch.rand draws them")
    return numbers.to(device).t().contiguous().t()


def tokens_for(student: Any, teacher: Any, eos: int | Sequence[int] | None, pad: int | None, vocab: int) -> Tokens:
    """Stop tokens: those given, else those of both models' generation configs; and the padding."""
    configs = [getattr(m, "generation_config", None) for m in (student, teacher)]
    if eos is None:
        stops = sorted({i for c in configs for i in _ids(getattr(c, "eos_token_id", None))})
    else:
        stops = _ids(eos)
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab for i in stops):
            remedy = "an empty list lets every row run to max_new_tokens"
            fail(ValueError, "eos_token_id", eos, f"ids in 0 .. {vocab - 1}", remedy)
    if pad is None:
        known = [i for c in configs for i in _ids(getattr(c, "pad_token_id", None))]
        pad = next((i for i in (*known, *stops) if 0 <= i < vocab), 0)
    elif isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < vocab:
        fail(ValueError, "pad_token_id", repr(pad), f"an id in 0 .. {vocab - 1}", "it is fed to both models")
    return Tokens(frozenset(stops), pad)


def _ids(value: int | Sequence[int] | Tensor | None) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [int(i) for i in value.flatten().tolist()]
    return [value] if isinstance(value, int) else list(value)


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as ``(input_ids, attention_mask)``, both ``[B, L]`` int64, padded on the left."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        fail(ValueError, "prompts", f"{len(prompts)} of them", "at least one, and none of them empty")
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    return ids, mask

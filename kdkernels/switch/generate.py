"""`switch_generate`: the student writes, and the teacher takes a token over where the student strays too far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels._checks import fail, require_choice
from kdkernels.switch import requests
from kdkernels.switch.decoding import CACHES, Decoder
from kdkernels.switch.loop import Loop
from kdkernels.switch.output import SwitchOutput
from kdkernels.switch.schedules import Schedule, schedule_of
from kdkernels.switch.state import SwitchState

MEASURES = ("needed", "always")


def switch_generate(
    student: Any,
    teacher: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    schedule: str | Schedule = "exponential",
    tau0: float | None = None,
    decay: float | None = None,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    measure: str = "needed",
    cache: str = "dynamic",
    vocab_size: int | None = None,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> SwitchOutput:
    """Generate with a student that a teacher corrects (SWITCH, arXiv 2410.19503).

    At each position the Jensen-Shannon divergence of the two next-token distributions, in bits, is compared with a
    threshold: the teacher's token is taken where it is exceeded (strictly), else the student's. Both key-value caches
    advance on the token taken. One uniform number per row and position decides what is drawn, whoever speaks: with the
    gate closed (`schedule="constant", tau0=1`) this is plain sampling from the student, with the gate open (tau0=-1)
    from the teacher.

    Args:
        student, teacher: causal LMs of transformers, on any devices, in any dtypes; in eval mode (train mode is an
            error where there is dropout or gradient checkpointing, and changes nothing elsewhere).
        input_ids: prompts ``[B, L]``, padded on the left.
        attention_mask: ``[B, L]``, 0 for padding; without it every token counts. `switch.left_padded` makes both.
        max_new_tokens: the most tokens generated; together with the longest prompt within both contexts.
        schedule: a name (exponential, linear, constant, growth, mixture, random, moving_average, target_share) or any
            callable ``(step, state) -> threshold``, a number or ``[B]``; `kdkernels.switch.schedules` has them all,
            `ByDomain` among them.
        tau0, decay: the named schedule's first and second parameter; None takes its default, for the exponential 1
            and .1.
        uniforms: numbers in [0, 1), ``[B, max_new_tokens]``; a prompt alone with its row of them gets the same tokens.
            Default: drawn with ``generator``, on its device (the CPU without one).
        temperature, top_k, top_p: of sampling, in this order; the gate compares at temperature 1 over the whole
            vocabulary.
        do_sample: False takes the most likely token of whoever speaks.
        eos_token_id: ids that end a row. Default: those of both models' generation configs. ``[]``: none.
        pad_token_id: fills rows behind their end. Default: the models' padding, else the first stop token.
        measure: "needed" runs a model only where its answer can matter: at a threshold of 1 or more the teacher is not
            run, below 0 the student is not; what was skipped is read in one forward pass when that model is next
            needed. The tokens are the same, the divergence is unknown there (NaN). "always" runs both at every
            position.
        cache: "dynamic", or "static" (allocated once, for compiled models; rows that ended are computed to the end).
        vocab_size: tokens that exist, where the heads are padded to different widths.
        tokenizer, teacher_tokenizer: compared if given; they also give the vocabulary.
        backend: of `kdkernels.switch_gate`.
        progress: called with (tokens done, max_new_tokens) after each token.

    Returns:
        `SwitchOutput`; on the device of ``input_ids``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed; also for a schedule that returns NaN.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        fail(ValueError, "max_new_tokens", repr(max_new_tokens), "an int >= 1")
    require_choice("cache", cache, CACHES)
    require_choice("measure", measure, MEASURES)
    chosen = schedule_of(schedule, tau0, decay)
    mask = requests.check_prompts(input_ids, attention_mask)
    longest = input_ids.shape[1] if mask is None else int(mask.sum(1).max())
    for role, model in (("student", student), ("teacher", teacher)):
        requests.check_model(role, model, longest, max_new_tokens)
    cut = requests.common_vocabulary(student, teacher, vocab_size, tokenizer, teacher_tokenizer)
    vocab = cut or int(student.config.get_text_config(decoder=True).vocab_size)
    requests.check_ids(input_ids, mask, vocab)
    rows, device = input_ids.shape[0], input_ids.device
    special = requests.tokens_for(student, teacher, eos_token_id, pad_token_id, vocab)
    numbers_drawn = requests.uniforms_for(uniforms, generator, rows, max_new_tokens, device)
    ids = input_ids.long()
    if mask is not None:
        ids = torch.where(mask.bool(), ids, special.pad)
    state = SwitchState(ids, max_new_tokens, numbers_drawn, special.pad)
    shown = torch.ones_like(ids) if mask is None and cache == "static" else mask
    readers = [
        Decoder(role, model, cache, shown, ids.shape[1] + max_new_tokens)
        for role, model in (("student", student), ("teacher", teacher))
    ]
    options = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "do_sample": do_sample, "vocab_size": cut,
        "backend": backend,
    }  # fmt: skip
    loop = Loop(readers[0], readers[1], state, chosen, measure == "always", special, options)
    loop.run(progress)
    return loop.output(torch.ones_like(ids) if mask is None else mask)

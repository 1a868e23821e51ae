"""`switch_generate`: the student writes, and the teacher takes a token over where the student strays too far."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels._checks import fail, require_choice
from kdkernels.switch import requests
from kdkernels.switch.decoding import CACHES, Decoder
from kdkernels.switch.gate import switch_gate
from kdkernels.switch.output import SwitchOutput
from kdkernels.switch.schedules import CLOSED, Mixture, Schedule, schedule_of
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
        student, teacher: causal LMs of transformers in eval mode; they may be on different devices and differ in dtype.
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
    special = requests.tokens_for(student, teacher, eos_token_id, pad_token_id, vocab, device)
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
    run = _Run(readers[0], readers[1], state, chosen, measure == "always", special, options)
    run.run(progress)
    return run.output(torch.ones_like(ids) if mask is None else mask)


class _Run:
    """The loop. ``rows`` are the rows still computed, None for all of them; state and output keep every row."""

    def __init__(
        self, student: Decoder, teacher: Decoder, state: SwitchState, schedule: Schedule, always: bool,
        special: requests.Tokens, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.state, self.schedule = student, teacher, state, schedule
        self.always, self.special, self.options = always, special, options
        self.rows: Tensor | None = None
        self.lengths = torch.zeros_like(state.live, dtype=torch.int64)
        self.invalid = torch.zeros_like(state.live)

    @torch.no_grad()
    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Generate until every row has ended or is as long as it may be."""
        state = self.state
        while state.step < state.max_new_tokens:
            self._advance()
            if progress is not None:
                progress(state.step, state.max_new_tokens)
            going = int(state.live.sum())
            if not going:
                break
            self._drop_rows(going)
        if bool(self.invalid.any()):
            row = int(self.invalid.nonzero()[0, 0])
            fail(ValueError, f"logits of row {row}", "NaN, +inf or nothing but -inf", "a distribution over tokens")

    def _advance(self) -> None:
        """One token for every row."""
        state, at = self.state, self.state.prompt_length + self.state.step
        uniforms = state.uniforms[:, state.step]
        given: float | Tensor
        if isinstance(self.schedule, Mixture):
            given, uniforms = self.schedule.draw(uniforms)
        else:
            given = self.schedule(state.step, state)
        threshold, low, high = self._checked(given)
        student = teacher = None
        if self.always or high >= 0:
            student = self.student.logits(state.tokens, at, self.rows)
        if self.always or low < 1:
            teacher = self.teacher.logits(state.tokens, at, self.rows)
        self._decide(student, teacher, threshold, self._of(uniforms))

    def _checked(self, given: Any) -> tuple[Tensor, float, float]:
        """A schedule's answer as thresholds ``[B]``, with the lowest and the highest of the rows that go on."""
        state = self.state
        if isinstance(given, Tensor) and given.dim() == 0:
            given = given.item()
        if isinstance(given, numbers.Real):
            low = high = float(given)
            threshold = state.jsd.new_full(state.live.shape, low)
        elif isinstance(given, Tensor) and given.shape == state.live.shape and not given.is_complex():
            threshold = given.to(state.live.device, torch.float64)
            low, high = (float(x) for x in threshold[state.live].aminmax())
        else:
            kind = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
            allowed = f"a number or a tensor [B] = [{len(state.live)}]"
            fail(TypeError, f"schedule at step {state.step}", kind, allowed)
        if math.isnan(low) or math.isnan(high):
            fail(
                ValueError,
                f"schedule at step {state.step}",
                "nan",
                "a threshold in bits",
                "1 closes, -1 opens the gate",
            )
        return threshold, low, high

    def _decide(self, student: Tensor | None, teacher: Tensor | None, threshold: Tensor, uniforms: Tensor) -> None:
        """Ask the gate who speaks, and note the answer."""
        alone = student if teacher is None else teacher
        assert alone is not None
        sides, bound = (alone, alone), torch.full_like(self._of(threshold), CLOSED)
        if student is not None and teacher is not None:
            sides, bound = (student, teacher.to(student.device)), self._of(threshold)
        place = sides[0].device
        chance = uniforms.to(place) if self.options["do_sample"] else None
        found = switch_gate(*sides, bound.to(place), uniforms=chance, **self.options)
        device = self.state.live.device
        token = found.token.to(device)
        if device.type != "cpu":  # there the gate raises
            self._put(self.invalid, self._of(self.invalid) | ((token < 0) & self._of(self.state.live)))
            token = token.clamp(min=0)
        for name, logits in (("student_log_probs", student), ("teacher_log_probs", teacher)):
            if logits is not None:
                self._note(name, _log_prob(logits, found.token, self.options["vocab_size"]))
        self._note("threshold", self._of(threshold))
        spoke = found.from_teacher.to(device)
        if student is not None and teacher is not None:
            self._note("jsd", found.jsd)
        elif student is None:
            spoke = torch.ones_like(spoke)
        self._take(token, spoke)

    def _take(self, token: Tensor, spoke: Tensor) -> None:
        """Append a token to the rows that go on, and end those that it ends."""
        state = self.state
        live = self._of(state.live)
        self._put(state.tokens, torch.where(live, token, self.special.pad), state.prompt_length + state.step)
        self._put(state.spoke, spoke & live, state.step)
        self.lengths += state.live
        stops = (token[:, None] == self.special.stops).any(1)
        self._put(state.live, live & ~stops)
        state.step += 1

    def _of(self, x: Tensor) -> Tensor:
        """The rows still computed of ``x [B, ...]``."""
        return x if self.rows is None else x[self.rows]

    def _put(self, x: Tensor, value: Tensor, column: int | None = None) -> None:
        rows = slice(None) if self.rows is None else self.rows
        if column is None:
            x[rows] = value
        else:
            x[rows, column] = value

    def _note(self, name: str, value: Tensor) -> None:
        """A measurement of this step, for the rows that go on."""
        live = self._of(self.state.live)
        buffer = self.state.numbers[name]
        self._put(buffer, torch.where(live, value.to(buffer), torch.nan), self.state.step)

    def _drop_rows(self, going: int) -> None:
        """Stop computing rows that ended once they are at least half of those computed."""
        rows = len(self._of(self.state.live))
        if 2 * going > rows or not (self.student.drops_rows() and self.teacher.drops_rows()):
            return
        kept = self._of(self.state.live).nonzero()[:, 0]
        self.rows = kept if self.rows is None else self.rows[kept]
        self.student.keep_rows(kept)
        self.teacher.keep_rows(kept)

    def output(self, prompt_mask: Tensor) -> SwitchOutput:
        """What was generated, cut to the longest row."""
        state = self.state
        numbers = {name: x[:, : state.step].clone() for name, x in state.numbers.items()}
        return SwitchOutput(
            state.sequences.clone(), state.from_teacher.clone(), lengths=self.lengths, stopped=~state.live,
            prompt_mask=prompt_mask, student_forwards=self.student.forwards, teacher_forwards=self.teacher.forwards,
            **numbers,
        )  # fmt: skip


def _log_prob(logits: Tensor, token: Tensor, vocab: int | None) -> Tensor:
    """Log-probability ``[B]`` of a token each under ``logits [B, V]``, in float32 or better."""
    z = logits[:, :vocab]
    z = z if z.dtype == torch.float64 else z.float()
    return z.gather(1, token.to(z.device).clamp(min=0)[:, None])[:, 0] - z.logsumexp(1)

"""The loop of a generation: ask the schedule, run who is needed, let the gate decide, append the token.

Beside the forward passes a token costs the gate, one log-softmax for each model that ran, and a dozen small operations;
the token ids come to the host once a step, as they must to notice that a row has ended.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels._checks import fail
from kdkernels.switch.decoding import Decoder
from kdkernels.switch.gate import switch_gate
from kdkernels.switch.output import SwitchOutput
from kdkernels.switch.requests import Tokens
from kdkernels.switch.schedules import CLOSED, Mixture, Schedule
from kdkernels.switch.state import SwitchState


class Score:
    """Log-probabilities of chosen tokens. Its working space is kept: fresh pages would cost more than the arithmetic
    (bf16, 8 x 49152: 167 microseconds against 1660)."""

    def __init__(self, vocab: int | None) -> None:
        self.vocab = vocab
        self._space: list[Tensor] = []

    def __call__(self, logits: Tensor, token: Tensor) -> Tensor:
        """Of one token a row ``[B]`` under ``logits [B, V]``, in float32 or, for float64 logits, float64."""
        z = logits[:, : self.vocab]
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        if not self._space or self._space[0].shape != z.shape:
            self._space = [torch.empty_like(z, dtype=wide) for _ in range(1 if z.dtype == wide else 2)]
        if z.dtype != wide:
            z = self._space[1].copy_(z)
        log_probs = torch.log_softmax(z, -1, out=self._space[0])
        return log_probs.gather(1, token.to(z.device).clamp(min=0)[:, None])[:, 0]


class Loop:
    """One generation. State and output keep every row; ``rows`` are those still computed, None for all of them."""

    def __init__(
        self, student: Decoder, teacher: Decoder, state: SwitchState, schedule: Schedule, always: bool,
        special: Tokens, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.state, self.schedule = student, teacher, state, schedule
        self.always, self.special, self.options = always, special, options
        self.score = {f"{role}_log_probs": Score(options["vocab_size"]) for role in ("student", "teacher")}
        self.rows: Tensor | None = None
        self.going = len(state.live)
        self.lengths = torch.full_like(state.live, state.max_new_tokens, dtype=torch.int64)

    @torch.no_grad()
    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Generate until every row has ended or is as long as it may be."""
        state = self.state
        while state.step < state.max_new_tokens and self.going:
            self._advance()
            state.step += 1
            if progress is not None:
                progress(state.step, state.max_new_tokens)

    def _advance(self) -> None:
        """One token for every row that goes on."""
        state, at = self.state, self.state.prompt_length + self.state.step
        uniforms = state.uniforms[:, state.step]
        given: float | Tensor
        if isinstance(self.schedule, Mixture):
            given, uniforms = self.schedule.draw(uniforms)
        else:
            given = self.schedule(state.step, state)
        threshold, low, high = self._checked(given)
        self._write(state.numbers["threshold"], threshold)
        student = teacher = None
        if self.always or high >= 0:
            student = self.student.logits(state.tokens, at, self.rows)
        if self.always or low < 1:
            teacher = self.teacher.logits(state.tokens, at, self.rows)
        token = self._decide(student, teacher, threshold, uniforms)
        self._write(state.tokens, token, state.prompt_length, self.special.pad)
        self._end(token)

    def _checked(self, given: Any) -> tuple[float | Tensor, float, float]:
        """A schedule's answer, a number or float64 ``[B]``, with the lowest and the highest of the rows that go on."""
        state = self.state
        if isinstance(given, Tensor) and given.dim() == 0:
            given = given.item()
        threshold: float | Tensor
        if isinstance(given, numbers.Real):
            threshold = low = high = float(given)
        elif isinstance(given, Tensor) and given.shape == state.live.shape and not given.is_complex():
            threshold = given.to(state.live.device, torch.float64)
            low, high = (float(x) for x in threshold[state.live].aminmax())
        else:
            kind = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
            allowed = f"a number or a tensor [B] = [{len(state.live)}]"
            fail(TypeError, f"schedule at step {state.step}", kind, allowed)
        if math.isnan(low) or math.isnan(high):
            remedy = "1 closes the gate, -1 opens it"
            fail(ValueError, f"schedule at step {state.step}", "nan", "a threshold in bits", remedy)
        return threshold, low, high

    def _decide(
        self, student: Tensor | None, teacher: Tensor | None, threshold: float | Tensor, uniforms: Tensor
    ) -> Tensor:
        """Ask the gate who speaks, and note its answer; the token ``[rows]``, on the device of the sequences.

        A model that was run alone speaks: it is put on both sides of a closed gate, which draws as it always does.
        """
        place = (teacher if student is None else student).device  # type: ignore[union-attr]
        chance = self._of(uniforms).to(place) if self.options["do_sample"] else None
        if student is None or teacher is None:
            alone = teacher if student is None else student
            found = switch_gate(alone, alone, CLOSED, uniforms=chance, **self.options)  # type: ignore[arg-type]
        else:
            bound = self._of(threshold).to(place) if isinstance(threshold, Tensor) else threshold
            found = switch_gate(student, teacher.to(place), bound, uniforms=chance, **self.options)
            self._write(self.state.numbers["jsd"], found.jsd)
        self._write(self.state.spoke, found.from_teacher if student is not None else True, fill=False)
        for name, logits in (("student_log_probs", student), ("teacher_log_probs", teacher)):
            if logits is not None:
                self._write(self.state.numbers[name], self.score[name](logits, found.token))
        return found.token.to(self.lengths.device)

    def _end(self, token: Tensor) -> None:
        """End the rows whose token says so, and stop computing rows that ended once they are half of those computed."""
        state, ids = self.state, token.tolist()
        if min(ids) < 0:  # where the gate does not look at values
            row = ids.index(-1) if self.rows is None else int(self.rows[ids.index(-1)])
            what = "NaN, +inf or nothing but -inf"
            fail(ValueError, f"logits of row {row} at step {state.step}", what, "a distribution", "mend the model")
        if self.special.stops.isdisjoint(ids):
            return
        stops = torch.tensor([i in self.special.stops for i in ids], device=token.device) & self._of(state.live)
        ended = torch.zeros_like(state.live)
        ended[slice(None) if self.rows is None else self.rows] = stops
        self.lengths[ended] = state.step + 1
        state.live &= ~ended
        self.going = int(state.live.sum())
        if 0 < 2 * self.going <= len(ids) and self.student.drops_rows() and self.teacher.drops_rows():
            kept = self._of(state.live).nonzero()[:, 0]
            self.rows = kept if self.rows is None else self.rows[kept]
            self.student.keep_rows(kept)
            self.teacher.keep_rows(kept)

    def _of(self, x: Tensor) -> Tensor:
        """The rows still computed of ``x [B]``."""
        return x if self.rows is None else x[self.rows]

    def _write(self, buffer: Tensor, value: Any, offset: int = 0, fill: float = math.nan) -> None:
        """Set this step's column: to ``value`` (a number, ``[B]`` or one a computed row), in ended rows to ``fill``."""
        column = buffer[:, offset + self.state.step]
        if self.going == len(column):
            column[:] = value
            return
        value = torch.as_tensor(value, dtype=buffer.dtype, device=buffer.device)
        if self.rows is not None and value.shape == column.shape:
            value = value[self.rows]
        filled = torch.where(self._of(self.state.live), value, torch.full_like(value, fill))
        column[slice(None) if self.rows is None else self.rows] = filled

    def output(self, prompt_mask: Tensor) -> SwitchOutput:
        """What was generated, cut to the longest row."""
        state = self.state
        measured = {name: x[:, : state.step].clone() for name, x in state.numbers.items()}
        return SwitchOutput(
            state.sequences.clone(), state.from_teacher.clone(), lengths=self.lengths.clamp(max=state.step),
            stopped=~state.live, prompt_mask=prompt_mask, student_forwards=self.student.forwards,
            teacher_forwards=self.teacher.forwards, **measured,
        )  # fmt: skip

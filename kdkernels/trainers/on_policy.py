"""Training on text that the student writes and the teacher corrects (SWITCH, arXiv 2410.19503): when, what, how often.

Every choice is a function of (seed, step, row): whether a step is trained on generated text, what is replayed, and the
numbers that decide the draws of a row. So a run needs no generator's state to go on, and rows come out alike however
they are spread over batches and ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdkernels._checks import fail, require_finite_number
from kdkernels.errors import UserError
from kdkernels.trainers.progress import progress_bar
from kdkernels.trainers.replay import ReplayBuffer, Written

_STEP, _ROW, _PROMPT = 1, 2, 3
"""Streams of random numbers under one seed."""
_SUMS = ("steps", "generated", "replayed", "sequences", "tokens", "teacher_tokens", "jsd", "measured")


def gate_of(spec: str) -> tuple[str, float | None, float | None]:
    """(schedule, tau0, decay) of ``NAME[:TAU0[,DECAY]]``; `UserError` for anything else."""
    from kdkernels.switch.schedules import schedule_of

    name, _, rest = spec.partition(":")
    try:
        first, second, *more = [float(part) for part in rest.split(",")] + [None] * 2 if rest else [None] * 2
        if any(x is not None for x in more):
            raise ValueError(f"{rest!r} has more than two parameters")
        schedule_of(name, first, second)
    except (TypeError, ValueError) as error:
        raise UserError(f"gate is {spec!r}; allowed: NAME[:TAU0[,DECAY]] ({error}); correct it") from error
    return name, first, second


class WritingStopped(Exception):  # noqa: N818 - a request that was honoured, not an error
    """Writing was asked to stop; nothing of the step is kept."""


@dataclass(frozen=True)
class OnPolicy:
    """How a trainer takes part of its batches from the student itself.

    A step is, with probability ``generated_share``, trained on responses written by `kdkernels.switch_generate` to the
    prompts of its batch, the loss over the whole response, whoever spoke; otherwise on the batch as it is. Sampling
    carries no gradient.

    Args:
        generated_share: 0 is supervised training, 1 generates always; the paper takes .5.
        schedule, tau0, decay: of `kdkernels.switch_generate`; ``schedule="constant", tau0=1`` closes the gate, the
            student writes alone (GKD).
        max_new_tokens: the most tokens of a response; together with the prompt within both contexts.
        temperature, top_k, top_p: of sampling.
        prompt_tokens: a sample with a masked beginning (two labels of -100 or more) is prompted with just that; any
            other with its first ``prompt_tokens`` tokens, at most half of it. Of a packed sample one document, drawn
            by its length, is taken.
        batch_size: sequences written at a time; 0: all of a step.
        replay: written sequences that are kept, over all ranks; 0: none.
        replay_share: probability that a generated step takes kept sequences instead of writing.
        replay_age: steps after which a sequence is trained on no more.
        eos_token_id: tokens that end a response. Default: those of both models' generation configs and the tokenizer's.
        seed: of every choice here.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    generated_share: float = 0.5
    schedule: Any = "exponential"
    tau0: float | None = None
    decay: float | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    prompt_tokens: int = 32
    batch_size: int = 0
    replay: int = 0
    replay_share: float = 0.5
    replay_age: int = 100
    eos_token_id: int | Sequence[int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        from kdkernels.switch.gate import check_sampling
        from kdkernels.switch.schedules import schedule_of

        for name in ("generated_share", "replay_share"):
            require_finite_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= 1:
                fail(ValueError, name, getattr(self, name), "in [0, 1]", "it is a probability")
        least = {"max_new_tokens": 1, "prompt_tokens": 1, "batch_size": 0, "replay": 0, "replay_age": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                fail(ValueError, name, repr(value), f"an int >= {low}")
        check_sampling(self.temperature, self.top_k, self.top_p, True)
        schedule_of(self.schedule, self.tau0, self.decay)


class Writer:
    """Writes the sequences of a step, remembers them for replay, and sums up what the log wants.

    Args:
        policy: when and how.
        student, teacher: causal LMs; they are in eval mode while they write, and as they were after.
        vocab_size: tokens that exist, where the heads are padded to different widths.
        stops: tokens that end a response.
        autocast: the context of a forward pass.
        progress: show a bar for writing that takes longer than a second.
    """

    def __init__(
        self, policy: OnPolicy, student: Any, teacher: Any, *, vocab_size: int | None, stops: Sequence[int],
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext, progress: bool = False,
    ) -> None:  # fmt: skip
        self.policy, self.student, self.teacher = policy, student, teacher
        self.vocab_size, self.stops, self.autocast, self.progress = vocab_size, list(stops), autocast, progress
        self.buffer = ReplayBuffer(policy.replay, policy.replay_age)
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64)

    def plan(self, step: int, rows: int) -> tuple[bool, list[Written] | None]:
        """Whether a step of ``rows`` sequences is generated, and the sequences where they are replayed."""
        generator = np.random.default_rng([self.policy.seed, _STEP, step])
        generate, replay = generator.random(2)
        if generate >= self.policy.generated_share:
            return False, None
        return True, self.buffer.draw(rows, step, generator) if replay < self.policy.replay_share else None

    def write(
        self, step: int, prompts: Sequence[Sequence[int]], rows: Sequence[int],
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Written], Tensor]:  # fmt: skip
        """Responses to prompts, of which ``rows`` are the numbers among all rows of the step; and their sums.

        Raises:
            WritingStopped: ``stopped`` said so between two tokens.
        """
        import kdkernels as kd
        from kdkernels.switch import left_padded
        from kdkernels.switch.decoding import device_of

        policy, place, found = self.policy, device_of(self.student), []
        sums = torch.zeros_like(self.sums)
        size = policy.batch_size or len(prompts)
        draws = torch.from_numpy(np.stack([self._uniforms(step, row) for row in rows]))
        most = policy.max_new_tokens * -(-len(prompts) // size)
        options: dict[str, Any] = {"leave": False, "delay": 1.0, "desc": "writing"}
        with evaluating(self.student, self.teacher), progress_bar(most, 0, self.progress, "token", **options) as bar:

            def note(done: int, _: int) -> None:
                bar.update()
                if stopped():
                    raise WritingStopped

            for begin in range(0, len(prompts), size):
                part = slice(begin, begin + size)
                ids, mask = (x.to(place) for x in left_padded(prompts[part], self.stops[0] if self.stops else 0))
                with self.autocast():
                    out = kd.switch_generate(
                        self.student, self.teacher, ids, mask, max_new_tokens=policy.max_new_tokens,
                        schedule=policy.schedule, tau0=policy.tau0, decay=policy.decay, uniforms=draws[part],
                        temperature=policy.temperature, top_k=policy.top_k, top_p=policy.top_p,
                        eos_token_id=self.stops, vocab_size=self.vocab_size, progress=note,
                    )  # fmt: skip
                found += _sequences(out, prompts[part], step)
                sums += _sums(out)
        return found, sums

    def _uniforms(self, step: int, row: int) -> Any:
        """The numbers that decide the draws of one row of a step, float64 ``[max_new_tokens]``."""
        return np.random.default_rng([self.policy.seed, _ROW, step, row]).random(self.policy.max_new_tokens)

    def commit(self, step: int, generated: bool, written: Sequence[Written] | None, sums: Tensor | None) -> None:
        """A step is done: keep what was written for it (None: it was replayed, or not generated), and count."""
        self.sums += torch.tensor([1, generated, generated and written is None, *[0] * 5], dtype=torch.float64)
        if sums is not None:
            self.sums += sums
        if written is not None and self.policy.replay:
            self.buffer.add(written)

    def take_sums(self) -> Tensor:
        """The sums since the last call, float64 ``[8]``."""
        taken, self.sums = self.sums, torch.zeros_like(self.sums)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Tensors alone: kept sequences, and the sums behind the next line of the log."""
        return {"sums": self.sums, **self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.sums = state["sums"]
        self.buffer.load_state_dict(state)


def figures(sums: Tensor) -> dict[str, float]:
    """What a log says of `Writer.take_sums`; what is not known is left out.

    ``generated_share``, ``replayed_share``: of the steps. Of what was written: ``teacher_share`` of the tokens,
    ``jsd`` in bits over the tokens where it was measured, ``response_length`` in tokens.
    """
    total = dict(zip(_SUMS, sums.tolist(), strict=True))
    parts = {
        "generated_share": ("generated", "steps"), "replayed_share": ("replayed", "steps"),
        "teacher_share": ("teacher_tokens", "tokens"), "jsd": ("jsd", "measured"),
        "response_length": ("tokens", "sequences"),
    }  # fmt: skip
    return {name: total[top] / total[base] for name, (top, base) in parts.items() if total[base]}


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Every module in eval mode (no dropout, no gradient checkpointing), and back as each was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def padded(sequences: Sequence[Written], pad: int) -> dict[str, Tensor]:
    """A batch padded on the right: ``input_ids``, ``attention_mask``, ``labels`` (of responses) int64 ``[B, L]``."""
    width = max(len(s.tokens) for s in sequences)
    ids = torch.full((len(sequences), width), pad, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, s in enumerate(sequences):
        tokens = torch.tensor(s.tokens, dtype=torch.int64)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, s.prompt : len(tokens)] = tokens[s.prompt :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prompt_of(
    sample: dict[str, Tensor], length: int, seed: int, step: int, row: int, mask: Tensor | None = None
) -> list[int]:
    """The prompt in a sample: ``input_ids``, ``labels`` and, where it is packed, ``position_ids`` ``[L]``.

    mask ``[L]``: 1 for tokens, 0 for padding. See `OnPolicy` for the rule.
    """
    ids, labels = sample["input_ids"], sample["labels"]
    if mask is not None:
        ids, labels = ids[mask.bool()], labels[mask.bool()]
    positions = sample.get("position_ids")
    if positions is not None and mask is None:
        last = labels.ne(-100).nonzero()
        end = int(last[-1]) + 1 if len(last) else len(ids)  # the padding behind is a document of its own
        starts = (positions == 0).nonzero()[:, 0].tolist()
        place = int(np.random.default_rng([seed, _PROMPT, step, row]).random() * end)
        begin = max((s for s in starts if s <= place), default=0)
        end = min((s for s in starts if s > place), default=end)
        ids, labels = ids[begin:end], labels[begin:end]
    counting = labels.ne(-100).nonzero()
    masked = int(counting[0]) if len(counting) else len(ids)
    return [int(i) for i in ids[: masked if masked > 1 else max(1, min(length, len(ids) // 2))].tolist()]


def stop_tokens(policy: OnPolicy, student: Any, teacher: Any, tokenizer: Any) -> list[int]:
    """The policy's, or else those of both models' generation configs and the tokenizer's."""
    given = policy.eos_token_id
    if given is not None:
        return [given] if isinstance(given, int) else [int(i) for i in given]
    sources = [getattr(m, "generation_config", None) for m in (student, teacher)]
    found: set[int] = set()
    for source in (*sources, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return sorted(found)


def _sequences(out: Any, prompts: Sequence[Sequence[int]], step: int) -> list[Written]:
    """The rows of a `SwitchOutput`, without padding."""
    responses, lengths = out.responses.tolist(), out.lengths.tolist()
    return [
        Written((*prompt, *response[:length]), len(prompt), step)
        for prompt, response, length in zip(prompts, responses, lengths, strict=True)
    ]


def _sums(out: Any) -> Tensor:
    """What one `SwitchOutput` adds to `_SUMS`."""
    known = ~out.jsd.isnan()
    rest = (out.lengths.sum(), out.from_teacher.sum(), out.jsd.nansum(), known.sum())
    return torch.tensor([0, 0, 0, len(out.lengths), *(float(x) for x in rest)], dtype=torch.float64)

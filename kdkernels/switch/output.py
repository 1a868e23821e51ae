"""What `kdkernels.switch_generate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SwitchOutput:
    """Sequences, who spoke, and what was measured. n is the length of the longest response.

    Behind the end of a row ``sequences`` hold the padding token, ``from_teacher`` is False, and the rest is NaN.

    Attributes:
        sequences: prompts and responses, ``[B, L + n]`` int64.
        from_teacher: whether the teacher spoke, ``[B, n]`` bool.
        jsd: divergence of the two next-token distributions, in bits, ``[B, n]`` float64; NaN also where it was not
            measured.
        threshold: what the divergence was compared with, in bits, ``[B, n]`` float64.
        student_log_probs, teacher_log_probs: of the token under the model, at temperature 1 over the whole vocabulary,
            in nats, ``[B, n]`` float64; NaN where that model was not run.
        lengths: tokens of each response, its stop token included, ``[B]`` int64.
        stopped: whether a stop token ended the row, ``[B]`` bool.
        prompt_mask: 1 for the tokens of the prompts, 0 for their padding, ``[B, L]`` int64.
        student_forwards, teacher_forwards: forward passes of either model.
    """

    sequences: Tensor
    from_teacher: Tensor
    jsd: Tensor
    threshold: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor
    lengths: Tensor
    stopped: Tensor
    prompt_mask: Tensor
    student_forwards: int
    teacher_forwards: int

    @property
    def prompt_length(self) -> int:
        """L, the width of the prompts with their padding."""
        return self.prompt_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """What was generated, ``[B, n]``."""
        return self.sequences[:, self.prompt_length :]

    @property
    def response_mask(self) -> Tensor:
        """True for the tokens that were generated, ``[B, n]``; False behind the end of a row."""
        steps = torch.arange(self.from_teacher.shape[1], device=self.lengths.device)
        return steps < self.lengths[:, None]

    @property
    def attention_mask(self) -> Tensor:
        """For a forward pass over ``sequences``, ``[B, L + n]`` int64."""
        return torch.cat((self.prompt_mask, self.response_mask.to(self.prompt_mask.dtype)), 1)

    def labels(self, ignore_index: int = -100) -> Tensor:
        """``sequences`` with ``ignore_index`` for prompts and padding: the loss is over all of the response."""
        ours = torch.cat((torch.zeros_like(self.prompt_mask, dtype=torch.bool), self.response_mask), 1)
        return torch.where(ours, self.sequences, ignore_index)

    def summary(self) -> dict[str, Any]:
        """Figures of the batch as plain numbers: whole, and for each position of the responses.

        ``teacher_share``: of the tokens those that the teacher spoke. ``mean_jsd``: bits, over the ``measured`` tokens.
        ``student``, ``teacher``: the sum of log-probabilities in nats over the ``tokens`` at which the model was run.
        ``log_likelihood_ratio``: teacher minus student, nats a token, over tokens that both scored. ``by_position``
        holds lists over the position t = 0 .. n - 1, None where nothing is known; ``rows`` are those that reach t.
        """
        mask = self.response_mask
        tokens, spoken = int(mask.sum()), int(self.from_teacher.sum())
        ratio = self.teacher_log_probs - self.student_log_probs
        columns = {
            "jsd": self.jsd, "threshold": self.threshold, "student_log_prob": self.student_log_probs,
            "teacher_log_prob": self.teacher_log_probs, "log_likelihood_ratio": ratio,
        }  # fmt: skip
        share = torch.where(mask, self.from_teacher.double(), torch.nan)
        return {
            "rows": len(self.lengths),
            "tokens": tokens,
            "teacher_tokens": spoken,
            "teacher_share": spoken / tokens if tokens else None,
            "stopped_rows": int(self.stopped.sum()),
            "measured": int((~self.jsd.isnan()).sum()),
            "mean_jsd": _mean(self.jsd),
            "log_likelihood_ratio": _mean(ratio),
            "student": _likelihood(self.student_log_probs, self.student_forwards),
            "teacher": _likelihood(self.teacher_log_probs, self.teacher_forwards),
            "by_position": {
                "rows": mask.sum(0).tolist(),
                "teacher_share": _by_position(share),
                **{name: _by_position(x) for name, x in columns.items()},
            },
        }


def merged(outputs: Sequence[SwitchOutput], pad_token_id: int) -> SwitchOutput:
    """Batches as one: prompts padded on the left, responses behind their end."""
    prompt = max(out.prompt_length for out in outputs)
    steps = max(out.from_teacher.shape[1] for out in outputs)
    rows: dict[str, list[Tensor]] = {}
    for out in outputs:
        left, right = prompt - out.prompt_length, steps - out.from_teacher.shape[1]
        sides = {"sequences": (left, right, pad_token_id), "prompt_mask": (left, 0, 0), "from_teacher": (0, right, 0)}
        for item in fields(SwitchOutput):
            value = getattr(out, item.name)
            if isinstance(value, Tensor):
                before, behind, fill = sides.get(item.name, (0, right, torch.nan))
                value = torch.nn.functional.pad(value, (before, behind), value=fill) if value.dim() == 2 else value
                rows.setdefault(item.name, []).append(value)
    whole: dict[str, Any] = {name: torch.cat(parts) for name, parts in rows.items()}
    whole.update(
        {name: sum(getattr(out, name) for out in outputs) for name in ("student_forwards", "teacher_forwards")}
    )
    return SwitchOutput(**whole)


def _mean(x: Tensor) -> float | None:
    known = ~x.isnan()
    return float(x[known].double().mean()) if bool(known.any()) else None


def _likelihood(log_probs: Tensor, forwards: int) -> dict[str, Any]:
    known = ~log_probs.isnan()
    return {"log_likelihood": float(log_probs[known].sum()), "tokens": int(known.sum()), "forwards": forwards}


def _by_position(x: Tensor) -> list[float | None]:
    """Means over the rows ``[B, n]`` of what is known."""
    known = ~x.isnan()
    count = known.sum(0)
    mean = torch.where(known, x.double(), 0.0).sum(0) / count
    return [value if seen else None for value, seen in zip(mean.tolist(), count.tolist(), strict=True)]

"""What a generation has produced so far: written by the loop, read by threshold schedules."""

from __future__ import annotations

import torch
from torch import Tensor


class SwitchState:
    """Tokens and measurements up to, not including, the current step. Schedules read it and change nothing.

    Attributes:
        step: tokens generated so far.
        max_new_tokens: the most there can be.
        prompt_length: L, width of the prompts.
        live: which rows go on, ``[B]`` bool.
        uniforms: the numbers that decide draws, ``[B, max_new_tokens]`` float64.
    """

    def __init__(self, input_ids: Tensor, max_new_tokens: int, uniforms: Tensor, pad: int) -> None:
        rows, device = input_ids.shape[0], input_ids.device
        self.step = 0
        self.max_new_tokens = max_new_tokens
        self.prompt_length = input_ids.shape[1]
        self.uniforms = uniforms
        self.live = torch.ones(rows, dtype=torch.bool, device=device)
        self.tokens = input_ids.new_full((rows, self.prompt_length + max_new_tokens), pad)
        self.tokens[:, : self.prompt_length] = input_ids
        self.spoke = torch.zeros((rows, max_new_tokens), dtype=torch.bool, device=device)
        self.numbers = {
            name: torch.full((rows, max_new_tokens), torch.nan, dtype=torch.float64, device=device)
            for name in ("jsd", "threshold", "student_log_probs", "teacher_log_probs")
        }

    @property
    def sequences(self) -> Tensor:
        """Prompts and what was generated, ``[B, L + step]``; rows that ended are padded."""
        return self.tokens[:, : self.prompt_length + self.step]

    @property
    def from_teacher(self) -> Tensor:
        """Whether the teacher spoke, ``[B, step]`` bool."""
        return self.spoke[:, : self.step]

    @property
    def jsd(self) -> Tensor:
        """Divergence in bits, ``[B, step]`` float64; NaN where it was not measured."""
        return self.numbers["jsd"][:, : self.step]

    @property
    def threshold(self) -> Tensor:
        """Thresholds in bits, ``[B, step]`` float64."""
        return self.numbers["threshold"][:, : self.step]

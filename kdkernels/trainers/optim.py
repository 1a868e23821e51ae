"""Optimisers by name, and the learning rate as a pure function of the step (so it has no state to save)."""

from __future__ import annotations

import math

import torch
from torch import nn

from kdkernels.trainers.config import DistillConfig


def build_optimizer(model: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """The optimiser over the parameters that require a gradient; weight decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: DistillConfig) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up, then the schedule down to `min_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)

"""What a sparse teacher's gradient is worth: its angle to the full teacher's, by mode and number of entries.

Teacher: SmolLM2-135M on windows of 512 tokens of the demo's three domains. Students: the same model left early, after
two thirds of its layers and after all but one, through the same norm and head: far from and near the teacher. Two
angles, forward KL: of the gradient of each token's logits (mean), and of the gradient of the head's weight over all
tokens, where the noise of draws averages out and a bias does not. `length` is the ratio of the norms of the latter,
`loss` the mean loss, of draws less the teacher's entropy: then it estimates the KL divergence as the others do.
Draws are compared by unique entries: `unique` is their mean number.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.codec_rows import LENGTH
from demo import sources


class Setting(NamedTuple):
    """One way to keep a teacher's row and compare with it."""

    mode: str
    kept: int

    def teacher(self, logits: Tensor, generator: torch.Generator) -> kd.SparseLogits:
        if self.mode == "sampled":
            return kd.compress(logits, samples=self.kept, generator=generator, entropy=True)
        return kd.compress(logits, self.kept, entropy=True)


SETTINGS = (
    *(Setting(mode, k) for k in (12, 64, 256) for mode in ("truncate", "renormalize", "ghost")),
    *(Setting("sampled", n) for n in (12, 31, 50, 100, 400)),
)


class Student(NamedTuple):
    """Hidden states of all tokens ``[N, H]``."""

    name: str
    hidden: Tensor


def states(folder: Path, windows: int) -> tuple[Tensor, list[Student], Tensor]:
    """The teacher's logits ``[N, V]``, the students' hidden states, the head that both share."""
    from kdkernels.trainers.models import load_model, load_tokenizer, quiet

    for name, prepare in (("teacher", sources.prepare_teacher), ("text", sources.prepare_text)):
        if not (folder / name).is_dir():
            prepare(folder / name)
    with quiet():
        tokenizer = load_tokenizer("teacher", str(folder / "teacher"))
        model = load_model("teacher", str(folder / "teacher"), torch.float32).eval()
    layers = model.config.num_hidden_layers
    exits = (2 * layers // 3, layers - 1)
    logits: list[Tensor] = []
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in exits}
    for domain in sorted(path for path in (folder / "text").iterdir() if path.is_dir()):
        text = "".join(path.read_text(encoding="utf-8") for path in sorted(domain.iterdir()))
        for window in range(windows):
            begin = len(text) * window // windows
            tokens = tokenizer(text[begin : begin + 12 * LENGTH], return_tensors="pt").input_ids[:, :LENGTH]
            with torch.no_grad():
                output = model(tokens, output_hidden_states=True)
                logits.append(output.logits[0].float())
                for layer in exits:
                    hidden[layer].append(model.model.norm(output.hidden_states[layer])[0].float())
    students = [Student(f"after {layer} of {layers} layers", torch.cat(hidden[layer])) for layer in exits]
    return torch.cat(logits), students, model.lm_head.weight.detach().float()


class Gradients(NamedTuple):
    """Mean loss, gradient of each token's logits ``[N, V]``, gradient of the head ``[V, H]``."""

    loss: float
    logits: Tensor
    weight: Tensor


def gradients(student: Student, weight: Tensor, teacher: Tensor | kd.SparseLogits, mode: str) -> Gradients:
    """Of forward KL, by the functions that training calls."""
    z = (student.hidden @ weight.T).requires_grad_()
    output = kd.distillation_loss(z, teacher, sparse_mode=mode, return_stats=True)
    output.loss.backward()
    loss = float(output.loss.detach())
    if mode == "sampled":
        loss -= float(output.stats.teacher_entropy.mean())
    assert z.grad is not None
    return Gradients(loss, z.grad, z.grad.T @ student.hidden)


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Degrees between rows ``[C, D]``; by the chord between unit vectors, which small angles do not cancel."""
    angles = []
    for one, other in zip(x.split(256), y.split(256), strict=True):
        units = (z / z.norm(dim=-1, keepdim=True) for z in (one.double(), other.double()))
        chord = next(units) - next(units)
        angles.append(2 * (chord.norm(dim=-1) / 2).clamp(max=1).arcsin() * (180 / math.pi))
    return torch.cat(angles)


def measure(folder: Path, windows: int) -> dict[str, Any]:
    """Every setting against the full teacher, for each student."""
    full, students, weight = states(folder, windows)
    generator = torch.Generator().manual_seed(0)
    table = []
    for student in students:
        reference = gradients(student, weight, full, "ghost")
        for setting in SETTINGS:
            teacher = setting.teacher(full, generator)
            found = gradients(student, weight, teacher, setting.mode)
            entry = {
                "student": student.name,
                "mode": setting.mode,
                "kept": setting.kept,
                "unique": float((teacher.ids >= 0).sum(-1).double().mean()),
                "loss": found.loss,
                "full_loss": reference.loss,
                "token_angle": float(angle(found.logits, reference.logits).mean()),
                "head_angle": float(angle(found.weight.view(1, -1), reference.weight.view(1, -1))),
                "length": float(found.weight.double().norm() / reference.weight.double().norm()),
            }
            table.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()})
            print(table[-1], flush=True)
    return {"tokens": len(full), "vocabulary": full.shape[-1], "angles": table}

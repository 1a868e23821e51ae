"""The gate in Triton: from tensors to its launches. No look at values, no synchronisation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdkernels.triton import gate, gate_sums, launch
from kdkernels.triton.host import LOOSE, form, layout, on, side

if TYPE_CHECKING:
    from kdkernels.ops.gate import Sampling, SwitchDecision
    from kdkernels.ops.rows import Side


def gate_rows_(
    student: Side, teacher: Side, threshold: Tensor, sampling: Sampling, vocab: int, out: SwitchDecision
) -> None:
    """Fill ``out``; see `kdkernels.ops.gate.gate_rows_`. Allocates 28 bytes for each program of the first launches."""
    rows, x = student.x.shape[0], student.x
    if rows == 0:
        return
    k, p = sampling.top_k if sampling.top_k < vocab else 0, sampling.top_p
    sampled = sampling.uniforms is not None
    filtered = sampled and (k > 0 or p < 1)
    sizes, vec = launch.GATE, launch.VECTOR // max(x.element_size(), teacher.x.element_size())
    share, splits = launch.gate_parts(rows, vocab, vec)
    norms = torch.empty((6, rows, splits), dtype=torch.float32, device=x.device)
    parts = torch.empty((rows, splits), dtype=torch.float32, device=x.device)
    common: dict[str, Any] = {
        **side("student", student), **side("teacher", teacher), "norms": norms,
        "vocab": vocab, "splits": splits, "share": share,
        "FORM_S": form(student), "FORM_T": form(teacher), "LAYOUT": _layout(x, teacher.x, vocab),
    }  # fmt: skip
    c, padded = math.log2(math.e) / sampling.temperature, 1 << (splits - 1).bit_length()
    tiles = {"ROWS": sizes.vectors, "VEC": vec}
    hot = sampled and not filtered and sampling.temperature != 1
    decision = {
        "parts": parts, "threshold": threshold, "uniforms": sampling.uniforms,
        "token": out.token, "from_teacher": out.from_teacher.view(torch.uint8), "jsd": out.jsd,
        "c": c, "top_k": k, "top_p": p, "p_rest": p - float(np.float32(p)),
        "HAS_K": sampled and k > 0, "HAS_P": sampled and p < 1, "SPLITS": padded, "SIZE": launch.GATE_SEARCH,
    }  # fmt: skip
    with on(x.device):
        launch.start(gate_sums.norms_kernel, (rows, splits, 1), common | {"c": c, "HOT": hot} | tiles, sizes.options())
        launch.start(gate.parts_kernel, (rows, splits, 1), common | {"parts": parts, "SPLITS": padded} | tiles,
                     sizes.options())  # fmt: skip
        launch.start(gate.decide_kernel, (rows, 1, 1), common | decision, launch.GATE_DECIDE.options())


def _layout(student: Tensor, teacher: Tensor, vocab: int) -> int:
    """Which loads both sides allow: of one dtype, those of `layout`."""
    return layout(vocab, [student, teacher]) if student.dtype == teacher.dtype else LOOSE

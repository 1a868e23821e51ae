"""The row function in Triton: from tensors to a launch. No look at values, no allocation, no synchronisation."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels import divergences
from kdkernels.triton import adaptive, dense, forms, launch, scale, sparse
from kdkernels.triton.element import as_triton

if TYPE_CHECKING:
    from kdkernels.ops.rows import RowSpec, Side
    from kdkernels.ops.sparse import SparseRows
    from kdkernels.weights import RowWeights

LOOSE, SHIFTED, WHOLE = 0, 1, 2  # see kdkernels.triton.rows
PLAIN, LINEAR, CAPPED = 0, 1, 2
ADAPTIVE = "adaptive_kl"
MODES = ("ghost", "renormalize", "truncate", "sampled")  # as in kdkernels.triton.kept
CARRIES = {"forward_kl": 1, "reverse_kl": 2}


def divergence_rows_(
    student: Side,
    teacher: Side,
    weights: RowWeights,
    spec: RowSpec,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fill ``loss [C]``, ``dlogits [C, >= vocab]`` and ``stats [C, 6]``; see `kdkernels.ops.rows`."""
    rows = loss.shape[0]
    if rows == 0:
        return
    x = student.x
    online = spec.kernel in CARRIES
    major = launch.architecture(x.device)
    sizes = launch.shape(spec.vocab, x.element_size(), online, stats is not None, major)
    arguments: dict[str, Any] = {
        **side("student", student),
        **side("teacher", teacher),
        **gradient(dlogits),
        "loss": loss, "stats": stats, "w_kd": weights.kd, "w_ce": weights.ce, "labels": weights.labels,
        **numbers(spec),
        "COLD": weights.labels is not None and spec.temperature != 1,
        "FORM_S": form(student), "FORM_T": form(teacher), **tiles(sizes, spec.vocab, x, teacher.x, dlogits),
    }  # fmt: skip
    kernel = adaptive.adaptive_kernel
    if spec.kernel == ADAPTIVE:
        del arguments["b"]
    else:
        kernel = dense.dense_kernel
        arguments |= {**elements(spec), "CARRY": CARRIES.get(spec.kernel, 0)}
    with on(x.device):
        launch.start(kernel, (rows, 1, 1), arguments, sizes.options())


def sparse_rows_(
    student: Side,
    teacher: SparseRows,
    weights: RowWeights,
    spec: RowSpec,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Fill ``loss [C]``, ``dlogits [C, >= vocab]`` and ``stats [C, 6]``; see `kdkernels.ops.sparse`.

    Allocates float32 ``[C, K]``, the kept logits, which the gradient may overwrite where they stand, and a bit for each
    logit, to tell them from the others."""
    rows, count = teacher.ids.shape
    if rows == 0:
        return
    x = student.x
    sizes = launch.sparse_shape(spec.vocab, x.element_size(), stats is not None, launch.architecture(x.device))
    functions = divergences.elements(spec.kernel)
    words = -(-(spec.vocab + launch.VECTOR) // 32)
    arguments: dict[str, Any] = {
        **side("student", student), **teacher._asdict(), "kept": torch.empty_like(teacher.log_probs), "count": count,
        "bits": torch.empty((rows, words), dtype=torch.int32, device=x.device), "words": words,
        **gradient(dlogits),
        "loss": loss, "stats": stats, "w_kd": weights.kd, "w_ce": weights.ce, "labels": weights.labels,
        **numbers(spec), "excess": functions.excess(spec.a, spec.b),
        "TERM": as_triton(functions.term), "GRAD": as_triton(functions.grad), "MODE": MODES.index(spec.mode),
        "COLD": weights.labels is not None and spec.temperature != 1,
        "FORM_S": form(student), **tiles(sizes, spec.vocab, x, dlogits),
    }  # fmt: skip
    with on(x.device):
        launch.start(sparse.sparse_kernel, (rows, 1, 1), arguments, sizes.options())


def scales(buffer: Tensor) -> bool:
    """Whether `scale_` can serve this buffer."""
    return buffer.dtype in (torch.float32, torch.bfloat16, torch.float16) and (
        buffer.is_contiguous() or (buffer.dim() == 2 and buffer.stride(1) == 1)
    )


def scale_(buffer: Tensor, factor: Tensor) -> None:
    """``buffer *= factor`` for a factor ``[]`` or, one a row of ``buffer [N, ...]``, ``[N]``; a row whose factor is 0
    becomes 0. The factor is looked at on the device: 1 leaves the memory alone."""
    if buffer.numel() == 0:
        return
    per_row = factor.dim() == 1
    rows = buffer.shape[0] if per_row or not buffer.is_contiguous() else 1
    columns = buffer.numel() // rows
    size, row_programs, parts = launch.scaling(rows, columns, buffer.element_size())
    arguments = {
        "x": buffer, "stride": buffer.stride(0) if rows > 1 else columns, "rows": rows, "columns": columns,
        "factor": factor, "factor_stride": factor.stride(0) if per_row else 0, "PER_ROW": per_row, "SIZE": size,
    }  # fmt: skip
    with on(buffer.device):
        launch.start(scale.scale_kernel, (row_programs, parts, 1), arguments, launch.SCALING.options())


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def side(name: str, given: Side) -> dict[str, Any]:
    """A kernel's arguments about the student or the teacher."""
    return {
        name: given.x,
        f"{name}_stride": given.x.stride(0),
        f"{name}_bias": given.bias,
        f"{name}_scale": float(given.scale),
        f"{name}_cap": float(given.softcap),
    }


def gradient(dlogits: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments about the gradient."""
    stride, vocab = (0, 0) if dlogits is None else (dlogits.stride(0), dlogits.shape[1])
    return {"dlogits": dlogits, "dlogits_stride": stride, "dlogits_vocab": vocab}


def numbers(spec: RowSpec) -> dict[str, Any]:
    """Vocabulary, temperature and parameters. c is log2(e) / T."""
    per_t = 1.0 / spec.temperature
    return {"vocab": spec.vocab, "per_t": per_t, "c": per_t * math.log2(math.e), "a": float(spec.a), "b": float(spec.b)}


def elements(spec: RowSpec) -> dict[str, Any]:
    """The element functions, and their forms for rows without masked entries."""
    functions = divergences.elements(spec.kernel)
    quick, summed = as_triton(functions.term, True), as_triton(functions.grad, True)
    form = forms.find(spec.kernel, spec.a, spec.b) or forms.Form(quick, summed, summed, 0)
    return {
        "TERM": as_triton(functions.term), "GRAD": as_triton(functions.grad),
        "QUICK_TERM": form.term, "SUM_GRAD": form.grad, "QUICK_GRAD": form.weighed, "KIND": form.kind,
    }  # fmt: skip


def form(given: Side) -> int:
    """How a side's stored numbers become logits."""
    if given.softcap:
        return CAPPED
    return PLAIN if given.bias is None and given.scale == 1 else LINEAR


def tiles(sizes: launch.Shape, vocab: int, *operands: Tensor | None) -> dict[str, Any]:
    """Tile and layout of a launch over these operands."""
    present = [x for x in operands if x is not None]
    size = present[0].element_size()
    return {"LAYOUT": layout(vocab, present), "ROWS": sizes.vectors, "VEC": launch.VECTOR // size}


def layout(vocab: int, operands: list[Tensor]) -> int:
    """Which loads the operands' addresses allow."""
    size = operands[0].element_size()
    starts = {x.data_ptr() % launch.VECTOR for x in operands}
    strides = {x.stride(0) * size % launch.VECTOR if x.shape[0] > 1 else 0 for x in operands}
    if starts == {0} and strides == {0} and vocab * size % launch.VECTOR == 0:
        return WHOLE
    return SHIFTED if len(starts) == 1 and len(strides) == 1 else LOOSE

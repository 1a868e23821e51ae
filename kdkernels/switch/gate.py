"""`switch_gate`: at one position, how far student and teacher are apart, who speaks, and what it says."""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels import arguments, backends
from kdkernels._checks import fail, require_finite_number, values_checked
from kdkernels.logits import LinearLogits
from kdkernels.ops.gate import Sampling, SwitchDecision, gate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def switch_gate(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    threshold: float | Tensor,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> SwitchDecision:
    """Decide for each of B rows whether student or teacher says the next token, and draw it.

    The teacher speaks where the Jensen-Shannon divergence of the two next-token distributions, in bits, is greater
    than the threshold (SWITCH, arXiv 2410.19503). The divergence is that of the models' own distributions, over the
    whole vocabulary at temperature 1, and is clamped to [0, 1]: a threshold of 1 keeps the teacher silent, a negative
    one the student. ``temperature``, ``top_k`` and ``top_p`` shape only the distribution that the token is drawn
    from, in this order, as in transformers.

    One uniform number a row decides the token of whoever speaks: it is the first entry whose cumulative mass, in the
    order of ids, exceeds the number. Equal numbers give equal tokens on every backend, up to rounding where a number
    falls between two entries.

        >>> decision = kd.switch_gate(student_logits, teacher_logits, threshold=0.3, uniforms=uniforms)
        >>> next_tokens = decision.token  # [B]

    Args:
        student_logits: ``[B, V]``, of the last position, or `LinearLogits` (one product makes them). float32, bfloat16,
            float16, float64. No gradient reaches them.
        teacher_logits: likewise; its dtype may be another.
        threshold: in bits, a number or ``[B]``.
        group: a process group (or one-dimensional DeviceMesh) over whose ranks the vocabulary is sharded, both models'
            alike: logits are this rank's columns, in rank order, of any size, also none. Every rank gets the answer of
            the whole. DTensors sharded over the vocabulary (logits ``Shard(-1)``, weight and bias ``Shard(0)``) need no
            group. Options that differ, or a wrong argument on one rank, are an error on every rank.
        uniforms: float64 or float32 ``[B]`` in [0, 1). None: drawn with ``generator``, in one call of ``torch.rand``
            in float64 on the logits' device. Under ``group`` the first rank's decide on all.
        temperature: T in [1e-5, 1e6].
        top_k: the k most likely entries may be drawn. Of entries as likely as the k-th those with the lower ids: k
            in all, where transformers keeps every equal one.
        top_p: of these the fewest most likely ones with mass >= p of theirs, in (0, 1].
        do_sample: False takes the most likely entry, of equally likely ones the one with the lowest id.
        generator: of the uniforms.
        vocab_size: entries that exist, in all; columns beyond are padding. Required where the models' differ.
        backend: "auto", or one of "eager", "cpp", "triton", "cuda".

    Returns:
        `SwitchDecision`: token ``[B]`` (int64), from_teacher ``[B]`` (bool), jsd ``[B]`` in bits.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed; on a CPU also the first row with
            NaN, +inf, or nothing but -inf, a threshold that is NaN, and a uniform number outside of [0, 1). On other
            devices and under torch.compile values are not looked at (``KDKERNELS_CHECK=1`` does): such a row has token
            -1, which is no id, and, but for the uniform, jsd NaN.
    """
    options = (threshold, uniforms, temperature, top_k, top_p, do_sample, generator, vocab_size)
    plain = type(student_logits) is Tensor and type(teacher_logits) is Tensor
    if group is not None or (not plain and arguments.holds_dtensors(student_logits, teacher_logits)):
        found: SwitchDecision = _sharded(student_logits, teacher_logits, group, options, backend)
        return found
    student, teacher, vocab, bits, draws, sampling = _prepare(student_logits, teacher_logits, False, *options)
    widest = teacher.dtype if teacher.dtype == torch.float64 else student.dtype
    serving = _serving(backend, student.device.type, widest)
    operands = (*_operands(student), *_operands(teacher), bits, draws, *sampling, vocab, serving)
    direct = plain and not _watched()
    decision = gate(*operands) if direct else SwitchDecision(*torch.ops.kdkernels.gate(*operands))
    _check_values(decision, student, teacher, vocab, bits, draws)
    return decision


def _prepare(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    sharded: bool,
    threshold: float | Tensor,
    uniforms: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    do_sample: bool,
    generator: torch.Generator | None,
    vocab_size: int | None,
) -> tuple[Tensor | LinearLogits, Tensor | LinearLogits, int, Tensor, Tensor | None, tuple[float, int, float]]:
    """Checks of everything that needs no other rank, and both sides, entries here, threshold, uniforms, sampling."""
    check_sampling(temperature, top_k, top_p, do_sample)
    student = _side("student_logits", student_logits, sharded)
    teacher = _side("teacher_logits", teacher_logits, sharded)
    vocab = _check_pair(student, teacher, vocab_size, sharded)
    bits = _threshold(threshold, student)
    draws = _uniforms(uniforms, generator, do_sample, student)
    return (
        student,
        teacher,
        vocab,
        bits,
        draws,
        (float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p)),
    )


@torch.compiler.disable
def _sharded(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    group: object | None,
    options: tuple[
        float | Tensor, Tensor | None, float, int | None, float | None, bool, torch.Generator | None, int | None
    ],
    backend: str,
) -> SwitchDecision:
    """The gate on vocabulary shards. Under torch.compile it is left to eager torch."""
    from kdkernels.shard_groups import localize  # imports torch.distributed
    from kdkernels.switch import gate_shards

    def prepare() -> gate_shards.Call:
        ours, theirs = localize(student_logits), localize(teacher_logits)
        student, teacher, _, bits, draws, sampling = _prepare(ours, theirs, True, *options)
        return gate_shards.Call(student, teacher, bits, Sampling(draws, *sampling), options[-1], backend)

    call, columns, ranks = gate_shards.agree(group, student_logits, teacher_logits, options[0], prepare)
    found = gate_shards.decide(call, columns, ranks.group)
    _check_values(found, call.student, call.teacher, columns.local, call.threshold, call.sampling.uniforms)
    return found


def _side(name: str, side: Tensor | LinearLogits, sharded: bool) -> Tensor | LinearLogits:
    if not (sharded and isinstance(side, Tensor | LinearLogits) and side.shape[-1:] == (0,)):  # a shard of no entries
        arguments.check_side(name, side)
    if len(side.shape) != 2:
        remedy = "of [B, T, V] take [:, -1]"
        fail(ValueError, f"{name} shape", list(side.shape), "[B, V], one position of each sequence", remedy)
    side = arguments.under_autocast(side)
    if isinstance(side, Tensor):
        side = side.detach() if side.requires_grad else side
        return side if side.shape[-1] <= 1 or side.stride(-1) == 1 else side.contiguous()
    bias = None if side.bias is None else side.bias.detach()
    return LinearLogits(side.hidden.detach(), side.weight.detach(), bias, side.softcap, side.scale)


def _watched() -> bool:
    """Whether anything watches operators: if not, the dispatcher, a third of a step's time, is left out."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def _check_pair(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits, vocab_size: int | None, sharded: bool
) -> int:
    """The entries that both have, here where ``sharded``."""
    if vocab_size is not None and (isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1):
        fail(ValueError, "vocab_size", repr(vocab_size), "an int > 0 or None")
    if student.device != teacher.device:
        remedy = f"use .to({student.device})"
        fail(ValueError, "teacher_logits device", teacher.device, f"that of the student, {student.device}", remedy)
    if student.shape[0] != teacher.shape[0]:
        ours, theirs = student.shape[0], teacher.shape[0]
        fail(ValueError, "rows", f"student {ours}, teacher {theirs}", "as many of both", "give both the same prompts")
    if sharded:  # the ranks together know
        return min(student.shape[-1], teacher.shape[-1])
    return arguments.common_vocabulary(student.shape[-1], teacher.shape[-1], vocab_size)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, do_sample: bool) -> None:
    """Raise ValueError for settings of a draw that `switch_gate` does not take."""
    require_finite_number("temperature", temperature)
    low, high = arguments.LOWEST_TEMPERATURE, arguments.HIGHEST_TEMPERATURE
    if not low <= temperature <= high:
        fail(ValueError, "temperature", temperature, f"in [{low:g}, {high:g}]", "do_sample=False is the limit of 0")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        fail(ValueError, "top_k", repr(top_k), "an int > 0, or None for all")
    require_finite_number("top_p", top_p, optional=True)
    if top_p is not None and not 0 < top_p <= 1:
        fail(ValueError, "top_p", top_p, "in (0, 1], or None for all")
    arguments.check_switches(do_sample=do_sample)


def _serving(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend of a call: the same for every call of a compiled graph, so not traced."""
    return _chosen(backend, os.environ.get("KDKERNELS_BACKEND", ""), device, dtype)


@functools.cache
def _chosen(backend: str, variable: str, device: str, dtype: torch.dtype) -> str:
    """A choice takes as long as a row does: once for each environment is enough."""
    return backends.choose(backend, torch.device(device), dtype, backends.GATE)


_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in losses.py


def _threshold(threshold: float | Tensor, student: Tensor | LinearLogits) -> Tensor:
    """float64 ``[B]``."""
    rows = student.shape[0]
    if isinstance(threshold, Tensor):
        _check_numbers("threshold", threshold, rows, student.device, scalar=True)
        return threshold.detach().to(torch.float64).expand(rows).contiguous()
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold):
        fail(ValueError, "threshold", repr(threshold), "a number of bits, or a tensor [B]", "1.0 keeps to the student")
    return torch.full((rows,), threshold, dtype=torch.float64, device=student.device)


def _uniforms(
    uniforms: Tensor | None, generator: torch.Generator | None, do_sample: bool, student: Tensor | LinearLogits
) -> Tensor | None:
    """float64 ``[B]``; None: no chance in it."""
    rows = student.shape[0]
    if uniforms is not None:
        if generator is not None:
            fail(ValueError, "generator", generator, "None with uniforms", "pass one of the two")
        if not isinstance(uniforms, Tensor):
            fail(TypeError, "uniforms", type(uniforms).__name__, "a tensor [B] or None")
        _check_numbers("uniforms", uniforms, rows, student.device)
        return uniforms.to(torch.float64).contiguous() if do_sample else None
    if not do_sample:
        return None
    return torch.rand(rows, dtype=torch.float64, generator=generator, device=student.device)


def _check_numbers(name: str, x: Tensor, rows: int, device: torch.device, scalar: bool = False) -> None:
    if not x.is_floating_point():
        fail(TypeError, f"{name} dtype", x.dtype, "a floating-point dtype", "use .double()")
    if x.shape != (rows,) and not (scalar and x.dim() == 0):
        fail(ValueError, f"{name} shape", list(x.shape), f"one number a row, [{rows}]")
    if x.device != device:
        fail(ValueError, f"{name} device", x.device, f"that of the logits, {device}", f"use .to({device.type!r})")


def _operands(side: Tensor | LinearLogits) -> tuple[Any, ...]:
    if isinstance(side, Tensor):
        return side, None, None, 1.0, 0.0
    scale = 1.0 if side.scale is None else float(side.scale)
    return side.hidden, side.weight, side.bias, scale, float(side.softcap or 0.0)


def _check_values(
    decision: SwitchDecision,
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits,
    vocab: int,
    threshold: Tensor,
    uniforms: Tensor | None,
) -> None:
    """Where values are looked at, an error that names the first row without a token and whose fault that is."""
    if torch.compiler.is_compiling() or (student.device.type != "cpu" and not values_checked()):
        return
    tokens = decision.token.tolist()
    if not tokens or min(tokens) >= 0:
        return
    row = next(i for i, token in enumerate(tokens) if token < 0)
    if math.isnan(threshold[row]):
        fail(ValueError, f"threshold[{row}]", "nan", "a number of bits", "mend the schedule")
    if uniforms is not None and not 0 <= float(uniforms[row]) < 1:
        fail(ValueError, f"uniforms[{row}]", float(uniforms[row]), "in [0, 1)", "torch.rand draws such numbers")
    culprits = [
        name
        for name, side in (("student_logits", student), ("teacher_logits", teacher))
        if vocab and not math.isfinite(_row(side, row)[:vocab].max())
    ]  # under `group` perhaps nobody here
    remedy = "mask it out before, or mend the model"
    what = "one with NaN or +inf, or nothing but -inf"
    fail(ValueError, f"{(*culprits, 'logits')[0]} row {row}", what, "a distribution", remedy)


def _row(side: Tensor | LinearLogits, row: int) -> Tensor:
    if isinstance(side, Tensor):
        return side[row]
    return LinearLogits(side.hidden[row], side.weight, side.bias, side.softcap, side.scale).materialize()

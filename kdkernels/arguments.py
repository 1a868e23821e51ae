"""Checks of the arguments of `kdkernels.distillation_loss`."""

from __future__ import annotations

import math
import numbers
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdkernels._checks import fail, require_choice, require_finite_number, values_checked
from kdkernels.backends import BACKENDS
from kdkernels.logits import LinearLogits
from kdkernels.ops.sparse import MODES
from kdkernels.sparse_logits import SparseLogits

_INTEGERS = (int, numbers.Integral, torch.SymInt)
LOWEST_TEMPERATURE = 1e-5
"""1 / T times 2^110 is still a float32: the kernels' exponential needs that much."""
HIGHEST_TEMPERATURE = 1e6

_REMEDIES = {
    "chunk_bytes": "None takes 256 MiB",
    "vocab_size": "None takes the logits' last dimension",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_fixed(
    temperature: float,
    temperature_scaling: str,
    ce_weight: float,
    kd_weight: float,
    ignore_index: int,
    shift: bool,
    reduction: str,
    vocab_size: int | None,
    group: object | None,
    sparse_mode: str,
    chunk_bytes: int | None,
    backend: str,
    inplace: bool,
) -> None:
    """Every option that is the same for all batches, in itself."""
    check_scalars(temperature, temperature_scaling, kd_weight, ce_weight, chunk_bytes, vocab_size, ignore_index)
    require_choice("reduction", reduction, ("mean", "sum", "none"))
    check_modes(group, sparse_mode)
    require_choice("backend", backend, ("auto", *BACKENDS))
    check_switches(shift=shift, inplace=inplace)


def check_switches(**switches: object) -> None:
    """Options that are on or off."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            fail(TypeError, name, repr(value), "True or False")


def check_scalars(
    temperature: float,
    scaling: str,
    kd_weight: float,
    ce_weight: float,
    chunk_bytes: int | None,
    vocab_size: int | None,
    ignore_index: int,
) -> None:
    """Numbers that are the same for every token."""
    require_finite_number("temperature", temperature)
    if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        allowed = f"> 0, in [{LOWEST_TEMPERATURE}, {HIGHEST_TEMPERATURE:g}]"
        fail(ValueError, "temperature", temperature, allowed, "1.0 compares the models' own distributions")
    require_choice("temperature_scaling", scaling, ("none", "t2"))
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        require_finite_number(name, weight)
        if weight < 0:
            fail(ValueError, name, weight, ">= 0", "0 leaves that part of the loss out")
    if kd_weight == 0 and ce_weight == 0:
        fail(ValueError, "kd_weight, ce_weight", "0, 0", "not both 0", "there would be no loss")
    for name, value in (("chunk_bytes", chunk_bytes), ("vocab_size", vocab_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, _INTEGERS) or value <= 0):
            fail(ValueError, name, repr(value), "an int > 0 or None", _REMEDIES[name])
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        remedy = "-100 is what tokenizers' collators write for tokens that do not count"
        fail(ValueError, "ignore_index", repr(ignore_index), "an int", remedy)


def check_reduction(reduction: str, num_items: int | float | Tensor | None) -> None:
    """``reduction``, and the divisor that goes with the mean."""
    require_choice("reduction", reduction, ("mean", "sum", "none"))
    if num_items is None:
        return
    if reduction != "mean":
        fail(
            ValueError,
            "num_items",
            num_items,
            f"None with reduction={reduction!r}",
            "it is the divisor of reduction='mean'",
        )
    if isinstance(num_items, bool) or not isinstance(num_items, (*_INTEGERS, float, torch.SymFloat, Tensor)):
        fail(ValueError, "num_items", repr(num_items), "a number or a 0-dim tensor", "count the tokens that count")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            fail(
                ValueError,
                "num_items",
                f"a tensor of shape {list(num_items.shape)}",
                "a number or a 0-dim tensor",
                "sum it up",
            )
        if num_items.is_complex() or num_items.dtype == torch.bool or num_items.requires_grad:
            kind = f"a {num_items.dtype} tensor" + " that requires grad" * num_items.requires_grad
            fail(ValueError, "num_items", kind, "a constant number", "count the tokens that count")
        if torch.compiler.is_compiling() or (num_items.device.type != "cpu" and not values_checked()):
            return
    if not 0 < num_items < math.inf:
        fail(ValueError, "num_items", num_items, "finite and > 0", "count the tokens of the whole accumulated batch")


def check_modes(group: object | None, sparse_mode: str) -> None:
    """``sparse_mode`` and ``group`` in themselves."""
    require_choice("sparse_mode", sparse_mode, MODES)
    if not torch.compiler.is_compiling():
        check_group(group)


def check_group(group: object | None) -> None:
    """Whether ``group`` looks like one."""
    if group is not None and not any(hasattr(group, name) for name in ("get_group", "rank", "group_name")):
        allowed = "a ProcessGroup, a one-dimensional DeviceMesh, or None"
        fail(TypeError, "group", repr(group), allowed, "torch.distributed.new_group and init_device_mesh make them")


def holds_dtensors(*sides: object) -> bool:
    """Whether logits, heads or hidden states are DTensors."""
    parts = (x for side in sides for x in (vars(side).values() if isinstance(side, LinearLogits) else (side,)))
    return any(hasattr(x, "placements") for x in parts)


def check_not_transformed(student: Tensor | LinearLogits) -> None:
    """The operators have no forward-mode derivative (without this check their tangent would silently be 0), and torch
    gives operators like them no derivative under `torch.func`."""
    if torch.compiler.is_compiling() or not isinstance(student, (Tensor, LinearLogits)):
        return
    parts = (student,) if isinstance(student, Tensor) else (student.hidden, student.weight, student.bias)
    if any(part is not None and torch._C._functorch.is_gradtrackingtensor(part) for part in parts):
        remedy = "use torch.autograd.grad or backward(), or write the loss with torch.log_softmax"
        fail(ValueError, "student", "a tensor inside torch.func.grad, vjp or jacrev", "a plain tensor", remedy)
    if forward_ad._current_level < 0:
        return
    if any(part is not None and forward_ad.unpack_dual(part).tangent is not None for part in parts):
        remedy = "use reverse mode (backward), or write the loss with torch.log_softmax"
        fail(ValueError, "student", "a dual tensor of forward-mode differentiation", "a plain tensor", remedy)


def check_pair(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | SparseLogits, vocab_size: int | None
) -> int:
    """Check the two sides against each other; returns the size of the vocabulary that they share."""
    check_side("student", student)
    if isinstance(teacher, SparseLogits):
        what, constant = "teacher.log_probs", teacher.log_probs
    else:
        check_side("teacher", teacher)
        what, constant = ("teacher", teacher) if isinstance(teacher, Tensor) else ("teacher.hidden", teacher.hidden)
    if constant.requires_grad:
        remedy = "the teacher is a constant: call it under torch.no_grad() or pass .detach()"
        fail(ValueError, what, "a tensor that requires grad", "without gradient", remedy)
    for name in ("device",) if isinstance(teacher, SparseLogits) else ("dtype", "device"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            fail(
                ValueError,
                f"teacher {name}",
                theirs,
                f"that of the student, {ours}",
                f"use .to({ours}) on one of them",
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        fail(
            ValueError,
            "teacher shape",
            list(teacher.shape),
            f"the student's leading shape {list(student.shape[:-1])} and a vocabulary",
            "give both models the same tokens",
        )
    return common_vocabulary(student.shape[-1], teacher.shape[-1], vocab_size)


def common_vocabulary(ours: int, theirs: int, vocab_size: int | None) -> int:
    """The entries that a student with ``ours`` columns of logits and a teacher with ``theirs`` share."""
    if vocab_size is None:
        if ours != theirs:
            remedy = "for a difference in padding pass vocab_size=; different tokenizers cannot be compared"
            fail(ValueError, "vocabularies", f"student {ours}, teacher {theirs}", "of one size", remedy)
        return ours
    if vocab_size > min(ours, theirs):
        fail(
            ValueError,
            "vocab_size",
            vocab_size,
            f"at most the smaller vocabulary (student {ours}, teacher {theirs})",
            "pass the number of tokens that the tokenizer has",
        )
    return vocab_size


def check_side(name: str, side: object) -> None:
    if not isinstance(side, (Tensor, LinearLogits)):
        allowed = "a tensor of logits or kd.LinearLogits" + (" (or kd.SparseLogits)" if name == "teacher" else "")
        fail(TypeError, name, type(side).__name__, allowed)
    if isinstance(side, Tensor) and side.layout != torch.strided:
        fail(TypeError, name, f"a tensor of layout {side.layout}", "a dense tensor", "use .to_dense()")
    if side.dtype not in DTYPES:
        fail(TypeError, f"{name} dtype", side.dtype, "float32, bfloat16, float16 or float64", "cast it with .to(dtype)")
    if len(side.shape) < 1 or side.shape[-1] == 0:
        fail(ValueError, f"{name} shape", list(side.shape), "[..., V] with V >= 1")
    if isinstance(side, LinearLogits):
        for part, value in (("weight", side.weight), ("bias", side.bias)):
            if value is not None and value.dtype != side.dtype:
                remedy = "cast one of them, or call inside torch.autocast"
                fail(
                    ValueError,
                    f"{name}.{part} dtype",
                    value.dtype,
                    f"that of {name}.hidden, {side.dtype}",
                    remedy,
                )


def check_tokens(
    leading: torch.Size,
    device: torch.device,
    labels: Tensor | None,
    token_weights: Tensor | None,
    shift: bool,
    ce_weight: float,
) -> None:
    """Per-token arguments against the logits' leading shape."""
    if ce_weight != 0 and labels is None:
        fail(
            ValueError,
            "labels",
            None,
            f"given when ce_weight = {ce_weight}",
            "pass the token ids or ce_weight=0",
        )
    if shift and (len(leading) == 0 or leading[-1] == 0):
        fail(
            ValueError,
            "shift",
            True,
            "False for logits without a sequence dimension",
            f"leading shape is {list(leading)}",
        )
    for name, value in (("labels", labels), ("token_weights", token_weights)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            fail(TypeError, name, type(value).__name__, "a torch.Tensor", "wrap it in torch.as_tensor")
        if value.shape != leading:
            remedy = "one for each position, with shift=True as well" if shift else "one for each row of logits"
            allowed = f"the logits' leading shape {list(leading)}"
            fail(ValueError, f"{name} shape", list(value.shape), allowed, remedy)
        if value.device != device:
            fail(ValueError, f"{name} device", value.device, f"that of the logits, {device}", "use .to(device)")
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        fail(TypeError, "labels dtype", labels.dtype, "an integer dtype", "pass token ids, not one-hot rows or masks")
    if token_weights is not None and token_weights.is_complex():
        fail(TypeError, "token_weights dtype", token_weights.dtype, "a real dtype")
    if token_weights is not None and token_weights.requires_grad:
        fail(ValueError, "token_weights", "a tensor that requires grad", "a constant", "pass .detach()")


AnyForm = TypeVar("AnyForm")


def under_autocast(side: AnyForm) -> AnyForm | LinearLogits:
    """Under autocast, heads and hidden states in the autocast dtype, as ``F.linear`` would take them."""
    if not isinstance(side, LinearLogits) or not torch.amp.is_autocast_available(side.device.type):
        return side
    if not torch.is_autocast_enabled(side.device.type):
        return side
    dtype = torch.get_autocast_dtype(side.device.type)
    if side.hidden.dtype == torch.float64:
        return side
    bias = None if side.bias is None else side.bias.to(dtype)
    return LinearLogits(side.hidden.to(dtype), side.weight.to(dtype), bias, side.softcap, side.scale)

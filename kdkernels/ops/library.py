"""The operator library ``kdkernels::*`` and what the autograd of its operators shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("kdkernels", "DEF")
EVERY_DEVICE = "CompositeExplicitAutograd"


class _OnceDifferentiable(torch.autograd.Function):
    """Identity on the first ``count`` tensors; its own backward is the error message of a second differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "kdkernels computes the gradient together with the loss and cannot differentiate it again "
            "(create_graph=True): for second derivatives write the loss with torch.log_softmax"
        )


def anchors(*inputs: Tensor | None) -> list[Tensor]:
    """Scalars that depend on each input for autograd, and hold none of their memory: for `once_differentiable`."""
    if torch.compiler.is_compiling():
        return []
    plain = (torch.Tensor, torch.nn.Parameter)
    # an operator's setup runs where torch has switched the recording of autograd off
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with recording, torch.enable_grad():
        return [x[:0].sum() for x in inputs if x is not None and x.requires_grad and type(x) in plain]


def once_differentiable(
    gradients: list[Tensor | None], anchored: list[Tensor], incoming: Tensor | None
) -> list[Tensor | None]:
    """The gradients, such that differentiating them raises a clear error; free unless ``create_graph=True``.

    Args:
        gradients: what the backward returns.
        anchored: `anchors` of the inputs that they are functions of.
        incoming: the gradient that they are scaled by.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    present = [g for g in gradients if g is not None]
    if not present or incoming is None or any(type(g) is not Tensor for g in present):
        return gradients
    guarded = iter(_OnceDifferentiable.apply(len(present), *present, *anchored, incoming))  # type: ignore[no-untyped-call]
    return [None if g is None else next(guarded) for g in gradients]


def register_row_autograd(name: str, count: int, backend: int) -> None:
    """Autograd of an operator that takes a student's logits first and returns (loss, dlogits, stats).

    Args:
        name: of the operator.
        count: how many arguments it takes.
        backend: which of them is the backend.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.backend, ctx.anchors = inputs[backend], anchors(inputs[0])
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return (None,) * count
        gradient = scale_by_incoming([ctx.saved_tensors[0]], d_loss, ctx.backend)
        return (*once_differentiable([*gradient], ctx.anchors, d_loss), *(None,) * (count - 1))

    torch.library.register_autograd(name, backward, setup_context=setup, lib=LIBRARY)


def summed(loss: Tensor) -> Tensor:
    """The sum ``[]`` of the rows' losses ``[N]``, in float64: it does not depend on the number of threads."""
    return loss.sum(dtype=torch.float64).to(loss.dtype)


def scale_by_incoming(buffers: list[Tensor], incoming: Tensor, backend: str) -> list[Tensor]:
    """The gradients in ``buffers`` times the gradient that reaches the loss, in place where nobody can tell.

    Args:
        buffers: gradients for an incoming gradient of one, ``[N, ...]`` each if ``incoming`` is ``[N]``.
        incoming: ``[]``, or ``[N]`` with one number per row.
        backend: the one that computed them.

    A graph that is not retained has no further use for its buffers: they are scaled where they are, and left alone for
    the usual gradient of one: on a CPU looking costs no synchronisation, Triton's kernel looks on the device. A
    retained graph's are copied.
    """
    if any(type(b) is not Tensor or _in_transform(b) for b in (*buffers, incoming)):
        return [_scaled(b, _like_rows(incoming, b)) for b in buffers]
    if _graph_is_retained():
        buffers = [b.clone() for b in buffers]
    if backend in ("triton", "cuda"):  # where CUDA kernels serve, Triton does
        return _scaled_by_triton(buffers, incoming)
    if incoming.device.type == "cpu":
        if incoming.dim() and incoming.numel() and bool((incoming == incoming[0]).all()):
            incoming = incoming[0]  # no factor per row, hence no promotion
        if not incoming.dim() and incoming.item() == 1:
            return buffers
    with torch.no_grad():
        for b in buffers:
            _scale_(b, _like_rows(incoming, b))
    return buffers


def _in_transform(x: Tensor) -> bool:
    """Whether `torch.func` or ``is_grads_batched`` has wrapped a tensor: no looking at it, no writing in place."""
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x))


def _scaled_by_triton(buffers: list[Tensor], incoming: Tensor) -> list[Tensor]:
    from kdkernels.triton import host  # imports triton

    with torch.no_grad():
        for b in buffers:
            if host.scales(b):
                host.scale_(b, incoming)
            else:
                _scale_(b, _like_rows(incoming, b))
    return buffers


def _scaled(buffer: Tensor, factor: Tensor) -> Tensor:
    """`_scale_` out of place, in operations that a compiler traces."""
    scaled = (buffer * factor).to(buffer.dtype)
    return scaled if factor.dim() == 0 else torch.where(factor == 0, 0.0, scaled).to(buffer.dtype)


_BLOCK = 2**18  # numbers


def _scale_(buffer: Tensor, factor: Tensor) -> None:
    """``buffer *= factor``; a row that nobody asks for is 0 even if it holds NaN.

    Block by block where torch would promote the buffer to a float32 copy.
    """
    if factor.dim() == 0:
        buffer.mul_(factor)
        return
    rows = max(1, _BLOCK // max(1, buffer[:1].numel()))
    for part, weight in zip(buffer.split(rows), factor.split(rows), strict=True):
        part.mul_(weight)
        unwanted = weight == 0
        if buffer.device.type != "cpu" or bool(unwanted.any()):
            part.masked_fill_(unwanted, 0)


def _graph_is_retained() -> bool:
    """Whether the running backward keeps its graph. Torch asks itself the same for donated buffers; where a version
    does not tell, assume yes: that costs a copy, never a wrong gradient."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _like_rows(factor: Tensor, buffer: Tensor) -> Tensor:
    return factor if factor.dim() == 0 else factor.reshape(-1, *(1,) * (buffer.dim() - 1))

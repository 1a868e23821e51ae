"""What cannot be differentiated, or only once: a clear error, by whatever way it is asked for."""

from __future__ import annotations

import pytest
import torch
from autograd_makes import MAKES, Make, close, gradients, small
from torch import Tensor

import kdkernels as kd


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("make", MAKES)
def test_a_second_derivative_is_a_clear_error(backend: str, make: Make, reduction: str) -> None:
    leaves, loss = make(backend=backend, reduction=reduction)
    first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    reference, loss = make(backend=backend, reduction=reduction)
    assert close(list(first), gradients(reference, loss.sum()))  # the first one is right
    squares = sum(g.square().sum() for g in first)
    assert isinstance(squares, Tensor)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match=r"create_graph=True.*log_softmax"):
            torch.autograd.grad(squares, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*log_softmax"):
        squares.backward()


@pytest.mark.parametrize("make", MAKES)
def test_the_incoming_gradient_cannot_be_differentiated_either(backend: str, make: Make) -> None:
    leaves, loss = make(backend=backend)
    factor = torch.tensor(2.0, requires_grad=True)
    first = torch.autograd.grad(loss * factor, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*log_softmax"):
        torch.autograd.grad(first[0].sum(), factor)


@pytest.mark.parametrize("make", MAKES)
def test_the_guard_holds_no_logits(backend: str, make: Make) -> None:
    """Only what the gradient needs stays between forward and backward."""
    leaves, loss = make(backend=backend)
    anchored = loss.grad_fn
    while anchored is not None and not hasattr(anchored, "anchors"):
        anchored = anchored.next_functions[0][0]
    assert anchored is not None
    assert len(anchored.anchors) == len(leaves)
    assert all(x.numel() == 1 and x.untyped_storage().nbytes() <= 8 for x in anchored.anchors)


@pytest.mark.parametrize("make", MAKES)
def test_batched_gradients(backend: str, make: Make) -> None:
    leaves, loss = make(backend=backend)
    factors = torch.tensor([1.0, 0.0, -3.0])
    batched = torch.autograd.grad(loss, leaves, factors, is_grads_batched=True, retain_graph=True)
    for i, factor in enumerate(factors):
        assert close([g[i] for g in batched], gradients(leaves, loss, retain_graph=True), factor)


def test_torch_func_is_a_clear_error(backend: str) -> None:
    student, teacher = small()

    def loss(z: Tensor) -> Tensor:
        return kd.distillation_loss(z, teacher, backend=backend)

    with pytest.raises(ValueError, match=r"inside torch\.func\.grad.*use torch\.autograd\.grad"):
        torch.func.grad(loss)(student)

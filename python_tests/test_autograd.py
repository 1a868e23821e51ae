"""How the loss behaves inside autograd: graphs kept and scaled, what requires grad, second derivatives, modes."""

from __future__ import annotations

import pytest
import torch
from autograd_makes import LABELS, MAKES, Make, close, dense, fused, gradients, small
from cases import ONE_OF_EACH, linear
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence


# gradcheck evaluates twice per input number: a few rows suffice
@pytest.mark.thin(3)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=lambda d: d.name)
def test_gradcheck_of_logits(backend: str, divergence: Divergence, reduction: str) -> None:
    if divergence.name == "adaptive_kl":
        return  # its weights are constants by definition: the gradient is not that of the value
    student, teacher = small()

    def loss(z: Tensor) -> Tensor:
        return kd.distillation_loss(
            z, teacher, divergence, labels=LABELS, ce_weight=0.3, temperature=1.7, temperature_scaling="t2",
            reduction=reduction, shift=True, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_gradcheck_of_hidden_weight_and_bias(backend: str, reduction: str, chunk_bytes: int | None) -> None:
    side = linear(3, 4, 7, torch.float64, bias=True)
    teacher = linear(3, 5, 7, torch.float64, seed=2, softcap=5.0)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = kd.LinearLogits(hidden, weight, bias, softcap=3.0, scale=1.3)
        options = {"reduction": reduction, "chunk_bytes": chunk_bytes, "backend": backend}
        return kd.distillation_loss(student, teacher, "jsd", labels=torch.tensor([1, 2, 6]), ce_weight=0.5, **options)

    assert side.bias is not None
    leaves = tuple(x.requires_grad_() for x in (side.hidden, side.weight, side.bias))
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("make", MAKES)
def test_a_kept_graph_gives_the_same_again(backend: str, make: Make) -> None:
    """Whatever gradient arrives at the first backward must not stick to the second."""
    leaves, loss = make(backend=backend)
    first = gradients(leaves, loss, retain_graph=True)
    for factor in (-2.5, 1.0, 0.0, 7.0):
        again = gradients(leaves, loss, torch.tensor(factor), retain_graph=True)
        assert close(again, first, factor)
    assert all(torch.equal(a, b) for a, b in zip(gradients(leaves, loss, retain_graph=True), first, strict=True))
    assert close(gradients(leaves, loss, torch.tensor(3.0)), first, 3.0)  # the last, without keeping


@pytest.mark.parametrize("make", MAKES)
def test_a_kept_graph_of_single_losses(backend: str, make: Make) -> None:
    leaves, loss = make(backend=backend, reduction="none")
    ones = torch.ones_like(loss)
    first = gradients(leaves, loss, ones, retain_graph=True)
    arriving = torch.tensor([[1.0, -2.0, 5.0], [0.0, 0.5, 1.0]])
    weighted = gradients(leaves, loss, arriving, retain_graph=True)
    assert not close(weighted, first)
    assert close(gradients(leaves, loss, 2 * arriving, retain_graph=True), weighted, 2.0)
    assert close(gradients(leaves, loss, ones), first)


@pytest.mark.parametrize("make", MAKES)
def test_a_graph_that_is_not_kept_runs_once(backend: str, make: Make) -> None:
    leaves, loss = make(backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("make", MAKES)
def test_gradients_accumulate(backend: str, make: Make) -> None:
    """Two losses over the same leaves, and .grad of two backward passes: each its own numbers, no shared buffer."""
    leaves, loss = make(backend=backend)
    once = gradients(leaves, loss)
    for leaf in leaves:
        leaf.grad = None
    for _ in range(2):
        again, loss = make(backend=backend)
        for old, new in zip(leaves, again, strict=True):
            new.grad = old.grad
        loss.backward()
        leaves = again
    assert close([leaf.grad for leaf in leaves if leaf.grad is not None], once, 2.0)


@pytest.mark.parametrize("make", MAKES)
def test_the_loss_among_others(backend: str, make: Make) -> None:
    """A scaled loss plus another one, and a hook that scales: what arrives is not 1."""
    leaves, loss = make(backend=backend)
    plain = gradients(leaves, loss)
    leaves, loss = make(backend=backend)
    total = 3.0 * loss / 2 + sum((leaf.double() ** 2).sum().float() for leaf in leaves)
    expected = [1.5 * p + 2 * leaf.detach() for p, leaf in zip(plain, leaves, strict=True)]
    assert close(gradients(leaves, total), expected)
    leaves, loss = make(backend=backend)
    loss.register_hook(lambda g: -4 * g)
    assert close(gradients(leaves, loss), plain, -4.0)


@pytest.mark.parametrize("make", MAKES)
def test_an_incoming_gradient_of_zero_or_nan(backend: str, make: Make) -> None:
    leaves, loss = make(backend=backend)
    assert all((g == 0).all() for g in gradients(leaves, 0.0 * loss))
    leaves, loss = make(backend=backend)
    assert all(g.isnan().any() for g in gradients(leaves, torch.nan * loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["dense", "inplace", "linear"])
def test_a_row_that_nobody_asks_for_may_hold_nan(backend: str, form: str, dtype: torch.dtype) -> None:
    """torch.where around single losses: the rows it drops have gradient 0, NaN logits or not."""
    student, teacher = small(dtype)
    rows, wanted = student.clone(), torch.tensor([[True, False, True], [True, True, False]])
    rows[0, 1] = torch.nan
    if form == "linear":
        hidden = rows.requires_grad_()
        logits: Tensor | kd.LinearLogits = kd.LinearLogits(hidden, torch.eye(rows.shape[-1], dtype=dtype))
    else:
        hidden = rows.requires_grad_()
        logits = hidden * 1
    losses = kd.distillation_loss(logits, teacher, "jsd", reduction="none", inplace=form == "inplace", backend=backend)
    assert losses[0, 1].isnan()
    torch.where(wanted, losses, 0.0).sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[~wanted] == 0).all()
    assert (hidden.grad[wanted].abs().sum(-1) > 1e-3).all()


@pytest.mark.parametrize("need", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ()])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_requires_grad_gets_one(backend: str, need: tuple[str, ...], reduction: str) -> None:
    side, teacher = linear(6, 8, 11, torch.float32, bias=True), linear(6, 5, 11, torch.float32, seed=2)
    assert side.bias is not None
    parts = {name: getattr(side, name).requires_grad_(name in need) for name in ("hidden", "weight", "bias")}
    loss = kd.distillation_loss(kd.LinearLogits(**parts), teacher, reduction=reduction, backend=backend)
    assert loss.requires_grad == bool(need)
    if need:
        loss.sum().backward()
    assert {name for name, x in parts.items() if x.grad is not None} == set(need)


def test_without_gradient_nothing_is_recorded(backend: str) -> None:
    student, teacher = small(torch.float32)
    student.requires_grad_()
    expected = kd.distillation_loss(student, teacher, backend=backend).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = kd.distillation_loss(student, teacher, backend=backend)
            value, stats = kd.distillation_loss(student.clone(), teacher.clone(), backend=backend, return_stats=True)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
        assert torch.equal(value, expected)
        assert not stats.divergence.requires_grad
    assert not kd.distillation_loss(student.detach(), teacher, backend=backend).requires_grad


def test_inference_mode_of_hidden_states(backend: str) -> None:
    side, teacher = linear(6, 8, 11, torch.float32), linear(6, 5, 11, torch.float32, seed=2)
    expected = kd.distillation_loss(side, teacher, backend=backend)
    with torch.inference_mode():
        for reduction in ("mean", "none"):
            loss = kd.distillation_loss(side, teacher, reduction=reduction, backend=backend)
            assert torch.allclose(loss.mean(), expected)


def test_teacher_logits_of_inference_mode(backend: str) -> None:
    """A teacher run under inference_mode gives inference tensors: they serve as constants."""
    student, teacher = small(torch.float32)
    with torch.inference_mode():
        constant = teacher * 1
        hidden = torch.randn(2, 3, 5)
    leaf = student.clone().requires_grad_()
    kd.distillation_loss(leaf, constant, backend=backend).backward()
    head = torch.randn(11, 5)
    for reduction in ("mean", "none"):
        kd.distillation_loss(leaf, kd.LinearLogits(hidden, head), reduction=reduction, backend=backend).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def run(wrap: bool) -> list[Tensor]:
        side, teacher = linear(6, 8, 11, torch.float32), linear(6, 5, 11, torch.float32, seed=2)
        leaves = [side.hidden.requires_grad_(), side.weight.requires_grad_()]

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            student = kd.LinearLogits(hidden.tanh(), weight)
            return kd.distillation_loss(student, teacher, "jsd", backend=backend)

        value = checkpoint(loss, *leaves, use_reentrant=reentrant) if wrap else loss(*leaves)
        value.backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_heads_as_linear_would(backend: str, dtype: torch.dtype) -> None:
    """float32 hidden states and head under autocast: logits of the autocast dtype, gradients in float32."""
    side, teacher = linear(6, 8, 11, torch.float32, bias=True), linear(6, 5, 11, torch.float32, seed=2)
    assert side.bias is not None
    leaves = [x.requires_grad_() for x in (side.hidden, side.weight, side.bias)]
    with torch.autocast("cpu", dtype=dtype):
        loss = kd.distillation_loss(side, teacher, "jsd", backend=backend)
        plain = kd.distillation_loss(side.materialize(), teacher.materialize(), "jsd", backend=backend)
        assert side.materialize().dtype == dtype
    assert loss.dtype == torch.float32
    ours, reference = gradients(leaves, loss), gradients(leaves, plain)
    assert all(g.dtype == torch.float32 for g in ours)
    eps = torch.finfo(dtype).eps
    assert all((a - b).norm() <= 2 * eps * b.norm() for a, b in zip(ours, reference, strict=True))


def test_autocast_leaves_the_row_functions_alone(backend: str) -> None:
    student, teacher = small(torch.float32)
    expected = kd.distillation_loss(student, teacher, "jsd", backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kd.distillation_loss(student, teacher, "jsd", backend=backend), expected)


def test_backward_under_autocast(backend: str) -> None:
    """reduction="none" computes its products in backward: not in the dtype of whoever calls it."""
    for mode in (False, True):
        leaves, loss = fused(backend=backend, reduction="none")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode):
            loss.sum().backward()
        found = [leaf.grad for leaf in leaves]
        if not mode:
            expected = found
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_nothing_but_the_result_is_written(backend: str) -> None:
    """Inputs keep their bits and version counters."""
    for make in (dense, fused):
        leaves, loss = make(backend=backend)
        before = [(leaf.detach().clone(), leaf._version) for leaf in leaves]
        loss.backward()
        for leaf, (value, version) in zip(leaves, before, strict=True):
            assert torch.equal(leaf, value)
            assert leaf._version == version


def test_changing_the_students_logits_afterwards_is_noticed(backend: str) -> None:
    """The gradient of logits is computed at once: a later in-place change has no effect on it. Hidden states that
    reduction="none" needs again are guarded by autograd."""
    leaves, loss = dense(backend=backend)
    expected = gradients(leaves, loss, retain_graph=True)
    with torch.no_grad():
        leaves[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(gradients(leaves, loss), expected, strict=True))
    leaves, loss = fused(backend=backend, reduction="none")
    with torch.no_grad():
        leaves[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()

"""A gradient times the one that reaches the loss: by the compiled kernel, at no cost where that is one."""

from __future__ import annotations

import pytest
import torch
from emulated import TARGETS, serve

import kdkernels as kd
from kdkernels.triton import host, launch

pytestmark = pytest.mark.slow

SOAK = pytest.mark.soak
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("columns", [1, 10240, pytest.param(7, marks=SOAK), pytest.param(16385, marks=SOAK)])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("target", [90, *(pytest.param(t, marks=SOAK) for t in TARGETS if t != 90)])
def test_products_are_rounded_once(
    target: int, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, target)
    wide = torch.randn(5, columns + 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = wide[:, :columns]
    for factor in (torch.tensor(0.3), torch.tensor([1.0, 0.3, -2.0, 0.0, 1.0])):
        for x in (given.clone(memory_format=torch.contiguous_format), wide.clone()[:, :columns]):
            host.scale_(x, factor)
            by_row = factor if factor.dim() == 0 else factor[:, None]
            assert torch.equal(x, (given.float() * by_row).to(dtype))


def test_rows_of_factor_zero_become_zero_and_nan_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch)
    x = torch.full((3, 5000), torch.nan)
    x[2] = 1.0
    host.scale_(x, torch.tensor([0.0, 2.0, torch.nan]))
    assert (x[0] == 0).all()
    assert x[1:].isnan().all()
    host.scale_(empty := torch.empty(0, 4), torch.tensor(2.0))
    assert empty.numel() == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_factor_of_one_moves_nothing(inplace: bool, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = serve(monkeypatch)
    student, teacher = torch.randn(2, 40, 32768, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    moved, gradients = [], []
    for incoming in (1.0, 0.5):
        leaf = student.clone().requires_grad_()
        logits = leaf * 1 if inplace else leaf
        loss = kd.distillation_loss(logits, teacher, reduction=reduction, inplace=inplace, backend="triton")
        loss.backward(torch.full_like(loss, incoming))
        report = emulator.reports[-1]
        moved.append((report.load_sectors, report.store_sectors))
        gradients.append(leaf.grad)
    sectors = student.nbytes // 32
    looks = launch.SCALING.warps * 2048  # one of each warp
    assert moved[0][0] <= looks
    assert moved[0][1] == 0
    assert moved[1][1] == sectors
    assert sectors <= moved[1][0] <= sectors + looks
    assert torch.equal(gradients[0] * 0.5, gradients[1])


def test_buffers_beyond_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows 2^31 entries apart; only pages that are touched exist."""
    serve(monkeypatch)
    space = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    rows = space.as_strided((2, 64), (2**31, 1))
    rows.fill_(3.0)
    host.scale_(rows, torch.tensor([0.5, 2.0]))
    assert rows.float().unique(dim=1).flatten().tolist() == [1.5, 6.0]


def test_a_retained_graph_keeps_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch)
    student, teacher = torch.randn(2, 3, 301, generator=torch.Generator().manual_seed(0)).unbind()
    leaf = student.requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, backend="triton")
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(1.0))
    assert torch.equal(first, second * 2)
    assert second.abs().sum() > 0

"""When backend "cuda" keeps rows on chip, when it leaves a call to Triton, and what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import cases
import onchip_budgets as budgets
import pytest
import torch
from emulated_onchip import Serve, serve
from ptx.compile import nvcc

import kdkernels as kd
from benchmarks import onchip as bounds
from benchmarks.counting import Step
from benchmarks.devices import DEVICES
from benchmarks.shapes import Case
from kdkernels import backends, native, onchip, triton

GPU = torch.device("cuda")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return lambda target=90, settings=None: serve(monkeypatch, target, settings)


def on(patch: pytest.MonkeyPatch, device: str) -> None:
    """The size of a GPU's cache and the number of its multiprocessors."""
    chip = DEVICES[device]
    patch.setattr(onchip, "machine", lambda _: (chip.multiprocessors, chip.l2_bytes))


def test_the_library_has_the_kernels_where_nvcc_is() -> None:
    facts = native.facts()
    if not facts:
        pytest.skip(native.reason())
    assert native.has_onchip() == ("dense_onchip.cu" in facts["cuda_sources"])


def test_reasons_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "obstacle", lambda device, dtype: "no GPU" if dtype == torch.float64 else "")
    monkeypatch.setattr(native, "has_onchip", lambda: True)
    monkeypatch.setattr(native, "why_not_on_gpu", lambda capability, least: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute forward_kl and reverse_kl, not jsd" in backends.judge("cuda", GPU, torch.bfloat16, "jsd").reason
    assert backends.judge("cuda", GPU, torch.float64, "forward_kl").reason == "no GPU"
    assert "9.0, this GPU has 8.0" in backends.judge("cuda", GPU, torch.bfloat16, "forward_kl").reason
    assert backends.choose("auto", GPU, torch.bfloat16, "forward_kl") == "triton"
    assert not backends.judge("cuda", GPU, torch.bfloat16, "forward_kl", sparse=True).serves
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(onchip, "shared_memory", lambda device: 99 * 1024)
    assert "this GPU gives 101376" in backends.judge("cuda", GPU, torch.bfloat16, "forward_kl").reason
    assert backends.choose("auto", GPU, torch.bfloat16, "forward_kl") == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(onchip, "shared_memory", lambda device: 227 * 1024)
    assert backends.choose("auto", GPU, torch.bfloat16, "forward_kl") == "cuda"
    assert backends.choose("auto", GPU, torch.bfloat16, "jsd") == "triton"
    monkeypatch.setattr(native, "has_onchip", lambda: False)
    with pytest.raises(ValueError, match=r"built without CUDA kernels: install the CUDA toolkit"):
        backends.choose("cuda", GPU, torch.bfloat16, "forward_kl")


@pytest.mark.skipif(nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize(
    ("options", "rows_on_chip"),
    [
        ({}, True),
        ({"token_weights": torch.tensor([1.0, 0.0])}, True),
        ({"labels": torch.tensor([3, -100])}, True),  # only says which rows count
        ({"labels": torch.tensor([3, -100]), "ce_weight": 0.5}, False),
        ({"return_stats": True}, False),
        ({"vocab_size": 300}, True),
    ],
)
def test_what_is_left_to_triton(options: dict[str, object], rows_on_chip: bool, served: Serve) -> None:
    emulator = served()
    student, teacher = cases.pair("ordinary", 2, 304, torch.bfloat16)
    results = []
    for backend in ("cuda", "eager"):
        leaf = student.clone().requires_grad_()
        found = kd.distillation_loss(leaf, teacher, backend=backend, **options)  # type: ignore[arg-type]
        loss = found.loss if isinstance(found, kd.DistillationOutput) else found
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0].float()))
    assert bool(emulator.reports) == rows_on_chip
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=1e-5)


@pytest.mark.skipif(nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize("vocab", [301, 303])
def test_rows_between_16_byte_boundaries_are_left_to_triton(vocab: int, served: Serve) -> None:
    emulator = served()
    student, teacher = cases.pair("ordinary", 2, vocab, torch.bfloat16)
    loss = kd.distillation_loss(student, teacher, backend="cuda")
    torch.testing.assert_close(loss, kd.distillation_loss(student, teacher, backend="eager"), rtol=1e-5, atol=0)
    assert not emulator.reports


def preferred(student: torch.Tensor, vocab: int) -> bool:
    plan = onchip.plan(vocab * student.element_size())
    assert plan is not None
    return onchip.gains(student, vocab, plan.cluster)


def test_rows_that_a_cache_keeps_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "h100")
    many, few = torch.empty(512, 8, dtype=torch.bfloat16), torch.empty(33, 8, dtype=torch.bfloat16)
    assert [preferred(many, v) for v in (32000, 49152, 128256, 151936)] == [False, False, True, True]
    assert [preferred(few, v) for v in (32000, 49152, 128256, 262144)] == [False, True, True, False]
    assert [preferred(many[:rows], 128256) for rows in (33, 34, 90, 128)] == [True, False, False, True]
    on(monkeypatch, "b200")
    assert not preferred(many, 151936)
    assert preferred(many.float(), 151936)


def test_it_is_preferred_where_the_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case of the committed bounds: more than a tenth, or Triton's."""
    entries = json.loads(bounds.RESULT.read_text())["entries"]
    for one in entries:
        on(monkeypatch, one["device"])
        match = re.fullmatch(r"dense-forward_kl-(\w+)-(\d+)x(\d+)", one["case"])
        assert match is not None
        dtype, rows, vocab = budgets.DTYPES[match[1]], int(match[2]), int(match[3])
        assert preferred(torch.empty(rows, 1, dtype=dtype), vocab) == (one["gain"] > 1.1), one
    assert max(one["gain"] for one in entries) > 1.4
    assert all(one["chip"]["bytes_loaded"] <= 1.01 * 2 * (2 if "bf16" in one["case"] else 4) for one in entries)


def test_bounds_from_counts() -> None:
    """An H100 moves 6 bytes of bf16 in 1.8 ps; its cache keeps three quarters of what runs."""
    case = Case("dense", "forward_kl", "bf16", 512, 128256)
    triton_step = Step("dense_kernel", "compiled", 1, 8 / 32, 2 / 32, 4 / 32, 28.5, 29 / 32, 4.1)
    chip = Step("on chip", "compiled", 1, 4 / 32, 2 / 32, 4 / 32, 26.0, 27 / 32, 4.0)
    found = bounds.compare(case, "h100", triton_step, chip)
    pairs, rate = 512 * 128256, DEVICES["h100"].bytes_per_second
    assert found.cluster == 4
    assert found.on_chip == pytest.approx(6 * pairs / rate)
    assert found.uncached == pytest.approx(10 * pairs / rate)
    assert found.cached == pytest.approx(6 * pairs / rate)
    assert found.kept == pytest.approx(50 * 2**20 / (132 * 4 * 128256))
    assert found.shared == pytest.approx((10 - 4 * found.kept) * pairs / rate)
    few = bounds.compare(replace(case, N=8), "h100", triton_step, chip)
    assert few.uncached == few.cached == pytest.approx(128256 * 4.1 / (16 * 1.98e9))  # each row by one multiprocessor
    assert few.on_chip == pytest.approx(128256 * 4.0 / (4 * 16 * 1.98e9))
    slow = bounds.compare(case, "h100", triton_step, replace(chip, warp_instructions=99.0))
    assert slow.on_chip == pytest.approx(99 * pairs / DEVICES["h100"].warp_instructions_per_second)
    assert bounds.entry(found)["gain"] == pytest.approx(found.gain, abs=1e-3)
    assert "h100 bf16 512 x 128256" in bounds.text([bounds.entry(found)])

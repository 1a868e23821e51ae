"""When the Triton backend serves, and what it says where it does not."""

from __future__ import annotations

import pytest
import torch

import kdkernels as kd
import kdkernels.triton
from kdkernels import backends, native
from kdkernels.triton import launch

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100, as far as questions to torch go."""
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    return monkeypatch


def test_it_serves_every_divergence_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(native, "has_onchip", lambda: False)
    for name in kd.divergences.names():
        kernel = kd.divergences.get(name).kernel().name
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert backends.choose("auto", GPU, dtype, kernel) == "triton"
            assert "Triton" in backends.judge("triton", GPU, dtype, kernel).reason


def test_it_serves_sparse_teachers_beside_kernels_that_do_not(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(native, "has_onchip", lambda: True)
    gpu.setattr(native, "why_not_on_gpu", lambda capability, least: "")
    gpu.setattr("kdkernels.onchip.shared_memory", lambda device: 227 * 1024)
    assert backends.choose("auto", GPU, torch.bfloat16, "forward_kl") == "cuda"
    assert backends.choose("auto", GPU, torch.bfloat16, "forward_kl", sparse=True) == "triton"


def test_float64_goes_to_eager(gpu: pytest.MonkeyPatch) -> None:
    assert backends.choose("auto", GPU, torch.float64, "jsd") == "eager"
    with pytest.raises(ValueError, match="float64"):
        backends.choose("triton", GPU, torch.float64, "jsd")


def test_a_gpu_that_is_too_old(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    gpu.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    assert backends.choose("auto", GPU, torch.float32, "jsd") == "eager"
    with pytest.raises(ValueError, match=r"Tesla T4 has compute capability 7\.5, 8\.0 is needed"):
        backends.choose("triton", GPU, torch.float32, "jsd")


@pytest.mark.parametrize(
    ("installed", "said"), [("", "pip install 'kdkernels"), ("3.1.0", r"triton 3\.1\.0 is too old")]
)
def test_triton_absent_or_too_old(gpu: pytest.MonkeyPatch, installed: str, said: str) -> None:
    gpu.setattr(kdkernels.triton, "version", lambda: installed)
    assert backends.choose("auto", GPU, torch.float32, "jsd") == "eager"
    with pytest.raises(ValueError, match=said):
        backends.choose("triton", GPU, torch.float32, "jsd")


def test_cpu_tensors_and_machines_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA tensors" in backends.judge("triton", CPU, torch.float32, "jsd").reason
    with pytest.raises(ValueError, match="CUDA tensors"):
        kd.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in backends.judge("triton", GPU, torch.float32, "jsd").reason


def test_rows_get_warps_by_their_length() -> None:
    warps = [launch.shape(vocab, 2, True, False, 9).warps for vocab in (100, 16000, 32000, 128256, 262144)]
    assert warps == sorted(warps)
    assert set(warps) <= {4, 8, 16, 32}
    assert warps[-1] == 32
    for major in (8, 9, 10, 12):
        for vocab in (1, 50257, 262144):
            for itemsize in (2, 4):
                assert launch.shape(vocab, itemsize, False, False, major).warps <= 8
                assert launch.shape(vocab, itemsize, True, True, major).warps <= 16

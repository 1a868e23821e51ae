"""Which backend serves, what `explain` says about it, and how rows become chunks."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from cases import linear, pair
from hypothesis import given

import kdkernels as kd
from kdkernels import backends, chunking, native
from kdkernels.ops import rows

CPU = torch.device("cpu")


def test_every_backend_that_was_built_serves_every_divergence(backend: str) -> None:
    """The suite would shrink silently if a library that was built did not load."""
    for name in (
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
        "total_variation",
        "alpha_beta",
        "adaptive_kl",
    ):
        kernel = kd.divergences.get(name).kernel().name
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert backends.judge(backend, CPU, dtype, kernel).serves
            assert backends.choose(backend, CPU, dtype, kernel) == backend


def test_auto_takes_the_native_kernels_where_they_serve(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    student, teacher = pair("ordinary", 4, 11, torch.float32)
    best = "cpp" if native.available() else "eager"
    assert kd.explain(student, teacher).backend == best
    assert torch.equal(kd.distillation_loss(student, teacher), kd.distillation_loss(student, teacher, backend=best))
    monkeypatch.setenv("KDKERNELS_BACKEND", backend)
    assert kd.explain(student, teacher, "jsd").backend == backend
    assert kd.explain(student, teacher, "jsd", backend="eager").backend == "eager"
    monkeypatch.setenv("KDKERNELS_BACKEND", "")
    assert kd.explain(student).backend == best


@pytest.mark.parametrize("fused", [False, True])
def test_the_chosen_backend_does_the_work(backend: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with backend="cpp" never falls back to eager, nor the other way round."""
    used = []
    for module, name, function in ((rows.eager, "eager", "divergence_rows_"), (rows.leaves, "cpp", "dense_")):
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, _o=original, _n=name, **k: (used.append(_n), _o(*a, **k))[1])
    side = linear(4, 5, 11, torch.float32) if fused else pair("ordinary", 4, 11, torch.float32)[0]
    teacher = pair("ordinary", 4, 11, torch.float32)[1]
    for divergence in ("forward_kl", "jsd", "adaptive_kl"):
        kd.distillation_loss(side, teacher, divergence, backend=backend)
    assert used == [backend] * 3


def test_explain_gives_a_reason_for_each_backend() -> None:
    student, teacher = pair("ordinary", 4, 11, torch.float32)
    explanation = kd.explain(student, teacher, kd.JSD(beta=0.1), temperature=2.0, labels=None)
    assert {v.backend for v in explanation.verdicts} == set(backends.BACKENDS)
    assert all(v.reason for v in explanation.verdicts)
    assert explanation.backend == next(v.backend for v in explanation.verdicts if v.serves)
    text = str(explanation)
    assert text.startswith(f"backend: {explanation.backend}\n")
    assert all(name in text for name in backends.BACKENDS)
    assert kd.explain(linear(4, 5, 11, torch.bfloat16)).backend == explanation.backend


def test_explain_of_rows_in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which backends have the parts of a row, and why the others are passed over."""
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    student, group = pair("ordinary", 4, 11, torch.float32)[0], SimpleNamespace(group_name="tp")
    best = "cpp" if native.available() else "eager"
    assert kd.explain(student, group=group).backend == best
    assert kd.explain(student[:, :0], group=group).backend == best
    cases = [
        (student, None, "adaptive_kl", "adaptive KL over vocabulary shards is plain torch"),
        (student, kd.compress(student, 3), "jsd", "a sparse teacher over vocabulary shards is plain torch"),
        (student.double(), None, "jsd", "no float64"),
    ]
    for logits, teacher, divergence, reason in cases:
        explanation = kd.explain(logits, teacher, divergence, group=group)
        assert explanation.backend == "eager"
        if native.available():
            assert reason in str(explanation)
            assert kd.explain(logits, teacher, divergence).backend == "cpp"
            with pytest.raises(ValueError, match=reason):
                kd.explain(logits, teacher, divergence, group=group, backend="cpp")


def test_other_devices_get_what_serves_them() -> None:
    gpu = torch.device("cuda")
    assert not backends.judge("cpp", gpu, torch.float32, "jsd").serves
    assert "CPU tensors" in backends.judge("cpp", gpu, torch.float32, "jsd").reason
    assert backends.choose("auto", gpu, torch.float32, "jsd") == "eager"
    assert backends.choose("auto", torch.device("meta"), torch.float32, "jsd") == "eager"


def test_cuda_says_what_it_selects_from() -> None:
    gpu = torch.device("cuda")

    def reason(device: torch.device, dtype: torch.dtype, kernel: str = backends.SELECTION) -> str:
        verdict = backends.judge("cuda", device, dtype, kernel)
        assert verdict.serves == (verdict.reason == "CUDA kernels of selection")
        return verdict.reason

    assert reason(torch.device("cpu"), torch.float32) == "serves CUDA tensors, these are on cpu"
    assert reason(gpu, torch.float64) == "serves float32, bfloat16 and float16, not torch.float64"
    assert "do not include 'draw'" in reason(gpu, torch.float32, backends.DRAWS)
    if not torch.cuda.is_available():
        assert "sees no NVIDIA GPU" in reason(gpu, torch.float32) or not native.available()
        assert backends.choose("auto", gpu, torch.float32, backends.SELECTION) == "eager"


@pytest.mark.parametrize(
    ("compiled", "gpu", "selects", "keeps_rows"),
    [
        ([90], (8, 0), False, False),
        ([80], (8, 6), True, False),
        ([80], (9, 0), True, False),  # by PTX, in which the kernels of clusters are empty
        ([90], (9, 0), True, True),
        ([80, 90], (10, 0), True, True),  # by PTX
        ([80, 100], (9, 0), False, False),  # machine code of neither major version, PTX of a later one
        ([], (9, 0), False, False),
    ],
)
def test_cuda_kernels_serve_gpus_that_they_were_compiled_for(
    compiled: list[int], gpu: tuple[int, int], selects: bool, keeps_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_load", lambda: native._State("", facts={"cuda_architectures": compiled}))
    monkeypatch.setattr(native, "has_onchip", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
    monkeypatch.setattr("kdkernels.triton.obstacle", lambda device, dtype: "")
    monkeypatch.setattr("kdkernels.onchip.shared_memory", lambda device: 227 * 1024)
    device = torch.device("cuda")
    for kernel, serves in ((backends.SELECTION, selects), ("forward_kl", keeps_rows)):
        verdict = backends.judge("cuda", device, torch.bfloat16, kernel)
        assert verdict.serves == serves
        if not serves and (gpu >= (9, 0) or kernel == backends.SELECTION):
            assert f"rebuild with TORCH_CUDA_ARCH_LIST={gpu[0]}.{gpu[1]}" in verdict.reason


def test_without_native_kernels_eager_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "kdkernels_C.so is not there: pip install .")
    student, teacher = pair("ordinary", 4, 11, torch.float32)
    assert kd.explain(student).backend == "eager"
    assert kd.distillation_loss(student, teacher).isfinite()
    with pytest.raises(ValueError, match=r"'cpp': must be .*kdkernels_C.so is not there: pip install"):
        kd.distillation_loss(student, teacher, backend="cpp")


@given(st.integers(0, 10**6), st.integers(0, 10**7), st.none() | st.integers(1, 2**33))
def test_chunks_cover_the_rows_and_keep_the_budget(n: int, row: int, budget: int | None) -> None:
    size = chunking.chunk_rows(n, row, budget)
    limit = chunking.DEFAULT_CHUNK_BYTES if budget is None else budget
    assert size >= 1
    assert size == 1 or size * row <= limit
    fewest = -(-n // max(1, min(max(n, 1), limit // max(1, row))))
    assert -(-n // size) == fewest  # as many chunks as the budget needs, of even size
    if n <= 10**4:
        spans = chunking.spans(n, size)
        assert [i for begin, end in spans for i in range(begin, end)] == list(range(n))
        assert all(end - begin <= size for begin, end in spans)

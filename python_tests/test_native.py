"""The native loader and the checks at the C++ boundary. What the kernels compute is tested in test_dense*.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import leaves, native
from kdkernels.divergences import _emit

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    """Forgets what was loaded, before and after."""
    caches = (native._load, native._kernel_ids, native._source_digests)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter at the repository's root; a hang is a failure after a minute."""
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env, cwd=root, check=False
    )


# ---- what is known about the library


@needs_native
def test_facts_say_what_was_built() -> None:
    facts = native.facts()
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "baseline" in facts["instruction_sets"]
    assert native.isa() in facts["instruction_sets"]
    assert facts["kernels"] == dict(_emit.digests()), "the installed .py files and the library differ: rebuild"
    assert facts["compiler"]


@needs_native
def test_facts_are_the_same_without_torch() -> None:
    from kdkernels import _codec

    assert dict(_codec.build_facts()["kernels"]) == native.facts()["kernels"]


@needs_native
def test_kernel_ids_are_positions_in_sorted_order() -> None:
    names = sorted(_emit.digests())
    assert [native.kernel_id(name) for name in names] == list(range(len(names)))
    assert native.kernel_id("adaptive_kl") == -1
    assert all(native.why_not(name) == "" for name in [*names, "adaptive_kl"])


@needs_native
def test_a_divergence_that_was_not_compiled_is_told() -> None:
    assert native.kernel_id("brand_new") is None
    assert "'brand_new'" in native.why_not("brand_new")
    assert "pip install" in native.why_not("brand_new")


@needs_native
@pytest.mark.usefixtures("fresh_loader")
def test_a_divergence_that_changed_since_the_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {**_emit.digests(), "forward_kl": "000000000000"}
    monkeypatch.setattr(_emit, "digests", lambda: digests)
    assert native.kernel_id("forward_kl") is None
    assert "changed" in native.why_not("forward_kl")
    assert native.kernel_id("jsd") is not None


@pytest.mark.usefixtures("fresh_loader")
def test_a_missing_library_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "kdkernels_C.so")
    assert not native.available()
    assert "KD_BUILD=none" in native.reason()
    assert "pip install" in native.reason()
    assert native.facts() == {}
    assert native.isa() == ""
    assert native.kernel_id("forward_kl") is None
    with pytest.raises(RuntimeError, match="no native kernels"):
        call()


@pytest.mark.usefixtures("fresh_loader")
def test_a_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "kdkernels_C.so"
    broken.write_bytes(b"not a shared object")
    monkeypatch.setattr(native, "LIBRARY", broken)
    assert not native.available()
    assert str(broken) in native.reason()
    assert torch.__version__ in native.reason()


def test_importing_loads_nothing() -> None:
    done = python(
        "import sys, kdkernels.native as n; assert n._load.cache_info().currsize == 0\n"
        "assert 'kdkernels_C' not in open('/proc/self/maps').read()"
    )
    assert done.returncode == 0, done.stderr


# ---- the instruction set


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_set_can_be_asked_for(isa: str) -> None:
    """It is taken, or refused with a reason that names it: never replaced in silence."""
    done = python("from kdkernels import native as n; print(n.isa() or n.reason())", KDKERNELS_ISA=isa)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    assert said == isa or (isa in said and "KDKERNELS_ISA" in said)
    if isa == "baseline":
        assert said == isa


@needs_native
def test_unknown_instruction_set_is_refused() -> None:
    code = "from kdkernels import native as n; assert not n.available(); print(n.reason())"
    done = python(code, KDKERNELS_ISA="sse9")
    assert done.returncode == 0, done.stderr
    assert "sse9" in done.stdout
    assert "avx2" in done.stdout


# ---- the leaf and its checks


def arguments(n: int = 4, v: int = 9, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """A valid call of dense_, changed as asked."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    base: dict[str, Any] = {
        "student": torch.randn(n, v, dtype=dtype), "teacher": torch.randn(n, v, dtype=dtype),
        "student_bias": None, "teacher_bias": None, "student_scale": 1.0, "student_softcap": 0.0,
        "teacher_scale": 1.0, "teacher_softcap": 0.0, "w_kd": torch.ones(n, dtype=acc), "w_ce": None, "labels": None,
        "kernel": native.kernel_id("forward_kl"), "a": 0.0, "b": 0.0, "temperature": 1.0, "vocab": v,
        "loss": torch.full((n,), float("nan"), dtype=acc), "dlogits": torch.full((n, v), float("nan"), dtype=dtype),
        "stats": torch.full((n, 6), float("nan"), dtype=acc),
    }  # fmt: skip
    return {**base, **changes}


def call(**changes: Any) -> dict[str, Any]:
    given = arguments(**changes)
    leaves.dense_(**given)
    return given


def expected(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL per row and its gradient, in float64."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1), q - p


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_leaf_reaches_the_kernel(dtype: torch.dtype) -> None:
    given = call(dtype=dtype)
    loss, gradient = expected(given["student"], given["teacher"])
    torch.testing.assert_close(given["loss"].double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given["dlogits"].double(), gradient, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(given["stats"][:, 0].double(), loss, rtol=1e-5, atol=1e-6)


@needs_native
def test_leaf_writes_in_place_over_the_student() -> None:
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    loss, gradient = expected(student, teacher)
    given = call(student=student, teacher=teacher, dlogits=student)
    torch.testing.assert_close(given["loss"].double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.double(), gradient, rtol=1e-4, atol=1e-6)


@needs_native
def test_leaf_takes_strided_rows_and_column_halves_of_one_buffer() -> None:
    buffer = torch.randn(4, 27)
    student, teacher, target = buffer[:, :9], buffer[:, 9:18], buffer[:, 18:]
    loss, gradient = expected(student, teacher)
    given = call(student=student, teacher=teacher, dlogits=target)
    torch.testing.assert_close(given["loss"].double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target.double(), gradient, rtol=1e-4, atol=1e-6)


@needs_native
def test_leaf_takes_an_expanded_teacher_and_no_rows() -> None:
    student, teacher = torch.randn(4, 9), torch.randn(1, 9).expand(4, 9)
    given = call(student=student, teacher=teacher)
    torch.testing.assert_close(given["loss"].double(), expected(student, teacher)[0], rtol=1e-5, atol=1e-6)
    call(n=0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "student 3-D": ({"student": torch.randn(2, 2, 9)}, r"student has shape \[2, 2, 9\]"),
    "student int": ({"student": torch.ones(4, 9, dtype=torch.int32)}, "student is int32; it must be float32"),
    "student strided": ({"student": torch.randn(9, 4).t()}, "student has stride 4 along the vocabulary"),
    "student meta": ({"student": torch.empty(4, 9, device="meta")}, "student|meta|Meta"),
    "teacher dtype": ({"teacher": torch.randn(4, 9).double()}, "teacher is float64; it must be float32"),
    "teacher rows": ({"teacher": torch.randn(3, 9)}, "teacher has 3 rows; student has 4"),
    "teacher narrow": ({"teacher": torch.randn(4, 8)}, "teacher has 8 columns; vocab is 9"),
    "vocab 0": ({"vocab": 0}, "vocab is 0"),
    "vocab too large": ({"vocab": 10}, "student has 9 columns; vocab is 10"),
    "bias short": ({"student_bias": torch.randn(8)}, r"student_bias has shape \[8\]"),
    "bias dtype": ({"teacher_bias": torch.randn(9).bfloat16()}, "teacher_bias is bfloat16"),
    "scale": ({"student_scale": float("inf")}, "student_scale is inf"),
    "softcap": ({"teacher_softcap": -1.0}, "teacher_softcap is -1"),
    "temperature": ({"temperature": 0.0}, "temperature is 0"),
    "a": ({"a": float("nan")}, "a is nan"),
    "kernel": ({"kernel": 1000}, "kernel is 1000"),
    "kernel below": ({"kernel": -2}, "kernel is -2"),
    "w_kd size": ({"w_kd": torch.ones(3)}, r"w_kd has shape \[3\]; it must be \[4\]"),
    "w_kd dtype": ({"w_kd": torch.ones(4).double()}, "w_kd is float64"),
    "w_kd strided": ({"w_kd": torch.ones(8)[::2]}, "w_kd is strided"),
    "w_ce without labels": ({"w_ce": torch.ones(4)}, "w_ce is given without labels"),
    "labels dtype": ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels is int32; it must be int64"),
    "labels size": ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels has shape \[5\]"),
    "loss size": ({"loss": torch.empty(5)}, r"loss has shape \[5\]"),
    "dlogits dtype": ({"dlogits": torch.empty(4, 9).half()}, "dlogits is float16"),
    "dlogits narrow": ({"dlogits": torch.empty(4, 8)}, "dlogits has 8 columns"),
    "dlogits rows overlap": ({"dlogits": torch.empty(9).expand(4, 9)}, "its rows overlap"),
    "stats size": ({"stats": torch.empty(4, 5)}, r"stats has shape \[4, 5\]; it must be \[4, 6\]"),
}


@needs_native
@pytest.mark.parametrize("case", BAD)
def test_leaf_refuses(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        call(**changes)


@needs_native
def test_leaf_refuses_a_gradient_that_shares_part_of_an_input() -> None:
    buffer = torch.randn(5 * 9 + 3)
    student, shifted = buffer[:36].view(4, 9), buffer[9:45].view(4, 9)
    with pytest.raises(RuntimeError, match="shares part of student's memory"):
        call(student=student, dlogits=shifted)
    with pytest.raises(RuntimeError, match="shares memory with teacher"):
        call(teacher=student, dlogits=student)
    wide = torch.randn(4, 20)
    with pytest.raises(RuntimeError, match="shares part of student's memory"):
        call(student=wide[:, :9], dlogits=wide[:, 5:14])


# ---- forks

FORK = """
import os, sys, torch
torch.set_num_threads(2)
from kdkernels import native
import kdkernels as kd
s, t = torch.randn(64, 4096), torch.randn(64, 4096)
whole = kd.distillation_loss(s, t, reduction="none")  # starts torch's pool in the parent
def work():
    same = torch.equal(kd.distillation_loss(s, t, reduction="none"), whole)
    return same and bool(torch.isfinite(torch.softmax(s, -1)).all())
"""


@pytest.mark.slow
@needs_native
def test_a_forked_child_does_not_hang() -> None:
    done = python(
        FORK + "pid = os.fork()\nif pid == 0:\n    os._exit(0 if work() else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_before_any_kernel_keeps_its_threads() -> None:
    done = python(
        "import os, sys, torch, kdkernels\ntorch.set_num_threads(2)\npid = os.fork()\n"
        "if pid == 0:\n    os._exit(torch.get_num_threads())\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_native
def test_a_forked_data_worker_does_not_hang() -> None:
    done = python(
        FORK + "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return torch.tensor(work())\n"
        "if __name__ == '__main__':\n"
        "    data = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context='fork')\n"
        "    assert all(bool(x.all()) for x in data)\n"
        "    assert work()  # the parent keeps its threads\n"
        "    assert torch.get_num_threads() == 2"
    )
    assert done.returncode == 0, done.stderr

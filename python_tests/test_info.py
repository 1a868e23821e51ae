"""`kdkernels info`: versions and, for each backend, whether it is available and why not."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

import kdkernels
from kdkernels import backends, info, native


def test_describe_names_versions_and_every_backend() -> None:
    facts = info.describe()
    assert facts["kdkernels"] == kdkernels.__version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert set(facts["backends"]) == set(backends.BACKENDS)
    for verdict in facts["backends"].values():
        assert isinstance(verdict["available"], bool)
        assert verdict["reason"]
    assert facts["backends"]["eager"]["available"]
    assert facts["backends"]["cpp"]["available"] == native.available()


def test_json_is_the_description() -> None:
    assert json.loads(info.render(as_json=True)) == json.loads(json.dumps(info.describe()))


def test_text_says_why_each_backend_is_or_is_not_there() -> None:
    text = info.render()
    for name, verdict in info.describe()["backends"].items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name] and verdict["reason"] in line)
        assert ("yes" if verdict["available"] else "no") in line.split()
    assert torch.__version__ in text


def test_without_native_kernels_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: native._State("was built with KD_BUILD=none"))
    facts = info.describe()
    assert facts["instruction_set"] is None
    assert facts["compiler"] is None
    for name in ("cpp", "cuda"):
        assert facts["backends"][name] == {"available": False, "reason": "was built with KD_BUILD=none"}
    assert "none (no native kernels)" in info.render()


def test_without_triton_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_version", lambda package: None)
    verdict = info.describe()["backends"]["triton"]
    assert not verdict["available"]
    assert "pip install 'kdkernels[triton]'" in verdict["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_gpu_backends_say_so() -> None:
    if info.describe()["triton"] is not None:
        reason = info.describe()["backends"]["triton"]["reason"]
        assert "CPU build" in reason or "sees no GPU" in reason


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_cuda_names_the_nearest_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**native.facts(), "nvcc": None, "cuda_sources": []}
    monkeypatch.setattr(native, "facts", lambda: facts)
    assert "nvcc was not found" in info.describe()["backends"]["cuda"]["reason"]
    facts["nvcc"] = "13.0"
    assert "no CUDA C++ kernels" in info.describe()["backends"]["cuda"]["reason"]
    facts["cuda_sources"] = ["dense_onchip.cu", "topk.cu"]
    if not torch.cuda.is_available():
        served = "built for forward and reverse KL of long rows and the selection of compress"
        assert served in info.describe()["backends"]["cuda"]["reason"]
    monkeypatch.setattr(info, "_gpu", lambda: "a GPU")
    reason = info.describe()["backends"]["cuda"]["reason"]
    assert reason.startswith("selection: ")
    assert "; losses: " in reason


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_text_names_the_gpus_that_were_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**native.facts(), "nvcc": "13.0", "cuda_architectures": [80, 90]}
    monkeypatch.setattr(native, "facts", lambda: facts)
    assert "nvcc 13.0 for sm_80 sm_90" in info.render()


def test_text_names_every_divergence() -> None:
    row = next(line for line in info.render().splitlines() if line.startswith("divergences"))
    assert row.split(None, 1)[1].split(", ") == list(kdkernels.divergences.names())
    assert "adaptive_kl" in row


def test_import_leaves_the_compiler_alone() -> None:
    """Importing torch's compiler takes longer than all of kdkernels."""
    code = "import sys, kdkernels; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

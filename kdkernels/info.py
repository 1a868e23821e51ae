"""What `kdkernels info` prints: versions, the machine, the build, and for each backend whether it is available."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

import kdkernels
from kdkernels import backends, divergences, native


def _version(package: str) -> str | None:
    """The installed version of a package, without importing it; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    """The name of the GPU that torch would use; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build: install a CUDA build of torch on a machine with a GPU"
    return "torch sees no GPU (torch.cuda.is_available() is False)"


def _triton_obstacle() -> str:
    if _version("triton") is None:
        return "triton is not installed: pip install 'kdkernels[triton]'"
    return "" if _gpu() else _why_no_gpu()


CUDA_KERNELS = {
    "topk.cu": "the selection of compress",
    "dense_onchip.cu": "forward and reverse KL of long rows",
    "gate.cu": "the gate of SWITCH",
}


def _cuda_kernels() -> str:
    """What the CUDA C++ kernels of the build serve."""
    served = [CUDA_KERNELS[name] for name in native.facts()["cuda_sources"] if name in CUDA_KERNELS]
    return " and ".join((", ".join(served[:-1]), served[-1]) if len(served) > 1 else served)


def _cuda_obstacle() -> str:
    facts = native.facts()
    if not native.available():
        return native.reason()
    if not facts["nvcc"]:
        return "nvcc was not found when kdkernels was built: install the CUDA toolkit and rebuild"
    if not facts["cuda_sources"]:
        return f"nvcc {facts['nvcc']} was found, but this version has no CUDA C++ kernels"
    return "" if _gpu() else f"{_why_no_gpu()}; built for {_cuda_kernels()}"


def _backend(name: str) -> dict[str, Any]:
    """Whether a backend serves float32 logits here: first the machine's obstacles, then the dispatcher's word."""
    obstacles = {"triton": _triton_obstacle, "cuda": _cuda_obstacle}
    why = obstacles[name]() if name in obstacles else ""
    if why:
        return {"available": False, "reason": why}
    device = torch.device("cuda" if name in obstacles else "cpu")
    verdict = backends.judge(name, device, torch.float32, "forward_kl")
    if name != "cuda":
        return {"available": verdict.serves, "reason": verdict.reason}
    selection, gate = (
        backends.judge(name, device, torch.float32, kernel) for kernel in (backends.SELECTION, backends.GATE)
    )
    reason = f"selection: {selection.reason}; gate: {gate.reason}; losses: {verdict.reason}"
    return {"available": verdict.serves or selection.serves or gate.serves, "reason": reason}


def describe() -> dict[str, Any]:
    """Everything as plain JSON data.

    Keys: kdkernels, torch, triton, python (versions; None: not installed), compiler (of the native build, or None),
    platform, threads, gpu, instruction_set (chosen; None without native kernels), isa_override (KDKERNELS_ISA),
    divergences (names), build (`native.facts()`), backends: name -> {available, reason}.
    """
    facts = native.facts()
    return {
        "kdkernels": kdkernels.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "compiler": facts.get("compiler"),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "instruction_set": native.isa() or None,
        "isa_override": os.environ.get("KDKERNELS_ISA") or None,
        "divergences": list(divergences.names()),
        "build": facts,
        "backends": {name: _backend(name) for name in backends.BACKENDS},
    }


def _build_line(facts: dict[str, Any]) -> str:
    if not facts:
        return "none"
    parts = [f"torch {facts['torch']}", ", ".join(facts["instruction_sets"])]
    compiled = " ".join(f"sm_{arch}" for arch in facts.get("cuda_architectures", []))
    parts.append(f"nvcc {facts['nvcc']} for {compiled or 'no GPU'}" if facts["nvcc"] else "no nvcc")
    if facts["sanitize"]:
        parts.append(f"sanitizers {facts['sanitize']}")
    return "; ".join(parts)


def render(as_json: bool = False) -> str:
    """`describe()` as text for a terminal, or as JSON."""
    facts = describe()
    if as_json:
        return json.dumps(facts, indent=2, sort_keys=True)
    override = f" (KDKERNELS_ISA={facts['isa_override']})" if facts["isa_override"] else ""
    rows = {
        "kdkernels": facts["kdkernels"],
        "torch": facts["torch"],
        "triton": facts["triton"] or "not installed",
        "python": facts["python"],
        "compiler": facts["compiler"] or "none (no native build)",
        "machine": f"{facts['platform']}, {facts['threads']} threads, GPU: {facts['gpu'] or 'none'}",
        "instruction set": (facts["instruction_set"] or "none (no native kernels)") + override,
        "native build": _build_line(facts["build"]),
        "divergences": ", ".join(facts["divergences"]),
    }
    lines = [f"{name:<17}{value}" for name, value in rows.items()]
    lines += ["", "backend          available"]
    for name, verdict in facts["backends"].items():
        lines.append(f"  {name:<15}{'yes' if verdict['available'] else 'no':<11}{verdict['reason']}")
    return "\n".join(lines)

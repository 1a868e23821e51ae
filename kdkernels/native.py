"""The native library: whether it can be used here and why not, what it is (its leaves: `kdkernels.leaves`).

Nothing is loaded when this module is imported; the first question loads it. A missing library makes only the
leaves themselves raise.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

LIBRARY = Path(__file__).with_name("kdkernels_C.so")
ADAPTIVE_KL = "adaptive_kl"  # not separable, so in no header: a row function of its own
ADAPTIVE_KL_ID = -1  # KD_ADAPTIVE_KL in csrc/kernels.h


def _one_thread_in_child() -> None:
    """A forked child inherits torch's pool without its threads: the next parallel loop would wait for ever, in torch's
    own softmax as well. One thread needs no pool; DataLoader sets the same in its workers.

    Registered when the library loads, not at import: a process that forks before it computes keeps its threads.
    """
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _State:
    """What loading came to: `why` is empty when the library can be used."""

    why: str
    isa: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def _text(library: ctypes.CDLL, function: str) -> str:
    """Calls `const char* function()`; a null pointer is an empty text."""
    entry = getattr(library, function)
    entry.restype = ctypes.c_char_p
    value = cast("bytes | None", entry())
    return value.decode() if value else ""


@functools.cache
def _load() -> _State:
    if not LIBRARY.is_file():
        return _State(
            f"{LIBRARY.name} is not in {LIBRARY.parent}: kdkernels was installed without native kernels "
            "(KD_BUILD=none, or a platform other than Linux), or this source tree was never built. "
            "To build them: pip install . (in a source tree: pip install -e . --no-build-isolation)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return _State(
            f"{LIBRARY} does not load with torch {torch.__version__}: {error}. "
            "Reinstall kdkernels in this environment: pip install --force-reinstall --no-deps ."
        )
    library = ctypes.CDLL(str(LIBRARY))
    facts = cast("dict[str, Any]", json.loads(_text(library, "kdkernels_build_facts")))
    refused = _text(library, "kdkernels_isa_error")
    if refused:
        return _State(refused, facts=facts)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread_in_child)
    return _State("", _text(library, "kdkernels_isa"), facts)


def available() -> bool:
    """Whether the native CPU kernels can serve calls."""
    return not _load().why


def reason() -> str:
    """Why `available()` is False and what to do; empty when it is True."""
    return _load().why


def facts() -> dict[str, Any]:
    """What the build is: version; the torch, python and compiler it was made with; instruction_sets, nvcc,
    cuda_sources, cuda_architectures (compute capabilities times ten; the last one's PTX is there too), sanitize,
    kernels (name -> digest). Empty without a native library."""
    known = dict(_load().facts)
    if known:
        known["kernels"] = dict(known["kernels"])
    return known


def isa() -> str:
    """The instruction set chosen here ("avx512", "avx2" or "baseline"); empty when not available."""
    return _load().isa


@functools.cache
def _source_digests() -> dict[str, str]:
    """Digests of the divergences' .py files as they are now."""
    from kdkernels.divergences import _emit

    return dict(_emit.digests())


@functools.cache
def _kernel_ids() -> dict[str, tuple[int, str]]:
    """Kernel name -> (id, digest) as compiled: the position in the header is the id."""
    compiled = enumerate(_load().facts.get("kernels", []))
    return {name: (position, digest) for position, (name, digest) in compiled}


def why_not(name: str) -> str:
    """Why the native library has no kernel called `name`; empty when it has."""
    if not available():
        return reason()
    if name == ADAPTIVE_KL:
        return ""
    rebuild = "pip install . (in a source tree: pip install -e . --no-build-isolation)"
    if name not in _kernel_ids():
        return f"divergence {name!r} was not there when the native kernels were built: rebuild with {rebuild}"
    if _source_digests().get(name) != _kernel_ids()[name][1]:
        return f"divergence {name!r} has changed since the native kernels were built: rebuild with {rebuild}"
    return ""


@functools.cache
def why_not_sparse() -> str:
    """Why the native library has no kernels for sparse teachers; empty when it has."""
    if not available():
        return reason()
    if hasattr(torch.ops.kdkernels_C, "sparse_"):
        return ""
    return (
        "the native kernels were built before there were any for sparse teachers: rebuild with pip install . "
        "(in a source tree: pip install -e . --no-build-isolation)"
    )


def _why_no_leaf(leaf: str, purpose: str) -> str:
    if not available():
        return reason()
    known = hasattr(torch.ops.kdkernels_C, leaf)
    if known and torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels_C::{leaf}", "CPU"):
        return ""
    rebuild = "pip install . (in a source tree: pip install -e . --no-build-isolation)"
    return f"the native kernels were built before there was one for {purpose}: rebuild with {rebuild}"


def why_not_topk() -> str:
    """Why the native library cannot select; empty when it can."""
    return _why_no_leaf("topk_", "selection")


def why_not_gate() -> str:
    """Why the native library has no gate; empty when it has."""
    return _why_no_leaf("gate_", "the gate")


def why_not_shards(dtype: torch.dtype) -> str:
    """Why the native library cannot compute the parts of a row in vocabulary shards; empty when it can."""
    if not available():
        return reason()
    if not hasattr(torch.ops.kdkernels_C, "shard_norms_"):
        return "the native kernels were built before there were any for vocabulary shards: rebuild with pip install ."
    return "the native parts of rows in vocabulary shards take no float64" if dtype == torch.float64 else ""


def kernel_id(name: str) -> int | None:
    """The id that `dense_` takes for the kernel `name`; None where `why_not(name)` says why."""
    if why_not(name):
        return None
    return ADAPTIVE_KL_ID if name == ADAPTIVE_KL else _kernel_ids()[name][0]


def why_not_on_gpu(capability: tuple[int, int], least: tuple[int, int]) -> str:
    """Why the build has no CUDA code that a GPU of this compute capability can run; empty where it has.

    Machine code runs on GPUs of its major version, from its minor version on; the PTX of the newest architecture that
    was compiled for on that one and all later ones. ``least``: what is compiled for GPUs below has empty kernels.
    """
    gpu, floor = (10 * major + minor for major, minor in (capability, least))
    compiled = [arch for arch in _load().facts.get("cuda_architectures", []) if arch >= floor]
    if any(arch // 10 == capability[0] and arch <= gpu for arch in compiled) or (compiled and compiled[-1] <= gpu):
        return ""
    built = ", ".join(f"sm_{arch}" for arch in compiled) or f"no sm_{floor} or later"
    remedy = f"rebuild with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
    return f"the CUDA kernels were compiled for {built}, this GPU is sm_{gpu}: {remedy}"


def has_onchip() -> bool:
    """Whether the native library has the CUDA kernels of forward and reverse KL."""
    return available() and hasattr(torch.ops.kdkernels_C, "kl_onchip_")

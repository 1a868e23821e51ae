"""The native library: whether it can be used here and why not, what it is, thin typed wrappers of its leaves.

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
from torch import Tensor

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
    cuda_sources, sanitize, kernels (name -> digest). Empty without a native library."""
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


def why_not_topk() -> str:
    """Why the native library cannot select; empty when it can."""
    if not available():
        return reason()
    if torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels_C::topk_", "CPU"):
        return ""
    rebuild = "pip install . (in a source tree: pip install -e . --no-build-isolation)"
    return f"the native kernels were built before there was one for selection: rebuild with {rebuild}"


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


def dense_(
    student: Tensor,
    teacher: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    w_kd: Tensor,
    w_ce: Tensor | None,
    labels: Tensor | None,
    kernel: int,
    a: float,
    b: float,
    temperature: float,
    vocab: int,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Rows of a divergence on the CPU; loss, gradient and statistics are written into the last three arguments.

    student, teacher [N, >= vocab] of one dtype (float32, float16, bfloat16, float64), unit stride along the
    vocabulary; biases [vocab], w_kd, w_ce, loss [N] and stats [N, 6] in float32 (float64 for float64 logits);
    labels [N] int64; dlogits like student, which it may be. `kernel` comes from `kernel_id`, a and b are the
    divergence's parameters; csrc/kernels.h says what each argument means. Raises RuntimeError naming the one
    at fault.
    """
    if not available():
        raise RuntimeError(f"kdkernels: no native kernels: {reason()}")
    torch.ops.kdkernels_C.dense_.default(
        student, teacher, student_bias, teacher_bias,
        student_scale, student_softcap, teacher_scale, teacher_softcap,
        w_kd, w_ce, labels, kernel, a, b, temperature, vocab, loss, dlogits, stats,
    )  # fmt: skip


def sparse_(
    student: Tensor,
    student_bias: Tensor | None,
    student_scale: float,
    student_softcap: float,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    w_kd: Tensor,
    w_ce: Tensor | None,
    labels: Tensor | None,
    kernel: int,
    a: float,
    b: float,
    excess: float,
    mode: int,
    temperature: float,
    vocab: int,
    loss: Tensor,
    dlogits: Tensor | None,
    stats: Tensor | None,
) -> None:
    """`dense_` for a teacher of which K entries a row are known.

    ids [N, K] int32, log_probs [N, K] and log_tail [N] in the dtype of the loss, contiguous; mode counts
    `kdkernels.ops.sparse.MODES`, excess is that of the divergence. Other arguments as for `dense_`.
    """
    if not available():
        raise RuntimeError(f"kdkernels: no native kernels: {reason()}")
    torch.ops.kdkernels_C.sparse_.default(
        student, student_bias, student_scale, student_softcap, ids, log_probs, log_tail,
        w_kd, w_ce, labels, kernel, a, b, excess, mode, temperature, vocab, loss, dlogits, stats,
    )  # fmt: skip


def has_onchip() -> bool:
    """Whether the native library has the CUDA kernels of forward and reverse KL."""
    return available() and hasattr(torch.ops.kdkernels_C, "kl_onchip_")


def kl_onchip_(
    student: Tensor,
    teacher: Tensor,
    w_kd: Tensor,
    reverse: bool,
    temperature: float,
    vocab: int,
    cluster: int,
    stages: int,
    loss: Tensor,
    dlogits: Tensor | None,
) -> None:
    """Rows of forward or reverse KL on a GPU of compute capability 9.0 or later; writes ``loss`` and ``dlogits``.

    student, teacher, dlogits [N, >= vocab] of float32, bfloat16 or float16, rows at 16-byte boundaries; w_kd, loss
    float32 [N]. cluster, stages: a `kdkernels.onchip.Plan`. Raises RuntimeError naming the argument at fault.
    """
    torch.ops.kdkernels_C.kl_onchip_.default(
        student, teacher, w_kd, reverse, temperature, vocab, cluster, stages, loss, dlogits
    )


def topk_(
    logits: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    vocab: int,
    k: int,
    other_temperatures: list[float],
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    entropy: Tensor | None,
    other_tails: Tensor | None,
) -> None:
    """The k largest entries of each row and the mass of the others; writes the last five arguments.

    logits [N, >= vocab] (float32, float16, bfloat16, float64), unit stride along the vocabulary; bias [vocab],
    log_probs [N, k], log_tail, entropy [N], other_tails [N, M] in float32 (float64 for float64 logits); ids int32
    [N, k]. csrc/topk.h says what each means. Raises RuntimeError naming the argument at fault.
    """
    torch.ops.kdkernels_C.topk_.default(
        logits, bias, scale, softcap, temperature, vocab, k, other_temperatures,
        ids, log_probs, log_tail, entropy, other_tails,
    )  # fmt: skip


def draw_(
    logits: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    vocab: int,
    uniforms: Tensor,
    ids: Tensor,
) -> None:
    """Draws from each row's distribution at uniforms [N, n] (float64), into ids [N, n] (int32); logits as for `topk_`.
    Fastest where uniforms ascend. CPU only."""
    torch.ops.kdkernels_C.draw_.default(logits, bias, scale, softcap, temperature, vocab, uniforms, ids)


def shard_kept_stride(vocab: int) -> int:
    """Numbers a row of what `shard_sums_` keeps: whole blocks of 1024."""
    return -(-vocab // 1024) * 1024


def shard_norms_(*given: Any) -> None:
    """One shard's part of the normalisers of N rows: ``(*rows, share, cold, places)``.

    rows: student, teacher, their biases, scales and soft-caps, w_kd, w_ce, labels (in the whole vocabulary), kernel, a,
    b, temperature, vocab, as `dense_` takes them but for float64, and offset, the first column's place in the whole
    vocabulary. share float32 [N, 10] and places int64 [N, 2] (or None) are written; csrc/shards.h says what they hold.
    Raises RuntimeError naming the argument at fault.
    """
    torch.ops.kdkernels_C.shard_norms_.default(*given)


def shard_sums_(*given: Any) -> None:
    """Sums of term and grad over one shard: ``(*rows, share, merged, again, kept, sums)``.

    rows and share as for `shard_norms_`; merged float64 [N, 8]: `kdkernels.eager_shards.Rows`; again: bool [N], the
    rows to sum with care, others being left out, or None: all, quickly. kept float32 [N, shard_kept_stride(vocab)] or
    None, and sums float32 [N, 2] are written.
    """
    torch.ops.kdkernels_C.shard_sums_.default(*given)


def shard_gradient_(*given: Any) -> None:
    """One shard's columns of the gradient: ``(*rows, share, merged, kept, dlogits)``, as for `shard_sums_`.

    dlogits [N, >= vocab], which may be the student, is written; without kept, grad is computed again.
    """
    torch.ops.kdkernels_C.shard_gradient_.default(*given)

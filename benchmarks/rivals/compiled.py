"""`torch.compile` of the eager formulas, in the default mode.

``mode="max-autotune"`` changes matrix products and CUDA graphs. Dense losses have neither; for fused heads on a CPU its
C++ products want weights that are constants (inductor's `use_cpp_gemm_template`), which a head in training is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rivals import Contestant
from benchmarks.rivals.eager import BOTH, FORMULAS, builder, jsd_mean

SOURCE = "torch.compile documentation: default mode, static shapes"


def compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for the shapes it meets, whole graph."""
    return torch.compile(call, fullgraph=True, dynamic=False)


CONTESTANTS = [
    Contestant("compile", builder(FORMULAS, True, compiled), SOURCE, ops=BOTH, compiled=True),
    Contestant(
        "compile:mean",
        builder({"jsd": jsd_mean}, True, compiled),
        SOURCE,
        ops=BOTH,
        divergences=("jsd",),
        compiled=True,
    ),
    Contestant(
        "compile:bf16",
        builder({**FORMULAS, "jsd": jsd_mean}, False, compiled),
        SOURCE,
        ops=BOTH,
        dtypes=("bf16",),
        arithmetic="input",
        compiled=True,
    ),
]

"""Liger-Kernel 0.8.5: `LigerFusedLinearJSDLoss`, the chunked loss that runs without a GPU.

What it computes: beta KL(p‖m) + (1 - beta) KL(q‖m), m = beta p + (1 - beta) q, p the teacher: ours at the same beta;
beta = 0 is forward KL, beta = 1 reverse KL. Mean over labels that are not ignored; the hard loss is off (weight 0).
Softmax in the dtype of the hidden states: bf16 logits stay bf16. Defaults: chunks of 1024 rows, compiled. Its dense
losses (`LigerJSD`, `LigerKLDIVLoss`, `LigerTVDLoss`) are Triton kernels for GPUs and have no CPU path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, LinearInputs
from benchmarks.rivals import Contestant, Loss
from benchmarks.shapes import Case

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def _build(compile_it: bool) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[case.divergence], compiled=compile_it
        )
        labels = torch.zeros(case.N, dtype=torch.long)

        def run(inputs: Inputs) -> Tensor:
            assert isinstance(inputs, LinearInputs)
            return loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, labels)

        return run

    return build


_SOURCE = "liger-kernel 0.8.5 chunked_loss/jsd_loss.py, default chunk_size=1024"

CONTESTANTS = [
    Contestant(
        name,
        _build(compile_it),
        f"{_SOURCE}, compiled={compile_it}",
        ops=("linear",),
        arithmetic="input",
        packages=("liger_kernel",),
        compiled=compile_it,
    )
    for name, compile_it in (("liger", True), ("liger:uncompiled", False))
]

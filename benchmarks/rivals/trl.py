"""TRL 1.16: `GKDTrainer.generalized_jsd_loss` (logits) and `ChunkedDivergenceFunction` (fused heads).

What they compute: beta = 0 forward KL, beta = 1 reverse KL, between them the generalised JSD with m = beta p + (1 -
beta) q, p the teacher: ours at the same beta. GKD's loss works in the logits' dtype and is averaged over rows
("batchmean"); without labels every row counts. The fused function returns per-token values in fp32 (products of fp32
copies of the hidden states and heads, tiles of 4096 rows by 32768 entries); on devices without Triton it runs its own
torch version of each tile (`_use_triton`), as `DistillationTrainer` would here.
"""

from __future__ import annotations

import os

from torch import Tensor

from benchmarks.inputs import DenseInputs, Inputs, LinearInputs
from benchmarks.rivals import Contestant, Loss
from benchmarks.shapes import Case

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def _gkd(case: Case) -> Loss:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    beta = BETA[case.divergence]

    def run(inputs: Inputs) -> Tensor:
        assert isinstance(inputs, DenseInputs)
        return GKDTrainer.generalized_jsd_loss(*inputs.student(), inputs.teacher, beta=beta, reduction="batchmean")

    return run


def _chunked(case: Case) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = BETA[case.divergence]

    def run(inputs: Inputs) -> Tensor:
        assert isinstance(inputs, LinearInputs)
        per_token, _ = ChunkedDivergenceFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.teacher_hidden, inputs.teacher_weight, None, beta
        )
        return per_token.mean()

    return run


CONTESTANTS = [
    Contestant(
        "trl:gkd",
        _gkd,
        "trl 1.16 experimental/gkd/gkd_trainer.py, as GKDTrainer.compute_loss calls it",
        arithmetic="input",
        packages=("trl",),
    ),
    Contestant(
        "trl:chunked",
        _chunked,
        "trl 1.16 trainer/distillation_trainer.py and kernels/chunked_divergence.py, its own tile sizes",
        ops=("linear",),
        packages=("trl",),
    ),
]

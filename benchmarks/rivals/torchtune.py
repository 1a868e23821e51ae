"""torchtune 0.6.1: `ForwardKLLoss`, `ReverseKLLoss` and their chunked forms.

What it computes: softmax in fp32, mean over tokens whose label is not ignored; no temperature. The forward "KL" is the
cross-entropy -sum p log q (KL plus the teacher's entropy): same gradient, other value. The chunked forms take lists of
8 chunks of output (docstring of `ForwardKLWithChunkedOutputLoss`) and N divisible by 8; with ``compile: True`` the
recipe `knowledge_distillation_single_device` compiles the per-chunk loss (`torchtune.training.compile_loss`).
The loss file is loaded by path: `import torchtune` needs torchao and more, the file needs torch alone, so that
``pip install --no-deps torchtune`` is enough.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import DenseInputs, Inputs
from benchmarks.rivals import Contestant, Loss
from benchmarks.shapes import Case

CHUNKS = 8


@cache
def losses() -> ModuleType:
    """torchtune/modules/loss/kd_losses.py as a module of its own."""
    package = importlib.util.find_spec("torchtune")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("torchtune is not installed: pip install --no-deps torchtune==0.6.1")
    path = Path(next(iter(package.submodule_search_locations))) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("benchmarks_torchtune_kd_losses", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded: this file was written for torchtune 0.6.1")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _whole(case: Case) -> Loss:
    name = {"forward_kl": "ForwardKLLoss", "reverse_kl": "ReverseKLLoss"}[case.divergence]
    loss = getattr(losses(), name)()
    labels = torch.zeros(case.N, dtype=torch.long)

    def run(inputs: Inputs) -> Tensor:
        assert isinstance(inputs, DenseInputs)
        return loss(*inputs.student(), inputs.teacher, labels)

    return run


def _chunked(compile_it: bool) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        name, part = {
            "forward_kl": ("ForwardKLWithChunkedOutputLoss", "fkl_loss"),
            "reverse_kl": ("ReverseKLWithChunkedOutputLoss", "rkl_loss"),
        }[case.divergence]
        loss = getattr(losses(), name)(num_output_chunks=CHUNKS)
        if compile_it:
            setattr(loss, part, torch.compile(getattr(loss, part), dynamic=False))
        labels = torch.zeros(1, case.N, dtype=torch.long)

        def run(inputs: Inputs) -> Tensor:
            if isinstance(inputs, DenseInputs):
                student = inputs.student(CHUNKS)
                teacher = list(inputs.teacher.chunk(CHUNKS))
            else:  # the docstring's example: model.output(chunk) for chunk in h.chunk(num_chunks)
                student = [F.linear(h, inputs.weight) for h in inputs.hidden.chunk(CHUNKS)]
                teacher = [F.linear(h, inputs.teacher_weight) for h in inputs.teacher_hidden.chunk(CHUNKS)]
            return loss(student, teacher, labels)

        return run

    return build


def _entry(name: str, build: Callable[[Case], Loss], source: str, divergence: str, *ops: str) -> Contestant:
    return Contestant(
        name,
        build,
        source,
        ops=ops,
        divergences=(divergence,),
        value="cross_entropy" if divergence == "forward_kl" else "divergence",
        packages=("torchtune",),
        compiled=name.endswith("compiled"),
    )


_CHUNKED = "torchtune 0.6.1 modules/loss/kd_losses.py, docstring of the chunked losses (8 chunks)"
_RECIPE = "torchtune 0.6.1 recipes/knowledge_distillation_single_device.py, compile: True"

CONTESTANTS = [
    entry
    for divergence in ("forward_kl", "reverse_kl")
    for entry in (
        _entry("torchtune", _whole, "torchtune 0.6.1 modules/loss/kd_losses.py", divergence, "dense"),
        _entry("torchtune:chunked", _chunked(False), _CHUNKED, divergence, "dense", "linear"),
        _entry("torchtune:compiled", _chunked(True), _RECIPE, divergence, "dense", "linear"),
    )
]

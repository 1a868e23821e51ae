"""A training step as a user writes it, on a GPU: nothing waits for the device, a CUDA graph and torch.compile hold all
of it, and the numbers are the CPU's. The same bodies run on the CPU, without what only a GPU has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import kdkernels as kd

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = ["dense", "dense in place", "on chip", "labels", "head", "sparse"]
VOCAB = 1504
Forward = Callable[..., Tensor]


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Whatever would wait for the GPU is an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def heads(device: str) -> tuple[tuple[Tensor, Tensor], kd.LinearLogits]:
    """The student's hidden states and weight; the teacher."""
    student, teacher = (cases.linear(6, 16, VOCAB, torch.float32, seed=seed) for seed in (1, 2))
    known = kd.LinearLogits(teacher.hidden.to(device), teacher.weight.to(device), softcap=30.0)
    return (student.hidden.to(device), student.weight.to(device)), known


def make(step: str, device: str, vocab: int = VOCAB) -> tuple[Forward, tuple[Tensor, ...]]:
    """A loss of its leaves, and the leaves. ``vocab``: large enough for a GPU to keep rows on chip."""
    student, teacher = (x.to(device) for x in cases.pair("ordinary", 6, vocab, torch.float32))
    leaves: tuple[Tensor, ...] = (student,)
    known: Any = kd.compress(teacher, k=32) if step == "sparse" else teacher
    if step == "head":
        leaves, known = heads(device)
    options: dict[str, Any] = {"head": {"chunk_bytes": 4 * 2 * 2 * VOCAB}, "dense in place": {"inplace": True}}.get(
        step, {}
    )
    if step == "labels":
        labels = torch.tensor([3, vocab - 1, -100, 0, 7, 9], device=device)
        options = {"labels": labels, "ce_weight": 0.5, "temperature": 2.0}
    divergence = "jsd" if step in ("dense", "labels") else "forward_kl"

    def forward(*given: Tensor) -> Tensor:
        logits: Any = kd.LinearLogits(*given, softcap=30.0) if step == "head" else given[0]
        logits = logits * 1.0 if step == "dense in place" else logits
        loss = kd.distillation_loss(logits, known, divergence, **options)
        assert isinstance(loss, Tensor)
        return loss

    return forward, tuple(x.detach().requires_grad_() for x in leaves)


def results(forward: Forward, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    loss = forward(*leaves)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def agree(actual: tuple[Tensor, ...], due: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(due) > 1
    for a, b in zip(actual, due, strict=True):
        assert b.norm() > 0
        assert (a.cpu() - b.cpu()).norm() <= 2e-5 * b.cpu().norm()


def graphed(work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What a replay of a CUDA graph leaves where another replay's results were spoilt."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled, libraries allocate
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    graph.replay()
    for x in made:
        x.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    return made


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_for_nothing(device: str, step: str) -> None:
    vocab = 128256 if (step, device) == ("on chip", "cuda") else VOCAB
    forward, leaves = make(step, device, vocab)
    results(forward, leaves)  # kernels are compiled
    with no_waiting(device):
        made = results(forward, leaves)
    agree(made, results(*make(step, "cpu", vocab)))
    if device == "cuda":
        agree(graphed(lambda: results(forward, leaves)), made)


@pytest.mark.sample(3)
@pytest.mark.parametrize("step", ["dense", "labels", "head"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_is_the_same(device: str, step: str) -> None:
    forward, leaves = make(step, device)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    agree(results(compiled, leaves), results(forward, leaves))
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
def test_selection_waits_for_nothing(device: str) -> None:
    teacher = cases.pair("ordinary", 6, VOCAB, torch.float32)[1].to(device)

    def select() -> tuple[Tensor, ...]:
        found = kd.compress(teacher, k=16)
        return found.ids, found.log_probs, found.log_tail

    select()
    with no_waiting(device):
        made = select()
    due = kd.compress(teacher.cpu(), k=16)
    assert torch.equal(made[0].cpu(), due.ids)
    agree(made[1:], (due.log_probs, due.log_tail))
    if device == "cuda":
        again = graphed(select)
        assert torch.equal(again[0], made[0])
        agree(again[1:], made[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_the_gate_waits_for_nothing(device: str) -> None:
    student, teacher = (x.to(device) for x in cases.pair("ordinary", 6, VOCAB, torch.float32))
    threshold = torch.tensor([-1.0, 0.2, 0.5, 0.6, 0.8, 2.0], device=device)
    uniforms = torch.linspace(0.05, 0.95, 6, dtype=torch.float64).to(device)

    def decide() -> tuple[Tensor, ...]:
        return tuple(kd.switch_gate(student, teacher, threshold, uniforms=uniforms))

    decide()
    with no_waiting(device):
        made = decide()
    due = kd.switch_gate(student.cpu(), teacher.cpu(), threshold.cpu(), uniforms=uniforms.cpu(), backend="eager")
    for found in (made, *([graphed(decide)] if device == "cuda" else [])):
        assert torch.equal(found[0].cpu(), due.token)
        assert torch.equal(found[1].cpu(), due.from_teacher)
        assert ((found[2].cpu() - due.jsd).abs() <= 2e-6).all()

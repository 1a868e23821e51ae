"""torch.compile(fullgraph=True) equals eager, and torch's own checks of the operators.

``aot_eager`` traces everything and compiles nothing; inductor, which needs a C++ compiler, runs in the slow tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import ONE_OF_EACH, linear, pair
from torch import Tensor

import kdkernels as kd
from kdkernels import native
from kdkernels.divergences import Divergence

# the traced graph names its backend and is otherwise the same for all: the fastest one that was built
pytestmark = [
    pytest.mark.slow,
    pytest.mark.sample(3),
    pytest.mark.parametrize("backend", ["cpp" if native.LIBRARY.is_file() else "eager"], indirect=True),
]
LABELS = torch.tensor([[3, 0, -100], [10, 7, 7]])
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(dtype: torch.dtype = torch.float32, sequence: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return tuple(z.reshape(2, sequence, 11) for z in pair("ordinary", 2 * sequence, 11, dtype, seed))  # type: ignore[return-value]


def agree(function: Callable[..., Any], compiled: Callable[..., Any], *arguments: Any) -> None:
    """Results and gradients of every leaf among the arguments, bit for bit."""
    results = []
    for call in (function, compiled):
        leaves = [x.detach().clone().requires_grad_() if _leaf(x) else x for x in arguments]
        output = call(*leaves)
        loss = output.loss if isinstance(output, kd.DistillationOutput) else output
        stats = list(output.stats) if isinstance(output, kd.DistillationOutput) else []
        loss.sum().backward()
        results.append([loss, *stats, *(x.grad for x in leaves if _leaf(x))])
    assert len(results[0]) == len(results[1])
    for eager, traced in zip(*results, strict=True):
        assert eager.dtype == traced.dtype
        assert torch.equal(eager, traced), (eager - traced).abs().max()


def _leaf(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


@pytest.mark.thin(3)
@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("divergence", [*ONE_OF_EACH, "jsd"], ids=str)
def test_every_divergence(backend: str, compiler: str, divergence: Divergence | str) -> None:
    student, teacher = logits()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return kd.distillation_loss(z, t, divergence, temperature=2.0, backend=backend)

    agree(loss, torch.compile(loss, fullgraph=True, backend=compiler), student.requires_grad_(), teacher)


OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {"labels": LABELS, "ce_weight": 0.5, "shift": True, "temperature_scaling": "t2", "temperature": 2.0},
    "weights": {"token_weights": torch.tensor([[1.0, 0.5, 0.0]] * 2), "reduction": "sum"},
    "none": {"reduction": "none", "labels": LABELS},
    "num_items int": {"num_items": 7},
    "num_items tensor": {"num_items": torch.tensor(7)},
    "stats": {"labels": LABELS, "ce_weight": 0.5, "return_stats": True},
    "vocab_size": {"vocab_size": 9},
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: str, compiler: str, name: str) -> None:
    student, teacher = logits()

    def loss(z: Tensor, t: Tensor, **tensors: Tensor) -> Any:
        return kd.distillation_loss(z, t, "jsd", backend=backend, **OPTIONS[name])

    agree(loss, torch.compile(loss, fullgraph=True, backend=compiler), student.requires_grad_(), teacher)


@pytest.mark.thin(4)
@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(backend: str, compiler: str, reduction: str, dtype: torch.dtype) -> None:
    side, teacher = linear(6, 8, 11, dtype, bias=True), linear(6, 5, 11, dtype, seed=2, bias=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = kd.LinearLogits(hidden, weight, bias, softcap=5.0, scale=0.5)
        return kd.distillation_loss(
            student, teacher, "jsd", labels=LABELS.flatten(), ce_weight=0.5, reduction=reduction, chunk_bytes=200,
            backend=backend,
        )  # fmt: skip

    assert side.bias is not None
    leaves = [x.requires_grad_() for x in (side.hidden, side.weight, side.bias)]
    agree(loss, torch.compile(loss, fullgraph=True, backend=compiler), *leaves)


class Model(torch.nn.Module):
    """A student whose loss is compiled with it."""

    def __init__(self, head: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 11)
        self.fused = head
        self.loss = kd.DistillationLoss(kd.JSD(beta=0.3), temperature=1.5, ce_weight=0.5, **options)

    def forward(self, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        student = kd.LinearLogits(hidden, self.head.weight, self.head.bias) if self.fused else self.head(hidden)
        result = self.loss(student, teacher, labels)
        assert isinstance(result, Tensor)
        return result


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_module_inside_a_model(backend: str, compiler: str, fused: bool) -> None:
    """With inplace=True, which has no effect here; the loss scaled, as an accumulating trainer does."""
    found = []
    for compile_it in (False, True):
        model = Model(fused, backend=backend, inplace=True)
        call = torch.compile(model, fullgraph=True, backend=compiler) if compile_it else model
        for step in range(2):
            loss = call(torch.linspace(-1, 1, 36).reshape(2, 3, 6) + step, logits()[1], LABELS)
            (loss / 4).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, traced in zip(*found, strict=True):
        assert (eager - traced).norm() <= 1e-6 * eager.norm()


@pytest.mark.parametrize("compiler", BACKENDS)
def test_dynamic_shapes(backend: str, compiler: str) -> None:
    """Batches of other lengths neither fail nor compile anew each time."""
    graphs = 0
    inner = torch._dynamo.lookup_backend(compiler)

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return inner(graph, inputs)

    def loss(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return kd.distillation_loss(z, t, "jsd", labels=labels, ce_weight=0.5, shift=True, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)
    for sequence in (3, 5, 9, 17):
        student, teacher = logits(sequence=sequence)
        labels = torch.arange(2 * sequence).reshape(2, -1) % 11
        agree(loss, compiled, student.requires_grad_(), teacher, labels)
    assert graphs <= 2


def test_dynamic_shapes_of_linear(backend: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        return kd.distillation_loss(kd.LinearLogits(hidden, weight), teacher, "jsd", chunk_bytes=200, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7, 13):
        side, teacher = linear(rows, 8, 11, torch.float32), pair("ordinary", rows, 11, torch.float32)[1]
        agree(loss, compiled, side.hidden.requires_grad_(), side.weight.requires_grad_(), teacher)


def test_numbers_that_change_between_steps(backend: str) -> None:
    """A temperature schedule, a growing CE weight, tokens of the batch."""

    def loss(z: Tensor, t: Tensor, temperature: float, ce_weight: float, num_items: int) -> Tensor:
        return kd.distillation_loss(
            z, t, "jsd", temperature=temperature, labels=LABELS, ce_weight=ce_weight, num_items=num_items,
            backend=backend,
        )  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student, teacher = logits()
    student.requires_grad_()
    for step in range(4):
        agree(loss, compiled, student, teacher, 4.0 - step / 2, 0.1 * step, 5 + step)


def test_values_are_not_looked_at(backend: str) -> None:
    """A label out of range and a negative weight: their rows become NaN, as on a GPU."""

    def loss(z: Tensor, t: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return kd.distillation_loss(
            z, t, labels=labels, ce_weight=0.5, token_weights=weights, reduction="none", backend=backend
        )

    student, teacher = logits()
    labels, weights = LABELS.clamp(min=0), torch.ones(2, 3)
    expected = loss(student, teacher, labels, weights)
    labels[0, 1], weights[1, 2] = 11, -1.0
    leaf = student.clone().requires_grad_()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, teacher, labels, weights)
    broken = torch.tensor([[False, True, False], [False, False, True]])
    assert torch.equal(found.isnan(), broken)
    assert torch.equal(found[~broken], expected[~broken])
    found.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.isnan().all(-1), broken)
    assert torch.equal(leaf.grad.isnan().any(-1), broken)


def test_under_compiled_autocast(backend: str) -> None:
    side, teacher = linear(6, 8, 11, torch.float32, bias=True), linear(6, 5, 11, torch.float32, seed=2)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return kd.distillation_loss(kd.LinearLogits(hidden, weight), teacher, "jsd", backend=backend)

    leaves = side.hidden.requires_grad_(), side.weight.requires_grad_()
    agree(loss, torch.compile(loss, fullgraph=True, backend="aot_eager"), *leaves)


def test_without_gradient(backend: str) -> None:
    student, teacher = logits()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return kd.distillation_loss(z, t, "jsd", backend=backend)

    with torch.no_grad():
        assert torch.equal(
            torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher), loss(student, teacher)
        )


def dense_arguments(backend: str, dtype: torch.dtype, per_row: bool, grad: bool) -> tuple[Any, ...]:
    student, teacher = pair("ordinary", 4, 11, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.tensor([0.5, 0.0, 1.0, 2.0], dtype=acc)
    labels = torch.tensor([1, 2, 3, 4])
    given = student.requires_grad_(grad), teacher, w, 0.1 * w, labels
    return (*given, "jsd", 0.5, 0.0, 2.0, 9, backend, per_row, grad, True)


def linear_arguments(
    backend: str, dtype: torch.dtype, per_row: bool, need: tuple[bool, bool, bool], form: str
) -> tuple[Any, ...]:
    student, teacher = linear(4, 8, 11, dtype, bias=True), linear(4, 5, 11, dtype, seed=2)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.tensor([0.5, 0.0, 1.0, 2.0], dtype=acc)
    labels = torch.tensor([1, 2, 3, 4])
    assert student.bias is not None
    ours = [x.requires_grad_(n) for x, n in zip((student.hidden, student.weight, student.bias), need, strict=True)]
    if form == "logits/linear":
        ours, need = [student.materialize().detach().requires_grad_(need[0]), None, None], (need[0], False, False)  # type: ignore[list-item]
    theirs = (teacher.materialize(), None, None) if form == "linear/logits" else (teacher.hidden, teacher.weight, None)
    scales = (1.0, 0.0) if form == "logits/linear" else (0.5, 4.0)
    return (
        *ours, *scales, *theirs, 1.0, 0.0, w, 0.1 * w, labels,
        "jsd", 0.5, 0.0, 2.0, 9, 2, backend, per_row, *need, True,
    )  # fmt: skip


@pytest.mark.thin(4)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck_of_dense(backend: str, per_row: bool, dtype: torch.dtype, grad: bool) -> None:
    torch.library.opcheck(torch.ops.kdkernels.dense, dense_arguments(backend, dtype, per_row, grad))


@pytest.mark.thin(4)
@pytest.mark.parametrize("form", ["linear/linear", "linear/logits", "logits/linear"])
@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck_of_linear(backend: str, per_row: bool, need: tuple[bool, bool, bool], form: str) -> None:
    torch.library.opcheck(torch.ops.kdkernels.linear, linear_arguments(backend, torch.float32, per_row, need, form))


def test_operators_on_fake_tensors_have_the_real_shapes(backend: str) -> None:
    """Shapes, dtypes and strides that a compiler plans with are those that come."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        choices = itertools.product((False, True), (False, True))
        every = [(torch.ops.kdkernels.dense, dense_arguments(backend, dtype, *choice)) for choice in choices]
        for form in ("linear/linear", "linear/logits", "logits/linear"):
            for need in ((True, True, True), (False, True, False)):
                every.append((torch.ops.kdkernels.linear, linear_arguments(backend, dtype, False, need, form)))
        for op, arguments in every:
            real = op(*arguments)
            with FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_export(backend: str) -> None:
    """A loss can be exported: only the public operator and plain torch in the graph."""

    class Loss(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return kd.distillation_loss(student, teacher, "jsd", backend=backend)

    student, teacher = logits()
    program = torch.export.export(Loss(), (student, teacher))
    assert any("kdkernels.dense" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(
        program.module()(student, teacher), kd.distillation_loss(student, teacher, "jsd", backend=backend)
    )

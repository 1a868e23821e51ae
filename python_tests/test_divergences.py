"""The contract every registered divergence is held to: it names no divergence, so a new file is tested by being there.

Each runs with its default parameters, at the ends of their ranges and inside: `pytest test_divergences.py -k NAME`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import elements
import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import divergences
from kdkernels.divergences import Divergence, _emit

OURS = [name for name in divergences.names() if divergences.DIVERGENCES[name].__module__.startswith("kdkernels.")]


def values(field: dataclasses.Field) -> list[float]:
    """A parameter's default, the ends of its range (just inside an open end), something in between, and 0 if legal."""
    allowed = field.metadata["range"]
    low = max(allowed.low, -4.0) + (0.02 if allowed.open_low else 0.0)
    high = min(allowed.high, low + 1.5) - (0.02 if allowed.open_high else 0.0)
    return [field.default, low, high, (2 * low + high) / 3, *([0.0] if allowed.or_zero else [])]


def samples(name: str) -> list[Divergence]:
    """One parameter at a time away from its default, then all at once."""
    cls = divergences.DIVERGENCES[name]
    choices = [values(field) for field in dataclasses.fields(cls)]
    defaults = [choice[0] for choice in choices]
    singles = [[*defaults[:i], x, *defaults[i + 1 :]] for i, choice in enumerate(choices) for x in choice]
    return list(dict.fromkeys(cls(*numbers) for numbers in [defaults, *singles, *zip(*choices, strict=False)]))


def label(divergence: Divergence) -> str:
    numbers = (getattr(divergence, field.name) for field in dataclasses.fields(divergence))
    return "-".join([divergence.name, *(f"{number:.4g}" for number in numbers)])


SEPARABLE = [x for name in OURS if divergences.DIVERGENCES[name].separable for x in samples(name)]
each = pytest.mark.parametrize("divergence", SEPARABLE, ids=label)
each_name = pytest.mark.parametrize("name", OURS)


def functions(divergence: Divergence) -> tuple[type[divergences.Elements], float, float]:
    kernel = divergence.kernel()
    return divergences.elements(kernel.name), kernel.a, kernel.b


def log_probs(kind: str, rows: int = 4, vocab: int = 129, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 log-probabilities [rows, vocab] of teacher and student; masked entries are -1e4 as in every backend."""
    generator = torch.Generator().manual_seed(seed)
    zt, zs = torch.randn(2, rows, vocab, dtype=torch.float64, generator=generator) * 3
    mask = torch.rand(2, rows, vocab, generator=generator) < 0.2
    if kind == "near":
        zs = zt + 0.01 * zs
    elif kind == "peaked":
        zt, zs = zt * 30, zs * 30
    elif kind == "flat":
        zt, zs = zt / 30, torch.zeros_like(zs)
    elif kind == "masked":
        zt, zs = (z.masked_fill(m, -math.inf) for z, m in zip((zt, zs), mask, strict=True))
    lp, lq = (z.log_softmax(-1) for z in (zt, zs))
    return torch.where(lp == -math.inf, elements.MASKED, lp), torch.where(lq == -math.inf, elements.MASKED, lq)


def derivative(term, lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    leaf = lq.clone().requires_grad_()
    return torch.autograd.grad(term(lp, leaf, a, b).sum(), leaf)[0]


def natural(lp: Tensor, lq: Tensor, grad: Tensor) -> Tensor:
    """[N, V] the size of the pieces that a row's gradient is summed from."""
    return lp.exp() + lq.exp() + grad.abs() + lq.exp() * grad.sum(-1, keepdim=True).abs()


@each
@pytest.mark.parametrize("kind", ["ordinary", "near", "peaked", "masked"])
def test_grad_is_the_derivative_of_term(divergence, kind):
    """In float64, entry by entry, against autograd."""
    pair, a, b = functions(divergence)
    lp, lq = log_probs(kind)
    expected = derivative(pair.term, lp, lq, a, b)
    error = (pair.grad(lp, lq, a, b) - expected).abs()
    assert float((error / (lp.exp() + lq.exp() + expected.abs() + 1e-3)).max()) < 1e-10


@each
def test_it_vanishes_at_the_teacher(divergence):
    """D(p, p) = 0 with no gradient, in both precisions."""
    pair, a, b = functions(divergence)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        lp = log_probs("ordinary")[0].to(dtype)
        grad = pair.grad(lp, lp, a, b)
        dz = grad - lp.exp() * grad.sum(-1, keepdim=True)
        assert float(pair.term(lp, lp, a, b).sum(-1).abs().max()) < tolerance
        assert float((dz.norm(dim=-1) / natural(lp, lp, grad).norm(dim=-1)).max()) < tolerance


@each
@pytest.mark.parametrize("kind", ["ordinary", "near", "peaked", "flat", "masked"])
def test_it_is_never_negative(divergence, kind):
    """D >= 0, up to rounding: -1e-6 nats in float32, where per-token values are plotted and compared."""
    pair, a, b = functions(divergence)
    for seed, (dtype, tolerance) in itertools.product(range(5), ((torch.float64, 1e-12), (torch.float32, 1e-6))):
        lp, lq = (x.to(dtype) for x in log_probs(kind, seed=seed))
        assert float(pair.term(lp, lq, a, b).sum(-1).min()) > -tolerance


@each
@pytest.mark.parametrize("kind", ["ordinary", "near", "peaked", "masked"])
def test_gradient_sums_to_zero(divergence, kind):
    """Adding a constant to the student's logits changes nothing: sum of dz = 0."""
    pair, a, b = functions(divergence)
    lp, lq = log_probs(kind)
    grad = pair.grad(lp, lq, a, b)
    dz = grad - lq.exp() * grad.sum(-1, keepdim=True)
    assert float((dz.sum(-1).abs() / natural(lp, lq, grad).sum(-1)).max()) < 1e-12


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_entries_are_finite_and_nan_shows(divergence, dtype):
    """-1e4 on either side or both costs something finite; no 0/0, no log 0, also in gradients by autograd."""
    pair, a, b = functions(divergence)
    low, high = elements.MASKED, -0.5
    lp = torch.tensor([low, low, high, -200.0, high, low, -90.0, -3e4], dtype=dtype)
    lq = torch.tensor([low, high, low, high, -200.0, -90.0, low, high], dtype=dtype)
    for result in (pair.term(lp, lq, a, b), pair.grad(lp, lq, a, b), derivative(pair.term, lp, lq, a, b)):
        assert result.isfinite().all()
    assert pair.term(lp, lq, a, b)[0].abs() < 1e-30
    nan, fine = torch.tensor([math.nan, -1.0], dtype=dtype), torch.tensor([-1.0, math.nan], dtype=dtype)
    assert pair.term(nan, fine, a, b).isnan().all()


def assert_float32(actual: tuple[Tensor, Tensor], divergence: Divergence, lp: Tensor, lq: Tensor) -> None:
    """Loss within 1e-6 max(1 nat, D), gradient within 1e-6 of its natural scale, of float64 on the same numbers."""
    pair, a, b = functions(divergence)
    term, grad = actual
    lp64, lq64 = lp.double(), lq.double()
    loss, grad64 = pair.term(lp64, lq64, a, b).sum(-1), pair.grad(lp64, lq64, a, b)
    assert float(((term.sum(-1) - loss) / loss.clamp(min=1)).abs().max()) < 1e-6
    error = grad - lq.exp() * grad.sum(-1, keepdim=True) - (grad64 - lq64.exp() * grad64.sum(-1, keepdim=True))
    assert float((error.norm(dim=-1) / natural(lp64, lq64, grad64).norm(dim=-1)).max()) < 1e-6


def mixed_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pairs = [log_probs(kind, rows=2) for kind in ("ordinary", "near", "masked", "peaked", "flat")]
    lp, lq = (torch.cat(x).to(dtype) for x in zip(*pairs, strict=True))
    return lp, lq


@each
def test_float32_is_exact_to_a_millionth(divergence):
    pair, a, b = functions(divergence)
    lp, lq = mixed_rows(torch.float32)
    assert_float32((pair.term(lp, lq, a, b), pair.grad(lp, lq, a, b)), divergence, lp, lq)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return elements.compile_cpp(tmp_path_factory.mktemp("cpp"))


@each
def test_cpp_text_is_the_same_function(divergence, library):
    """To the last bit in double, operation by operation; in float as exact as torch."""
    pair, a, b = functions(divergence)
    lp, lq = mixed_rows(torch.float64)
    for function, printed in zip(
        (pair.term, pair.grad), elements.run_cpp(library, divergence.kernel(), lp, lq), strict=True
    ):
        scalar = elements.as_scalar(function)
        values = [scalar(x, y, a, b) for x, y in zip(lp.flatten().tolist(), lq.flatten().tolist(), strict=True)]
        assert printed.flatten().tolist() == values
        error = printed.sum(-1) - function(lp, lq, a, b).sum(-1)
        assert float((error.abs() / (1 + printed.abs().sum(-1))).max()) < 1e-13
    lp, lq = mixed_rows(torch.float32)
    assert_float32(elements.run_cpp(library, divergence.kernel(), lp, lq), divergence, lp, lq)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton")
    kernels, rows = [divergence.kernel() for divergence in SEPARABLE], mixed_rows(torch.float32)
    results = elements.run_interpreted(tmp_path_factory.mktemp("triton"), kernels, *rows)
    return dict(zip(map(label, SEPARABLE), results, strict=True))


@each
def test_triton_interpreter_computes_the_same_function(divergence, interpreted):
    assert_float32(interpreted[label(divergence)], divergence, *mixed_rows(torch.float32))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
@each_name
def test_triton_compiles_without_a_gpu(name, capability):
    pytest.importorskip("triton")
    for kernel in {divergence.kernel()._replace(a=0.0, b=0.0) for divergence in SEPARABLE if divergence.name == name}:
        asm = elements.compile_triton(kernel, capability)
        assert f"sm_{capability}" in asm["ptx"]
        assert len(asm["cubin"]) > 1000


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_backend(divergence, dtype, backend):
    """kd.distillation_loss on every backend that was built, against autograd of `term` in float64."""
    pair, a, b = functions(divergence)
    generator = torch.Generator().manual_seed(3)
    zs, zt = torch.randn(2, 5, 301, generator=generator, dtype=torch.float64).to(dtype) * 3
    zs[1, ::5], zt[1, 1::5], zs[2] = -math.inf, -math.inf, zt[2] + 0.1 * zs[2]
    student = zs.clone().requires_grad_()
    loss = kd.distillation_loss(student, zt, divergence, temperature=1.7, reduction="none", backend=backend)
    loss.sum().backward()
    loss = loss.detach()
    lp, lq = ((z.double() / 1.7).log_softmax(-1) for z in (zt, zs))
    lp, lq = (torch.where(x == -math.inf, elements.MASKED, x) for x in (lp, lq))
    expected, grad = pair.term(lp, lq, a, b).sum(-1), derivative(pair.term, lp, lq, a, b)
    dz = (grad - lq.exp() * grad.sum(-1, keepdim=True)) / 1.7
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert float(((loss - expected) / expected.clamp(min=1)).abs().max()) < tolerance
    error = (student.grad - dz).norm(dim=-1) / (natural(lp, lq, grad) / 1.7).norm(dim=-1)
    assert float(error.max()) < tolerance


@each_name
def test_kernel_and_names(name, library):
    assert divergences.get(name).name == name
    for divergence in samples(name):
        kernel = divergence.kernel()
        assert divergences.get(divergence) is divergence
        assert all(type(number) is float for number in (kernel.a, kernel.b))
        if divergence.separable:
            digest = getattr(library, f"{kernel.name}_digest")
            digest.restype = elements.ctypes.c_char_p
            assert digest().decode() == _emit.digests()[kernel.name]
            assert getattr(library, f"{kernel.name}_id")() == sorted(_emit.digests()).index(kernel.name)
    with pytest.raises(ValueError, match=f"did you mean '?{name}"):
        divergences.get(name + "x")


@each_name
def test_parameters_out_of_range_are_refused(name):
    cls = divergences.DIVERGENCES[name]
    for field in dataclasses.fields(cls):
        allowed = field.metadata["range"]
        outside = [math.nan, math.inf, -math.inf]
        outside += [allowed.low] if allowed.open_low else [allowed.low - 0.01]
        outside += [allowed.high] if allowed.open_high else [allowed.high + 0.01]
        for value in outside:
            with pytest.raises(ValueError, match=rf"{field.name} is {value}; allowed: .*{field.name}"):
                cls(**{field.name: value})
        for value in ("0.5", None, True, torch.tensor(0.5)):
            with pytest.raises(TypeError, match=rf"{field.name} must be a number"):
                cls(**{field.name: value})
    assert len(dataclasses.fields(cls)) <= 2
    assert cls.__doc__

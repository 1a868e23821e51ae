"""The golden values are checked too: published vectors, 50 digits, finite differences, the element functions."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import golden
import mpmath
import pytest
import torch

from kdkernels import divergences

P, Q = (0.7, 0.2, 0.1), (0.2, 0.3, 0.5)
VECTORS = [
    ("forward_kl", 0.0, 0.0, 0.634897),
    ("reverse_kl", 0.0, 0.0, 0.675806),
    ("jsd", 0.5, 0.0, 0.151358),
    ("jsd", 0.1, 0.0, 0.055891),
    ("jsd", 0.9, 0.0, 0.058399),
    ("skew_kl", 0.1, 0.0, 0.493815),
    ("skew_reverse_kl", 0.1, 0.0, 0.507754),
    ("alpha_beta", 0.2, 0.7, 0.727508),
    ("alpha_beta", 0.5, 0.5, 0.629114),
    ("adaptive_kl", 0.5, 0.0, 0.655352),
    ("total_variation", 0.0, 0.0, 0.5),
]
LIMITS = [
    ("jsd", 0.0, 0.0),
    ("jsd", 1.0, 0.0),
    ("skew_kl", 0.0, 0.0),
    ("skew_reverse_kl", 0.0, 0.0),
    ("skew_kl", 0.95, 0.0),
    ("skew_reverse_kl", 0.95, 0.0),
    ("alpha_beta", 0.3, 0.0),
    ("alpha_beta", 0.0, 0.3),
    ("alpha_beta", 0.0, 0.0),
    ("alpha_beta", 1.0, 0.0),
    ("alpha_beta", 0.0, 1.0),
    ("alpha_beta", 1.0, 1.0),
    ("alpha_beta", 0.05, 0.05),
    ("alpha_beta", 0.05, 3.0),
]
CASES = [(name, a, b) for name, a, b, _ in VECTORS] + LIMITS


def as_object(name: str, a: float, b: float) -> divergences.Divergence:
    cls = type(divergences.get(name))
    return cls(*(a, b)[: len(dataclasses.fields(cls))])


def random_rows(rows: int = 6, vocab: int = 301, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher logits: independent, alike, peaked."""
    generator = torch.Generator().manual_seed(seed)
    zs, zt = torch.randn(2, rows, vocab, dtype=torch.float64, generator=generator) * 2
    zs[1] = zt[1] + 0.1 * zs[1]
    zs[2:3], zt[2:3] = zs[2:3] * 20, zt[2:3] * 20
    return zs, zt


def element_row(name: str, a: float, b: float, lp: torch.Tensor, lq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """D [N] and its gradient [N, V] with respect to the logits, from the element functions."""
    kernel = as_object(name, a, b).kernel()
    elements = divergences.elements(kernel.name)
    grad = elements.grad(lp, lq, kernel.a, kernel.b)
    return elements.term(lp, lq, kernel.a, kernel.b).sum(-1), grad - lq.exp() * grad.sum(-1, keepdim=True)


@pytest.mark.parametrize(("name", "a", "b", "expected"), VECTORS)
def test_published_vectors(name, a, b, expected):
    lp, lq = (torch.tensor([x], dtype=torch.float64).log() for x in (P, Q))
    assert golden.distill(lq, lp, name, a, b).loss.item() == pytest.approx(expected, abs=5.1e-7)
    if divergences.get(name).separable:
        assert element_row(name, a, b, lp, lq)[0].item() == pytest.approx(expected, abs=5.1e-7)


@pytest.mark.parametrize(("name", "a", "b"), [case for case in CASES if case[0] != "adaptive_kl"])
def test_two_witnesses_agree(name, a, b):
    """Loss and gradient of the textbook formula against those of the element functions, both in float64."""
    zs, zt = random_rows()
    expected = golden.distill(zs, zt, name, a, b)
    value, dz = element_row(name, a, b, zt.log_softmax(-1), zs.log_softmax(-1))
    assert golden.loss_error(value, expected.loss) < 1e-13
    assert golden.gradient_error(dz, expected.grad, expected.scale) < 1e-13


def exact(name: str, a: float, b: float, zs: list[float], zt: list[float]) -> mpmath.mpf:
    """The formulas of spec/divergences once more, in 50 digits."""
    x = [[mpmath.e ** mpmath.mpf(z) for z in row] for row in (zt, zs)]
    p, q = ([u / mpmath.fsum(row) for u in row] for row in x)
    a, b = mpmath.mpf(a), mpmath.mpf(b)

    def kl(u, v):
        return mpmath.fsum(s * mpmath.log(s / t) for s, t in zip(u, v, strict=True))

    def mix(w, u, v):
        return [w * s + (1 - w) * t for s, t in zip(u, v, strict=True)]

    def alpha_beta(s, t):
        if a and b:
            return -(s**a * t**b - a / (a + b) * s ** (a + b) - b / (a + b) * t ** (a + b)) / (a * b)
        if not a and not b:
            return (mpmath.log(s) - mpmath.log(t)) ** 2 / 2
        u, v, c = (s, t, a) if a else (t, s, b)
        return (u**c * mpmath.log(u**c / v**c) - u**c + v**c) / c**2

    if name == "jsd":
        m = mix(a, p, q)
        return kl(p, q) if a == 0 else kl(q, p) if a == 1 else a * kl(p, m) + (1 - a) * kl(q, m)
    if name == "adaptive_kl":
        head, mass = set(), mpmath.mpf(0)
        for v in sorted(range(len(p)), key=lambda v: (-p[v], v)):
            if mass < a:
                head.add(v)
            mass += p[v]
        near, far = (
            mpmath.fsum(abs(p[v] - q[v]) for v in range(len(p)) if (v in head) is inside) for inside in (True, False)
        )
        return (near * kl(p, q) + far * kl(q, p)) / (near + far)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_kl": lambda: kl(p, mix(a, p, q)),
        "skew_reverse_kl": lambda: kl(q, mix(a, q, p)),
        "total_variation": lambda: mpmath.fsum(abs(s - t) for s, t in zip(p, q, strict=True)) / 2,
        "alpha_beta": lambda: mpmath.fsum(alpha_beta(s, t) for s, t in zip(p, q, strict=True)),
    }[name]()


@pytest.mark.parametrize(("name", "a", "b"), CASES)
def test_values_in_fifty_digits(name, a, b):
    zs, zt = random_rows(rows=3, vocab=17)
    with mpmath.workdps(50):
        expected = torch.tensor(
            [float(exact(name, a, b, s, t)) for s, t in zip(zs.tolist(), zt.tolist(), strict=True)], dtype=torch.float64
        )
    assert golden.loss_error(golden.distill(zs, zt, name, a, b).loss, expected) < 2e-13


@pytest.mark.parametrize(("name", "a", "b"), CASES)
def test_gradient_is_that_of_the_loss(name, a, b):
    """Central differences through everything: temperature, transform, cross-entropy, weights. adaptive_kl's weights are
    constants in its gradient, so there only the cross-entropy part is differenced."""
    zs, zt = (x[:1].expand(7, 7) for x in random_rows(vocab=7))
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    w_kd, labels = 0.0 if name == "adaptive_kl" else 0.7, torch.full((7,), 3)

    def run(x):
        side = golden.Side(x, bias=bias, scale=0.8, softcap=5.0)
        return golden.distill(side, zt, name, a, b, temperature=1.7, w_kd=w_kd, w_ce=0.4, labels=labels)

    step = 1e-5 * torch.eye(7, dtype=torch.float64)  # row v moves logit v
    slopes = (run(zs + step).loss - run(zs - step).loss) / 2e-5
    assert run(zs).grad[0].tolist() == pytest.approx(slopes.tolist(), abs=1e-8, rel=1e-6)


def test_adaptive_kl_gradient_is_the_weighted_sum():
    zs, zt = random_rows()
    forward, reverse = (golden.distill(zs, zt, name) for name in ("forward_kl", "reverse_kl"))
    both = golden.distill(zs, zt, "adaptive_kl", 0.5)
    w = (both.loss - reverse.loss) / (forward.loss - reverse.loss)
    mixed = w[:, None] * forward.grad + (1 - w)[:, None] * reverse.grad
    assert golden.gradient_error(both.grad, mixed, both.scale) < 1e-12
    same = golden.distill(zt, zt, "adaptive_kl", 0.5)
    assert same.loss.abs().max() == 0
    assert same.grad.abs().max() == 0


def test_adaptive_kl_head_takes_equal_probabilities_by_lower_id():
    """p = (1/4, 1/4, 1/4, 1/4), mu = 1/2: the head is {0, 1}."""
    zt = torch.zeros(1, 4, dtype=torch.float64)
    zs = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64).log()
    gap = [0.15, 0.15, 0.05, 0.05]
    forward, reverse = (golden.distill(zs, zt, name).loss.item() for name in ("forward_kl", "reverse_kl"))
    expected = ((gap[0] + gap[1]) * forward + (gap[2] + gap[3]) * reverse) / sum(gap)
    assert golden.distill(zs, zt, "adaptive_kl", 0.5).loss.item() == pytest.approx(expected, rel=1e-12)


def test_linear_form_is_autograd_through_the_head():
    generator = torch.Generator().manual_seed(1)
    h, W, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((4, 5), (9, 5), (9,)))
    zt = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    leaves = [x.clone().requires_grad_() for x in (h, W, b)]
    z = 3 * torch.tanh(0.5 * (leaves[0] @ leaves[1].T + leaves[2]) / 3)
    lp, lq, labels = (zt / 2).log_softmax(-1), (z / 2).log_softmax(-1), torch.tensor([1, 8, 0, 4])
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    w_kd, w_ce = torch.tensor([1.0, 2.0, 0.0, 0.5]).double(), torch.tensor([0.1, 0.0, 0.0, 0.3]).double()
    loss = w_kd * (lp.exp() * (lp - lq)).sum(-1) + w_ce * ce
    grads = torch.autograd.grad(loss.sum(), leaves)
    side = golden.Side(h, W, b, scale=0.5, softcap=3.0)
    result = golden.distill(side, zt, "forward_kl", temperature=2.0, w_kd=w_kd, w_ce=w_ce, labels=labels)
    assert golden.loss_error(result.loss, loss) < 1e-14
    for actual, expected in zip(grads, (result.hidden, result.weight, result.bias), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert golden.gradient_error(grads[1], result.weight, result.weight_scale) < 1e-14
    assert golden.gradient_error(grads[2][None], result.bias[None], result.bias_scale[None]) < 1e-14


def test_masked_logits():
    """A -inf entry is the limit of a low finite logit: same gradient, and it costs 1e4 per unit of mass it meets."""
    zs, zt = random_rows(rows=2, vocab=5)
    masked, low = zs.clone(), zs.clone()
    masked[0, 2] = -torch.inf
    low[0, 2] = masked[0].logsumexp(-1) - 1e4
    for name, a, b in CASES:
        finite, infinite = (golden.distill(z, zt, name, a, b) for z in (low, masked))
        assert golden.loss_error(infinite.loss, finite.loss) < 1e-9
        assert golden.gradient_error(infinite.grad, finite.grad, finite.scale) < 1e-9
    p = zt[0].softmax(-1)
    cost = golden.distill(masked, zt).loss[0] - 1e4 * p[2]
    assert abs(cost) < 20
    both = zt.clone()
    both[0, 2] = -torch.inf
    assert golden.distill(masked, both).loss.max() < 20


def test_rows_that_are_not_numbers():
    zs, zt = random_rows(rows=6, vocab=5)
    zs[0, 1], zt[1, 1], zs[2, 0] = math.nan, math.inf, math.inf
    zt[3] = -math.inf
    zs[5] = math.nan
    w = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    result = golden.distill(zs, zt, "jsd", 0.5, w_kd=w)
    assert result.loss.isnan().tolist() == [True] * 4 + [False] * 2
    assert result.grad.isnan().any(-1).tolist() == [True] * 4 + [False] * 2
    assert result.stats[5].tolist() == [0.0] * 6
    assert result.grad[5].tolist() == [0.0] * 5
    labels = torch.tensor([0, 0, 0, 0, 5, 0])
    assert golden.distill(zs, zt, w_kd=w, w_ce=w, labels=labels).loss.isnan().tolist() == [True] * 5 + [False]


def test_statistics_and_padding():
    zt = torch.tensor([[1.0, 2.0, 2.0, 9.0]])
    zs = torch.tensor([[0.0, 3.0, 3.0, -5.0]])
    labels = torch.tensor([1])
    result = golden.distill(zs, zt, temperature=2.0, labels=labels, vocab=3)
    p, q = (zt[:, :3].double() / 2).softmax(-1), (zs[:, :3].double() / 2).softmax(-1)
    nll = torch.nn.functional.cross_entropy(zs[:, :3].double(), labels).item()
    entropies = [-(x * x.log()).sum().item() for x in (p, q)]
    kl = (p * (p / q).log()).sum().item()
    assert result.stats[0].tolist() == pytest.approx([kl, *entropies, 1.0, nll, 1.0])
    assert result.grad.shape == (1, 4)
    assert result.grad[0, 3] == 0
    other = golden.distill(zs, zt, labels=torch.tensor([2]))
    assert other.stats[0, [3, 5]].tolist() == [
        0.0,
        0.0,
    ]  # the teacher's best is 3 now; of tied entries the first counts
    assert golden.distill(zs, zt).stats[0, 4:].tolist() == [0.0, 0.0]


def test_errors_notice_what_they_should():
    zs, zt = random_rows(rows=2, vocab=9)
    result = golden.distill(zs, zt, w_kd=torch.tensor([1.0, 0.0]))
    assert golden.gradient_error(result.grad, result.grad, result.scale) == 0
    assert golden.gradient_error(torch.zeros_like(zs), result.grad, result.scale) > 0.1
    assert golden.gradient_error(result.grad + 1e-9, result.grad, result.scale) == math.inf  # the second row must be 0
    poisoned = result.grad.clone()
    poisoned[0, 0] = math.nan
    assert golden.gradient_error(poisoned, result.grad, result.scale) == math.inf
    assert golden.gradient_error(result.grad, poisoned, result.scale) == math.inf
    assert golden.loss_error(result.loss + 1e-6, result.loss) == pytest.approx(1e-6, rel=0.7)
    assert golden.loss_error(torch.empty(0), torch.empty(0)) == 0


def test_golden_imports_nothing_of_the_package():
    tree = ast.parse((Path(__file__).parent / "golden.py").read_text())
    roots = {alias.name.split(".")[0] for x in ast.walk(tree) if isinstance(x, ast.Import) for alias in x.names}
    roots |= {x.module.split(".")[0] for x in ast.walk(tree) if isinstance(x, ast.ImportFrom) and x.module}
    assert roots == {"__future__", "math", "typing", "torch"}

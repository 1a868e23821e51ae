"""Golden values: the textbook formulas in float64, gradients by autograd. Imports torch only, never kdkernels.

Every formula is written as a paper writes it (`kl_div`, `logaddexp`), on purpose unlike the element functions.

    expected = golden.distill(zs, zt, "jsd", a=0.5, temperature=2.0, w_kd=w, w_ce=0.1 * w, labels=labels)
    assert golden.loss_error(loss, expected.loss) < 1e-6
    assert golden.gradient_error(dlogits, expected.grad, expected.scale) < 1e-6

A side is a tensor of logits [N, V] or a `Side`: logits, or hidden states with a weight [V, H], and their transform.
Names: N tokens, V vocabulary, H hidden, T temperature, lq lp log-probabilities of student and teacher.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

NAMES = (
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "adaptive_kl",
)  # fmt: skip
"""The divergences that have a textbook formula here."""

MASKED = -1e4
"""Log-probability of a masked entry: -inf, or hopeless."""

HOPELESS = -1e20
"""Log-probabilities below come from masks too, written as finfo.min; a cost of 1e38 nats says nothing more."""


class Side(NamedTuple):
    """`x` [N, V] logits, or [N, H] with `weight` [V, H]; z = scale * (x + bias), then softcap * tanh(z / softcap)."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None


class Golden(NamedTuple):
    """Float64 throughout. A row's gradient is that of its own loss; those of weight and bias are of the rows' sum."""

    loss: Tensor
    """[N] w_kd D + w_ce CE"""
    grad: Tensor
    """[N, V] d loss / d stored logits (before bias, scale and soft-cap); 0 in the columns from `vocab` on"""
    scale: Tensor
    """[N] natural scale of the rows of `grad`"""
    stats: Tensor
    """[N, 6] divergence, teacher and student entropy (nats, at T), top-1 agreement, nll, student correct"""
    hidden: Tensor | None = None
    """[N, H] with `hidden_scale` [N]; this and the next two for a student given as hidden states only"""
    weight: Tensor | None = None
    """[V, H] with `weight_scale` [V]"""
    bias: Tensor | None = None
    """[V] with `bias_scale` []"""
    hidden_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    bias_scale: Tensor | None = None


def distill(
    student: Tensor | Side,
    teacher: Tensor | Side,
    divergence: str = "forward_kl",
    a: float = 0.0,
    b: float = 0.0,
    temperature: float = 1.0,
    w_kd: Tensor | float = 1.0,
    w_ce: Tensor | float = 0.0,
    labels: Tensor | None = None,
    vocab: int | None = None,
) -> Golden:
    """Loss, gradient, its natural scale and the statistics of every row.

    `a`, `b` are the divergence's parameters in order: jsd(beta), skew_kl(alpha), skew_reverse_kl(alpha),
    alpha_beta(alpha, beta), adaptive_kl(mu). Weights are numbers or [N]. Rows with both weights 0 are not read and give
    zeros; other rows that hold NaN or +inf, nothing but -inf, or (w_ce not 0) a label outside [0, vocab) give NaN.
    """
    student, teacher = _side(student), _side(teacher)
    rows = student.x.shape[0]
    kd, ce = _weight(w_kd, rows), _weight(w_ce, rows)
    counts = (kd != 0) | (ce != 0)
    xs, xt = _stored(student, counts), _stored(teacher, counts)
    columns, vocab = xs.shape[1], xs.shape[1] if vocab is None else vocab
    zs, chain = _to_logits(student, xs[:, :vocab])
    zt, _ = _to_logits(teacher, xt[:, :vocab])
    bad = ~torch.isfinite(zs.amax(-1)) | ~torch.isfinite(zt.amax(-1))
    label, labelled = _labels(labels, rows, vocab)
    bad |= (ce != 0) & ~labelled
    zs, zt = torch.where(bad[:, None], 0.0, zs), torch.where(bad[:, None], 0.0, zt)

    lp = _log_probs(zt / temperature)[0].detach()
    lq, leaf = _log_probs(zs / temperature)
    value = _divergence(divergence, lp, lq, a, b)
    (dz,) = torch.autograd.grad(value.sum(), leaf)
    lq1, leaf1 = _log_probs(zs)
    nll = torch.where(labelled, -lq1.gather(-1, label[:, None])[:, 0], 0.0)
    (dz1,) = torch.autograd.grad(nll.sum(), leaf1)

    nan = torch.where(bad, torch.nan, 0.0)[:, None]
    grad = (kd[:, None] * dz / temperature + ce[:, None] * dz1) * chain + nan
    loss = kd * value.detach() + ce * nll.detach() + nan[:, 0]
    natural = natural_scale(divergence, lp, lq.detach(), a, b, temperature, kd, ce, lq1.detach(), label)
    natural = natural * chain.abs()
    stats = _statistics(zs, zt, lp, lq.detach(), value.detach(), nll.detach(), label, labelled)
    stats = torch.where(counts[:, None], stats + nan, 0.0)
    grad = torch.nn.functional.pad(torch.where(counts[:, None], grad, 0.0), (0, columns - vocab))
    loss = torch.where(counts, loss, 0.0)
    natural = torch.nn.functional.pad(torch.where(counts[:, None], natural, 0.0), (0, columns - vocab))
    result = Golden(loss, grad, natural.norm(dim=-1), stats)
    return result if student.weight is None else _through_the_head(result, natural, student, counts)


def natural_scale(
    divergence: str,
    lp: Tensor,
    lq: Tensor,
    a: float,
    b: float,
    temperature: float,
    w_kd: Tensor,
    w_ce: Tensor,
    lq1: Tensor,
    label: Tensor,
) -> Tensor:
    """[N, V] w_kd (p + q + |grad| + q |sum grad|) / T + w_ce (softmax(z) + onehot), grad = d term / d lq.

    The norm of a row is what its gradient's rounding errors are measured against: they come from pieces of this size.
    """
    leaf = lq.clone().requires_grad_()
    (grad,) = torch.autograd.grad(_divergence(divergence, lp, leaf, a, b).sum(), leaf)
    p, q = lp.exp(), lq.exp()
    kd = p + q + grad.abs() + q * grad.sum(-1, keepdim=True).abs()
    onehot = torch.zeros_like(q).scatter_(-1, label[:, None], 1.0)
    return w_kd.abs()[:, None] * kd / temperature + w_ce.abs()[:, None] * (lq1.exp() + onehot)


def gradient_error(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The worst row's ||actual - expected|| / scale. Rows expected NaN must be all NaN, rows of scale 0 exact."""
    return _worst(actual, expected, scale)


def loss_error(actual: Tensor, expected: Tensor) -> float:
    """The worst |actual - expected| / max(1, |expected|); NaN where, and only where, NaN is expected."""
    return _worst(actual.reshape(-1, 1), expected.reshape(-1, 1), expected.detach().reshape(-1).abs().clamp(min=1.0))


def _worst(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach()
    if actual.numel() == 0:
        return 0.0
    if not torch.equal(actual.isnan(), expected.isnan()):
        return math.inf
    size = (actual - expected).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).norm(dim=-1)
    ratio = torch.where(size == 0, 0.0, size / scale)
    return float(torch.where(expected.isnan().any(-1), 0.0, ratio).max())


def _side(side: Tensor | Side) -> Side:
    return side if isinstance(side, Side) else Side(side)


def _weight(weight: Tensor | float, rows: int) -> Tensor:
    return torch.as_tensor(weight, dtype=torch.float64).expand(rows).clone()


def _stored(side: Side, counts: Tensor) -> Tensor:
    """[N, V] what is stored, or would be: rows that do not count are 0, whatever they hold."""
    x = torch.where(counts[:, None], side.x.detach().double(), 0.0)
    return x if side.weight is None else x @ side.weight.detach().double().T


def _to_logits(side: Side, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits z and dz/dx, both [N, V]."""
    z, chain = x, torch.ones_like(x)
    if side.bias is not None:
        z = z + side.bias.detach().double()[: x.shape[1]]
    if side.scale is not None:
        z, chain = z * side.scale, chain * side.scale
    if side.softcap:
        z = side.softcap * torch.tanh(z / side.softcap)
        chain = chain * (1 - (z / side.softcap) ** 2)
    return z, chain


def _log_probs(z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax, and the leaf to differentiate by. A masked logit becomes the one whose log-probability is -1e4."""
    lse = z.logsumexp(-1, keepdim=True)
    leaf = torch.where(z - lse < HOPELESS, lse + MASKED, z).requires_grad_()
    return leaf.log_softmax(-1), leaf


def _labels(labels: Tensor | None, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    if labels is None:
        return torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
    legal = (labels >= 0) & (labels < vocab)
    return torch.where(legal, labels, 0), legal


def _divergence(name: str, lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """[N] from log-probabilities; gradients flow into lq."""
    lp = lp.detach()
    if name in ("jsd", "skew_kl", "skew_reverse_kl"):
        return _mixed(name, lp, lq, a)
    if name == "alpha_beta":
        return _alpha_beta(lp, lq, a, b).sum(-1)
    if name == "adaptive_kl":
        return _adaptive_kl(lp, lq, a)
    if name == "total_variation":
        return (lp.exp() - lq.exp()).abs().sum(-1) / 2
    return {"forward_kl": lambda: _kl(lp, lq), "reverse_kl": lambda: _kl(lq, lp)}[name]()


def _kl(lx: Tensor, ly: Tensor) -> Tensor:
    """KL(x || y) of log-probabilities."""
    return kl_div(ly, lx, reduction="none", log_target=True).sum(-1)


def _mixture(weight: float, lx: Tensor, ly: Tensor) -> Tensor:
    """log(weight x + (1 - weight) y)."""
    return torch.logaddexp(lx + math.log(weight), ly + math.log1p(-weight))


def _mixed(name: str, lp: Tensor, lq: Tensor, a: float) -> Tensor:
    if a == 0 or (name == "jsd" and a == 1):  # TRL's convention for the JSD, limits for the others
        return _kl(lp, lq) if (name == "skew_kl" or (name, a) == ("jsd", 0)) else _kl(lq, lp)
    if name == "skew_kl":
        return _kl(lp, _mixture(a, lp, lq))
    if name == "skew_reverse_kl":
        return _kl(lq, _mixture(a, lq, lp))
    m = _mixture(a, lp, lq)
    return a * _kl(lp, m) + (1 - a) * _kl(lq, m)


def _alpha_beta(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """[N, V], the limits of ABKD (arXiv 2505.04560) where a or b is 0."""

    def power(l: Tensor, x: float) -> Tensor:
        return (x * l).exp()  # not q**x, whose autograd divides by q: it may be 0

    if a == 0 and b == 0:
        return (lp - lq) ** 2 / 2
    if b == 0:
        return (power(lp, a) * (a * lp - a * lq) - power(lp, a) + power(lq, a)) / a**2
    if a == 0:
        return (power(lq, b) * (b * lq - b * lp) - power(lq, b) + power(lp, b)) / b**2
    s = a + b
    return -((a * lp + b * lq).exp() - a / s * power(lp, s) - b / s * power(lq, s)) / (a * b)


def _adaptive_kl(lp: Tensor, lq: Tensor, mu: float) -> Tensor:
    p, q = lp.exp(), lq.detach().exp()
    order = torch.argsort(p, dim=-1, descending=True, stable=True)
    ranked = p.gather(-1, order)
    before = ranked.cumsum(-1) - ranked  # mass of the more probable tokens: the head takes tokens until it has mu
    head = torch.zeros_like(p).scatter(-1, order, (before < mu).double())
    gap = (p - q).abs()
    g_head, g_tail = (gap * head).sum(-1), (gap * (1 - head)).sum(-1)
    total = torch.where(g_head + g_tail == 0, 1.0, g_head + g_tail)
    return (g_head * _kl(lp, lq) + g_tail * _kl(lq, lp)) / total


def _statistics(
    zs: Tensor, zt: Tensor, lp: Tensor, lq: Tensor, value: Tensor, nll: Tensor, label: Tensor, labelled: Tensor
) -> Tensor:
    best, teachers = _first_best(zs), _first_best(zt)
    correct = labelled & (best == label)
    entropies = [-(x.exp() * x).sum(-1) for x in (lp.detach(), lq)]
    return torch.stack([value, *entropies, (best == teachers).double(), nll, correct.double()], -1)


def _first_best(z: Tensor) -> Tensor:
    """The lowest index among the largest entries of a row."""
    index = torch.arange(z.shape[-1]).expand_as(z)
    return torch.where(z == z.amax(-1, keepdim=True), index, z.shape[-1]).amin(-1)


def _through_the_head(result: Golden, natural: Tensor, student: Side, counts: Tensor) -> Golden:
    """Gradients of hidden states, weight and bias: the two GEMMs, and the same with absolute values for the scales."""
    assert student.weight is not None
    weight = student.weight.detach().double()
    hidden = torch.where(counts[:, None], student.x.detach().double(), 0.0)
    return result._replace(
        hidden=result.grad @ weight,
        weight=result.grad.T @ hidden,
        bias=None if student.bias is None else result.grad.sum(0),
        hidden_scale=(natural @ weight.abs()).norm(dim=-1),
        weight_scale=(natural.T @ hidden.abs()).norm(dim=-1),
        bias_scale=natural.sum(0).norm(),
    )

"""`kdkernels.compress`: nucleus, draws, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compress_oracle import apart, golden

import kdkernels as kd
from kdkernels.eager_topk import ROW_BYTES

pytestmark = pytest.mark.sample(3)


def logits(n: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(n + vocab))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_nucleus(backend: str, p: float) -> None:
    z, k = logits(6, 900), 60
    z[5] = 0.0  # ties: lower ids first
    found = kd.compress(z, k, top_p=p, entropy=True, other_temperatures=[2.0], backend=backend)
    log_p = torch.log_softmax(z.double(), -1)
    for i in range(6):
        values, order = log_p[i].sort(dim=-1, descending=True, stable=True)
        enough = (values.exp().cumsum(-1) >= p * (1 - 1e-12)).nonzero()
        count = min(k, int(enough[0, 0]) + 1 if len(enough) else k)
        ids = order[:count].sort().values
        assert found.ids[i, :count].tolist() == ids.tolist()
        assert (found.ids[i, count:] == -1).all()
        assert apart(found.log_probs[i, :count], log_p[i, ids]) < 1e-6
        assert (found.log_probs[i, count:] == -torch.inf).all()
        rest = torch.ones(900, dtype=torch.bool)
        rest[ids] = False
        assert apart(found.log_tail[i], torch.logsumexp(log_p[i, rest], -1)) < 1e-6
        hot = torch.log_softmax(z[i].double() / 2.0, -1)
        assert apart(found.other_tails[2.0][i], torch.logsumexp(hot[rest], -1)) < 2e-6
    assert found.ids.shape == (6, k)
    assert apart(found.entropy, golden(z, k).entropy) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 129, 1024, 5003])
def test_every_draw_is_the_inverse_of_the_cumulative_mass(backend: str, dtype: torch.dtype, vocab: int) -> None:
    z = logits(3, vocab).to(dtype)
    if vocab > 100:
        z[1, ::2] = -torch.inf
        z[2, : vocab // 2] = -torch.inf
    uniforms = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[:, :4] = torch.tensor([0.0, 1 - 2.0**-53, -0.5, 1.0], dtype=torch.float64)
    ids = torch.ops.kdkernels.draw(z, None, None, 1.0, 0.0, 1.7, vocab, 3, backend, uniforms).long()
    assert (ids[:, 2:4] == -1).all()
    mass = torch.softmax(z.double() / 1.7, -1)
    drawn = torch.cat((ids[:, :2], ids[:, 4:]), -1)
    assert (mass.gather(-1, drawn) > 0).all()
    upper = mass.cumsum(-1).gather(-1, drawn)
    u = torch.cat((uniforms[:, :2], uniforms[:, 4:]), -1)
    slack = 1e-6  # of float32 exponentials
    assert (u <= upper + slack).all()
    assert (u >= upper - mass.gather(-1, drawn) - slack).all()


def test_draws(backend: str) -> None:
    z = logits(2, 40, 1.0).reshape(2, 1, 40)
    generator = torch.Generator().manual_seed(7)
    n = 40000
    found = kd.compress(z, samples=n, temperature=1.5, generator=generator, entropy=True, backend=backend)
    assert found.kind == "sampled"
    assert (found.log_tail == -torch.inf).all()
    p = torch.softmax(z.double() / 1.5, -1)
    frequency = found.to_dense().exp().double()
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()  # unbiased: five standard errors
    assert apart(frequency.sum(-1), torch.ones(2, 1)) < 1e-6
    assert apart(found.entropy, -(p * p.log()).sum(-1)) < 1e-6  # type: ignore[arg-type]


def test_draws_follow_the_generator(backend: str) -> None:
    z = logits(5, 3000)

    def drawn(seed: int) -> kd.SparseLogits:
        return kd.compress(z, samples=24, generator=torch.Generator().manual_seed(seed), backend=backend)

    once, again, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(once.ids, again.ids)
    assert torch.equal(once.log_probs, again.log_probs)
    assert once.ids.shape != other.ids.shape or not torch.equal(once.ids, other.ids)
    kept = once.ids >= 0
    assert once.ids.shape[1] == int(kept.sum(-1).max())  # the most different entries of any row
    assert ((once.ids[:, 1:] > once.ids[:, :-1]) | ~kept[:, 1:]).all()
    counts = once.log_probs.exp() * 24
    assert apart(counts, counts.round()) < 1e-5
    uniforms = torch.rand(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).sort(-1).values
    mass = torch.softmax(z.double(), -1).cumsum(-1)
    expected = torch.searchsorted(mass, uniforms, right=True)
    for i in range(5):
        assert once.ids[i][kept[i]].tolist() == expected[i].unique().tolist()


def test_draws_of_no_rows(backend: str) -> None:
    assert kd.compress(torch.randn(0, 9), samples=4, backend=backend).ids.shape[0] == 0


def test_draw_operator(backend: str) -> None:
    uniforms = torch.rand(3, 5, dtype=torch.float64)
    for arguments in (
        (logits(3, 50), None, None, 1.0, 0.0, 1.0, 50, 3, backend, uniforms),
        (torch.randn(3, 6), torch.randn(30, 6), torch.randn(30), 0.5, 3.0, 1.0, 30, 2, backend, uniforms),
    ):
        torch.library.opcheck(torch.ops.kdkernels.draw.default, arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"k": 8}, {"k": 300}, {"samples": 5}, {"k": 8, "top_p": 0.5}], ids=str)
def test_rows_that_are_no_distribution_are_named(
    backend: str, bad: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    z = logits(6, 700).to(dtype).reshape(2, 3, 700)
    kd.compress(z, **options, backend=backend)
    for place in (0, 5, 699):
        spoiled = z.clone()
        spoiled[1, 0, place] = bad
        spoiled[1, 2, place] = bad
        with pytest.raises(ValueError, match=r"row \[1, 0\]"):
            kd.compress(spoiled, **options, backend=backend)
    spoiled = z.clone()
    spoiled[0, 2] = -torch.inf
    with pytest.raises(ValueError, match=r"row \[0, 2\]"):
        kd.compress(spoiled, **options, backend=backend)
    spoiled[0, 2] = bad
    with pytest.raises(ValueError, match=r"row \[0, 2\]"):
        kd.compress(spoiled, **options, backend=backend)


def test_bad_rows_leave_others_alone(backend: str) -> None:
    z = logits(3, 700)
    z[1, 3] = torch.nan
    options = (z, None, None, 1.0, 0.0, 1.0, 700, 3, backend, 9, [2.0], True, True)
    ids, log_probs, log_tail, entropy, tails, _ = torch.ops.kdkernels.compress(*options)
    assert (ids[1] == -1).all()
    assert all(bool(x[1].isnan().all()) for x in (log_probs, log_tail, entropy, tails))
    expected = golden(z[::2], 9)
    assert torch.equal(ids[::2].long(), expected.ids)
    assert apart(log_probs[::2], expected.log_probs) < 1e-6


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"k": 0}, ValueError, "k = 0"),
        ({"k": 101}, ValueError, "k = 101.*vocabulary, 100"),
        ({"k": 5000}, ValueError, "4096"),
        ({"k": True}, ValueError, "k = True"),
        ({"k": 2.0}, ValueError, "k = 2.0"),
        ({"top_p": 0.0}, ValueError, "top_p = 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p = 1.5"),
        ({"top_p": float("nan")}, ValueError, "top_p"),
        ({"samples": 0}, ValueError, "samples = 0"),
        ({"samples": 3, "top_p": 0.5}, ValueError, "not both"),
        ({"generator": torch.Generator()}, ValueError, "generator"),
        ({"temperature": 0.0}, ValueError, "temperature = 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature"),
        ({"other_temperatures": [1.0, -2.0]}, ValueError, "other_temperatures = -2.0"),
        ({"samples": 3, "other_temperatures": [2.0]}, ValueError, "other_temperatures"),
        ({"vocab_size": 101}, ValueError, "vocab_size = 101"),
        ({"vocab_size": 0}, ValueError, "vocab_size = 0"),
        ({"vocab_size": 10, "k": 11}, ValueError, "k = 11"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes = 0"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"backend": "triton"}, ValueError, "triton"),
        ({"entropy": 1}, TypeError, "entropy"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kd.compress(torch.randn(2, 100), **{"k": 8, **options})


def test_bad_logits() -> None:
    with pytest.raises(TypeError, match="logits"):
        kd.compress([1.0, 2.0], 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int64"):
        kd.compress(torch.ones(2, 9, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="V >= 1"):
        kd.compress(torch.ones(2, 0), 1)
    with pytest.raises(ValueError, match="requires grad"):
        kd.compress(torch.ones(2, 9, requires_grad=True), 1)
    hidden, weight = torch.ones(2, 3), torch.ones(9, 3, requires_grad=True)
    assert not kd.compress(kd.LinearLogits(hidden, weight), 1).log_probs.requires_grad
    with pytest.raises(ValueError, match=r"logits\.hidden"):
        kd.compress(kd.LinearLogits(hidden.requires_grad_(), weight), 1)


def test_chunks_of_rows_change_nothing() -> None:
    """The eager backend takes few rows at a time; the numbers of the generator are drawn for all at once."""
    logits = torch.randn(7, 301, generator=torch.Generator().manual_seed(1))
    for options in ({"samples": 9}, {"entropy": True, "other_temperatures": [2.0]}):
        found = []
        for chunk_bytes in (None, 2 * 301 * ROW_BYTES, 1):
            seeded = {"generator": torch.Generator().manual_seed(5)} if "samples" in options else {}
            found.append(kd.compress(logits, 8, backend="eager", chunk_bytes=chunk_bytes, **seeded, **options))
        for other in found[1:]:
            assert torch.equal(other.ids, found[0].ids)
            assert torch.equal(other.log_probs, found[0].log_probs)
            assert torch.equal(other.log_tail, found[0].log_tail)

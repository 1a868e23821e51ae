"""`kdkernels.switch_gate`: which token is drawn."""

from __future__ import annotations

import golden_gate as golden
import pytest
import torch
from gate_cases import DTYPES, EDGE, SHAPES, check_tokens, pair, uniforms

import kdkernels as kd

pytestmark = pytest.mark.sample(3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 129, 5003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_of_sampling(backend: str, dtype: torch.dtype, vocab: int, shape: dict[str, float]) -> None:
    zs, zt = pair(6, vocab, (dtype, dtype))
    zs[1], zt[1] = zs[1].round(), zt[1].round()  # ties
    u = torch.tensor([0.0, 0.2, 0.4, 0.7, 0.99, 1 - 2.0**-53], dtype=torch.float64)
    plain = kd.switch_gate(zs, zt, 0.3, uniforms=u, backend=backend)
    for threshold in (-1.0, 0.3, 2.0):
        found = kd.switch_gate(zs, zt, threshold, uniforms=u, backend=backend, **shape)  # type: ignore[arg-type]
        check_tokens(found, zs, zt, u, **shape)
        assert torch.equal(found.jsd, plain.jsd)  # the gate knows nothing of them


def test_a_nucleus_larger_than_what_is_looked_at_first(backend: str) -> None:
    zs, zt = pair(2, 6000, (torch.float32, torch.float32), scale=0.1)
    u = torch.tensor([0.31, 0.83], dtype=torch.float64)
    check_tokens(kd.switch_gate(zs, zt, -1.0, uniforms=u, top_p=0.6, backend=backend), zs, zt, u, top_p=0.6)


def test_uniforms_at_their_ends(backend: str) -> None:
    z = torch.full((1, 9000), -torch.inf)
    z[0, [5, 4500, 8000]] = torch.tensor([1.0, 2.0, 1.5])
    for shape in SHAPES:
        ends = []
        for end in (0.0, 1 - 2.0**-53):
            u = torch.tensor([end], dtype=torch.float64)
            ends.append(kd.switch_gate(z, z, 1.0, uniforms=u, backend=backend, **shape).token.item())  # type: ignore[arg-type]
        kept = golden.distribution(z[0], **shape).nonzero()[:, 0]  # type: ignore[arg-type]
        assert ends == [kept[0], kept[-1]]


def test_the_last_of_many(backend: str) -> None:
    """A number that rounding takes beyond the sum of all masses."""
    zs, _ = pair(40, 1001, (torch.float32, torch.float32), scale=1.0)
    u = torch.full((40,), 1 - 2.0**-53, dtype=torch.float64)
    assert (kd.switch_gate(zs, zs, 1.0, uniforms=u, backend=backend).token >= 999).all()


def test_most_likely(backend: str) -> None:
    zs, zt = pair(4, 9001, (torch.bfloat16, torch.bfloat16))
    zs, zt = zs.round(), zt.round()  # many equal to the largest
    zs[0, 4095:4097] = zs[0, 8999] = 50.0
    found = kd.switch_gate(zs, zt, torch.tensor([2.0, 2.0, -1.0, -1.0]), do_sample=False, backend=backend)
    expected = [int((z == z.max()).nonzero()[0]) for z in (*zs[:2], *zt[2:])]
    assert found.token.tolist() == expected
    assert expected[0] == 4095


def test_top_k_and_top_p_are_those_of_transformers() -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    z = pair(1, 997, (torch.float32, torch.float32))[0]
    for temperature, k, p in ((0.7, 20, 0.8), (1.3, 300, 0.5), (1.0, 997, 0.9)):
        scores = z / temperature
        for warper in (warpers.TopKLogitsWarper(k), warpers.TopPLogitsWarper(p)):
            scores = warper(None, scores)
        expected = torch.softmax(scores.double(), -1)[0]
        shape = {"temperature": temperature, "top_k": k, "top_p": p}
        for u in torch.linspace(0.001, 0.999, 37, dtype=torch.float64):
            found = kd.switch_gate(z, z, 1.0, uniforms=u[None], **shape).token.item()  # type: ignore[arg-type]
            token, distance = golden.token(expected, float(u))
            assert found == token or distance < EDGE


def test_backends_agree_on_tokens() -> None:
    zs, zt = pair(64, 3001, (torch.float32, torch.float32))
    u = uniforms(64)
    for shape in SHAPES:
        ours, theirs = (
            kd.switch_gate(zs, zt, 0.1, uniforms=u, backend=b, **shape)  # type: ignore[arg-type]
            for b in ("auto", "eager")
        )
        assert torch.equal(ours.from_teacher, theirs.from_teacher)
        assert (ours.token == theirs.token).sum() >= 63


def test_draws_with_a_generator_and_float32_uniforms(backend: str) -> None:
    zs, zt = pair(5, 400, (torch.float32, torch.float32))
    drawn = kd.switch_gate(zs, zt, 0.2, generator=torch.Generator().manual_seed(5), backend=backend)
    given = kd.switch_gate(zs, zt, 0.2, uniforms=uniforms(5), backend=backend)
    assert torch.equal(drawn.token, given.token)
    rounded = uniforms(5).float()
    single = kd.switch_gate(zs, zt, 0.2, uniforms=rounded, backend=backend)
    assert torch.equal(single.token, kd.switch_gate(zs, zt, 0.2, uniforms=rounded.double(), backend=backend).token)


def test_mixture_by_thresholds(backend: str) -> None:
    """Always from .2 p + .8 q: one number says whose component and, rescaled, which token."""
    zs, zt = pair(4000, 5, (torch.float32, torch.float32))
    zs, zt = zs[:1].expand(4000, -1), zt[:1].expand(4000, -1)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    teacher = u < 0.2
    found = kd.switch_gate(
        zs,
        zt,
        torch.where(teacher, -1.0, 2.0),
        uniforms=torch.where(teacher, u / 0.2, (u - 0.2) / 0.8),
        backend=backend,
    )
    assert torch.equal(found.from_teacher, teacher)
    share = torch.bincount(found.token, minlength=5) / 4000
    expected = 0.2 * torch.softmax(zt[0], -1) + 0.8 * torch.softmax(zs[0], -1)
    assert (share - expected).abs().max() < 2e-3

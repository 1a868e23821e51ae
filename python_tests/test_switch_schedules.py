"""Threshold schedules: the published numbers, the dynamic ones' promises, what goes by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.switch import schedules
from kdkernels.switch.schedules import CLOSED, OPEN, schedule_of
from kdkernels.switch.state import SwitchState


def state(rows: int = 1, steps: int = 64, jsd: Any = None, spoke: Any = None) -> SwitchState:
    """A generation after as many steps as ``jsd`` and ``spoke`` have columns."""
    uniforms = torch.rand(rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    made = SwitchState(torch.zeros(rows, 2, dtype=torch.int64), steps, uniforms, 0)
    for buffer, given in ((made.numbers["jsd"], jsd), (made.spoke, spoke)):
        if given is not None:
            columns = torch.as_tensor(given)
            buffer[:, : columns.shape[1]] = columns.to(buffer.dtype)
            made.step = columns.shape[1]
    return made


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny.llama(2, seed=1).double().eval(), tiny.llama(4, seed=2).double().eval()


def generated(pair: tuple[Any, Any], rows: int, steps: int, **options: Any) -> kd.SwitchOutput:
    ids = torch.arange(1, rows + 1)[:, None].expand(rows, 3)
    generator = torch.Generator().manual_seed(7)
    return kd.switch_generate(*pair, ids, max_new_tokens=steps, eos_token_id=[], generator=generator, **options)


def test_published_thresholds() -> None:
    vectors = {3: 0.7408, 4: 0.6703, 7: 0.4966, 10: 0.3679, 20: 0.1353, 30: 0.0498, 50: 0.0067}
    rule = schedule_of("exponential")
    assert rule(0, state()) == 1.0
    assert {t: round(rule(t, state()), 4) for t in vectors} == vectors
    linear = schedule_of("linear")
    assert [linear(t, state(steps=4)) for t in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule_of("constant")(9, state()) == 0.2
    growth = schedule_of("growth", 0.01, 0.1)
    assert growth(0, state()) == 0.01
    assert growth(10, state()) == pytest.approx(0.01 * math.e)
    assert growth(47, state()) == 1.0
    assert growth(100_000, state()) == 1.0


@pytest.mark.parametrize(("name", "share"), [("mixture", 0.2), ("random", 0.5)])
def test_a_mixture_draws_each_token_from_one_component(pair: tuple[Any, Any], name: str, share: float) -> None:
    rule = schedule_of(name)
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    threshold, within = rule.draw(uniforms)
    teacher = threshold == OPEN
    assert float(teacher.double().mean()) == share
    assert set(threshold.tolist()) == {OPEN, CLOSED}
    for part in (within[teacher], within[~teacher]):  # uniform again in either component
        assert 0 <= float(part.min()) <= float(part.max()) < 1
        assert float((part.sort().values - (torch.arange(len(part)).double() + 0.5) / len(part)).abs().max()) < 1e-12
    edges = torch.tensor([0.0, math.nextafter(share, 0), share, 1 - 2**-53], dtype=torch.float64)
    assert float(rule.draw(edges)[1].max()) < 1
    out = generated(pair, 4, 12, schedule=name)
    assert out.from_teacher.any()
    assert not out.from_teacher.all()
    chosen = torch.rand(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) < share
    assert torch.equal(out.from_teacher, chosen)


def test_a_mixture_draws_from_the_mean_of_both_distributions(pair: tuple[Any, Any]) -> None:
    prompt, n = torch.tensor([[5, 6, 7]]), 4000
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    out = kd.switch_generate(
        *pair, prompt.expand(n, -1), max_new_tokens=1, schedule="mixture", tau0=0.3, uniforms=uniforms, eos_token_id=[]
    )
    with torch.no_grad():
        q, p = (m(prompt).logits[0, -1].softmax(-1) for m in pair)
    share = torch.bincount(out.responses[:, 0], minlength=304) / n
    assert float((share - (0.3 * p + 0.7 * q)).abs().max()) < 2 / n  # evenly spaced draws: one each side of an edge


def test_moving_average_follows_the_mean_and_keeps_the_floor() -> None:
    rule = schedule_of("moving_average", 1.5)
    first = rule(0, state(2))
    assert (first < 1).all()
    assert (first > 0.999999).all()
    seen = state(3, jsd=[[0.1, 0.3], [0.2, math.nan], [0.9, 0.9]], spoke=[[0, 0], [0, 1], [0, 0]])
    found = rule(2, seen)
    assert found[0].item() == pytest.approx(0.3)
    assert found[1].item() == OPEN
    assert 0.999999 < found[2].item() < 1


def test_moving_average_generates_as_adaswitch_does(pair: tuple[Any, Any]) -> None:
    out = generated(pair, 6, 24, schedule="moving_average", tau0=1.05)
    switched = 0
    for row in range(6):
        spoke = out.from_teacher[row].tolist()
        first = spoke.index(True) if True in spoke else 24
        assert all(spoke[first:])
        jsd = out.jsd[row, : first + 1]
        assert not jsd.isnan().any()
        means = jsd.cumsum(0) / torch.arange(1, len(jsd) + 1)
        assert (jsd[1:first] <= 1.05 * means[: first - 1]).all()
        if 0 < first < 24:
            switched += 1
            assert jsd[first] > 1.05 * means[first - 1]
    assert switched >= 3


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_target_share_holds_the_teachers_share(pair: tuple[Any, Any], share: float) -> None:
    steps, gain = 40, 0.2
    out = generated(pair, 5, steps, schedule="target_share", tau0=share, decay=gain)
    bound = (1 + gain) / (gain * steps)
    assert float((out.from_teacher.double().mean(1) - share).abs().max()) <= bound
    assert abs(float(out.from_teacher.double().mean()) - share) < 0.1


@pytest.mark.parametrize("course", ["hostile", "ones", "zeros", "random"])
def test_target_share_keeps_its_bound_whatever_the_divergences(course: str) -> None:
    rule, steps = schedules.TargetShare(0.3, gain=0.05), 200
    generator = torch.Generator().manual_seed(1)
    spoke = torch.zeros(1, 0, dtype=torch.bool)
    for step in range(steps):
        threshold = float(rule(step, state(1, 256, spoke=spoke) if step else state(1, 256)))
        assert -0.05 <= threshold <= 1.05
        jsd = {
            "hostile": 1.0 if threshold > 0.5 else 0.0, "ones": 1.0, "zeros": 0.0,
            "random": float(torch.rand(1, generator=generator)),
        }[course]  # fmt: skip
        spoke = torch.cat((spoke, torch.tensor([[jsd > threshold]])), 1)
    assert abs(float(spoke.double().mean()) - 0.3) <= 1.05 / (0.05 * steps)


def test_by_domain_gives_each_row_its_own(pair: tuple[Any, Any]) -> None:
    rule = schedules.ByDomain(
        {
            "code": schedules.Exponential(1.0, 0.3),
            "prose": lambda step, _: torch.tensor(0.35),
            "own": schedules.Constant(1),
        },
        ["prose", "code", "own", "prose"],
    )
    out = generated(pair, 4, 10, schedule=rule)
    code = [math.exp(-0.3 * t) for t in range(10)]
    expected = torch.tensor([[0.35] * 10, code, [1.0] * 10, [0.35] * 10], dtype=torch.float64)
    torch.testing.assert_close(out.threshold, expected, atol=1e-7, rtol=0)
    for row, single in enumerate((schedules.Constant(0.35), schedules.Exponential(1.0, 0.3), schedules.Constant(1.0))):
        alone = generated(pair, 4, 10, schedule=single)
        assert torch.equal(out.sequences[row], alone.sequences[row])


def test_a_schedule_sees_what_was_generated(pair: tuple[Any, Any]) -> None:
    seen: list[tuple[int, ...]] = []

    def rule(step: int, now: SwitchState) -> Tensor | float:
        shapes = (now.sequences.shape, now.jsd.shape, now.threshold.shape, now.from_teacher.shape)
        seen.append((step, now.step, *(s[1] for s in shapes)))
        assert now.live.all()
        return torch.tensor(0.3) if step % 2 else 0.3

    out = generated(pair, 2, 5, schedule=rule)
    assert seen == [(t, t, 3 + t, t, t, t) for t in range(5)]
    torch.testing.assert_close(out.threshold, torch.full((2, 5), 0.3, dtype=torch.float64), atol=1e-7, rtol=0)


def test_every_name_generates(pair: tuple[Any, Any]) -> None:
    for name in schedules.NAMES:
        out = generated(pair, 2, 6, schedule=name)
        assert out.responses.shape == (2, 6)
        known = ~out.jsd.isnan()
        assert torch.equal(out.from_teacher[known], (out.jsd > out.threshold)[known])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "exponentiel"}, "did you mean 'exponential'"),
        ({"schedule": 0.3}, "a name or a callable"),
        ({"schedule": "linear", "decay": 0.1}, "decay = 0.1"),
        ({"schedule": lambda *_: 0.1, "tau0": 1.0}, "None with a callable schedule"),
        ({"tau0": math.nan}, "tau0 = nan"),
        ({"decay": -1.0}, "decay = -1.0"),
        ({"schedule": "mixture", "tau0": 1.5}, "share = 1.5"),
        ({"schedule": "target_share", "decay": 0.0}, "gain > 0"),
        ({"schedule": lambda *_: math.nan}, "schedule at step 0 = nan"),
        ({"schedule": lambda step, _: torch.tensor([0.1, math.nan if step == 2 else 0.1])}, "schedule at step 2 = nan"),
        ({"schedule": lambda *_: None}, "schedule at step 0 = None"),
        ({"schedule": lambda *_: torch.zeros(3)}, "schedule at step 0 = a tensor"),
        ({"schedule": schedules.ByDomain({"a": schedules.Constant()}, ["a"])}, "one for each of 2 rows"),
    ],
)  # fmt: skip
def test_wrong_schedules_are_named(pair: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        generated(pair, 2, 6, **options)


def test_by_domain_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="domains = \\['b'\\]"):
        schedules.ByDomain({"a": schedules.Constant()}, ["a", "b"])
    with pytest.raises(TypeError, match="callables that return a threshold"):
        schedules.ByDomain({"a": schedules.Mixture()}, ["a"])

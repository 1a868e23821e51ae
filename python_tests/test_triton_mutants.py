"""Damaged machine code of the Triton kernels: whoever compares it with the definition notices.

One statement of a kernel's PTX is changed, and calls that take every path of the kernel must end in a fault of the
emulator, in wrong numbers, or, as some of what a kernel does only saves work, in more instructions than before. All
mutants are tried in the soak, one of each kind and kernel in the ordinary run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import cases
import golden
import ptx.executor
import pytest
import torch
from emulated import serve
from ptx import PTXError
from ptx.mutants import Mutant, Mutants
from ptx.triton_shim import Emulator
from test_triton_shards import in_shards
from test_triton_sparse import compare, largest
from torch import Tensor

from kdkernels.ops.rows import RowSpec, Side, divergence_rows_
from kdkernels.triton import host
from kdkernels.weights import RowWeights

PAD = 8
"""Columns behind the vocabulary."""
KINDS = ("barriers", "shuffles", "masks", "maxima", "bounds", "replacements", "stores")
FILLS = (-math.inf, -1e30, -1e4)
"""Constants that stand for entries that are absent, or masked."""


class Rows:
    """One row of every kind, bad ones among them, float32, in wider memory that holds NaN."""

    def __init__(self, vocab: int, kinds: tuple[str, ...]) -> None:
        pairs = [cases.pair(kind, 1, vocab, torch.float32, i) for i, kind in enumerate(kinds)]
        pairs += [(teacher, student) for student, teacher in pairs]
        pairs += [(student - 1000, teacher - 1000) for student, teacher in pairs]
        pairs += [(spiked(student, i), spiked(teacher, i)) for i, (student, teacher) in enumerate(pairs[:8])]
        pairs += [cases.pair("ordinary", 1, vocab, torch.float32, seed) for seed in range(6)]
        student, teacher = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
        student[-6, 5], teacher[-5, vocab - 1], student[-4] = torch.nan, torch.inf, -torch.inf
        student[-3] = torch.nan  # does not count
        count = len(pairs)
        self.sides = [fenced(torch.nn.functional.pad(x, (0, PAD), value=torch.nan)) for x in (student, teacher)]
        self.labels = torch.arange(count) * (vocab - 1) // (count - 1)
        self.labels[-2] = vocab  # none
        self.w_kd, self.w_ce = torch.linspace(0.5, 2, count), torch.linspace(1, 0.25, count)
        self.w_kd[-3] = self.w_ce[-3] = self.w_ce[0] = self.w_kd[1] = 0
        self.vocab = vocab

    def check(self, kernel: str, *parameters: float) -> None:
        """One launch against the definition."""
        count, spec = len(self.labels), RowSpec(kernel, *(*parameters, 0.0, 0.0)[:2], 1.5, self.vocab)
        loss, stats = torch.empty(count), torch.empty(count, 6)
        gradient = fenced(torch.full((count, self.vocab + PAD), 7.0))
        weights = RowWeights(self.w_kd, self.w_ce, self.labels)
        divergence_rows_("triton", Side(self.sides[0]), Side(self.sides[1]), weights, spec, loss, gradient, stats)
        due = golden.distill(*self.sides, kernel, *parameters, temperature=1.5, w_kd=self.w_kd, w_ce=self.w_ce,
                             labels=self.labels, vocab=self.vocab)  # fmt: skip
        agree(loss, due.loss, self.w_kd * due.stats[:, 0].clamp(min=1) + self.w_ce * due.stats[:, 4].clamp(min=1))
        agree(stats, due.stats, due.stats.clamp(min=1))
        assert (gradient[:, self.vocab :] == 0).all()
        assert torch.equal(gradient.isnan(), due.grad.isnan())
        error = (gradient.double() - due.grad).nan_to_num().norm(dim=-1)
        assert (error <= 1e-6 * due.scale.nan_to_num() + 1e-30).all()


def spiked(x: Tensor, place: int) -> Tensor:
    """With one logit so far above the others that a sum without it for a reference overflows."""
    return x + 300.0 * (torch.arange(x.shape[1]) == place + x.shape[1] // 8 * place)


def fenced(x: Tensor) -> Tensor:
    """The same with gaps between the rows, where any access is a fault."""
    return torch.nn.functional.pad(x, (0, PAD))[:, : x.shape[1]]


def agree(actual: Tensor, due: Tensor, size: Tensor) -> None:
    assert torch.equal(actual.isnan(), due.isnan())
    assert ((actual.double() - due).abs().nan_to_num() <= 4e-6 * size.nan_to_num()).all()


@functools.cache
def table(vocab: int, kinds: tuple[str, ...] = cases.KINDS) -> Rows:
    return Rows(vocab, kinds)


def dense(kernel: str, *parameters: float) -> None:
    """Less than a tile; a tile and no rest; several with a rest."""
    table(300).check(kernel, *parameters)
    for vocab in (512, 1500):
        table(vocab, ("ordinary", "masked", "near")).check(kernel, *parameters)


def sparse() -> None:
    for vocab, k, kind in ((300, 7, "ordinary"), (1500, 200, "masked"), (1024, 1024, "peaked")):
        student, teacher = cases.pair(kind, 5, vocab, torch.float32)
        student[3, vocab // 3] = torch.nan
        known = largest(teacher, k, 1.5)
        known.ids[4, 3] = known.ids[4, 2]  # no teacher
        student = fenced(torch.nn.functional.pad(student, (0, PAD), value=torch.nan))
        w_kd, w_ce = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
        weights = RowWeights(w_kd, w_ce, torch.tensor([0, vocab - 1, 5, 7, 9]))
        compare(Side(student), known, weights, RowSpec("jsd", 0.5, 0.0, 1.5, vocab, "ghost"))


def shards() -> None:
    """Two ranks' columns: less than a tile, a tile and no rest, several with a rest."""
    for vocab, cut in ((300, 8), (1024, 512), (1500, 700)):
        rows = table(vocab) if vocab == 300 else table(vocab, ("ordinary", "masked", "near"))
        student, teacher = (side[:, :vocab].contiguous() for side in rows.sides)
        labels = rows.labels.clamp(max=vocab - 1)
        spec, weights = RowSpec("jsd", 0.5, 0.0, 1.5, vocab), RowWeights(rows.w_kd, rows.w_ce, labels)
        due = golden.distill(student, teacher, "jsd", 0.5, temperature=1.5, w_kd=rows.w_kd, w_ce=rows.w_ce,
                             labels=labels)  # fmt: skip
        value, gradient, stats, places = in_shards(student, teacher, weights, spec, [0, cut, vocab])
        assert torch.equal(gradient.isnan(), due.grad.isnan())
        error = (gradient.double() - due.grad).nan_to_num().norm(dim=-1)
        assert (error <= 1e-6 * due.scale.nan_to_num() + 1e-30).all()
        fine = ~due.loss.isnan() & ((rows.w_kd != 0) | (rows.w_ce != 0))
        expected = due.stats[fine][:, [0, 1, 2, 4]]
        agree(value[fine], expected[:, 0], expected[:, 0].clamp(min=1))
        agree(stats[fine], expected, expected.clamp(min=1))
        assert torch.equal(places[fine, 0], student[fine].argmax(-1))
        assert torch.equal(places[fine, 1], teacher[fine].argmax(-1))


def scale() -> None:
    space = torch.randn(5, 10240 + 4, generator=torch.Generator().manual_seed(0))
    for columns in (4, *range(256, 4097, 256), 10240):
        x, factor = space.clone()[:, :columns], torch.tensor([1.0, 0.3, -2.0, 0.0, 1.0])
        x[3] = torch.nan
        due = torch.where(factor[:, None] == 0, 0.0, x * factor[:, None])
        host.scale_(x, factor)
        assert torch.equal(x, due)
        assert torch.equal(x._base[:, columns:], space[:, columns:])  # type: ignore[index]


BODIES: dict[str, Callable[[], None]] = {
    "forward_kl": lambda: dense("forward_kl"),
    "jsd": lambda: dense("jsd", 0.3),
    "adaptive_kl": lambda: dense("adaptive_kl", 0.385),
    "sparse": sparse,
    "shards": shards,
    "scale": scale,
}


@functools.cache
def originals(body: str) -> tuple[dict[str, None], int]:
    """PTX of the kernels that a body launches, and their instructions; without damage it passes."""
    with pytest.MonkeyPatch.context() as patch:
        emulator = serve(patch)
        BODIES[body]()
    return dict.fromkeys(compiled.ptx for compiled in emulator.compiled), cost(emulator)


def cost(emulator: Emulator) -> int:
    return sum(report.thread_instructions for report in emulator.reports)


@functools.cache
def mutants(body: str, kind: str) -> list[tuple[str, Mutant]]:
    """(what is changed, its mutant) of every kernel of a body."""
    given = {"replacements": FILLS, "stores": (4 * (1500 + PAD),)}.get(kind, ())
    found = [(text, mutant) for text in originals(body)[0] for mutant in getattr(Mutants(text), kind)(*given)]
    # a scalar that every thread would store alike is stored by one
    return [(text, mutant) for text, mutant in found if kind != "masks" or ".v4" in mutant.statement]


def survives(body: str, original: str, mutant: Mutant, patch: pytest.MonkeyPatch) -> bool:
    """Whether the body still passes."""
    serve(patch)
    patch.setattr(ptx.executor, "PATIENCE", 1 << 17)
    emulator = Emulator(90, mutate=lambda text: mutant.text if text == original else text)
    patch.setattr(host.launch, "start", emulator.start)
    try:
        BODIES[body]()
    except (PTXError, AssertionError):
        return False
    return mutant.kind == "mask dropped" or cost(emulator) <= 1.0005 * originals(body)[1]


SHARE = {"maxima": 0.6, "bounds": 0.4, "replacements": 0.4}
"""Of the mutants of a kind that are noticed at the least; of the other kinds 0.9.

Not noticed are those that change nothing: a maximum that only has to be somewhere near, or is taken of one number and
-inf; a loop of masked tiles that goes round once more; a fill whose tile is masked again where it is summed or stored;
a masked entry's log-probability where its probability is all that counts (the gradient of forward KL); the guard of a
loop for vocabularies of no entry; a barrier with another right behind it.
"""


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("body", BODIES)
def test_damage_is_noticed(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (kind for kind in KINDS if kind not in SHARE or (kind, body) == ("maxima", "forward_kl")):
        found = mutants(body, kind)
        for original, mutant in found[len(found) // 2 :][:1]:
            assert not survives(body, original, mutant, monkeypatch), str(mutant)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", BODIES)
def test_any_damage_is_noticed(body: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = mutants(body, kind)
    alive = [str(mutant) for original, mutant in found if survives(body, original, mutant, monkeypatch)]
    assert len(alive) <= (1 - SHARE.get(kind, 0.9)) * len(found), "\n".join(alive)

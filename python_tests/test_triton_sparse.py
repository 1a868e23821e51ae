"""The Triton kernel for sparse teachers, compiled and executed by the PTX emulator, against the float64 definition."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from emulated import TARGETS, serve
from ptx.triton_shim import Emulator
from torch import Tensor

import kdkernels as kd
from kdkernels import eager_sparse
from kdkernels.ops.rows import RowSpec, Side
from kdkernels.ops.sparse import SparseRows, sparse_rows_
from kdkernels.weights import RowWeights

pytestmark = [pytest.mark.sample(3), pytest.mark.thin(2)]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPARED = (("ghost", "forward_kl"), ("ghost", "jsd"), ("renormalize", "reverse_kl"), ("truncate", "skew_kl"),
            ("truncate", "total_variation"), ("sampled", "forward_kl"))  # fmt: skip
Serve = Callable[..., Emulator]
Rows = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Serve:
    return lambda target=90: serve(monkeypatch, target)


def ids(value: object) -> str:
    return f"V{value[0]}" if isinstance(value, tuple) else str(value).removeprefix("torch.")


def soak(*values: object) -> list[object]:
    """Parameters of the long campaign only."""
    return [pytest.param(value, marks=pytest.mark.soak) for value in values]


def largest(teacher: Tensor, k: int, temperature: float = 1.0, ragged: bool = True) -> SparseRows:
    """The k largest entries of each row; the first row lacks two, which are in its tail."""
    lp = (teacher.double() / temperature).log_softmax(-1)
    kept = lp.topk(k).indices.sort(-1).values
    held = torch.ones(kept.shape, dtype=torch.bool)
    if ragged and k > 2:
        held[0, -2:] = False
    inside = torch.zeros_like(lp, dtype=torch.bool).scatter_(-1, kept, held)
    tail = torch.where(inside, -torch.inf, lp).logsumexp(-1)
    log_probs = torch.where(held, lp.gather(-1, kept), -torch.inf)
    return SparseRows(torch.where(held, kept, -1).int(), log_probs.float(), tail.float())


def weights(rows: int, labels: Tensor | None) -> RowWeights:
    kd_weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])[:rows]
    ce = None if labels is None else torch.tensor([1.0, 0.0, 0.0, 0.5, 0.25])[:rows]
    return RowWeights(kd_weights, ce, labels)


def definition(student: Side, teacher: SparseRows, w: RowWeights, spec: RowSpec, incoming: Tensor) -> Rows:
    """Loss, gradient, statistics in float64."""
    rows, wide = torch.empty(len(w.kd), dtype=torch.float64), student.x.double()
    result = rows, torch.empty_like(wide), torch.empty((len(w.kd), 6), dtype=torch.float64)
    exact = SparseRows(teacher.ids, teacher.log_probs.double(), teacher.log_tail.double())
    bias = None if student.bias is None else student.bias.double()
    heavy = RowWeights(w.kd.double(), None if w.ce is None else w.ce.double(), w.labels)
    eager_sparse.sparse_rows_(student._replace(x=wide, bias=bias), exact, heavy, spec, *result)
    return result


def compare(student: Side, teacher: SparseRows, w: RowWeights, spec: RowSpec, inplace: bool = False) -> None:
    """One launch against the definition; NaN where and only where it is due."""
    x = student.x
    due = definition(student, teacher, w, spec, x)
    made = torch.empty(len(w.kd)), x if inplace else torch.full_like(x, 7.0), torch.empty(len(w.kd), 6)
    sparse_rows_("triton", student, teacher, w, spec, *made)
    loss, gradient, stats = (actual.double() for actual in made)
    bad = due[0].isnan()
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(gradient[:, : spec.vocab].isnan(), bad[:, None].expand(-1, spec.vocab))
    assert (gradient[:, spec.vocab :] == 0).all()
    fine = ~bad
    size = due[2][fine, 0].abs().clamp(min=1) * w.kd[fine] + due[2][fine, 4].clamp(min=1)
    assert ((loss - due[0])[fine].abs() <= 1e-6 * size).all()
    assert ((stats - due[2])[fine].abs() <= 3e-6 * due[2][fine].abs().clamp(min=1)).all()
    error, truth = (gradient - due[1])[fine].norm(dim=-1), due[1][fine]
    rounding = (truth.to(x.dtype).double() - truth).norm(dim=-1)
    mass = w.kd[fine] / spec.temperature + (0 if w.ce is None else w.ce[fine])
    scale = truth.norm(dim=-1) + mass * (1 if student.scale == 1 else abs(student.scale)) * 0.3
    allowed = 1e-6 * scale + 2 * rounding * (x.dtype != torch.float32)
    assert (error <= allowed).all(), (error / allowed).tolist()
    assert spec.mode == "renormalize" or spec.vocab == 1 or (truth.norm(dim=-1) > 0).any()


SHAPES = ((301, 7, 1.0), (5003, 64, 2.0), (4104, 700, 1.0))
"""V, K, temperature."""


def sample(cases: list[tuple[object, ...]], every: int) -> list[object]:
    """Every so many cases as they are, the others in the soak."""
    return [pytest.param(*case, marks=() if i % every == 0 else pytest.mark.soak) for i, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("mode", "kernel", "dtype", "shape", "target"),
    sample([(*c, d, s, t) for t in TARGETS for s in SHAPES for d in DTYPES for c in COMPARED], 13),
    ids=ids,
)
def test_modes_against_the_definition(
    mode: str, kernel: str, dtype: torch.dtype, shape: tuple[int, int, float], target: int, served: Serve
) -> None:
    served(target)
    vocab, k, temperature = shape
    student, teacher = cases.pair("ordinary", 5, vocab, dtype)
    known = largest(teacher, k, temperature)
    labels = torch.tensor([0, vocab - 1, 5, int(known.ids[3, 2]), int(known.ids[4, -1])])
    spec = RowSpec(kernel, 0.5, 0.0, temperature, vocab, mode)
    compare(Side(student), known, weights(5, labels if k != 700 else None), spec)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("mode", ["ghost", *soak("renormalize", "truncate", "sampled")])
def test_inputs_that_a_loss_must_survive(mode: str, kind: str, served: Serve) -> None:
    served()
    student, teacher = cases.pair(kind, 3, 1029, torch.float32)
    compare(Side(student), largest(teacher, 31), weights(3, None), RowSpec("forward_kl", 0.0, 0.0, 1.0, 1029, mode))


@pytest.mark.parametrize("vocab", [1, 129, 4097, *soak(2, 8, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, *soak(torch.bfloat16, torch.float16)], ids=ids)
def test_everything_kept_one_kept_and_none_left(dtype: torch.dtype, vocab: int, served: Serve) -> None:
    """K = V: the tail is no entry; also where all of the first tile is kept."""
    served()
    student, teacher = cases.pair("ordinary", 4, vocab, dtype)
    for k in {1, vocab - 1 or 1, vocab}:
        for mode in ("ghost", "renormalize"):
            known = largest(teacher, k, ragged=False)
            compare(Side(student), known, weights(4, None), RowSpec("jsd", 0.5, 0.0, 1.0, vocab, mode))


@pytest.mark.parametrize("divergence", ["jsd", *soak("forward_kl", "alpha_beta", "total_variation")])
def test_all_entries_kept_equal_the_dense_teacher(divergence: str, served: Serve) -> None:
    served()
    student, teacher = cases.pair("ordinary", 3, 301, torch.float32)
    rows = largest(teacher, 301, ragged=False)
    results = []
    for given in (teacher, kd.SparseLogits(rows.ids, rows.log_probs, rows.log_tail, 301)):
        leaf = student.clone().requires_grad_()
        loss = kd.distillation_loss(leaf, given, divergence, backend="triton", reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss_a, grad_a), (loss_b, grad_b) = results
    assert (loss_a - loss_b).abs().max() <= 2e-6 * loss_a.abs().max().clamp(min=1)
    mass = student.softmax(-1) + teacher.softmax(-1)
    assert grad_a.norm() > 0.01
    assert ((grad_a - grad_b).norm(dim=-1) <= 2e-6 * mass.norm(dim=-1)).all()  # each may be 1e-6 off


@pytest.mark.parametrize("mode", ["ghost", *soak("sampled")])
def test_fused_heads_in_chunks(mode: str, served: Serve) -> None:
    """A head with bias and soft cap, labels, weights: as the definition computes it."""
    emulator = served()
    _, teacher = cases.pair("ordinary", 5, 301, torch.float32)
    rows = largest(teacher, 12)
    tail = torch.full_like(rows.log_tail, -torch.inf) if mode == "sampled" else rows.log_tail
    kind = "sampled" if mode == "sampled" else "topk"
    known = kd.SparseLogits(rows.ids, rows.log_probs, tail, 301, kind=kind)
    options = {"labels": torch.tensor([3, 300, 0, -100, 7]), "ce_weight": 0.4, "sparse_mode": mode,
               "token_weights": torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0]), "chunk_bytes": 2 * 301 * 4}  # fmt: skip
    results = []
    for backend in ("eager", "triton"):
        head = cases.linear(5, 12, 301, torch.float32, bias=True, softcap=5.0, scale=2.0)
        leaves = [x.detach().requires_grad_() for x in (head.hidden, head.weight, head.bias) if x is not None]
        student = kd.LinearLogits(*leaves, softcap=5.0, scale=2.0)
        loss = kd.distillation_loss(student, known, backend=backend, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert len(emulator.reports) > 2  # more than one chunk
    for a, b in zip(*results, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() <= 3e-6 * a.norm()


@pytest.mark.parametrize(("pad", "begin"), [(24, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *soak(torch.float32, torch.float16)], ids=ids)
@pytest.mark.parametrize("mode", ["ghost", *soak("truncate")])
def test_memory_that_is_laid_out_otherwise_in_place(
    mode: str, dtype: torch.dtype, pad: int, begin: int, served: Serve
) -> None:
    """Strided rows, unaligned rows, padding of the vocabulary, a head's form; the gradient over the logits."""
    served()
    for form_of_head in (False, True):
        student, teacher = cases.pair("ordinary", 4, 1029, dtype)
        space = torch.full((4, 1029 + pad), 9.0, dtype=dtype)
        x = space[:, begin : begin + 1029 + (0 if begin else 2)]
        x[:, :1029] = student
        labels = torch.tensor([0, 1028, 7, 9])
        bias = torch.randn(1029, generator=torch.Generator().manual_seed(0))
        side = Side(x, bias, 0.5, 8.0) if form_of_head else Side(x)
        spec = RowSpec("forward_kl", 0.0, 0.0, 1.5, 1029, mode)
        compare(side, largest(teacher, 33, 1.5), weights(4, labels), spec, inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_beyond_2_to_the_31_elements(inplace: bool, served: Serve) -> None:
    """Rows 2^30 entries apart; kept entries are written over what the sweep over the row has left."""
    served()
    student, teacher = cases.pair("ordinary", 4, 1000, torch.bfloat16)
    known, spec = largest(teacher[:, :992], 31), RowSpec("forward_kl", 0.0, 0.0, 1.0, 992, "ghost")
    made = []
    for rows in (torch.empty(4, 1000, dtype=torch.bfloat16),
                 torch.empty(3 * 2**30 + 1000, dtype=torch.bfloat16).as_strided((4, 1000), (2**30, 1))):  # fmt: skip
        rows.copy_(student if inplace else torch.full_like(student, 7.0))
        loss = torch.empty(4)
        sparse_rows_("triton", Side(rows if inplace else student), known, weights(4, None), spec, loss, rows, None)
        made.append((loss, rows.clone(memory_format=torch.contiguous_format)))
    assert all(torch.equal(near, far) for near, far in zip(*made, strict=True))
    assert (made[1][1][[0, 1, 3], :992].float().norm(dim=-1) > 0.01).all()


def test_rows_that_are_no_teacher_are_nan(served: Serve) -> None:
    served()
    student, teacher = cases.pair("ordinary", 5, 301, torch.float32)
    for spoil in range(8):
        known = largest(teacher, 9)
        changed = SparseRows(*(x.clone() for x in known))
        if spoil == 0:
            changed.ids[1, 3] = changed.ids[1, 2]  # repeated
        elif spoil == 1:
            changed.ids[1, 8] = 301  # outside
        elif spoil == 2:
            changed.ids[1, 4] = -1  # goes on after a -1
        elif spoil == 3:
            changed.log_probs[1, 4] = torch.nan
        elif spoil == 4:
            changed.log_tail[1] = torch.nan
        elif spoil == 5:
            changed.ids[1], changed.log_tail[1] = -1, -torch.inf  # no mass anywhere
        elif spoil == 6:
            student[1, int(known.ids[1, 0])] = torch.nan
        else:
            student[1] = -torch.inf
        due = definition(Side(student), changed, weights(5, None), RowSpec("jsd", 0.5, 0.0, 1.0, 301, "ghost"), student)
        assert due[0].isnan().tolist() == [False, True, False, False, False]
        compare(Side(student), changed, weights(5, None), RowSpec("jsd", 0.5, 0.0, 1.0, 301, "ghost"))


@pytest.mark.parametrize("mode", ["ghost", "truncate", "renormalize", "sampled"])
def test_a_row_with_all_its_mass_in_the_tail(mode: str, served: Serve) -> None:
    """As the definition has it: 0 where the mode takes the tail, else NaN."""
    served()
    student, teacher = cases.pair("ordinary", 5, 301, torch.bfloat16)
    known = largest(teacher, 9)
    known.ids[1], known.log_tail[1] = -1, 0.0
    known.log_probs[4], known.log_tail[4] = -torch.inf, 0.0
    labels = torch.tensor([0, 300, 5, 9, 11])
    spec = RowSpec("forward_kl", 0.0, 0.0, 1.0, 301, mode)
    due = definition(Side(student), known, weights(5, labels), spec, student)
    takes_tail = mode in ("ghost", "truncate")
    assert due[0].isnan().tolist() == [False, not takes_tail, False, False, not takes_tail]
    compare(Side(student), known, weights(5, labels), spec)


def test_no_dense_teacher_and_nothing_unwritten_is_read(served: Serve) -> None:
    """Through the public function; what a row costs does not depend on K."""
    emulator = served()
    student, teacher = cases.pair("ordinary", 2, 32768, torch.bfloat16)
    counts = []
    for k in (16, 512):
        rows = largest(teacher, k, ragged=False)
        with emulator.poison():
            leaf = student.clone().requires_grad_()
            given = kd.SparseLogits(rows.ids, rows.log_probs, rows.log_tail, 32768)
            kd.distillation_loss(leaf, given, "jsd", backend="triton").backward()
        report = emulator.reports[-2]  # before the scaling
        counts.append(report.thread_instructions)
        assert report.load_sectors * 32 <= 2.1 * student.nbytes + 2 * k * 14 * 32
        assert report.store_sectors * 32 <= 1.1 * student.nbytes + 2 * k * 4 * 32
        assert max(report.widths()["load"]) == max(report.widths()["store"]) == 16
    assert counts[1] <= 1.2 * counts[0]

"""`kdkernels.switch_gate`: divergence, decision and token, against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import golden_gate as golden
import pytest
import torch

import kdkernels as kd

pytestmark = pytest.mark.sample(3)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXED = ((torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.float64))
VOCABULARIES = (1, 2, 127, 129, 301, 4096, 8193, 50257, 151936)
SHAPES = ({}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9, "temperature": 1.4})
EDGE = 1e-4


def pair(
    rows: int, vocab: int, dtypes: tuple[torch.dtype, torch.dtype], scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000003 + vocab)
    zs, zt = (scale * torch.randn(rows, vocab, generator=generator) for _ in range(2))
    return zs.to(dtypes[0]), (0.6 * zt + 0.4 * zs).to(dtypes[1])


def uniforms(rows: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_jsd(found: torch.Tensor, zs: torch.Tensor, zt: torch.Tensor) -> None:
    expected = golden.jsd_bits(zs, zt)
    assert ((found.double() - expected).abs() <= 5e-7 + 5e-7 * expected).all(), (found, expected)


def check_tokens(found: kd.SwitchDecision, zs: torch.Tensor, zt: torch.Tensor, u: torch.Tensor, **shape: float) -> None:
    for row in range(len(u)):
        z = zt[row] if found.from_teacher[row] else zs[row]
        expected, distance = golden.token(golden.distribution(z, **shape), float(u[row]))  # type: ignore[arg-type]
        assert int(found.token[row]) == expected or distance < EDGE, (row, int(found.token[row]), expected, distance)


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + list(MIXED), ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_values(backend: str, vocab: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rows = 3
    zs, zt = pair(rows, vocab, dtypes)
    threshold, u = torch.tensor([-1.0, 2.0, float(golden.jsd_bits(zs, zt)[2]) - 1e-3]), uniforms(rows)
    found = kd.switch_gate(zs, zt, threshold, uniforms=u, backend=backend)
    check_jsd(found.jsd, zs, zt)
    check_tokens(found, zs, zt, u)
    assert found.from_teacher.tolist() == [True, False, True]
    assert found.jsd.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert (found.token.dtype, found.from_teacher.dtype) == (torch.int64, torch.bool)


def test_the_paper_s_example(backend: str) -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    found = kd.switch_gate(q, p, 0.2, uniforms=torch.tensor([0.75]), backend=backend)
    assert abs(float(found.jsd) - 0.218364) < 1e-6
    assert (found.from_teacher.item(), found.token.item()) == (True, 1)  # .7 <= .75 < .9
    found = kd.switch_gate(q, p, 0.22, uniforms=torch.tensor([0.75]), backend=backend)
    assert (found.from_teacher.item(), found.token.item()) == (False, 2)  # .5 <= .75


@pytest.mark.parametrize("size", [1e-4, 3e-3, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_divergences(backend: str, dtype: torch.dtype, size: float) -> None:
    zs, noise = pair(2, 5003, (dtype, dtype))
    zt = zs + size * noise
    expected = golden.jsd_bits(zs, zt)
    found = kd.switch_gate(zs, zt, 0.5, do_sample=False, backend=backend).jsd.double()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    if backend == "eager":
        assert ((found - expected).abs() <= 1e-14 + 1e-6 * expected).all()
    else:
        assert ((found / expected - 1).abs() < tolerance).all(), found / expected - 1
    assert 1e-12 < expected.max() < 1


def test_threshold_is_strict_and_divergence_clamped(backend: str) -> None:
    zs, zt = pair(4, 301, (torch.float32, torch.float32))
    jsd = kd.switch_gate(zs, zt, 0.0, do_sample=False, backend=backend).jsd
    at = kd.switch_gate(zs, zt, jsd, do_sample=False, backend=backend)
    below = kd.switch_gate(zs, zt, jsd.double() - 1e-9, do_sample=False, backend=backend)
    assert not at.from_teacher.any()
    assert below.from_teacher.all()
    same = kd.switch_gate(zs, zs, 0.0, do_sample=False, backend=backend)
    assert (same.jsd.double() < 1e-15).all()
    assert (same.jsd >= 0).all()
    assert not kd.switch_gate(zs, zs, 1e-12, do_sample=False, backend=backend).from_teacher.any()
    one_hot = torch.full((2, 5000), -torch.inf).scatter_(1, torch.tensor([[1], [4999]]), 3.0)
    apart = kd.switch_gate(one_hot, one_hot.flip(0), 1.0, uniforms=uniforms(2), backend=backend)
    assert ((apart.jsd - 1).abs() < 1e-6).all()
    assert (apart.jsd <= 1).all()
    assert not apart.from_teacher.any()
    assert apart.token.tolist() == [1, 4999]
    always = kd.switch_gate(one_hot, one_hot.flip(0), -math.inf, uniforms=uniforms(2), backend=backend)
    assert always.token.tolist() == [4999, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_entries(backend: str, dtype: torch.dtype) -> None:
    zs, zt = pair(5, 9001, (dtype, dtype))
    zs[0, :5000] = -torch.inf
    zt[1, 4000:] = -torch.inf
    zs[2, ::2] = zt[2, ::2] = -torch.inf
    zs[3, 1:] = -torch.inf
    zt[4] = torch.finfo(dtype).min
    zt[4, 17] = 1.0
    u = uniforms(5)
    for threshold in (-1.0, 2.0):
        found = kd.switch_gate(zs, zt, threshold, uniforms=u, backend=backend)
        check_jsd(found.jsd, zs, zt)
        check_tokens(found, zs, zt, u)


@pytest.mark.parametrize("shift", [-8192.0, 8192.0])
def test_far_from_zero(backend: str, shift: float) -> None:
    zs, zt = pair(3, 12000, (torch.float32, torch.float32))
    zs, zt = zs + shift, zt - shift
    found = kd.switch_gate(zs, zt, 0.1, uniforms=uniforms(3), backend=backend)
    check_jsd(found.jsd, zs, zt)
    check_tokens(found, zs, zt, uniforms(3))


@pytest.mark.parametrize("offset", [-100.0, 3000.0])
def test_masked_against_far_from_zero(backend: str, offset: float) -> None:
    """What takes a quick way and what takes a careful one must mean the same normaliser."""
    zs, zt = pair(3, 12000, (torch.float32, torch.float32))
    zs, zt = zs + offset, torch.where(zt > 0, zt, -torch.inf)
    for ours, theirs in ((zs, zt), (zt, zs)):
        check_jsd(kd.switch_gate(ours, theirs, 0.1, do_sample=False, backend=backend).jsd, ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_entries_far_below_the_largest(backend: str, dtype: torch.dtype) -> None:
    """At the end of what a float32 exponential can say, wherever that is."""
    below = torch.arange(60.0, 100.0, 0.05)
    zs = torch.zeros(len(below), 4096).to(dtype)
    zs[:, 1234] = -below.to(dtype)
    zt = zs.flip(0).roll(7, 1)
    found = kd.switch_gate(zs, zt, 0.0, do_sample=False, backend=backend)
    check_jsd(found.jsd, zs, zt)
    zs[:, 5] = zt[:, 9] = 30.0
    found = kd.switch_gate(zs, zt, 2.0, do_sample=False, backend=backend)
    check_jsd(found.jsd, zs, zt)
    assert found.token.unique().tolist() == [5]


@pytest.mark.parametrize("kind", ["peaked", "flat", "late peak", "ascending", "wide"])
def test_hard_rows(backend: str, kind: str) -> None:
    i, noise = torch.arange(20011.0), torch.randn(2, 20011, generator=torch.Generator().manual_seed(1))
    rows = {
        "peaked": torch.where(i == 12345, 60.0, 0.0) + noise,
        "flat": 1e-3 * noise,
        "late peak": torch.where(i > 20005, 90.0, 0.0) + noise,  # far above what the first entries show
        "ascending": i * 1e-2 + noise,
        "wide": 60 * noise,
    }[kind]
    zs, zt, u = rows[:1], rows[1:], uniforms(1)
    for threshold in (-1.0, 2.0):
        found = kd.switch_gate(zs, zt, threshold, uniforms=u, backend=backend)
        check_jsd(found.jsd, zs, zt)
        check_tokens(found, zs, zt, u)
    found = kd.switch_gate(zs, zt, -1.0, do_sample=False, backend=backend)
    assert found.token.item() == int(zt[0].argmax())


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


def test_heads_padding_and_strides(backend: str) -> None:
    hidden, weight, bias = torch.randn(3, 16), torch.randn(500, 16), torch.randn(500)
    head = kd.LinearLogits(hidden, weight, bias, softcap=4.0, scale=0.7)
    zs, u = head.materialize(), uniforms(3)
    wide = torch.randn(6, 1000)
    zt = wide[::2, 7:512]
    found = kd.switch_gate(head, zt, 0.1, uniforms=u, vocab_size=490, backend=backend)
    expected = kd.switch_gate(zs[:, :490].clone(), zt[:, :490].clone(), 0.1, uniforms=u, backend=backend)
    assert torch.equal(found.token, expected.token)
    assert torch.allclose(found.jsd, expected.jsd, rtol=0, atol=1e-6)
    transposed = zt[:, :490].t().contiguous().t()
    assert torch.equal(
        kd.switch_gate(zs, transposed, 0.1, uniforms=u, vocab_size=490, backend=backend).jsd, expected.jsd
    )
    repeated = zt[:1, :490].expand(3, -1)
    assert len(set(kd.switch_gate(repeated, repeated, 0.1, do_sample=False, backend=backend).token.tolist())) == 1


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


def test_no_rows(backend: str) -> None:
    found = kd.switch_gate(torch.empty(0, 7), torch.empty(0, 7), 0.1, backend=backend)
    assert [list(x.shape) for x in found] == [[0]] * 3


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    try:
        for rows, vocab, dtype in ((1, 151936, torch.float32), (5, 40001, torch.bfloat16), (2, 9000, torch.float16)):
            zs, zt = pair(rows, vocab, (dtype, dtype))
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found += [kd.switch_gate(zs, zt, 0.1, uniforms=uniforms(rows)) for _ in range(3)]
            for name in ("token", "from_teacher", "jsd"):
                assert all(torch.equal(getattr(f, name), getattr(found[0], name)) for f in found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets(isa: str) -> None:
    chosen = "test_values and 8193 or test_masked or test_small or test_hard or test_most or test_shapes and 5003"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--backends",
        "cpp",
        "-k",
        chosen,
        __file__,
        "-p",
        "no:xdist",
    ]
    ran = subprocess.run(
        command, env={**os.environ, "KDKERNELS_ISA": isa}, capture_output=True, text=True, check=False,
        cwd=os.path.dirname(__file__),
    )  # fmt: skip
    if "this machine runs:" in ran.stdout:  # refused: this processor has no such instructions
        pytest.skip(f"no {isa} here")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_operator(backend: str) -> None:
    zs, zt = pair(3, 300, (torch.float32, torch.bfloat16))
    head = (torch.randn(3, 6), torch.randn(300, 6), torch.randn(300), 0.5, 3.0)
    numbers = (torch.full((3,), 0.2, dtype=torch.float64), uniforms(3))
    plain = (None, None, 1.0, 0.0)
    for arguments in (
        (zs, *plain, zt, *plain, *numbers, 1.0, 0, 1.0, 290, backend),
        (*head, zs, *plain, numbers[0], None, 0.7, 5, 0.5, 300, backend),
    ):
        torch.library.opcheck(torch.ops.kdkernels.gate.default, arguments)


def test_compiles(backend: str) -> None:
    zs, zt = pair(3, 300, (torch.float32, torch.float32))

    def step(student: torch.Tensor, teacher: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return kd.switch_gate(student, teacher, 0.2, uniforms=u, backend=backend).token + 1

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(zs, zt, uniforms(3)), step(zs, zt, uniforms(3)))


def test_gradients_stop_here(backend: str) -> None:
    zs, zt = pair(2, 50, (torch.float32, torch.float32))
    found = kd.switch_gate(zs.requires_grad_(), zt, 0.2, backend=backend)
    assert not found.jsd.requires_grad


NAN, INF = math.nan, math.inf
BAD = {
    "student_logits row 1": {"student_logits": torch.tensor([[0.0, 1.0], [NAN, 0.0]])},
    "teacher_logits row 0": {"teacher_logits": torch.tensor([[-INF, -INF], [1.0, 0.0]])},
    "student_logits row 0": {"student_logits": torch.tensor([[INF, 1.0], [1.0, 0.0]])},
    "threshold[1] = nan": {"threshold": torch.tensor([0.1, NAN])},
    "threshold = nan": {"threshold": NAN},
    "threshold = True": {"threshold": True},
    "threshold shape = [3]": {"threshold": torch.zeros(3)},
    "threshold dtype": {"threshold": torch.zeros(2, dtype=torch.int64)},
    "uniforms[0] = 1.0": {"uniforms": torch.tensor([1.0, 0.5])},
    "uniforms[1] = -0.5": {"uniforms": torch.tensor([0.0, -0.5])},
    "uniforms[0] = nan": {"uniforms": torch.tensor([NAN, 0.5])},
    "uniforms shape = [2, 1]": {"uniforms": torch.zeros(2, 1)},
    "uniforms dtype": {"uniforms": torch.zeros(2, dtype=torch.int64)},
    "uniforms = list": {"uniforms": [0.5, 0.5]},
    "generator": {"uniforms": torch.zeros(2), "generator": torch.Generator()},
    "student_logits shape = [1, 2, 2]": {"student_logits": torch.zeros(1, 2, 2)},
    "student_logits shape = [2, 0]": {"student_logits": torch.zeros(2, 0)},
    "student_logits = list": {"student_logits": [[0.0, 1.0]]},
    "teacher_logits dtype": {"teacher_logits": torch.zeros(2, 2, dtype=torch.int64)},
    "rows = student 2, teacher 3": {"teacher_logits": torch.zeros(3, 2)},
    "vocabularies = student 2, teacher 4": {"teacher_logits": torch.zeros(2, 4)},
    "vocab_size = 3": {"vocab_size": 3},
    "vocab_size = 0": {"vocab_size": 0},
    "temperature = 0": {"temperature": 0},
    "temperature = nan": {"temperature": NAN},
    "top_k = 0": {"top_k": 0},
    "top_k = 2.0": {"top_k": 2.0},
    "top_p = 0": {"top_p": 0.0},
    "top_p = 1.5": {"top_p": 1.5},
    "do_sample = 1": {"do_sample": 1},
    "backend = 'cude'": {"backend": "cude"},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("said", BAD)
def test_bad_input(said: str) -> None:
    given = {"student_logits": torch.zeros(2, 2), "teacher_logits": torch.ones(2, 2), "threshold": 0.1, **BAD[said]}
    with pytest.raises((ValueError, TypeError)) as error:
        kd.switch_gate(**given)  # type: ignore[arg-type]
    assert str(error.value).startswith(said), error.value


def test_bad_rows_leave_others_alone(backend: str) -> None:
    """Where values are not looked at: token -1."""
    zs, zt = pair(5, 5000, (torch.float32, torch.float32))
    zs[0, 4999], zt[1, 3], zs[2] = NAN, INF, -INF
    threshold = torch.tensor([0.1, 0.1, 0.1, NAN, 0.1]).double()
    u = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0]).double()
    plain = (None, None, 1.0, 0.0)
    for kept in ((1.0, 0, 1.0), (0.5, 3, 0.5)):
        token, from_teacher, jsd = torch.ops.kdkernels.gate(zs, *plain, zt, *plain, threshold, u, *kept, 5000, backend)
        assert token.tolist() == [-1] * 5
        assert jsd.isnan().tolist() == [True] * 4 + [False]
        assert not from_teacher[:4].any()
    good = kd.switch_gate(zs[4:], zt[4:], 0.1, uniforms=uniforms(1), backend=backend)
    u = uniforms(1).expand(5).contiguous()
    both = torch.ops.kdkernels.gate(zs, *plain, zt, *plain, threshold, u, 1.0, 0, 1.0, 5000, backend)
    assert both[0][4] == good.token[0]


def test_native_leaf_checks_its_arguments() -> None:
    native = pytest.importorskip("kdkernels.native")
    if native.why_not_gate():
        pytest.skip(native.why_not_gate())
    from kdkernels import leaves

    z, numbers = torch.zeros(2, 4), torch.zeros(2, dtype=torch.float64)
    outputs = (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), torch.zeros(2))

    def call(student=z, teacher=z, threshold=numbers, draws=numbers, rest=(1.0, 0, 1.0, 4), results=outputs) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
        leaves.gate_(student, None, 1.0, 0.0, teacher, None, 1.0, 0.0, threshold, draws, *rest, *results)

    call()
    for said, given in {
        "teacher has 3 rows": {"teacher": torch.zeros(3, 4)},
        "teacher has 3 columns": {"teacher": torch.zeros(2, 3)},
        "both must be float64": {"teacher": z.double()},
        "threshold is float32": {"threshold": torch.zeros(2)},
        "uniforms has shape [3]": {"draws": torch.zeros(3, dtype=torch.float64)},
        "temperature is 0": {"rest": (0.0, 0, 1.0, 4)},
        "top_k is -1": {"rest": (1.0, -1, 1.0, 4)},
        "top_p is 0": {"rest": (1.0, 0, 0.0, 4)},
        "vocab is 0": {"rest": (1.0, 0, 1.0, 0)},
        "token is int32": {"results": (outputs[0].int(), *outputs[1:])},
        "jsd has shape [1]": {"results": (*outputs[:2], torch.zeros(1))},
    }.items():
        with pytest.raises(RuntimeError) as error:
            call(**given)
        assert said in str(error.value), (said, error.value)


def test_explain_names_the_backend_of_the_gate() -> None:
    zs = torch.zeros(2, 5)
    found = kd.explain(zs, zs, "switch_gate")
    assert found.backend == next(v.backend for v in found.verdicts if v.serves)
    assert {v.backend for v in found.verdicts} == {"eager", "cpp", "triton", "cuda"}
    assert kd.explain(zs, zs, "switch_gate", backend="eager").backend == "eager"
    with pytest.raises(ValueError, match="options"):
        kd.explain(zs, zs, "switch_gate", temperature=2.0)

"""`kdkernels.switch_gate`: forms of a call, operator, compiler, wrong input."""

from __future__ import annotations

import pytest
import torch
from gate_cases import INF, NAN, pair, uniforms

import kdkernels as kd

pytestmark = pytest.mark.sample(3)


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


def test_no_rows(backend: str) -> None:
    found = kd.switch_gate(torch.empty(0, 7), torch.empty(0, 7), 0.1, backend=backend)
    assert [list(x.shape) for x in found] == [[0]] * 3


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

"""Every error in the arguments names the argument, its value, and what to do instead."""
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import _checks

V = 11


def logits(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*(shape or (4, V)), **options)


def head(vocab: int = V, **options: Any) -> kd.LinearLogits:
    return kd.LinearLogits(torch.randn(4, 5), torch.randn(vocab, 5), **options)


def loss(student: Any = None, teacher: Any = None, *args: Any, **options: Any) -> Any:
    student = logits() if student is None else student
    return kd.distillation_loss(student, logits() if teacher is None else teacher, *args, **options)


LABELS = torch.tensor([1, 2, 3, 4])
FLOATS = torch.ones(4)


def changed(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[2] = value
    return x


# what is wrong: (error, argument, value as printed, remedy as printed, call)
CASES: dict[str, tuple[type[Exception], str, str, str, Callable[[], Any]]] = {
    # scalars
    "temperature tiny": (ValueError, "temperature", "1e-07", "1.0 compares", lambda: loss(temperature=1e-7)),
    "no loss at all": (ValueError, "kd_weight, ce_weight", "0, 0", "no loss", lambda: loss(kd_weight=0, ce_weight=0)),
    "sparse mode": (ValueError, "sparse_mode", "sampled", "leave it out", lambda: loss(sparse_mode="sampled")),
    "temperature zero": (ValueError, "temperature", "0", "1.0 compares", lambda: loss(temperature=0)),
    "temperature negative": (ValueError, "temperature", "-1.5", "1.0 compares", lambda: loss(temperature=-1.5)),
    "temperature nan": (ValueError, "temperature", "nan", "finite number", lambda: loss(temperature=float("nan"))),
    "temperature inf": (ValueError, "temperature", "inf", "finite number", lambda: loss(temperature=float("inf"))),
    "temperature text": (ValueError, "temperature", "'2'", "finite number", lambda: loss(temperature="2")),
    "temperature bool": (ValueError, "temperature", "True", "finite number", lambda: loss(temperature=True)),
    "temperature tensor": (ValueError, "temperature", "tensor(2.)", "number", lambda: loss(temperature=torch.tensor(2.0))),
    "shift text": (TypeError, "shift", "'yes'", "True or False", lambda: loss(shift="yes")),
    "inplace number": (TypeError, "inplace", "1", "True or False", lambda: loss(inplace=1)),
    "stats text": (TypeError, "return_stats", "'x'", "True or False", lambda: loss(return_stats="x")),
    "items complex": (ValueError, "num_items", "complex64", "a constant number", lambda: loss(num_items=torch.tensor(3 + 1j))),
    "items bool": (ValueError, "num_items", "bool", "a constant number", lambda: loss(num_items=torch.tensor(True))),
    "items grad": (ValueError, "num_items", "requires grad", "a constant", lambda: loss(num_items=torch.ones((), requires_grad=True))),
    "student sparse": (TypeError, "student", "sparse_coo", "a dense tensor", lambda: loss(student=torch.ones(3, 5).to_sparse())),
    "scaling": (ValueError, "temperature_scaling", "'t3'", "one of 'none', 't2'", lambda: loss(temperature_scaling="t3")),
    "kd_weight": (ValueError, "kd_weight", "-1", ">= 0; ", lambda: loss(kd_weight=-1)),
    "kd_weight nan": (ValueError, "kd_weight", "nan", "finite number", lambda: loss(kd_weight=float("nan"))),
    "ce_weight": (ValueError, "ce_weight", "-0.5", ">= 0; ", lambda: loss(ce_weight=-0.5, labels=LABELS)),
    "ce_weight text": (ValueError, "ce_weight", "'1'", "finite number", lambda: loss(ce_weight="1", labels=LABELS)),
    "chunk_bytes zero": (ValueError, "chunk_bytes", "0", "int > 0 or None", lambda: loss(head(), chunk_bytes=0)),
    "chunk_bytes float": (ValueError, "chunk_bytes", "1000000.0", "int > 0", lambda: loss(head(), chunk_bytes=1e6)),
    "chunk_bytes bool": (ValueError, "chunk_bytes", "True", "int > 0 or None", lambda: loss(head(), chunk_bytes=True)),
    "vocab_size zero": (ValueError, "vocab_size", "0", "int > 0 or None", lambda: loss(vocab_size=0)),
    "vocab_size text": (ValueError, "vocab_size", "'all'", "int > 0 or None", lambda: loss(vocab_size="all")),
    "vocab_size large": (ValueError, "vocab_size", "12", "student 11, teacher 11", lambda: loss(vocab_size=V + 1)),
    "ignore_index none": (ValueError, "ignore_index", "None", "int; ", lambda: loss(labels=LABELS, ignore_index=None)),
    "ignore_index float": (ValueError, "ignore_index", "0.5", "int; ", lambda: loss(labels=LABELS, ignore_index=0.5)),
    # reduction
    "reduction": (ValueError, "reduction", "'avg'", "'mean', 'sum', 'none'", lambda: loss(reduction="avg")),
    "reduction near": (ValueError, "reduction", "'means'", "did you mean 'mean'", lambda: loss(reduction="means")),
    "num_items and sum": (ValueError, "num_items", "3", "None with reduction='sum'", lambda: loss(reduction="sum", num_items=3)),
    "num_items and none": (ValueError, "num_items", "3", "None with reduction='none'", lambda: loss(reduction="none", num_items=3)),
    "num_items zero": (ValueError, "num_items", "0", "count the tokens", lambda: loss(num_items=0)),
    "num_items negative": (ValueError, "num_items", "-2.5", "count the tokens", lambda: loss(num_items=-2.5)),
    "num_items nan": (ValueError, "num_items", "nan", "count the tokens", lambda: loss(num_items=float("nan"))),
    "num_items inf": (ValueError, "num_items", "inf", "count the tokens", lambda: loss(num_items=float("inf"))),
    "num_items text": (ValueError, "num_items", "'3'", "a number or a 0-dim tensor", lambda: loss(num_items="3")),
    "num_items bool": (ValueError, "num_items", "True", "a number or a 0-dim tensor", lambda: loss(num_items=True)),
    "num_items tensor": (ValueError, "num_items", "-1", "count the tokens", lambda: loss(num_items=torch.tensor(-1))),
    "num_items vector": (ValueError, "num_items", "[2]", "a 0-dim tensor", lambda: loss(num_items=torch.ones(2))),
    # what later issues bring
    "group": (TypeError, "group", "'tp'", "a ProcessGroup, a one-dimensional", lambda: loss(group="tp")),
    "sparse_mode": (ValueError, "sparse_mode", "'gost'", "did you mean 'ghost'", lambda: loss(sparse_mode="gost")),
    # the two sides
    "student type": (TypeError, "student", "list", "a tensor of logits or kd.LinearLogits", lambda: loss([1.0])),
    "teacher type": (TypeError, "teacher", "str", "a tensor of logits or kd.LinearLogits", lambda: loss(logits(), "logits")),
    "student integers": (TypeError, "student dtype", "torch.int64", "float32", lambda: loss(torch.ones(4, V).long())),
    "teacher complex": (TypeError, "teacher dtype", "complex64", "float32", lambda: loss(teacher=torch.ones(4, V) * 1j)),
    "student float8": (TypeError, "student dtype", "float8_e5m2", "float32", lambda: loss(logits().to(torch.float8_e5m2), logits().to(torch.float8_e5m2))),
    "student scalar": (ValueError, "student shape", "[]", "[..., V] with V >= 1", lambda: loss(torch.tensor(1.0))),
    "no vocabulary": (ValueError, "student shape", "[4, 0]", "V >= 1", lambda: loss(logits(4, 0), logits(4, 0))),
    "teacher grad": (ValueError, "teacher", "requires grad", "detach()", lambda: loss(teacher=logits(4, V, requires_grad=True))),
    "teacher hidden grad": (ValueError, "teacher.hidden", "requires grad", "detach()", lambda: loss(teacher=kd.LinearLogits(torch.randn(4, 5, requires_grad=True), torch.randn(V, 5)))),
    "dtypes": (ValueError, "teacher dtype", "torch.bfloat16", "that of the student, torch.float32; use .to(torch.float32)", lambda: loss(teacher=logits().bfloat16())),
    "devices": (ValueError, "teacher device", "meta", "that of the student, cpu; use .to(cpu)", lambda: loss(teacher=logits(4, V, device="meta"))),
    "leading shapes": (ValueError, "teacher shape", "[3, 11]", "the student's leading shape [4]", lambda: loss(teacher=logits(3, V))),
    "leading dims": (ValueError, "teacher shape", "[2, 2, 11]", "the student's leading shape [4]", lambda: loss(teacher=logits(2, 2, V))),
    "vocabularies": (ValueError, "vocabularies", "student 11, teacher 13", "pass vocab_size=", lambda: loss(teacher=logits(4, 13))),
    "vocabularies of heads": (ValueError, "vocabularies", "student 13, teacher 11", "pass vocab_size=", lambda: loss(head(13))),
    "vocab_size of one": (ValueError, "vocab_size", "12", "student 13, teacher 11", lambda: loss(head(13), vocab_size=12)),
    # tokens
    "no labels": (ValueError, "labels", "None", "given when ce_weight = 0.5; pass the token ids", lambda: loss(ce_weight=0.5)),
    "labels list": (TypeError, "labels", "list", "a torch.Tensor; ", lambda: loss(labels=[1, 2, 3, 4])),
    "labels shape": (ValueError, "labels shape", "[3]", "the logits' leading shape [4]; ", lambda: loss(labels=LABELS[:3])),
    "labels shape shift": (ValueError, "labels shape", "[2, 2]", "leading shape [2, 3]; ", lambda: loss(logits(2, 3, V), logits(2, 3, V), labels=torch.ones(2, 2).long(), shift=True)),
    "labels floats": (TypeError, "labels dtype", "torch.float32", "an integer dtype; ", lambda: loss(labels=FLOATS)),
    "labels bools": (TypeError, "labels dtype", "torch.bool", "an integer dtype; ", lambda: loss(labels=FLOATS.bool())),
    "labels device": (ValueError, "labels device", "meta", "that of the logits, cpu; ", lambda: loss(labels=LABELS.to("meta"))),
    "labels high": (ValueError, "labels", "11", "in [0, 11) or ignore_index; mark tokens", lambda: loss(labels=changed(LABELS, V), ce_weight=1.0)),
    "labels low": (ValueError, "labels", "-1", "in [0, 11) or ignore_index; mark tokens", lambda: loss(labels=changed(LABELS, -1), ce_weight=1.0)),
    "labels high without ce": (ValueError, "labels", "11", "in [0, 11)", lambda: loss(labels=changed(LABELS, V))),
    "labels in the padding": (ValueError, "labels", "9", "in [0, 9)", lambda: loss(labels=changed(LABELS, 9), vocab_size=9)),
    "labels not the ignored": (ValueError, "labels", "-100", "in [0, 11)", lambda: loss(labels=changed(LABELS, -100), ignore_index=0)),
    "token_weights list": (TypeError, "token_weights", "list", "a torch.Tensor; ", lambda: loss(token_weights=[1.0])),
    "token_weights shape": (ValueError, "token_weights shape", "[4, 1]", "leading shape [4]; ", lambda: loss(token_weights=FLOATS[:, None])),
    "token_weights device": (ValueError, "token_weights device", "meta", "logits, cpu; ", lambda: loss(token_weights=FLOATS.to("meta"))),
    "token_weights negative": (ValueError, "token_weights", "-0.25", "finite and >= 0; use 0", lambda: loss(token_weights=changed(FLOATS, -0.25))),
    "token_weights nan": (ValueError, "token_weights", "nan", "finite and >= 0; use 0", lambda: loss(token_weights=changed(FLOATS, float("nan")))),
    "token_weights inf": (ValueError, "token_weights", "inf", "finite and >= 0; use 0", lambda: loss(token_weights=changed(FLOATS, float("inf")))),
    "token_weights grad": (ValueError, "token_weights", "requires grad", "pass .detach()", lambda: loss(token_weights=torch.ones(4, requires_grad=True))),
    "shift of one row": (ValueError, "shift", "True", "leading shape is []", lambda: loss(logits(V), logits(V), shift=True)),
    "shift of nothing": (ValueError, "shift", "True", "leading shape is [2, 0]", lambda: loss(logits(2, 0, V), logits(2, 0, V), shift=True)),
    # divergences
    "divergence": (ValueError, "divergence", "'foward_kl'", "did you mean 'forward_kl'", lambda: loss(None, None, "foward_kl")),
    "divergence far": (ValueError, "divergence", "'xyzzy'", "known: adaptive_kl, alpha_beta", lambda: loss(None, None, "xyzzy")),
    "divergence type": (TypeError, "divergence", "3", "names: adaptive_kl, alpha_beta", lambda: loss(None, None, 3)),
    "divergence class": (TypeError, "divergence", "JSD", "such as JSD()", lambda: loss(None, None, kd.JSD)),
    "beta": (ValueError, "beta", "1.5", "0 <= beta <= 1. beta weighs the teacher", lambda: kd.JSD(beta=1.5)),
    "beta nan": (ValueError, "beta", "nan", "0 <= beta <= 1", lambda: kd.JSD(beta=float("nan"))),
    "beta text": (TypeError, "beta", "'half'", "a number", lambda: kd.JSD(beta="half")),
    "skew": (ValueError, "alpha", "-0.1", "alpha", lambda: kd.SkewKL(alpha=-0.1)),
    "skew reverse": (ValueError, "alpha", "1.1", "alpha", lambda: kd.SkewReverseKL(alpha=1.1)),
    "alpha beta small": (ValueError, "alpha", "0.01", "use 0, which takes the limit", lambda: kd.AlphaBeta(0.01, 0.5)),
    "alpha beta negative": (ValueError, "beta", "-1", "0, or 0.05 <= beta", lambda: kd.AlphaBeta(0.5, -1)),
    "mu": (ValueError, "mu", "1", "0 < mu < 1. mu is the teacher's mass", lambda: kd.AdaptiveKL(mu=1.0)),
    # backends
    "backend": (ValueError, "backend", "'cp'", "did you mean 'cpp'", lambda: loss(backend="cp")),
    "backend triton": (ValueError, "backend", "'triton'", "use backend='auto'", lambda: loss(backend="triton")),
    "backend cuda": (ValueError, "backend", "'cuda'", "serves CUDA tensors, these are on cpu; use backend='auto'", lambda: kd.explain(logits(), backend="cuda")),
    # in place
    "inplace leaf": (ValueError, "inplace", "True", "the logits that a model computed, or inplace=False", lambda: loss(logits(4, V, requires_grad=True), inplace=True)),
    "inplace leaf view": (ValueError, "inplace", "True", "inplace=False", lambda: loss(logits(2, 2, V, requires_grad=True).view(4, V), inplace=True)),
    "inplace strides": (ValueError, "inplace", "(1, 4)", "evenly spaced rows", lambda: loss((logits(V, 4, requires_grad=True) * 1).t(), inplace=True)),
    "inplace overlap": (ValueError, "inplace", "(0, 1)", "evenly spaced rows", lambda: loss((logits(1, V, requires_grad=True) * 1).expand(4, V), inplace=True)),
    # LinearLogits
    "hidden type": (TypeError, "hidden", "list", "a torch.Tensor", lambda: kd.LinearLogits([1.0], torch.ones(V, 5))),
    "weight none": (TypeError, "weight", "NoneType", "a torch.Tensor", lambda: kd.LinearLogits(torch.ones(4, 5), None)),
    "weight integers": (TypeError, "weight", "torch.int64", "cast it", lambda: kd.LinearLogits(torch.ones(4, 5), torch.ones(V, 5).long())),
    "weight transposed": (ValueError, "hidden, weight", "[4, 5], [5, 11]", "not transposed", lambda: kd.LinearLogits(torch.ones(4, 5), torch.ones(5, V))),
    "weight vector": (ValueError, "hidden, weight", "[4, 5], [5]", "weight [V, H]", lambda: kd.LinearLogits(torch.ones(4, 5), torch.ones(5))),
    "bias": (ValueError, "bias", "[5]", "one number per vocabulary entry, [11]", lambda: head(bias=torch.ones(5))),
    "weight device": (ValueError, "weight", "meta", "the device of hidden, cpu; move one", lambda: kd.LinearLogits(torch.ones(4, 5), torch.ones(V, 5, device="meta"))),
    "weight dtype": (ValueError, "student.weight dtype", "torch.bfloat16", "torch.float32; cast one of them, or call inside torch.autocast", lambda: loss(kd.LinearLogits(torch.ones(4, 5), torch.ones(V, 5).bfloat16()))),
    "bias dtype": (ValueError, "teacher.bias dtype", "torch.float64", "torch.float32; cast", lambda: loss(teacher=head(bias=torch.ones(V).double()))),
    "softcap zero": (ValueError, "softcap", "0", "None for no soft-capping", lambda: head(softcap=0)),
    "softcap negative": (ValueError, "softcap", "-30.0", "None for no soft-capping", lambda: head(softcap=-30.0)),
    "softcap nan": (ValueError, "softcap", "nan", "a finite number or None", lambda: head(softcap=float("nan"))),
    "scale zero": (ValueError, "scale", "0", "None for 1", lambda: head(scale=0)),
    "scale text": (ValueError, "scale", "'2'", "a finite number or None", lambda: head(scale="2")),
    # module
    "module option": (TypeError, "option", "'temprature'", "known: ", lambda: kd.DistillationLoss("jsd", temprature=2.0)),
    "module per call": (TypeError, "option", "'labels'", "give it to the call", lambda: kd.DistillationLoss(labels=LABELS)),
    "module divergence": (ValueError, "divergence", "'jds'", "did you mean 'jsd'", lambda: kd.DistillationLoss("jds")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message_names_argument_value_and_remedy(name: str) -> None:
    error, argument, value, remedy, call = CASES[name]
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    for part in (argument, value, remedy):
        assert part in text, text
    assert "\n" not in text
    assert len(text) < 400


def test_the_neighbours_of_bad_input_are_accepted() -> None:
    """The checks stop where they should: the smallest change makes each call legal."""
    assert loss(temperature=1e-3).isfinite()
    assert loss(kd_weight=0, ce_weight=0.5, labels=LABELS).isfinite()
    assert loss(labels=changed(LABELS, V - 1), ce_weight=1.0).isfinite()
    assert loss(labels=changed(LABELS, 0), ce_weight=1.0).isfinite()
    assert loss(labels=changed(LABELS, 99), ignore_index=99).isfinite()
    assert loss(labels=LABELS.int(), ce_weight=1).isfinite()
    assert loss(token_weights=changed(FLOATS, 0.0)).isfinite()
    assert loss(token_weights=FLOATS.bool()).isfinite()
    assert loss(vocab_size=V).isfinite()
    assert loss(vocab_size=1).item() == 0
    assert loss(num_items=torch.tensor(3)).isfinite()
    assert loss(head(), chunk_bytes=1).isfinite()
    assert loss(group=None, sparse_mode="ghost").isfinite()


def test_labels_are_only_read_for_tokens_that_count() -> None:
    """A label out of range at a token of weight 0, or shifted away, is no error."""
    labels = torch.tensor([[77, 1, 2], [77, 3, 77]])
    weights = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    result = loss(logits(2, 3, V), logits(2, 3, V), labels=labels, token_weights=weights, shift=True, ce_weight=1.0)
    assert result.isfinite()


@pytest.mark.parametrize("linear", [False, True])
def test_no_token_counts(backend: str, linear: bool) -> None:
    """Loss 0 and gradients 0, not 0/0, whatever the rows hold."""
    hidden = torch.full((3, 5), torch.nan, requires_grad=True)
    weight = torch.randn(V, 5, requires_grad=True)
    student = kd.LinearLogits(hidden, weight) if linear else torch.nn.functional.linear(hidden, weight)
    labels = torch.full((3,), -100)
    result = kd.distillation_loss(student, logits(3, V), labels=labels, ce_weight=1.0, backend=backend)
    assert result.item() == 0
    gradient = torch.autograd.grad(result, hidden if linear else student)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_impossible_backend_of_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"backend = 'triton': must be .*use backend='auto'"):
        loss()
    assert loss(backend="eager").isfinite()  # the argument comes first
    monkeypatch.setenv("KDKERNELS_BACKEND", "egaer")
    with pytest.raises(ValueError, match="did you mean 'eager'"):
        loss()


def test_a_changed_divergence_is_not_served_by_old_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element function that differs from the compiled one: auto falls back, an explicit choice says why."""
    from kdkernels import native

    monkeypatch.setattr(native, "why_not", lambda name: f"divergence {name!r} has changed: rebuild")
    monkeypatch.setattr(native, "available", lambda: True)
    assert kd.explain(logits()).backend == "eager"
    with pytest.raises(ValueError, match=r"'cpp'.*'forward_kl' has changed: rebuild"):
        loss(backend="cpp")


def test_values_are_checked_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """KDKERNELS_CHECK is off by default, where a GPU must not be looked at; here it only has to be read."""
    for value, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("KDKERNELS_CHECK", value)
        assert _checks.values_checked() is expected
    monkeypatch.delenv("KDKERNELS_CHECK")
    assert not _checks.values_checked()

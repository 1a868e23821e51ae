"""The scratch that stays allocated from call to call (`kdkernels.memory.workspace`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


def heads(rows: int = 24, vocab: int = 300) -> tuple[kd.LinearLogits, kd.LinearLogits]:
    torch.manual_seed(rows)
    student = kd.LinearLogits(torch.randn(rows, 16).requires_grad_(), torch.randn(vocab, 16).requires_grad_())
    return student, kd.LinearLogits(torch.randn(rows, 8), torch.randn(vocab, 8))


def gradients(student: kd.LinearLogits, teacher: kd.LinearLogits) -> tuple[Tensor, ...]:
    loss = kd.distillation_loss(student, teacher, "jsd", chunk_bytes=40000)
    return loss, *torch.autograd.grad(loss, (student.hidden, student.weight))


def test_parts_do_not_overlap_and_have_their_shapes() -> None:
    with memory.workspace([(3, 5), None, (1000, 7), (0, 4)], torch.bfloat16, CPU) as parts:
        for i, part in enumerate(parts):
            if part is not None:
                part.fill_(i)
        assert [None if p is None else tuple(p.shape) for p in parts] == [(3, 5), None, (1000, 7), (0, 4)]
        assert all(p is None or bool((p == i).all()) for i, p in enumerate(parts))


def test_the_next_call_finds_the_block_and_one_inside_another_does_not() -> None:
    with memory.workspace([(100, 100)], torch.float32, CPU) as first:
        address = first[0].data_ptr()  # type: ignore[union-attr]
        with memory.workspace([(100, 100)], torch.float32, CPU) as inner:
            assert inner[0].data_ptr() != address  # type: ignore[union-attr]
    with memory.workspace([(50, 100)], torch.bfloat16, CPU):
        assert not memory._kept
    assert len(memory._kept) == 1
    memory.release()
    assert not memory._kept


def test_a_large_block_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", 10000)
    with memory.workspace([(5000,)], torch.float32, CPU):
        pass
    assert not memory._kept
    with memory.workspace([(10,)], torch.float32, CPU):
        pass
    assert len(memory._kept) == 1


def test_what_an_earlier_call_left_changes_nothing() -> None:
    """Numbers of a larger call, and NaN, in the block; one call in inference mode, the next one training."""
    small, large = heads(), heads(64, 500)
    expected = gradients(*small)
    gradients(*large)
    memory._kept[0].fill_(0xFF)
    with torch.inference_mode():
        kd.distillation_loss(*small, "jsd")
    assert all(map(torch.equal, gradients(*small), expected))
    memory.release()
    with torch.inference_mode():
        kd.distillation_loss(*small, "jsd")
    assert all(map(torch.equal, gradients(*small), expected))


def test_a_call_that_fails_keeps_nothing_broken() -> None:
    with pytest.raises(RuntimeError, match="stop"), memory.workspace([(10,)], torch.float32, CPU):
        raise RuntimeError("stop")
    student, teacher = heads()
    assert gradients(student, teacher)[0].isfinite()

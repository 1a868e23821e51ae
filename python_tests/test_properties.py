"""Properties of any loss, on inputs that hypothesis chooses."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from cases import KINDS, ONE_OF_EACH, linear, pair
from hypothesis import given
from oracle import check
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence

# A weight of 1e-300 is legal, but its mixture is no float32
divergences = (
    st.sampled_from(ONE_OF_EACH)
    | st.builds(kd.JSD, st.floats(0.001, 0.999))
    | st.builds(kd.AlphaBeta, st.floats(0.05, 1.5), st.floats(0.05, 1.5))
    | st.builds(kd.SkewKL, st.floats(0.001, 0.9))
    | st.builds(kd.SkewReverseKL, st.floats(0.001, 0.9))
    | st.builds(kd.AdaptiveKL, st.floats(0.05, 0.95))
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
temperatures = st.floats(0.05, 8)
ONE_SIDED = [kind for kind in KINDS if kind.endswith(("_student", "_teacher")) or kind == "one_hot"]
kinds = st.sampled_from(
    [kind for kind in KINDS if kind not in ("flat", "near")]
)  # exact ties of the head, rounding only
seeds = st.integers(0, 2**20)
vocabularies = st.integers(1, 400)


def rows(student: Tensor, teacher: Tensor, divergence: Divergence, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient."""
    leaf = student.clone().requires_grad_()
    loss = kd.distillation_loss(leaf, teacher, divergence, reduction="none", **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


class TestProperties:
    """25 examples each in `make test`, always the same; 500 others each time in `make soak`."""

    @given(divergences, kinds, dtypes, temperatures, vocabularies, seeds)
    def test_values_and_gradients(
        self,
        backend: str,
        divergence: Divergence,
        kind: str,
        dtype: torch.dtype,
        temperature: float,
        vocab: int,
        seed: int,
    ) -> None:
        if divergence.name == "adaptive_kl" and kind in ONE_SIDED:
            return  # a loss of 1e4 times its weights, which are differences of p and q
        student, teacher = pair(kind, 3, vocab, dtype, seed)
        check(student, teacher, divergence, backend=backend, temperature=temperature, reduction="none")

    @given(divergences, dtypes, vocabularies, seeds, st.integers(1, 5), st.booleans(), st.data())
    def test_linear_in_any_chunks(
        self,
        backend: str,
        divergence: Divergence,
        dtype: torch.dtype,
        vocab: int,
        seed: int,
        n: int,
        bias: bool,
        data: Any,
    ) -> None:
        student, teacher = linear(n, 6, vocab, dtype, seed, bias=bias), linear(n, 9, vocab, dtype, seed + 1)
        chunk_bytes = data.draw(st.integers(1, 2 * n * vocab * dtype.itemsize))
        reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
        check(student, teacher, divergence, backend=backend, reduction=reduction, chunk_bytes=chunk_bytes)

    @given(divergences, vocabularies, seeds, st.floats(-1000, 1000), st.floats(-1000, 1000), temperatures)
    def test_shifts_of_logits_change_nothing(
        self, backend: str, divergence: Divergence, vocab: int, seed: int, a: float, b: float, temperature: float
    ) -> None:
        student, teacher = pair("ordinary", 3, vocab, torch.float64, seed)
        options = {"backend": backend, "temperature": temperature}
        loss, gradient = rows(student, teacher, divergence, **options)
        moved, of_moved = rows(student + a, teacher + b, divergence, **options)
        assert torch.allclose(moved, loss, rtol=1e-8, atol=1e-8)
        if divergence.name != "total_variation" or vocab > 1:
            assert (of_moved - gradient).norm() <= 1e-8 * (1 + gradient.norm())

    @given(divergences, kinds, vocabularies, seeds)
    def test_the_order_of_the_vocabulary_is_irrelevant(
        self, backend: str, divergence: Divergence, kind: str, vocab: int, seed: int
    ) -> None:
        """Permuted logits: the same loss, the gradient permuted alike; ties of adaptive_kl go by id."""
        student, teacher = pair(kind, 2, vocab, torch.float64, seed)
        if divergence.name == "adaptive_kl" and teacher[0].unique().numel() < vocab:
            return
        order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
        loss, gradient = rows(student, teacher, divergence, backend=backend)
        permuted, of_permuted = rows(student[:, order], teacher[:, order], divergence, backend=backend)
        assert torch.allclose(permuted, loss, rtol=1e-9, atol=1e-12)
        assert (of_permuted - gradient[:, order]).norm() <= 1e-9 * (1 + gradient.norm())

    @given(divergences, kinds, dtypes, vocabularies, seeds, st.integers(2, 6), st.data())
    def test_rows_are_independent(
        self,
        backend: str,
        divergence: Divergence,
        kind: str,
        dtype: torch.dtype,
        vocab: int,
        seed: int,
        n: int,
        data: Any,
    ) -> None:
        """Whatever happens to one row, the others keep every bit, and so does a row computed alone."""
        student, teacher = pair(kind, n, vocab, dtype, seed)
        victim = data.draw(st.integers(0, n - 1))
        loss, gradient = rows(student, teacher, divergence, backend=backend)
        alone, of_alone = rows(student[:1], teacher[:1], divergence, backend=backend)
        value = data.draw(st.sampled_from([0.0, 3.0, float("nan"), float("inf"), -float("inf")]))
        (student if data.draw(st.booleans()) else teacher)[victim] = value
        changed, of_changed = rows(student, teacher, divergence, backend=backend)
        others = torch.arange(n) != victim
        assert torch.equal(changed[others], loss[others])
        assert torch.equal(of_changed[others], gradient[others])
        if backend != "eager":  # torch's own reductions may block rows by their number
            assert torch.equal(alone[0], loss[0])
            assert torch.equal(of_alone[0], gradient[0])

    @given(divergences, kinds, dtypes, temperatures, vocabularies, seeds)
    def test_never_below_zero(
        self,
        backend: str,
        divergence: Divergence,
        kind: str,
        dtype: torch.dtype,
        temperature: float,
        vocab: int,
        seed: int,
    ) -> None:
        student, teacher = pair(kind, 3, vocab, dtype, seed)
        loss = kd.distillation_loss(
            student, teacher, divergence, temperature=temperature, reduction="none", backend=backend
        )  # fmt: skip
        assert (loss >= -1e-6).all(), loss

    @given(divergences, kinds, temperatures, vocabularies, seeds)
    def test_gradients_sum_to_zero(
        self, backend: str, divergence: Divergence, kind: str, temperature: float, vocab: int, seed: int
    ) -> None:
        student, teacher = pair(kind, 3, vocab, torch.float64, seed)
        _, gradient = rows(student, teacher, divergence, temperature=temperature, backend=backend)
        assert (gradient.sum(-1).abs() <= 1e-10 * (1e4 + gradient.abs().sum(-1))).all()

    @given(divergences, dtypes, temperatures, vocabularies, seeds)
    def test_equal_distributions_cost_nothing(
        self, backend: str, divergence: Divergence, dtype: torch.dtype, temperature: float, vocab: int, seed: int
    ) -> None:
        teacher = pair("ordinary", 3, vocab, dtype, seed)[1]
        loss, gradient = rows(teacher, teacher, divergence, temperature=temperature, backend=backend)
        assert (loss.abs() <= 1e-12).all(), loss
        assert (gradient.abs() <= 1e-5 / temperature).all()

    @given(seeds, st.lists(st.floats(0, 100, width=32), min_size=4, max_size=4), st.floats(0.01, 100))
    def test_weights_scale_their_rows(self, backend: str, seed: int, weights: list[float], factor: float) -> None:
        student, teacher = pair("ordinary", 4, 37, torch.float64, seed)
        w = torch.tensor(weights, dtype=torch.float64)
        plain, of_plain = rows(student, teacher, kd.JSD(), backend=backend)
        weighted, of_weighted = rows(student, teacher, kd.JSD(), token_weights=w, kd_weight=factor, backend=backend)
        assert torch.allclose(weighted, factor * w * plain, rtol=1e-12)
        assert torch.allclose(of_weighted, factor * w[:, None] * of_plain, rtol=1e-9, atol=1e-300)
        leaf = student.clone().requires_grad_()
        kd.distillation_loss(leaf, teacher, "jsd", token_weights=w, kd_weight=factor, backend=backend).backward()
        counted = max(1, int((w != 0).sum()))  # the mean is over tokens, not over weights
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, of_weighted / counted, rtol=1e-9, atol=1e-300)

    @given(seeds, st.floats(0.05, 8), st.integers(1, 60), st.integers(0, 20), st.integers(0, 20))
    def test_padding_is_not_there(self, backend: str, seed: int, t: float, vocab: int, ours: int, theirs: int) -> None:
        """Padded on either side by anything: the bits of the unpadded call, and zeros."""
        student, teacher = pair("ordinary", 3, vocab, torch.float32, seed)
        plain, of_plain = rows(student, teacher, kd.JSD(), temperature=t, backend=backend)
        wide = torch.cat((student, torch.full((3, ours), 9.0)), -1)
        other = torch.cat((teacher, torch.full((3, theirs), torch.nan)), -1)
        padded, of_padded = rows(wide, other, kd.JSD(), temperature=t, vocab_size=vocab, backend=backend)
        assert torch.allclose(padded, plain, rtol=1e-6, atol=1e-7)
        assert torch.allclose(of_padded[:, :vocab], of_plain, rtol=1e-5, atol=1e-7)
        assert torch.equal(of_padded[:, vocab:], torch.zeros(3, ours))

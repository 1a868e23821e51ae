"""`SparseLogits.encode` and `EncodedLogits`: the codec for users of PyTorch."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from codec_cases import make
from torch import Tensor

import kdkernels as kd
from kdkernels.compression.codec import CodecError
from kdkernels.compression.encoded import EncodedLogits


def sparse(*leading: int, dtype: torch.dtype = torch.float32, **further: Any) -> kd.SparseLogits:
    rows = make(int(torch.tensor(leading).prod()), 16, 301, varied=True)
    ids, log_probs, log_tail = (torch.from_numpy(x) for x in rows[:3])
    return kd.SparseLogits(
        ids.reshape(*leading, 16), log_probs.reshape(*leading, 16).to(dtype), log_tail.reshape(leading).to(dtype), 301,
        **further,
    )  # fmt: skip


def numbers(*leading: int) -> Tensor:
    return torch.randn(leading, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0, 3)])
def test_everything_comes_back(leading: tuple[int, ...]) -> None:
    tails = {0.5: numbers(*leading), 2.0: numbers(*leading) - 3}
    given = sparse(*leading, temperature=1.5, entropy=numbers(*leading), other_tails=tails)
    encoded = given.encode()
    back = encoded.decode()
    assert (back.temperature, back.kind, back.vocab_size, back.shape) == (1.5, "topk", 301, given.shape)
    assert encoded.nbytes == encoded.data.numel() == encoded.info().nbytes
    assert back.entropy is not None
    for a, b in [(back.ids, given.ids), (back.log_tail, given.log_tail), (back.entropy, given.entropy)]:
        assert torch.equal(a, b)
    assert back.other_tails.keys() == tails.keys()
    assert all(torch.equal(back.other_tails[t], tails[t]) for t in tails)
    error = (back.log_probs - given.log_probs)[given.ids >= 0].abs()
    assert (error <= encoded.info().max_error).all()
    assert torch.equal(back.log_probs == -torch.inf, given.ids == -1)


@pytest.mark.parametrize(("draws", "bits"), [(64, 8), (2700, 16), (100_000, 32)])
def test_counts_of_draws_come_back(draws: int, bits: int) -> None:
    """Of rows that hold one entry with nearly all draws, two with half each, and many."""
    generator = torch.Generator().manual_seed(draws)
    counts = [[draws - 1, 1], [draws // 2 - 1, draws // 2, 1]]
    for concentration in (0.05, 1.0) * 20:
        shares = torch.full((30,), concentration).pow(torch.rand(30, generator=generator) * 4)
        drawn = torch.multinomial(shares, draws, replacement=True, generator=generator)
        counts.append([int(c) for c in drawn.bincount() if c])
    for row in counts:
        n = torch.tensor([row], dtype=torch.float64)
        ids = torch.arange(len(row), dtype=torch.int32)[None]
        tail = torch.full((1,), -torch.inf)
        given = kd.SparseLogits(ids, (n / draws).log().float(), tail, 301, kind="sampled")
        back = given.encode(bits).decode().log_probs
        assert torch.equal((back.double().exp() * draws).round(), n)
        assert bits < 32 or torch.equal(back, given.log_probs)


def test_bits_and_kind() -> None:
    given = sparse(40, kind="sampled")
    sizes = [given.encode(bits).nbytes for bits in (4, 8, 16, 32)]
    assert sizes == sorted(set(sizes))
    assert sizes[1] < given.nbytes / 3
    assert given.encode().info().bits == 32
    assert sparse(40).encode().info().bits == 8
    back = given.encode(bits=32).decode()
    assert back.kind == "sampled"
    assert back.entropy is None
    assert not back.other_tails
    assert torch.equal(back.log_probs, given.log_probs)


def test_float64_is_rounded_to_float32() -> None:
    back = sparse(7, dtype=torch.float64).encode(32).decode()
    assert back.dtype == torch.float32
    assert torch.equal(back.log_probs, sparse(7).log_probs)


def test_another_temperature_after_decoding() -> None:
    logits = numbers(4, 301) * 3
    p1, p2 = torch.log_softmax(logits, -1), torch.log_softmax(logits / 2, -1)
    ids = p1.topk(20).indices.sort(-1).values
    rest1, rest2 = (p.scatter(-1, ids, -torch.inf).logsumexp(-1) for p in (p1, p2))
    given = kd.SparseLogits(ids.int(), p1.gather(-1, ids), rest1, 301, other_tails={2.0: rest2})
    back = given.encode(12).decode().at_temperature(2.0)
    torch.testing.assert_close(back.log_probs, p2.gather(-1, ids), atol=2e-3, rtol=0)


def test_saved_and_loaded() -> None:
    given = sparse(3, 2)
    loaded = pickle.loads(pickle.dumps(given.encode()))
    assert torch.equal(loaded.decode().ids, given.ids)


def test_short_repr() -> None:
    assert repr(sparse(3, 2).encode()).startswith("EncodedLogits(nbytes=")
    assert "tensor" not in repr(sparse(3, 2).encode())


def test_what_is_refused() -> None:
    encoded = sparse(4).encode()
    with pytest.raises(TypeError, match=r"data = \[4\] of torch.int32: must be a uint8 tensor"):
        EncodedLogits(torch.zeros(4, dtype=torch.int32), (4,))
    with pytest.raises(ValueError, match=r"shape = \[5\]: must be that of the block's 4 rows"):
        EncodedLogits(encoded.data, (5,)).decode()
    encoded.data[100] ^= 1
    with pytest.raises(CodecError, match="checksum"):
        encoded.decode()
    with pytest.raises(ValueError, match="bits = 3"):
        sparse(4).encode(3)
    broken = sparse(4)
    broken.log_probs[0, 0] = torch.nan
    broken.ids[0, 0] = 0
    with pytest.raises(ValueError, match=r"log_probs\[0, 0\]"):
        broken.encode()


def test_operators() -> None:
    """Torch's own checks, with sizes that only the content tells; and a graph that holds both."""
    given = sparse(6)
    columns = [numbers(6), numbers(6).double()]
    arguments = (given.ids, given.log_probs, given.log_tail, columns, ["entropy", "log_tail@2.0"], 301, 32)
    data = torch.ops.kdkernels.encode_topk(*arguments)
    torch.library.opcheck(torch.ops.kdkernels.encode_topk.default, arguments)
    torch.library.opcheck(torch.ops.kdkernels.decode_topk.default, (data,))

    def both(ids: Tensor, log_probs: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
        block = torch.ops.kdkernels.encode_topk(ids, log_probs + 0.0, log_tail, [], [], 301, 32)
        back = torch.ops.kdkernels.decode_topk(block)
        return block.sum(dtype=torch.int64), back[1].exp().sum(-1) + back[2].exp()

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for one, other in zip(both(*arguments[:3]), compiled(*arguments[:3]), strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()


def test_operators_refuse_what_the_codec_refuses() -> None:
    data = sparse(6).encode().data.clone()
    data[70] ^= 4
    with pytest.raises(CodecError, match="checksum"):
        torch.ops.kdkernels.decode_topk(data)

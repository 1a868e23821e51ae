"""`kdkernels.compress`: the largest entries and the mass of the rest, against float64 and on hard rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import hypothesis
import pytest
import torch
from compress_oracle import apart, check, golden, hard_rows
from hypothesis import strategies as st

import kdkernels as kd

pytestmark = pytest.mark.sample(3)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 1), (2, 1), (2, 2), (127, 5), (128, 128), (129, 1), (301, 64), (301, 301), (4100, 1000), (32000, 4096)]
LARGE = [(50257, 64), (151936, 64), (151936, 1024)]


def logits(n: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * 1000003 + vocab)
    return (scale * torch.randn(n, vocab, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "k"), [*SHAPES, *LARGE])
def test_values(backend: str, dtype: torch.dtype, vocab: int, k: int) -> None:
    z = logits(2, vocab, dtype)
    found = kd.compress(z, k, entropy=True, backend=backend)
    check(found, golden(z, k), 1e-12 if dtype == torch.float64 else 1e-6)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.ids.dtype == torch.int32


@pytest.mark.parametrize("temperature", [0.05, 0.7, 8.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_temperatures(backend: str, dtype: torch.dtype, temperature: float) -> None:
    z = logits(3, 5003, dtype)
    others = [0.05, 1.0, 8.0, 0.9]
    found = kd.compress(z, 40, temperature=temperature, other_temperatures=others, entropy=True, backend=backend)
    check(found, golden(z, 40, temperature))
    assert found.temperature == temperature
    assert set(found.other_tails) == set(others) - {temperature}
    for other, tail in found.other_tails.items():
        expected = golden(z, 40, other)
        assert apart(tail, expected.log_tail) < 1e-6
        rounding = 1e-6 * max(1.0, temperature / other)  # kept log-probabilities are float32, and scaled
        assert apart(found.at_temperature(other).log_probs, expected.log_probs) < 2 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "k"), [(301, 8), (20000, 64), (20000, 1024)])
def test_hard_rows(backend: str, dtype: torch.dtype, vocab: int, k: int) -> None:
    rows = hard_rows(vocab, k)
    z = torch.stack(list(rows.values())).to(dtype)
    z = torch.where(z == torch.inf, torch.finfo(dtype).max, z)
    z = torch.where((z == -torch.inf) & (torch.stack(list(rows.values())) > -torch.inf), torch.finfo(dtype).min, z)
    found = kd.compress(z, k, entropy=True, backend=backend)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for i, name in enumerate(rows):
        expected = golden(z[i : i + 1], k)
        assert torch.equal(found.ids[i].long(), expected.ids[0]), name
        assert apart(found.log_probs[i], expected.log_probs[0]) < tolerance, name
        assert apart(found.log_tail[i], expected.log_tail[0]) < tolerance, name
        assert apart(found.entropy[i], expected.entropy[0]) < tolerance, name  # type: ignore[index]


@pytest.mark.parametrize("tail_mass", [0.5, 1e-3, 1e-12, 1e-30, 1e-200])
def test_tail_is_summed_from_itself(backend: str, tail_mass: float) -> None:
    vocab, k = 3000, 16
    tail = torch.tensor(tail_mass / (vocab - k)).double().log()
    z = torch.full((1, vocab), float((torch.tensor(tail_mass).double() / (vocab - k)).log()))
    assert abs(float(tail) - float(z[0, 0])) < 1e-3 or tail_mass < 1e-40
    z[0, 100:1700:100] = torch.linspace(-3, 0, k)
    found = kd.compress(z, k, other_temperatures=[0.25, 4.0], backend=backend)
    check(found, golden(z, k), 1e-6)
    for other in (0.25, 4.0):
        assert apart(found.other_tails[other], golden(z, k, other).log_tail) < 1e-6


@pytest.mark.parametrize(("vocab", "k"), [(2, 1), (40, 20), (3000, 1), (3000, 1000)])
def test_tails_far_below_everything_kept(backend: str, vocab: int, k: int) -> None:
    z = logits(1, vocab)
    z[0, :: vocab // k][:k] += 300.0
    check(kd.compress(z, k, entropy=True, backend=backend), golden(z, k))
    z[0, 1] += 150.0
    check(kd.compress(z, k, backend=backend), golden(z, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_lowest_number_is_an_entry(backend: str, dtype: torch.dtype, temperature: float) -> None:
    """finfo.min / T overflows where T < 1; its mass is 0, so is what it adds to the entropy."""
    z = logits(2, 500, dtype)
    z[:, ::3] = torch.finfo(dtype).min
    found = kd.compress(z, 400, temperature=temperature, entropy=True, backend=backend)
    expected = golden(z, 400, temperature)
    assert torch.equal(found.ids.long(), expected.ids)
    assert apart(found.log_probs, expected.log_probs.to(found.dtype)) < 1e-6
    assert apart(found.log_tail, expected.log_tail.to(found.dtype)) < 1e-6
    assert apart(found.entropy, expected.entropy) < 1e-6  # type: ignore[arg-type]


def test_masked_entries_are_not_kept(backend: str) -> None:
    z = torch.full((2, 600), -torch.inf)
    z[0, [5, 500, 77]] = torch.tensor([1.0, 2.0, 3.0])
    z[1, :40] = 0.5
    found = kd.compress(z, 8, entropy=True, backend=backend)
    check(found, golden(z, 8))
    assert found.ids[0].tolist() == [5, 77, 500, -1, -1, -1, -1, -1]
    assert found.log_tail[0] == -torch.inf
    assert (found.log_probs[0, 3:] == -torch.inf).all()


def test_whole_rows_are_the_distribution(backend: str) -> None:
    z = logits(4, 333)
    found = kd.compress(z, 333, backend=backend)
    assert (found.log_tail == -torch.inf).all()
    torch.testing.assert_close(found.to_dense(), torch.log_softmax(z, -1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (2, 3, 7)])
def test_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape)
    found = kd.compress(z, 3, entropy=True, other_temperatures=[2.0], top_p=0.9, backend=backend)
    assert found.ids.shape == (*shape[:-1], 3)
    assert found.shape == shape
    assert found.other_tails[2.0].shape == found.log_tail.shape == shape[:-1]


def test_strides_and_padding_columns(backend: str) -> None:
    wide = logits(12, 5000)
    expected = golden(wide[::2, :4321], 50)
    check(kd.compress(wide[::2], 50, vocab_size=4321, backend=backend), expected)
    check(kd.compress(wide[::2, :4321], 50, backend=backend), expected)
    check(kd.compress(wide.t().contiguous().t()[::2, :4321], 50, backend=backend), expected)
    repeated = wide[:1].expand(3, -1)
    check(kd.compress(repeated, 50, backend=backend), golden(repeated, 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"scale": 0.3}, {"softcap": 2.0, "scale": -1.5}], ids=str)
def test_linear_logits(backend: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 5, 16), (999, 16), (999,)))
    head = kd.LinearLogits(hidden, weight, bias, **options)
    found = kd.compress(head, 20, chunk_bytes=3 * 999 * dtype.itemsize, vocab_size=990, entropy=True, backend=backend)
    x = (hidden.reshape(10, 16) @ weight.t()).double() + bias.double()
    z = x * options.get("scale", 1.0)
    z = options["softcap"] * torch.tanh(z / options["softcap"]) if "softcap" in options else z
    expected = golden(z[:, :990], 20)
    agree = (found.ids.reshape(10, 20).long() == expected.ids).double().mean()
    assert agree == 1 if dtype == torch.float64 else agree > 0.9  # capped float32 logits tie where float64 ones do not
    # 20 saturated entries differ in rounding of the product, not in kind
    assert apart(found.log_tail.reshape(10), expected.log_tail) < {torch.float64: 1e-12, torch.float32: 1e-5}.get(
        dtype, 2e-5
    )
    assert found.ids.shape == (2, 5, 20)


def test_threads_and_repeats_change_no_bit(threads: Callable[[int], None]) -> None:
    z = logits(9, 70000, torch.bfloat16)
    once = kd.compress(z, 64, entropy=True, backend="cpp")
    threads(2)
    again = kd.compress(z, 64, entropy=True, backend="cpp")
    assert torch.equal(once.ids, again.ids)
    assert torch.equal(once.log_probs, again.log_probs)
    assert torch.equal(once.log_tail, again.log_tail)
    assert torch.equal(once.entropy, again.entropy)  # type: ignore[arg-type]


@hypothesis.given(data=st.data())
def test_any_row(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 700))
    levels = data.draw(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=6))
    seed, k = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, vocab))
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([*levels, -torch.inf])
    chosen = torch.randint(0, len(values), (3, vocab), generator=generator)
    z = values[chosen] + data.draw(st.sampled_from([0.0, 1.0])) * torch.randn(3, vocab, generator=generator)
    z[:, data.draw(st.integers(0, vocab - 1))] = levels[0]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    z = z.to(dtype)
    temperature = data.draw(st.sampled_from([0.3, 1.0, 5.0]))
    for backend in ("eager", "cpp"):
        found = kd.compress(z, k, temperature=temperature, entropy=True, backend=backend)
        check(found, golden(z, k, temperature), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    """The other builds, in a process of their own: this file's tests of values and of hard rows."""
    chosen = "test_hard_rows or test_values and 301 or test_temperatures or test_masked or test_every_draw"
    here = os.path.dirname(__file__)
    files = [os.path.join(here, name) for name in ("test_compress.py", "test_compress_draws.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--backends", "cpp", "-k", chosen, *files, "-p", "no:xdist"]
    ran = subprocess.run(
        command, env={**os.environ, "KDKERNELS_ISA": isa}, capture_output=True, text=True, check=False, cwd=here
    )
    if "this machine runs:" in ran.stdout:  # refused: this processor has no such instructions
        pytest.skip(f"no {isa} here")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_operator(backend: str) -> None:
    z = logits(3, 500)
    head = (torch.randn(4, 6), torch.randn(30, 6), torch.randn(30))
    for arguments in (
        (z, None, None, 1.0, 0.0, 1.3, 490, 3, backend, 7, [2.0], True, True),
        (*head, 0.5, 3.0, 1.0, 30, 2, backend, 30, [], False, False),
    ):
        torch.library.opcheck(torch.ops.kdkernels.compress.default, arguments)


def test_compiles(backend: str) -> None:
    z = logits(3, 500)
    compiled = torch.compile(lambda x: kd.compress(x, 9, entropy=True, backend=backend).log_probs, fullgraph=True)
    assert torch.equal(compiled(z), kd.compress(z, 9, backend=backend).log_probs)


def test_inside_inference_mode_and_autocast(backend: str) -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(100, 8)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = kd.compress(kd.LinearLogits(hidden, weight), 5, backend=backend)
    check(found, golden(hidden.bfloat16() @ weight.bfloat16().t(), 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_nucleus_of_everything_is_everything(backend: str, dtype: torch.dtype) -> None:
    z = 8 * torch.randn(64, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    kept = kd.compress(z, 50, top_p=1.0, backend=backend)
    assert (kept.ids >= 0).all()
    assert (kept.log_tail == -torch.inf).all()


def test_other_temperatures_are_a_list() -> None:
    with pytest.raises(TypeError, match=r"other_temperatures = 2\.0: must be a list"):
        kd.compress(torch.randn(2, 9), 3, other_temperatures=2.0)  # type: ignore[arg-type]

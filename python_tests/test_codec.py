"""Blocks of the codec: what comes back, how exactly, in how many bytes."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import codec_reader
import numpy as np
import pytest
from codec_cases import Rows, added_divergence, make

import kdkernels
from kdkernels.compression import codec
from kdkernels.compression import format as layout

SHAPES = [  # rows, K, V, varied
    (0, 3, 10, False), (1, 1, 1, False), (3, 2, 2, False), (5, 0, 9, False), (7, 1, 301, False), (7, 150, 301, True),
    (7, 301, 301, False), (16, 64, 32000, False), (33, 64, 151936, False), (40, 20, 151936, True),
    (17, 300, 2**31 - 1, False), (2, 4096, 151936, False), (2, 5000, 32000, False),
]  # fmt: skip


def encode(rows: Rows, bits: int = 8, **columns: np.ndarray) -> bytes:
    return codec.encode(rows.ids, rows.log_probs, rows.log_tail, vocab_size=rows.vocab_size, bits=bits, columns=columns)


def id_bound(n: int, k: int, vocab: int) -> float:
    """log2 of the number of ways to choose, bits."""
    return n * (math.lgamma(vocab + 1) - math.lgamma(k + 1) - math.lgamma(vocab - k + 1)) / math.log(2)


# ---- what comes back


@pytest.mark.parametrize("bits", codec.BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.thin(5)
def test_everything_comes_back(shape: tuple[int, int, int, bool], bits: int) -> None:
    n, k, vocab, varied = shape
    rows = make(n, k, vocab, varied=varied)
    block = encode(rows, bits)
    decoded, info = codec.decode(block), codec.inspect(block)
    np.testing.assert_array_equal(decoded.ids, rows.ids)
    np.testing.assert_array_equal(decoded.log_tail, rows.log_tail)
    np.testing.assert_array_equal(decoded.log_probs == -np.inf, rows.ids == -1)
    kept = rows.ids >= 0
    error = np.abs(decoded.log_probs[kept] - rows.log_probs[kept]).max(initial=0)
    assert info == codec.BlockInfo(n, k, vocab, bits, len(block), error, (), info.id_bits)


@pytest.mark.parametrize("bits", [4, 8, 12, 16, 32])
@pytest.mark.parametrize("shape", [(3, 2, 2, False), (17, 40, 301, True), (18, 64, 151936, False)], ids=str)
def test_a_reader_written_from_the_text_reads_the_same(shape: tuple[int, int, int, bool], bits: int) -> None:
    n, k, vocab, varied = shape
    rows = make(n, k, vocab, varied=varied)
    rows.log_probs[1, :2] = [-1e30, -np.inf]  # a raw row below 16 bits
    rows.ids[1] = np.arange(k)
    block = encode(rows, bits, entropy=rows.log_tail * 2)
    decoded, read = codec.decode(block), codec_reader.read(block)
    kept = rows.ids >= 0
    assert [i for ids in read.ids for i in ids] == decoded.ids[kept].tolist()
    np.testing.assert_array_equal(np.array([p for row in read.log_probs for p in row]), decoded.log_probs[kept])
    np.testing.assert_array_equal(read.log_tail, rows.log_tail)
    np.testing.assert_array_equal(read.columns["entropy"], rows.log_tail * 2)


def test_a_block_of_this_version_stays_readable() -> None:
    block = bytes.fromhex(PINNED)
    decoded = codec.decode(block)
    assert decoded.ids.tolist() == [[2, 5, 9], [0, 11, -1]]
    np.testing.assert_allclose(decoded.log_probs[0], [-1.5, -0.5, -2.5], atol=0.005)
    assert decoded.log_probs[1].tolist() == [0.0, -np.inf, -np.inf]
    assert decoded.columns["entropy"].tolist() == [1.0, 0.25]
    assert encode(*_pinned_rows(), entropy=np.array([1, 0.25], np.float32)) == block


def _pinned_rows() -> tuple[Rows, int]:
    ids = np.array([[2, 5, 9], [0, 11, -1]], np.int32)
    log_probs = np.array([[-1.5, -0.5, -2.5], [0, -np.inf, -np.inf]], np.float32)
    return Rows(ids, log_probs, np.array([-2.0, -np.inf], np.float32), 12), 8


def test_tails_and_columns_are_kept_to_the_bit() -> None:
    rows = make(20, 5, 100)
    numbers = np.random.default_rng(0).integers(0, 2**32, 20, np.uint32).view(np.float32)  # NaNs of every kind too
    decoded = codec.decode(encode(rows, 8, x=numbers, **{"log_tail@2.0": rows.log_tail}))
    assert decoded.columns["x"].tobytes() == numbers.tobytes()
    assert decoded.columns["log_tail@2.0"].tobytes() == rows.log_tail.tobytes() == decoded.log_tail.tobytes()
    assert list(decoded.columns) == ["x", "log_tail@2.0"]


@pytest.mark.parametrize("varied", [False, True])
def test_any_slice_of_rows(varied: bool) -> None:
    rows = make(50, 30, 1000, varied=varied)
    block = encode(rows, 8, x=rows.log_tail)
    whole = codec.decode(block)
    ends = (None, 0, 3, 17, 49, 80, -1, -20)
    for part in [slice(a, b, c) for a in ends for b in ends for c in (None, 1, 2, -1, -3)]:
        some = codec.decode(np.frombuffer(block, np.uint8), part)
        for name in ("ids", "log_probs", "log_tail"):
            np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[part])
        np.testing.assert_array_equal(some.columns["x"], whole.columns["x"][part])


def test_a_row_is_read_without_the_others() -> None:
    rows = make(100, 30, 1000)
    block = bytearray(encode(rows))
    right = codec.decode(block, slice(50, 51))
    read = codec_reader.read(bytes(block)).header
    payload = len(block) - layout.CHECKSUM_BYTES - -(-int(read["payload_bits"]) // 8)
    third = int(read["payload_bits"]) // 24
    block[payload : payload + third] = bytes(third)
    block[-third:] = bytes(third)
    alone = codec.decode(block, slice(50, 51), verify=False)
    np.testing.assert_array_equal(alone.ids, right.ids)
    np.testing.assert_array_equal(alone.log_probs, right.log_probs)
    with pytest.raises(codec.CodecError):
        codec.decode(block, slice(50, 51))


def test_the_same_without_the_wide_instructions() -> None:
    script = (
        "import sys, numpy as np; from kdkernels.compression import codec; from codec_cases import make\n"
        "r = make(40, 64, 151936); d = codec.decode(codec.encode(*r[:3], vocab_size=r.vocab_size))\n"
        "sys.stdout.buffer.write(d.ids.tobytes() + d.log_probs.tobytes())"
    )
    paths = os.pathsep.join([str(Path(kdkernels.__file__).parents[1]), str(Path(__file__).parent)])
    outputs = []
    for isa in ("", "baseline"):
        environment = {**os.environ, "KDKERNELS_ISA": isa, "PYTHONPATH": paths}
        outputs.append(subprocess.check_output([sys.executable, "-c", script], env=environment))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 8 * 40 * 64


def test_threads_decode_side_by_side() -> None:
    rows = make(200, 64, 151936)
    block, wrong = encode(rows), []

    def work() -> None:
        wrong.extend(1 for _ in range(20) if not np.array_equal(codec.decode(block).ids, rows.ids))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- how exactly


@pytest.mark.parametrize("bits", range(4, 13))
def test_the_stated_error_holds_and_follows_from_the_range(bits: int) -> None:
    rows = make(64, 100, 5000)
    spread = rows.log_probs.max(1) - rows.log_probs.min(1)
    decoded = codec.decode(encode(rows, bits)).log_probs
    error = np.abs(decoded - rows.log_probs).max(1)
    assert (error <= 1.01 * spread / (2**bits - 2) + 1e-6).all()
    assert error.max() > 0.1 * spread.max() / (2**bits - 2)  # it is quantised


@pytest.mark.parametrize("bits", range(4, 13))
def test_the_kept_mass_stays(bits: int) -> None:
    rows = make(64, 100, 5000)
    decoded = codec.decode(encode(rows, bits))
    mass = np.exp(decoded.log_probs.astype(np.float64)).sum(1) + np.exp(decoded.log_tail.astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=5e-7)


def test_eight_bits_of_a_peaked_teacher_lose_little() -> None:
    rows = make(512, 64, 151936)
    added = added_divergence(rows, codec.decode(encode(rows)).log_probs)
    assert added.min() > -1e-6
    assert added.mean() < 1e-4
    assert added.max() < 1e-2


def _single(*log_probs: float) -> Rows:
    ids = np.arange(len(log_probs), dtype=np.int32)[None]
    return Rows(ids, np.array([log_probs], np.float32), np.array([-np.inf], np.float32), 100)


LOWEST = float(np.finfo(np.float32).min)
EDGES = [
    [0.0], [-0.0, -np.inf], [-np.inf, -np.inf], [0.0, -1e-7], [-5.0] * 4, [-1.0, -400.0], [-1.0, -2.0, -np.inf],
    [-1e4, -1e4], [LOWEST, LOWEST], [5e-7, -17.0], [-1e-44, -1e-45],
]  # fmt: skip


@pytest.mark.parametrize("bits", codec.BITS)
@pytest.mark.parametrize("values", EDGES, ids=str)
@pytest.mark.thin(7)
def test_extreme_rows(values: list[float], bits: int) -> None:
    rows = _single(*values)
    block = encode(rows, bits)
    decoded = codec.decode(block).log_probs[0]
    np.testing.assert_array_equal(decoded == -np.inf, rows.log_probs[0] == -np.inf)
    finite = np.isfinite(rows.log_probs[0])
    error = np.abs(decoded[finite] - rows.log_probs[0][finite]).max(initial=0)
    assert error <= codec.inspect(block).max_error < np.inf
    top = np.abs(rows.log_probs[0][finite]).max(initial=0)
    if bits != 16 and len(set(values)) == 1:
        assert error <= 1e-6 * top


@pytest.mark.parametrize("bits", [4, 8, 12, 32])
def test_a_row_wider_than_512_nats_is_exact(bits: int) -> None:
    rows = _single(-0.5, LOWEST, -2.25, -1.2345678, -np.inf)
    np.testing.assert_array_equal(codec.decode(encode(rows, bits)).log_probs, rows.log_probs)


def test_one_wide_row_leaves_the_others_alone() -> None:
    rows = make(20, 10, 100)
    before = codec.decode(encode(rows)).log_probs
    rows.log_probs[7, 3] = LOWEST
    after = codec.decode(encode(rows)).log_probs
    others = np.arange(20) != 7
    np.testing.assert_array_equal(after[others], before[others])
    np.testing.assert_array_equal(after[7], rows.log_probs[7])


def test_sixteen_bits_are_float16_and_thirty_two_are_float32() -> None:
    values = np.concatenate([-np.logspace(-9, 4.8, 3000), -np.arange(0, 40, 0.01), [-0.0, -65504, -65519]])
    values = values.astype(np.float32)[None]
    ids = np.arange(values.size, dtype=np.int32)[None]
    rows = Rows(ids, values, np.zeros(1, np.float32), values.size)
    np.testing.assert_array_equal(codec.decode(encode(rows, 16)).log_probs, values.astype(np.float16))
    np.testing.assert_array_equal(codec.decode(encode(rows, 32)).log_probs, values)
    beyond = codec.decode(encode(_single(-65520.0, -1e9, -np.inf), 16)).log_probs[0]
    assert beyond.tolist() == [-65504, -65504, -np.inf]


# ---- in how many bytes


@pytest.mark.parametrize("vocab", [301, 32000, 151936, 262144])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 64, 100, 300, 1024, 4096])
def test_ids_stay_near_the_bound(k: int, vocab: int) -> None:
    if k > vocab:
        k = vocab // 2
    n = max(2, 2000 // k)
    block = encode(make(n, k, vocab))
    assert codec.inspect(block).id_bits <= (1.06 if 400 * k <= vocab else 1.15) * id_bound(n, k, vocab)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("vocab", [301, 5000])
def test_ids_of_dense_rows_stay_near_the_bound(share: float, vocab: int) -> None:
    k = round(share * vocab)
    assert codec.inspect(encode(make(8, k, vocab))).id_bits <= 1.15 * id_bound(8, k, vocab)


def test_ids_of_a_whole_vocabulary_cost_nothing_and_crowded_ones_less() -> None:
    assert codec.inspect(encode(make(4, 301, 301))).id_bits == 0
    rows = make(50, 64, 151936)
    crowded = rows._replace(ids=np.sort(rows.ids // 64 + np.arange(64, dtype=np.int32), 1))
    assert codec.inspect(encode(crowded)).id_bits < 0.8 * codec.inspect(encode(rows)).id_bits


def test_bytes_per_token() -> None:
    assert len(encode(make(512, 64, 151936))) / 512 <= 179
    assert len(encode(make(512, 64, 151936), 6)) / 512 <= 163


def test_what_little_a_block_holds_is_padded_to_what_a_reader_allocates() -> None:
    ids = np.full((100, 4096), -1, np.int32)
    rows = Rows(ids, np.zeros((100, 4096), np.float32), np.zeros(100, np.float32), 5000)
    block = encode(rows)
    assert layout.MAX_ENTRIES_PER_BYTE * len(block) >= ids.size
    assert (codec.decode(block).ids == -1).all()
    assert (codec.decode(block).log_probs == -np.inf).all()


# ---- the format


def test_the_text_of_the_format_and_the_compiled_one_agree() -> None:
    from kdkernels import _codec

    compiled = _codec.format_constants()
    assert compiled.pop("fields") == {field.name: field.offset for field in layout.FIELDS}
    assert compiled == {name: getattr(layout, name) for name in compiled}
    ends = [field.offset + struct.calcsize(field.type) for field in layout.FIELDS]
    assert ends == [*(field.offset for field in layout.FIELDS[1:]), layout.HEADER_BYTES]


def test_crc32c() -> None:
    from kdkernels import _codec

    assert _codec.crc32c(b"123456789") == 0xE3069283  # the check value of CRC catalogues
    data = np.random.default_rng(0).bytes(1000)
    for n in (0, 1, 7, 8, 9, 63, 1000):
        assert _codec.crc32c(data[:n]) == _codec.crc32c_portable(data[:n])


PINNED = (
    "4b44534c0100080102000000030000000c000000020000000103080000a0c93937000000000000000f000000000000000000"
    "000000000000710000000000000007656e74726f7079000000c0000080ff0000803f0000803ecc0600bf00000000023c0000"
    "01202a3f00fe6b807f0a27e809"
)

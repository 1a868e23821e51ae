"""What the codec refuses: arguments that cannot be encoded, bytes that are no block or were damaged."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_cases import make

import kdkernels
from kdkernels.compression import codec
from kdkernels.compression import format as layout

NAN, INF = float("nan"), float("inf")


def arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "ids": np.array([[1, 5, 9], [0, 3, -1]], np.int32),
        "log_probs": np.array([[-1, -2, -3], [-0.5, -1, -np.inf]], np.float32),
        "log_tail": np.array([-1, -2], np.float32),
        "vocab_size": 10,
    }
    return {**given, **changed}


def ids(*rows: list[int]) -> dict[str, Any]:
    return {"ids": np.array(rows, np.int32)}


def log_probs(*rows: list[float]) -> dict[str, Any]:
    return {"log_probs": np.array(rows, np.float32)}


BAD = {
    "descending": (ids([1, 5, 4], [0, 3, -1]), ValueError, r"ids\[0, 2\] = 4: .*than the id before it, 5; sort"),
    "twice": (ids([1, 5, 9], [3, 3, -1]), ValueError, r"ids\[1, 1\] = 3: .*each id once"),
    "beyond": (ids([1, 5, 10], [0, 3, -1]), ValueError, r"ids\[0, 2\] = 10: .*\[0, 10\).*vocab_size"),
    "negative": (ids([1, 5, -2], [0, 3, -1]), ValueError, r"ids\[0, 2\] = -2: .*-1 as padding"),
    "padding first": (ids([1, 5, 9], [-1, 3, 4]), ValueError, r"ids\[1, 1\] = 3: .*padding last"),
    "NaN": (log_probs([-1, NAN, -3], [-1, -2, 0]), ValueError, r"log_probs\[0, 1\] = -?nan: .*log_softmax"),
    "logits": (log_probs([-1, 7.5, -3], [-1, -2, 0]), ValueError, r"log_probs\[0, 1\] = 7\.5.*at most 0"),
    "infinite": (log_probs([-1, INF, -3], [-1, -2, 0]), ValueError, r"log_probs\[0, 1\] = inf"),
    "tail NaN": ({"log_tail": np.array([0, NAN], np.float32)}, ValueError, r"log_tail\[1\] = -?nan"),
    "tail positive": ({"log_tail": np.array([1, 0], np.float32)}, ValueError, r"log_tail\[0\] = 1\.0"),
    "int64": ({"ids": np.array([[1]])}, TypeError, r"ids dtype = int64: must be int32; use \.astype"),
    "float64": ({"log_probs": np.zeros((2, 3))}, TypeError, r"log_probs dtype = float64: must be float32"),
    "list": ({"log_tail": [0.0, 0.0]}, TypeError, r"log_tail = list: must be a numpy array"),
    "flat": ({"ids": np.zeros(3, np.int32)}, ValueError, r"ids shape = \[3\]: must be \[N, K\]"),
    "shapes": ({"log_probs": np.zeros((2, 2), np.float32)}, ValueError, r"log_probs shape = \[2, 2\].*\[2, 3\]"),
    "tails": ({"log_tail": np.zeros(3, np.float32)}, ValueError, r"log_tail shape = \[3\]: must be \[2\]"),
    "K > V": ({"vocab_size": 2}, ValueError, r"width K = 3: must be at most vocab_size = 2"),
    "V = 0": ({"vocab_size": 0}, ValueError, r"vocab_size = 0: must be 1 to"),
    "V < 0": ({"vocab_size": -5}, ValueError, r"vocab_size = -5: must be"),
    "V = 2^31": ({"vocab_size": 2**31}, ValueError, r"vocab_size = 2147483648: must be"),
    "V float": ({"vocab_size": 10.0}, TypeError, r"vocab_size = 10\.0: must be an int"),
    "bits bool": ({"bits": True}, TypeError, r"bits = True: must be an int"),
    "column name": ({"columns": {3: np.zeros(2, np.float32)}}, TypeError, r"columns = 3: must be named by str"),
    "no name": ({"columns": {"": np.zeros(2, np.float32)}}, ValueError, r"columns = '': must be distinct names"),
    "long name": ({"columns": {"x" * 256: np.zeros(2, np.float32)}}, ValueError, r"1 to 255 bytes"),
    "column dtype": ({"columns": {"x": np.zeros(2)}}, TypeError, r"columns\['x'\] dtype = float64"),
    "column rows": ({"columns": {"x": np.zeros(5, np.float32)}}, ValueError, r"columns\['x'\] shape = \[5\]"),
    "columns": ({"columns": {str(i): np.zeros(2, np.float32) for i in range(256)}}, ValueError, r"columns = 256"),
    **{f"bits {b}": ({"bits": b}, ValueError, rf"bits = {b}: must be 4 to 12, 16") for b in (0, 3, 13, 15, 24, 64)},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_encoded(case: str) -> None:
    changed, error, message = BAD[case]
    with pytest.raises(error, match=message):
        codec.encode(**arguments(**changed))


def test_what_stands_beside_padding_is_not_looked_at() -> None:
    given = arguments()
    given["log_probs"][1, 2] = NAN
    assert codec.decode(codec.encode(**given)).log_probs[1, 2] == -np.inf


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (b"", codec.CodecError, "0 bytes are too few"),
        (b"KDSL" + bytes(20), codec.CodecError, "24 bytes are too few for a block: truncated"),
        (bytes(200), codec.CodecError, "does not begin with KDSL"),
        ("text", TypeError, "block = str: must be bytes"),
        (np.zeros((9, 9), np.uint8), ValueError, "block = 2-dimensional"),
        (np.zeros(99, np.int32), ValueError, "must be contiguous bytes"),
        (np.zeros(400, np.uint8)[::2], ValueError, "must be contiguous bytes"),
    ],
)
def test_what_is_no_block(block: Any, error: type[Exception], message: str) -> None:
    for reader in (codec.decode, codec.inspect):
        with pytest.raises(error, match=message):
            reader(block)


@pytest.mark.parametrize("rows", [3, (0, 1), "all"])
def test_rows_that_are_no_slice(rows: Any) -> None:
    with pytest.raises(TypeError, match=r"rows = .*must be a slice or None"):
        codec.decode(codec.encode(**arguments()), rows)


def test_a_block_of_a_newer_version_says_so() -> None:
    block = bytearray(codec.encode(**arguments()))
    struct.pack_into("<H", block, 4, layout.VERSION + 1)
    with pytest.raises(codec.CodecError, match=r"format version 2 is newer than this kdkernels reads \(1\).*update"):
        codec.decode(block)


# ---- damaged blocks


def make_right(block: bytearray) -> None:
    """Length and checksum as if nothing had happened."""
    from kdkernels import _codec

    if len(block) < layout.HEADER_BYTES + layout.CHECKSUM_BYTES:
        return
    struct.pack_into("<Q", block, 56, len(block))
    struct.pack_into("<I", block, len(block) - 4, _codec.crc32c(bytes(block[:-4])))


def damage(block: bytes, rng: np.random.Generator) -> bytearray:
    """One of: flipped bits, truncation, swapped parts, a hostile number in the header."""
    damaged = bytearray(block)
    kind = rng.integers(4)
    if kind == 0:
        for at in rng.integers(0, 8 * len(block), rng.integers(1, 9)):
            damaged[at // 8] ^= 1 << (at % 8)
    elif kind == 1:
        del damaged[rng.integers(len(block)) :]
    elif kind == 2:
        size = int(rng.integers(1, len(block) // 2))
        a, b = rng.integers(0, len(block) - size + 1, 2)
        damaged[a : a + size], damaged[b : b + size] = block[b : b + size], block[a : a + size]
    else:
        field = layout.FIELDS[rng.integers(1, len(layout.FIELDS))]
        size = struct.calcsize(field.type)
        hostile = (0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, int(rng.integers(2**62)))
        number = hostile[rng.integers(len(hostile))] % 256**size
        damaged[field.offset : field.offset + size] = number.to_bytes(size, "little")
    return damaged


def check_damaged(cases: int) -> None:
    rng = np.random.default_rng(0)
    harmless = 0
    for case in range(cases):
        rows = make(int(rng.integers(1, 40)), int(rng.integers(1, 30)), 500, seed=case % 50, varied=bool(case % 2))
        bits = int(rng.choice(codec.BITS))
        block = codec.encode(*rows[:3], vocab_size=500, bits=bits, columns={"x": rows.log_tail})
        damaged = damage(block, rng)
        if damaged != block:
            with pytest.raises(codec.CodecError):
                codec.decode(damaged)
        make_right(damaged)
        try:
            decoded = codec.decode(damaged)
        except codec.CodecError:
            continue
        harmless += 1
        vocab = codec.inspect(damaged).vocab_size
        kept = decoded.ids >= 0
        assert decoded.ids.max(initial=-1) < vocab
        assert (np.diff(decoded.ids.astype(np.int64))[kept[:, 1:]] > 0).all()
        assert not np.isnan(decoded.log_probs).any()
    assert 0.05 * cases < harmless < 0.95 * cases  # both ways out are taken


def test_damaged_blocks_are_detected() -> None:
    check_damaged(500)


@pytest.mark.soak
def test_damaged_blocks_are_detected_ten_thousand_times() -> None:
    check_damaged(10_000)


def test_every_single_flipped_bit_is_detected() -> None:
    block = codec.encode(**arguments())
    for at in range(8 * len(block)):
        damaged = bytearray(block)
        damaged[at // 8] ^= 1 << (at % 8)
        with pytest.raises(codec.CodecError):
            codec.decode(damaged)


@pytest.mark.parametrize(("field", "change", "message"), [
    ("payload_bits", -1, "ids of row 0 are damaged"), ("min_count", -1, "ids of row 0 are damaged"),
    ("payload_bits", -20, "row 0 is too short for its entries"), ("rows", 1, "more bytes than there are"),
    ("min_count", 1, "more entries a row"), ("vocab_size", -10, "out of range"), ("width", 8, "more entries a row"),
    ("bits", 1, "ids of row 0 are damaged"), ("bits", -5, "bits = 3 does not exist"), ("version", -1, "version 0"),
    ("nbytes", 1, "its header says"), ("columns", 1, "names of columns are damaged"),
])  # fmt: skip
def test_a_wrong_number_under_a_right_checksum_is_named(field: str, change: int, message: str) -> None:
    one_row = arguments(**ids([1, 5, 9]), **log_probs([-1, -2, -3]), log_tail=np.array([-1], np.float32))
    block = bytearray(codec.encode(**one_row))
    place = next(f for f in layout.FIELDS if f.name == field)
    (number,) = struct.unpack_from("<" + place.type, block, place.offset)
    struct.pack_into("<" + place.type, block, place.offset, number + change)
    if field != "nbytes":
        make_right(block)
    with pytest.raises(codec.CodecError, match=message):
        codec.decode(block)


def test_hostile_lengths_allocate_nothing() -> None:
    script = """
import resource, struct, numpy as np
from kdkernels.compression import codec
from test_codec_bad_input import arguments, make_right
block = codec.encode(**arguments())
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for rows, width in ((2**24, 2**31 - 1), (2, 2**31 - 1), (2**24, 0), (2**32 - 1, 3), (100, 2**20)):
    hostile = bytearray(block)
    struct.pack_into("<III", hostile, 8, rows, width, 2**31 - 1)
    make_right(hostile)
    for read in (codec.decode, codec.inspect):
        try:
            read(hostile)
        except codec.CodecError:
            continue
        raise SystemExit(f"{rows} x {width} was accepted")
"""
    assert run(script) == ""


# ---- without torch, without native code


def run(script: str) -> str:
    """What a script prints, errors included, in a fresh process."""
    paths = os.pathsep.join([str(Path(kdkernels.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    return done.stdout + done.stderr


def test_decoding_needs_no_torch() -> None:
    block = codec.encode(**arguments())
    script = f"""
import sys
sys.modules["torch"] = None  # importing it is an error from here on
from kdkernels.compression import codec
import kdkernels.compression.format
print(codec.decode(bytes.fromhex("{block.hex()}")).ids.tolist())
"""
    assert run(script) == "[[1, 5, 9], [0, 3, -1]]\n"


def test_without_native_code_the_error_names_the_remedy() -> None:
    script = """
import sys
sys.modules["kdkernels._codec"] = None
from kdkernels.compression import codec
for read in (codec.decode, codec.inspect):
    try:
        read(b"")
    except RuntimeError as error:
        print(error)
"""
    printed = run(script).splitlines()
    assert len(printed) == 2
    assert all("no native codec" in line and "pip install" in line for line in printed)

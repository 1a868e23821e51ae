"""A second reader of blocks, written from the text of `kdkernels.compression.format` alone, one bit at a time."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from kdkernels.compression import format as layout


class Bits:
    """A bit stream: the lowest bit of the first byte comes first."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.number, self.position = int.from_bytes(data, "little"), position

    def take(self, bits: int) -> int:
        value = (self.number >> self.position) & ((1 << bits) - 1)
        self.position += bits
        return value


@dataclass
class Block:
    """Everything in a block; `ids` and `log_probs` hold one list a row."""

    header: dict[str, float | int | bytes]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    log_tail: np.ndarray | None = None
    ids: list[list[int]] = field(default_factory=list)
    log_probs: list[list[np.float32]] = field(default_factory=list)


def read_value(bits: Bits, n: int) -> int:
    """One of n values, centred minimal binary code."""
    b = n.bit_length() - 1
    short = 2 ** (b + 1) - n
    rank = bits.take(b)
    if rank >= short and bits.take(1):
        rank += 2**b - short
    return (rank + (n - short) // 2) % n


def read_ids(bits: Bits, count: int, low: int, high: int) -> list[int]:
    """Binary interpolative code."""
    if count == 0:
        return []
    middle = count // 2
    number = low + middle + read_value(bits, high - low + 2 - count)
    left = read_ids(bits, middle, low, number - 1)
    return [*left, number, *read_ids(bits, count - middle - 1, number + 1, high)]


def _log_prob(code: int, bits: int, anchor: np.float32, step: int) -> np.float32:
    if bits == 16:
        return np.float32(np.uint16(code).view(np.float16))
    if bits == 32 or step == layout.RAW_ROW:
        return np.uint32(code).view(np.float32)
    if code == 2**bits - 1:
        return np.float32(-np.inf)
    return np.float32(anchor - np.float32(np.float32(code) * np.uint32(step << 16).view(np.float32)))


def read(data: bytes) -> Block:
    """The whole block."""
    values = {f.name: struct.unpack_from("<" + f.type, data, f.offset)[0] for f in layout.FIELDS}
    block, n, bits = Block(values), values["rows"], values["bits"]
    at = layout.HEADER_BYTES

    def section(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    names, listed = [], section(values["names_bytes"])
    while listed:
        names.append(listed[1 : 1 + listed[0]].decode())
        listed = listed[1 + listed[0] :]
    block.log_tail = np.frombuffer(section(4 * n), "<f4")
    block.columns = {name: np.frombuffer(section(4 * n), "<f4") for name in names}
    quantised = bits <= 12
    anchors = np.frombuffer(section(4 * n), "<f4") if quantised else np.zeros(n, np.float32)
    steps = np.frombuffer(section(2 * n), "<u2") if quantised else np.zeros(n, np.uint16)
    counts = Bits(section(-(-n * values["count_bits"] // 8)))
    offsets = Bits(section(-(-n * values["offset_bits"] // 8)))
    payload = section(-(-values["payload_bits"] // 8))
    for row in range(n):
        count = values["min_count"] + counts.take(values["count_bits"])
        start = offsets.take(values["offset_bits"]) - values["offset_bias"] + row * values["payload_bits"] // n
        stream = Bits(payload, start)
        block.ids.append(read_ids(stream, count, 0, values["vocab_size"] - 1))
        width = 32 if quantised and steps[row] == layout.RAW_ROW else bits
        codes = [stream.take(width) for _ in range(count)]
        block.log_probs.append([_log_prob(code, bits, anchors[row], int(steps[row])) for code in codes])
    return block

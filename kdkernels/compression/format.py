"""The bytes of a block, version 1: the normative text. csrc/codec_format.h says the same to the compiler.

Integers and floats are little-endian. A bit stream fills each byte from its lowest bit; a number of b bits stands in it
lowest bit first. N rows, K columns of ids, V entries of the vocabulary, k kept entries of a row.

A block is these sections, one behind the other, nothing between them:

| section | bytes | content |
|---|---|---|
| header | 64 | the fields of `FIELDS` |
| names | names_bytes | of each further column: its length (1 to 255), then that many bytes of UTF-8; all distinct |
| log_tail | 4 N | float32 |
| columns | 4 N each | float32, one column after the other |
| anchors | 4 N | float32; only if bits <= 12 |
| steps | 2 N | upper halves of float32; only if bits <= 12 |
| counts | ceil(N count_bits / 8) | k - min_count of each row, count_bits each |
| offsets | ceil(N offset_bits / 8) | offset_bits of each row r: start(r) + offset_bias - floor(r payload_bits / N) |
| payload | ceil(payload_bits / 8) | row r from bit start(r) to bit start(r + 1), or payload_bits for the last |
| padding | any | zeros, so many that N K <= 256 nbytes: a reader allocates no more than in proportion |
| checksum | 4 | CRC-32C of all bytes before it |

A row of the payload is its ids, then its k values.

**Ids** (binary interpolative coding): ``put(ids, low, high)`` of k ids in [low, high], at first [0, V - 1], writes
nothing if k = 0; else it writes the middle id, number m = floor(k / 2) counted from 0, as x = id - low - m, one of
n = high - low + 2 - k values; then put(ids before it, low, id - 1), then put(ids after it, id + 1, high).

**One of n values** (centred minimal binary code): b = floor(log2 n), s = 2^(b + 1) - n, r = (x - floor((n - s) / 2))
mod n. If r < s: the b bits of r. Else, if r < 2^b: the b bits of r, then a 0; else the b bits of r - (2^b - s), then
a 1. Any bits are the code of some value, so any bits decode to ascending ids inside the vocabulary.

**Values**, in the order of the ids:

- bits 4 to 12: a code c of that many bits; log-probability = float32(anchor - float32(c * step)), -inf if all bits of c
  are set. In a row whose step is 0xffff (no number) the values are float32 of 32 bits each.
- bits 16: float16; bits 32: float32. NaN and +inf do not occur.

**Reading**: a reader refuses a block whose magic, version, checksum or nbytes differ, whose sections do not fit into
its bytes, and a row that starts after it stops or whose ids do not end where its values begin.
"""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
    """A number of the header: name, offset in bytes, type in `struct` notation, meaning."""

    name: str
    offset: int
    type: str
    meaning: str


MAGIC = b"KDSL"
VERSION = 1
HEADER_BYTES = 64
CHECKSUM_BYTES = 4
MAX_ROWS = 2**24
MAX_PAYLOAD_BITS = 2**40
MAX_VOCAB = 2**31 - 1
MAX_ENTRIES_PER_BYTE = 256
RAW_ROW = 0xFFFF
MAX_QUANTISED_RANGE = 512.0

FIELDS = (
    Field("magic", 0, "4s", "KDSL"),
    Field("version", 4, "H", "1"),
    Field("bits", 6, "B", "of a log-probability: 4 to 12, 16 or 32"),
    Field("columns", 7, "B", "number of further columns"),
    Field("rows", 8, "I", "N, at most 2^24"),
    Field("width", 12, "I", "K, at most V"),
    Field("vocab_size", 16, "I", "V, 1 to 2^31 - 1"),
    Field("min_count", 20, "I", "least k of any row, at most K"),
    Field("count_bits", 24, "B", "bits of a number in counts, at most 31"),
    Field("offset_bits", 25, "B", "bits of a number in offsets, at most 41"),
    Field("names_bytes", 26, "H", "bytes of the section of names"),
    Field("max_error", 28, "f", "largest |decoded - encoded| log-probability of the block, nats"),
    Field("payload_bits", 32, "Q", "at most 2^40"),
    Field("id_bits", 40, "Q", "bits of the payload that are ids; for statistics only"),
    Field("offset_bias", 48, "Q", "see offsets; at most 2^40"),
    Field("nbytes", 56, "Q", "bytes of the whole block"),
)

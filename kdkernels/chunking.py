"""How many rows of logits exist at a time."""

from __future__ import annotations

DEFAULT_CHUNK_BYTES = 256 * 2**20
"""Budget for one chunk of student and teacher logits together, bytes."""


def chunk_rows(rows: int, bytes_per_row: int, chunk_bytes: int | None) -> int:
    """Rows per chunk such that a chunk's logits fit the budget, with chunks of even size.

    Args:
        rows: N, all rows.
        bytes_per_row: bytes of one row of logits, all chunked sides together.
        chunk_bytes: the budget in bytes, or None for `DEFAULT_CHUNK_BYTES`.

    Returns:
        At least 1: one row is the smallest chunk, whatever the budget.
    """
    budget = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    most = max(1, min(rows, budget // max(1, bytes_per_row)))
    chunks = -(-rows // most) if rows else 1
    return max(1, -(-rows // chunks))


def spans(rows: int, size: int) -> list[tuple[int, int]]:
    """``[begin, end)`` of each chunk, in order."""
    return [(begin, min(begin + size, rows)) for begin in range(0, rows, size)]

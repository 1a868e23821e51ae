"""What each op has to move and compute at the least: bytes, exponentials and flops of one forward and backward.

The counts are the floor's, not an implementation's: every logit read once, every gradient written once, one
exponential for each logit of either side, four matrix products for a fused head.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import Case


@dataclass(frozen=True)
class Work:
    """Least work of one forward + backward.

    Attributes:
        read, written: bytes of memory read and written.
        exponentials: how many.
        flops: multiplications and additions of the matrix products.
    """

    read: int
    written: int
    exponentials: int
    flops: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def dense(case: Case) -> Work:
    """Logits of both sides in, the student's gradient out: three streams of N x V, two exponentials an element."""
    stream = case.N * case.V * case.itemsize
    return Work(read=2 * stream, written=stream, exponentials=2 * case.N * case.V, flops=0)


def linear(case: Case) -> Work:
    """Hidden states and heads in, dX and dW out. Products: teacher 1 (zt), student 3 (zs, dX, dW)."""
    size = case.itemsize
    student, teacher = case.N * case.H + case.V * case.H, case.N * case.Ht + case.V * case.Ht
    return Work(
        read=size * (student + teacher),
        written=size * student,
        exponentials=2 * case.N * case.V,
        flops=2 * case.N * case.V * (case.Ht + 3 * case.H),
    )


OPS = {"dense": dense, "linear": linear}


def work(case: Case) -> Work:
    """Least work of a case's op."""
    return OPS[case.op](case)


def floor_seconds(
    least: Work, *, bytes_per_second: float, exps_per_second: float, flops_per_second: float = 0.0
) -> float:
    """The largest of the times that memory, exponentials and matrix products need; they overlap at best.

    Args:
        least: the op's least work.
        bytes_per_second: measured rate of the in-place stream (two reads, one write).
        exps_per_second: measured rate of exponentials.
        flops_per_second: measured rate of matrix products; needed only where there are some.

    Raises:
        ValueError: a rate that the work needs is not positive.
    """
    parts = [
        ("bytes_per_second", least.bytes, bytes_per_second),
        ("exps_per_second", least.exponentials, exps_per_second),
        ("flops_per_second", least.flops, flops_per_second),
    ]
    for name, amount, rate in parts:
        if amount and rate <= 0:
            raise ValueError(f"{name} is {rate}: a measured rate > 0 is needed for this op; measure the floors first")
    return max(amount / rate for _, amount, rate in parts if amount)

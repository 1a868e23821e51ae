"""The gate's first launch: largest logits and sums of every part of a row, and what later launches read of them.

See `kdkernels.triton.gate` for the launches and `kdkernels.triton.rows` for tiles and sides.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.rows import INFINITY, LOG2_E, read, tile
from kdkernels.triton.shards import shard_sides

LEAST = tl.constexpr(-3.402823466e38)
"""The lowest number: what a maximum over nothing is."""
TOPS, SUMS, HOT_SUMS = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4)
"""Numbers of a part of a row: largest logits, sums at T = 1, sums at T; each of the student, then of the teacher."""


@triton.jit
def read_pair(
    student, teacher, at, o, span, FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, SIZE: tl.constexpr
):
    """Both sides' logits at the places at + o; -inf outside of the row."""
    if (at >= span[0]) & (at + SIZE <= span[1]):
        zs = read(student, o + at, span, -INFINITY, FORM_S, LAYOUT, True, False)
        zt = read(teacher, o + at, span, -INFINITY, FORM_T, LAYOUT, True, False)
    else:
        zs = read(student, o + at, span, -INFINITY, FORM_S, LAYOUT, False, False)
        zt = read(teacher, o + at, span, -INFINITY, FORM_T, LAYOUT, False, False)
    return zs, zt


@triton.jit
def add_tile(acc, z, c, HOT: tl.constexpr):
    """(largest logits, sums at T = 1, sums at T) of threads, one tile further."""
    top, total, hot = acc
    most = tl.maximum(top, tl.max(z, 1))
    total = total * tl.exp2((top - most) * LOG2_E) + tl.sum(tl.exp2((z - most[:, None]) * LOG2_E), 1)
    if HOT:
        hot = hot * tl.exp2((top - most) * c) + tl.sum(tl.exp2((z - most[:, None]) * c), 1)
    return most, total, hot


@triton.jit
def merged(top, total, c):
    """The largest of several (largest logit, sum) pairs, and their sum relative to it. NaN stays in the sum."""
    most = tl.max(top, 0)
    # A bare product would be fused into the first addition of the sum, by each of two lanes with the other's rounded.
    return most, tl.sum(tl.fma(total, tl.exp2((top - most) * c), 0.0), 0)


@triton.jit
def numbers(norms, which, r, splits):
    """The address of the first part's number of that kind; ``norms [6, N, splits]``."""
    return norms + (which * tl.num_programs(0) + r) * splits


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "vocab", "splits"])
def norms_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    norms, vocab, splits, share, c, HOT: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Sums of part ``program_id(1)``, ``share`` places, of row ``program_id(0)``: ``norms [6, N, splits]`` float32."""
    r, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_, teacher_, span = shard_sides(
        r, student, student_stride, student_bias, student_scale, student_cap,
        teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap, vocab, LAYOUT,
    )  # fmt: skip
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    none, zero = tl.full([ROWS], LEAST, tl.float32), tl.zeros([ROWS], tl.float32)
    sums_s, sums_t = (none, zero, zero), (none, zero, zero)
    for at in range(split * share, tl.minimum((split + 1) * share, span[1]), size):
        zs, zt = read_pair(student_, teacher_, at, o, span, FORM_S, FORM_T, LAYOUT, size)
        sums_s, sums_t = add_tile(sums_s, zs, c, HOT), add_tile(sums_t, zt, c, HOT)
    top_s, total_s = merged(sums_s[0], sums_s[1], LOG2_E)
    top_t, total_t = merged(sums_t[0], sums_t[1], LOG2_E)
    hot_s, hot_t = total_s, total_t
    if HOT:
        _, hot_s = merged(sums_s[0], sums_s[2], c)
        _, hot_t = merged(sums_t[0], sums_t[2], c)
    tl.store(numbers(norms, TOPS, r, splits) + split, top_s)
    tl.store(numbers(norms, TOPS + 1, r, splits) + split, top_t)
    tl.store(numbers(norms, SUMS, r, splits) + split, total_s)
    tl.store(numbers(norms, SUMS + 1, r, splits) + split, total_t)
    tl.store(numbers(norms, HOT_SUMS, r, splits) + split, hot_s)
    tl.store(numbers(norms, HOT_SUMS + 1, r, splits) + split, hot_t)


@triton.jit
def of_parts(norms, which, r, splits, other, SPLITS: tl.constexpr):
    """A number of every part of row r."""
    i = tl.arange(0, SPLITS)
    return tl.load(numbers(norms, which, r, splits) + i, mask=i < splits, other=other)


@triton.jit
def whole_norm(norms, side, r, splits, SPLITS: tl.constexpr):
    """(largest logit, sum) over row r of the student (side 0) or the teacher (1)."""
    tops = of_parts(norms, TOPS + side, r, splits, LEAST, SPLITS)
    return merged(tops, of_parts(norms, SUMS + side, r, splits, 0.0, SPLITS), LOG2_E)

"""Device functions on one row: reading logits, normalisers, sums of term and grad, the gradient.

A row is walked in tiles ``[ROWS, VEC]``: each thread holds whole vectors of VEC entries (16 bytes), so sums over the
second axis stay in the thread and cost one instruction an entry. Logits become ``x = z c - R`` with ``c = log2(e) / T``
and ``R`` the rounded product of a reference logit and c: one fused multiply-add, exact however large the offset, and an
exponential is a bare ``ex2``. Only full tiles are free of masks; a row's first tile and its rest are masked.

Logits that are masked (-inf, or finite but hopeless) are rare, and a row that has some takes the careful functions,
which repeat the row at leisure. What tells: a sum that is not finite, or a spread that is.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"
# Device functions carry no annotations but constexpr: Triton reads those as its own.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOOSE = tl.constexpr(0)
"""Layout of a launch: rows start anywhere; loads of single entries."""
SHIFTED = tl.constexpr(1)
"""All operands are equally far from 16-byte boundaries: rows are read from the boundary before them."""
WHOLE = tl.constexpr(2)
"""All rows start at 16-byte boundaries and have a multiple of VEC entries."""

PLAIN = tl.constexpr(0)
"""Form of a side: the stored numbers are the logits."""
LINEAR = tl.constexpr(1)
"""scale * (x + bias)."""
CAPPED = tl.constexpr(2)
"""cap * tanh(scale * (x + bias) / cap)."""

NOTHING = tl.constexpr(0)
"""What the first sweep carries: normalisers and the lowest logits."""
FORWARD = tl.constexpr(1)
"""Also the cross term of KL(teacher || student)."""
REVERSE = tl.constexpr(2)
"""Also the cross term of KL(student || teacher)."""

FILL = tl.constexpr(-1e30)
"""Stands where a tile has no entry: no mass, and the same on both sides."""
MASKED = tl.constexpr(-1e4)
"""Log-probability of a masked entry."""
HOPELESS = tl.constexpr(-1e20)
"""Log-probabilities below come from masks."""
DOUBTFUL = tl.constexpr(1e18)
"""No divergence and no sum of products of two log-probabilities comes near it, but for hopeless logits."""
INFINITY = tl.constexpr(float("inf"))
FAR = tl.constexpr(2.0**40)
"""A sum of exponentials above tells that the reference lies some 28 nats below the largest logit, where a logarithm of
the sum and a mean of exponents have lost digits: errors of 1e-5 nats."""
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def larger2(a0, a1, b0, b1):
    every: tl.constexpr = tl.PropagateNan.ALL
    return tl.maximum(a0, b0, propagate_nan=every), tl.maximum(a1, b1, propagate_nan=every)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def widen(x):
    """Stored numbers as float32: bfloat16 pairs by one shift and one mask, without unpacking."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to the stored type, two to an instruction."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return x


@triton.jit
def anchor(base, r, stride, LAYOUT: tl.constexpr):
    """The address that the tiles of row r count from, and how many entries lie between it and the row's first."""
    row = base + r * stride  # the hints below need an operation of this function to hang on
    shift = 0
    if LAYOUT == SHIFTED:
        bits: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 16  # 2 bytes: 1, 4 bytes: 2
        shift = ((row.to(tl.int64) & 15) >> bits).to(tl.int32)
        row = tl.multiple_of(row - shift, 16)
    if LAYOUT == WHOLE:
        row = tl.multiple_of(row, 16)
    return row, shift


@triton.jit
def side_of(begin, head, shift):
    """A side as the sweeps take it, (address, bias, scale, cap), of head = (bias, scale, cap): places count from
    ``begin``, which is ``shift`` entries before the row's first."""
    return begin, None if head[0] is None else head[0] - shift, head[1], head[2]


@triton.jit
def tile(ROWS: tl.constexpr, VEC: tl.constexpr, LAYOUT: tl.constexpr):
    """Places of a tile's entries ``[ROWS, VEC]``; without vectors, such that neighbouring threads read neighbours."""
    if LAYOUT == LOOSE:
        return tl.arange(0, ROWS)[:, None] + tl.arange(0, VEC)[None, :] * ROWS
    return tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def within(o, begin, end, LAYOUT: tl.constexpr):
    """Which places hold entries of the row."""
    inside = o < end
    if LAYOUT == SHIFTED:
        inside = inside & (o >= begin)
    if LAYOUT == WHOLE:
        inside = tl.max_constancy(inside, [1, o.shape[1]])
    return inside


@triton.jit
def reciprocal(x):
    """1 / x to one ulp; 0 for infinity."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def head_logit(z, scale, cap, FORM: tl.constexpr, stored: tl.constexpr):
    """The logit of a head's output z, bias included, that was stored in dtype ``stored``.

    Of 16-bit numbers the soft cap is cap - 2 cap / (1 + e^(2u)): an ex2, a rcp and 4 more instructions, where
    libdevice's tanh takes 20. It is off by up to 4e-7 cap (1.2e-5 for a cap of 30), also where the result is small;
    numbers of 8 or 11 bits carry far larger errors by then.
    """
    if FORM == CAPPED:
        if stored == tl.float32:
            return cap * libdevice.tanh(z * (scale / cap))
        else:
            return tl.fma(reciprocal(1.0 + tl.exp2(z * (2.0 * LOG2_E * scale / cap))), -2.0 * cap, cap)
    else:
        return z * scale


@triton.jit
def head_slope(z, scale, cap, FORM: tl.constexpr):
    """The derivative of `head_logit`, of its result."""
    if FORM == CAPPED:
        return tl.fma(z * z, -scale / (cap * cap), scale)
    else:
        return scale


@triton.jit
def to_logits(x, side, o, inside, FORM: tl.constexpr):
    """Logits of stored numbers; ``side`` is (address, bias address or None, scale, cap)."""
    z = widen(x)
    if FORM != PLAIN:
        if side[1] is not None:
            z += tl.load(side[1] + o, mask=inside)
        z = head_logit(z, side[2], side[3], FORM, x.dtype)
    return z


@triton.jit
def read(side, o, span, fill, FORM: tl.constexpr, LAYOUT: tl.constexpr, WHOLE_TILE: tl.constexpr, LAST: tl.constexpr):
    """Logits at places o of one side, float32; ``fill`` outside the row. LAST: the memory is not needed again."""
    policy: tl.constexpr = "evict_first" if LAST else ""
    if WHOLE_TILE:
        return to_logits(tl.load(side[0] + o, eviction_policy=policy), side, o, None, FORM)
    else:
        inside = within(o, span[0], span[1], LAYOUT)
        x = tl.load(side[0] + o, mask=inside, other=0.0, eviction_policy=policy)
        return tl.where(inside, to_logits(x, side, o, inside, FORM), fill)


@triton.jit
def read_one(row, bias, scale, cap, index, FORM: tl.constexpr):
    """The logit of one index, which counts from the row's first entry."""
    z = tl.load(row + index).to(tl.float32)
    if FORM != PLAIN:
        if bias is not None:
            z += tl.load(bias + index)
        z = head_logit(z, scale, cap, FORM, row.dtype.element_ty)
    return z


@triton.jit
def natural(top, log_sum, per_t):
    """The normaliser as (K, r) with ``log-probability = z / T - K - r``: K is T-scaled log-sum-exp rounded, and r the
    rest, tiny: no rounding of a number near 12 stays in every log-probability. ``log_sum`` is relative to ``top``."""
    k = tl.fma(top, per_t, log_sum)
    return k, tl.fma(top, per_t, -k) + log_sum


@triton.jit
def write(to, o, span, value, LAYOUT: tl.constexpr, WHOLE_TILE: tl.constexpr):
    """Stores a tile of the gradient."""
    stored = narrow(value, to.dtype.element_ty)
    if WHOLE_TILE:
        tl.store(to + o, stored, eviction_policy="evict_first")
    else:
        tl.store(to + o, stored, mask=within(o, span[0], span[1], LAYOUT), eviction_policy="evict_first")


@triton.jit
def fill_row(to, begin, end, value, COUNT: tl.constexpr):
    """Stores one number at begin <= index < end."""
    o = tl.arange(0, COUNT)
    what = tl.full([COUNT], 0.0, tl.float32) + value
    for at in range(begin, end, COUNT):
        tl.store(to + at + o, what.to(to.dtype.element_ty), mask=at + o < end)

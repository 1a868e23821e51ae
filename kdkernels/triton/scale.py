"""A gradient times what reaches its loss, looked at on the device: a factor of 1, the usual one, costs no memory."""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.rows import narrow, widen


@triton.jit
def scaled(x, factor, dtype: tl.constexpr, PER_ROW: tl.constexpr):
    product = widen(x) * factor
    if PER_ROW:
        product = tl.where(factor == 0, 0.0, product)
    return narrow(product, dtype)


@triton.jit(do_not_specialize=["rows", "factor_stride"])
def scale_kernel(x, stride, rows, columns, factor, factor_stride, PER_ROW: tl.constexpr, SIZE: tl.constexpr):
    """``x [rows, columns] *= factor``, in float32, rounded once; rows and columns are shared out over the grid.

    Args:
        x: float32, float16 or bfloat16, rows ``stride`` entries apart.
        factor: float32 ``[rows]``, ``factor_stride`` entries apart (0: one number).
        PER_ROW: a row whose factor is 0 becomes 0, whatever it holds.

    Bytes: a row whose factor is 1 costs the read of the factor, another is read and written once.
    """
    o = tl.arange(0, SIZE)
    dtype: tl.constexpr = x.dtype.element_ty
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        f = tl.load(factor + r * factor_stride)
        if f != 1:
            row = x + tl.cast(r, tl.int64) * stride
            for at in range(tl.program_id(1) * SIZE, columns, tl.num_programs(1) * SIZE):
                if at + SIZE <= columns:
                    tl.store(row + at + o, scaled(tl.load(row + at + o), f, dtype, PER_ROW))
                else:
                    inside = at + o < columns
                    rest = tl.load(row + at + o, mask=inside)
                    tl.store(row + at + o, scaled(rest, f, dtype, PER_ROW), mask=inside)

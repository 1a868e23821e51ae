"""The SWITCH gate: two launches that cut every row between programs, one for sums (`gate_sums`) and one for the
divergence, and a third with a program a row, which decides who speaks and finds the token (`gate_token`)."""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kdkernels.triton.gate_sums import read_pair, whole_norm
from kdkernels.triton.gate_token import token_place
from kdkernels.triton.rows import INFINITY, LOG2_E, tile
from kdkernels.triton.shards import shard_sides


@triton.jit
def log2(x):
    """Within 2^-22 for x in [1, 2]."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def divergence(a, b):
    """p log2(p / m) + q log2(q / m), m = (p + q) / 2, of log2 p and log2 q: as in csrc/cuda/gate_decide.cuh, which says
    why nothing is lost where p and q are close."""
    d = tl.minimum(tl.abs(a - b), 128.0)  # where both are -inf, NaN, which min drops
    most, e = tl.exp2(tl.maximum(a, b)), tl.exp2(-d)
    total, w = 1.0 + e, d * d
    series = ((-1.4180276e-5 * w + 2.7778246e-4) * w - 5.2035102e-3) * w + 8.6643398e-2
    direct = total * (1.0 - log2(total)) - e * d
    return most * tl.where(d < 0.5, total * w * series, direct)


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "vocab", "splits"])
def parts_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    norms, parts, vocab, splits, share, SPLITS: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Twice the divergence, bits, of part ``program_id(1)`` of row ``program_id(0)``: ``parts [N, splits]`` float32."""
    r, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_, teacher_, span = shard_sides(
        r, student, student_stride, student_bias, student_scale, student_cap,
        teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap, vocab, LAYOUT,
    )  # fmt: skip
    whole_s, whole_t = whole_norm(norms, 0, r, splits, SPLITS), whole_norm(norms, 1, r, splits, SPLITS)
    log_s, log_t = libdevice.log2(whole_s[1]), libdevice.log2(whole_t[1])
    o = tile(ROWS, VEC, LAYOUT)
    size: tl.constexpr = ROWS * VEC
    total = tl.zeros([ROWS], tl.float32)
    for at in range(split * share, tl.minimum((split + 1) * share, span[1]), size):
        zs, zt = read_pair(student_, teacher_, at, o, span, FORM_S, FORM_T, LAYOUT, size)
        a, b = tl.fma(zs - whole_s[0], LOG2_E, -log_s), tl.fma(zt - whole_t[0], LOG2_E, -log_t)
        total += tl.sum(divergence(a, b), 1)
    tl.store(parts + r * splits + split, tl.sum(total, 0))


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "vocab", "splits", "top_k"])
def decide_kernel(
    student, student_stride, student_bias, student_scale, student_cap,
    teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap,
    norms, parts, threshold, uniforms, token, from_teacher, jsd, vocab, splits, share, c, top_k, top_p, p_rest,
    HAS_K: tl.constexpr, HAS_P: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr,
    FORM_S: tl.constexpr, FORM_T: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of a call of `kdkernels.ops.gate.gate_rows_`; see there what is written.

    uniforms: float64 ``[N]``, or None for the largest logit. from_teacher: uint8 ``[N]``.
    The nucleus is of top_p + p_rest, one number in two.
    """
    r = tl.program_id(0).to(tl.int64)
    student_, teacher_, span = shard_sides(
        r, student, student_stride, student_bias, student_scale, student_cap,
        teacher, teacher_stride, teacher_bias, teacher_scale, teacher_cap, vocab, LAYOUT,
    )  # fmt: skip
    i = tl.arange(0, SPLITS)
    whole_s, whole_t = whole_norm(norms, 0, r, splits, SPLITS), whole_norm(norms, 1, r, splits, SPLITS)
    total = tl.sum(tl.load(parts + r * splits + i, mask=i < splits, other=0.0).to(tl.float64), 0)
    bits = tl.minimum(tl.maximum((0.5 * total).to(tl.float32), 0.0), 1.0)
    limit = tl.load(threshold + r)
    exist = (
        (whole_s[1] > 0)
        & (whole_s[1] < INFINITY)
        & (whole_t[1] > 0)
        & (whole_t[1] < INFINITY)
        & ((limit >= 0) | (limit < 0))
    )
    speaks = exist & (bits.to(tl.float64) > limit)
    u = 0.0
    if uniforms is not None:
        u = tl.load(uniforms + r)
        wanted = exist & (u >= 0) & (u < 1)
    else:
        wanted = exist
    share_of_mass = tl.cast(top_p, tl.float64) + p_rest
    place = span[0] - 1
    if wanted:
        if speaks:
            place = token_place(teacher_, span, norms, 1, r, share, splits, u, whole_t[0], c, top_k, share_of_mass,
                                uniforms is None, HAS_K, HAS_P, FORM_T, SPLITS, SIZE)  # fmt: skip
        else:
            place = token_place(student_, span, norms, 0, r, share, splits, u, whole_s[0], c, top_k, share_of_mass,
                                uniforms is None, HAS_K, HAS_P, FORM_S, SPLITS, SIZE)  # fmt: skip
    tl.store(token + r, (place - span[0]).to(tl.int64))
    tl.store(from_teacher + r, speaks.to(tl.uint8))
    tl.store(jsd + r, tl.where(exist, bits, float("nan")))

"""The SWITCH gate: two launches that cut every row between programs, one for sums and one for the divergence, and a
third with a program a row, which decides who speaks and finds the token. See `rows` for tiles and sides.

Masses are whole numbers of 2^-40 of the row's largest, so that their sums are exact in any order. The token is looked
for among the sums of the first launch, then in one program's part of the row. Under top-k or top-p the row is swept
instead until the last logit that may be drawn is known: each sweep leaves a quarter of its bits' range.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kdkernels.triton.rows import INFINITY, LOG2_E, read, tile, to_logits
from kdkernels.triton.shards import shard_sides

LEAST = tl.constexpr(-3.402823466e38)
"""The lowest number: what a maximum over nothing is."""
WHOLE = tl.constexpr(1099511627776.0)
"""2^40."""
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


@triton.jit
def mass_of(z, top, c):
    return (tl.exp2((z - top) * c) * WHOLE).to(tl.int64)


@triton.jit
def target_of(u, total):
    """The mass that u asks for: the first entry whose cumulative mass is greater is drawn."""
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def key_of(z):
    """int32 in the order of the numbers; -0 is 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def logits_at(side, p, end, FORM: tl.constexpr):
    inside = p < end
    return tl.where(inside, to_logits(tl.load(side[0] + p, mask=inside, other=0.0), side, p, inside, FORM), -INFINITY)


@triton.jit
def first_equal(side, begin, end, value, FORM: tl.constexpr, SIZE: tl.constexpr):
    """The first place from begin to end with a logit that large."""
    first = end
    for at in range(begin, end, SIZE):
        p = at + tl.arange(0, SIZE)
        first = tl.minimum(first, tl.min(tl.where(logits_at(side, p, end, FORM) >= value, p, end), 0))
    return first


@triton.jit
def first_above(side, begin, end, target, top, c, last, FILTER: tl.constexpr, FORM: tl.constexpr, SIZE: tl.constexpr):
    """The first place from begin to end whose cumulative mass exceeds the target; without one the last that has mass;
    begin - 1 if none has. FILTER: only logits above the key last[0] count, and the first last[1] equal to it."""
    found, latest = end, begin - 1
    upto, seen = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
    for at in range(begin, end, SIZE):
        p = at + tl.arange(0, SIZE)
        z = logits_at(side, p, end, FORM)
        mass = mass_of(z, top, c)
        if FILTER:
            key = key_of(z)
            equal = (key == last[0]).to(tl.int32)
            kept = (key > last[0]) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= last[1]))
            mass = tl.where(kept, mass, 0)
            seen += tl.sum(equal, 0)
        above = (upto + tl.cumsum(mass, 0) > target) & (mass > 0)
        found = tl.minimum(found, tl.min(tl.where(above, p, end), 0))
        latest = tl.maximum(latest, tl.max(tl.where(mass > 0, p, begin - 1), 0))
        upto += tl.sum(mass, 0)
    return tl.where(found < end, found, latest)


@triton.jit
def weigh(side, span, keys, floor, top, c, MASS: tl.constexpr, FORM: tl.constexpr, SIZE: tl.constexpr):
    """Number, or mass, of the entries from each of three keys on; ``floor``: lower ones do not count."""
    one, two, three = tl.zeros([SIZE], tl.int64), tl.zeros([SIZE], tl.int64), tl.zeros([SIZE], tl.int64)
    for at in range(span[0], span[1], SIZE):
        z = logits_at(side, at + tl.arange(0, SIZE), span[1], FORM)
        key = key_of(z).to(tl.int64)
        weight = tl.where((z > -INFINITY) & (key >= floor), mass_of(z, top, c) if MASS else 1, 0)
        one += tl.where(key >= keys[0], weight, 0)
        two += tl.where(key >= keys[1], weight, 0)
        three += tl.where(key >= keys[2], weight, 0)
    return tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)


@triton.jit
def last_key(side, span, low, need, top, c, MASS: tl.constexpr, FORM: tl.constexpr, SIZE: tl.constexpr):
    """The largest key from which on entries reach the need; ``low`` if only all from there do."""
    floor, high = low, key_of(top).to(tl.int64)
    while low < high:
        wide = high - low
        keys = (low + (wide + 3) // 4, low + (2 * wide + 3) // 4, low + (3 * wide + 3) // 4)
        weights = weigh(side, span, keys, floor, top, c, MASS, FORM, SIZE)
        if weights[2] >= need:
            low = keys[2]
        elif weights[1] >= need:
            low, high = keys[1], keys[2] - 1
        elif weights[0] >= need:
            low, high = keys[0], keys[1] - 1
        else:
            high = keys[0] - 1
    return low


@triton.jit
def drawn_filtered(
    side, span, u, top, c, top_k, top_p, HAS_K: tl.constexpr, HAS_P: tl.constexpr, FORM: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The place that is drawn among the ``top_k`` largest logits, and of these the ``top_p`` of the mass."""
    every: tl.constexpr = 0x7FFFFFFF
    low, spare = key_of(tl.zeros([], tl.float32) + LEAST).to(tl.int64), tl.zeros([], tl.int64) + every
    if HAS_K:
        low = last_key(side, span, low, top_k, top, c, False, FORM, SIZE)
        more, _, _ = weigh(side, span, (low + 1, low + 1, low + 1), low, top, c, False, FORM, SIZE)
        spare = top_k - more
    each = mass_of(number_of(low.to(tl.int32)), top, c)
    more, total, _ = weigh(side, span, (low + 1, low, low), low, top, c, True, FORM, SIZE)
    if HAS_K:
        total = tl.minimum(total, more + spare * each)
    if HAS_P:
        need = tl.maximum(libdevice.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
        if more >= need:
            low = last_key(side, span, low + 1, need, top, c, True, FORM, SIZE)
            more, _, _ = weigh(side, span, (low + 1, low + 1, low + 1), low, top, c, True, FORM, SIZE)
            each = mass_of(number_of(low.to(tl.int32)), top, c)
            spare = tl.zeros([], tl.int64) + every
        if each > 0:
            spare = tl.minimum(spare, (need - more + each - 1) // each)
        _, total, _ = weigh(side, span, (low, low, low), low, top, c, True, FORM, SIZE)
        total = tl.minimum(total, more + spare * each)
    return first_above(
        side, span[0], span[1], target_of(u, total), top, c, (low.to(tl.int32), spare), True, FORM, SIZE
    )  # fmt: skip


@triton.jit
def token_place(
    side, span, norms, which, r, share, splits, u, top, c, top_k, top_p,
    GREEDY: tl.constexpr, HAS_K: tl.constexpr, HAS_P: tl.constexpr, FORM: tl.constexpr, SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The place of the token of row r if student (which = 0) or teacher (1) speaks."""
    if HAS_K or HAS_P:
        return drawn_filtered(side, span, u, top, c, top_k, top_p, HAS_K, HAS_P, FORM, SIZE)
    else:
        i = tl.arange(0, SPLITS)
        tops = of_parts(norms, TOPS + which, r, splits, LEAST, SPLITS)
        if GREEDY:
            sums = of_parts(norms, SUMS + which, r, splits, 0.0, SPLITS)
            part = tl.min(tl.where((tops >= top) & (sums > 0), i, SPLITS), 0)
            begin = tl.maximum(part * share, span[0])
            return first_equal(side, begin, tl.minimum((part + 1) * share, span[1]), top, FORM, SIZE)
        else:
            sums = of_parts(norms, HOT_SUMS + which, r, splits, 0.0, SPLITS)
            mass = (tl.exp2((tops - top) * c) * sums * WHOLE).to(tl.int64)
            upto = tl.cumsum(mass, 0)
            target = target_of(u, tl.sum(mass, 0))
            part = tl.min(tl.where((upto > target) & (mass > 0), i, SPLITS), 0)
            before = tl.sum(tl.where(i < part, mass, 0), 0)
            begin, end = tl.maximum(part * share, span[0]), tl.minimum((part + 1) * share, span[1])
            place = first_above(side, begin, end, target - before, top, c, None, False, FORM, SIZE)
            if place < begin:  # each of its entries rounds to no mass
                place = first_equal(side, begin, end, tl.max(tl.where(i == part, tops, LEAST), 0), FORM, SIZE)
            return place


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

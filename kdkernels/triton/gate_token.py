"""Which token the gate draws: a place in the row of whoever speaks.

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

from kdkernels.triton.gate_sums import HOT_SUMS, LEAST, SUMS, TOPS, of_parts
from kdkernels.triton.rows import INFINITY, to_logits

WHOLE = tl.constexpr(1099511627776.0)
"""2^40."""


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

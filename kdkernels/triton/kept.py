"""The K entries that are known of a teacher's row: gathering the student's logits there, sums, the gradient there.

Entries are taken in chunks, one to a thread. ``ids`` and ``log_probs`` are the row's; in ``kept``, float32 ``[K]``, the
student's logits at the ids wait until the row's own memory holds the gradient. A mode (see `kdkernels.eager_sparse`)
compares them under the normalisers ``norm_q`` and ``norm_p``, and `GHOST` adds the two tails as entry K.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped, no-untyped-call, index, call-overload, operator, arg-type"
# mypy: disable-error-code="assignment, attr-defined, valid-type, misc, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.element import exp
from kdkernels.triton.rows import (
    HOPELESS,
    INFINITY,
    LOG2_E,
    MASKED,
    PLAIN,
    add4,
    head_logit,
    head_slope,
    larger,
)  # fmt: skip
from kdkernels.triton.sweeps import log_prob

GHOST = tl.constexpr(0)
"""Modes, in the order of `kdkernels.ops.sparse.MODES`."""
RENORMALIZE = tl.constexpr(1)
TRUNCATE = tl.constexpr(2)
SAMPLED = tl.constexpr(3)


@triton.jit
def add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def mended(l):
    return tl.where(l < HOPELESS, MASKED, l)


@triton.jit
def gather_kept(
    row, bias, scale, cap, ids, log_probs, kept, bits, shift, count, vocab, FORM_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """First look at the entries: the student's logits go to ``kept``, -inf where nothing is held, and their places
    (``shift`` further on) are marked in ``bits``, which are 0.

    Returns the largest logit and log-probability (NaN where there is one), the id of the latter (-1 if all are -inf),
    the number of entries held, and whether ids descend, repeat, leave the vocabulary or follow a -1.
    """
    o = tl.arange(0, CHUNK)
    top_z = tl.full([CHUNK], -INFINITY, tl.float32)
    top_p, best = top_z, tl.zeros([CHUNK], tl.int32)
    number, wrong = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for at in range(0, count, CHUNK):
        j = at + o
        index = tl.load(ids + j, mask=j < count, other=-1)
        after = tl.load(ids + j + 1, mask=j + 1 < count, other=-1)
        astray = (index < -1) | (index >= vocab) | ((after >= 0) & ((index < 0) | (after <= index)))
        held = (index >= 0) & (index < vocab)
        z = tl.load(row + index, mask=held, other=0.0).to(tl.float32)
        if FORM_S != PLAIN:
            if bias is not None:
                z += tl.load(bias + index, mask=held, other=0.0)
            z = head_logit(z, scale, cap, FORM_S, row.dtype.element_ty)
        z = tl.where(held, z, -INFINITY)
        tl.store(kept + j, z, mask=j < count)
        place = index + shift
        tl.atomic_or(bits + place // 32, 1 << (place % 32), mask=held, sem="relaxed", scope="cta")
        lp = tl.where(held, tl.load(log_probs + j, mask=j < count, other=0.0), -INFINITY)
        best = tl.where(lp > top_p, index, best)
        top_z, top_p = larger(top_z, z), larger(top_p, lp)
        number += (index >= 0).to(tl.int32)
        wrong = wrong | astray.to(tl.int32)
    highest, likeliest = tl.reduce(top_z, 0, larger), tl.reduce(top_p, 0, larger)
    first = tl.min(tl.where(top_p == likeliest, best, 2147483647), 0)
    first = tl.where(likeliest > -INFINITY, first, -1)
    return highest, likeliest, first, tl.sum(number, 0), tl.max(wrong, 0)


@triton.jit
def sum_kept(kept, ids, log_probs, count, top_z, top_p, c, CHUNK: tl.constexpr):
    """Sums of e^x (x relative to top_z, base 2), e^(z - top_z), e^x x, and of e^(lp - top_p), over the entries."""
    o = tl.arange(0, CHUNK)
    zero = tl.zeros([CHUNK], tl.float32)
    total, cold, heat, mass = zero, zero, zero, zero
    base = tl.where(top_z == -INFINITY, 0.0, top_z)
    for at in range(0, count, CHUNK):
        j = at + o
        d = tl.load(kept + j, mask=j < count, other=-INFINITY) - base
        held = tl.load(ids + j, mask=j < count, other=-1) >= 0
        lp = tl.load(log_probs + j, mask=held, other=-INFINITY)
        e = tl.exp2(d * c)
        total += e
        cold += tl.exp2(d * LOG2_E)
        heat += tl.where(e == 0, 0.0, e * (d * c))
        mass += tl.exp2((lp - top_p) * LOG2_E)
    return tl.reduce((total, cold, heat, mass), 0, add4)


@triton.jit
def entries(
    kept, ids, log_probs, j, count, tails, norm_q, norm_p, per_t, numbers,
    TERM: tl.constexpr, GRAD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """A chunk of entries: (which exist, lp, q, term, grad), the last three 0 where none does.

    tails: (teacher's, student's log tail, whether there is one); norm_q: student's normaliser as (K, r); norm_p: what
    is taken off the teacher's log-probabilities; numbers: (a, b, excess)."""
    a, b, excess = numbers
    exists = tl.load(ids + j, mask=j < count, other=-1) >= 0
    lp = tl.load(log_probs + j, mask=exists, other=-INFINITY) - norm_p
    lq = log_prob(tl.load(kept + j, mask=exists, other=-INFINITY), norm_q, per_t, True)
    if MODE == GHOST:
        last = (j == count) & tails[2]
        exists = exists | last
        lp, lq = tl.where(last, tails[0], lp), tl.where(last, mended(tails[1]), lq)
    q = exp(lq)
    if MODE == SAMPLED:
        target = tl.exp(lp)
        term, grad = -target * lq, -target
    else:
        term, grad = TERM(mended(lp), lq, a, b), GRAD(mended(lp), lq, a, b)
    if MODE == TRUNCATE:
        term -= excess * (q - exp(mended(lp)))
        grad -= excess * q
    return exists, lp, tl.where(exists, q, 0.0), tl.where(exists, term, 0.0), tl.where(exists, grad, 0.0)


@triton.jit
def compare_kept(
    kept, ids, log_probs, count, tails, norm_q, norm_p, per_t, numbers,
    TERM: tl.constexpr, GRAD: tl.constexpr, MODE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of term and grad, the teacher's entropy (without a tail that is no entry), grad and q of the tail."""
    o = tl.arange(0, CHUNK)
    zero = tl.zeros([CHUNK], tl.float32)
    terms, grads, heat, tail_grad, tail_q = zero, zero, zero, zero, zero
    for at in range(0, count + (1 if MODE == GHOST else 0), CHUNK):
        j = at + o
        exists, lp, q, term, grad = entries(
            kept, ids, log_probs, j, count, tails, norm_q, norm_p, per_t, numbers, TERM, GRAD, MODE
        )
        terms += term
        grads += grad
        heat += tl.where(exists & (lp > -INFINITY), tl.exp(lp) * lp, 0.0)
        if MODE == GHOST:
            tail_grad += tl.where(j == count, grad, 0.0)
            tail_q += tl.where(j == count, q, 0.0)
    return tl.reduce((terms, grads, heat, tail_grad, tail_q), 0, add5)


@triton.jit
def scatter_kept(
    to, student, kept, ids, log_probs, count, tails, norm_q, norm_p, norm, per_t, numbers, k, total, ce, label, cold,
    TERM: tl.constexpr, GRAD: tl.constexpr, MODE: tl.constexpr, COLD: tl.constexpr,
    FORM_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the kept entries: k (grad - q total), the label's share, the chain rule of the form.

    to: the gradient's row; norm: the student's normaliser over the whole vocabulary; label: its index or None; cold:
    the student's top and 1 / sum at temperature 1."""
    o = tl.arange(0, CHUNK)
    for at in range(0, count, CHUNK):
        j = at + o
        _exists, _lp, q, _term, grad = entries(
            kept, ids, log_probs, j, count, tails, norm_q, norm_p, per_t, numbers, TERM, GRAD, MODE
        )
        index = tl.load(ids + j, mask=j < count, other=-1)
        z = tl.load(kept + j, mask=j < count, other=-INFINITY)
        g = k * (grad - q * total)
        if label is not None:
            if COLD:
                g += tl.exp2((z - cold[0]) * LOG2_E) * (ce * cold[1])
            else:
                g += tl.exp(log_prob(z, norm, per_t, False)) * ce
            g = tl.where(index == label, g - ce, g)
        if FORM_S != PLAIN:
            g *= head_slope(z, student[2], student[3], FORM_S)
        tl.store(to + index, g.to(to.dtype.element_ty), mask=index >= 0)

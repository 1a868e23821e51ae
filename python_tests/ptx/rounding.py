"""Floating-point arithmetic that numpy does not have: bfloat16, fused multiply-add, directed rounding, flushing, NaN.

Fused operations are exact by way of float64 and rounding to odd (Boldo and Melquiond, "Emulation of FMA and correctly
rounded sums", 2008): a sum rounded to odd in float64 keeps enough to be rounded once more without error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

CANONICAL_NAN = {np.dtype(np.float32): np.uint32(0x7FFFFFFF), np.dtype(np.float16): np.uint16(0x7FFF)}
_BITS = {np.dtype(np.float16): np.uint16, np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}


@contextlib.contextmanager
def flushing(active: bool = True) -> Iterator[None]:
    """Within it the processor treats float32 subnormals, given and made, as zeros of their sign: what `.ftz` says."""
    if not active:
        yield
        return
    if not torch.set_flush_denormal(True):
        raise RuntimeError("this processor cannot flush subnormals, which the emulator needs for .ftz")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def canonical(values: Array) -> Array:
    """In place: every NaN of a float32 or float16 array becomes the NaN that PTX arithmetic returns."""
    total = np.add.reduce(values)
    if np.isnan(total):  # a NaN among them, or infinities of both signs
        nan = np.isnan(values)
        if nan.any():
            values.view(_BITS[values.dtype])[nan] = CANONICAL_NAN[values.dtype]
    return values


def from_bf16(bits: Array) -> Array:
    """uint16 bfloat16 to float32, exactly."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: Array, mode: str = "rn") -> Array:
    """float32 to uint16 bfloat16; `rn` (ties to even) or `rz`. NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if mode == "rn":
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    result = (bits >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), result)


def to_f16(values: Array, mode: str = "rn") -> Array:
    """float32 to float16; NaN becomes 0x7fff."""
    result = narrow(np.asarray(values), np.float16, mode)
    return canonical(np.atleast_1d(result))


def narrow(values: Array, kind: type, mode: str) -> Array:
    """Rounds to a narrower numpy float `kind` by `mode`: rn, rz, rm (down) or rp (up)."""
    near = values.astype(kind)
    if mode == "rn":
        return near
    wide = near.astype(values.dtype)
    if mode == "rm":
        wrong, toward = wide > values, -np.inf
    elif mode == "rp":
        wrong, toward = wide < values, np.inf
    else:
        wrong, toward = np.abs(wide) > np.abs(values), 0.0
    return np.where(wrong, np.nextafter(near, kind(toward)), near)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64 rounded to odd: the exact sum if it fits, else the neighbour whose last bit is 1."""
    total = a + b
    virtual = total - a
    error = (a - (total - virtual)) + (b - virtual)
    bits = np.atleast_1d(total).view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)  # the exact sum lies further from 0 than `total`
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


_HALF_WAY = np.int64(1 << 28)
_BELOW = np.int64((1 << 29) - 1)


def fma32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """float32 a * b + c, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)  # exact: 48 bits
    if mode != "rn":
        return narrow(odd_sum(*np.broadcast_arrays(product, np.asarray(c, np.float64))), np.float32, mode)
    total = np.add(product, c)
    result = np.atleast_1d(total).astype(np.float32)
    # Rounding twice differs from rounding once only if `total` looks like a tie, or the result is subnormal.
    doubtful = (np.atleast_1d(total).view(np.int64) & _BELOW) == _HALF_WAY
    tiny = np.abs(result) < np.float32(2.0**-125)
    if tiny.any():
        doubtful |= tiny & (total != 0)
    if doubtful.any():
        products, addends = np.broadcast_arrays(np.atleast_1d(product), np.asarray(c, np.float64))
        result[doubtful] = odd_sum(products[doubtful], addends[doubtful]).astype(np.float32)
    return result


def fma64(a: Array, b: Array, c: Array) -> Array:
    """float64 a * b + c, rounded once (barring overflow or underflow of intermediate terms)."""
    high, low = _two_product(a, b)
    upper, lower = _two_sum(c, low)
    top, rest = _two_sum(high, upper)
    exact = top + odd_sum(*np.broadcast_arrays(rest, lower))
    plain = a * b + c
    return np.where(np.isfinite(exact), exact, plain)


def fma16(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values that hold 16-bit floats, as float64 rounded to odd: to be rounded once more."""
    product = np.multiply(a, b, dtype=np.float64)
    return odd_sum(*np.broadcast_arrays(np.atleast_1d(product), np.asarray(c, np.float64)))


def odd_to_f32(values: Array) -> Array:
    """float64 to float32 rounded to odd."""
    toward_zero = narrow(values, np.float32, "rz")
    finite = np.isfinite(toward_zero)
    inexact = finite & (toward_zero.astype(np.float64) != values)
    return (toward_zero.view(np.uint32) | inexact).view(np.float32)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    product = np.asarray(a * b)
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = np.asarray(a) * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - a)
    return high, a - high

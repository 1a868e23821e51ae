"""The approximate functions, as wrong as the PTX ISA allows them to be.

The exact value (float64) is moved by a pseudo-random share of the stated maximum error, then rounded. The share is a
hash of the argument's bits and the seed: one argument always gives one result, as on hardware. Special values (zeros,
infinities, NaN) follow the ISA's tables. `Approximation(noise=0)` rounds correctly instead.

Source: PTX ISA, chapter 9.7.3 "Floating Point Instructions", the notes of div (9.7.3.8), rcp (.13), sqrt (.15), rsqrt
(.16), sin (.18), cos (.19), lg2 (.20), ex2 (.21) and tanh (.22); each function below states its bound.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ULP = 2.0**-23
_HALF = 2.0**-25  # what rounding to float32 may add, relative


@dataclasses.dataclass(frozen=True)
class Approximation:
    """Seed, and the share of the permitted error that is used (0 to 1)."""

    seed: int = 0
    noise: float = 1.0

    def share(self, argument: Array, salt: int) -> Array:
        """float64 in [-noise, noise], a hash of the float32 argument's bits."""
        with np.errstate(over="ignore"):
            bits = argument.view(np.uint32) ^ np.uint32((self.seed * 0x9E3779B1 + salt * 0x7F4A7C15) & 0xFFFFFFFF)
            bits = bits * np.uint32(0x85EBCA6B)
            bits ^= bits >> np.uint32(13)
            bits *= np.uint32(0xC2B2AE35)
            bits ^= bits >> np.uint32(16)
        result: Array = bits.view(np.int32) * (self.noise * 2.0**-31)
        return result

    def ex2(self, x: Array) -> Array:
        """2^x: within 2 ulp of the correctly rounded result; ex2(0) = 1 (also of subnormals), ex2(-inf) = 0."""
        exact = np.exp2(x, dtype=np.float64)
        if self.noise:
            most = np.minimum(2.0 * self._ulp(exact), exact)  # never below 0
            most[np.abs(x) < 2.0**-126] = 0.0
            exact += most * self.share(x, 1)
        return exact.astype(np.float32)

    def lg2(self, x: Array) -> Array:
        """log2(x): within 2^-22, absolute in (0.5, 2), relative elsewhere; lg2(0) = -inf, below 0 NaN."""
        exact = np.log2(x, dtype=np.float64)
        if self.noise:
            size = np.maximum(np.abs(exact), 1.0)
            exact += np.where(np.isfinite(exact), size * (2.0**-22 - 2.0**-24), 0.0) * self.share(x, 2)
        return exact.astype(np.float32)

    def rcp(self, x: Array) -> Array:
        """1/x: within 1 ulp; keeps the sign of zeros and infinities."""
        return self._within(np.reciprocal(x, dtype=np.float64), x, 3, 0.5)

    def sqrt(self, x: Array) -> Array:
        """Square root: relative error at most 2^-23; sqrt(-0) = -0."""
        exact = np.sqrt(x, dtype=np.float64)
        return (exact * (1 + self.share(x, 4) * (2.0**-23 - 2.0**-24))).astype(np.float32)

    def rsqrt(self, x: Array) -> Array:
        """1/sqrt(x): relative error at most 2^-22.9; rsqrt(+-0) = +-inf, below 0 NaN."""
        exact = np.reciprocal(np.sqrt(x, dtype=np.float64))
        return (exact * (1 + self.share(x, 5) * (2.0**-22.9 - 2.0**-24))).astype(np.float32)

    def divide(self, a: Array, b: Array, *, full: bool) -> Array:
        """a/b within 2 ulp. `approx` gives 0 (NaN for infinite a) where 2^126 < |b| < 2^128, `full` does not."""
        a, b = np.broadcast_arrays(a, b)
        result = self._within(np.divide(a, b, dtype=np.float64), np.ascontiguousarray(a), 6, 1.5)
        if not full:
            huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
            result = np.where(huge, np.where(np.isinf(a), np.nan, np.float32(0) * a * np.sign(b)), result)
        return result.astype(np.float32)

    def sin(self, x: Array) -> Array:
        """Sine: absolute error 2^-20.5 in [-2 pi, 2 pi]; 2^-14.7 up to 100 pi, which is not added here."""
        return self._absolute(np.sin(x, dtype=np.float64), x, 7, 2.0**-20.5)

    def cos(self, x: Array) -> Array:
        """Cosine: as `sin`."""
        return self._absolute(np.cos(x, dtype=np.float64), x, 8, 2.0**-20.5)

    def tanh(self, x: Array) -> Array:
        """Hyperbolic tangent: relative error at most 2^-11."""
        exact = np.tanh(x, dtype=np.float64)
        return (exact * (1 + self.share(x, 9) * (2.0**-11 - 2.0**-24))).astype(np.float32)

    @staticmethod
    def _ulp(exact: Array) -> Array:
        """Spacing of float32 numbers at |exact|, 0 for infinities and NaN."""
        bits = exact.view(np.uint64) & np.uint64(0x7FF0000000000000)
        spacing = np.maximum(bits.view(np.float64), 2.0**-126) * ULP
        return np.where(bits == np.uint64(0x7FF0000000000000), 0.0, spacing)

    def _within(self, exact: Array, x: Array, salt: int, ulps: float) -> Array:
        if self.noise:
            exact = np.where(exact == 0, exact, exact + self._ulp(exact) * (self.share(x, salt) * ulps))
        return exact.astype(np.float32)

    def _absolute(self, exact: Array, x: Array, salt: int, bound: float) -> Array:
        return (exact + self.share(x, salt) * (bound - _HALF)).astype(np.float32)

"""The element language, spoken by Triton, and `as_triton`, which makes a device function of an element function.

The functions are those of `kdkernels.divergences._element`, name by name, on blocks of float32 or float64. The module
itself is the global `tl` of the device functions that `as_triton` makes: Triton looks names up in modules.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped"
# Device functions carry no annotations: Triton reads those as its own.

from __future__ import annotations

import functools
import importlib
import re
import sys
import types
from typing import TYPE_CHECKING, Any

from kdkernels.triton import require

require()

import triton  # noqa: E402
import triton.language as _language  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    jit: Callable[[Any], Any]
else:
    jit = triton.jit


@jit
def exp(x):
    """e^x, x held at -87 from below (-700 in float64) by compare and select: PTX's max would drop a NaN."""
    floor = -700.0 if x.dtype == _language.float64 else -87.0
    return _language.exp(_language.where(x < floor, floor, x))


@jit
def log(x):
    """Natural logarithm."""
    return _language.log(x)


@jit
def abs(x):
    """Absolute value."""
    return _language.abs(x)


@jit
def where(condition, x, y):
    """`x` where the comparison holds, else `y`."""
    return _language.where(condition, x, y)


@jit
def maximum(x, y):
    """The larger; NaN if either is NaN."""
    return _language.maximum(x, y, propagate_nan=_language.PropagateNan.ALL)


@jit
def minimum(x, y):
    """The smaller; NaN if either is NaN."""
    return _language.minimum(x, y, propagate_nan=_language.PropagateNan.ALL)


@jit
def near(x):
    """|x| < 1/4 in float32, never in float64."""
    limit = 0.0 if x.dtype == _language.float64 else 0.25
    return _language.abs(x) < limit


@jit
def kl(p, q, d):
    """p d - p + q for d = log p - log q, without its cancellation where d is near 0."""
    series = 1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d * (1 / 5040)))))
    return _language.where(near(d), p * d * d * series, p * (d - 1.0) + q)


@functools.cache
def as_triton(function: Callable[..., Any], quick: bool = False) -> Any:
    """The Triton device function of an element function (`Elements.term` or `.grad`); pass it as a constexpr.

    ``quick``: exp does not hold its argument from below, for blocks of log-probabilities that are all above -87.

    Its code object is used as it stands, with this module for `tl`: no source is rewritten. One result per function,
    so that Triton's own caches hit. Under TRITON_INTERPRET=1 the result runs on the CPU.
    """
    # Triton looks annotations up as well (any of its own types will do); its interpreter wants to see triton.language.
    words = re.findall(r"\w+", " ".join(str(text) for text in function.__annotations__.values()))
    scope: dict[str, Any] = {word: _language.tensor for word in words if word in function.__globals__}
    scope.update({key: value for key, value in function.__globals__.items() if isinstance(value, types.ModuleType)})
    module = importlib.import_module("kdkernels.triton.quick") if quick else sys.modules[__name__]
    scope.update({"tl": module, "triton_language": _language})
    rebuilt = types.FunctionType(function.__code__, scope, function.__name__)
    rebuilt.__module__ = function.__module__
    # Triton knows a device function within a kernel by its name
    rebuilt.__qualname__ = function.__qualname__ + ("_quick" if quick else "")
    return jit(rebuilt)

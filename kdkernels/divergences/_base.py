"""What a divergence is made of: two element functions, a name, and parameters with their legal range."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from kdkernels.divergences import _element as tl

__all__ = ["DIVERGENCES", "ELEMENTS", "Divergence", "ElementFunction", "Elements", "Kernel", "parameter", "tl"]

ElementFunction = Callable[[Tensor, Tensor, float, float], Tensor]
"""`f(lp, lq, a, b)`: log-probabilities of teacher and student (same shape, float32 or float64), two parameters."""


class Kernel(NamedTuple):
    """What a backend is asked to run: the name of a pair of element functions and the parameters they get."""

    name: str
    a: float = 0.0
    b: float = 0.0


class Elements:
    """`term` and `grad` under the name a kernel finds them by. Subclasses with both are registered in `ELEMENTS`.

    The divergence is `D = sum_v term(lp_v, lq_v, a, b)`; `grad` is the derivative of `term` with respect to `lq`.
    Both are static methods in the element language (see `_element`): assignments and one return. They run on torch
    tensors as they stand, become Triton functions, and are printed as C++. An entry with no mass arrives as -1e4.
    """

    name: ClassVar[str]

    if TYPE_CHECKING:  # a subclass that is not separable, or another divergence's limit, has none

        @staticmethod
        def term(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor: ...

        @staticmethod
        def grad(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor: ...

    @staticmethod
    def excess(a: float, b: float) -> float:
        """c, where `term` is the published formula plus ``c (q - p)``: over the whole vocabulary that sums to nothing,
        over a part of it (``sparse_mode="truncate"``) it has to be taken off."""
        return 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        has = [word for word in ("term", "grad") if word in vars(cls)]
        if len(has) == 1:
            raise TypeError(f"{cls.__name__} defines {has[0]} only; term and grad go together")
        if has:
            _register(ELEMENTS, cls)


@dataclasses.dataclass(frozen=True)
class Divergence(Elements):
    """A divergence with its parameters chosen; subclass it (a frozen dataclass) in a file of this folder, or anywhere.

    Parameters are dataclass fields made by `parameter`, at most two: `a` and `b` of the element functions, in order.
    """

    separable: ClassVar[bool] = True
    """False: not a sum over the vocabulary of one function; it has an op of its own and no element functions."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(DIVERGENCES, cls)

    def __post_init__(self) -> None:
        """Checks every parameter; the error names the parameter, its value, the legal range and a remedy."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(
                    f"{type(self).__name__}: {field.name} must be a number, not {type(value).__name__} {value!r}"
                )
            allowed: _Range | None = field.metadata.get("range")
            if allowed is not None and not allowed.holds(float(value)):
                told = f"{type(self).__name__}: {field.name} is {value}; allowed: {allowed.text(field.name)}"
                raise ValueError(f"{told}. {allowed.remedy}" if allowed.remedy else told)
            object.__setattr__(self, field.name, float(value))

    def kernel(self) -> Kernel:
        """The element functions that compute this divergence; limit cases (a parameter at its bound) override this."""
        return Kernel(self.name, *(float(getattr(self, field.name)) for field in dataclasses.fields(self)))


DIVERGENCES: dict[str, type[Divergence]] = {}
ELEMENTS: dict[str, type[Elements]] = {}


def _register(table: dict[str, Any], cls: type[Elements]) -> None:
    name = vars(cls).get("name")
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(
            f'{cls.__name__} needs its own class attribute `name`, an identifier such as "forward_kl"; it has {name!r}'
        )
    other = table.get(name)
    # the same class defined again (a decorator with slots, a reloaded module) replaces itself
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(
            f"{cls.__name__}: the name {name!r} is taken by {other.__module__}.{other.__qualname__}; choose another"
        )
    table[name] = cls


@dataclasses.dataclass(frozen=True)
class _Range:
    low: float
    high: float
    open_low: bool
    open_high: bool
    or_zero: bool
    remedy: str

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and ((above and below) or (self.or_zero and value == 0))

    def text(self, name: str) -> str:
        low = f"{self.low:g} {'<' if self.open_low else '<='} " if self.low > -math.inf else ""
        high = f" {'<' if self.open_high else '<='} {self.high:g}" if self.high < math.inf else ""
        return ("0, or " if self.or_zero else "") + low + name + (high or " and finite")


def parameter(
    default: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    or_zero: bool = False,
    remedy: str = "",
) -> Any:
    """A parameter of a divergence: a dataclass field with a default and a checked range `low <= value <= high`.

    `open_low` and `open_high` exclude the bound, `or_zero` also allows exactly 0, `remedy` ends the error message.
    """
    return dataclasses.field(
        default=default, metadata={"range": _Range(low, high, open_low, open_high, or_zero, remedy)}
    )

"""One way to say that an argument is wrong: its name, its value, what is allowed, what to do."""

from __future__ import annotations

import math
import os
from typing import Any, NoReturn


def fail(error: type[Exception], name: str, value: object, allowed: str, remedy: str = "") -> NoReturn:
    """Raise ``error`` with the project's wording."""
    text = f"{name} = {value}: must be {allowed}"
    raise error(f"{text}; {remedy}" if remedy else text)


def require_finite_number(name: str, value: Any, *, optional: bool = False) -> None:
    """Reject what is not a finite int or float (bool and NaN included)."""
    if value is None and optional:
        return
    # not math.isfinite: torch.compile(dynamic=True) turns numbers into symbols, which only comparisons can take
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        remedy = "use .item()" if hasattr(value, "item") else ""
        fail(ValueError, name, repr(value), "a finite number" + (" or None" if optional else ""), remedy)


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Reject what is not one of ``allowed``, guessing what was meant."""
    if value in allowed:
        return
    import difflib

    close = difflib.get_close_matches(str(value), allowed, n=1)
    fail(
        ValueError,
        name,
        repr(value),
        "one of " + ", ".join(map(repr, allowed)),
        f"did you mean {close[0]!r}?" if close else "",
    )


def values_checked() -> bool:
    """True where KDKERNELS_CHECK=1 asks for errors in values on every device (costs a host synchronisation)."""
    return os.environ.get("KDKERNELS_CHECK", "0") not in ("", "0")

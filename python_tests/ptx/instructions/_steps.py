"""Steps for instructions that compute each thread's result from its own operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..lanes import Lanes, Mask, Step
from ..parser import Instruction
from ..scalars import element

Array = np.ndarray[Any, Any]


def ufunc_step(lanes: Lanes, instruction: Instruction, ufunc: np.ufunc, kind: str, *sources: Array) -> Step:
    """destination = ufunc(sources), all of type `kind`; the unmasked case writes in place."""
    register = lanes.target(instruction.operands[0])
    if register is None or register.itemsize != lanes_width(kind):
        return function_step(lanes, instruction, ufunc, kind, *sources)
    view = register.view(element(kind))

    def step(mask: Mask) -> None:
        if mask is None:
            ufunc(*sources, out=view)
        else:
            register[...] = np.where(mask, ufunc(*sources).view(register.dtype), register)

    return step


def lanes_width(kind: str) -> int:
    """Bytes of a register that holds `kind`."""
    from ..scalars import BITS

    return max(BITS[kind] // 8, 1)


def function_step(
    lanes: Lanes, instruction: Instruction, function: Callable[..., Array], kind: str, *sources: Array
) -> Step:
    """destination = function(sources), extended to the register as `kind` says."""
    assign = lanes.assigner(instruction.operands[0], kind)

    def step(mask: Mask) -> None:
        assign(np.asarray(function(*sources)), mask)

    return step

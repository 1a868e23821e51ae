"""PTX's scalar types as numpy types.

Registers are kept as unsigned integers of their width (predicates as bool); an operand is a view of one in the
instruction's type. bfloat16 has no numpy type: it travels as uint16. A packed type (f32x2, f16x2, bf16x2) is a view of
twice as many elements.
"""

from __future__ import annotations

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

_plain = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
_floats = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}

# Width in bits of every type name that may end an instruction.
BITS: dict[str, int] = {**_plain, **_floats, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "pred": 1, "b128": 128}


def element(name: str) -> type:
    """The numpy type of one element of PTX type `name`."""
    name = PACKED.get(name, name)
    if name == "pred":
        return np.bool_
    if name == "bf16":
        return np.uint16
    kind = {"b": UNSIGNED, "u": UNSIGNED, "s": SIGNED, "f": FLOAT}[name[0]]
    return kind[BITS[name]]


def container(bits: int) -> type:
    """The numpy type of a register of `bits`."""
    return np.bool_ if bits == 1 else UNSIGNED[bits]


def is_float(name: str) -> bool:
    """Whether the type's elements are floating-point numbers."""
    return PACKED.get(name, name) in _floats


def is_signed(name: str) -> bool:
    """Whether the type's elements are signed integers."""
    return name[0] == "s"

"""A few lines of PTX as a kernel: what the tests of single instructions run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .launch import Settings, run
from .report import Report

Array = np.ndarray[Any, Any]

_PREFIX = {1: "h", 2: "h", 4: "w", 8: "d"}
_BANKS = ".reg .pred %p<16>; .reg .b16 %h<64>; .reg .b32 %w<64>; .reg .b64 %d<64>;"


def kernel(body: str, parameters: int = 0, head: str = "", directives: str = "") -> str:
    """PTX of a kernel `snippet` with 64-bit parameters p0, p1, ... and registers %p, %h, %w, %d of 1, 16, 32, 64 bits.

    `head` declares module variables; `directives` such as `.reqntid 32` come before the body.
    """
    names = ", ".join(f".param .u64 p{index}" for index in range(parameters))
    entry = f".visible .entry snippet({names}) {directives}"
    return f".version 8.7\n.target sm_90a\n.address_size 64\n{head}\n{entry}\n{{ {_BANKS}\n{body}\nret;\n}}\n"


def per_thread(
    body: str, inputs: Sequence[Array], outputs: Sequence[type], *, settings: Settings | None = None
) -> tuple[list[Array], Report]:
    """Runs `body` once per element: thread i has {0}, {1}, ... = inputs[k][i] and leaves results in {o0}, {o1}, ...

    Inputs and outputs of 1 to 8 bytes live in registers of 16, 32 or 64 bits. `{tid}` is the thread's number.
    """
    count = len(inputs[0])
    results = [np.zeros(count, kind) for kind in outputs]
    names = {"tid": "%w63"}
    lines = ["mov.u32 %w63, %tid.x; mov.u32 %w62, %ctaid.x; mov.u32 %w61, %ntid.x; mad.lo.u32 %w62, %w62, %w61, %w63;"]
    lines.append(f"setp.ge.u32 %p15, %w62, {count}; @%p15 ret; cvt.u64.u32 %d63, %w62;")
    for position, array in enumerate([*inputs, *results]):
        name, size = f"%{_PREFIX[array.itemsize]}{40 + position}", array.itemsize
        names[str(position) if position < len(inputs) else f"o{position - len(inputs)}"] = name
        lines.append(f"ld.param.u64 %d62, [p{position}]; mad.lo.s64 %d{50 + position}, %d63, {size}, %d62;")
        if position < len(inputs):
            lines.append(f"ld.global.b{8 * size} {name}, [%d{50 + position}];")
    lines.append(re.sub(r"\{(o?\d+|tid)\}", lambda match: names[match[1]], body))
    for position, array in enumerate(results):
        place = position + len(inputs)
        lines.append(f"st.global.b{8 * array.itemsize} [%d{50 + place}], {names[f'o{position}']};")
    arrays = [*(np.ascontiguousarray(array) for array in inputs), *results]
    block = min(count, 128)
    report = run(
        kernel("\n".join(lines), len(arrays)), (-(-count // block),), block, arrays, settings=settings or Settings()
    )
    return results, report


def unary(instruction: str, values: Array, result: type, **options: Any) -> Array:
    """`instruction` such as "neg.f32" applied to each value."""
    return per_thread(f"{instruction} {{o0}}, {{0}};", [values], [result], **options)[0][0]


def binary(instruction: str, a: Array, b: Array, result: type, **options: Any) -> Array:
    """`instruction` applied to pairs."""
    return per_thread(f"{instruction} {{o0}}, {{0}}, {{1}};", [a, b], [result], **options)[0][0]


def ternary(instruction: str, a: Array, b: Array, c: Array, result: type, **options: Any) -> Array:
    """`instruction` applied to triples."""
    return per_thread(f"{instruction} {{o0}}, {{0}}, {{1}}, {{2}};", [a, b, c], [result], **options)[0][0]

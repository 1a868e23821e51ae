"""Damaged compiled code is noticed: barriers, waits, masks and shuffles of a row kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx import Fault
from ptx.mutants import Mutants
from ptx.triton_shim import Emulator

pytest.importorskip("triton")
from test_ptx_triton import OPTIONS, softmax_rows


def survives(mutate: Any, width: int) -> bool:
    """Whether the damaged kernel runs without a fault and gives right results."""
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    if width > 511:
        x[0, 511] = 200.0  # of the last lane of the last warp: whoever misses it overflows
    out = torch.empty(2, width)
    arguments = {"X": x, "OUT": out, "BIAS": None, "stride": width, "V": width, "BLOCK": 1024}
    emulator = Emulator(90, mutate=mutate)
    try:
        emulator.start(softmax_rows, (2, 1, 1), arguments, OPTIONS)
    except Fault:
        return False
    return torch.allclose(out, x.softmax(-1), rtol=1e-5, atol=1e-7)


def compiled(width: int) -> str:
    texts: list[str] = []
    assert survives(lambda text: texts.append(text) or text, width)
    return texts[0]


@pytest.mark.parametrize(
    ("kind", "widths", "count"), [("barriers", (2048,), 3), ("masks", (3, 1500), 20), ("shuffles", (2048,), 10)]
)
def test_every_mutant_of_a_row_kernel_is_killed(kind: str, widths: tuple[int, ...], count: int) -> None:
    """A mask that holds for every thread at one width decides at another: the compiled text is the same."""
    found = getattr(Mutants(compiled(widths[0])), kind)()
    assert len(found) >= count
    alive = [
        str(mutant)
        for mutant in found
        if all(survives(lambda text, mutant=mutant: mutant.text, width) for width in widths)
    ]
    assert not alive


def test_mutants_name_their_line_and_change_one_statement() -> None:
    text = compiled(1500)
    for mutant in Mutants(text).everything():
        assert mutant.statement.rstrip(";") in text.splitlines()[mutant.line - 1]
        lines = zip(text.splitlines(), mutant.text.splitlines(), strict=True)
        assert sum(old != new for old, new in lines) == 1

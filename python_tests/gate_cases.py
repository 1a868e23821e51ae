"""What the tests of `kdkernels.switch_gate` share: rows, uniform numbers, comparisons with float64."""

from __future__ import annotations

import math

import golden_gate as golden
import torch

import kdkernels as kd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ({}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9, "temperature": 1.4})
EDGE = 1e-4
NAN, INF = math.nan, math.inf


def pair(
    rows: int, vocab: int, dtypes: tuple[torch.dtype, torch.dtype], scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000003 + vocab)
    zs, zt = (scale * torch.randn(rows, vocab, generator=generator) for _ in range(2))
    return zs.to(dtypes[0]), (0.6 * zt + 0.4 * zs).to(dtypes[1])


def uniforms(rows: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_jsd(found: torch.Tensor, zs: torch.Tensor, zt: torch.Tensor) -> None:
    expected = golden.jsd_bits(zs, zt)
    assert ((found.double() - expected).abs() <= 5e-7 + 5e-7 * expected).all(), (found, expected)


def check_tokens(found: kd.SwitchDecision, zs: torch.Tensor, zt: torch.Tensor, u: torch.Tensor, **shape: float) -> None:
    for row in range(len(u)):
        z = zt[row] if found.from_teacher[row] else zs[row]
        expected, distance = golden.token(golden.distribution(z, **shape), float(u[row]))  # type: ignore[arg-type]
        assert int(found.token[row]) == expected or distance < EDGE, (row, int(found.token[row]), expected, distance)

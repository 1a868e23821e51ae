"""`kdkernels distill --ddk`: measured every interval, drawn by the weights, the same when it is resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import config, lines, one_thread, place, weights, words

from kdkernels.errors import UserError
from kdkernels.trainers import DistillConfig, Interrupted, distill
from kdkernels.trainers.run import Run

pytestmark = pytest.mark.slow

__all__ = ["one_thread", "place", "words"]  # fixtures
OPTIONS: dict[str, Any] = {"ddk": True, "ddk_interval": 3, "ddk_blocks": 2, "steps": 8}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in lines(folder) if row["event"] == "ddk"]


def test_weights_follow_the_gap(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = distill(config(place, tmp_path / "run", **OPTIONS), progress=False)
    found = rows(result.output)
    assert [row["step"] for row in found] == [3, 6]
    gaps = found[0]["discrepancy"]
    total = sum(math.exp(x) for x in gaps.values())
    assert found[0]["weights"] == pytest.approx({name: math.exp(x) / total for name, x in gaps.items()})
    assert sum(found[1]["weights"].values()) == pytest.approx(1)
    assert min(found[1]["weights"].values()) >= 0.5 / 3 - 1e-12
    assert (result.output / "ddk.png").stat().st_size > 10_000


def test_a_run_stopped_in_the_middle_of_an_interval_goes_on_bit_for_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill(config(place, tmp_path / "whole", **OPTIONS), progress=False).output
    advance = Run._advance
    for stop in (3, 4):
        output = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_advance", lambda self, stop=stop: self.step < stop and advance(self))
            with pytest.raises(Interrupted):
                distill(config(place, output, **OPTIONS), progress=False)
        distill(config(place, output, resume=True, **OPTIONS), progress=False)
        assert rows(output) == rows(whole)
        ours, theirs = weights(output), weights(whole)
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_equal_shares(place: Path, tmp_path: Path) -> None:
    result = distill(config(place, tmp_path / "run", **OPTIONS, ddk_variant="equal"), progress=False)
    for row in rows(result.output):
        assert list(row["weights"].values()) == pytest.approx([1 / 3] * 3)


def test_what_cannot_be(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ddk is on; allowed: off with --cache"):
        config(place, tmp_path, ddk=True, cache="somewhere").validate()
    with pytest.raises(UserError, match="ddk_interval is 0"):
        config(place, tmp_path, ddk=True, ddk_interval=0).validate()
    with pytest.raises(UserError, match=r"ddk_alpha is 1\.5"):
        config(place, tmp_path, ddk=True, ddk_alpha=1.5).validate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "foo"}, "backend = 'foo'"),
        ({"backend": "triton"}, "serves CUDA tensors"),
        ({"temperature": 1e-9}, "temperature = 1e-09"),
    ],
)
def test_options_that_the_loss_refuses_leave_the_output_free(
    place: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        distill(config(place, tmp_path / "run", **options), progress=False)
    settings: DistillConfig = config(place, tmp_path / "run", steps=1)
    summary = distill(settings, progress=False).summary
    assert summary["steps"] == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 1

"""Checkpoints and resuming; what a user may get wrong."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from trainer_runs import config, lines, one_thread, place, weights, words

import kdkernels as kd
from kdkernels import durable
from kdkernels.errors import UserError
from kdkernels.trainers import Interrupted, checkpoint, distill, heads, models
from kdkernels.trainers.config import config_from
from kdkernels.trainers.setup import build

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
__all__ = ["one_thread", "place", "words"]  # fixtures


# --- checkpoints ---


def test_resume_after_a_signal_is_bit_identical(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any
) -> None:
    """Stopped between two passes of step 4, on a student with dropout, then resumed: same weights, same log."""
    student = tiny.llama(2, attention_dropout=0.3)
    tiny.save(student, tmp_path / "student", words)
    common = {"student": str(tmp_path / "student"), "accumulate": 2, "save_every": 2, "eval_every": 3, "log_every": 2}
    distill(config(place, tmp_path / "whole", **common), progress=False)
    calls = 0
    plain = heads.hidden_states

    def stop_inside(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * (2 * 3 + 1):  # teacher and student once a pass: the first pass of the fourth step
            signal.raise_signal(signal.SIGTERM)
        return plain(model, batch)

    monkeypatch.setattr("kdkernels.trainers.objective.hidden_states", stop_inside)
    with pytest.raises(Interrupted, match="SIGTERM at step 3 of 6"):
        distill(config(place, tmp_path / "cut", **common), progress=False)
    assert checkpoint.steps_in(tmp_path / "cut" / "checkpoints") == [2, 3]
    monkeypatch.undo()
    torch.manual_seed(12345)
    distill(config(place, tmp_path / "cut", resume=True, **common), progress=False)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_finished_run_is_read_back(place: Path, tmp_path: Path) -> None:
    first = distill(config(place, tmp_path / "run"), progress=False)
    with pytest.raises(UserError, match="holds a finished run; add --resume"):
        distill(config(place, tmp_path / "run"), progress=False)
    again = distill(config(place, tmp_path / "run", resume=True), progress=False)
    assert again.summary == first.summary
    for ours, theirs in zip(first.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resuming_something_else_is_refused(place: Path, tmp_path: Path) -> None:
    distill(config(place, tmp_path / "run"), progress=False)
    with pytest.raises(UserError, match=r"lr is 0\.5, but the run in .* began with 0\.003"):
        distill(config(place, tmp_path / "run", resume=True, lr=0.5), progress=False)


def test_changed_data_is_noticed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_corpus(tmp_path / "data")
    options = {"data": str(tmp_path / "data"), "save_every": 1}

    def steps_in(folder: Path) -> list[int]:
        return [1 // 0] if folder.exists() else []  # dies right after the first checkpoint's rename

    monkeypatch.setattr(checkpoint, "steps_in", steps_in)
    with pytest.raises(ZeroDivisionError):
        distill(config(place, tmp_path / "run", **options), progress=False)
    monkeypatch.undo()
    next((tmp_path / "data" / "prose").iterdir()).write_text("something else entirely")
    with pytest.raises(UserError, match="data has changed"):
        distill(config(place, tmp_path / "run", resume=True, **options), progress=False)


def test_a_torn_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"x": torch.ones(3)}, keep=2)

    def torn(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        durable.write_atomically(checkpoint.path_of(tmp_path, 1), torn)
    assert torch.equal(checkpoint.load(checkpoint.path_of(tmp_path, 1))["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_damaged_checkpoints_are_errors(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, {"x": torch.ones(300)}, keep=1)
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"junk" * 100):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="step-00000007"):
            checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(path)


def test_generators_come_back() -> None:
    import random

    state = checkpoint.rng_state()
    first = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.set_rng_state(state)
    second = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all()
    assert first[2] == second[2]


def test_works_outside_the_main_thread(place: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    job = threading.Thread(
        target=lambda: found.append(distill(config(place, tmp_path / "run", steps=1), progress=False))
    )
    job.start()
    job.join()
    assert found[0].summary["steps"] == 1


# --- wrong input ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"teacher": ""}, "teacher is ''"),
        ({"data": ""}, "data is ''"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
        ({"temperature": float("nan")}, "temperature is nan; allowed: a finite number"),
        ({"steps": 0}, "steps is 0"),
        ({"held_out": 1.0}, "held_out is 1.0; allowed: between 0 and 1"),
        ({"schedule": "sine"}, "schedule is 'sine'; allowed: one of cosine, linear, constant"),
        ({"warmup": 9}, r"warmup is 9; allowed: below steps \(6\)"),
        ({"kd_weight": 0.0}, "above 0 where ce_weight is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"divergence": "forwrd_kl"}, "forward_kl"),
        ({"divergence": "jsd", "divergence_args": {"alpha": 0.1}}, "'alpha'; jsd takes: beta"),
        ({"divergence": "jsd", "divergence_args": {"beta": 2.0}}, "beta is 2.0"),
        ({"data": "/no/such/folder"}, "data is '/no/such/folder'; no such file or folder"),
        ({"teacher": "/no/such/teacher"}, "teacher is '/no/such/teacher'; no such folder"),
        ({"teacher": "missing.gguf"}, "teacher is 'missing.gguf'; no such file"),
        ({"student": "every:9"}, "the teacher has 4 layers"),
        ({"block_size": 512}, "block_size is 512; the teacher reads at most 256 tokens"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_wrong_options_are_named(place: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        distill(config(place, tmp_path / "run", **options), progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_wrong_text_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"domain 'empty' .* holds no \.txt"):
        build(config(place, tmp_path / "run", data=str(tmp_path / "data")))
    (tmp_path / "data" / "empty" / "a.txt").write_text("  \n")
    with pytest.raises(UserError, match=r"domain 'empty' .* holds no text"):
        build(config(place, tmp_path / "run", data=str(tmp_path / "data")))
    for content, text in (("{bad", "line 1 is not JSON"), ('{"body": "x"}', "line 1 has no text under 'text'")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=text):
            build(config(place, tmp_path / "run", data="", domain={"x": str(tmp_path / "bad.jsonl")}))
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"bad\.txt' is not UTF-8 .* at byte 2"):
        build(config(place, tmp_path / "run", data=str(tmp_path / "bad.txt")))


def test_a_diverged_run_says_so(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"loss is (nan|inf) at step \d; begin again with another --output and a lower --lr"
    ):
        distill(config(place, tmp_path / "run", lr=1e30, clip=0.0, optimizer="sgd", eval_before=False), progress=False)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"teacher 'x' needs transformers.*pip install 'kdkernels\[trainers\]'"):
        models.load_model("teacher", "x", torch.float32)


def test_config_values_are_typed() -> None:
    assert config_from({"lr": 1, "domain": {"a": "b"}}, "x").lr == 1.0
    for values, text in (
        ({"stepz": 3}, "unknown option 'stepz'; did you mean 'steps'"),
        ({"steps": 3.5}, "steps is 3.5; allowed: int"),
        ({"steps": True}, "steps is True"),
        ({"divergence_args": {"beta": "x"}}, "a table of names and values"),
    ):
        with pytest.raises(UserError, match=text):
            config_from(values, "file.toml")


def test_public_names() -> None:
    assert kd.LinearLogits is not None
    from kdkernels import trainers

    assert all(hasattr(trainers, name) for name in trainers.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = trainers.nothing

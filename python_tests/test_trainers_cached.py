"""Distilling from a teacher cache: the teacher is not needed, and nothing else than what was cached is learnt from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from cached_runs import VOCAB, cache_config, from_cache, place, whole
from trainer_runs import config, lines, one_thread, weights, words

import kdkernels as kd
from kdkernels.cli import table
from kdkernels.errors import UserError
from kdkernels.trainers import DistillConfig, build_cache, distill, models
from kdkernels.trainers.cached import CachedTeacher
from kdkernels.trainers.setup import build

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
__all__ = ["one_thread", "place", "whole", "words"]  # fixtures


# --- distilling ---


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_whole_cache_trains_like_its_teacher(place: Path, tmp_path: Path, whole: Path, divergence: str) -> None:
    options = {"divergence": divergence, "ce_weight": 0.3, "steps": 4, "optimizer": "sgd", "lr": 0.5}
    dense = distill(config(place, tmp_path / "dense", **options), progress=False)
    cached = distill(from_cache(place, whole, tmp_path / "cached", **options), progress=False)
    for name, value in weights(tmp_path / "dense").items():
        torch.testing.assert_close(weights(tmp_path / "cached")[name], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(lines(tmp_path / "dense"), lines(tmp_path / "cached"), strict=True):
        if one["event"] == "step":
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, score in dense.summary["after"].items():
        ours = cached.summary["after"][name]
        assert ours["kl"] == pytest.approx(score["kl"], rel=1e-3)
        assert ours["ppl"] == pytest.approx(score["ppl"], rel=1e-4)
        assert ours["top1"] == pytest.approx(score["top1"], abs=1e-6)
        assert ours["teacher_ppl"] is None
    assert cached.summary["teacher"] == str(place / "teacher")
    assert cached.summary["cache"] == str(whole)
    assert cached.summary["teacher_params"] is None


def test_the_teacher_is_not_loaded(place: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = models.load_model

    def note(role: str, *given: Any) -> Any:
        loaded.append(role)
        return load(role, *given)

    monkeypatch.setattr("kdkernels.trainers.setup.load_model", note)
    setup = build(from_cache(place, whole, tmp_path / "run"))
    assert loaded == ["student"]
    assert setup.objective.teacher is None
    # a student that is cut from it needs the teacher for a moment
    cut = DistillConfig(**{**from_cache(place, whole, tmp_path / "x", student="every:2").to_dict(),
                           "teacher": str(place / "teacher")})  # fmt: skip
    assert build(cut).objective.teacher is None
    assert loaded == ["student", "teacher"]
    with pytest.raises(UserError, match="teacher is ''; allowed: a folder"):
        from_cache(place, whole, tmp_path / "x", student="every:2").validate()


@pytest.mark.parametrize("mode", ["ghost", "renormalize", "truncate"])
def test_few_entries_train_too(place: Path, tmp_path: Path, mode: str) -> None:
    build_cache(cache_config(place, tmp_path / "cache", k=24, bits=8), progress=False)
    options = {"steps": 12, "lr": 5e-3, "sparse_mode": mode}
    result = distill(from_cache(place, tmp_path / "cache", tmp_path / "run", **options), progress=False)
    for name, after in result.summary["after"].items():
        assert after["kl"] < result.summary["before"][name]["kl"]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["cache"] == str(tmp_path / "cache")


def test_draws_train_with_forward_kl_only(place: Path, tmp_path: Path) -> None:
    build_cache(cache_config(place, tmp_path / "cache", samples=16), progress=False)
    result = distill(from_cache(place, tmp_path / "cache", tmp_path / "run", steps=12, lr=5e-3), progress=False)
    for name, after in result.summary["after"].items():
        assert after["ppl"] < result.summary["before"][name]["ppl"] * 1.5
    with pytest.raises(UserError, match=r"with cache .*: divergence = 'jsd': must be 'forward_kl' with sparse_mode="):
        build(from_cache(place, tmp_path / "cache", tmp_path / "other", divergence="jsd"))


def test_a_resumed_run_is_bit_identical(place: Path, tmp_path: Path, whole: Path) -> None:
    from kdkernels.trainers import Interrupted
    from kdkernels.trainers.run import Run

    options = {"steps": 6, "save_every": 2}
    distill(from_cache(place, whole, tmp_path / "whole", **options), progress=False)
    advance = Run._advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_advance", lambda self: self.step < 3 and advance(self))
        patch.setattr(Run, "_leave", lambda self: (_ for _ in ()).throw(Interrupted("", 15)))
        with pytest.raises(Interrupted):
            distill(from_cache(place, whole, tmp_path / "cut", **options), progress=False)
    distill(from_cache(place, whole, tmp_path / "cut", resume=True, **options), progress=False)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value)


def test_a_cache_without_temperature_1_scores_the_student_alone(place: Path, tmp_path: Path, whole: Path) -> None:
    dense, setup = kd.TeacherCache.open(whole), build(config(place, "unused"))
    blocks = [part[name] for name in setup.corpus.train for part in (setup.corpus.train, setup.corpus.held_out)]
    inputs = [block["input_ids"] for part in blocks for block in (part[i] for i in range(len(part)))]
    settings = {**dense.settings.to_dict(), "temperature": 2.0}
    with kd.TeacherCache.create(tmp_path / "cache", **settings) as cache:
        for number, tokens in enumerate(inputs):
            rows = dense[number]
            cache.append(number, kd.compress(rows.to_dense(), VOCAB, temperature=2.0), tokens)
    result = distill(from_cache(place, tmp_path / "cache", tmp_path / "run", temperature=2.0, steps=3), progress=False)
    for name, after in result.summary["after"].items():
        assert (after["kl"], after["top1"], after["teacher_entropy"]) == (None, None, None)
        assert after["ppl"] < result.summary["before"][name]["ppl"] * 1.5
    distill(config(place, tmp_path / "dense", temperature=2.0, steps=3), progress=False)
    wanted = [row["divergence"] for row in lines(tmp_path / "dense") if row["event"] == "step"]
    steps = [row["divergence"] for row in lines(tmp_path / "run") if row["event"] == "step"]
    assert steps == pytest.approx(wanted, rel=1e-3)
    assert "-" in table(result.summary)


def test_a_cache_trains_at_every_temperature_that_it_keeps(place: Path, tmp_path: Path) -> None:
    """As one built at that temperature, but for the rounding of 8 bits."""
    build_cache(cache_config(place, tmp_path / "both", k=24, bits=0, other_temperatures="2.0, 3"), progress=False)
    build_cache(cache_config(place, tmp_path / "two", k=24, bits=0, temperature=2.0), progress=False)
    settings = kd.TeacherCache.open(tmp_path / "both").settings
    assert (settings.temperature, settings.others, settings.bits) == (1.0, (2.0, 3.0), 8)
    assert kd.TeacherCache.open(tmp_path / "both").stat()["other_temperatures"] == [2.0, 3.0]
    assert kd.TeacherCache.open(tmp_path / "two").settings.others == (1.0,)
    losses = {}
    for name in ("both", "two"):
        given = from_cache(place, tmp_path / name, tmp_path / f"run-{name}", temperature=2.0, steps=3)
        distill(given, progress=False)
        losses[name] = [row["divergence"] for row in lines(tmp_path / f"run-{name}") if row["event"] == "step"]
    assert losses["both"] == pytest.approx(losses["two"], rel=1e-3)
    with pytest.raises(UserError, match=r"temperature is 4.0; the cache .* holds 1.0, 2.0, 3.0; choose one of these"):
        build(from_cache(place, tmp_path / "both", tmp_path / "other", temperature=4.0))


def test_a_wider_student_is_cut_to_the_cache(place: Path, tmp_path: Path, whole: Path, words: Any) -> None:
    tiny.save(tiny.llama(1, vocab=320), tmp_path / "wide", words)
    options = from_cache(place, whole, tmp_path / "run", student=str(tmp_path / "wide"), steps=1)
    assert build(options).objective.vocab_size == VOCAB
    distill(options, progress=False)


# --- what a user may get wrong ---


def test_caches_that_do_not_fit_the_run(place: Path, tmp_path: Path, whole: Path, words: Any) -> None:
    tiny.save(tiny.llama(1, vocab=302), tmp_path / "small", words)
    tiny.save(tiny.llama(1), tmp_path / "foreign", tiny.tokenizer(280))
    for change, text in (
        ({"student": str(tmp_path / "small")}, r"vocab_size = 302: must be the cache's, 304; use the student's"),
        ({"student": str(tmp_path / "foreign")}, r"tokenizer_hash = '\w+': must be the cache's, '\w+' \(tokenizer"),
        ({"vocab_size": 300}, r"vocab_size = 300: must be the cache's, 304"),
        ({"temperature": 2.0}, r"temperature is 2.0; the cache .* holds 1.0; choose one of these"),
        ({"divergence": "adaptive_kl"}, r"with cache .*: divergence = 'adaptive_kl': must be separable"),
        ({"cache": str(tmp_path / "nothing")}, r"path = .*nothing': must be a teacher cache, it is no folder"),
        ({"sparse_mode": "tail"}, "sparse_mode is 'tail'; allowed: one of ghost, renormalize, truncate"),
    ):
        given = DistillConfig(**{**from_cache(place, whole, tmp_path / "run").to_dict(), **change})
        with pytest.raises(UserError, match=text):
            build(given.validate())


def test_text_that_was_not_cached(place: Path, tmp_path: Path, whole: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.txt").write_text("words that nobody has seen before " * 40)
    for change, text in (
        ({"block_size": 48}, r"does not hold \d+ of the \d+ training blocks of domain 'code': it was built with "
                             r"block_size 32, here 48; give the text and the options"),
        ({"seed": 5}, r"of domain 'code': it was built with seed 0, here 5"),
        ({"data": str(tmp_path / "new")}, r"does not hold (\d+) of the \1 training blocks of domain 'new': it was "
                                          "built from other text"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=text):
            build(DistillConfig(**{**from_cache(place, whole, tmp_path / "run").to_dict(), **change}))


def test_a_batch_that_is_not_in_the_cache(whole: Path) -> None:
    cached = CachedTeacher(kd.TeacherCache.open(whole))
    with pytest.raises(UserError, match="does not hold block 0 of a batch"):
        cached.of(torch.ones(1, 32, dtype=torch.int64), 1.0)

"""Distilling from a teacher cache: the teacher is not needed, and nothing else than what was cached is learnt from."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from trainer_runs import config, lines, one_thread, weights, words

import kdkernels as kd
from kdkernels.cli import table
from kdkernels.errors import UserError
from kdkernels.trainers import CacheConfig, DistillConfig, build_cache, distill, models
from kdkernels.trainers.cached import CachedTeacher
from kdkernels.trainers.ranks import Ranks
from kdkernels.trainers.setup import build

pytest.importorskip("transformers")
__all__ = ["one_thread", "words"]  # fixtures

VOCAB = 304  # of the tiny teacher: k = VOCAB keeps everything


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, words: Any) -> Path:
    """A folder with little `data`, a `teacher`, and a `student` (half its layers)."""
    root = tmp_path_factory.mktemp("job")
    tiny.write_corpus(root / "data", documents=2)
    teacher = tiny.llama(4)
    tiny.save(teacher, root / "teacher", words)
    tiny.save(models.student_from_layers(teacher, [0, 2]), root / "student", words)
    return root


def cache_config(place: Path, out: Path, **options: Any) -> CacheConfig:
    base = {"teacher": str(place / "teacher"), "data": str(place / "data"), "out": str(out)}
    return CacheConfig(**{**base, "batch_size": 5, "block_size": 32, "k": VOCAB, "bits": 32, **options})


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that keeps every entry exactly: distilling from it is distilling from the teacher."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    build_cache(cache_config(place, out), progress=False)
    return out


def from_cache(place: Path, cache: Path, output: Path, **options: Any) -> DistillConfig:
    given = config(place, output, **options)
    return DistillConfig(**{**given.to_dict(), "cache": str(cache), "teacher": ""})


# --- building ---


def test_a_cache_holds_the_teacher_of_every_block(place: Path, whole: Path) -> None:
    cache = kd.TeacherCache.open(whole)
    setup = build(config(place, "unused"))
    teacher = setup.objective.teacher
    number = 0
    for name in setup.corpus.train:
        for blocks in (setup.corpus.train[name], setup.corpus.held_out[name]):
            for index in range(len(blocks)):
                block = blocks[index]
                if number % 7 == 0:
                    got = cache.get(number, input_ids=block["input_ids"])
                    with torch.no_grad():
                        batch = {key: block[key][None] for key in ("input_ids", "position_ids")}
                        wanted = teacher(**batch, use_cache=False).logits[0].double().log_softmax(-1)
                    torch.testing.assert_close(got.to_dense().double(), wanted, rtol=1e-5, atol=1e-5)
                number += 1
    assert len(cache) == number
    assert cache.verify() == []
    stat = cache.stat()
    assert stat["teacher"] == str(place / "teacher")
    assert stat["tokenizer_hash"] == models.tokenizer_hash(setup.tokenizer)
    assert stat["metadata"]["block_size"] == 32


def test_kept_entries_and_tail_are_the_rows_own(place: Path, tmp_path: Path, whole: Path) -> None:
    given = cache_config(place, tmp_path / "cache", k=7, temperature=2.0, entropy=True)
    cache = build_cache(given, progress=False)
    dense = kd.TeacherCache.open(whole)
    for number in (0, 3, len(cache) - 1):
        full, got = dense[number].to_dense().double(), cache[number]
        for temperature, rows in ((2.0, got), (1.0, got.at_temperature(1.0))):
            logs = (full / temperature).log_softmax(-1)
            values, ids = logs.sort(-1, descending=True)
            assert torch.equal(rows.ids.long(), ids[:, :7].sort(-1).values)
            torch.testing.assert_close(rows.log_probs.double(), logs.gather(-1, rows.ids.long()), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rows.log_tail.double(), values[:, 7:].logsumexp(-1), rtol=1e-4, atol=1e-5)
        logs = (full / 2.0).log_softmax(-1)
        assert got.entropy is not None
        torch.testing.assert_close(got.entropy.double(), -(logs.exp() * logs).sum(-1), rtol=1e-4, atol=1e-5)


def test_draws_are_repeated_by_their_seed(place: Path, tmp_path: Path) -> None:
    caches = [
        build_cache(cache_config(place, tmp_path / f"{i}", samples=9, seed=seed), progress=False)
        for i, seed in enumerate((3, 3))
    ]
    assert caches[0].settings.kind == "sampled"
    for number in (0, 5):
        one, two = caches[0][number], caches[1][number]
        assert torch.equal(one.ids, two.ids)
        counts = one.log_probs.double().exp() * 9
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-5)
        torch.testing.assert_close(counts.sum(-1), torch.full_like(counts[:, 0], 9.0))


def test_building_goes_on_where_it_was_stopped(place: Path, tmp_path: Path, whole: Path) -> None:
    class StopError(Exception):
        pass

    calls = []
    appended = kd.TeacherCache.append

    def stopping(self: Any, *given: Any) -> None:
        calls.append(given[0])
        if len(calls) == 9:
            raise StopError
        appended(self, *given)

    given = cache_config(place, tmp_path / "cache", commit_every=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.TeacherCache, "append", stopping)
        with pytest.raises(StopError):
            build_cache(given, progress=False)
        assert list(kd.TeacherCache.open(tmp_path / "cache")) == list(range(8))
        with pytest.raises(UserError, match=r"out is .*, a cache of 8 examples; add --resume, or choose another --out"):
            build_cache(given, progress=False)
        resumed = build_cache(CacheConfig(**{**given.to_dict(), "resume": True}), progress=False)
    assert sorted(calls) == sorted([*range(len(resumed)), 8]), "nothing is computed twice but what was interrupted"
    dense = kd.TeacherCache.open(whole)
    for number in resumed:
        torch.testing.assert_close(resumed[number].to_dense(), dense[number].to_dense(), rtol=1e-5, atol=1e-5)


def test_ranks_share_the_blocks_and_the_first_merges(
    place: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks as threads; torchrun's processes are in test_cache_build.py. A part that was left is taken in."""
    barrier, here = threading.Barrier(3), threading.local()

    class Thread(Ranks):
        def wait(self) -> None:
            barrier.wait(60)

    monkeypatch.setattr(Ranks, "of_environment", lambda: here.ranks)
    dense = kd.TeacherCache.open(whole)
    out, settings = tmp_path / "cache", dense.settings.to_dict()
    with kd.TeacherCache.create(out / "parts" / "rank-00004-of-00007", **settings) as part:
        for number in (1, 50):
            part.append(number, dense[number])
    kd.TeacherCache.create(out / "new", **settings).close()
    (out / "new" / "manifest.json").rename(out / "manifest.json")
    computed: list[int] = []
    append = kd.TeacherCache.append
    monkeypatch.setattr(kd.TeacherCache, "append", lambda *given: computed.append(given[1]) or append(*given))
    failures: list[BaseException] = []
    where = str(place / "teacher")  # loading is not for several threads at once
    loaded = [
        (models.load_model("teacher", where, torch.float32), models.load_tokenizer("teacher", where)) for _ in range(3)
    ]

    def run(rank: int) -> None:
        here.ranks = Thread(rank, 3)
        given = dict(zip(("teacher", "tokenizer"), loaded[rank], strict=True))
        try:
            build_cache(cache_config(place, out, resume=True), **given, progress=False)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cache = kd.TeacherCache.open(out)
    assert sorted(computed) == [number for number in range(len(dense)) if number not in (1, 50)]
    assert not (out / "parts").exists()
    assert len(cache.reader.manifest.shards) == 4
    assert cache.verify() == []
    for number in range(len(dense)):
        torch.testing.assert_close(cache[number].to_dense(), dense[number].to_dense(), rtol=1e-5, atol=1e-5)


def test_resuming_with_other_text_or_options_is_an_error(place: Path, tmp_path: Path, whole: Path) -> None:
    for change, text in (
        ({"k": 9}, r"k = 9: must be as the cache .* began, 304"),
        ({"bits": 8}, r"bits = 8: must be as the cache"),
        ({"block_size": 16}, r"block_size is 16, but the cache .* began with 32; resume with the same text"),
        ({"seed": 4}, r"seed is 4, but the cache"),
        ({"data": str(place / "data" / "code")}, r"(domains|fingerprint) is .*, but the cache"),
    ):
        given = cache_config(place, whole, resume=True, **{"k": VOCAB, **change})
        with pytest.raises(UserError, match=text):
            build_cache(given, progress=False)


BUILD = [
    ({"teacher": ""}, "teacher is ''; allowed: a folder, a file or a name; give --teacher"),
    ({"out": ""}, "out is ''; allowed: a folder; give --out"),
    ({"data": ""}, "data is ''"),
    ({"k": 0}, "k is 0; allowed: 1 to 4096"),
    ({"k": 305}, "k is 305; allowed: up to the vocabulary, 304; lower it"),
    ({"top_p": 1.5}, r"top_p is 1.5; allowed: 0 \(all k\) to 1"),
    ({"samples": 4, "top_p": 0.5}, "samples is 4; allowed: 0 where top_p is given"),
    ({"bits": 13}, "bits is 13; allowed: one of 4, 5"),
    ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
    ({"temperature": float("inf")}, "temperature is inf; allowed: a finite number"),
    ({"block_size": 512}, "block_size is 512; the teacher reads at most 256 tokens"),
    ({"vocab_size": 9}, r"vocab_size is 9; allowed: \d+ \(the tokenizer's tokens\) to 304"),
    ({"teacher": "/no/such"}, "teacher is '/no/such'; no such folder"),
]


@pytest.mark.parametrize(("change", "text"), BUILD)
def test_wrong_builds(place: Path, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    given = CacheConfig(**{**cache_config(place, tmp_path / "cache").to_dict(), **change})
    with pytest.raises(UserError, match=text):
        build_cache(given, progress=False)
    assert not (tmp_path / "cache").exists()


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

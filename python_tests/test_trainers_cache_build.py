"""Building a cache from a teacher and text: what it holds, stopped and resumed, over ranks, refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_runs import VOCAB, cache_config, place, whole
from trainer_runs import config, one_thread, words

import kdkernels as kd
from kdkernels.errors import UserError
from kdkernels.trainers import CacheConfig, build_cache, models
from kdkernels.trainers.ranks import Ranks
from kdkernels.trainers.setup import build

pytest.importorskip("transformers")
__all__ = ["one_thread", "place", "whole", "words"]  # fixtures


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
        build_cache(cache_config(place, tmp_path / f"{i}", samples=9, seed=seed, bits=0), progress=False)
        for i, seed in enumerate((3, 3))
    ]
    assert (caches[0].settings.kind, caches[0].settings.bits) == ("sampled", 32)
    for number in (0, 5):
        one, two = caches[0][number], caches[1][number]
        assert torch.equal(one.ids, two.ids)
        counts = (one.log_probs.double().exp() * 9).round()
        assert torch.equal(one.log_probs, (counts / 9).log().float())
        assert (counts.sum(-1) == 9).all()


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
    ({"bits": 13}, "bits is 13; allowed: 0, 4, 5"),
    ({"other_temperatures": "2,x"}, "other_temperatures is '2,x'; allowed: numbers above 0, separated by commas"),
    ({"other_temperatures": "0"}, "other_temperatures is '0'; allowed: numbers above 0"),
    ({"other_temperatures": "2", "samples": 4}, "other_temperatures is '2'; allowed: none with samples"),
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

"""Wrong input to `kd.TeacherCache` is told: the argument, its value, what is allowed, what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_cases as cases
import numpy as np
import pytest
import torch
from cache_sparse import create, sparse

import kdkernels as kd
from kdkernels.compression.dataset import stack
from kdkernels.compression.manifest import NAME, VERSION, AbsentExampleError, CacheError
from kdkernels.compression.reader import CacheReader
from kdkernels.errors import UserError
from kdkernels.sparse_logits import SparseLogits

# --- what a user may get wrong ---

CREATE: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, r"k = 0: must be 1 to vocab_size \(1000\); lower it"),
    ({"k": 1001}, r"k = 1001: must be 1 to vocab_size \(1000\)"),
    ({"k": 2.0}, r"k = 2.0: must be an int"),
    ({"vocab_size": 0}, r"vocab_size = 0: must be 1 to 2\*\*31 - 1"),
    ({"bits": 3}, r"bits = 3: must be one of 4, 5"),
    ({"temperature": 0.0}, r"temperature = 0.0: must be a finite number above 0"),
    ({"temperature": float("nan")}, r"temperature = nan"),
    ({"other_temperatures": (1.0,)}, r"other_temperatures = \(1.0,\): must be different, and none 1.0"),
    ({"other_temperatures": 2.0}, r"other_temperatures = 2.0: must be a sequence"),
    ({"kind": "sampled", "other_temperatures": (2.0,)}, r"must be \(\) where kind is 'sampled'"),
    ({"kind": "best"}, r"kind = 'best': must be one of 'topk', 'sampled'"),
    ({"teacher": None}, r"teacher = None: must be a str"),
    ({"metadata": {"x": object()}}, r"metadata = .*: must be plain values that JSON can hold"),
    ({"metadata": {"x": "y" * 70_000}}, r"metadata = 70\d+ bytes of JSON: must be at most 65536"),
    ({"shard_bytes": 0}, r"shard_bytes = 0: must be an int, at least 1"),
]


@pytest.mark.parametrize(("options", "text"), CREATE)
def test_wrong_settings(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(CacheError, match=text):
        create(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_wrong_shard_bytes_leave_nothing_behind(tmp_path: Path) -> None:
    cases.build(tmp_path / "cache", [0])
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    for value in (0, 1.5, True):
        with pytest.raises(CacheError, match=f"shard_bytes = {value}: must be an int, at least 1"):
            kd.TeacherCache.resume(tmp_path / "cache", shard_bytes=value)  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before


def test_what_can_be_no_id_is_not_in_a_cache(tmp_path: Path) -> None:
    with create(tmp_path / "cache") as cache:
        cache.append(0, sparse(0))
        cache.commit()
        cache.append(7, sparse(7))
        for there in (0, 7, torch.tensor(7), np.int64(0)):
            assert there in cache
        for absent in ("a", "0", 1, -1, 0.0, True, False, None, 2**63, (0,)):
            assert absent not in cache
            assert absent not in cache.reader


APPEND: list[tuple[Callable[[kd.TeacherCache], Any], str]] = [
    (lambda c: c.append(0, sparse(0)), "example_id = 0: must be one that the cache does not have yet; append every"),
    (lambda c: c.append(7, sparse(0)), "example_id = 7: must be one that the cache does not have yet"),
    (lambda c: c.append(-1, sparse(0)), r"example_id = -1: must be an int from 0 to 2\*\*63 - 1"),
    (lambda c: c.append("a", sparse(0)), "example_id = 'a': must be an int"),
    (lambda c: c.append(1.0, sparse(0)), "example_id = 1.0: must be an int"),
    (lambda c: c.append(True, sparse(0)), "example_id = True: must be an int"),
    (lambda c: c.append(2**63, sparse(0)), "example_id = 9223372036854775808: must be an int"),
    (lambda c: c.append(1, torch.zeros(3)), "sparse = Tensor: must be a SparseLogits; use kd.compress"),
    (lambda c: c.append(1, sparse(0, k=9)), r"ids shape = \[6, 9\]: must be \[L, K\] with L at least 1 and K at most"),
    (lambda c: c.append(1, stack([sparse(0)])), r"ids shape = \[1, 6, 8\]: must be .*append one example at a time"),
    (lambda c: c.append(1, _rows(0)), r"ids shape = \[0, 8\]"),
    (lambda c: c.append(1, sparse(0, temperature=2.0)), "sparse.temperature = 2.0: must be the cache's, 1.0"),
    (lambda c: c.append(1, sparse(0, kind="sampled")), "sparse.kind = 'sampled': must be the cache's, 'topk'"),
    (lambda c: c.append(1, _vocab(999)), "sparse.vocab_size = 999: must be the cache's, 1000"),
    (lambda c: c[5], r"example_id = 5: the cache .* holds 1 examples from 0 to 0, not this one; build the cache over"),
    (lambda c: c["x"], "example_id = 'x': must be an int"),
    (lambda c: c.get(0, [1, 2]), "input_ids: example 0 .* was computed from other tokens; feed the student what"),
    (lambda c: c.dataset([3]), "example_id = 3: the cache"),
]  # fmt: skip


def _rows(count: int) -> SparseLogits:
    x = sparse(0)
    return SparseLogits(x.ids[:count], x.log_probs[:count], x.log_tail[:count], cases.VOCAB)


def _vocab(size: int) -> SparseLogits:
    x = sparse(0)
    return SparseLogits(x.ids.clamp(max=size - 1), x.log_probs, x.log_tail, size)


@pytest.mark.parametrize(("call", "text"), APPEND)
def test_wrong_examples(tmp_path: Path, call: Callable[[kd.TeacherCache], Any], text: str) -> None:
    with create(tmp_path / "cache") as cache:
        cache.append(0, sparse(0), cases.tokens(0))
        cache.commit()
        cache.append(7, sparse(7))
        with pytest.raises(CacheError, match=text):
            call(cache)
    assert list(kd.TeacherCache.open(tmp_path / "cache")) == [0, 7], "nothing is lost by it"


def test_parts_of_a_teacher_that_the_cache_keeps_must_come(tmp_path: Path) -> None:
    with create(tmp_path / "cache", entropy=True, other_temperatures=[2.0]) as cache:
        with pytest.raises(CacheError, match=r"sparse.other_tails = \[\]: must be there at \[2.0\]"):
            cache.append(1, sparse(1))
        with pytest.raises(CacheError, match=r"sparse.entropy = None: must be there"):
            cache.append(1, sparse(1, other_tails={2.0: torch.zeros(cases.ROWS)}))


def test_an_absent_example_is_a_key_error_and_a_value_error(tmp_path: Path) -> None:
    reader = cases.build(tmp_path / "cache", [2])
    for kind in (KeyError, ValueError, UserError, AbsentExampleError):
        with pytest.raises(kind):
            reader.read(1)
    with pytest.raises(KeyError) as caught:
        reader.read(1)
    assert not str(caught.value).startswith(("'", '"'))


def test_no_recorded_tokens_cannot_be_compared(tmp_path: Path) -> None:
    with create(tmp_path / "cache") as cache:
        cache.append(0, sparse(0))
    with pytest.raises(CacheError, match="records no tokens of example 0"):
        kd.TeacherCache.open(tmp_path / "cache").get(0, cases.tokens(0))


def test_a_student_of_another_vocabulary_or_tokenizer(tmp_path: Path) -> None:
    cases.build(tmp_path / "cache", [0])
    kd.TeacherCache.open(tmp_path / "cache", vocab_size=cases.VOCAB, tokenizer_hash="abc")
    with pytest.raises(CacheError, match=r"vocab_size = 999: must be the cache's, 1000; "):
        kd.TeacherCache.open(tmp_path / "cache", vocab_size=999)
    with pytest.raises(CacheError, match=r"tokenizer_hash = 'abd': must be the cache's, 'abc' \(tokenizer '', t"):
        kd.TeacherCache.open(tmp_path / "cache", tokenizer_hash="abd")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    cases.build(tmp_path / "cache", range(3))
    for path, text in (
        ("file", "must be a folder, it is a file"),
        ("full", "must be an empty folder or a cache, it is neither"),
        ("file/inside", "must be a folder that can be made"),
        ("cache", "must be new, it is a cache of 3 examples; go on with resume=True"),
    ):
        with pytest.raises(CacheError, match=text):
            create(tmp_path / path)
    with pytest.raises(CacheError, match=r"k = 7: must be as the cache .* began, 8; resume as it began"):
        create(tmp_path / "cache", k=7, resume=True, teacher="somebody", tokenizer_hash="abc")
    for path, text in (("nowhere", "it is no folder"), ("full", "it is a folder without manifest.json")):
        for opening in (kd.TeacherCache.open, kd.TeacherCache.resume):
            with pytest.raises(CacheError, match=rf"path = '.*{path}': must be a teacher cache, {text}"):
                opening(tmp_path / path)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["notes.txt"]
    assert len(CacheReader(tmp_path / "cache")) == 3


def test_a_cache_that_nothing_was_committed_to_may_begin_again(tmp_path: Path) -> None:
    with create(tmp_path / "cache"), pytest.raises(CacheError, match="being written by another process"):
        create(tmp_path / "cache", k=7)  # it may still get examples
    with pytest.raises(CacheError, match=r"k = 7: must be as the cache .* began"):
        create(tmp_path / "cache", k=7, resume=True)
    (tmp_path / "cache" / ".part").mkdir()  # what a rank has written, for one
    with pytest.raises(CacheError, match="must be new, it is a cache of 0 examples"):
        create(tmp_path / "cache", k=7)
    (tmp_path / "cache" / ".part").rmdir()
    with create(tmp_path / "cache", k=7) as cache:
        assert cache.settings.k == CacheReader(tmp_path / "cache").settings.k == 7


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with create(tmp_path / "cache") as cache:
        with pytest.raises(CacheError, match="is being written by another process"):
            kd.TeacherCache.resume(tmp_path / "cache")
        cache.append(0, sparse(0))
    with kd.TeacherCache.resume(tmp_path / "cache") as cache:
        cache.append(1, sparse(1))
    with pytest.raises(CacheError, match="was closed; open it for appending again with resume"):
        cache.append(2, sparse(2))


def test_a_cache_opened_for_reading_is_not_written(tmp_path: Path) -> None:
    cases.build(tmp_path / "cache", [0])
    cache = kd.TeacherCache.open(tmp_path / "cache")
    for call in (lambda: cache.append(1, sparse(1)), cache.commit, lambda: cache.merge([])):
        with pytest.raises(CacheError, match=r"was opened for reading; append with TeacherCache\.resume or create"):
            call()
    cache.close()


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    cases.build(tmp_path / "cache", [0])
    path = tmp_path / "cache" / NAME
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "version": VERSION + 1, "settings": {"all": "new"}}))
    for opening in (kd.TeacherCache.open, kd.TeacherCache.resume):
        with pytest.raises(CacheError, match=rf"has format version {VERSION + 1}; this kdkernels reads {VERSION}; "):
            opening(tmp_path / "cache")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    cases.build(tmp_path / "cache", range(4), commits=2)
    next((tmp_path / "cache").glob("*-000000000001.safetensors")).unlink()
    reader = CacheReader(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"shard '.*000000000001.safetensors' is missing; restore it"):
        reader.read(1)
    cases.check(reader, 2)
    assert len(reader.verify()) == 1


def test_stat_and_progress(tmp_path: Path) -> None:
    reader = cases.build(tmp_path / "cache", range(5, 15), commits=2)
    stat = reader.stat()
    files = [path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors")]
    wanted = {"examples": 10, "tokens": 60, "shards": 2, "first": 5, "last": 14, "bytes": sum(files), "bits": 32}
    assert wanted.items() <= stat.items()
    assert stat["bytes_per_token"] == pytest.approx(sum(files) / 60, abs=0.01)
    seen: list[tuple[int, int]] = []
    assert reader.verify(lambda done, of: seen.append((done, of))) == []
    assert seen == [(i, 10) for i in range(1, 11)]
    assert repr(kd.TeacherCache.open(tmp_path / "cache")).endswith("cache', examples=10, k=8, vocab_size=1000)")


@pytest.mark.parametrize("kind", ["fractions", "two dimensions"])
def test_tokens_are_integers_of_one_example(tmp_path: Path, kind: str) -> None:
    tokens = torch.rand(cases.ROWS) if kind == "fractions" else torch.zeros(1, cases.ROWS, dtype=torch.int64)
    with create(tmp_path / "cache") as cache, pytest.raises(CacheError, match=r"input_ids = .*: must be integer token"):
        cache.append(1, sparse(1), tokens)


def test_tokens_are_one_a_row(tmp_path: Path) -> None:
    with create(tmp_path / "cache") as cache:
        with pytest.raises(CacheError, match="input_ids = 3 tokens"):
            cache.append(1, sparse(1), torch.arange(3))
        cache.append(1, sparse(1), torch.arange(cases.ROWS))


def test_stat_shows_zeros(tmp_path: Path) -> None:
    from kdkernels import cache_cli

    create(tmp_path / "cache").close()
    lines = cache_cli.render(kd.TeacherCache.open(tmp_path / "cache").stat()).splitlines()
    assert any(line.split() == ["examples", "0"] for line in lines)

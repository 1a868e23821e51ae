"""`kd.TeacherCache`: what goes in comes out, in any order, from any process; wrong input is told."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_cases as cases
import numpy as np
import pytest
import torch

import kdkernels as kd
from kdkernels.compression import shard
from kdkernels.compression.dataset import CacheDataset, stack
from kdkernels.compression.manifest import NAME, VERSION, AbsentExampleError, CacheError
from kdkernels.compression.merge import merge
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter
from kdkernels.errors import UserError
from kdkernels.sparse_logits import SparseLogits

HERE = Path(__file__).parent


def sparse(number: int, rows: int = cases.ROWS, k: int = cases.K, **options: Any) -> SparseLogits:
    ids, log_probs, log_tail = map(torch.from_numpy, cases.example(number, rows, k))
    return SparseLogits(ids, log_probs, log_tail, cases.VOCAB, **options)


def create(path: Path, **options: Any) -> kd.TeacherCache:
    return kd.TeacherCache.create(path, **{"vocab_size": cases.VOCAB, "k": cases.K, "bits": 32, **options})


def equal(a: SparseLogits, b: SparseLogits) -> None:
    for name in ("ids", "log_probs", "log_tail"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
    assert (a.vocab_size, a.temperature, a.kind) == (b.vocab_size, b.temperature, b.kind)


# --- what goes in comes out ---


def test_examples_come_back_by_id_whatever_the_order_of_appends(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).permutation(97).tolist()
    with create(tmp_path / "cache", shard_bytes=4000) as cache:
        for number in numbers:
            cache.append(3 * number, sparse(number), torch.from_numpy(cases.tokens(number)))
        assert len(numbers) > len(cache) > 0, "shard_bytes commits by itself"
    cache = kd.TeacherCache.open(tmp_path / "cache")
    assert len(cache.reader.manifest.shards) > 3
    assert len(cache) == 97
    assert list(cache) == list(range(0, 291, 3))
    for number in range(97):
        equal(cache.get(3 * number, torch.from_numpy(cases.tokens(number))), sparse(number))
        assert 3 * number in cache
        assert 3 * number + 1 not in cache
    assert cache.verify() == []


def test_everything_a_sparse_teacher_holds_is_kept(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tails = {t: -torch.rand(cases.ROWS, generator=generator) for t in (0.5, 3.0)}
    entropy = torch.rand(cases.ROWS, generator=generator)
    given = sparse(1, temperature=2.0, entropy=entropy, other_tails=tails)
    with create(tmp_path / "a", temperature=2.0, other_temperatures=(0.5, 3.0), entropy=True) as cache:
        cache.append(0, given)
    got = kd.TeacherCache.open(tmp_path / "a")[0]
    equal(got, given)
    assert got.entropy is not None
    torch.testing.assert_close(got.entropy, entropy, rtol=0, atol=0)
    assert set(got.other_tails) == {0.5, 3.0}
    for t, tail in tails.items():
        torch.testing.assert_close(got.other_tails[t], tail, rtol=0, atol=0)
    torch.testing.assert_close(got.at_temperature(3.0).log_probs, given.at_temperature(3.0).log_probs)


def test_draws_and_shorter_rows(tmp_path: Path) -> None:
    ids = torch.tensor([[2, 5, -1], [7, -1, -1]], dtype=torch.int32)
    counts = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    draws = SparseLogits(ids, (counts / 4).log(), torch.full((2,), -torch.inf), cases.VOCAB, kind="sampled")
    with create(tmp_path / "cache", kind="sampled") as cache:
        cache.append(0, draws)
    equal(kd.TeacherCache.open(tmp_path / "cache")[0], draws)


def test_eight_bits_stay_within_the_stated_error(tmp_path: Path) -> None:
    from kdkernels.compression import codec

    with create(tmp_path / "cache", bits=8) as cache:
        cache.append(0, sparse(5))
    cache = kd.TeacherCache.open(tmp_path / "cache")
    bound = codec.inspect(cache.reader.block(0)).max_error
    error = (cache[0].log_probs - sparse(5).log_probs).abs().max()
    assert float(error) <= bound + 1e-6
    torch.testing.assert_close(cache[0].ids, sparse(5).ids, rtol=0, atol=0)


def test_float64_is_stored_as_float32(tmp_path: Path) -> None:
    x = sparse(0)
    with create(tmp_path / "cache") as cache:
        cache.append(0, SparseLogits(x.ids, x.log_probs.double(), x.log_tail.double(), cases.VOCAB))
    equal(kd.TeacherCache.open(tmp_path / "cache")[0], x)


def test_resume_goes_on_and_settings_persist(tmp_path: Path) -> None:
    for number in range(4):
        with create(tmp_path / "cache", teacher="x", resume=True) as cache:
            assert len(cache) == number
            cache.append(number, sparse(number))
    with kd.TeacherCache.resume(tmp_path / "cache") as cache:
        cache.append(4, sparse(4))
        assert 4 in cache
        assert len(cache) == 4
        cache.commit()
        assert len(cache) == 5
        equal(cache[4], sparse(4))
    assert kd.TeacherCache.open(tmp_path / "cache").settings.teacher == "x"


def test_shards_are_valid_safetensors_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    cases.build(tmp_path / "cache", [4, 1, 9])
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    assert file.name == "examples-000000000001-000000000009.safetensors"
    tensors = safetensors.load_file(file)
    assert tensors["ids"].tolist() == [1, 4, 9]
    assert tensors["rows"].tolist() == [cases.ROWS] * 3
    assert tensors["input_hashes"].tolist()[1] == shard.input_hash(cases.tokens(4))
    assert tensors["blocks"].numel() == tensors["offsets"][-1]
    with pytest.importorskip("safetensors").safe_open(file, "np") as opened:
        assert json.loads(opened.metadata()["settings"])["vocab_size"] == cases.VOCAB


def test_overlapping_ranges_of_shards(tmp_path: Path) -> None:
    """Every rank's shard spans nearly all ids: a search looks into each."""
    reader = cases.build(tmp_path / "cache", [*range(0, 60, 3), *range(1, 60, 3), *range(2, 60, 3)], commits=3)
    assert len(reader.manifest.shards) == 3
    for number in range(60):
        cases.check(reader, number)
    assert 60 not in reader
    assert reader.ids().tolist() == list(range(60))


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdkernels.compression.reader.OPEN_SHARDS", 3)
    cases.build(tmp_path / "cache", range(20), commits=10)
    before = len(os.listdir("/proc/self/fd"))
    reader = CacheReader(tmp_path / "cache")
    for number in np.random.default_rng(0).integers(0, 20, 100).tolist():
        cases.check(reader, number)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_a_reader(tmp_path: Path) -> None:
    reader = cases.build(tmp_path / "cache", range(40), commits=8)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for number in range(40):
                cases.check(reader, number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- data workers ---


@pytest.mark.parametrize("workers", [0, 2, pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_dataloader_gives_batches(tmp_path: Path, workers: Any) -> None:
    with create(tmp_path / "cache") as cache:
        for number in range(6):
            cache.append(number, sparse(number, k=cases.K - number % 2))
    dataset = kd.TeacherCache.open(tmp_path / "cache").dataset([5, 4, 3, 2, 1, 0])
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "spawn"} if workers == "spawn" else {
        "num_workers": workers
    }  # fmt: skip
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=CacheDataset.collate, **options))
    assert [batch["example_id"].tolist() for batch in batches] == [[5, 4], [3, 2], [1, 0]]
    teacher = batches[0]["teacher"]
    assert teacher.shape == (2, cases.ROWS, cases.VOCAB)
    torch.testing.assert_close(teacher.to_dense()[0], sparse(5, k=cases.K - 1).to_dense())
    torch.testing.assert_close(teacher.to_dense()[1], sparse(4).to_dense())


def test_stacking_keeps_entropy_and_tails() -> None:
    parts = [sparse(i, entropy=torch.full((cases.ROWS,), float(i)), other_tails={2.0: torch.zeros(6)}) for i in (0, 1)]
    batch = stack(parts)
    assert batch.entropy is not None
    assert batch.entropy[1].tolist() == [1.0] * cases.ROWS
    assert batch.other_tails[2.0].shape == (2, cases.ROWS)
    with pytest.raises(CacheError, match=r"examples = of \[5, 6\] rows: must be of one length"):
        stack([sparse(0), sparse(1, rows=5)])


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    cases.build(tmp_path / "cache", range(3))
    code = f"""
    import sys
    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "transformers"):
                raise AssertionError("imports " + name)
    sys.meta_path.insert(0, NoTorch())
    sys.path.insert(0, {str(HERE)!r})
    import cache_cases as cases
    from kdkernels.compression.reader import CacheReader
    reader = CacheReader({str(tmp_path / "cache")!r})
    for number in range(3):
        cases.check(reader, number)
    print(reader.verify(), "torch" in sys.modules)
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "[] False\n"


def test_readers_are_pickled_by_path(tmp_path: Path) -> None:
    reader = cases.build(tmp_path / "cache", range(3))
    cases.check(reader, 1)
    data = pickle.dumps(reader)
    assert len(data) < 2000
    cases.check(pickle.loads(data), 2)


# --- merging ---


def test_parts_of_ranks_become_one_cache(tmp_path: Path) -> None:
    for rank in range(3):
        cases.build(tmp_path / f"part{rank}", range(rank, 30, 3), commits=2)
    parts = [tmp_path / f"part{rank}" for rank in range(3)]
    with kd.TeacherCache.create(
        tmp_path / "all", vocab_size=cases.VOCAB, k=cases.K, bits=32, teacher="somebody", tokenizer_hash="abc"
    ) as cache:
        assert cache.merge(parts) == 30
        assert cache.merge(parts) == 0, "again changes nothing"
        assert cache.merge(parts, remove=True) == 0
    assert not any(part.exists() for part in parts)
    reader = CacheReader(tmp_path / "all")
    assert reader.verify() == []
    assert reader.ids().tolist() == list(range(30))
    for number in range(30):
        cases.check(reader, number)


def test_merging_copies_where_it_cannot_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    cases.build(tmp_path / "part", range(3))
    with CacheWriter.create(tmp_path / "all", cases.SETTINGS) as writer:
        merge(writer, [tmp_path / "part"])
    shutil.rmtree(tmp_path / "part")
    assert CacheReader(tmp_path / "all").verify() == []


def test_parts_still_being_written_are_not_removed(tmp_path: Path) -> None:
    cases.build(tmp_path / "part", range(3))
    with CacheWriter.create(tmp_path / "all", cases.SETTINGS) as writer, CacheWriter(tmp_path / "part"):
        with pytest.raises(CacheError, match=r"part' is being written by another process"):
            merge(writer, [tmp_path / "part"], remove=True)
        assert merge(writer, [tmp_path / "part"]) == 3
    assert CacheReader(tmp_path / "part").verify() == []


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    cases.build(tmp_path / "a", range(4))
    cases.build(tmp_path / "b", range(3, 6))
    cases.build(tmp_path / "c", range(6, 8), teacher="other")
    with CacheWriter.create(tmp_path / "all", cases.SETTINGS) as writer:
        with pytest.raises(CacheError, match=r"parts = 1 examples twice, the first 3: must be of different examples"):
            merge(writer, [tmp_path / "a", tmp_path / "b"])
        with pytest.raises(CacheError, match=r"teacher = 'other': must be the same in part .*c' and in the cache, 's"):
            merge(writer, [tmp_path / "c"])
        assert len(writer.reader) == 0
        assert merge(writer, [tmp_path / "a"]) == 4
        with pytest.raises(CacheError, match="1 examples twice, the first 3"):
            merge(writer, [tmp_path / "b"])
    assert CacheReader(tmp_path / "all").verify() == []


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

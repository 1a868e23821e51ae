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
from pathlib import Path
from typing import Any

import cache_cases as cases
import numpy as np
import pytest
import torch
from cache_sparse import create, equal, sparse

import kdkernels as kd
from kdkernels.compression import shard
from kdkernels.compression.dataset import CacheDataset, stack
from kdkernels.compression.manifest import CacheError
from kdkernels.compression.merge import merge
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter
from kdkernels.sparse_logits import SparseLogits

HERE = Path(__file__).parent


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

"""Caches from files that others wrote, and `kdkernels cache` on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_cases as cases
import numpy as np
import pytest

from kdkernels.compression import importers
from kdkernels.compression.import_columns import Columns
from kdkernels.compression.manifest import CacheError
from kdkernels.compression.reader import CacheReader

Array = np.ndarray[Any, Any]


def shuffled(number: int) -> tuple[Array, Array, Array]:
    """Example `number` with its entries in another order."""
    ids, log_probs, log_tail = cases.example(number)
    order = np.random.default_rng(number).permuted(np.tile(np.arange(cases.K), (cases.ROWS, 1)), axis=1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(log_probs, order, -1), log_tail


def write(examples: Any, out: Path, **options: Any) -> CacheReader:
    return importers.write(examples, out, **{"vocab_size": cases.VOCAB, "bits": 32, **options})


# --- arrays ---


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_arrays(tmp_path: Path, stacked: bool, tail: bool) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [shuffled(i) for i in range(cases.EXAMPLES)]
    names = ("ids", "log_probs", "log_tail") if tail else ("ids", "log_probs")
    if stacked:
        for name, arrays in zip(names, zip(*rows, strict=True), strict=False):
            np.save(folder / f"{name}.npy", np.stack(arrays))
        np.save(folder / "input_ids.npy", np.stack([cases.tokens(i) for i in range(cases.EXAMPLES)]))
    else:
        for i, arrays in enumerate(rows):
            np.savez(folder / f"block-{i:04d}.npz", **dict(zip(names, arrays, strict=False)), input_ids=cases.tokens(i))
    examples = importers.read("arrays", folder, vocab_size=cases.VOCAB)
    assert len(examples) == cases.EXAMPLES
    reader = write(examples, tmp_path / "cache", teacher="x")
    assert reader.settings.teacher == "x"
    for i in range(cases.EXAMPLES):
        cases.close(reader.read(i, cases.tokens(i)), i, 0.0 if tail else 3e-7)
    assert reader.verify() == []


def test_an_import_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(cases.EXAMPLES):
        if i == 2:
            write(importers.read("arrays", folder, vocab_size=cases.VOCAB), tmp_path / "cache")
        ids, log_probs, log_tail = cases.example(i)
        np.savez(folder / f"{i}.npz", ids=ids, log_probs=log_probs, log_tail=log_tail)
    seen: list[int] = []
    again = importers.read("arrays", folder, vocab_size=cases.VOCAB)
    reader = write(again, tmp_path / "cache", resume=True, progress=seen.append)
    assert reader.ids().tolist() == list(range(cases.EXAMPLES))
    assert seen == [1] * cases.EXAMPLES


def test_padding_and_masses(tmp_path: Path) -> None:
    ids = np.array([[5, -1, 3], [7, 8, 9]])
    logs = np.log(np.array([[0.5, 1.0, 0.25], [0.5, 1e-300, 0.5]]))
    logs[1, 1] = -np.inf
    got = importers.normalised(importers.TopK(0, ids, logs, None, None, "x"), 10)
    assert got[0].tolist() == [[3, 5, -1], [7, 9, -1]]
    np.testing.assert_allclose(np.exp(got[1]), [[0.25, 0.5, 0], [0.5, 0.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(got[2]), [0.25, 0.0], rtol=1e-6)


def test_rows_of_the_token_itself_move_up(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    ids, log_probs, log_tail = cases.example(0)
    np.savez(folder / "0.npz", ids=ids, log_probs=log_probs, log_tail=log_tail, input_ids=cases.tokens(0))
    got = write(importers.read("arrays", folder, vocab_size=cases.VOCAB), tmp_path / "c", aligned="same").read(0)
    np.testing.assert_array_equal(got.ids[:-1], ids[1:])
    assert got.ids[-1].tolist() == [-1] * cases.K
    assert got.log_tail[-1] == 0
    # a row fewer than tokens: the last token's is missing
    np.savez(folder / "0.npz", ids=ids[1:], log_probs=log_probs[1:], log_tail=log_tail[1:], input_ids=cases.tokens(0))
    again = write(importers.read("arrays", folder, vocab_size=cases.VOCAB), tmp_path / "d").read(0, cases.tokens(0))
    np.testing.assert_array_equal(again.ids, got.ids)
    np.testing.assert_array_equal(again.log_tail, got.log_tail)


# --- datasets ---


def axolotl(i: int) -> dict[str, Any]:
    ids, log_probs, _ = shuffled(i)
    mask = np.ones_like(ids)
    mask[0] = 0
    return {
        "input_ids": cases.tokens(i).tolist(), "labels": [-100, *cases.tokens(i)[1:].tolist()],
        "target_token_ids": ids.tolist(), "target_logprobs": log_probs.tolist(), "target_mask": mask.tolist(),
    }  # fmt: skip


def narrow(i: int) -> dict[str, Any]:
    """Example `i` with its first i + 1 entries."""
    ids, log_probs, _ = cases.example(i)
    return {"target_token_ids": ids[:, : i + 1].tolist(), "target_logprobs": log_probs[:, : i + 1].tolist()}


@pytest.mark.parametrize("how", ["rows", "disk"])
def test_the_widest_row_decides_on_k(tmp_path: Path, how: str) -> None:
    source: Any = [narrow(i) for i in (1, 3, 2)]
    if how == "disk":
        pytest.importorskip("datasets").Dataset.from_list(source).save_to_disk(str(tmp_path / "data"))
        source = tmp_path / "data"
    reader = write(importers.read("axolotl", source, vocab_size=cases.VOCAB), tmp_path / "cache")
    assert reader.settings.k == 4
    assert [reader.read(i).ids.shape[1] for i in range(3)] == [2, 4, 3]
    np.testing.assert_array_equal(reader.read(1).ids, cases.example(3)[0][:, :4])


def test_k_may_be_given(tmp_path: Path) -> None:
    source = [narrow(i) for i in (1, 3, 2)]
    given = importers.read("axolotl", source, vocab_size=cases.VOCAB, k=6)
    assert write(given, tmp_path / "wide").settings.k == 6
    given = importers.read("axolotl", source, vocab_size=cases.VOCAB, k=3)
    with pytest.raises(CacheError, match=r"list\[1\]: entries a row = 4: must be at most k \(3\); raise k \(--k\)"):
        write(given, tmp_path / "narrow")
    with pytest.raises(CacheError, match="k = 0: must be an int, at least 1, or None"):
        importers.read("axolotl", source, vocab_size=cases.VOCAB, k=0)
    folder = tmp_path / "files"
    folder.mkdir()
    ids, log_probs, _ = cases.example(0)
    np.savez(folder / "0.npz", ids=ids, log_probs=log_probs)
    assert importers.read("arrays", folder, vocab_size=cases.VOCAB, k=20).k == 20


@pytest.mark.parametrize("how", ["rows", "disk", "parquet"])
def test_axolotl_columns(tmp_path: Path, how: str) -> None:
    source: Any = [axolotl(i) for i in range(cases.EXAMPLES)]
    if how != "rows":
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(source)
        source = tmp_path / ("data" if how == "disk" else "data.parquet")
        made.save_to_disk(str(source)) if how == "disk" else made.to_parquet(str(source))
    reader = write(importers.read("axolotl", source, vocab_size=cases.VOCAB), tmp_path / "cache")
    for i in range(cases.EXAMPLES):
        got, (ids, log_probs, _) = reader.read(i, cases.tokens(i)), cases.example(i)
        assert got.ids[0].tolist() == [-1] * cases.K, "masked"
        np.testing.assert_array_equal(got.ids[1:], ids[1:])
        np.testing.assert_array_equal(got.log_probs[1:], log_probs[1:])


def packed(i: int, dtype: str, delta: bool) -> dict[str, Any]:
    """As DistillKit packs a lossless row: most likely first, ids as big-endian bit strings of 10 bits (d = 1000)."""
    ids, log_probs, _ = cases.example(i)
    order = np.argsort(-log_probs, -1)
    ids, values = np.take_along_axis(ids, order, -1), np.take_along_axis(log_probs, order, -1)
    strings = ["".join(f"{number:010b}" for number in row) for row in ids.tolist()]
    indices = [[int(row[j : j + 8].ljust(8, "0"), 2) for j in range(0, len(row), 8)] for row in strings]
    if delta:
        values = np.diff(values, axis=-1, prepend=np.zeros((len(values), 1), np.float32))
    raw = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values
    numbers = raw.astype({"bfloat16": "<u2", "float32": "<f4", "float16": "<f2"}[dtype])
    return {
        "input_ids": cases.tokens(i)[: cases.ROWS].tolist(),
        "bytepacked_indices": indices,
        "compressed_logprobs": numbers.view(np.uint8).reshape(len(ids), -1).tolist(),
    }


@pytest.mark.parametrize(("dtype", "delta", "error"), [
    ("float32", False, 0.0), ("float32", True, 3e-6), ("float16", False, 0.01), ("bfloat16", False, 0.1),
])  # fmt: skip
def test_distillkit_packed_columns(tmp_path: Path, dtype: str, delta: bool, error: float) -> None:
    settings = {"d": cases.VOCAB, "k": cases.K, "exact_k": cases.K, "exact_dtype": dtype, "delta_encoding": delta}
    source = [packed(i, dtype, delta) for i in range(cases.EXAMPLES)]
    examples = importers.read("distillkit", source, vocab_size=cases.VOCAB, compression=settings)
    reader = write(examples, tmp_path / "cache")
    for i in range(cases.EXAMPLES):
        got, (ids, log_probs, _) = reader.read(i, cases.tokens(i)), cases.example(i)
        np.testing.assert_array_equal(got.ids, ids)
        np.testing.assert_allclose(got.log_probs, log_probs, rtol=0, atol=error)


def test_distillkit_plain_columns(tmp_path: Path) -> None:
    source = [dict(zip(("token_ids", "top_values"), shuffled(i)[:2], strict=True)) for i in range(cases.EXAMPLES)]
    reader = write(importers.read("distillkit", source, vocab_size=cases.VOCAB), tmp_path / "cache")
    for i in range(cases.EXAMPLES):
        cases.close(reader.read(i), i, 3e-7)


# --- what a user may get wrong ---


def _one(**changes: Any) -> importers.TopK:
    ids, log_probs, log_tail = cases.example(0)
    given = {"ids": ids, "log_probs": log_probs, "log_tail": log_tail, "input_ids": None, **changes}
    return importers.TopK(0, **given, where="file")


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: importers.read("excel", "x", vocab_size=9), "format = 'excel': must be one of 'arrays'"),
    (lambda: importers.read("arrays", "/no/such", vocab_size=9), "source = '/no/such': must be a folder of .npz or"),
    (lambda: importers.read("arrays", [{}], vocab_size=9), "source = list: must be the path of a folder"),
    (lambda: importers.read("axolotl", "/no/such", vocab_size=9), "source = '/no/such': must be a dataset's folder"),
    (lambda: importers.read("axolotl", [], vocab_size=9), "source = 'list': must be a dataset with at least one row"),
    (lambda: importers.read("axolotl", [{"text": "a"}], vocab_size=9), r"columns = \['text'\]: must be target_tok"),
    (lambda: importers.read("distillkit", [{"text": "a"}], vocab_size=9), "must be columns token_ids and top_values"),
    (lambda: importers.read("distillkit", [packed(0, "float32", False)], vocab_size=9), "compression = None: must"),
    (lambda: importers.read("axolotl", [{**axolotl(0), "target_token_ids": [[1], [2, 3]]}], vocab_size=9),
     "target_token_ids = list: must be numbers"),
    (lambda: Columns("distillkit", [{}], 9, {"d": 9}), r"compression = \['d'\]: must be to have"),
    (lambda: Columns("distillkit", [{}], 9, {"d": 9, "k": 4, "exact_k": 2, "delta_encoding": False}), "lossless"),
    (lambda: Columns("distillkit", [{}], 9, {"d": 8, "k": 4, "exact_k": 4, "delta_encoding": False}), "vocab_size"),
    (lambda: Columns("distillkit", [packed(0, "float16", False)], cases.VOCAB,
                     {"d": 1000, "k": 8, "exact_k": 8, "delta_encoding": False}), "give those they were packed with"),
    (lambda: importers.normalised(_one(ids=np.zeros((6, 8))), 1000), "file: ids, log_probs = float64"),
    (lambda: importers.normalised(_one(log_probs=np.zeros((6, 8)), log_tail=None), 1000), "of mass 8.000: must be"),
    (lambda: importers.normalised(_one(log_probs=np.full((6, 8), np.nan)), 1000), "log_probs = NaN or above 0"),
    (lambda: importers.normalised(_one(log_probs=np.full((6, 8), 2.0)), 1000), "log_probs = NaN or above 0"),
    (lambda: importers.normalised(_one(), 50), r"file: ids = \d+: must be below vocab_size \(50\); correct"),
    (lambda: importers.normalised(_one(ids=np.zeros((6, 8), int)), 50), "ids = one id twice in a row"),
    (lambda: importers.normalised(_one(log_tail=np.zeros(5)), 1000), r"file: log_tail = \(5,\): must be \[6\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), WRONG)
def test_wrong_sources(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(CacheError, match=text):
        call()


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"a folder with ids\.npy and log_probs\.npy, or with \.npz files"):
        importers.read("arrays", tmp_path, vocab_size=9)
    ids, log_probs, _ = cases.example(0)
    np.savez(tmp_path / "first.npz", ids=ids, log_probs=log_probs)
    with pytest.raises(CacheError, match=r"source = 'first.npz': must be a .npz with the example's id in its name"):
        importers.read("arrays", tmp_path, vocab_size=9)
    (tmp_path / "first.npz").rename(tmp_path / "1.npz")
    np.savez(tmp_path / "a1.npz", ids=ids, log_probs=log_probs)
    with pytest.raises(CacheError, match="two files of one number"):
        importers.read("arrays", tmp_path, vocab_size=9)
    (tmp_path / "a1.npz").unlink()
    (tmp_path / "2.npz").write_bytes(b"PK nonsense")
    with pytest.raises(CacheError, match=r"2.npz' cannot be read"):
        importers.read("arrays", tmp_path, vocab_size=9)
    np.savez(tmp_path / "2.npz", ids=ids)
    with pytest.raises(CacheError, match=r"must be ids \[L, K\], log_probs \[L, K\] and perhaps"):
        importers.read("arrays", tmp_path, vocab_size=9)
    np.savez(tmp_path / "2.npz", ids=np.array([[{}]], dtype=object), log_probs=log_probs)  # would be a pickle
    with pytest.raises(CacheError, match="cannot be read"):
        importers.read("arrays", tmp_path, vocab_size=9)
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(CacheError, match=r"must be ids and log_probs \[E, L, K\]"):
        importers.read("arrays", tmp_path, vocab_size=9)


def test_tokens_and_rows_must_go_together(tmp_path: Path) -> None:
    source = [{**axolotl(0), "input_ids": list(range(9))}]
    with pytest.raises(CacheError, match="rows = 6: must be one for each of the 9 tokens"):
        write(importers.read("axolotl", source, vocab_size=cases.VOCAB), tmp_path / "cache")
    with pytest.raises(CacheError, match="aligned = 'left': must be one of 'next', 'same'"):
        write(importers.read("axolotl", source, vocab_size=cases.VOCAB), tmp_path / "cache", aligned="left")

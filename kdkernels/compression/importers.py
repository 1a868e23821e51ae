"""A teacher cache from top-k files that another program wrote: plain arrays, axolotl's columns, DistillKit's columns.

    cache = importers.write(importers.read("arrays", "topk/", vocab_size=151936), "cache", vocab_size=151936)

Entries are sorted by id; a log tail that the files lack is computed as log(1 - sum of the kept), which cancels where
the kept are nearly all: programs that know the tail should write it. docs/cache.md lists what is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kdkernels._checks import fail
from kdkernels.compression.manifest import CacheError, Settings
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter

FORMATS = ("arrays", "axolotl", "distillkit")
ALIGNMENTS = ("next", "same")
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TopK:
    """One example as a file has it: entries in any order; -1 or -inf marks padding.

    ids [L, K]; log_probs [L, K]; log_tail [L] or None; input_ids [L or L + 1] or None; `where` is for messages.
    """

    id: int
    ids: npt.NDArray[Any]
    log_probs: npt.NDArray[Any]
    log_tail: npt.NDArray[Any] | None
    input_ids: npt.NDArray[Any] | None
    where: str


class Examples(Protocol):
    """What `read` gives: examples one by one, how many, and the most entries a row has."""

    k: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[TopK]: ...


def read(
    form: str,
    source: str | Path | Sequence[Mapping[str, Any]],
    *,
    vocab_size: int,
    compression: Mapping[str, Any] | None = None,
    k: int | None = None,
) -> Examples:
    """Files (or rows, a sequence of mappings such as a `datasets.Dataset`) in one of `FORMATS`.

    compression: the settings with which DistillKit packed its columns. k: the most entries a row has (the cache's k);
    None finds out, which reads a dataset's ids once more.
    """
    if form not in FORMATS:
        fail(CacheError, "format", repr(form), "one of " + ", ".join(map(repr, FORMATS)))
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        fail(CacheError, "k", repr(k), "an int, at least 1, or None")
    if form == "arrays":
        if not isinstance(source, (str, Path)):
            fail(CacheError, "source", type(source).__name__, "the path of a folder")
        examples = _arrays(Path(source))
        examples.k = examples.k if k is None else k
        return examples
    from kdkernels.compression.import_columns import Columns

    return Columns(form, source, vocab_size, compression, k)


def write(
    examples: Examples,
    out: str | Path,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    bits: int = 8,
    teacher: str = "",
    tokenizer: str = "",
    tokenizer_hash: str = "",
    aligned: str = "next",
    resume: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> CacheReader:
    """Write `examples` as a cache; with `resume`, those that `out` lacks.

    aligned: "next" if row t is the distribution of token t + 1, as a causal model gives it; "same" if it is that of
    token t itself: rows then move up by one. The last token's row may be missing; it is empty then.
    """
    if aligned not in ALIGNMENTS:
        fail(CacheError, "aligned", repr(aligned), "one of " + ", ".join(map(repr, ALIGNMENTS)))
    settings = Settings(
        vocab_size, examples.k, temperature, bits=bits, teacher=teacher, tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash, metadata={"imported": True, "aligned": aligned},
    )  # fmt: skip
    with CacheWriter.create(out, settings, resume=resume) as writer:
        for example in examples:
            if not (resume and example.id in writer):
                _check_width(example, settings.k)
                ids, log_probs, log_tail = _place(example, *normalised(example, vocab_size), aligned)
                writer.append(example.id, ids, log_probs, log_tail, input_ids=example.input_ids)
            progress(1)
        writer.commit()
        return writer.reader


def _check_width(example: TopK, k: int) -> None:
    width = np.shape(example.ids)[-1] if np.ndim(example.ids) else 0
    if width > k:
        fail(CacheError, f"{example.where}: entries a row", width, f"at most k ({k})", "raise k (--k)")


def normalised(example: TopK, vocab_size: int) -> tuple[Int32, Float32, Float32]:
    """(ids, log_probs, log_tail) as the codec takes them: ascending, padding at the end, a tail for every row."""
    where, ids, logs = example.where, np.asarray(example.ids), np.asarray(example.log_probs, np.float64)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or logs.shape != ids.shape:
        allowed = "integers [L, K] and numbers [L, K]"
        fail(CacheError, f"{where}: ids, log_probs", f"{ids.dtype} {ids.shape}, {logs.shape}", allowed)
    kept = (ids >= 0) & (logs > -np.inf)
    if np.isnan(logs).any() or (logs[kept] > 1e-3).any():
        fail(CacheError, f"{where}: log_probs", "NaN or above 0", "natural logarithms of probabilities")
    if (ids[kept] >= vocab_size).any():
        fail(CacheError, f"{where}: ids", int(ids.max()), f"below vocab_size ({vocab_size})", "correct --vocab-size")
    order = np.argsort(np.where(kept, ids.astype(np.int64), np.iinfo(np.int64).max), axis=-1, kind="stable")
    kept = np.take_along_axis(kept, order, -1)
    ids = np.where(kept, np.take_along_axis(ids, order, -1), -1).astype(np.int32)
    logs = np.where(kept, np.minimum(np.take_along_axis(logs, order, -1), 0.0), -np.inf)
    if ((ids[:, 1:] == ids[:, :-1]) & kept[:, 1:]).any():
        fail(CacheError, f"{where}: ids", "one id twice in a row", "different in each row")
    tail = _tail(logs, where) if example.log_tail is None else np.asarray(example.log_tail, np.float64)
    if tail.shape != (len(ids),) or np.isnan(tail).any() or (tail > 1e-3).any():
        fail(CacheError, f"{where}: log_tail", f"{tail.shape}", f"[{len(ids)}] natural logarithms of probabilities")
    return ids, logs.astype(np.float32), np.minimum(tail, 0.0).astype(np.float32)


def _tail(logs: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float64]:
    mass = np.exp(logs).sum(-1)
    if (mass > 1.01).any():
        remedy = "these are no log-probabilities of the whole row (unnormalised logits?)"
        fail(CacheError, f"{where}: log_probs", f"of mass {mass.max():.3f}", "of mass 1 at most", remedy)
    rest = 1.0 - mass
    with np.errstate(divide="ignore"):
        tail: npt.NDArray[np.float64] = np.where(rest > 1e-6, np.log(np.maximum(rest, 1e-300)), -np.inf)
    return tail


def _place(
    example: TopK, ids: Int32, log_probs: Float32, log_tail: Float32, aligned: str
) -> tuple[Int32, Float32, Float32]:
    """Row t for token t + 1, a row a token; a token without a row gets an empty one, all mass in its tail."""
    length = len(ids) if example.input_ids is None else len(example.input_ids)
    if aligned == "same":
        ids, log_probs, log_tail = ids[1:], log_probs[1:], log_tail[1:]
    missing = length - len(ids)
    if missing not in (0, 1) or length == 0:
        fail(
            CacheError, f"{example.where}: rows", len(example.ids), f"one for each of the {length} tokens",
            "cut or pad them alike",
        )  # fmt: skip
    pad = ((0, missing), (0, 0))
    ids, log_probs = np.pad(ids, pad, constant_values=-1), np.pad(log_probs, pad, constant_values=-np.inf)
    return ids, log_probs, np.pad(log_tail, (0, missing))


# --- plain arrays ---


class _Folder:
    """One .npz an example (the digits in its name are its id), with ids, log_probs and perhaps log_tail, input_ids."""

    def __init__(self, files: list[Path]) -> None:
        self.files = sorted((_number(path), path) for path in files)
        numbers = [number for number, _ in self.files]
        if len(set(numbers)) < len(numbers):
            fail(CacheError, "source", "two files of one number", "one .npz an example, numbered")
        self.k = max(_npz(path)["ids"].shape[-1] for _, path in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[TopK]:
        for number, path in self.files:
            arrays = _npz(path)
            yield TopK(
                number, arrays["ids"], arrays["log_probs"], arrays.get("log_tail"), arrays.get("input_ids"), str(path)
            )


class _Stacked:
    """ids.npy [E, L, K], log_probs.npy [E, L, K], perhaps log_tail.npy [E, L] and input_ids.npy [E, L], mapped."""

    def __init__(self, folder: Path) -> None:
        names = ("ids", "log_probs", "log_tail", "input_ids")
        self.arrays = {name: _load(folder / f"{name}.npy") for name in names if (folder / f"{name}.npy").is_file()}
        self.folder = folder
        shapes = {name: array.shape for name, array in self.arrays.items()}
        ids = shapes["ids"]
        good = len(ids) == 3 and all(shape[: len(shape)] == ids[: len(shape)] for shape in shapes.values())
        if not good or shapes.get("log_probs") != ids:
            fail(CacheError, "source", shapes, "ids and log_probs [E, L, K], log_tail and input_ids [E, L]")
        self.k = ids[2]

    def __len__(self) -> int:
        return len(self.arrays["ids"])

    def __iter__(self) -> Iterator[TopK]:
        for number in range(len(self)):
            one = {name: array[number] for name, array in self.arrays.items()}
            where = f"{self.folder}[{number}]"
            yield TopK(number, one["ids"], one["log_probs"], one.get("log_tail"), one.get("input_ids"), where)


def _arrays(folder: Path) -> Examples:
    if not folder.is_dir():
        fail(CacheError, "source", repr(str(folder)), "a folder of .npz or .npy files")
    if (folder / "ids.npy").is_file():
        return _Stacked(folder)
    files = sorted(folder.glob("*.npz"))
    if not files:
        fail(CacheError, "source", repr(str(folder)), "a folder with ids.npy and log_probs.npy, or with .npz files")
    return _Folder(files)


def _number(path: Path) -> int:
    found = re.findall(r"\d+", path.stem)
    if not found:
        fail(CacheError, "source", repr(path.name), "a .npz with the example's id in its name", "such as 000017.npz")
    return int(found[-1])


def _npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    arrays = _load(path)
    try:
        found = {name: arrays[name] for name in arrays}
    except (OSError, ValueError) as error:
        raise CacheError(f"{str(path)!r} cannot be read ({error})") from error
    if not {"ids", "log_probs"} <= set(found) or found["ids"].ndim != 2:
        fail(CacheError, repr(str(path)), sorted(found), "ids [L, K], log_probs [L, K] and perhaps log_tail, input_ids")
    return found


def _load(path: Path) -> Any:
    import zipfile

    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CacheError(f"{str(path)!r} cannot be read ({str(error).splitlines()[0]})") from error

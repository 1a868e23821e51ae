"""What the teacher cache's tests share. Numpy only, so that a killed writer starts in a moment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from kdkernels.compression import codec
from kdkernels.compression.manifest import CacheError, Settings
from kdkernels.compression.reader import CacheReader
from kdkernels.compression.writer import CacheWriter

VOCAB, K, ROWS = 1000, 8, 6
EXAMPLES = 4
"""Examples of an import."""
SETTINGS = Settings(VOCAB, K, bits=32, teacher="somebody", tokenizer_hash="abc")


def example(number: int, rows: int = ROWS, k: int = K, vocab: int = VOCAB) -> tuple[Any, Any, Any]:
    """(ids [L, K] int32, log_probs [L, K] float32, log_tail [L] float32) of example `number`, always the same."""
    rng = np.random.default_rng([7, number])
    ids = np.sort(np.stack([rng.choice(vocab, k, replace=False) for _ in range(rows)]), -1).astype(np.int32)
    share = rng.dirichlet(np.ones(k + 1), rows)
    logs = np.log(np.maximum(share, 1e-12)).astype(np.float32)
    return ids, logs[:, :k].copy(), logs[:, k].copy()


def tokens(number: int, rows: int = ROWS) -> Any:
    return np.random.default_rng([8, number]).integers(0, VOCAB, rows)


def append(writer: CacheWriter, number: int) -> None:
    writer.append(number, *example(number), input_ids=tokens(number))


def build(path: Path, numbers: Any, commits: int = 1, **changes: Any) -> CacheReader:
    """A cache of these examples, in `commits` shards."""
    with CacheWriter.create(path, Settings(**{**SETTINGS.to_dict(), "other_temperatures": (), **changes})) as writer:
        for part in np.array_split(np.asarray(numbers), commits):
            for number in part.tolist():
                append(writer, number)
            writer.commit()
    return CacheReader(path)


def check(reader: CacheReader, number: int) -> None:
    """Example `number` is there, bit for bit (32 bits a value)."""
    got = reader.read(number, tokens(number))
    ids, log_probs, log_tail = example(number)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_array_equal(got.log_probs, log_probs)
    np.testing.assert_array_equal(got.log_tail, log_tail)


def write_on_and_on(path: str, seed: int) -> None:
    """Resume the cache and append what is missing, in shuffled order, committing every few; say what is committed."""
    rng = np.random.default_rng(seed)
    with CacheWriter.create(path, SETTINGS, resume=True, shard_bytes=int(rng.integers(600, 6000))) as writer:
        fresh = []
        for number in rng.permutation(4000).tolist():
            if number in writer:
                continue
            append(writer, number)
            fresh.append(number)
            if len(fresh) >= rng.integers(1, 9):
                writer.commit()
                print(*fresh, flush=True)
                fresh = []


if __name__ == "__main__":
    try:
        write_on_and_on(sys.argv[1], int(sys.argv[2]))
    except CacheError as error:
        sys.exit(str(error))


def close(got: codec.Decoded, number: int, tail: float = 0.0) -> None:
    """Ids and log-probabilities exactly; the tail within `tail` (it was 1 minus the sum of the others)."""
    ids, log_probs, log_tail = example(number)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_array_equal(got.log_probs, log_probs)
    np.testing.assert_allclose(np.exp(got.log_tail), np.exp(log_tail), rtol=0, atol=tail)

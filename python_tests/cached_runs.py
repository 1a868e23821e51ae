"""What the tests of building and of using a teacher cache share: a small job, and a cache that keeps everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
from trainer_runs import config

from kdkernels.trainers import CacheConfig, DistillConfig, build_cache, models

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

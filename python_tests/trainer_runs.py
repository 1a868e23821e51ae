"""What the trainers' tests share: a small job on disk, its options, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

from kdkernels.trainers import DistillConfig, models


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, words: Any) -> Path:
    """A folder with `data`, `teacher`, and `student` (half its layers)."""
    root = tmp_path_factory.mktemp("job")
    tiny.write_corpus(root / "data")
    teacher = tiny.llama(4)
    tiny.save(teacher, root / "teacher", words)
    tiny.save(models.student_from_layers(teacher, [0, 2]), root / "student", words)
    return root


def config(place: Path, output: Path | str, **options: Any) -> DistillConfig:
    settings = {"steps": 6, "batch_size": 2, "block_size": 32, "lr": 3e-3, "log_every": 1, "eval_blocks": 2, **options}
    base = {"teacher": str(place / "teacher"), "student": str(place / "student"), "data": str(place / "data")}
    return DistillConfig(**{**base, "output": str(output), **settings})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "seconds", "peak_rss_mib", "tokens_per_second", "config")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]

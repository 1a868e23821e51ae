"""Every block of docs/training.md, run as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

transformers = pytest.importorskip("transformers")
TEXT = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
SECTIONS = {
    part.splitlines()[0]: "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))
    for part in TEXT.split("\n## ")[1:]
}
NEEDS = {"TRL's on-policy distillation": "trl", "transformers' Trainer": "trl", "Lightning": "lightning"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names() -> dict[str, Any]:
    """What the page says its blocks find."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(8):
        ids = torch.randint(0, 250, (10,), generator=generator)
        data.append({"input_ids": ids, "labels": ids.clone()})
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return {
        "student": tiny.llama(2),
        "teacher": tiny.llama(2, seed=1),
        "tokenizer": tokenizer,
        "data": data,
        "batches": [{key: torch.stack([row[key] for row in data[i : i + 2]]) for key in data[0]} for i in (0, 2)],
        "domains": {"code": data[:5], "prose": data[5:]},
        "held_out": {"code": data[:2], "prose": data[2:4]},
    }


def test_the_page_has_the_recipes() -> None:
    assert len(SECTIONS) == 6
    assert all(SECTIONS.values())


@pytest.mark.parametrize("section", SECTIONS)
def test_a_recipe_runs_and_trains(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if section in NEEDS:
        pytest.importorskip(NEEDS[section])
    monkeypatch.chdir(tmp_path)
    found = names()
    before = {name: value.clone() for name, value in found["student"].state_dict().items()}
    exec(compile(SECTIONS[section], section, "exec"), found)
    changed = [name for name, value in found["student"].state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) == (section != "Data by domain (DDK)")
    if section == "Data by domain (DDK)":
        assert found["weights"].updates == 3
        assert found["sampler"].weights == pytest.approx(found["weights"].weights)

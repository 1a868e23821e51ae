"""Perplexity by domain against a plain loop, over ranks, and from the folder that keeps it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

from kdkernels.ddk import measure_perplexity

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")


def domains(seed: int = 0, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """Samples of unequal lengths; one in two has labels of its own."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("code", "prose"):
        found[name] = []
        for number in range(count):
            ids = torch.randint(0, 300, (5 + 3 * number,), generator=generator)
            labels = torch.where(torch.arange(len(ids)) < 2, -100, ids)
            found[name].append({"input_ids": ids, "labels": labels, "bytes": 4 * len(ids)})
    return found


@torch.no_grad()
def plainly(model: Any, samples: list[dict[str, Any]]) -> tuple[float, int]:
    nll, tokens = 0.0, 0
    for sample in samples:
        logits = model(input_ids=sample["input_ids"][None]).logits[0, :-1].double()
        labels = sample["labels"][1:]
        judged = labels != -100
        chosen = logits.log_softmax(-1)[judged].gather(-1, labels[judged][:, None])
        nll, tokens = nll - float(chosen.sum()), tokens + int(judged.sum())
    return nll, tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(2)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_is_weighted_by_token(model: Any, batch_size: int) -> None:
    model.train()
    found = measure_perplexity(model, domains(), batch_size=batch_size)
    assert model.training
    for name, samples in domains().items():
        nll, tokens = plainly(model.eval(), samples)
        assert found[name] == pytest.approx(math.exp(nll / tokens), rel=2e-6)


def test_per_byte(model: Any) -> None:
    found = measure_perplexity(model, domains(), unit="byte")
    nll, _ = plainly(model.eval(), domains()["code"])
    assert found["code"] == pytest.approx(math.exp(nll / sum(s["bytes"] for s in domains()["code"])), rel=2e-6)
    without = {"code": [{"input_ids": torch.arange(9)}]}
    with pytest.raises(ValueError, match="samples without 'bytes'"):
        measure_perplexity(model, without, unit="byte")


def test_labels_default_to_the_ids_and_masks_hide(model: Any) -> None:
    ids = torch.arange(12)
    padded = {"input_ids": torch.cat([ids, ids]), "attention_mask": (torch.arange(24) < 12).long()}
    found = measure_perplexity(model, {"a": [{"input_ids": ids}], "b": [padded]})
    assert found["a"] == pytest.approx(found["b"], rel=2e-6)


def test_a_kept_result_needs_no_forward(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_perplexity(model, domains(), cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.base_model), "forward", None)
        assert measure_perplexity(model, domains(), cache=tmp_path) == first
    other = measure_perplexity(model, domains(seed=1), cache=tmp_path)
    assert other != first
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    assert measure_perplexity(model, domains(), cache=tmp_path) != first
    for path in tmp_path.iterdir():
        path.write_text("{", encoding="utf-8")
    with torch.no_grad():
        model.model.norm.weight[0] -= 0.5
    assert measure_perplexity(model, domains(), cache=tmp_path) == first


RANK = """
import sys, torch, torch.distributed as dist, json
sys.path[:0] = [{tests!r}, {root!r}]
import tiny_models as tiny, test_ddk_perplexity as t
from kdkernels.ddk import measure_perplexity
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
cache = sys.argv[3] if rank == 0 else sys.argv[3] + "-absent"
found = [measure_perplexity(tiny.llama(2), t.domains(), cache=cache) for _ in range(2)]
print(json.dumps(found))
dist.destroy_process_group()
"""


def test_ranks_share_the_samples_and_agree(tmp_path: Path) -> None:
    import json

    root = Path(__file__).resolve().parent.parent
    code = RANK.format(tests=str(root / "python_tests"), root=str(root))
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen([*command, str(r), str(tmp_path / "meet"), str(tmp_path / "c")], stdout=subprocess.PIPE)
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (first, again), (theirs, _) = (json.loads(output) for output in outputs)
    assert first == theirs == again  # one rank without the file: both measure again
    assert first == pytest.approx(measure_perplexity(tiny.llama(2), domains()), rel=1e-6)


def test_bad_input(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"datasets\['a'\] = empty"):
        measure_perplexity(model, {"a": []})
    with pytest.raises(ValueError, match="without a token to judge"):
        measure_perplexity(model, {"a": [{"input_ids": torch.tensor([3])}]})
    with pytest.raises(ValueError, match=r"datasets\['a'\] = input_ids in \[3, 304\]: .*another tokenizer"):
        measure_perplexity(model, {"a": [{"input_ids": torch.tensor([3, 304])}]})
    with pytest.raises(ValueError, match="unit"):
        measure_perplexity(model, domains(), unit="bytes")
    with pytest.raises(ValueError, match="batch_size = 0"):
        measure_perplexity(model, domains(), batch_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache = .*: must be a folder"):
        measure_perplexity(model, domains(), cache=tmp_path / "file")
    broken = tiny.llama(1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="negative log-likelihood of 'code' = nan"):
        measure_perplexity(broken, domains())

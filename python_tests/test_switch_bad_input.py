"""`kd.switch_generate` given something wrong: an error that names it, before anything is generated."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.switch import left_padded


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny.llama(2, seed=1).eval(), tiny.llama(4, seed=2).eval()


IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def numbers(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


GOOD = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
        ({"input_ids": [[1, 2]]}, "input_ids = list"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.int64)}, "an empty batch"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "an empty batch or prompt"),
        ({"input_ids": torch.tensor([1, 2])}, "input_ids\\[None\\]"),
        ({"input_ids": torch.tensor([[1.0]])}, "torch.float32"),
        ({"input_ids": torch.tensor([[1, 304]])}, "input_ids\\[0, 1\\] = 304"),
        ({"input_ids": torch.tensor([[1], [-1]])}, "input_ids\\[1, 0\\] = -1"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask shape"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "padding on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "padding on the left"),
        ({"attention_mask": torch.zeros(2, 3)}, "padding on the left"),
        ({"attention_mask": torch.full((2, 3), 2)}, "0 for padding, 1 for tokens"),
        ({"uniforms": numbers(GOOD)}, "uniforms shape = \\[1, 4\\]"),
        ({"uniforms": numbers(GOOD[:3], GOOD[:3])}, "uniforms shape = \\[2, 3\\]"),
        ({"uniforms": numbers(GOOD, [0.1, 0.2, 1.0, 0.4])}, "in \\[0, 1\\)"),
        ({"uniforms": numbers(GOOD, [0.1, -0.1, 0.2, 0.4])}, "in \\[0, 1\\)"),
        ({"uniforms": numbers(GOOD, [0.1, math.nan, 0.2, 0.4])}, "in \\[0, 1\\)"),
        ({"uniforms": [GOOD, GOOD]}, "uniforms = list"),
        ({"uniforms": numbers(GOOD, GOOD), "generator": torch.Generator()}, "generator"),
        ({"cache": "paged"}, "cache = 'paged'"),
        ({"measure": "never"}, "measure = 'never'"),
        ({"eos_token_id": 304}, "eos_token_id = 304"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"pad_token_id": 1000}, "pad_token_id = 1000"),
        ({"vocab_size": 305}, "vocab_size = 305"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"max_new_tokens": 254}, "context, 256"),
        ({"input_ids": torch.ones(1, 257, dtype=torch.int64)}, "shorten the prompts"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(pair: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kd.switch_generate(*pair, **{"input_ids": IDS, "max_new_tokens": 4, **options})


def test_the_context_counts_tokens_not_padding(pair: tuple[Any, Any]) -> None:
    ids = torch.ones(1, 300, dtype=torch.int64)
    mask = (torch.arange(300) >= 297).long()[None]
    out = kd.switch_generate(*pair, ids, mask, max_new_tokens=3, eos_token_id=[])
    assert out.responses.shape == (1, 3)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_model_is_named(pair: tuple[Any, Any], role: str) -> None:
    def call(model: Any) -> None:
        models = (model, pair[1]) if role == "student" else (pair[0], model)
        kd.switch_generate(*models, IDS, max_new_tokens=4)

    with pytest.raises(TypeError, match=f"{role} = str"):
        call("a name")
    short = tiny.llama(2, seed=1).eval()
    short.config.max_position_embeddings = 5
    with pytest.raises(ValueError, match=f"the {role}'s context, 5"):
        call(short)
    with pytest.raises(ValueError, match=f"{role} = in train mode with dropout"):
        call(tiny.llama(2, seed=1, attention_dropout=0.1).train())
    checkpointed = tiny.llama(2, seed=1).train()
    checkpointed.model.gradient_checkpointing = True  # as gradient_checkpointing_enable() does
    with pytest.raises(ValueError, match=f"{role} = in train mode with gradient checkpointing"):
        call(checkpointed)
    other = tiny.llama(2, vocab=512, seed=1).eval()
    sizes = "student 512, teacher 304" if role == "student" else "student 304, teacher 512"
    with pytest.raises(ValueError, match=sizes):
        call(other)


def test_different_tokenizers_are_named(pair: tuple[Any, Any]) -> None:
    words, other = tiny.tokenizer(300), tiny.tokenizer(280)
    with pytest.raises(ValueError, match="tokenizers differ: teacher has"):
        kd.switch_generate(*pair, IDS, max_new_tokens=4, tokenizer=words, teacher_tokenizer=other)
    with pytest.raises(ValueError, match="teacher_tokenizer = given alone"):
        kd.switch_generate(*pair, IDS, max_new_tokens=4, teacher_tokenizer=other)
    words.add_tokens([f"<|{i}|>" for i in range(50)])
    with pytest.raises(ValueError, match="student 304, teacher 304, the tokenizer's ids up to"):
        kd.switch_generate(*pair, IDS, max_new_tokens=4, tokenizer=words)


def test_a_model_that_breaks_is_an_error(pair: tuple[Any, Any]) -> None:
    broken = copy.deepcopy(pair[1])
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="teacher"):
        kd.switch_generate(pair[0], broken, IDS, max_new_tokens=4, measure="always")


def test_prompts_that_cannot_be_padded() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one, and none of them empty"):
            left_padded(prompts, 0)

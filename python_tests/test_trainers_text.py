"""What the training loop stands on: text to blocks, models and their heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from trainer_runs import config, one_thread, place, words

from kdkernels import data
from kdkernels.errors import UserError
from kdkernels.trainers import distill, heads, models

pytest.importorskip("transformers")
__all__ = ["one_thread", "place", "words"]  # fixtures


# --- text ---


def test_blocks_keep_document_boundaries() -> None:
    documents = [
        np.arange(10, 15, dtype=np.int32),
        np.arange(20, 22, dtype=np.int32),
        np.arange(30, 36, dtype=np.int32),
    ]
    blocks = data.pack(documents, length=4, pad=0)
    assert len(blocks) == 4
    rows = [{k: v.tolist() for k, v in blocks[i].items()} for i in range(4)]
    assert [r["input_ids"] for r in rows] == [[10, 11, 12, 13], [14, 20, 21, 30], [31, 32, 33, 34], [35, 0, 0, 0]]
    assert [r["labels"] for r in rows] == [
        [-100, 11, 12, 13],
        [14, -100, 21, -100],
        [31, 32, 33, 34],
        [35, -100, -100, -100],
    ]
    assert [r["position_ids"] for r in rows] == [[0, 1, 2, 3], [0, 0, 1, 0], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert blocks.counted() == sum(data.counted(blocks[i]["labels"][None]) for i in range(4)) == 7


def test_a_packed_document_never_sees_its_neighbour(words: Any) -> None:
    model = tiny.llama(2).eval()
    first, second = (np.asarray(words(tiny.sentences(name, 1)[0])["input_ids"], np.int32) for name in ("code", "prose"))
    blocks = data.pack([first, second], length=len(first) + len(second), pad=0)
    with torch.no_grad():
        batch = {key: value[None] for key, value in blocks[0].items()}
        packed = heads.hidden_states(model, batch)[0, len(first) :]
        alone = model.base_model(torch.from_numpy(second.astype(np.int64))[None]).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_begin_of_text_is_kept_where_the_tokeniser_sets_it(words: Any) -> None:
    from tokenizers import processors

    plain = next(iter(data.tokenise(["the river"], words, 7)))
    marked = tiny.tokenizer()
    marked.bos_token = "<|end|>"
    assert next(iter(data.tokenise(["the river"], marked, 7))).tolist() == plain.tolist()
    marked.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", marked.bos_token_id)]
    )
    assert next(iter(data.tokenise(["the river"], marked, 7))).tolist() == [marked.bos_token_id, *plain.tolist()]
    assert plain[-1] == 7


def test_held_out_split_is_by_document_and_seed() -> None:
    documents = [np.full(n, i, np.int32) for i, n in enumerate([5, 50, 8, 7, 9, 30, 6, 5, 4, 6])]
    for seed in range(5):
        train, held = data.split(documents, 0.1, np.random.default_rng(seed))
        again = data.split(documents, 0.1, np.random.default_rng(seed))
        ids = [d[0] for d in train], [d[0] for d in held]
        assert ids == ([d[0] for d in again[0]], [d[0] for d in again[1]])
        assert sorted([*ids[0], *ids[1]]) == list(range(10))
        assert 13 <= sum(len(d) for d in held) <= 26
    train, held = data.split(documents[:1], 0.2, np.random.default_rng(0))
    assert (len(train[0]), len(held[0])) == (4, 1)


def test_every_order_visits_every_block() -> None:
    sizes = {"a": 5, "b": 2}
    order = data.BlockOrder(sizes, "proportional", seed=3)
    for epoch in range(2):
        drawn = sorted(order[i] for i in range(7 * epoch, 7 * epoch + 7))
        assert drawn == [("a", i) for i in range(5)] + [("b", i) for i in range(2)]
    order = data.BlockOrder(sizes, "equal", seed=3)
    drawn = [order[i] for i in range(20)]
    assert sorted(name for name, _ in drawn) == ["a"] * 10 + ["b"] * 10
    assert sorted(i for name, i in drawn if name == "a") == sorted([*range(5)] * 2)
    assert [data.BlockOrder(sizes, "equal", seed=3)[i] for i in reversed(range(20))] == drawn[::-1]


def test_domains_are_folders_files_or_names(tmp_path: Path) -> None:
    for name in ("one/a.txt", "two/deep/b.md", "two/.hidden/c.txt", "three.jsonl"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text('{"text": "x"}\n{"text": "y"}\n' if "json" in name else name)
    with pytest.raises(UserError, match="both text files and folders"):
        data.find_domains(str(tmp_path / "d"), {})
    found = data.find_domains(str(tmp_path / "d" / "two"), {"lines": str(tmp_path / "d" / "three.jsonl")})
    assert list(found) == ["deep", "lines"]
    assert list(data.read_documents(found["lines"])) == ["x", "y"]
    assert list(data.read_documents(tmp_path / "d" / "two")) == ["two/deep/b.md"]


# --- models and heads ---


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 8.0}),
        ("HyperCLOVAX", {"logits_scaling": 0.125}),
        ("Phi", {}),  # a bias in the head
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "logit_scale": None}),
    ],
)
def test_heads_reproduce_the_models_own_logits(kind: str, options: dict[str, Any]) -> None:
    import transformers

    settings = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3, **options,
    }  # fmt: skip
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    model_config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(model_config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    head = heads.head_of(model, "student")
    heads.check_head(model, head, "student", torch.device("cpu"))
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "position_ids": torch.arange(6).expand(2, 6)}
    hidden = heads.hidden_states(model.eval(), batch)
    torch.testing.assert_close(
        head.logits(hidden, torch.float32).materialize(), model(**batch).logits, rtol=1e-4, atol=1e-4
    )


def test_an_unknown_logit_transform_is_an_error() -> None:
    class Squashed(type(tiny.llama(1))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    model = Squashed(tiny.llama(1).config)
    with pytest.raises(UserError, match=r"teacher: Squashed does more to its logits.*heads\.py"):
        heads.check_head(model, heads.head_of(model, "teacher"), "teacher", torch.device("cpu"))


def test_a_gguf_file_is_a_teacher(place: Path, tmp_path: Path, words: Any) -> None:
    pytest.importorskip("accelerate")
    teacher = tiny.llama(4, initializer_range=0.2)
    file = tiny.write_gguf(teacher, words, tmp_path / "teacher.gguf")
    loaded = models.load_model("teacher", str(file), torch.float32)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)
    ours = models.load_tokenizer("teacher", str(file))
    assert ours("the river ran")["input_ids"] == words("the river ran")["input_ids"]
    options = config(place, tmp_path / "run", teacher=str(file), student="every:2", tokenizer=str(place / "teacher"))
    after = distill(options, progress=False).summary["after"]
    assert all(score["kl"] > 0 for score in after.values())


def test_a_student_of_every_layer_is_the_teacher() -> None:
    teacher = tiny.llama(4, tie_word_embeddings=False)
    ids = torch.arange(10)[None]
    same = models.student_from_layers(teacher, [0, 1, 2, 3])
    torch.testing.assert_close(same(ids).logits, teacher(ids).logits)
    half = models.student_from_layers(teacher, [1, 3])
    assert half.config.num_hidden_layers == 2
    assert torch.equal(half.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight)
    assert models.layers_of("every:3", 10) == [0, 3, 6, 9]
    assert models.layers_of("every:2", 30) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]
    assert models.layers_of("every:4", 4) == [0]
    assert models.layers_of("layers:0,2", 4) == [0, 2]
    assert models.layers_of("some/name", 4) is None
    for wrong in ("every:0", "every:x", "layers:2,1", "layers:4"):
        with pytest.raises(UserError, match="the teacher has 4 layers"):
            models.layers_of(wrong, 4)

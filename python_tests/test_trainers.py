"""The training loop and what it stands on: text to blocks, heads, accumulation, checkpoints, resuming."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

import kdkernels as kd
from kdkernels import data
from kdkernels.errors import UserError
from kdkernels.trainers import DistillConfig, Interrupted, checkpoint, distill, heads, models, optim
from kdkernels.trainers.config import config_from
from kdkernels.trainers.setup import build

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
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


# --- the loop ---


def test_accumulation_equals_the_large_batch(place: Path, tmp_path: Path) -> None:
    """The same eight blocks in one pass or in eight, with different numbers of tokens that count in each."""
    runs = []
    for name, batch_size, accumulate in (("large", 8, 1), ("small", 1, 8)):
        options = {"steps": 3, "batch_size": batch_size, "accumulate": accumulate, "optimizer": "sgd", "lr": 1.0}
        result = distill(config(place, tmp_path / name, ce_weight=0.5, **options), progress=False)
        runs.append((dict(result.student.named_parameters()), lines(tmp_path / name)))
    for name, value in runs[0][0].items():
        worst = float((value - runs[1][0][name]).detach().abs().max())
        assert worst <= 1e-6 * float(value.detach().abs().max()) + 1e-7, (name, worst)
    for large, small in zip(runs[0][1], runs[1][1], strict=True):
        if large["event"] == "step":
            assert large["loss"] == pytest.approx(small["loss"], rel=1e-6)


def test_the_steps_are_the_textbook_ones(place: Path, tmp_path: Path) -> None:
    """Three steps against a loop written out with full logits and torch's own losses."""
    options = config(
        place, tmp_path / "run", steps=3, batch_size=3, ce_weight=0.3, kd_weight=0.7, temperature=2.0,
        temperature_scaling="t2", schedule="linear", warmup=1, clip=0.5, weight_decay=0.1,
    )  # fmt: skip
    result = distill(options, progress=False)
    setup = build(options)
    teacher, student = setup.objective.teacher, setup.objective.student
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    order = data.BlockOrder({k: len(v) for k, v in setup.corpus.train.items()}, "proportional", 0)
    for step, rate in enumerate([1.5e-3, 3e-3, 1.5e-3]):
        batch = data.batch_of(setup.corpus, order, 3 * step, 3, torch.device("cpu"))
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        zs, zt = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        kl = torch.nn.functional.kl_div(
            (zs / 2).log_softmax(-1), (zt / 2).log_softmax(-1), reduction="none", log_target=True
        )
        ce = torch.nn.functional.cross_entropy(zs.flatten(0, 1), labels.flatten(), reduction="mean")
        (0.7 * 4 * kl.sum(-1)[labels != -100].mean() + 0.3 * ce).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        adam.zero_grad()
    for (name, ours), theirs in zip(result.student.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=name)


def test_learning_rate_schedules() -> None:
    base = DistillConfig(steps=10, warmup=2, lr=1.0, min_lr=0.1)
    rates = [optim.learning_rate(i, base) for i in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.1 < rates[-1] < 0.2
    assert optim.learning_rate(9, DistillConfig(steps=10, lr=1.0, schedule="constant")) == 1.0
    assert optim.learning_rate(5, DistillConfig(steps=10, lr=1.0, schedule="linear")) == 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_distillation_lowers_the_divergence(place: Path, tmp_path: Path, optimizer: str) -> None:
    options = {"steps": 12, "optimizer": optimizer, "lr": {"sgd": 0.1, "adamw": 5e-3, "adafactor": 2e-2}[optimizer]}
    result = distill(config(place, tmp_path / "run", mix="equal", **options), progress=False)
    summary = result.summary
    assert set(summary["after"]) == {"code", "lists", "prose"}
    for name, after in summary["after"].items():
        assert after["kl"] < summary["before"][name]["kl"]
        assert after["tokens"] > 10
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert not checkpoint.steps_in(tmp_path / "run" / "checkpoints")


def test_scores_equal_the_textbook(place: Path, tmp_path: Path) -> None:
    result = distill(config(place, tmp_path / "run", steps=1, lr=1e-9, eval_blocks=1, batch_size=1), progress=False)
    setup = build(config(place, tmp_path / "run"))
    for name, blocks in setup.corpus.held_out.items():
        batch = {key: value[None] for key, value in blocks[0].items()}
        labels = batch.pop("labels")[0, 1:]
        keep = labels != -100
        with torch.no_grad():
            lq, lp = (
                m.eval()(**batch).logits[0, :-1][keep].double().log_softmax(-1)
                for m in (setup.objective.student, setup.objective.teacher)
            )
        score = result.summary["before"][name]
        nll = -lq.gather(1, labels[keep][:, None]).mean()
        assert score["kl"] == pytest.approx(float((lp.exp() * (lp - lq)).sum(-1).mean()), rel=1e-4)
        assert score["ppl"] == pytest.approx(float(nll.exp()), rel=1e-4)
        assert score["teacher_ppl"] == pytest.approx(
            float((-lp.gather(1, labels[keep][:, None]).mean()).exp()), rel=1e-4
        )
        assert score["top1"] == pytest.approx(float((lp.argmax(-1) == lq.argmax(-1)).double().mean()))
        assert score["tokens"] == int(keep.sum())


def test_text_alone_needs_no_teacher_pass(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = heads.hidden_states
    monkeypatch.setattr(
        "kdkernels.trainers.objective.hidden_states", lambda model, batch: calls.append(model) or plain(model, batch)
    )
    options = config(place, tmp_path / "run", kd_weight=0.0, ce_weight=1.0, steps=2)
    result = distill(options, progress=False)
    assert len(calls) == 2
    assert all(model is result.student for model in calls)
    steps = [row for row in lines(tmp_path / "run") if row["event"] == "step"]
    assert all(row["loss"] == pytest.approx(row["nll"], rel=1e-5) and "divergence" not in row for row in steps)


def test_logits_are_never_built(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No module of either model may produce anything as wide as the vocabulary, once the heads are checked."""
    options = config(place, tmp_path / "run", steps=2)
    setup = build(options)
    wide: list[str] = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.shape[-1] >= 300:
            wide.append(type(module).__name__)

    for model in (setup.objective.teacher, setup.objective.student):
        for module in model.modules():
            module.register_forward_hook(watch)
    batch = data.batch_of(setup.corpus, data.BlockOrder({"code": 2}, "equal", 0), 0, 2, torch.device("cpu"))
    loss, _ = setup.objective(batch, 10)
    loss.backward()
    assert wide == []


def test_bf16_keeps_float32_masters(place: Path, tmp_path: Path) -> None:
    setup = build(config(place, tmp_path / "x", bf16=True))
    assert setup.objective.dtype == torch.bfloat16
    assert next(setup.objective.teacher.parameters()).dtype == torch.bfloat16
    assert next(setup.objective.student.parameters()).dtype == torch.float32
    result = distill(config(place, tmp_path / "run", bf16=True, steps=8), progress=False)
    assert all(w.dtype == torch.bfloat16 for w in weights(tmp_path / "run").values())
    for name, after in result.summary["after"].items():
        assert after["kl"] < result.summary["before"][name]["kl"]


# --- padding and vocabularies ---


def test_padded_vocabularies_meet_at_the_smaller(place: Path, tmp_path: Path, words: Any) -> None:
    padded = tiny.llama(2, vocab=320)
    plain = tiny.llama(2, vocab=304)
    state = plain.state_dict()
    for name, value in padded.state_dict().items():
        value[: len(state[name])] = state[name]
    outcomes = []
    for name, student in (("plain", plain), ("padded", padded)):
        options = config(place, tmp_path / name, steps=2)
        outcomes.append(distill(options, student=student, tokenizer=words, progress=False).summary)
    for domain, score in outcomes[0]["before"].items():
        assert outcomes[1]["before"][domain]["kl"] == pytest.approx(score["kl"], rel=1e-5)
        assert outcomes[1]["after"][domain]["kl"] == pytest.approx(outcomes[0]["after"][domain]["kl"], rel=1e-4)


def test_different_vocabularies_are_named(place: Path, tmp_path: Path) -> None:
    other = tiny.tokenizer(280)
    tiny.save(tiny.llama(1, vocab=281), tmp_path / "other", other)
    with pytest.raises(UserError, match=rf"tokenizers differ: teacher has \d+ tokens, student {len(other)}"):
        build(config(place, tmp_path / "run", student=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"teacher has 304 rows, student 281, the tokenizer \d+ tokens"):
        build(config(place, tmp_path / "run", student=str(tmp_path / "other"), tokenizer=str(place / "teacher")))
    with pytest.raises(UserError, match="vocab_size is 999; allowed: up to 304"):
        build(config(place, tmp_path / "run", vocab_size=999))


# --- checkpoints ---


def test_resume_after_a_signal_is_bit_identical(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any
) -> None:
    """Stopped between two passes of step 4, on a student with dropout, then resumed: same weights, same log."""
    student = tiny.llama(2, attention_dropout=0.3)
    tiny.save(student, tmp_path / "student", words)
    common = {"student": str(tmp_path / "student"), "accumulate": 2, "save_every": 2, "eval_every": 3, "log_every": 2}
    distill(config(place, tmp_path / "whole", **common), progress=False)
    calls = 0
    plain = heads.hidden_states

    def stop_inside(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * (2 * 3 + 1):  # teacher and student once a pass: the first pass of the fourth step
            signal.raise_signal(signal.SIGTERM)
        return plain(model, batch)

    monkeypatch.setattr("kdkernels.trainers.objective.hidden_states", stop_inside)
    with pytest.raises(Interrupted, match="SIGTERM at step 3 of 6"):
        distill(config(place, tmp_path / "cut", **common), progress=False)
    assert checkpoint.steps_in(tmp_path / "cut" / "checkpoints") == [2, 3]
    monkeypatch.undo()
    torch.manual_seed(12345)
    distill(config(place, tmp_path / "cut", resume=True, **common), progress=False)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_finished_run_is_read_back(place: Path, tmp_path: Path) -> None:
    first = distill(config(place, tmp_path / "run"), progress=False)
    with pytest.raises(UserError, match="holds a finished run; add --resume"):
        distill(config(place, tmp_path / "run"), progress=False)
    again = distill(config(place, tmp_path / "run", resume=True), progress=False)
    assert again.summary == first.summary
    for ours, theirs in zip(first.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resuming_something_else_is_refused(place: Path, tmp_path: Path) -> None:
    distill(config(place, tmp_path / "run"), progress=False)
    with pytest.raises(UserError, match=r"lr is 0\.5, but the run in .* began with 0\.003"):
        distill(config(place, tmp_path / "run", resume=True, lr=0.5), progress=False)


def test_changed_data_is_noticed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_corpus(tmp_path / "data")
    options = {"data": str(tmp_path / "data"), "save_every": 1}
    monkeypatch.setattr(checkpoint, "steps_in", lambda folder: 1 / 0)  # dies right after the first checkpoint's rename
    with pytest.raises(ZeroDivisionError):
        distill(config(place, tmp_path / "run", **options), progress=False)
    monkeypatch.undo()
    next((tmp_path / "data" / "prose").iterdir()).write_text("something else entirely")
    with pytest.raises(UserError, match="data has changed"):
        distill(config(place, tmp_path / "run", resume=True, **options), progress=False)


def test_a_torn_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"x": torch.ones(3)}, keep=2)

    def torn(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(checkpoint.path_of(tmp_path, 1), torn)
    assert torch.equal(checkpoint.load(checkpoint.path_of(tmp_path, 1))["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_damaged_checkpoints_are_errors(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, {"x": torch.ones(300)}, keep=1)
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"junk" * 100):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="step-00000007"):
            checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(path)


def test_generators_come_back() -> None:
    import random

    state = checkpoint.rng_state()
    first = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.set_rng_state(state)
    second = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all()
    assert first[2] == second[2]


def test_works_outside_the_main_thread(place: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    job = threading.Thread(
        target=lambda: found.append(distill(config(place, tmp_path / "run", steps=1), progress=False))
    )
    job.start()
    job.join()
    assert found[0].summary["steps"] == 1


# --- wrong input ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"teacher": ""}, "teacher is ''"),
        ({"data": ""}, "data is ''"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
        ({"temperature": float("nan")}, "temperature is nan; allowed: a finite number"),
        ({"steps": 0}, "steps is 0"),
        ({"held_out": 1.0}, "held_out is 1.0; allowed: between 0 and 1"),
        ({"schedule": "sine"}, "schedule is 'sine'; allowed: one of cosine, linear, constant"),
        ({"warmup": 9}, r"warmup is 9; allowed: below steps \(6\)"),
        ({"kd_weight": 0.0}, "above 0 where ce_weight is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"divergence": "forwrd_kl"}, "forward_kl"),
        ({"divergence": "jsd", "divergence_args": {"alpha": 0.1}}, "'alpha'; jsd takes: beta"),
        ({"divergence": "jsd", "divergence_args": {"beta": 2.0}}, "beta is 2.0"),
        ({"data": "/no/such/folder"}, "data is '/no/such/folder'; no such file or folder"),
        ({"teacher": "/no/such/teacher"}, "teacher is '/no/such/teacher'; no such folder"),
        ({"teacher": "missing.gguf"}, "teacher is 'missing.gguf'; no such file"),
        ({"student": "every:9"}, "the teacher has 4 layers"),
        ({"block_size": 512}, "block_size is 512; the teacher reads at most 256 tokens"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_wrong_options_are_named(place: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        distill(config(place, tmp_path / "run", **options), progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_wrong_text_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"domain 'empty' .* holds no \.txt"):
        build(config(place, tmp_path / "run", data=str(tmp_path / "data")))
    (tmp_path / "data" / "empty" / "a.txt").write_text("  \n")
    with pytest.raises(UserError, match=r"domain 'empty' .* holds no text"):
        build(config(place, tmp_path / "run", data=str(tmp_path / "data")))
    for content, text in (("{bad", "line 1 is not JSON"), ('{"body": "x"}', "line 1 has no text under 'text'")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=text):
            build(config(place, tmp_path / "run", data="", domain={"x": str(tmp_path / "bad.jsonl")}))
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"bad\.txt' is not UTF-8 .* at byte 2"):
        build(config(place, tmp_path / "run", data=str(tmp_path / "bad.txt")))


def test_a_diverged_run_says_so(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d; lower --lr"):
        distill(config(place, tmp_path / "run", lr=1e30, clip=0.0, optimizer="sgd", eval_before=False), progress=False)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"teacher 'x' needs transformers.*pip install 'kdkernels\[trainers\]'"):
        models.load_model("teacher", "x", torch.float32)


def test_config_values_are_typed() -> None:
    assert config_from({"lr": 1, "domain": {"a": "b"}}, "x").lr == 1.0
    for values, text in (
        ({"stepz": 3}, "unknown option 'stepz'; did you mean 'steps'"),
        ({"steps": 3.5}, "steps is 3.5; allowed: int"),
        ({"steps": True}, "steps is True"),
        ({"divergence_args": {"beta": "x"}}, "a table of names and values"),
    ):
        with pytest.raises(UserError, match=text):
            config_from(values, "file.toml")


def test_public_names() -> None:
    assert kd.LinearLogits is not None
    from kdkernels import trainers

    assert all(hasattr(trainers, name) for name in trainers.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = trainers.nothing

"""Small things to train on, made on the spot and offline: a tokeniser, Llama-style models, text in three domains."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CODE = "def return import class self for while if else value index list dict print"
PROSE = "the river ran under old bridges while people of the town walked home at dusk"
LISTS = "alpha beta gamma delta epsilon zeta eta theta iota kappa one two three"
WORDS = {"code": CODE.split(), "prose": PROSE.split(), "lists": LISTS.split()}


def sentences(domain: str, count: int, seed: int = 0) -> list[str]:
    """`count` made-up sentences in the words of a domain."""
    rng = random.Random(f"{domain}-{seed}")
    return [" ".join(rng.choices(WORDS[domain], k=rng.randint(4, 20))) + "." for _ in range(count)]


def write_corpus(folder: Path, documents: int = 12) -> Path:
    """A data folder with one domain per subfolder, each in another format."""
    for domain in WORDS:
        (folder / domain).mkdir(parents=True)
        texts = ["\n".join(sentences(domain, 12, seed)) for seed in range(documents)]
        if domain == "lists":
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / domain / "all.jsonl").write_text(lines, encoding="utf-8")
            continue
        suffix = ".py" if domain == "code" else ".txt"
        for number, text in enumerate(texts):
            (folder / domain / f"{number:02d}{suffix}").write_text(text, encoding="utf-8")
    return folder


def tokenizer(vocab: int = 300) -> Any:
    """A byte-level BPE tokeniser trained on the three domains; at most `vocab` tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([s for domain in WORDS for s in sentences(domain, 50)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|end|>")


def llama(layers: int = 4, vocab: int = 304, seed: int = 0, **options: Any) -> Any:
    """A randomly initialised Llama with hidden size 32, sharp enough that its distributions are not uniform."""
    import torch

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    settings = {"tie_word_embeddings": True, "initializer_range": 0.2, **options}
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **settings,
    )
    return transformers.LlamaForCausalLM(config)


def save(model: Any, folder: Path, words: Any | None = None) -> Path:
    """A model (and its tokeniser) as a folder that `from_pretrained` reads."""
    model.save_pretrained(folder)
    (words if words is not None else tokenizer()).save_pretrained(folder)
    return folder


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `kdkernels ARGUMENTS` as a user would."""
    line = [sys.executable, "-m", "kdkernels", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, **options)


def write_gguf(model: Any, words: Any, path: Path) -> Path:
    """A Llama (and its tokeniser) as a GGUF file in float32, laid out as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    tokens = [token for token, _ in sorted(words.get_vocab().items(), key=lambda item: item[1])]
    tokens += [f"<|unused{i}|>" for i in range(config.vocab_size - len(tokens))]
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    file.add_token_merges([" ".join(pair) for pair in merges])
    for add in (file.add_eos_token_id, file.add_bos_token_id, file.add_pad_token_id):
        add(words.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = key.rpartition(".")
        array = value.detach().float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.split(".")[-1])
        if heads:  # llama.cpp keeps the rotary pairs side by side
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        file.add_tensor(f"{names.get_name(stem)}.{suffix}", array.copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path

"""`kd.switch_generate` with other architectures than Llama: positions, windows, capped logits, caches, adapters."""

from __future__ import annotations

from typing import Any

import pytest
import switch_oracle as oracle
import tiny_models as tiny
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.switch import left_padded

transformers = pytest.importorskip("transformers")

STEPS, VOCAB = 8, 64
PROMPTS = [[3, 9, 27, 11, 5, 50], [25, 4]]
SMALL = {"vocab_size": VOCAB, "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    **SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions": ("GPT2", {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "offset positions": (
        "OPT",
        {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.4, "pad_token_id": 0},
    ),
    "alibi": ("Bloom", {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "sliding window": ("Mistral", {**LLAMA_LIKE, "sliding_window": 4}),
    "windows and capped logits": (
        "Gemma2",
        {**LLAMA_LIKE, "sliding_window": 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
}  # fmt: skip


IN_FLOAT32 = ("Bloom", "Gemma2")  # in float64 transformers gives NaN for padded rows


def model(name: str, seed: int) -> Any:
    family, options = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options)
    made = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(config)
    return (made if family in IN_FLOAT32 else made.double()).eval()


def uniforms() -> Tensor:
    return torch.rand(2, STEPS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def rule(step: int, _: Any) -> float:
    """Closed, then open, then a decision: either model falls behind and catches up."""
    return 1.0 if step < 3 else -1.0 if step < 5 else 0.1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_architecture_follows_the_loop(name: str, cache: str) -> None:
    student, teacher = model(name, 1), model(name, 2)
    options = {"max_new_tokens": STEPS, "eos_token_id": [], "schedule": rule, "cache": cache}
    out = kd.switch_generate(student, teacher, *left_padded(PROMPTS, 0), uniforms=uniforms(), **options)
    for row, prompt in enumerate(PROMPTS):
        told = oracle.generate(student, teacher, prompt, uniforms()[row].tolist(), lambda t: rule(t, None))
        tolerance = 1e-9 if student.dtype == torch.float64 else 1e-5
        assert told.margin > 10 * tolerance
        assert out.responses[row].tolist() == told.tokens
        alone = kd.switch_generate(
            student, teacher, torch.tensor([prompt]), uniforms=uniforms()[row : row + 1], **options
        )
        assert torch.equal(alone.responses[0], out.responses[row])
        assert out.from_teacher[row].tolist() == told.from_teacher
        known = torch.tensor(told.jsd[5:], dtype=torch.float64)
        torch.testing.assert_close(out.jsd[row, 5:], known, atol=tolerance, rtol=tolerance)


def test_an_adapter_generates_as_the_model_that_it_makes() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    base = tiny.llama(2, seed=1).double()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).double().eval()
    with torch.no_grad():
        for key, weight in wrapped.named_parameters():
            if "lora_B" in key:
                weight.normal_(0, 0.3)
    teacher = tiny.llama(4, seed=2).double().eval()
    options = {"max_new_tokens": STEPS, "uniforms": uniforms(), "eos_token_id": [], "measure": "always"}
    out = kd.switch_generate(wrapped, teacher, *left_padded(PROMPTS, 0), **options)
    plain = kd.switch_generate(base, teacher, *left_padded(PROMPTS, 0), **options)
    merged = wrapped.merge_and_unload()
    expected = kd.switch_generate(merged, teacher, *left_padded(PROMPTS, 0), **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.jsd, expected.jsd, atol=1e-9, rtol=1e-9)
    assert torch.equal(plain.sequences, out.sequences)  # peft adapts the base in place


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=304, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="student = T5ForConditionalGeneration"):
        kd.switch_generate(
            transformers.T5ForConditionalGeneration(config).eval(), tiny.llama(1).eval(), torch.ones(1, 2).long(),
            max_new_tokens=2,
        )  # fmt: skip

"""A transformers model in this process as a chat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kdkernels.errors import UserError
from kdkernels.evaluation.chat import Conversation, Meter, Reply, Usage
from kdkernels.trainers.models import load_model, load_tokenizer


class LocalChat:
    """Answers of a causal LM, greedy unless temperature is above 0 (then the same again for the same seed and batch).

    A tokenizer with a chat template formats the conversation; without one (a base model) the texts of the messages,
    separated by blank lines, are the prompt. Prompts are batched by length; left padding.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}; allowed: 1 or more")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name = name or str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.batch_size, self.seed = batch_size, seed
        self._weights = weights_fingerprint(model)
        self._meter = Meter()

    @classmethod
    def load(
        cls, where: str, *, role: str = "model", dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
    ) -> LocalChat:
        """From a folder, a .gguf file or a name that transformers knows."""
        tokenizer = load_tokenizer(role, where)
        return cls(load_model(role, where, dtype).to(device), tokenizer, name=where, **options)

    @property
    def settings(self) -> dict[str, Any]:
        """How answers are made; the weights by a fingerprint, so that a model trained further is another one."""
        template = getattr(self.tokenizer, "chat_template", None)
        return {
            "kind": "transformers",
            "weights": self._weights,
            "template": hashlib.sha256(repr(template).encode()).hexdigest()[:16],
            "max_new_tokens": self.max_new_tokens,
            **({"temperature": self.temperature, "seed": self.seed} if self.temperature else {}),
        }

    @property
    def usage(self) -> Usage:
        """Requests and tokens so far."""
        return self._meter.read()

    def replies(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Reply]]:
        """Batches of prompts of like length."""
        prompts = [self._prompt(conversation) for conversation in conversations]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield from zip(batch, self._answer([prompts[i] for i in batch]), strict=True)

    def _prompt(self, conversation: Conversation) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in conversation], tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer("\n\n".join(message["content"] for message in conversation))["input_ids"]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and len(ids) + self.max_new_tokens > limit:
            raise UserError(
                f"{self.name}: a prompt of {len(ids)} tokens and max_new_tokens {self.max_new_tokens} do not fit into "
                f"its {limit} positions; shorten one of them"
            )
        return list(ids)

    @torch.no_grad()
    def _answer(self, prompts: list[list[int]]) -> list[Reply]:
        end = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (end or 0)
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        options: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            options = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        with torch.random.fork_rng():
            torch.manual_seed(_seed(self.seed, prompts))
            output = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=self.max_new_tokens, pad_token_id=pad, **options
            )
        answers = output[:, width:].tolist()
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            length = answer.index(end) if end in answer else len(answer)
            reply = Reply(
                self.tokenizer.decode(answer[:length], skip_special_tokens=True),
                len(prompt),
                min(length + 1, len(answer)),
            )
            self._meter.add(reply, requests=1)
            found.append(reply)
        return found


def _seed(seed: int, prompts: list[list[int]]) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, prompts)).encode()).digest()[:7], "little")


def weights_fingerprint(model: Any) -> str:
    """16 hexadecimal digits over names, shapes and the sums of the bits of a model's parameters."""
    digest = hashlib.sha256()
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in sorted(model.state_dict().items()):
        total = 0
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            total = int(tensor.detach().reshape(-1).view(views[tensor.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(getattr(tensor, 'shape', ()))} {total};".encode())
    return digest.hexdigest()[:16]

"""What `compare_models` was given: models by their roles, a tokenizer, text in blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from kdkernels.data import Blocks, find_domains, pack, read_documents, tokenise
from kdkernels.errors import UserError
from kdkernels.evaluation.compare_result import BEFORE, STUDENT
from kdkernels.evaluation.sweep import TEACHER
from kdkernels.trainers.models import (
    layers_of,
    load_model,
    load_tokenizer,
    same_tokenizer,
    student_from_layers,
    tokenizer_hash,
)

Texts = str | Path | Mapping[str, Blocks | Sequence[str]]


class Sides:
    """Models, their names and the tokenizer from what the caller gave."""

    def __init__(self, teacher: Any, student: Any, before: Any, tokenizer: Any, dtype: torch.dtype) -> None:
        self.names: dict[str, str] = {}
        self.cache = teacher if isinstance(teacher, kd.TeacherCache) else None
        self._dtype, self._tokenizers = dtype, {} if tokenizer is None else {"given": tokenizer}
        if self.cache is not None:
            self.teacher = None
            self.names[TEACHER] = self.cache.settings.teacher or str(self.cache.path)
        else:
            self.teacher = self._model(TEACHER, teacher)
        self.students = {STUDENT: self._model(STUDENT, student)}
        if before is not None:
            self.students[BEFORE] = self._before(before)
        kinds = list(self._tokenizers.values())
        self.tokenizer = kinds[0] if kinds else None
        for other in kinds[1:]:
            same_tokenizer(self.tokenizer, other)
        if self.cache is not None and self.tokenizer is not None:
            self.cache.require(tokenizer_hash=tokenizer_hash(self.tokenizer))

    @property
    def models(self) -> list[Any]:
        """All that are in memory."""
        return [*self.students.values(), *([] if self.teacher is None else [self.teacher])]

    def _model(self, role: str, value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 2:
            value, self._tokenizers[role] = value
        elif isinstance(value, (str, Path)):
            where = str(value)
            self.names[role] = where
            with contextlib.suppress(
                UserError
            ):  # a model's tokenizer may lie elsewhere: the caller's, the other side's
                self._tokenizers[role] = load_tokenizer(role, where)
            return load_model(role, where, self._dtype)
        if not hasattr(value, "get_output_embeddings"):
            allowed = "a causal LM of transformers, a pair (model, tokenizer), or a folder or name"
            raise UserError(f"{role} is a {type(value).__name__}; allowed: {allowed}")
        self.names[role] = str(getattr(value.config, "_name_or_path", "")) or type(value).__name__
        return value

    def _before(self, value: Any) -> Any:
        if not isinstance(value, str) or not value.startswith(("every:", "layers:")):
            return self._model(BEFORE, value)
        if self.teacher is None:
            raise UserError(f"before is {value!r}, but the teacher is a cache: no layers to cut; give a model")
        self.names[BEFORE] = f"{value} of {self.names[TEACHER]}"
        keep = layers_of(value, self.teacher.config.num_hidden_layers)
        assert keep is not None
        dtype = next(self.students[STUDENT].parameters()).dtype
        return student_from_layers(self.teacher, keep).to(dtype).to(next(self.teacher.parameters()).device)


def blocks_of(texts: Texts, block_size: int, sides: Sides) -> dict[str, Blocks]:
    """Each domain's text in blocks; see `compare_models`."""
    if isinstance(texts, (str, Path)):
        texts = {name: list(read_documents(path)) for name, path in find_domains(str(texts), {}).items()}
    if not isinstance(texts, Mapping) or not texts:
        raise UserError(f"texts is {'empty' if texts == {} else type(texts).__name__}; allowed: documents by domain")
    found = {
        name: part if isinstance(part, Blocks) else _packed(name, part, block_size, sides)
        for name, part in texts.items()
    }
    for name, blocks in found.items():
        if len(blocks.tokens) < 2:
            raise UserError(f"domain {name!r} holds no text; add text or leave it out")
    if len({blocks.length for blocks in found.values()}) > 1:
        raise UserError("texts has blocks of different lengths; allowed: one length")
    return found


def _packed(name: str, documents: Any, block_size: int, sides: Sides) -> Blocks:
    if isinstance(documents, str) or not all(isinstance(text, str) for text in documents):
        raise UserError(f"texts[{name!r}] is {documents!r:.60}; allowed: a list of documents, or Blocks")
    if sides.tokenizer is None:
        raise UserError("tokenizer is None; give the one of the models, or a pair (model, tokenizer)")
    end = sides.tokenizer.eos_token_id
    if end is None:
        raise UserError("tokenizer has no end-of-text token (eos_token), which separates documents; set one")
    return pack(list(tokenise((t for t in documents if t.strip()), sides.tokenizer, end)), block_size, end)

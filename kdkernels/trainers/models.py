"""Teachers, students and tokenisers: loaded by path or name through transformers, or cut from the teacher's layers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdkernels.errors import UserError
from kdkernels.optional import need


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes while it loads or saves; its errors still come through."""
    transformers = need("transformers", "loading models")
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # GGUF bars obey no switch
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _source(role: str, where: str) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) for `from_pretrained`: a folder, a .gguf file, or a name left to transformers."""
    path = Path(where).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{role} is {where!r}; no such file; give the path of a .gguf file")
        need("gguf", f"{role} {where!r}")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        return str(path), {"local_files_only": True}
    if path.exists():
        raise UserError(f"{role} is {where!r}, a file; allowed: a folder, a .gguf file or a model's name")
    if where.startswith((".", "/", "~")) or where.count("/") > 1 or "\\" in where:
        raise UserError(f"{role} is {where!r}; no such folder; give a folder, a .gguf file or a model's name")
    return where, {}


def load_model(role: str, where: str, dtype: torch.dtype) -> Any:
    """A causal LM on the CPU in `dtype`; GGUF weights are unpacked."""
    transformers = need("transformers", f"{role} {where!r}")
    name, options = _source(role, where)
    if "gguf_file" in options:
        need("accelerate", f"{role} {where!r}")
        if hasattr(transformers, "GgufConfig"):  # older versions always unpack
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{role} is {where!r}; it cannot be loaded: {_first_line(error)}") from error
    return model.to(dtype)


def load_tokenizer(role: str, where: str) -> Any:
    """The tokeniser that lies with a model."""
    transformers = need("transformers", f"{role} {where!r}")
    name, options = _source(role, where)
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{role} {where!r} has no tokenizer: {_first_line(error)}; give --tokenizer") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def layers_of(spec: str, count: int) -> list[int] | None:
    """The layers that `every:K` or `layers:0,4,9` names among `count`; None where `spec` is neither.

    `every:K` keeps one layer in K (rounded up), spread evenly from the first to the last: without the last layer a
    pruned model starts, and stays, further from its teacher (SmolLM2-135M, 10 of 30 layers, 20 k tokens: KL 3.5 nats
    with it, 4.0 for layers 0, 3, ..., 27).
    """
    match = re.fullmatch(r"(every|layers):(.*)", spec)
    if match is None:
        return None
    try:
        numbers = [int(part) for part in match[2].split(",")]
    except ValueError:
        numbers = []
    if match[1] == "every" and len(numbers) == 1 and 1 <= numbers[0] <= count:
        kept = math.ceil(count / numbers[0])
        return [round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)]
    if match[1] == "layers" and numbers and numbers == sorted(set(numbers)) and 0 <= numbers[0] <= numbers[-1] < count:
        return numbers
    raise UserError(
        f"student is {spec!r}; allowed: every:K with K from 1 to {count}, or layers:A,B,... ascending from 0 to "
        f"{count - 1}; the teacher has {count} layers"
    )


def student_from_layers(teacher: Any, keep: list[int]) -> Any:
    """A float32 copy of `teacher` that has only the layers `keep`, with its own (tied, if the teacher's are) head."""
    count = teacher.config.num_hidden_layers
    stacks = [n for n, m in teacher.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(stacks) != 1:
        raise UserError(
            f"student: cannot tell the layers of {type(teacher).__name__} apart ({len(stacks)} stacks of {count}); "
            "give a student by path"
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(keep)
    for name, value in vars(teacher.config).items():
        if isinstance(value, list) and len(value) == count:  # per-layer settings, such as layer_types
            setattr(config, name, [value[i] for i in keep])
    config.dtype = torch.float32
    student = type(teacher)(config).to(torch.float32)
    place = {str(old): str(new) for new, old in enumerate(keep)}
    weights = {}
    for key, value in teacher.state_dict().items():
        new = key
        if key.startswith(stacks[0] + "."):
            number, rest = key[len(stacks[0]) + 1 :].split(".", 1)
            if number not in place:
                continue
            new = f"{stacks[0]}.{place[number]}.{rest}"
        weights[new] = value.float() if value.is_floating_point() else value
    student.load_state_dict(weights)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def common_vocabulary(teacher_rows: int, student_rows: int, tokens: int, asked: int) -> int | None:
    """The vocabulary both heads share: None where they have the same rows and nothing was asked for.

    Heads of one family often differ in padding only; `tokens` (the tokeniser's) must fit into the smaller one.
    """
    smaller = min(teacher_rows, student_rows)
    sizes = f"teacher has {teacher_rows} rows, student {student_rows}, the tokenizer {tokens} tokens"
    if asked > smaller:
        raise UserError(f"vocab_size is {asked}; allowed: up to {smaller} ({sizes}); lower it")
    if tokens > (asked or smaller):
        raise UserError(f"vocabularies differ: {sizes}; use a student and a teacher with one tokenizer")
    if asked:
        return asked
    return None if teacher_rows == student_rows else smaller


def tokenizer_hash(tokenizer: Any) -> str:
    """A name for what every token's id means: 16 hexadecimal digits over the vocabulary."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def same_tokenizer(teacher: Any, student: Any) -> None:
    """Raise `UserError` unless the two tokenisers give every token the same id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sum(1 for token, number in ours.items() if theirs.get(token) != number)
        raise UserError(
            f"tokenizers differ: teacher has {len(theirs)} tokens, student {len(ours)}, and {differing} of the "
            "student's mean something else to the teacher; distillation by token needs one tokenizer"
        )

"""From a configuration to everything a run needs in memory: models, heads, corpus, and a checked output folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from kdkernels import arguments, backends
from kdkernels.data import Corpus, load_corpus
from kdkernels.durable import sync_folder
from kdkernels.errors import UserError
from kdkernels.trainers import checkpoint
from kdkernels.trainers.cached import CachedTeacher, check_loss
from kdkernels.trainers.config import DistillConfig
from kdkernels.trainers.heads import Head, check_head, head_of
from kdkernels.trainers.models import (
    common_vocabulary,
    layers_of,
    load_model,
    load_tokenizer,
    quiet,
    same_tokenizer,
    student_from_layers,
)
from kdkernels.trainers.objective import Objective, build_divergence
from kdkernels.trainers.on_policy import Writer
from kdkernels.trainers.on_policy_text import writer_of
from kdkernels.trainers.prompts import Prompts, load_prompts


@dataclass(frozen=True)
class Setup:
    """What the loop works on."""

    objective: Objective
    tokenizer: Any
    corpus: Corpus
    writer: Writer | None = None
    prompts: Prompts | None = None
    language: Corpus | None = None  # of the second text


def build(config: DistillConfig, teacher: Any = None, student: Any = None, tokenizer: Any = None) -> Setup:
    """Load what is not given; the cheap checks come before the slow loads."""
    divergence = build_divergence(config.divergence, config.divergence_args)
    device = pick_device(config.device)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    _check_options(config, divergence, device, dtype)
    cached = CachedTeacher(kd.TeacherCache.open(config.cache)) if config.cache else None
    tokenizer = tokenizer or _tokenizer(config, student is not None or config.cuts_teacher, cached)
    corpus = _corpus(config, config.data, config.domain, tokenizer)
    language = _second_corpus(config, tokenizer) if config.lm_data else None
    prompts = load_prompts(config.prompts, config.prompt_template, tokenizer) if config.prompts else None
    parts = [part.fingerprint for part in (corpus, language, prompts) if part is not None]
    corpus = dataclasses.replace(corpus, fingerprint="-".join(parts))
    teacher, student = _models(config, teacher, student, dtype, with_teacher=cached is None)
    student = student.to(device).train()
    teacher_head = None
    if cached is None:
        teacher = teacher.to(device).eval().requires_grad_(False)
        teacher_head = _head(config, teacher, "teacher", device)
    head = _head(config, student, "student", device)
    if cached is not None:
        teacher = None
        cached.check(config, corpus, tokenizer, head.vocab)
        check_loss(config, divergence, cached)
    theirs = cached.vocab if cached is not None else teacher_head.vocab if teacher_head is not None else 0
    vocab = common_vocabulary(theirs, head.vocab, len(tokenizer), config.vocab_size)
    objective = Objective(config, divergence, teacher, student, teacher_head, head, vocab, dtype, device, cached)
    writer = writer_of(config, objective, prompts, tokenizer) if config.on_policy else None
    return Setup(objective, tokenizer, corpus, writer, prompts, language)


def _corpus(config: DistillConfig, data: str, domain: dict[str, str], tokenizer: Any) -> Corpus:
    return load_corpus(
        data, domain, tokenizer, length=config.block_size, held_out=config.held_out, seed=config.seed,
        text_key=config.text_key,
    )  # fmt: skip


def _second_corpus(config: DistillConfig, tokenizer: Any) -> Corpus:
    try:
        return _corpus(config, config.lm_data, {}, tokenizer)
    except UserError as error:
        raise UserError(f"lm_data: {error}") from error


def _check_options(config: DistillConfig, divergence: kd.Divergence, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UserError` for options that the loss would refuse at the first batch."""
    try:
        arguments.check_scalars(
            config.temperature, config.temperature_scaling, config.kd_weight, config.ce_weight, None, None, -100
        )
        backends.choose(config.backend, device, dtype, divergence.kernel().name)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    low, high = arguments.LOWEST_TEMPERATURE, arguments.HIGHEST_TEMPERATURE
    if not low <= config.sample_temperature <= high:
        raise UserError(
            f"sample_temperature is {config.sample_temperature:g}; allowed: {low:g} to {high:g}; correct it"
        )


def _models(
    config: DistillConfig, teacher: Any, student: Any, dtype: torch.dtype, *, with_teacher: bool
) -> tuple[Any, Any]:
    """(teacher, student), loaded where they are not given; a teacher that is only cut is loaded for that."""
    if teacher is None and (with_teacher or (student is None and config.cuts_teacher)):
        teacher = load_model("teacher", config.teacher, dtype)
    if student is None:
        keep = layers_of(config.student, getattr(getattr(teacher, "config", None), "num_hidden_layers", 0))
        student = (
            load_model("student", config.student, torch.float32) if keep is None else student_from_layers(teacher, keep)
        )
    return teacher, student


def _head(config: DistillConfig, model: Any, role: str, device: torch.device) -> Head:
    """The model's head, checked, and its context long enough."""
    head = head_of(model, role)
    check_head(model, head, role, device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.block_size > limit:
        raise UserError(f"block_size is {config.block_size}; the {role} reads at most {limit} tokens; lower it")
    return head


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device is {name!r}; this torch cannot use it ({str(error).splitlines()[0]}); try cpu"
        ) from error
    return device


def _tokenizer(config: DistillConfig, from_teacher: bool, cached: CachedTeacher | None) -> Any:
    """The run's tokeniser; where teacher and student bring one each, they must agree."""
    if config.tokenizer:
        return load_tokenizer("tokenizer", config.tokenizer)
    if cached is not None:  # whose hash is compared later
        recorded = cached.cache.settings.tokenizer or cached.cache.settings.teacher
        where = config.teacher or recorded if from_teacher else config.student
        return load_tokenizer("teacher" if from_teacher else "student", where)
    teacher = load_tokenizer("teacher", config.teacher)
    if from_teacher:
        return teacher
    student = load_tokenizer("student", config.student)
    same_tokenizer(teacher, student)
    return student


def check_output(config: DistillConfig) -> Path:
    """The folder of the run: new, or to be resumed with the same options."""
    output = Path(config.output).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"output is {config.output!r}, a file; allowed: a folder; choose another")
    begun = output / "config.json"
    steps, finished = checkpoint.steps_in(output / "checkpoints"), (output / "summary.json").is_file()
    if begun.is_file() and (steps or finished):  # a run that saved nothing has nothing to lose, nor to go on from
        if not config.resume:
            state = "a finished run" if finished else f"a run at step {max(steps)}"
            raise UserError(f"output {config.output!r} holds {state}; add --resume, or choose another --output")
        _same_run(config, begun)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output is {config.output!r}; it cannot be made ({error.strerror}); choose another") from error
    if not os.access(output, os.W_OK):
        raise UserError(f"output is {config.output!r}; it cannot be written; choose another")
    return output


def _same_run(config: DistillConfig, begun: Path) -> None:
    before = json.loads(begun.read_text(encoding="utf-8"))
    for name, value in config.trajectory().items():
        if name in before and before[name] != value:
            raise UserError(
                f"{name} is {value!r}, but the run in {str(begun.parent)!r} began with {before[name]!r}; "
                "resume with the same options, or choose another --output"
            )


def saved_dtype(config: DistillConfig) -> torch.dtype:
    """The dtype in which the student is saved (and scored at the end)."""
    if config.save_dtype == "auto":
        return torch.bfloat16 if config.bf16 else torch.float32
    dtype: torch.dtype = getattr(torch, config.save_dtype)
    return dtype


def save_student(student: Any, tokenizer: Any, output: Path) -> Path:
    """Write `output/student` in transformers' format, whole or not at all."""
    target, temporary = output / "student", output / f".student.{os.getpid()}.tmp"
    with quiet():
        student.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.replace(target)
    sync_folder(output)
    return target

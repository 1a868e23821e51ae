"""Every option of a distillation run: one frozen dataclass, the source of the command line's flags as well."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kdkernels.errors import UserError

OPTIMIZERS = ("adamw", "adafactor", "sgd")
# first field of a group of options -> the group's title in `--help`
GROUPS = {
    "teacher": "models",
    "data": "text",
    "divergence": "loss",
    "on_policy": "text that the student writes (SWITCH, GKD)",
    "steps": "training",
    "eval_before": "evaluation, metrics, checkpoints",
}
_OF_ON_POLICY = (
    "generated_share", "gate", "max_new_tokens", "sample_temperature", "prompts", "prompt_template", "prompt_tokens",
    "write_batch", "replay", "replay_share", "replay_age",
)  # fmt: skip
"""Options that would change nothing without on_policy."""
SCHEDULES = ("cosine", "linear", "constant")
VARIANTS = ("ddk", "no_smoothing", "equal")
MIXES = ("proportional", "equal")
SCALINGS = ("none", "t2")
Options = TypeVar("Options")
SPARSE_MODES = ("ghost", "renormalize", "truncate")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _option(default: Any, text: str, *, choices: tuple[str, ...] = (), free: bool = False) -> Any:
    """A field with its help text; `free` marks what may change when a run is resumed."""
    return field(default=default, metadata=_about(text, choices, free))


def _about(text: str, choices: tuple[str, ...] = (), free: bool = False) -> dict[str, Any]:
    return {"help": text, "choices": choices, "free": free}


@dataclass(frozen=True)
class DistillConfig:
    """Options of `kdkernels.trainers.distill`; `validate` checks the values, `load` reads JSON or TOML.

    Defaults never change the loss silently: temperature 1, no scaling, no hard labels.
    """

    teacher: str = _option("", "teacher: a folder, a .gguf file, or a name that transformers knows")
    student: str = _option(
        "",
        "student: a folder or a name; `every:K` makes it from one in K of the teacher's layers, first and last "
        "included, `layers:0,4,9` from those layers",
    )
    tokenizer: str = _option("", "tokenizer: a folder or a name (default: the student's, else the teacher's)")
    cache: str = _option("", "train from this teacher cache (see `kdkernels cache`); no teacher is loaded then")
    output: str = _option("runs/distill", "folder of the run: student, metrics, checkpoints", free=True)

    data: str = _option("", "folder with one domain per subfolder (.txt .md .rst .py .jsonl), or one domain's folder")
    domain: dict[str, str] = field(
        default_factory=dict, metadata=_about("one domain: NAME=PATH of a file or a folder; repeat for more")
    )
    text_key: str = _option("text", "the field of a .jsonl line that holds the text")
    block_size: int = _option(512, "tokens per block; documents are packed, and never see one another")
    held_out: float = _option(0.05, "share of every domain's text kept for evaluation, by document and seed")
    ddk: bool = _option(False, "draw each interval's domains by how far the student is behind the teacher (DDK)")
    ddk_interval: int = _option(1000, "steps between two measurements")
    ddk_alpha: float = _option(0.5, "smoothing of the domains' weights, 0 to 1")
    ddk_variant: str = _option("ddk", "rule of the weights, for comparison", choices=VARIANTS)
    ddk_blocks: int = _option(500, "held-out blocks of each domain that are measured")
    mix: str = _option("proportional", "domains drawn by their size, or in equal parts", choices=MIXES)

    divergence: str = _option(
        "", "divergence by name (kdkernels info lists them); skew_reverse_kl with --on-policy, else forward_kl"
    )
    divergence_args: dict[str, float] = field(
        default_factory=dict, metadata=_about("a parameter of the divergence: NAME=VALUE; repeat for more")
    )
    temperature: float = _option(1.0, "temperature of both models inside the divergence")
    temperature_scaling: str = _option("none", "t2 multiplies the divergence by temperature**2", choices=SCALINGS)
    kd_weight: float = _option(1.0, "weight of the divergence; 0 trains on the text alone, without the teacher")
    ce_weight: float = _option(0.0, "weight of the cross-entropy on the text")
    sparse_mode: str = _option("ghost", "how a cache's kept entries are compared", choices=SPARSE_MODES)
    vocab_size: int = _option(0, "real vocabulary where heads are padded (0: the smaller head, checked)")
    chunk_mib: float = _option(0.0, "memory for one chunk of logits, MiB (0: the library's choice)", free=True)
    backend: str = _option("auto", "backend of the loss")
    lm_data: str = _option("", "a second text, laid out as --data, for a language-model loss beside the distillation")
    lm_weight: float = _option(1.0, "weight of the cross-entropy on --lm-data")

    on_policy: bool = _option(False, "train part of the steps on text that the student writes and the teacher corrects")
    generated_share: float = _option(0.5, "probability that a step is of written text (0: none, 1: all)")
    gate: str = _option(
        "exponential", "threshold schedule of the teacher's word, NAME[:TAU0[,DECAY]] as in `kdkernels generate`; "
        "constant:1 lets the student write alone (GKD)"
    )  # fmt: skip
    max_new_tokens: int = _option(128, "the most tokens of a response")
    sample_temperature: float = _option(1.0, "temperature of sampling")
    prompts: str = _option(
        "", "file of prompts: .txt, one a line; .jsonl with `prompt` and, if all have one, `response`, which then is "
        "the text of the other steps (default: beginnings of documents)"
    )  # fmt: skip
    prompt_template: str = _option("plain", "template of the file's prompts, as in `kdkernels generate`")
    prompt_tokens: int = _option(32, "tokens of a document that make a prompt, at most half of it")
    write_batch: int = _option(0, "sequences written at a time (0: all of a step)")
    replay: int = _option(0, "written sequences kept to be trained on again (0: none)")
    replay_share: float = _option(0.5, "probability that a step of written text takes kept sequences")
    replay_age: int = _option(100, "steps after which a sequence is trained on no more")

    steps: int = _option(1000, "optimiser steps")
    batch_size: int = _option(8, "blocks per forward pass")
    accumulate: int = _option(1, "forward passes per optimiser step")
    optimizer: str = _option("adamw", "optimiser", choices=OPTIMIZERS)
    lr: float = _option(1e-4, "peak learning rate")
    weight_decay: float = _option(0.0, "decoupled weight decay, on matrices only")
    beta1: float = _option(0.9, "AdamW's first beta; momentum of sgd")
    beta2: float = _option(0.95, "AdamW's second beta")
    schedule: str = _option("cosine", "course of the learning rate after the warm-up", choices=SCHEDULES)
    warmup: int = _option(0, "steps of linear warm-up")
    min_lr: float = _option(0.0, "learning rate at the end, as a share of the peak")
    clip: float = _option(1.0, "largest gradient norm (0: no clipping)")
    bf16: bool = _option(False, "compute in bfloat16; the student's weights and moments stay float32")
    seed: int = _option(0, "seed of the split, the order of the data, and dropout")
    device: str = _option("auto", "torch device; auto takes a GPU when there is one", free=True)

    eval_before: bool = _option(True, "evaluate the untrained student too", free=True)
    eval_every: int = _option(0, "steps between evaluations during the run (0: none)", free=True)
    eval_blocks: int = _option(32, "held-out blocks per domain that an evaluation reads", free=True)
    log_every: int = _option(10, "steps between lines of metrics.jsonl", free=True)
    save_every: int = _option(500, "steps between checkpoints (0: only when interrupted)", free=True)
    keep: int = _option(2, "newest checkpoints kept", free=True)
    save_dtype: str = _option("auto", "dtype of the saved student (auto: as computed)", choices=DTYPES, free=True)
    resume: bool = _option(False, "continue the run in `output`, or start it where there is none", free=True)

    def __post_init__(self) -> None:
        if not self.divergence:
            object.__setattr__(self, "divergence", "skew_reverse_kl" if self.on_policy else "forward_kl")

    def validate(self) -> DistillConfig:
        """Raise `UserError` for the first value that cannot work; returns self."""
        needed = ["student"] if self.cache and not self.cuts_teacher else ["teacher", "student"]
        for name in needed:
            _require(bool(getattr(self, name)), name, "''", "a folder, a file or a name", f"give --{name}")
        _require(bool(self.data or self.domain), "data", "''", "a folder", "give --data DIR or --domain NAME=PATH")
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices:
                _require(value in choices, item.name, repr(value), "one of " + ", ".join(choices), "choose one")
            if isinstance(value, float):
                _require(math.isfinite(value), item.name, str(value), "a finite number", "correct it")
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "eval_blocks",
            "log_every",
            "keep",
            "ddk_interval",
            "ddk_blocks",
            "max_new_tokens",
            "prompt_tokens",
        ):
            _require(getattr(self, name) >= 1, name, str(getattr(self, name)), "at least 1", "raise it")
        _require(self.block_size >= 2, "block_size", str(self.block_size), "at least 2 tokens", "raise it")
        for name in (
            "warmup",
            "save_every",
            "eval_every",
            "vocab_size",
            "seed",
            "write_batch",
            "replay",
            "replay_age",
        ):
            _require(getattr(self, name) >= 0, name, str(getattr(self, name)), "0 or more", "raise it")
        for name in ("kd_weight", "ce_weight", "weight_decay", "clip", "chunk_mib", "lm_weight"):
            _require(getattr(self, name) >= 0, name, str(getattr(self, name)), "0 or more", "raise it")
        for name in ("lr", "temperature", "sample_temperature"):
            _require(getattr(self, name) > 0, name, str(getattr(self, name)), "above 0", "raise it")
        for name in ("beta1", "beta2", "min_lr", "ddk_alpha", "generated_share", "replay_share"):
            _require(0 <= getattr(self, name) <= 1, name, str(getattr(self, name)), "0 to 1", "correct it")
        _require(not (self.ddk and self.cache), "ddk", "on", "off with --cache", "a teacher model is measured")
        _require(0 < self.held_out < 1, "held_out", str(self.held_out), "between 0 and 1", "0.05 is usual")
        _require(self.warmup < self.steps, "warmup", str(self.warmup), f"below steps ({self.steps})", "lower it")
        _require(self.kd_weight + self.ce_weight > 0, "kd_weight", "0", "above 0 where ce_weight is 0", "raise one")
        _require(not self.lm_data or self.lm_weight > 0, "lm_weight", "0", "above 0 with --lm-data", "raise it")
        if self.on_policy:
            self._validate_on_policy()
        self._refuse_idle("on_policy", bool(self.on_policy), _OF_ON_POLICY)
        self._refuse_idle("lm_data", bool(self.lm_data), ("lm_weight",))
        self._refuse_idle("prompts", bool(self.prompts), ("prompt_template",))
        return self

    def _refuse_idle(self, needed: str, given: bool, names: tuple[str, ...]) -> None:
        for item in dataclasses.fields(self):
            value, flag = getattr(self, item.name), needed.replace("_", "-")
            idle = item.name in names and not given and value != item.default
            _require(not idle, item.name, repr(value), f"{item.default!r} without --{flag}", "add it")

    def _validate_on_policy(self) -> None:
        _require(not self.cache, "on_policy", "on", "off with --cache", "the teacher judges text that is new")
        _require(self.kd_weight > 0, "kd_weight", "0", "above 0 with --on-policy", "written text has no other loss")
        rows = self.batch_size * self.accumulate
        few = f"0, or at least the {rows} sequences of a step"
        _require(self.replay == 0 or self.replay >= rows, "replay", str(self.replay), few, "raise it")

    @property
    def cuts_teacher(self) -> bool:
        """Whether the student is made from the teacher's layers."""
        return self.student.startswith(("every:", "layers:"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `config.json`."""
        return dataclasses.asdict(self)

    def trajectory(self) -> dict[str, Any]:
        """The options that decide the numbers: a resumed run must have the same ones."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["free"]}


def _require(ok: bool, name: str, value: str, allowed: str, remedy: str) -> None:
    if not ok:
        raise UserError(f"{name} is {value}; allowed: {allowed}; {remedy}")


def config_from(values: dict[str, Any], source: str) -> DistillConfig:
    """A config from plain values (a file's, or the command line's); unknown names and wrong types raise `UserError`."""
    return options_from(values, source, DistillConfig)


def options_from(values: dict[str, Any], source: str, kind: type[Options]) -> Options:
    """`config_from` for any dataclass of options."""
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{source}: unknown option {name!r}{_did_you_mean(name, known)}")
        clean[name] = _converted(name, value, getattr(kind(), name), source)
    return kind(**clean)


def _did_you_mean(name: str, known: dict[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; `kdkernels distill --help` lists them all"


def _converted(name: str, value: Any, default: Any, source: str) -> Any:
    """`value` as the type of `default`; an int may stand for a float, nothing else is coerced."""
    if isinstance(default, dict):
        numbers = name == "divergence_args"
        inner = (int, float) if numbers else str
        if isinstance(value, dict) and all(isinstance(v, inner) for v in value.values()):
            return {str(k): float(v) if numbers else v for k, v in value.items()}
    elif isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is type(default):
        return value
    wanted = "a table of names and values" if isinstance(default, dict) else type(default).__name__
    raise UserError(f"{source}: {name} is {value!r}; allowed: {wanted}; correct it")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The options in a .json or .toml file, as plain values; `batch-size` and `batch_size` are one name."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config is {str(path)!r}; no such file; give a .json or .toml file")
    try:
        if path.suffix == ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".toml":
            values = _toml(path.read_text(encoding="utf-8"))
        else:
            raise UserError(f"config is {str(path)!r}; allowed: a .json or .toml file; rename it")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {str(path)!r} holds a {type(values).__name__}; allowed: one table of options")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError as error:  # Python 3.10
        raise UserError("config: reading TOML needs Python 3.11 or newer; give the same options as .json") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config: not valid TOML: {error}") from error

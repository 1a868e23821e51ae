"""Every option of `kdkernels cache build`: one frozen dataclass, the source of its flags as well."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from kdkernels.compression.codec import BITS
from kdkernels.trainers.config import DistillConfig, _about, _option, _require

# first field of a group of options -> the group's title in `--help`
GROUPS = {"teacher": "models", "data": "text", "k": "what is kept of a row", "batch_size": "the job"}
_SAME = DistillConfig()  # defaults that must agree, or the blocks would not


@dataclass(frozen=True)
class CacheConfig:
    """Options of `kdkernels.trainers.build_cache`; those of the text must be those of `kdkernels distill --cache`."""

    teacher: str = _option("", "teacher: a folder, a .gguf file, or a name that transformers knows")
    tokenizer: str = _option("", "tokenizer: a folder or a name (default: the teacher's)")
    out: str = _option("", "folder of the cache", free=True)

    data: str = _option("", "folder with one domain per subfolder (.txt .md .rst .py .jsonl), or one domain's folder")
    domain: dict[str, str] = field(
        default_factory=dict, metadata=_about("one domain: NAME=PATH of a file or a folder; repeat for more")
    )
    text_key: str = _option(_SAME.text_key, "the field of a .jsonl line that holds the text")
    block_size: int = _option(_SAME.block_size, "tokens per block; documents are packed, and never see one another")
    held_out: float = _option(_SAME.held_out, "share of every domain's text kept for evaluation, by document and seed")
    seed: int = _option(_SAME.seed, "seed of the split, and of draws")

    k: int = _option(64, "most likely entries kept of every row")
    top_p: float = _option(0.0, "keep only as many of the k as reach this mass (0: all k)")
    samples: int = _option(0, "instead of the most likely entries, this many draws from every row (0: none)")
    temperature: float = _option(1.0, "temperature of the distributions; the tail at 1 is kept besides")
    other_temperatures: str = _option("", "further temperatures to train at, such as 2,4: 4 bytes a token each")
    bits: int = _option(0, "bits of a log-probability: 4 to 12 quantised, 16 or 32 floating point (0: 8, of draws 32)")
    entropy: bool = _option(False, "keep the entropy of every row")
    vocab_size: int = _option(0, "real vocabulary where the teacher's head is padded (0: its rows)")

    batch_size: int = _option(8, "blocks per forward pass", free=True)
    chunk_mib: float = _option(0.0, "memory for one chunk of logits, MiB (0: the library's choice)", free=True)
    backend: str = _option("auto", "backend of the selection", free=True)
    bf16: bool = _option(False, "compute in bfloat16")
    device: str = _option("auto", "torch device; auto takes a GPU when there is one", free=True)
    commit_every: float = _option(60.0, "seconds between commits: a kill loses at most this much", free=True)
    resume: bool = _option(False, "go on with the cache in `out`, or start it where there is none", free=True)

    def validate(self) -> CacheConfig:
        """Raise `UserError` for the first value that cannot work; returns self."""
        _require(bool(self.teacher), "teacher", "''", "a folder, a file or a name", "give --teacher")
        _require(bool(self.out), "out", "''", "a folder", "give --out")
        _require(bool(self.data or self.domain), "data", "''", "a folder", "give --data DIR or --domain NAME=PATH")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float):
                _require(math.isfinite(value), item.name, str(value), "a finite number", "correct it")
        _require(self.block_size >= 2, "block_size", str(self.block_size), "at least 2 tokens", "raise it")
        _require(0 < self.held_out < 1, "held_out", str(self.held_out), "between 0 and 1", "0.05 is usual")
        _require(1 <= self.k <= 4096, "k", str(self.k), "1 to 4096", "64 is usual")
        _require(0 <= self.top_p <= 1, "top_p", str(self.top_p), "0 (all k) to 1", "correct it")
        both = self.samples and self.top_p
        _require(not both, "samples", str(self.samples), "0 where top_p is given", "choose one of the two")
        _require(self.bits in (0, *BITS), "bits", str(self.bits), "0, " + ", ".join(map(str, BITS)), "0 is usual")
        _require(self.temperature > 0, "temperature", str(self.temperature), "above 0", "raise it")
        self._check_others()
        _require(self.batch_size >= 1, "batch_size", str(self.batch_size), "at least 1", "raise it")
        for name in ("samples", "vocab_size", "seed", "commit_every", "chunk_mib"):
            _require(getattr(self, name) >= 0, name, str(getattr(self, name)), "0 or more", "raise it")
        return self

    def others(self) -> tuple[float, ...]:
        """`other_temperatures`, and 1, at which held-out text is scored; none with draws."""
        given = [float(part) for part in self.other_temperatures.split(",") if part.strip()]
        usual = [] if self.samples else [1.0]
        return tuple(t for t in dict.fromkeys((*usual, *given)) if t != self.temperature)

    def _check_others(self) -> None:
        given, name = self.other_temperatures, "other_temperatures"
        try:
            usable = all(0 < t < math.inf for t in self.others())
        except ValueError:
            usable = False
        _require(usable, name, repr(given), "numbers above 0, separated by commas", "2,4 for example")
        _require(not (given and self.samples), name, repr(given), "none with samples", "draws hold at one temperature")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

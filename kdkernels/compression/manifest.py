"""`manifest.json` of a teacher cache: what the cache holds, which shards, and a checksum over itself.

    {"format": "kdkernels-teacher-cache", "version": 1, "settings": {...}, "shards": [{...}, ...], "checksum": "..."}

The checksum is the SHA-256 of the file's text without the `checksum` member; the text must be exactly what
`Manifest.to_bytes` writes, so no byte can change unnoticed. A shard counts if and only if the manifest lists it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdkernels._checks import fail
from kdkernels.compression import codec
from kdkernels.errors import UserError

FORMAT = "kdkernels-teacher-cache"
VERSION = 1
NAME = "manifest.json"
KINDS = ("topk", "sampled")
LARGEST = 1 << 28  # bytes of a manifest: two million shards
LARGEST_METADATA = 1 << 16
LAST_ID = 2**63 - 1
SHARD_NAME = re.compile(r"examples-(\d{12,19})-(\d{12,19})\.safetensors")


class CacheError(UserError):
    """Something about a teacher cache that its user can put right; the text says what and how."""


class AbsentExampleError(CacheError, KeyError):
    """The cache has no example of this id."""

    __str__ = ValueError.__str__  # KeyError's would quote the text


@dataclass(frozen=True)
class Settings:
    """What `TeacherCache.create` fixes for good; every part of a cache has the same.

    metadata: further plain values about where the examples come from (JSON).
    """

    vocab_size: int
    k: int
    temperature: float = 1.0
    other_temperatures: tuple[float, ...] = ()
    entropy: bool = False
    kind: str = "topk"
    bits: int = 8
    teacher: str = ""
    tokenizer: str = ""
    tokenizer_hash: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "k", "bits"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                fail(CacheError, name, repr(value), "an int")
        if not 1 <= self.vocab_size < 2**31:
            fail(CacheError, "vocab_size", self.vocab_size, "1 to 2**31 - 1")
        if not 1 <= self.k <= self.vocab_size:
            fail(CacheError, "k", self.k, f"1 to vocab_size ({self.vocab_size})", "lower it")
        if self.bits not in codec.BITS:
            fail(CacheError, "bits", self.bits, f"one of {', '.join(map(str, codec.BITS))}", "8 is usual")
        if self.kind not in KINDS:
            fail(CacheError, "kind", repr(self.kind), "one of " + ", ".join(map(repr, KINDS)))
        for name in ("teacher", "tokenizer", "tokenizer_hash"):
            if not isinstance(getattr(self, name), str):
                fail(CacheError, name, repr(getattr(self, name)), "a str")
        self._check_temperatures()
        try:
            size = len(json.dumps(self.metadata, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            fail(CacheError, "metadata", repr(self.metadata)[:80], "plain values that JSON can hold")
        if size > LARGEST_METADATA:
            fail(CacheError, "metadata", f"{size} bytes of JSON", f"at most {LARGEST_METADATA}")

    def _check_temperatures(self) -> None:
        for name, value in (("temperature", self.temperature), *(("other_temperatures", t) for t in self.others)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                fail(CacheError, name, repr(value), "a finite number above 0")
        if len({self.temperature, *self.others}) <= len(self.others):
            fail(CacheError, "other_temperatures", self.others, f"different, and none {self.temperature}")
        if self.kind == "sampled" and self.others:
            fail(CacheError, "other_temperatures", self.others, "() where kind is 'sampled'")

    @property
    def others(self) -> tuple[float, ...]:
        """`other_temperatures`."""
        return self.other_temperatures

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "other_temperatures": list(self.others)}

    def differences(self, other: Settings) -> list[str]:
        """Names of the settings that differ; `metadata` may."""
        return [f.name for f in dataclasses.fields(self) if f.name != "metadata" and self._differs(other, f.name)]

    def _differs(self, other: Settings, name: str) -> bool:
        return bool(getattr(self, name) != getattr(other, name))


@dataclass(frozen=True)
class ShardEntry:
    """One line of the manifest. nbytes: of the whole file; head: SHA-256 of everything before its blocks."""

    file: str
    first: int
    last: int
    examples: int
    rows: int
    nbytes: int
    head: str


@dataclass(frozen=True)
class Manifest:
    """Settings and shards, the shards by their first example id."""

    settings: Settings
    shards: tuple[ShardEntry, ...] = ()

    @property
    def examples(self) -> int:
        """Examples of all shards."""
        return sum(shard.examples for shard in self.shards)

    def adding(self, *shards: ShardEntry) -> Manifest:
        """With further shards, in order."""
        return Manifest(self.settings, tuple(sorted((*self.shards, *shards), key=lambda shard: shard.first)))

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings.to_dict(),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        return _text({**body, "checksum": hashlib.sha256(_text(body)).hexdigest()})


def _text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the cache in `folder`, checked; `CacheError` for everything else."""
    path = folder / NAME
    if not path.is_file():
        what = "a folder without manifest.json" if folder.is_dir() else "no folder"
        fail(CacheError, "path", repr(str(folder)), f"a teacher cache, it is {what}", "correct it, or create a cache")
    try:
        if path.stat().st_size > LARGEST:
            raise CacheError(f"{str(path)!r} is larger than any manifest ({LARGEST} bytes); restore it from a copy")
        return _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise CacheError(f"{str(path)!r} cannot be read ({error.strerror})") from error


def _parse(raw: bytes, where: str) -> Manifest:
    try:
        value = json.loads(raw)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("it is not the manifest of a teacher cache")
        version = value.get("version")
        if isinstance(version, int) and version > VERSION:
            raise CacheError(f"{where!r} has format version {version}; this kdkernels reads {VERSION}; upgrade it")
        checksum = value.pop("checksum", None)
        if version != VERSION or checksum != hashlib.sha256(_text(value)).hexdigest():
            raise ValueError("its checksum is wrong")
        manifest = Manifest(_settings(value["settings"]), tuple(map(_entry, value["shards"])))
        if manifest.to_bytes() != raw:
            raise ValueError("it is not as it was written")
    except CacheError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise CacheError(f"{where!r} is damaged ({_brief(error)}); restore it from a copy") from None
    return manifest


def _brief(error: BaseException) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def _settings(value: dict[str, Any]) -> Settings:
    return Settings(**{**value, "other_temperatures": tuple(value["other_temperatures"])})


def _entry(value: dict[str, Any]) -> ShardEntry:
    entry = ShardEntry(**value)
    numbers = (entry.first, entry.last, entry.examples, entry.rows, entry.nbytes)
    if not all(type(number) is int and 0 <= number <= LAST_ID for number in numbers):
        raise ValueError("a shard's numbers are out of range")
    if entry.file != shard_name(entry.first, entry.last):
        raise ValueError("a shard's name is not its range")
    if not 1 <= entry.examples <= entry.last - entry.first + 1:
        raise ValueError("a shard's range is too small")
    return entry


def shard_name(first: int, last: int) -> str:
    """The file of the shard whose smallest and largest example ids are these."""
    return f"examples-{first:012d}-{last:012d}.safetensors"

"""What results share: plain values out and in, JSON files written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from kdkernels.durable import write_atomically
from kdkernels.errors import UserError

Self = TypeVar("Self", bound="Result")
VERSION = 1


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; `UserError` where it cannot be written."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    try:
        write_atomically(Path(path).expanduser(), write)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another folder or file") from error


class Result:
    """Base of result dataclasses; `kind` names the type in JSON. Nested dataclasses are rebuilt by `_inner`."""

    kind = ""

    @classmethod
    def _inner(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fields of the constructor from plain values."""
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain values: numbers, texts, lists, dicts, None."""
        return {"kind": self.kind, "version": VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[Self], values: dict[str, Any]) -> Self:
        """Back from `to_dict`."""
        if values.get("kind") != cls.kind or values.get("version") != VERSION:
            found = f"{values.get('kind')!r}, version {values.get('version')!r}"
            raise UserError(f"result is {found}; allowed: {cls.kind!r}, version {VERSION}")
        try:
            return cls(**cls._inner({k: v for k, v in values.items() if k not in ("kind", "version")}))
        except (TypeError, KeyError) as error:
            raise UserError(f"result is no {cls.kind!r}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(path, text)

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Read what `save` wrote."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a result: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no result; allowed: JSON written by kdkernels evaluate")
        return cls.from_dict(values)

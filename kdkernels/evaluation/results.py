"""What results share: plain values out and in, JSON files written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, TypeVar, Union, get_args, get_origin, get_type_hints

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
            result = cls(**cls._inner({k: v for k, v in values.items() if k not in ("kind", "version")}))
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"result is no {cls.kind!r}: {error}") from error
        _check_types(result, cls, cls.kind)
        return result

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


def make_folder(path: str | Path) -> None:
    """The folder of results, before any work is done for it; `UserError` where it cannot be made."""
    try:
        Path(path).expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output is {str(path)!r}; it cannot be written ({error.strerror}); choose another") from error


def _check_types(value: Any, kind: Any, where: str) -> None:
    """`UserError` where a value is not of the type that its annotation names."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (kind is float and type(value) is int):
        return
    if origin in (Union, UnionType):
        fitting = [k for k in inner if isinstance(value, get_origin(k) or k) or (k is float and type(value) is int)]
        kind = fitting[0] if fitting else kind
        if fitting and get_origin(kind) is None:
            return
        origin, inner = get_origin(kind), get_args(kind)
    fits = origin not in (Union, UnionType) and isinstance(value, origin or kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} is {value!r:.60}; allowed: {getattr(kind, '__name__', kind)}")
    if dataclasses.is_dataclass(kind):
        for name, annotation in get_type_hints(kind).items():
            _check_types(getattr(value, name), annotation, f"{where}.{name}")
    elif origin is dict:
        for key, item in value.items():
            _check_types(item, inner[1], f"{where}.{key}")
    elif origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is ... else list(inner)
        if len(kinds) != len(value):
            raise UserError(f"{where} has {len(value)} items; allowed: {len(kinds)}")
        for i, (item, each) in enumerate(zip(value, kinds, strict=True)):
            _check_types(item, each, f"{where}[{i}]")
